"""Images for the demo: scikit-learn's handwritten digits, an .npz or .npy file, or a folder of pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "load"]

Array = np.ndarray[Any, Any]
Notes = list[tuple[str, str]]

TEST_FRACTION = 0.165  # 297 of the 1,797 digits
SPLIT_SEED = 0  # not the run's seed: runs with different seeds are compared on the same test images
SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tga .tif .tiff .webp"
SHOWN = 5  # of the files that cannot be read

# Words in the names of folders and arrays that tell the split, and what arrays are called beside that.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
IMAGES = {"x", "images", "image", "imgs", "img", "data", "arr_0"}
LABELS = {"y", "labels", "label", "targets", "target", "latents_classes", "arr_1"}

# The values that can become 1 while 0 stays 0: the first that no value of the set is above. Where all are too
# small or a value is negative, the set's own range becomes [0, 1]. Pillow reads modes not listed with 8 bits.
ARRAY_TOPS = {"uint8": (1, 255), "uint16": (1, 65535)}
MODE_TOPS = {
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), ("16-bit grey", (65535,))),
    "I": ("32-bit integers", (1, 255, 65535)),  # 16-bit files too, in some versions of Pillow
    "F": ("floating point", (1,)),
}


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
    notes: tuple[tuple[str, str], ...] = ()  # what was done to the data: titles and texts

    @property
    def shape(self) -> torch.Size:
        """Of one image: (C, H, W)."""
        return self.train.shape[1:]

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load(
    source: str = "digits",
    *,
    image_size: int = 32,
    key: str | None = None,
    label_key: str | None = None,
) -> Dataset:
    """Load and split `source`: ``"digits"``, the path of an .npz or .npy file, or a folder of pictures.

    A file holds the images as [N, H, W], [N, H, W, C], [N, C, H, W] or [N, D] with D a square, and
    an .npz file may hold labels, [N] or one-hot [N, K]. Arrays of the usual names are found; `key`
    and `label_key` name others, and ``label_key=""`` none. A folder holds pictures, or one
    sub-folder of pictures for each class; they are cropped to a square and resized to `image_size`.
    Folders, or arrays, of train and of test (or val) images are used as that.

    Values are scaled to [0, 1], all images alike: by the range of their type, or by their own
    where it has none. The result's `notes` say which. Transparent pictures are drawn on white.

    Raises:
        ValueError: the contents are not images as described.
        OSError: the file or folder cannot be read.
    """
    path = Path(source)
    if source != "digits" and not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    try:
        if source != "digits" and not path.is_dir():
            return _file(path, key, label_key)
        if key is not None or label_key is not None:
            raise ValueError("--key and --label-key are for .npz files; leave them out")
        return _digits() if source == "digits" else _folder(path, image_size)
    except (ValueError, MemoryError) as error:
        raise ValueError(f"{source}: {_reason(error)}") from error


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    digits = _dataset("digits", _channels_first(images), (0, 16), labels, None, [])
    return replace(digits, colormap="gray_r")  # ink on paper: zero is white


def _file(path: Path, key: str | None, label_key: str | None) -> Dataset:
    if path.suffix.lower() not in (".npz", ".npy"):
        raise ValueError(
            'neither "digits", an .npz or .npy file nor a folder; give pictures as a folder of them'
        )
    with path.open("rb") as file:
        if not file.read(6).startswith((b"PK", b"\x93NUMPY")):
            raise ValueError("a numpy file by its name only; write one with numpy.savez")
    arrays = _numpy("it", np.load, path)  # no pickles: it may come from anywhere
    if isinstance(arrays, np.ndarray):
        arrays = {path.stem: arrays}

    names = {_split_of(name, "_")[1].lower() for name in arrays}
    image_keys = _pick(list(arrays), key, names & IMAGES or names - LABELS, "--key")
    others = [name for name in arrays if name not in image_keys]
    label_keys = [] if label_key == "" else _pick(others, label_key, LABELS, "--label-key")
    label_keys = label_keys[: len(image_keys)]
    images = [np.asarray(_numpy(repr(k), arrays.__getitem__, k)) for k in image_keys]
    labels = [np.asarray(_numpy(repr(k), arrays.__getitem__, k)) for k in label_keys]
    if len({x.shape[1:] for x in images}) != 1 or images[0].dtype.kind not in "buif":
        what = " and ".join(f"{x.dtype} {list(x.shape)}" for x in images) or "none of the arrays"
        raise ValueError(f"the images are {what}: needs numbers of one shape; choose by --key")
    cut = len(images[0]) if len(images) > 1 else None
    x = _channels_first(np.concatenate(images) if cut else images[0])
    notes = [("arrays", ", ".join(image_keys + label_keys))]
    y = _labels(labels, label_keys, len(x), notes) if labels else None
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    if not np.isfinite([low, high]).all():
        raise ValueError("the images hold NaN or infinity; replace such values")
    span, text = _span(x.dtype.name, low, high, ARRAY_TOPS.get(x.dtype.name, (1,)))
    return _dataset(path.stem, x, span, y, cut, [*notes, ("pixels", text)])


def _numpy(what: str, read: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return read(argument)
    except Exception as error:  # numpy's, zipfile's, zlib's, ...
        text = f"numpy cannot read {what} ({_reason(error)})"
        raise ValueError(f"{text}; save arrays of numbers by numpy.savez") from error


def _pick(keys: list[str], given: str | None, usual: set[str], option: str) -> list[str]:
    """The array `given`, or else the one of a `usual` name, if any; and that of the test, if it is for training."""
    parts = {key: _split_of(key, "_") for key in keys}
    found = {key: split for key, (split, name) in parts.items() if name.lower() in usual}
    listed = f"the arrays are {', '.join(keys[:20])}; give one by {option}"
    if given is None:
        splits = set(found.values())
        if len(found) > len(splits) or ({"train"} != splits - {"test", "val"} and len(splits) > 1):
            raise ValueError(f"several arrays may be meant: {listed}")
        given = next(
            (key for key, split in found.items() if split == "train"), next(iter(found), None)
        )
        if given is None:
            return []
    if given not in keys:
        raise ValueError(f"no array {given!r}: {listed}")
    split, name = parts[given]
    held_out = [key for half in ("test", "val") for key in keys if parts[key] == (half, name)]
    return [given, *held_out[:1]] if split == "train" else [given]


def _labels(arrays: list[Array], keys: list[str], count: int, notes: Notes) -> Array:
    """One label for each image: [count]."""
    rows = [y.reshape(len(y), -1) for y in map(np.atleast_1d, arrays)]
    y: Array = np.concatenate(rows) if len({row.shape[1] for row in rows}) == 1 else np.empty(0)
    if y.size == count:
        return y.reshape(count)
    if len(y) != count or arrays[0].ndim > 2:
        shapes = " and ".join(str(list(array.shape)) for array in arrays)
        raise ValueError(
            f"labels {', '.join(keys)} of shape {shapes} for {count} images: needs [{count}] or "
            f"one-hot [{count}, K]; give others by --label-key, or none by --label-key ''"
        )
    if y.dtype.kind in "buif" and ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all():
        return np.asarray(y.argmax(1))
    # Several properties of each image, as in dSprites.
    column = int((y != y[0]).any(0).argmax())
    notes.append(("labels", f"column {column} of {keys[0]}'s {y.shape[1]}, the first that varies"))
    return np.asarray(y[:, column])


class Picture(NamedTuple):
    kind: str
    tops: tuple[int, ...]
    low: float  # the least value before resizing, and the greatest
    high: float
    clear: bool  # in part
    pixels: Array  # [size, size, 1 or 3]


def _folder(path: Path, size: int) -> Dataset:
    import PIL  # noqa: F401  # where it is missing, no picture is to blame

    files = sorted(_pictures_below(path))
    if not files:
        raise ValueError(f"no images in it ({SUFFIXES})")
    base = os.path.commonpath([file.parent for file in files])
    chosen = [("", file, file.parent.relative_to(base).as_posix()) for file in files]
    parts = [(file, *_split_of(place, "/")) for _, file, place in chosen]
    splits = {split for _, split, _ in parts}
    held_out = "test" if "test" in splits else "val"
    notes: Notes = []
    if is_split := splits >= {"train", held_out}:
        halves = ("train", held_out)
        chosen = [
            (half, file, name) for half in halves for file, part, name in parts if part == half
        ]
        if others := len(files) - len(chosen):
            notes.append(("left out", f"{others} pictures outside of train and {held_out}"))

    read: list[tuple[str, str, Picture]] = []
    skipped = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata and on large pictures
        for split, file, label in chosen:
            try:
                read.append((split, label, _picture(file, size)))
            except Exception as error:  # Pillow's readers raise errors of every kind
                skipped.append(f"{file.relative_to(path)} ({_reason(error)})")
    if skipped:
        text = f"{len(skipped)} of {len(chosen)} pictures cannot be read: "
        text += ", ".join(skipped[:SHOWN]) + (", ..." if len(skipped) > SHOWN else "")
        if 2 * len(skipped) > len(chosen):
            raise ValueError(f"{text}; repair or remove them")
        notes.append(("skipped", text))

    pictures = [picture for *_, picture in read]
    spans = {}
    for kind, tops in sorted({(picture.kind, picture.tops) for picture in pictures}):
        alike = [picture for picture in pictures if picture.kind == kind]
        low, high = min(p.low for p in alike), max(p.high for p in alike)
        spans[kind], text = _span(kind, low, high, tops)
        notes.append(("pixels", f"{text} ({len(alike)} pictures)"))
    if clear := sum(picture.clear for picture in pictures):
        notes.append(("transparency", f"drawn on white ({clear} pictures)"))
    channels = 1 if all((p.pixels == p.pixels[..., :1]).all() for p in pictures) else 3
    x = np.empty((len(pictures), size, size, channels), np.float32)
    for image, picture in zip(x, pictures, strict=True):
        low, high = spans[picture.kind]
        scaled = (picture.pixels[..., :channels] - np.float32(low)) / np.float32(high - low or 1)
        image[:] = scaled.clip(0, 1)  # resizing overshoots at edges
    labels = np.array([label for _, label, _ in read])
    cut = sum(split == "train" for split, *_ in read) if is_split else None
    name = path.resolve().name
    return _dataset(name, _channels_first(x), (0, 1), labels, cut, notes)


def _pictures_below(root: Path) -> Iterator[Path]:
    """Links are followed, but each folder is visited once, and none that `root` lies in."""

    def fail(error: OSError) -> None:
        raise error

    def shown(names: Iterable[str]) -> list[str]:
        return [name for name in sorted(names) if name[0] != "." and name != "__MACOSX"]

    suffixes = set(SUFFIXES.split())
    seen = {root.resolve(), *root.resolve().parents}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        below = {(Path(folder) / name).resolve(): name for name in reversed(shown(folders))}
        folders[:] = sorted(name for real, name in below.items() if real not in seen)
        seen |= below.keys()
        yield from (Path(folder) / n for n in shown(names) if Path(n).suffix.lower() in suffixes)


def _picture(file: Path, size: int) -> Picture:
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    kind, tops = MODE_TOPS.get(image.mode, ("8-bit", (255,)))
    low, high, clear = 0.0, 255.0, False
    if image.mode in MODE_TOPS:
        values = np.array(image, dtype=np.float32)
        if "transparency" in image.info:  # the grey that stands for it
            hidden = values == image.info["transparency"]
            values[hidden], clear = 65535, bool(hidden.any())
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("NaN or infinity among its pixels")
        image = Image.fromarray(values)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        clear = bool(np.asarray(image)[..., 3].min() < 255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "F" else image.convert("RGB")
    pixels = np.asarray(ImageOps.fit(image, (size, size))).reshape(size, size, -1)
    return Picture(kind, tops, low, high, clear, pixels)


def _split_of(name: str, separator: str) -> tuple[str, str]:
    """The split that a word of `name` tells, "" for none, and the other words: "train", "x" of "x_train"."""
    words = name.split(separator)
    others = [word for word in words if word.lower() not in SPLITS]
    split = next((SPLITS[word.lower()] for word in words if word not in others), "")
    return split, separator.join(others)


def _span(
    what: str, low: float, high: float, tops: Iterable[int]
) -> tuple[tuple[float, float], str]:
    """The range that becomes [0, 1] where values go from `low` to `high`, and a text that says so."""
    top = next((top for top in tops if 0 <= low <= high <= top), None)
    span = (low, high) if top is None else (0, top)
    became = "stayed as they are" if span == (0, 1) else "became 0 to 1"
    values = "" if span == (low, high) else f"; the values go from {low:g} to {high:g}"
    return span, f"{what}: {span[0]:g} to {span[1]:g} {became}{values}"


def _reason(error: BaseException) -> str:
    """An error as one line, without the path that its caller names."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not a picture"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _channels_first(x: Array) -> Array:
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


