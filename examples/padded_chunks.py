"""A policy's VAE over chunks of actions that differ in length, in the manner of LeRobot's ACT: an L1 error that leaves the padding out.

    python examples/padded_chunks.py [--fastvae]

Its objective is `fastvae.recipes.lerobot_act`, with the mask as `weight`. The rows of a digit are the actions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import digits, main
from torch import Tensor, nn

KL_WEIGHT = 1e-3


class ChunkVAE(nn.Module):
    def __init__(self, latent_dim: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 128), nn.ReLU(), nn.Linear(128, 64), nn.Unflatten(1, (8, 8))
        )


def plain(model: ChunkVAE, actions: Tensor, is_pad: Tensor) -> Tensor:
    mu, log_sigma_x2 = model.encoder(actions).chunk(2, dim=1)
    std = torch.exp(0.5 * log_sigma_x2)
    actions_hat = model.decoder(mu + std * torch.randn_like(std))
    error = F.l1_loss(actions_hat, actions, reduction="none")
    valid = ~is_pad.unsqueeze(-1)
    l1_loss = (error * valid).sum() / (valid.sum() * error.shape[-1])
    kld = (-0.5 * (1 + log_sigma_x2 - mu.pow(2) - log_sigma_x2.exp())).sum(-1).mean()
    loss: Tensor = l1_loss + KL_WEIGHT * kld
    return loss


def fused(model: ChunkVAE, actions: Tensor, is_pad: Tensor) -> Tensor:
    from fastvae import recipes, reparameterize, vae_loss

    mu, log_sigma_x2 = model.encoder(actions).chunk(2, dim=1)
    actions_hat = model.decoder(reparameterize(mu, log_sigma_x2))
    weight = (~is_pad).unsqueeze(-1).to(actions.dtype)
    options = recipes.lerobot_act(KL_WEIGHT).options
    return vae_loss(actions_hat, actions, mu, log_sigma_x2, **options, weight=weight).loss


def train(with_fastvae: bool, epochs: int) -> list[float]:
    torch.manual_seed(0)
    data = digits().squeeze(1)
    is_pad = torch.arange(8) >= torch.randint(3, 9, (len(data), 1))
    data = data.masked_fill(is_pad.unsqueeze(-1), 0.0)
    model = ChunkVAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(100):
            loss = (fused if with_fastvae else plain)(model, data[batch], is_pad[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main(train)
