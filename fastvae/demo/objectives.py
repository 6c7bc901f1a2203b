"""The demo's objective twice: with fastvae's ops, and in plain PyTorch as people write it.

Both encode `inputs`, sample z from the posterior, decode it and return the terms of

    loss = SSE / B + beta * KL / B,

the squared error and the KL divergence (nats) per image. With beta = 2 sigma^2, sigma being the
standard deviation of the decoder's Gaussian, this is 2 sigma^2 times the negative ELBO, up to the
Gaussian's constant. A model without a logvar head has z = mu and no KL.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae import VAELossOutput
from fastvae.demo.model import Autoencoder

__all__ = ["Objective", "fused", "plain"]


class Objective(Protocol):
    """Encodes `inputs`, decodes towards `target` (both [B, C, H, W]) and returns the terms.

    `eps` [B, L] is the noise to use; if it is not given, it is drawn with `generator`.
    """

    def __call__(
        self,
        model: Autoencoder,
        inputs: Tensor,
        target: Tensor,
        *,
        beta: float,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VAELossOutput: ...


def fused(
    model: Autoencoder,
    inputs: Tensor,
    target: Tensor,
    *,
    beta: float,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> VAELossOutput:
    """The objective with fastvae."""
    mu, logvar = model.encode(inputs)
    if logvar is None:
        recon = fastvae.reconstruction_loss(model.decode(mu), target)
        return VAELossOutput(recon, recon, recon.new_zeros(()))
    z = fastvae.reparameterize(mu, logvar, eps=eps, generator=generator)
    return fastvae.vae_loss(model.decode(z), target, mu, logvar, beta=beta)


def plain(
    model: Autoencoder,
    inputs: Tensor,
    target: Tensor,
    *,
    beta: float,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> VAELossOutput:
    """The objective in plain PyTorch."""
    mu, logvar = model.encode(inputs)
    if logvar is None:
        recon = F.mse_loss(model.decode(mu), target, reduction="sum") / target.shape[0]
        return VAELossOutput(recon, recon, recon.new_zeros(()))
    std = torch.exp(0.5 * logvar)
    if eps is None:
        eps = torch.randn(std.shape, generator=generator, dtype=std.dtype, device=std.device)
    z = mu + eps * std
    recon = F.mse_loss(model.decode(z), target, reduction="sum") / target.shape[0]
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / target.shape[0]
    return VAELossOutput(recon + beta * kl, recon, kl)
