"""beta-TCVAE on images of four factors, and what each of its latents learned to draw. The terms of the KL are all that changes.

python examples/disentangle.py                                             # in plain PyTorch
python examples/disentangle.py --fastvae --epochs 100 --picture latents.png  # a few minutes

The picture has a row for each latent, the most used one first: an image whose latent goes from -2 to 2 while the others stay,
and how it correlates with the factors that the images were drawn from, of which training knows nothing.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FACTORS = ("across", "down", "size", "colour")
SIZE, COUNT, BATCH, LATENTS = 24, 4096, 128, 6
SIGMA = 0.2  # the decoder's standard deviation
BETA = 10.0  # of the total correlation


def images(factors: np.ndarray[Any, Any]) -> Tensor:
    """[N, 3, SIZE, SIZE] in [0, 1] from [N, 4] in [0, 1]: a disc somewhere, in some size and colour."""
    across, down, size, colour = factors.T[:, :, None, None]
    grid = (np.arange(SIZE) + 0.5) / SIZE
    radius = 0.1 + 0.15 * size
    x = grid[None, None, :] - (0.27 + 0.46 * across)
    y = grid[None, :, None] - (0.27 + 0.46 * down)
    inside = 1 / (1 + np.exp((np.hypot(x, y) - radius) * SIZE * 3))  # soft over a pixel
    hues = [colorsys.hsv_to_rgb(0.02 + 0.62 * c, 0.85, 1.0) for c in colour.ravel()]
    drawn = inside[:, None] * np.array(hues)[:, :, None, None] + (1 - inside[:, None]) * 0.08
    return torch.as_tensor(drawn, dtype=torch.get_default_dtype())


def data() -> tuple[np.ndarray[Any, Any], Tensor]:
    factors = np.random.default_rng(0).uniform(size=(COUNT, len(FACTORS)))
    return factors, images(factors)


# Before: all pairs of the batch, as every project writes it -----------------------------------------


def log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / torch.exp(logvar))


def kl_decomposition(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = len(z), dataset_size
    weight = torch.full((batch, batch), (n - 1) / (n * (batch - 1))).fill_diagonal_(1 / n)
    pairs = log_density(z[:, None], mu[None], logvar[None])  # [B, B, L]
    log_qz = torch.logsumexp(pairs.sum(2) + weight.log(), 1)
    log_prod = torch.logsumexp(pairs + weight.log()[:, :, None], 1).sum(1)
    log_q = log_density(z, mu, logvar).sum(1)
    log_p = log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    return (log_q - log_qz).mean(), (log_qz - log_prod).mean(), (log_prod - log_p).mean()


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


# The user's own model and loop, the same either way -------------------------------------------------


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * SIZE * SIZE, 256),
            nn.SiLU(),
            nn.Linear(256, 256),
            nn.SiLU(),
            nn.Linear(256, 2 * LATENTS),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 256),
            nn.SiLU(),
            nn.Linear(256, 256),
            nn.SiLU(),
            nn.Linear(256, 3 * SIZE * SIZE),
            nn.Sigmoid(),
            nn.Unflatten(1, (3, SIZE, SIZE)),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar


def fit(with_fastvae: bool, epochs: int) -> tuple[VAE, list[float]]:
    sample: Callable[..., Any] = reparameterize
    terms: Callable[..., Any] = kl_decomposition
    if with_fastvae:  # After: the same terms from one op, and nothing of [B, B, L] in memory.
        import fastvae

        sample, terms = fastvae.reparameterize, fastvae.kl_decomposition

    torch.manual_seed(0)
    x = data()[1].to(torch.get_default_device())
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(epochs):
        for batch in x[torch.randperm(len(x))].split(BATCH):
            mu, logvar = model.encode(batch)
            z = sample(mu, logvar)
            recon = (model.decoder(z) - batch).square().sum() / len(batch) / (2 * SIGMA**2)
            information, correlation, rest = terms(z, mu, logvar, COUNT)
            loss = recon + information + BETA * correlation + rest
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return model, [loss.item() for loss in losses]


def train(with_fastvae: bool, epochs: int) -> list[float]:
    return fit(with_fastvae, epochs)[1]


# The picture -----------------------------------------------------------------------------------------


@torch.no_grad()
def draw(model: VAE, path: Path) -> None:
    from matplotlib.figure import Figure

    factors, x = data()
    mu, logvar = model.encode(x)
    used = (0.5 * (logvar.exp() - 1 - logvar + mu**2)).mean(0)  # each latent's KL, in nats
    order = used.argsort(descending=True)
    both = np.corrcoef(mu.numpy().T, factors.T)
    correlation = np.abs(both[:LATENTS, LATENTS:])[order]
    middle = model.encode(images(np.full((1, len(FACTORS)), 0.5)))[0]
    steps = torch.linspace(-2, 2, 11)

    figure = Figure(figsize=(11, 4.4), dpi=130, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(11, 6))
    pitch = SIZE + 2
    canvas = np.ones((LATENTS * pitch - 2, len(steps) * pitch - 2, 3))
    for row, latent in enumerate(order):
        z = middle.repeat(len(steps), 1)
        z[:, latent] = steps
        for column, image in enumerate(model.decoder(z).permute(0, 2, 3, 1).numpy()):
            y, x0 = row * pitch, column * pitch
            canvas[y : y + SIZE, x0 : x0 + SIZE] = image
    left.imshow(canvas)
    centres = pitch * np.arange(max(LATENTS, len(steps))) + SIZE / 2
    names = [f"latent {i}, {used[i]:.1f} nats" for i in order.tolist()]
    left.set_yticks(centres[:LATENTS], names, fontsize=8)
    left.set_xticks(centres[: len(steps)], [f"{s:.1f}" for s in steps.tolist()], fontsize=8)
    left.set_title("One latent at a time", loc="left", fontsize=11)
    correlation[used[order].numpy() < 0.05] = 0  # of a latent that tells nothing
    right.imshow(correlation, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(correlation):
        colour = "white" if value > 0.6 else "#555555"
        text = f"{value:.2f}" if value else ""
        right.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    right.set_xticks(range(len(FACTORS)), FACTORS, fontsize=9)
    right.set_yticks([])
    right.set_title("|correlation| with the factors", loc="left", fontsize=11)
    for axes in (left, right):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fastvae", action="store_true", help="with fastvae's objective")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="what the latents draw")
    args = parser.parse_args()
    model, losses = fit(args.fastvae, args.epochs)
    steps = len(losses) // args.epochs
    for epoch in range(args.epochs):
        print(f"epoch {epoch + 1}:", *(f"{loss:.4g}" for loss in losses[epoch * steps :][:steps]))
    if args.picture:
        draw(model, args.picture)


if __name__ == "__main__":
    main()
