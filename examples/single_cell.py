"""Counts of genes in cells: a zero-inflated negative binomial decoder, in the manner of scVI (Lopez et al., 2018).

    python examples/single_cell.py [--fastvae] [--epochs N] [--plot FILE]

The cells are made up: Gamma-Poisson counts of five types, of which a tenth got lost. --plot draws the latents by type, and the
share of zeros of each gene, expected beside seen.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELLS, GENES, TYPES, LATENTS = 2000, 300, 5, 8
BATCH = 128


# In plain PyTorch ---------------------------------------------------------------------------------


def log_zinb(x: Tensor, mu: Tensor, theta: Tensor, zero_logits: Tensor) -> Tensor:
    log_q = torch.log(theta) - torch.log(theta + mu)
    log_p = torch.log(mu) - torch.log(theta + mu)
    at_zero = F.softplus(theta * log_q - zero_logits)
    above = (
        theta * log_q
        + x * log_p
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
        - zero_logits
    )
    return torch.where(x == 0, at_zero, above) - F.softplus(-zero_logits)


def sample(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def plain(
    rate: Tensor, x: Tensor, theta: Tensor, zero_logits: Tensor, mu: Tensor, logvar: Tensor
) -> tuple[Tensor, Tensor]:
    recon = -log_zinb(x, rate, theta, zero_logits).sum() / len(x)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum() / len(x)
    return recon, kl


# With fastvae -------------------------------------------------------------------------------------


def fused(
    rate: Tensor, x: Tensor, theta: Tensor, zero_logits: Tensor, mu: Tensor, logvar: Tensor
) -> tuple[Tensor, Tensor]:
    import fastvae

    likelihood = fastvae.likelihoods.NegativeBinomial(theta, zero_logits)
    _, recon, kl = fastvae.vae_loss(rate, x, mu, logvar, likelihood=likelihood)
    return recon, kl


# Model and loop, the same either way --------------------------------------------------------------


def cells() -> tuple[Tensor, Tensor]:
    """Counts [CELLS, GENES], and the type of each cell."""
    types = torch.randint(TYPES, (CELLS,))
    activity = torch.distributions.Gamma(0.5, 0.5).sample((TYPES, GENES))[types]
    depth = torch.distributions.LogNormal(0.0, 0.3).sample((CELLS, 1))
    rate = activity * depth * torch.distributions.Gamma(2.0, 2.0).sample((CELLS, GENES))
    kept = torch.rand(CELLS, GENES) > 0.1
    return torch.poisson(rate) * kept, types


class Model(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(GENES, width), nn.ReLU(), nn.Linear(width, 2 * LATENTS)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENTS, width), nn.ReLU())
        self.share, self.zero = nn.Linear(width, GENES), nn.Linear(width, GENES)
        self.log_theta = nn.Parameter(torch.zeros(GENES))  # one for each gene

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(torch.log1p(x)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean counts, and the logits of a zero besides."""
        h = self.decoder(z)
        return x.sum(1, keepdim=True) * torch.softmax(self.share(h), dim=1), self.zero(h)


def fit(with_fastvae: bool, epochs: int, show: bool = False) -> tuple[Model, list[float]]:
    torch.manual_seed(0)
    data, _ = cells()
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    draw, objective = sample, plain
    if with_fastvae:
        import fastvae

        draw, objective = fastvae.reparameterize, fused
    losses = []
    for epoch in range(epochs):
        start = time.perf_counter()
        for x in data[torch.randperm(CELLS)].split(BATCH):
            mu, logvar = model.encode(x)
            z = draw(mu, logvar)
            rate, zero_logits = model.decode(z, x)
            recon, kl = objective(rate, x, model.log_theta.exp(), zero_logits, mu, logvar)
            loss = recon + kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if show:
            steps = -(-CELLS // BATCH)
            print(f"epoch {epoch + 1}:", *(f"{loss:.4g}" for loss in losses[-steps:]))
            terms = f"recon {recon:.2f} + kl {kl:.2f}, {time.perf_counter() - start:.2f} s"
            print(f"{epoch + 1} of {epochs}: {terms}", file=sys.stderr)
    return model, losses


def train(with_fastvae: bool, epochs: int) -> list[float]:
    return fit(with_fastvae, epochs)[1]


def plot(model: Model, file: str) -> None:
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    data, types = cells()
    with torch.no_grad():
        mu, _ = model.encode(data)
        rate, zero_logits = model.decode(mu, data)
        theta = model.log_theta.exp()
        expected = 1 - torch.sigmoid(-zero_logits) * -torch.expm1(
            -theta * torch.log1p(rate / theta)
        )
    centred = mu - mu.mean(0)
    flat = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for one in range(TYPES):
        left.scatter(*flat[types == one].T.numpy(), s=4, label=f"type {one + 1}")
    left.set(title="latents", xlabel="first component", ylabel="second")
    left.legend(markerscale=3)
    right.plot([0, 1], [0, 1], color="grey", linewidth=1)
    right.scatter((data == 0).to(mu.dtype).mean(0).numpy(), expected.mean(0).numpy(), s=6)
    right.set(title="share of zeros, gene by gene", xlabel="seen", ylabel="expected")
    figure.savefig(file, dpi=120)
    print(f"wrote {file}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fastvae", action="store_true", help="with fastvae's objective")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plot", metavar="FILE", help="where to draw latents and zeros")
    args = parser.parse_args()
    model, _ = fit(args.fastvae, args.epochs, show=True)
    if args.plot:
        plot(model, args.plot)
