"""Images for the demo: scikit-learn's handwritten digits, an .npz file, or a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

TEST_FRACTION = 0.165  # 297 of the 1,797 digits
SPLIT_SEED = 0  # not the run's seed: runs with different seeds are compared on the same test images
HELD_OUT = ("test", "val")
IMAGES = ("x", "images", "image", "imgs", "img", "data", "arr_0")
LABELS = ("y", "labels", "label", "targets", "target", "arr_1")


@dataclass(frozen=True)
class Dataset:
    """Images [N, C, H, W] in [0, 1], C being 1 or 3, the first `cut` of them to train on; labels [N] index `classes`."""

    name: str
    images: Tensor
    cut: int
    labels: Tensor
    classes: tuple[str, ...]
    note: str  # what was done to the data
    ink: bool = False  # 1 is black


def load(source: str = "digits", *, image_size: int = 32) -> Dataset:
    """Load and split `source`: ``"digits"``, the path of an .npz or .npy file, or a folder of pictures.

    A file holds the images as [N, H, W], [N, H, W, C], [N, C, H, W] or [N, D] with D a square, in an
    array called x, images or data, and perhaps labels [N] in y or labels; or x_train, y_train, x_test
    and y_test. A folder holds pictures, or one folder of pictures for each class; they are cropped to
    a square and resized to `image_size`. Folders train and test (or val) are used as that. Values are
    scaled to [0, 1], all images alike.

    Raises:
        ValueError: the source is not there, or not as described.
    """
    if source == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return replace(_dataset("digits", images / 16, labels), ink=True)
    path = Path(source)
    try:
        return _folder(path, image_size) if path.is_dir() else _file(path)
    except Exception as error:  # numpy's, zipfile's, zlib's, ...
        if isinstance(error, ModuleNotFoundError):
            raise
        raise ValueError(f"{source}: {_reason(error)}") from error


def _file(path: Path) -> Dataset:
    loaded = np.load(path)  # no pickles: it may come from anywhere
    arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)

    def of(names: Iterable[str], *parts: str) -> Array | None:
        """The array of one of these names; of "x_test" or "test_x", where a part is "test"."""
        keys = [k.strip("_") for p in parts for n in names for k in (f"{p}_{n}", f"{n}_{p}")]
        return next((array for name, array in arrays.items() if name.lower() in keys), None)

    x, y, cut = of(IMAGES, ""), of(LABELS, ""), None
    train, test = of(IMAGES, "train"), of(IMAGES, *HELD_OUT)
    if x is None and train is not None and test is not None:
        x, cut = np.concatenate([train, test]), len(train)
        labels = [y for y in (of(LABELS, "train"), of(LABELS, *HELD_OUT)) if y is not None]
        y = np.concatenate(labels) if len(labels) == 2 else None
    if x is None:
        raise ValueError(f"no array is called x or images, but {', '.join(arrays)}; rename one")
    if x.dtype.kind not in "buif" or not x.size or not np.isfinite(x).all():
        raise ValueError(f"the images are {x.dtype} {list(x.shape)}: needs finite numbers")
    low, high = float(x.min()), float(x.max())
    top = {"uint8": 255.0, "uint16": 65535.0}.get(x.dtype.name, 1.0)
    if low >= 0 and high <= top:
        low, high = 0.0, 1.0 if high <= 1 else top
    x = np.subtract(x, low, dtype=np.float64) / (high - low or 1)
    return _dataset(path.stem, x, y, cut, f"values from {low:g} to {high:g} became 0 to 1")


def _folder(path: Path, size: int) -> Dataset:
    from PIL import Image

    test = next((path / name for name in HELD_OUT if (path / name).is_dir()), None)
    halves = [path] if test is None or not (path / "train").is_dir() else [path / "train", test]
    images, labels, skipped, counts = [], [], [], []
    for half in halves:
        for file in sorted(half.rglob("*")):
            place = file.relative_to(half)
            hidden = any(part[0] == "." or part == "__MACOSX" for part in place.parts)
            if hidden or file.suffix.lower() not in Image.registered_extensions() or file.is_dir():
                continue
            try:
                images.append(_picture(file, size))
                labels.append(place.parent.as_posix())
            except Exception as error:  # Pillow's readers raise errors of every kind
                skipped.append(f"{file.relative_to(path)} ({_reason(error)})")
        counts.append(len(images))
    found = len(images) + len(skipped)
    note = f"{len(skipped)} of {found} pictures cannot be read: {', '.join(skipped[:5])}"
    if 2 * len(skipped) > found or not images:
        raise ValueError(note if found else "no pictures in it")
    x = np.stack(images)
    x = x[..., :1] if (x == x[..., :1]).all() else x
    cut, note = counts[0] if len(halves) == 2 else None, note if skipped else ""
    return _dataset(path.resolve().name, x, np.array(labels), cut, note)


def _picture(file: Path, size: int) -> Array:
    """A square of values in [0, 1], [size, size, 3]. Transparency is drawn on white."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode[0] == "I":  # 16 bits, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)), np.float32) / 255


def _reason(error: BaseException) -> str:
    """An error as one line, without the path that its caller names."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "not a picture" if "cannot identify" in text else " ".join(text.split())


def _dataset(
    name: str, x: Array, y: Array | None, cut: int | None = None, note: str = ""
) -> Dataset:
    """Split at `cut`, or at random. Images become [N, C, H, W]; labels, of any type, become indices."""
    count, side = len(x), round(x.shape[-1] ** 0.5)
    x = x.reshape(-1, side, side) if x.ndim == 2 and side * side == x.shape[1] else x
    x = x[..., None] if x.ndim == 3 else x
    x = np.moveaxis(x, 3, 1) if x.ndim == 4 and x.shape[3] in (1, 3) else x
    if x.ndim != 4 or x.shape[1] not in (1, 3) or count < 8 or cut in (0, count):
        layouts = "[N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, [N, D] with a square D"
        raise ValueError(f"images of shape {list(x.shape)}: needs {layouts}, and N from 8 on")
    if x.min() == x.max():
        raise ValueError(f"every pixel is {float(x.min()):g}: needs images that show something")
    order = np.arange(count) if cut else np.random.default_rng(SPLIT_SEED).permutation(count)
    cut = cut or count - max(1, round(TEST_FRACTION * count))
    y = np.zeros(count) if y is None else y.reshape(-1)
    if len(y) != count:
        raise ValueError(f"{len(y)} labels for {count} images: needs one for each")
    values, labels = np.unique(y[order], return_inverse=True)
    classes = tuple(map(str, values))
    pixels = torch.from_numpy(x[order].astype(np.float32))
    return Dataset(name, pixels, cut, torch.from_numpy(labels), classes, note)
