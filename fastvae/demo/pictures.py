"""The demo's pictures: reconstructions, samples, the latent space, the loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from sklearn.decomposition import PCA
from torch import Tensor

from fastvae.demo.data import Dataset
from fastvae.demo.model import Autoencoder
from fastvae.demo.train import Config, Generators, History, corrupt

__all__ = ["draw_all"]

LOSS, RECON, KL = 0, 1, 2  # a History's columns
INK = "#222222"
GREY = "#8a8a8a"
OURS = "#4c9be8"
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def draw_all(
    folder: Path,
    config: Config,
    model: Autoencoder,
    data: Dataset,
    ours: History,
    plain: History | None,
) -> list[Path]:
    """Write the four pictures into `folder` and return their paths."""
    figures: dict[str, Callable[[], Figure]] = {
        "reconstructions.png": lambda: reconstructions(config, model, data),
        "samples.png": lambda: samples(config, model, data),
        "latent.png": lambda: latent_space(config, model, data),
        "curves.png": lambda: curves(config, ours, plain),
    }
    paths = []
    with rc_context(STYLE), torch.no_grad():
        for name, draw in figures.items():
            paths.append(folder / name)
            draw().savefig(paths[-1])
    return paths


def reconstructions(config: Config, model: Autoencoder, data: Dataset) -> Figure:
    """Test images above what the model makes of them (z = mu), with any corruption in between."""
    columns, blocks = 14, 3
    target = data.test[: columns * blocks]
    inputs = corrupt(target, config.noise, Generators(config).corruption)
    rows = {"input": target, "reconstruction": model.decode(model.encode(inputs)[0])}
    title = "Test images and their reconstructions"
    if config.noise:
        rows = {"clean": target, "corrupted": inputs, "denoised": rows["reconstruction"]}
        title = f"Test images, corrupted by noise of {config.noise:g}, and denoised"
    columns = min(columns, len(target))
    blocks = math.ceil(len(target) / columns)
    height, gap = len(rows), 0.35
    figure, axes = _canvas(columns, blocks * height + (blocks - 1) * gap, title)
    for block in range(blocks):
        for row, (label, images) in enumerate(rows.items()):
            top = block * (height + gap) + row
            strip = images[block * columns : (block + 1) * columns]
            _place(axes, strip, top, data.colormap)
            axes.text(-0.2, top + 0.5, label, ha="right", va="center")
    return figure


def samples(config: Config, model: Autoencoder, data: Dataset) -> Figure:
    """Images decoded from z ~ N(0, I)."""
    columns, rows = 16, 8
    generator = Generators(config).latent
    z = torch.randn(columns * rows, config.latent_dim, generator=generator, device=data.test.device)
    title = "Samples from the prior: z ~ N(0, I), decoded"
    if config.model != "vae":
        title = "z ~ N(0, I), decoded: an autoencoder's codes follow no prior"
    figure, axes = _canvas(columns, rows, title)
    for row, strip in enumerate(torch.split(model.decode(z), columns)):
        _place(axes, strip, row, data.colormap)
    return figure


def latent_space(config: Config, model: Autoencoder, data: Dataset) -> Figure:
    """The codes mu of all images by class, on two principal axes if there are more dimensions."""
    batches = torch.split(torch.cat([data.train, data.test]), 1024)
    mu = torch.cat([model.encode(images)[0] for images in batches])
    codes = mu.cpu().double().numpy()
    what = "mu" if config.model == "vae" else "z"
    labels = [f"{what}[{i}]" for i in range(2)]
    if config.latent_dim > 2:
        pca = PCA(2, svd_solver="full")
        codes = pca.fit_transform(codes)
        labels = [
            f"principal component {i + 1} of {what} ({share:.0%} of its variance)"
            for i, share in enumerate(pca.explained_variance_ratio_)
        ]
    figure = Figure(figsize=(7.2, 6.4))
    axes = figure.subplots()
    axes.set_title(f"Latent space: {what} of {len(codes):,} images", pad=10)
    if config.latent_dim == 1:
        axes.hist(codes[:, 0], bins=60, color=OURS)
        axes.set(xlabel=labels[0], ylabel="images")
        return figure
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_aspect("equal", adjustable="datalim")
    x, y = codes.T
    if data.train_labels is None or data.test_labels is None:
        axes.scatter(x, y, s=12, color=OURS, alpha=0.6, linewidths=0)
        return figure
    classes = torch.cat([data.train_labels, data.test_labels]).numpy()
    colours = _colours(len(data.classes))
    # All points in one call, so that no class covers the others.
    axes.scatter(x, y, s=12, color=colours[classes], alpha=0.7, linewidths=0)
    if len(data.classes) <= 20:
        for name, colour in zip(data.classes, colours, strict=True):
            axes.scatter([], [], s=30, color=[colour], label=name)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def curves(config: Config, ours: History, plain: History | None) -> Figure:
    """The epochs' means of each term, fastvae's and plain PyTorch's on top of each other."""
    terms = [(RECON, "Reconstruction: squared error per image")]
    if config.model == "vae":
        terms.append((KL, "KL: nats per image"))
        terms.append((LOSS, f"Total: reconstruction + {config.beta:g} KL"))
    figure = Figure(figsize=(3.9 * len(terms), 3.2))
    panels: Sequence[Axes] = figure.subplots(1, len(terms), squeeze=False)[0]
    epochs = np.arange(1, len(ours.epochs) + 1)
    for axes, (term, title) in zip(panels, terms, strict=True):
        axes.plot(epochs, ours.epochs[:, term], color=OURS, linewidth=4, label="fastvae")
        if plain is not None:
            line = axes.plot(epochs, plain.epochs[:, term], color=INK, linewidth=1)[0]
            line.set(linestyle=(0, (4, 3)), label="plain PyTorch")
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        if term == KL:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
    if plain is not None:
        panels[0].legend(loc="upper right")
    figure.tight_layout(w_pad=2)
    return figure


def _canvas(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """Axes on which one image takes one unit, row 0 at the top."""
    scale = 0.55
    figure = Figure(figsize=(width * scale, height * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    axes.set_title(title, pad=8, fontsize=11)
    return figure, axes


def _place(axes: Axes, images: Tensor, top: float, colormap: str) -> None:
    """Lay images [n, C, H, W] side by side into the row that begins at `top`."""
    margin = 0.04
    for column, image in enumerate(images.cpu().numpy()):
        box = (column + margin, column + 1 - margin, top + 1 - margin, top + margin)
        if len(image) == 1:
            axes.imshow(image[0], cmap=colormap, vmin=0, vmax=1, extent=box, aspect="auto")
        else:
            axes.imshow(image.transpose(1, 2, 0), extent=box, aspect="auto")


def _colours(count: int) -> np.ndarray:
    if count <= 10:
        return colormaps["tab10"](np.arange(count))
    if count <= 20:
        return colormaps["tab20"](np.arange(count))
    return colormaps["turbo"](np.linspace(0.05, 0.95, count))
