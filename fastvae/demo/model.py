"""The demo's network: a small multilayer perceptron on either side of the latent code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """An encoder with two heads (mu, logvar) and a decoder.

    `shape` is an image's (C, H, W). `variational=False` leaves out the second head: a deterministic
    autoencoder. SiLU rather than ReLU, because with smooth derivatives two trainings that differ by
    roundings stay together for longer.
    """

    def __init__(
        self, shape: torch.Size, latent_dim: int, hidden: int, *, variational: bool = True
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(shape.numel(), hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
        )
        self.mu = nn.Linear(hidden, latent_dim)
        self.logvar = nn.Linear(hidden, latent_dim) if variational else None
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, shape.numel()),
            nn.Sigmoid(),
            nn.Unflatten(1, shape),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, C, H, W] to mu and logvar, [B, L] each; without that head, logvar is None."""
        h = self.encoder(x)
        return self.mu(h), None if self.logvar is None else self.logvar(h)

    def decode(self, z: Tensor) -> Tensor:
        """Codes [B, L] to images [B, C, H, W] in [0, 1], the likelihood's mean."""
        images: Tensor = self.decoder(z)
        return images
