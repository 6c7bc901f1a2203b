"""A LightningModule; needs `pip install lightning`.

    python examples/lightning_module.py [--fastvae]

In the manner of lightning-bolts, whose means over pixels and over latents are `fastvae.recipes.lightning_bolts`.
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from common import digits, main
from torch import Tensor, nn
from torch.utils.data import DataLoader


class LitVAE(lightning.LightningModule):
    def __init__(self, with_fastvae: bool, kl_coeff: float = 0.01, latent_dim: int = 8) -> None:
        super().__init__()
        self.with_fastvae = with_fastvae
        self.kl_coeff = kl_coeff
        self.history: list[float] = []
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.GELU())
        self.fc_mu = nn.Linear(128, latent_dim)
        self.fc_var = nn.Linear(128, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 128), nn.GELU(), nn.Linear(128, 64), nn.Unflatten(1, (1, 8, 8))
        )

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        features = self.encoder(x)
        mu, logvar = self.fc_mu(features), self.fc_var(features)
        if self.with_fastvae:
            import fastvae

            z = fastvae.reparameterize(mu, logvar)
            options = fastvae.recipes.lightning_bolts(self.kl_coeff).options
            loss, recon_loss, kl = fastvae.vae_loss(self.decoder(z), x, mu, logvar, **options)
        else:
            std = torch.exp(logvar / 2)
            z = mu + std * torch.randn_like(std)
            recon_loss = F.mse_loss(self.decoder(z), x)
            q = torch.distributions.Normal(mu, std)
            p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(std))
            kl = torch.distributions.kl_divergence(q, p).mean()
            loss = recon_loss + self.kl_coeff * kl
        self.log_dict({"loss": loss, "recon_loss": recon_loss, "kl": kl}, prog_bar=True)
        self.history.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def train(with_fastvae: bool, epochs: int) -> list[float]:
    lightning.seed_everything(0, verbose=False)
    model = LitVAE(with_fastvae)
    images: list[Tensor] = list(digits())
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(images, batch_size=128, shuffle=True))  # type: ignore[arg-type]
    return model.history


if __name__ == "__main__":
    main(train)
