"""The ops as modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.functional import VAELossOutput, number, refuse_torchscript, reparameterize, vae_loss
from fastvae.likelihoods import Likelihood
from fastvae.posterior import DiagonalGaussian

__all__ = ["GaussianHead", "Reparameterize", "VAELoss"]


class VAELoss(nn.Module):
    """`fastvae.vae_loss` with its options kept; ``forward`` takes and returns what it does.

    ``beta`` is a buffer, a 0-dim float32 tensor (or the tensor that was given): it is saved in checkpoints and moves with the
    module, but ``.half()`` and the like leave its dtype alone, since a small beta would lose its digits. Assign a number to
    anneal it: ``module.beta = 0.5`` fills the buffer in place, which compiled programs and CUDA graphs see. A checkpoint
    without a beta loads too and leaves it as it is.

    A likelihood's ``nn.Parameter`` is one of the module's, under its own name (``log_scale``, ``logvar``): optimizers get it and
    checkpoints have it. Its other tensors move with the module and are not saved.
    """

    beta: Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        likelihood: str | Likelihood = "mse",
        reduction: str = "batchmean",
        kl_reduction: str | None = None,
        free_bits: float = 0.0,
        free_bits_per: str = "latent",
        scale: str = "logvar",
        clamp: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(beta, Tensor):
            beta = torch.tensor(number("nn.VAELoss", "beta", beta), dtype=torch.float32)
        self.register_buffer("beta", beta)
        self.likelihood = likelihood
        self.reduction = reduction
        self.kl_reduction = kl_reduction
        self.free_bits = free_bits
        self.free_bits_per = free_bits_per
        self.scale = scale
        self.clamp = clamp

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "likelihood":
            self._own_the_tensors_of(value)
        if name != "beta" or isinstance(value, Tensor):
            super().__setattr__(name, value)
        else:
            # Not fill_: a compiled program takes its number as a constant, and that of an addition as an input.
            with torch.no_grad():
                self.beta.zero_().add_(number("nn.VAELoss", "beta", value))

    def _own_the_tensors_of(self, likelihood: str | Likelihood) -> None:
        for name in getattr(self, "_tensors", ()):
            delattr(self, name)
        self._tensors: tuple[str, ...] = ()
        for name in likelihood._parameters if isinstance(likelihood, Likelihood) else ():
            value = getattr(likelihood, name)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
                self._tensors += (name,)
            elif value is not None and value.dim() > 0:  # others go with every device
                self.register_buffer(name, value, persistent=False)
                self._tensors += (name,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VAELoss:
        beta = self.beta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Its number and dtype stay. A module on the meta device had no number: to_empty leaves it as it leaves a weight.
        self.beta = self.beta.to(beta.dtype) if beta.is_meta else beta.to(self.beta.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(
            prefix + "beta", self.beta
        )  # checkpoints had no beta before it was a buffer
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it
        refuse_torchscript("nn.VAELoss")

    def forward(
        self, recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor | None = None
    ) -> VAELossOutput:
        """`fastvae.vae_loss` with the module's options."""
        likelihood = self.likelihood
        if self._tensors and isinstance(likelihood, Likelihood):
            # The module's may be other tensors by now: moved, loaded, or functional_call's.
            likelihood = replace(
                likelihood, **{name: getattr(self, name) for name in self._tensors}
            )
        return vae_loss(
            recon_x,
            x,
            mu,
            logvar,
            beta=self.beta,
            likelihood=likelihood,
            scale=self.scale,
            clamp=self.clamp,
            reduction=self.reduction,
            kl_reduction=self.kl_reduction,
            weight=weight,
            free_bits=self.free_bits,
            free_bits_per=self.free_bits_per,
        )

    def extra_repr(self) -> str:
        beta = self.beta if self.beta.is_meta else f"{float(self.beta):.6g}"
        text = (
            f"beta={beta}, likelihood={self.likelihood!r}, reduction={self.reduction!r}, "
            f"kl_reduction={self.kl_reduction!r}"
        )
        if self.free_bits:
            text += f", free_bits={self.free_bits!r}, free_bits_per={self.free_bits_per!r}"
        if self.scale != "logvar" or self.clamp is not None:
            text += f", scale={self.scale!r}, clamp={self.clamp!r}"
        return text


