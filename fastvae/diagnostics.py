"""What a trainer wants to know of the latents."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.functional import kl_normal

__all__ = ["LatentStatistics"]


class LatentStatistics:
    """Which latents are in use, from batches that are added up::

        latents = fastvae.diagnostics.LatentStatistics()
        for x in loader:
            latents.update(*encoder(x).chunk(2, dim=1))
        print(latents.kl, latents.active_units(), latents.collapsed())

    Nothing is read on the host, and nothing is kept but two sums and the mean for each latent, in float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def update(
        self,
        mu: Tensor,
        logvar: Tensor,
        mu_p: Tensor | None = None,
        logvar_p: Tensor | None = None,
    ) -> None:
        """Adds a batch: the posterior, and the prior if it is not N(0, 1), [B, ...] as `fastvae.kl_normal` takes them."""
        kl = kl_normal(mu, logvar, mu_p, logvar_p, reduction="latent").double() * len(mu)
        if len(mu) == 0:
            return
        mean = mu.mean(0, dtype=torch.float64)
        square = (mu - mean).square().sum(0)
        before, self.count = self.count, self.count + len(mu)
        if self._sums is not None:
            # Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances (1979)
            kl_before, mean_before, square_before = self._sums
            step = mean - mean_before
            kl = kl + kl_before
            square = square + square_before + step.square() * (before * len(mu) / self.count)
            mean = mean_before + step * (len(mu) / self.count)
        self._sums = kl, mean, square

    def _known(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is None:
            raise RuntimeError(
                "fastvae.diagnostics.LatentStatistics: no samples yet; call update(mu, logvar) first"
            )
        return self._sums

    @property
    def kl(self) -> Tensor:
        """The KL of each latent in nats, a mean over the samples: the event's shape."""
        return self._known()[0] / self.count

    @property
    def variance(self) -> Tensor:
        """The variance of the posterior's mean over the samples (divided by their number less 1): the event's shape."""
        return self._known()[2] / (self.count - 1)

    def active_units(self, threshold: float = 0.01) -> Tensor:
        """How many latents have a `variance` above the threshold, a 0-dim integer tensor.

        Burda, Grosse and Salakhutdinov, *Importance weighted autoencoders* (2016), who call these the active units.
        """
        return (self.variance > threshold).sum()

    def collapsed(self, threshold: float = 0.01) -> Tensor:
        """The share of latents, 0 to 1, whose mean `kl` is below the threshold in nats, a 0-dim tensor."""
        return (self.kl < threshold).double().mean()
