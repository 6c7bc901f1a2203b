"""The ops as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.functional import VAELossOutput, number, refuse_torchscript, reparameterize, vae_loss

__all__ = ["Reparameterize", "VAELoss"]


class VAELoss(nn.Module):
    """`fastvae.vae_loss` with its options kept; ``forward`` takes and returns what it does.

    ``beta`` is a buffer, a 0-dim float32 tensor (or the tensor that was given): it is saved in checkpoints and moves with the
    module, but ``.half()`` and the like leave its dtype alone, since a small beta would lose its digits. Assign a number to
    anneal it: ``module.beta = 0.5`` fills the buffer in place, which compiled programs and CUDA graphs see. A checkpoint
    without a beta loads too and leaves it as it is.
    """

    beta: Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        likelihood: str = "mse",
        reduction: str = "batchmean",
        kl_reduction: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(beta, Tensor):
            beta = torch.tensor(number("nn.VAELoss", "beta", beta), dtype=torch.float32)
        self.register_buffer("beta", beta)
        self.likelihood = likelihood
        self.reduction = reduction
        self.kl_reduction = kl_reduction

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "beta" or isinstance(value, Tensor):
            super().__setattr__(name, value)
        else:
            # Not fill_: a compiled program takes its number as a constant, and that of an addition as an input.
            with torch.no_grad():
                self.beta.zero_().add_(number("nn.VAELoss", "beta", value))

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

    def forward(self, recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> VAELossOutput:
        return vae_loss(
            recon_x,
            x,
            mu,
            logvar,
            beta=self.beta,
            likelihood=self.likelihood,
            reduction=self.reduction,
            kl_reduction=self.kl_reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"beta={float(self.beta):.6g}, likelihood={self.likelihood!r}, reduction={self.reduction!r}, "
            f"kl_reduction={self.kl_reduction!r}"
        )


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
