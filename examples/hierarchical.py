"""Two layers of latents, the lower one with a learned prior, in log-sigmas, in the manner of vdvae.

    python examples/hierarchical.py [--fastvae]

Prior and posterior of a layer are channel slices of one tensor each; a logvar is twice a log-sigma.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import digits, main
from torch import Tensor, nn

LATENTS = 4
BETA = 0.05


# In plain PyTorch ---------------------------------------------------------------------------------


def draw_gaussian(mu: Tensor, logsigma: Tensor) -> Tensor:
    return torch.exp(logsigma) * torch.randn_like(mu) + mu


def gaussian_kl(mu_q: Tensor, mu_p: Tensor, logsigma_q: Tensor, logsigma_p: Tensor) -> Tensor:
    scaled = (logsigma_q.exp() ** 2 + (mu_q - mu_p) ** 2) / logsigma_p.exp() ** 2
    return -0.5 + logsigma_p - logsigma_q + 0.5 * scaled


def plain(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """A sample of q and its KL from p per image; both are [B, 2 L, H, W], mu and log-sigma."""
    (mu_q, logsigma_q), (mu_p, logsigma_p) = q.split(LATENTS, dim=1), p.split(LATENTS, dim=1)
    kl = gaussian_kl(mu_q, mu_p, logsigma_q, logsigma_p)
    return draw_gaussian(mu_q, logsigma_q), kl.sum() / len(q)


# With fastvae -------------------------------------------------------------------------------------


def fused(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    import fastvae

    (mu_q, logsigma_q), (mu_p, logsigma_p) = q.split(LATENTS, dim=1), p.split(LATENTS, dim=1)
    return fastvae.sample_and_kl(mu_q, 2 * logsigma_q, mu_p, 2 * logsigma_p)


# Model and loop, the same either way --------------------------------------------------------------


class Hierarchy(nn.Module):
    def __init__(self, with_fastvae: bool, width: int = 24) -> None:
        super().__init__()
        self.layer = fused if with_fastvae else plain
        self.up = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GELU())
        self.pool = nn.Sequential(nn.Conv2d(width, width, 4, stride=4), nn.GELU())
        self.top_posterior = nn.Conv2d(width, 2 * LATENTS, 1)
        self.top_prior = nn.Parameter(torch.zeros(2 * LATENTS, 1, 1))
        self.down = nn.Sequential(
            nn.Conv2d(LATENTS, width, 1), nn.GELU(), nn.Upsample(scale_factor=4)
        )
        self.posterior = nn.Conv2d(2 * width, 2 * LATENTS, 3, padding=1)
        self.prior = nn.Conv2d(width, 2 * LATENTS, 3, padding=1)
        self.project = nn.Conv2d(LATENTS, width, 1)
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image, and the sum of the layers' KL per image."""
        features = self.up(x)
        q = self.top_posterior(self.pool(features))
        z, kl = self.layer(q, self.top_prior.expand_as(q))
        h = self.down(z)
        q = self.posterior(torch.cat([features, h], dim=1))
        z, kl_below = self.layer(q, self.prior(h))
        return self.out(F.gelu(h + self.project(z))), kl + kl_below


def train(with_fastvae: bool, epochs: int) -> list[float]:
    torch.manual_seed(0)
    data = digits()
    model = Hierarchy(with_fastvae)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(epochs):
        for x in data[torch.randperm(len(data))].split(128):
            recon_x, kl = model(x)
            if with_fastvae:
                import fastvae

                recon = fastvae.reconstruction_loss(recon_x, x)
            else:
                recon = (recon_x - x).square().sum() / len(x)
            kl *= BETA
            loss = recon + kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main(train)
