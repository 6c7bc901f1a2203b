"""The demo's pictures: reconstructions, samples, the latent space, the loss curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.manifold import TSNE
from torch import Tensor

from fastvae.demo.data import Dataset
from fastvae.demo.model import Autoencoder
from fastvae.demo.train import Config, History

BLUE, DARK = "#4c9be8", "#222222"
PROJECTED = 3000  # images in the picture of the latent space; t-SNE of more takes long
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
}
LOOK = {
    "reconstructions.png": "each reconstruction must look like the image above it",
    "samples.png": "most must look like images of the data set",
    "latent.png": "images of a class lie together, though no label was used in training",
    "curves.png": "the curves of fastvae and of plain PyTorch must lie on each other",
}


def draw_all(
    folder: Path, config: Config, model: Autoencoder, data: Dataset, histories: dict[str, History]
) -> dict[Path, str]:
    """Write the four pictures into `folder`; returns, for each path, what to look at there."""
    with rc_context(STYLE), torch.no_grad():  # type: ignore[arg-type]
        figures = [reconstructions(model, data), samples(config, model, data)]
        figures += [latent_space(config, model, data), curves(config, histories)]
        for name, figure in zip(LOOK, figures, strict=True):
            figure.savefig(folder / name)
    return {folder / name: look for name, look in LOOK.items()}


def reconstructions(model: Autoencoder, data: Dataset) -> Figure:
    """Test images above what the model makes of them (z = mu)."""
    target = data.images[data.cut :][:42]
    rows = {"image": target, "reconstruction": model.decoder(model.encode(target)[0])}
    columns = min(14, len(target))
    blocks = len(target) // columns
    figure = Figure(figsize=(0.6 * columns + 1.2, 0.62 * blocks * len(rows) + 0.5))
    for block, axes in enumerate(figure.subplots(blocks, 1, squeeze=False)[:, 0]):
        part = slice(block * columns, (block + 1) * columns)
        height = grid(axes, torch.cat([images[part] for images in rows.values()]), columns, data)
        axes.set_yticks([(row + 0.5) * height for row in range(len(rows))], list(rows))
    figure.suptitle("Test images and their reconstructions")
    return figure


def samples(config: Config, model: Autoencoder, data: Dataset) -> Figure:
    """Images decoded from z ~ N(0, I)."""
    generator = torch.Generator().manual_seed(config.seed)
    z = torch.randn(128, config.latent_dim, generator=generator).to(data.images.device)
    figure = Figure(figsize=(9.6, 5.2))
    axes = figure.subplots()
    grid(axes, model.decoder(z), 16, data)
    axes.set_title("Samples from the prior: z ~ N(0, I), decoded")
    return figure


def latent_space(config: Config, model: Autoencoder, data: Dataset) -> Figure:
    """mu of the images by class: as it is in two dimensions, projected by t-SNE if there are more."""
    mu = torch.cat([model.encode(part)[0] for part in data.images[:PROJECTED].split(1024)])
    codes = mu.cpu().numpy()
    figure = Figure(figsize=(7.2, 6.4))
    axes = figure.subplots()
    title = f"Latent space: mu of {len(codes):,} images"
    axes.set(title=title, xlabel="mu[0]", ylabel="mu[1]", aspect="equal", adjustable="datalim")
    if config.latent_dim == 1:
        axes.set(aspect="auto", ylabel="images")
        axes.hist(codes[:, 0], bins=60, color=BLUE)
        return figure
    if config.latent_dim > 2:
        title += f", from {config.latent_dim} to 2 dimensions by t-SNE"
        axes.set(title=title, xlabel="", ylabel="", xticks=[], yticks=[])
        codes = TSNE(perplexity=min(30, len(codes) / 4), random_state=0).fit_transform(codes)
    labels = data.labels[: len(codes)].numpy()
    count = len(data.classes)
    colours = colormaps["tab10" if count <= 10 else "turbo"](np.arange(count) / max(9, count - 1))
    # All points in one call, so that no class covers the others.
    axes.scatter(codes[:, 0], codes[:, 1], s=12, color=colours[labels], alpha=0.7, linewidths=0)
    for index in np.unique(labels) if 1 < count <= 30 else ():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": colours[index]}
        own = codes[labels == index]
        far = np.median(np.linalg.norm(own[:, None] - own, axis=2), axis=1)
        axes.annotate(data.classes[index], own[far.argmin()], ha="center", va="center", bbox=box)
    return figure


def curves(config: Config, histories: dict[str, History]) -> Figure:
    """The epochs' means of each term, fastvae's and plain PyTorch's on top of each other."""
    titles = ["Reconstruction: squared error per image", "KL: nats per image"]
    titles.append(f"Total: reconstruction + {config.beta:g} KL")
    styles = {"fastvae": (BLUE, 4, "-"), "plain PyTorch": (DARK, 1, (0, (4, 3)))}
    figure = Figure(figsize=(11.7, 3.2))
    panels = figure.subplots(1, 3)
    for axes, title, term in zip(panels, titles, (1, 2, 0), strict=True):
        for name, history in histories.items():
            colour, width, dashes = styles[name]
            axes.plot(history.epochs[:, term], color=colour, lw=width, ls=dashes, label=name)
        axes.set(title=title, xlabel="epoch", yscale="linear" if term == 2 else "log")
        axes.grid(axis="y", color="#e6e6e6")
        if term != 2:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
    panels[0].legend(loc="upper right")
    return figure


def grid(axes: Axes, images: Tensor, columns: int, data: Dataset) -> int:
    """Show images [N, C, H, W] in rows of `columns`, white between them; returns a row's height."""
    values = (1 - images if data.ink else images).cpu().expand(-1, 3, -1, -1)
    gap = max(1, values.shape[-1] // 12)
    framed = torch.nn.functional.pad(values, (gap, gap, gap, gap), value=1.0)
    _, _, height, width = framed.shape
    tiles = framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    axes.imshow(tiles.reshape(-1, columns * width, 3).numpy())
    axes.set(xticks=[], yticks=[])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    return height
