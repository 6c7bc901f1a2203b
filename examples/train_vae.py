"""A small VAE as people write it, and the same with fastvae: the objective is all that changes.

python examples/train_vae.py              # in plain PyTorch
python examples/train_vae.py --fastvae
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import digits, main
from torch import Tensor, nn

SIGMA = 0.15  # the decoder's standard deviation; with the squared error, beta = 2 sigma^2
LATENTS = 8


# Before: the ten lines of every project ----------------------------------------------------------


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    std = torch.exp(0.5 * logvar)
    eps = torch.randn_like(std)
    return mu + eps * std


def vae_loss(
    recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    recon = ((recon_x - x) ** 2).sum() / x.shape[0]
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / x.shape[0]
    return recon + beta * kl, recon, kl


# The user's own model and loop, the same either way ----------------------------------------------


class VAE(nn.Module):
    def __init__(self, pixels: int, sample: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.sample = sample
        self.encoder = nn.Sequential(nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 256), nn.ReLU(), nn.Linear(256, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return self.decoder(self.sample(mu, logvar)), mu, logvar


def train(with_fastvae: bool, epochs: int) -> list[float]:
    sample: Callable[..., Any] = reparameterize
    objective: Callable[..., Any] = vae_loss
    if with_fastvae:  # After: an import takes the place of the ten lines.
        import fastvae

        sample, objective = fastvae.reparameterize, fastvae.vae_loss

    torch.manual_seed(0)
    data = digits().flatten(1)
    model = VAE(data.shape[1], sample)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(epochs):
        for batch in data[torch.randperm(len(data))].split(128):
            recon_x, mu, logvar = model(batch)
            loss, _recon, _kl = objective(recon_x, batch, mu, logvar, beta=2 * SIGMA**2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    main(train)
