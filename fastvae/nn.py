"""The ops as modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.functional import VAELossOutput, number, refuse_torchscript, reparameterize, vae_loss
from fastvae.likelihoods import Likelihood

__all__ = ["Reparameterize", "VAELoss"]


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
        self.beta = beta.to(self.beta.device)
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
            reduction=self.reduction,
            kl_reduction=self.kl_reduction,
            weight=weight,
            free_bits=self.free_bits,
            free_bits_per=self.free_bits_per,
        )

    def extra_repr(self) -> str:
        text = (
            f"beta={float(self.beta):.6g}, likelihood={self.likelihood!r}, reduction={self.reduction!r}, "
            f"kl_reduction={self.kl_reduction!r}"
        )
        if self.free_bits:
            text += f", free_bits={self.free_bits!r}, free_bits_per={self.free_bits_per!r}"
        return text


class Reparameterize(nn.Module):
    """`fastvae.reparameterize`; in eval mode it samples too, or returns mu with ``eval_mode="mean"``."""

    def __init__(self, eval_mode: str = "sample") -> None:
        super().__init__()
        if eval_mode not in ("sample", "mean"):
            raise ValueError(
                f'fastvae.nn.Reparameterize: eval_mode must be "sample" or "mean", but got {eval_mode!r}'
            )
        self.eval_mode = eval_mode

    def forward(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if not self.training and self.eval_mode == "mean":
            return mu
        return reparameterize(mu, logvar)

    def extra_repr(self) -> str:
        return f"eval_mode={self.eval_mode!r}"
