"""A small VAE as people write it, and the same with fastvae: the objective is all that changes.

    python examples/train_vae.py              # in plain PyTorch
    python examples/train_vae.py --fastvae

It trains on scikit-learn's handwritten digits, or on random patterns where that is not installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
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


def images() -> Tensor:
    """[samples, pixels] in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        print("scikit-learn is not installed: random patterns instead of digits")
        return torch.sigmoid(torch.randn(1800, 4) @ torch.randn(4, 64))
    return torch.as_tensor(load_digits().data, dtype=torch.float32) / 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fastvae", action="store_true", help="with fastvae's objective")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    sample: Callable[..., Any] = reparameterize
    objective: Callable[..., Any] = vae_loss
    if args.fastvae:  # After: an import takes the place of the ten lines.
        import fastvae

        sample, objective = fastvae.reparameterize, fastvae.vae_loss

    torch.manual_seed(0)
    data = images()
    model = VAE(data.shape[1], sample)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    for epoch in range(1, args.epochs + 1):
        started = time.perf_counter()
        sums = torch.zeros(2)
        shuffled = data[torch.randperm(len(data))]
        for first in range(0, len(data), 128):
            batch = shuffled[first : first + 128]
            recon_x, mu, logvar = model(batch)
            loss, recon, kl = objective(recon_x, batch, mu, logvar, beta=2 * SIGMA**2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack([recon.detach(), kl.detach()]) * len(batch) / len(data)
        milliseconds = 1e3 * (time.perf_counter() - started)
        recon_mean, kl_mean = sums.tolist()
        print(
            f"epoch {epoch:3}: squared error {recon_mean:6.3f}, KL {kl_mean:6.3f} nats, "
            f"{milliseconds:5.1f} ms"
        )


if __name__ == "__main__":
    main()
