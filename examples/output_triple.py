"""A beta-VAE that returns its losses with its outputs, from terms kept for each sample, in the manner of pythae.

python examples/output_triple.py [--fastvae]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import digits, main
from torch import Tensor, nn

BETA = 0.02


@dataclass
class ModelOutput:
    recon_loss: Tensor
    reg_loss: Tensor
    loss: Tensor
    recon_x: Tensor
    z: Tensor


class BetaVAE(nn.Module):
    def __init__(self, with_fastvae: bool, latent_dim: int = 12) -> None:
        super().__init__()
        self.with_fastvae = with_fastvae
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU())
        self.embedding = nn.Linear(128, latent_dim)
        self.log_var = nn.Linear(128, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, 8, 8)),
        )

    def forward(self, x: Tensor) -> ModelOutput:
        features = self.encoder(x)
        mu, log_var = self.embedding(features), self.log_var(features)
        if self.with_fastvae:
            import fastvae

            z = fastvae.reparameterize(mu, log_var)
        else:
            std = torch.exp(0.5 * log_var)
            z = mu + torch.randn_like(std) * std
        recon_x = self.decoder(z)
        loss, recon_loss, reg_loss = self.loss_function(recon_x, x, mu, log_var)
        return ModelOutput(recon_loss, reg_loss, loss, recon_x, z)

    def loss_function(
        self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means over the batch of the objective and its two terms."""
        if self.with_fastvae:
            import fastvae

            options = fastvae.recipes.pythae(BETA).options
            options["reduction"] = options["kl_reduction"] = "sample"
            loss, recon_loss, kld = fastvae.vae_loss(recon_x, x, mu, log_var, **options)
        else:
            errors = F.mse_loss(recon_x.flatten(1), x.flatten(1), reduction="none")
            recon_loss = 0.5 * errors.sum(dim=-1)
            kld = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)
            loss = recon_loss + BETA * kld
        return loss.mean(dim=0), recon_loss.mean(dim=0), kld.mean(dim=0)


def train(with_fastvae: bool, epochs: int) -> list[float]:
    torch.manual_seed(0)
    data = digits()
    model = BetaVAE(with_fastvae)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(epochs):
        for batch in data[torch.randperm(len(data))].split(100):
            output = model(batch)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            losses.append(output.loss.item())
    return losses


if __name__ == "__main__":
    main(train)
