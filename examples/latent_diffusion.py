"""The first stage of latent diffusion: an adversarial weight from gradients at the last layer, float16, a loss scale.

    python examples/latent_diffusion.py [--fastvae]

In the manner of its `LPIPSWithDiscriminator`, with a squared error and without the perceptual term. The graph of the
reconstruction is gone through twice: once for the norm of its gradient at the decoder's last layer, once in backward().
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import digits, main
from torch import Tensor, nn

KL_WEIGHT = 1e-2


class Autoencoder(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(32, 2 * channels, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 32, 1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
        )
        self.conv_out = nn.Conv2d(32, 1, 3, padding=1)
        self.logvar = nn.Parameter(torch.zeros(()))  # of the pixels, learned

    def decode(self, z: Tensor) -> Tensor:
        image: Tensor = self.conv_out(self.decoder(z))
        return image


def plain(model: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """recon_x, the reconstruction's and the KL's sum over a sample."""
    mu, logvar = model.encoder(x).chunk(2, dim=1)
    mu, logvar = mu.float(), logvar.float().clamp(-30, 20)
    std = torch.exp(0.5 * logvar)
    recon_x = model.decode(mu + std * torch.randn_like(std))
    sse = F.mse_loss(recon_x.float(), x, reduction="none").sum() / len(x)
    kl = 0.5 * torch.sum(mu.pow(2) + std.pow(2) - 1 - logvar, dim=[1, 2, 3]).sum() / len(x)
    return recon_x, sse, kl


def fused(model: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with fastvae, which reads float16 as it is and computes in float32."""
    import fastvae

    mu, logvar = model.encoder(x).chunk(2, dim=1)
    z, kl = fastvae.sample_and_kl(mu.float(), logvar.float().clamp(-30, 20))
    recon_x = model.decode(z)
    return recon_x, fastvae.reconstruction_loss(recon_x, x), kl


def train(with_fastvae: bool, epochs: int) -> list[float]:
    torch.manual_seed(0)
    data = digits()
    device = data.device.type
    objective = fused if with_fastvae else plain
    model = Autoencoder()
    discriminator = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3, padding=1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.9))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    losses = []
    for _ in range(epochs):
        for x in data[torch.randperm(len(data))].split(128):
            with torch.autocast(device, dtype=torch.float16):
                recon_x, sse, kl = objective(model, x)
                nll = sse / model.logvar.exp() + x[0].numel() * model.logvar
                g_loss = -discriminator(recon_x).float().mean()
            last_layer = model.conv_out.weight
            (nll_grad,) = torch.autograd.grad(scaler.scale(nll), last_layer, retain_graph=True)
            (g_grad,) = torch.autograd.grad(scaler.scale(g_loss), last_layer, retain_graph=True)
            d_weight = (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0, 1e4).detach()
            loss = nll + KL_WEIGHT * kl + 0.5 * d_weight * g_loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)

            with torch.autocast(device, dtype=torch.float16):
                real, fake = discriminator(x), discriminator(recon_x.detach())
                d_loss = 0.5 * (F.relu(1 - real).float().mean() + F.relu(1 + fake).float().mean())
            optimizer_d.zero_grad()
            scaler.scale(d_loss).backward()
            scaler.step(optimizer_d)
            scaler.update()
            losses.append(nll.item() + KL_WEIGHT * kl.item())
    return losses


if __name__ == "__main__":
    main(train)
