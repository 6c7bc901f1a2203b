"""The demo's network, and its objective twice: with fastvae's ops, and in plain PyTorch.

The objective is SSE / B + beta * KL / B, the squared error and the KL divergence (nats) per image.
With beta = 2 sigma^2, sigma being the standard deviation of the decoder's Gaussian, this is
2 sigma^2 times the negative ELBO, up to the Gaussian's constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae
from fastvae import VAELossOutput

Decode = Callable[[Tensor], Tensor]
Objective = Callable[[Decode, Tensor, Tensor, Tensor, float, Tensor | None], VAELossOutput]


def fused(
    decode: Decode, x: Tensor, mu: Tensor, logvar: Tensor, beta: float, eps: Tensor | None
) -> VAELossOutput:
    """The objective with fastvae. Without `eps` the noise is drawn."""
    z = fastvae.reparameterize(mu, logvar, eps=eps)
    return fastvae.vae_loss(decode(z), x, mu, logvar, beta=beta)


def plain(
    decode: Decode, x: Tensor, mu: Tensor, logvar: Tensor, beta: float, eps: Tensor | None
) -> VAELossOutput:
    """The objective in plain PyTorch, as people write it."""
    std = torch.exp(0.5 * logvar)
    z = mu + std * (torch.randn_like(std) if eps is None else eps)
    recon = F.mse_loss(decode(z), x, reduction="sum") / x.shape[0]
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / x.shape[0]
    return VAELossOutput(recon + beta * kl, recon, kl)


def perceptron(inputs: int, hidden: int) -> list[nn.Module]:
    # SiLU has smooth derivatives: two trainings that differ by roundings stay together for longer.
    return [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]


class Autoencoder(nn.Module):
    """A perceptron on either side of the latent code; its forward pass is the objective.

    The encoder takes images [B, C, H, W]. The decoder makes images in [0, 1] of codes [B, L]: the
    likelihood's mean.
    """

    def __init__(self, shape: torch.Size, latent_dim: int, objective: Objective = fused) -> None:
        """`shape` is an image's (C, H, W)."""
        super().__init__()
        size, hidden, self.objective = shape.numel(), 256, objective
        codes = nn.Linear(hidden, 2 * latent_dim)
        self.encoder = nn.Sequential(nn.Flatten(), *perceptron(size, hidden), codes)
        last = nn.Linear(hidden, size), nn.Sigmoid(), nn.Unflatten(1, shape)
        self.decoder = nn.Sequential(*perceptron(latent_dim, hidden), *last)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] to mu and logvar, [B, L] each."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def forward(self, x: Tensor, beta: float, eps: Tensor | None = None) -> VAELossOutput:
        """The terms for images [B, C, H, W]."""
        return self.objective(self.decoder, x, *self.encode(x), beta, eps)
