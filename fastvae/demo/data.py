"""Images for the demo: scikit-learn's handwritten digits, an .npz file, or a folder of pictures."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "load"]

TEST_FRACTION = 0.165  # 297 of the 1,797 digits
SPLIT_SEED = 0  # not the run's seed: runs with different seeds are compared on the same test images
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Dataset:
    """Images [N, C, H, W] in [0, 1], C being 1 or 3; labels [N], if any, index `classes`."""

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    colormap: str = "gray"  # matplotlib's name, for images of one channel

    @property
    def shape(self) -> torch.Size:
        """Of one image: (C, H, W)."""
        return self.train.shape[1:]

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load(source: str = "digits", *, image_size: int = 32) -> Dataset:
    """Load and split `source`: ``"digits"``, the path of an .npz file, or a folder of images.

    An .npz file holds the images under ``x`` (or as its only array) as [N, H, W], [N, H, W, C],
    [N, C, H, W] or [N, D] with D a square, and optionally labels [N] under ``y``. Values outside
    [0, 1] are scaled from their range. A folder holds pictures, or one sub-folder of pictures for
    each class; they are cropped to a square and resized to `image_size`.

    Raises:
        ValueError: the file's contents are not images as described.
        OSError: the file or folder cannot be read.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if path.is_dir():
        return _folder(path, image_size)
    if path.suffix == ".npz":
        return _npz(path)
    raise ValueError(f'{source}: neither "digits", an .npz file nor a folder of images')


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # Ink on paper: zero is white.
    return replace(_split("digits", _channels_first(images), labels), colormap="gray_r")


def _npz(path: Path) -> Dataset:
    try:
        with np.load(path) as archive:  # allow_pickle stays off: the file may come from anywhere
            keys = archive.files
            if "x" not in keys and len(keys) != 1:
                raise ValueError(f"needs an array 'x' (or a single array), has {keys}")
            x = archive["x" if "x" in keys else keys[0]]
            y = archive["y"] if "x" in keys and "y" in keys else None
        return _split(path.stem, _channels_first(x), y)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def _folder(path: Path, image_size: int) -> Dataset:
    from PIL import Image, ImageOps

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    pictures = []
    for file in files:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            square = ImageOps.fit(upright.convert("RGB"), (image_size, image_size))
            pictures.append(np.asarray(square))
    x = np.stack(pictures)
    if (x == x[..., :1]).all():  # all of them are grey
        x = x[..., :1]
    parents = [os.path.relpath(file.parent, path) for file in files]
    labels = np.array(parents) if len(set(parents)) > 1 else None
    return _split(path.resolve().name, _channels_first(x / np.float32(255)), labels)


def _channels_first(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[N, D], [N, H, W], [N, H, W, C] or [N, C, H, W] to [N, C, H, W]."""
    shape = list(x.shape)
    if x.ndim == 2:
        side = round(shape[1] ** 0.5)
        if side * side != shape[1]:
            raise ValueError(
                f"images of shape {shape}: {shape[1]} values are no square image, "
                "store them as [N, H, W]"
            )
        return x.reshape(-1, 1, side, side)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and shape[3] in (1, 3):
        return np.moveaxis(x, 3, 1)
    if x.ndim == 4 and shape[1] in (1, 3):
        return x
    raise ValueError(
        f"images of shape {shape}: needs [N, H, W], [N, H, W, C] or [N, C, H, W] "
        "with 1 or 3 channels, or [N, D]"
    )


def _split(name: str, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any] | None) -> Dataset:
    """Scale to [0, 1] and split, with the labels `y` (of any type) made indices."""
    count = len(x)
    if count < 8:
        raise ValueError(f"{count} images are too few to train on and to test with")
    if x.dtype.kind not in "buif":
        raise ValueError(f"images of dtype {x.dtype}: needs numbers")
    x = np.asarray(x, dtype=np.float32)
    low, high = float(x.min()), float(x.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("the images hold NaN or infinity")
    if low == high:
        raise ValueError(f"every pixel is {low:g}")
    if low < 0 or high > 1:
        x = (x - low) / (high - low)
    if y is not None and y.shape != (count,):
        raise ValueError(f"labels y of shape {list(y.shape)} for {count} images: needs [{count}]")

    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    cut = count - max(1, round(TEST_FRACTION * count))
    train, test = order[:cut], order[cut:]
    images = torch.from_numpy(np.ascontiguousarray(x))
    if y is None:
        return Dataset(name, images[train], images[test])
    values, indices = np.unique(y, return_inverse=True)
    labels = torch.from_numpy(indices)
    classes = tuple(str(value) for value in values)
    return Dataset(name, images[train], images[test], labels[train], labels[test], classes)
