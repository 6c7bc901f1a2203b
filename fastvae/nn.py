"""The ops as modules."""

from __future__ import annotations

from torch import Tensor, nn

from fastvae.functional import VAELossOutput, reparameterize, vae_loss

__all__ = ["Reparameterize", "VAELoss"]


class VAELoss(nn.Module):
    """`fastvae.vae_loss` with its options kept; ``forward`` takes and returns what it does.

    ``beta`` is a plain attribute: set it to anneal. A tensor beta is not a buffer: ``.to()`` does not move it.
    """

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        likelihood: str = "mse",
        reduction: str = "batchmean",
        kl_reduction: str | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.likelihood = likelihood
        self.reduction = reduction
        self.kl_reduction = kl_reduction

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
            f"beta={self.beta}, likelihood={self.likelihood!r}, reduction={self.reduction!r}, "
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