class Reparameterize(nn.Module):
    """`fastvae.reparameterize`; in eval mode it samples too, or returns mu with ``eval_mode="mean"``."""

    def __init__(
        self,
        eval_mode: str = "sample",
        scale: str = "logvar",
        clamp: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if eval_mode not in ("sample", "mean"):
            raise ValueError(
                f'fastvae.nn.Reparameterize: eval_mode must be "sample" or "mean", but got {eval_mode!r}'
            )
        self.eval_mode, self.scale, self.clamp = eval_mode, scale, clamp

    def forward(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """A sample, or mu."""
        if not self.training and self.eval_mode == "mean":
            return mu
        return reparameterize(mu, logvar, scale=self.scale, clamp=self.clamp)

    def extra_repr(self) -> str:
        text = f"eval_mode={self.eval_mode!r}"
        if self.scale != "logvar" or self.clamp is not None:
            text += f", scale={self.scale!r}, clamp={self.clamp!r}"
        return text


class GaussianHead(nn.Module):
    """Makes a `fastvae.DiagonalGaussian` of an encoder's output, mean and raw scale packed in one dimension; it has no weights.

    With the raw scale r:

    * ``"logvar"``: variance = exp(r) + eps (scvi-tools: eps = 1e-4);
    * ``"log_sigma"``: sigma = exp(r) + eps (vdvae; NVAE: eps = 1e-2 and ``soft_clamp=5.0``);
    * ``"softplus"``: sigma = log(1 + exp(r)) + eps (Oobleck: eps = 1e-4).

    logvar, and so the KL, keeps its digits near the prior and where sigma is tiny.

    Args:
        scale: what r is, see above.
        eps: the least variance, or the least sigma; at least 0.
        soft_clamp: mean and r become ``c tanh(r / c)`` first, with c the number given here; they stay within (-c, c).
        dim: which dimension of the input is packed.

    Raises:
        ValueError: another scale, a negative eps, a soft_clamp that is not above 0.
    """

    def __init__(
        self,
        scale: str = "logvar",
        *,
        eps: float = 0.0,
        soft_clamp: float | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__()
        need = {
            "scale": '"logvar", "log_sigma" or "softplus"',
            "eps": "at least 0 and finite",
            "soft_clamp": "above 0 and finite, or None",
        }
        good = {
            "scale": scale in ("logvar", "log_sigma", "softplus"),
            "eps": 0 <= eps < math.inf,
            "soft_clamp": soft_clamp is None or 0 < soft_clamp < math.inf,
        }
        for name, value in (("scale", scale), ("eps", eps), ("soft_clamp", soft_clamp)):
            if not good[name]:
                raise ValueError(
                    f"fastvae.nn.GaussianHead: {name} must be {need[name]}, but got {value!r}"
                )
        self.scale, self.eps, self.soft_clamp, self.dim = scale, eps, soft_clamp, dim

    def forward(self, parameters: Tensor) -> DiagonalGaussian:
        """The posterior that these parameters stand for."""
        packed = DiagonalGaussian(parameters, clamp=None, dim=self.dim)
        mean, raw = packed.mean, packed.logvar
        r = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.soft_clamp is not None:
            mean = self.soft_clamp * torch.tanh(mean / self.soft_clamp)
            r = self.soft_clamp * torch.tanh(r / self.soft_clamp)
        if self.scale == "softplus":
            r = _log_softplus(r)
        if self.eps > 0:  # not log(exp(r) + eps), which has no digits where that is near 1
            r = torch.logaddexp(r, r.new_full((), math.log(self.eps)))
        logvar = r if self.scale == "logvar" else 2 * r
        return DiagonalGaussian(mean, logvar.to(raw.dtype), clamp=None, dim=self.dim)

    def extra_repr(self) -> str:
        return f"{self.scale!r}, eps={self.eps}, soft_clamp={self.soft_clamp}, dim={self.dim}"


# Where softplus is 1, log(e - 1), as a float32 and the rest.
_ONE = (0.5413248538970947, 7.158233824158565e-10)


def _log_softplus(x: Tensor) -> Tensor:
    """log(softplus(x)): near softplus's 1 by what it differs from 1, below -30 x itself."""
    delta = (x - _ONE[0]) - _ONE[1]
    near, below = delta.abs() < 1, x < -30
    grown = torch.expm1(torch.where(near, delta, 0))
    around = torch.log1p(torch.log1p((1 - math.exp(-1)) * grown))
    rest = torch.log(F.softplus(torch.where(near | below, 1.0, x), threshold=40))
    return torch.where(near, around, torch.where(below, x, rest))