def _dataset(
    name: str, x: Array, span: tuple[float, float], y: Array | None, cut: int | None, notes: Notes
) -> Dataset:
    """Scale `span` to [0, 1] and split, at `cut` or at random; the labels `y`, of any type, become indices."""
    count = len(x)
    if count < 8:
        raise ValueError(f"{count} images are too few to train on and to test with: needs 8")
    if cut in (0, count):
        raise ValueError("no images are left to train on, or none to test with")
    if x.min() == x.max():
        raise ValueError(f"every pixel is {float(x.min()):g}: needs images that show something")
    order = np.arange(count) if cut else np.random.default_rng(SPLIT_SEED).permutation(count)
    cut = cut or count - max(1, round(TEST_FRACTION * count))
    train, test = order[:cut], order[cut:]

    def scaled(part: Array) -> Tensor:
        low, high = span
        if span != (0, 1):  # in double precision where float32 lacks the digits
            part = np.subtract(part, low, dtype=np.result_type(part, np.float32)) / (high - low)
        return torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))

    data = Dataset(name, scaled(x[train]), scaled(x[test]), notes=tuple(notes))
    if y is None or not np.isin(y[test], y[train]).any():  # some tests come without their labels
        return data
    values, indices = np.unique(y, return_inverse=True)
    if len(values) == 1:
        return data
    classes = tuple(str(value) for value in values)
    labels = torch.from_numpy(indices)
    return replace(data, train_labels=labels[train], test_labels=labels[test], classes=classes)
