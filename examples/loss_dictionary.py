"""A module that samples for itself and returns its loss as a dictionary, in the manner of PyTorch-VAE.

    python examples/loss_dictionary.py [--fastvae]

Its mean squared error beside a KL per sample is `fastvae.recipes.pytorch_vae`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import digits, main
from torch import Tensor, nn


class VanillaVAE(nn.Module):
    """In plain PyTorch."""

    def __init__(self, latent_dim: int = 10) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(),
            nn.Flatten(),
        )
        self.fc_mu = nn.Linear(16 * 4 * 4, latent_dim)
        self.fc_var = nn.Linear(16 * 4 * 4, latent_dim)
        self.decoder_input = nn.Linear(latent_dim, 16 * 4 * 4)
        self.final_layer = nn.Sequential(
            nn.LeakyReLU(),
            nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(),
            nn.Conv2d(16, 1, 3, padding=1),
            nn.Sigmoid(),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        return self.fc_mu(features), self.fc_var(features)

    def decode(self, z: Tensor) -> Tensor:
        image: Tensor = self.final_layer(self.decoder_input(z).view(-1, 16, 4, 4))
        return image

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        return torch.randn_like(std) * std + mu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar)), x, mu, logvar

    def loss_function(
        self, recons: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, kld_weight: float
    ) -> dict[str, Tensor]:
        recons_loss = F.mse_loss(recons, x)
        kld_loss = torch.mean(-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1), dim=0)
        loss = recons_loss + kld_weight * kld_loss
        return {"loss": loss, "Reconstruction_Loss": recons_loss.detach(), "KLD": kld_loss.detach()}


class FastVAE(VanillaVAE):
    """The same with fastvae."""

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        import fastvae

        return fastvae.reparameterize(mu, logvar)

    def loss_function(
        self, recons: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, kld_weight: float
    ) -> dict[str, Tensor]:
        from fastvae import recipes, vae_loss

        recipe = recipes.pytorch_vae(kld_weight)
        loss, recon, kl = vae_loss(recons, x, mu, logvar, **recipe.options)
        return {"loss": loss, "Reconstruction_Loss": recon.detach(), "KLD": kl.detach()}


def train(with_fastvae: bool, epochs: int) -> list[float]:
    torch.manual_seed(0)
    data = digits()
    model = (FastVAE if with_fastvae else VanillaVAE)()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
    history = []
    for _ in range(epochs):
        for batch in data[torch.randperm(len(data))].split(64):
            losses = model.loss_function(*model(batch), kld_weight=0.00025)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            history.append(losses["loss"].item())
        scheduler.step()
    return history


if __name__ == "__main__":
    main(train)
