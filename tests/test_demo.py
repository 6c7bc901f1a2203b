"""``fastvae demo``: what it writes, what it refuses, and that its comparison can fail."""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.cli import demo
from fastvae.demo import data, objectives, train

MISSING = "the demo extra is not installed"
Image = pytest.importorskip("PIL.Image", reason=MISSING)
load_digits = pytest.importorskip("sklearn.datasets", reason=MISSING).load_digits
pytest.importorskip("matplotlib", reason=MISSING)
pytest.importorskip("tqdm", reason=MISSING)

PICTURES = ("reconstructions.png", "samples.png", "latent.png", "curves.png")
# Few steps, large ones: enough to leave the mean image behind.
QUICK = ("--epochs", "8", "--lr", "5e-3", "--threads", "1")


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    args = parser.parse_args(["demo", *map(str, argv)])
    status: int = args.run(args)
    return status


@pytest.fixture(autouse=True)
def _restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """300 digits as bytes, with labels."""
    x, y = load_digits(return_X_y=True)
    path = tmp_path / "some.npz"
    np.savez(path, x=(x[:300] / 16 * 255).round().astype(np.uint8), y=y[:300])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of small pictures, none of them square: reds and blues of all shades."""
    rng = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(20):
            pixels = np.zeros((12, 18, 3), np.uint8)
            pixels[..., channel] = rng.integers(40, 255)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def check_output(out: Path) -> dict:
    """Look at what a run wrote and return its metrics."""
    for name in PICTURES:
        picture = np.asarray(Image.open(out / name).convert("L"))
        assert min(picture.shape) >= 200
        assert picture.std() > 5, f"{name} is blank"
    metrics = json.loads((out / "metrics.json").read_text())
    config, test = metrics["config"], metrics["test"]
    assert metrics["agreement"]["ok"]
    assert metrics["agreement"]["first_steps"] <= 1e-4
    assert metrics["agreement"]["epochs"] <= 1e-3
    for curves in metrics["epochs"].values():
        assert [len(curve) for curve in curves.values()] == 3 * [config["epochs"]]
    for times in metrics["step_seconds"].values():
        assert 0 < times["p20"] <= times["median"] <= times["p80"]
    if config["model"] == "ae":
        assert config["beta"] == 0
        assert test["kl"] is None
        assert test["elbo"] is None
        assert test["recon"] == test["recon_at_mean"]
    else:
        assert config["beta"] == pytest.approx(2 * config["sigma"] ** 2)
        variance, pixels = config["sigma"] ** 2, math.prod(metrics["images"]["shape"])
        nll = test["recon"] / (2 * variance) + pixels / 2 * math.log(2 * math.pi * variance)
        assert test["elbo"] == pytest.approx(-(nll + test["kl"]))
    return metrics


@pytest.mark.parametrize("options", [(), ("--model", "ae"), ("--noise", "0.3")], ids=str)
def test_digits(options, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "new" / "metrics.json"
    assert run("--out", out, "--json", copy, *QUICK, *options) == 0
    metrics = check_output(out)
    assert json.loads(copy.read_text()) == metrics
    assert (metrics["images"]["train"], metrics["images"]["test"]) == (1500, 297)
    assert metrics["mean_image"]["ratio"] <= 0.5
    assert metrics["config"]["model"] == "ae" or metrics["test"]["kl"] > 3


def test_npz(npz, tmp_path):
    assert run("--data", npz, "--out", tmp_path / "out", "--latent-dim", 2, *QUICK) == 0
    assert check_output(tmp_path / "out")["images"]["shape"] == [1, 8, 8]


def test_folder(folder, tmp_path):
    out = tmp_path / "out"
    assert run("--data", folder, "--image-size", 10, "--out", out, *QUICK) == 0
    assert check_output(out)["images"] == {"train": 33, "test": 7, "shape": [3, 10, 10]}


def test_unlabelled_and_one_latent_dimension_without_comparison(tmp_path):
    np.savez(tmp_path / "x.npz", load_digits(return_X_y=True)[0][:100].reshape(-1, 8, 8))
    out = tmp_path / "out"
    options = ("--data", tmp_path / "x.npz", "--latent-dim", 1, "--no-compare")
    assert run("--out", out, *options, *QUICK) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["agreement"] is metrics["step_seconds"] is metrics["epochs"]["plain"] is None
    assert all((out / name).exists() for name in PICTURES)


def other_beta(*args, beta, **kwargs):
    return PLAIN(*args, beta=1.01 * beta, **kwargs)


def other_noise(*args, eps, **kwargs):
    return PLAIN(*args, eps=-eps, **kwargs)


PLAIN = objectives.plain


@pytest.mark.parametrize("objective", [other_beta, other_noise])
def test_another_objective_disagrees(objective, npz, tmp_path, monkeypatch, capsys):
    # The timed steps draw for themselves.
    monkeypatch.setattr(train, "step_times", lambda *_: None)
    monkeypatch.setattr(objectives, "plain", objective)
    assert run("--data", npz, "--out", tmp_path / "out", *QUICK) == 1
    assert "disagree" in capsys.readouterr().err
    assert not json.loads((tmp_path / "out" / "metrics.json").read_text())["agreement"]["ok"]


def test_agreement_is_relative_and_knows_nan():
    ours = train.History(torch.rand(150, 3).double() + 1, torch.rand(4, 3).double() + 1)

    def scaled(steps, epochs):
        return train.History(ours.steps * steps, ours.epochs * epochs)

    assert train.agreement(ours, ours) == train.Agreement(0.0, 0.0)
    assert train.agreement(scaled(1, 1.0009), ours).ok
    assert not train.agreement(scaled(1, 1.0011), ours).ok
    assert train.agreement(scaled(1.00009, 1), ours).ok
    assert not train.agreement(scaled(1.00011, 1), ours).ok
    assert not train.agreement(scaled(1, math.nan), ours).ok
    assert not train.agreement(scaled(math.nan, 1), scaled(math.nan, 1)).ok
    late = torch.ones(150, 3)
    late[100:] = 2  # late steps drift apart by rounding alone
    assert train.agreement(scaled(late, 1), ours).ok


def test_collapse_fails_for_the_digits_and_warns_for_other_data(npz, tmp_path, capsys):
    collapsed = ("--sigma", 1, "--no-compare", "--out", tmp_path / "out", *QUICK)
    assert run(*collapsed) == 1
    error = capsys.readouterr().err
    assert "has collapsed to the prior" in error
    assert "mean image" in error
    assert run("--data", npz, *collapsed) == 0
    assert "warning: the posterior has collapsed" in capsys.readouterr().err


def test_divergence_is_named(tmp_path, capsys):
    assert run("--lr", "1e30", "--epochs", 2, "--threads", 1, "--out", tmp_path / "out") == 1
    assert "diverged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "package"),
    [("tqdm", "tqdm"), ("sklearn.datasets", "scikit-learn"), ("PIL", "pillow")],
)
def test_missing_extra_is_named(module, package, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    source = folder if module == "PIL" else "digits"
    assert run("--data", source, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastvae demo: needs {package}: pip install ")
    # The packages themselves: PyPI's "fastvae" is another project.
    assert error.split("pip install ")[1].split() == [
        "pillow",
        "matplotlib",
        "scikit-learn",
        "tqdm",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "absent.npz"), "no such file"),
        (("--data", __file__), "neither"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastvae demo: ")
    assert message in error
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "options",
    [("--sigma", 0), ("--lr", "nan"), ("--epochs", 0), ("--epochs", 1.5), ("--noise", -1)],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((10, 9), (1, 3, 3)),
        ((10, 4, 5), (1, 4, 5)),
        ((10, 4, 5, 3), (3, 4, 5)),
        ((10, 3, 4, 5), (3, 4, 5)),
        ((10, 4, 5, 1), (1, 4, 5)),
    ],
)
def test_npz_layouts(shape, expected, tmp_path):
    x = np.random.default_rng(0).random(shape)
    np.savez(tmp_path / "x.npz", x=x)
    images = data.load(str(tmp_path / "x.npz"))
    assert tuple(images.shape) == expected
    assert images.train_labels is None
    channels_last = shape[-1] in (1, 3)
    x = x if channels_last else np.moveaxis(x.reshape(10, *expected), 1, 3)
    pixels = np.concatenate([images.train, images.test]).transpose(0, 2, 3, 1)
    # The split has shuffled them; bring both into the order of their first pixel.
    pixels, x = (a[a[:, 0, 0, 0].argsort()] for a in (pixels, x))
    np.testing.assert_allclose(pixels, x, rtol=1e-6)


def test_npz_values_are_scaled_and_labels_follow_their_images(tmp_path):
    levels = np.arange(20)
    x = np.broadcast_to(levels[:, None, None], (20, 2, 2))
    np.savez(tmp_path / "x.npz", x=x - 5, y=levels % 2 == 0)
    images = data.load(str(tmp_path / "x.npz"))
    assert images.classes == ("False", "True")
    for pixels, labels in (
        (images.train, images.train_labels),
        (images.test, images.test_labels),
    ):
        level = (pixels[:, 0, 0, 0] * 19).round()
        torch.testing.assert_close(pixels[:, 0, 0, 0] * 19, level)
        assert torch.equal(labels, (level % 2 == 0).long())


DIGITS = load_digits().images[:20].astype(np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3), "b": np.zeros(3)}, "several arrays may be meant: .* a, b; .*--key"),
        ({"x": DIGITS, "images": DIGITS}, "several arrays may be meant: .* x, images; .*--key"),
        ({"x": DIGITS, "x_train": DIGITS, "x_test": DIGITS}, "several arrays .*--key"),
        ({"x": DIGITS, "y": np.arange(20), "labels": np.arange(20)}, "several .*--label-key"),
        ({"y": np.zeros(9)}, "none of the arrays.*--key"),
        ({"x": np.array([None] * 9)}, "'x' .*allow_pickle.*numpy.savez"),
        ({"x_train": DIGITS, "x_test": DIGITS[:, 1:]}, "20, 8, 8.* and .*20, 7, 8.*--key"),
        ({"x": DIGITS, "y": np.zeros((20, 2, 2))}, r"y of shape \[20, 2, 2\] .*--label-key"),
        ({"x_train": DIGITS, "x_test": DIGITS, "labels": np.zeros(3)}, "labels of shape"),
        ({"x": np.random.rand(10, 7)}, "no square"),
        ({"x": np.random.rand(10, 4, 4, 4)}, "1 or 3 channels"),
        ({"x": np.random.rand(3, 4, 4)}, "too few"),
        ({"x": np.full((10, 2, 2), np.nan)}, "NaN"),
        ({"x": np.ones((10, 2, 2))}, "every pixel"),
        ({"x": np.full((10, 2, 2), "a")}, "numbers"),
        ({"x": np.random.rand(10, 2, 2), "y": np.zeros(9)}, "labels"),
    ],
)
def test_npz_errors(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        data.load(str(tmp_path / "x.npz"))
    assert str(caught.value).startswith(str(tmp_path / "x.npz"))
    assert "\n" not in str(caught.value)


def values(images: data.Dataset) -> np.ndarray:
    """All pixels [N, C, H, W], train first, then test."""
    return torch.cat([images.train, images.test]).numpy()


def text_of(images: data.Dataset) -> str:
    return "\n".join(f"{title}: {text}" for title, text in images.notes)


RAMP = np.arange(20)[:, None, None] * np.ones((1, 2, 2), int)  # 20 flat images


@pytest.mark.parametrize(
    ("x", "low", "high", "note"),
    [
        (
            RAMP.astype(np.uint8),
            0,
            255,
            "uint8: 0 to 255 became 0 to 1; the values go from 0 to 19",
        ),
        (RAMP.astype(np.uint16) * 3000, 0, 65535, "uint16: 0 to 65535 became 0 to 1"),
        (RAMP % 2 == 0, 0, 1, "bool: 0 to 1 stayed as they are"),
        ((RAMP % 2).astype(np.uint8), 0, 1, "uint8: 0 to 1 stayed as they are"),  # dSprites
        (RAMP / 40, 0, 1, "float64: 0 to 1 stayed as they are"),
        (np.float16(RAMP / 10 - 1), -1, 0.9, "float16: -1 to 0.899902 became 0 to 1"),
        (2**40 + RAMP, 2**40, 2**40 + 19, "int64: "),  # lost in float32
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_arrays_are_scaled_by_the_range_of_their_type(x, low, high, note, suffix, tmp_path):
    (np.save if suffix == ".npy" else np.savez)(tmp_path / f"x{suffix}", x)
    images = data.load(str(tmp_path / f"x{suffix}"))
    expected = (x.astype(float) - low) / (high - low)
    found = np.sort(values(images)[:, 0], 0)
    np.testing.assert_allclose(found, np.sort(expected, 0), atol=1e-3 if "16:" in note else 1e-7)
    assert note in text_of(images)


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [
        ("x_train", "x_test", ("y_train", "y_test")),
        ("train_images", "test_images", ("train_labels", "test_labels")),
        ("train_images", "val_images", ("train_labels", "val_labels")),
    ],
)
def test_arrays_of_train_and_test_are_that_split(train, test, labels, tmp_path):
    x = RAMP.astype(np.uint8)
    arrays = {test: x[15:], labels[1]: np.arange(5)[:, None], labels[0]: np.arange(15)[:, None] % 7}
    np.savez(tmp_path / "some.npz", **arrays, **{train: x[:15]})
    for key in (None, train):
        images = data.load(str(tmp_path / "some.npz"), key=key)
        torch.testing.assert_close(images.train[:, 0, 0, 0] * 255, torch.arange(15.0))
        torch.testing.assert_close(images.test[:, 0, 0, 0] * 255, torch.arange(15.0, 20))
        assert images.train_labels.tolist() == [n % 7 for n in range(15)]
        assert images.test_labels.tolist() == list(range(5))
    assert f"arrays: {train}, {test}, {labels[0]}, {labels[1]}" in text_of(images)


@pytest.mark.parametrize("name", ["images", "imgs", "data", "X", "arr_0", "something"])
@pytest.mark.parametrize(
    "labels",
    [
        np.arange(20)[:, None] % 3,
        np.arange(20)[None] % 3,
        np.eye(3)[np.arange(20) % 3],
        np.eye(3, dtype=bool)[np.arange(20) % 3],
        np.array(["a", "b", "c"])[np.arange(20) % 3],
        np.stack([np.full(20, 9), np.arange(20) % 3, np.arange(20)], 1),  # dSprites
    ],
    ids=["column", "row", "one-hot", "bool", "text", "factors"],
)
def test_usual_names_and_shapes_of_labels(name, labels, tmp_path):
    np.savez(tmp_path / "some.npz", **{name: RAMP.astype(np.uint8), "latents_classes": labels})
    images = data.load(str(tmp_path / "some.npz"))
    assert len(images.classes) == 3
    levels = torch.from_numpy(values(images)[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(torch.cat([images.train_labels, images.test_labels]), levels % 3)
    assert ("column 1 of latents_classes's 3" in text_of(images)) == (
        labels.shape == (20, 3) and labels[0, 0] == 9
    )
    assert data.load(str(tmp_path / "some.npz"), label_key="").train_labels is None


def test_keys_choose_arrays(tmp_path, capsys):
    path = tmp_path / "some.npz"
    np.savez(
        path,
        x=RAMP,
        other=RAMP[::-1] * 2,
        y=np.arange(20),
        kind=np.arange(20) % 2,
        few=np.arange(3),
    )
    images = data.load(str(path), key="other", label_key="kind")
    assert "arrays: other, kind" in text_of(images)
    assert images.classes == ("0", "1")
    with pytest.raises(
        ValueError, match=r"some.npz: no array 'z': .* x, other, y, kind, few; .*--key"
    ):
        data.load(str(path), key="z")
    assert run("--data", path, "--label-key", "few", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"{path}: labels few of shape [3] for 20 images: needs [20] or one-hot" in error
    assert run("--data", "digits", "--key", "x", "--out", tmp_path / "out") == 1
    assert "--key and --label-key are for .npz files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.npz", b"not an archive"),
        ("empty.npy", b""),
        ("cut.npz", b"PK\x03\x04 and no more"),
        ("cut.npy", b"\x93NUMPY\x01\x00"),
    ],
)
def test_broken_array_files_are_one_line(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert run("--data", tmp_path / name, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastvae demo: {tmp_path / name}: ")
    assert error.count("\n") == 1
    assert "numpy.savez" in error


def test_folder_of_grey_images_has_one_channel_and_no_labels(tmp_path):
    for index in range(10):
        Image.new("RGB", (5, 5), (20 * index,) * 3).save(tmp_path / f"{index}.png")
    images = data.load(str(tmp_path), image_size=4)
    assert tuple(images.shape) == (1, 4, 4)
    assert images.train_labels is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        data.load(str(tmp_path / "empty"))


def test_folder_classes_are_its_folders(folder):
    images = data.load(str(folder))
    assert images.classes == ("blue", "red")
    strongest = images.train.mean((2, 3)).argmax(1)  # 0 where red, 2 where blue
    assert torch.equal(strongest, 2 - 2 * images.train_labels)


def save_all(folder: Path, pictures: list, suffix: str = ".png", **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index:02}{suffix}", **options)


def load_sorted(folder: Path, size: int = 4) -> tuple[np.ndarray, data.Dataset]:
    """The pictures of `folder` in the order of their sums: which one is which is lost in the split."""
    images = data.load(str(folder), image_size=size)
    x = values(images)
    return x[x.sum((1, 2, 3)).argsort()], images


def wide(dtype: str, factor: float, offset: float = 0) -> list[np.ndarray]:
    """17 pictures of 16 levels each."""
    grid = np.arange(16).reshape(4, 4)
    return [(offset + factor * (grid + 16 * n)).astype(dtype) for n in range(17)]


@pytest.mark.parametrize(
    ("arrays", "suffix", "low", "high", "note"),
    [
        (wide("uint16", 240), ".png", 0, 65535, "16-bit grey: 0 to 65535 became 0 to 1"),
        (wide("uint16", 3), ".tif", 0, 65535, "16-bit grey: 0 to 65535 became 0 to 1"),
        (wide(">u2", 240), ".tif", 0, 65535, "16-bit grey: 0 to 65535 became 0 to 1"),
        (wide("uint16", 240), ".pgm", 0, 65535, "0 to 65535 became 0 to 1"),
        (wide("int32", 240), ".tif", 0, 65535, "32-bit integers: 0 to 65535 became 0 to 1"),
        (wide("int32", 0.9), ".tif", 0, 255, "32-bit integers: 0 to 255 became 0 to 1"),
        (wide("int32", 1000, -5), ".tif", -5, 270995, "32-bit integers: -5 to 270995 became"),
        (wide("float32", 1 / 300), ".tif", 0, 1, "floating point: 0 to 1 stayed as they are"),
        (wide("float32", 2, -7), ".tif", -7, 535, "floating point: -7 to 535 became 0 to 1"),
        (wide("uint8", 0.9), ".png", 0, 255, "8-bit: 0 to 255 became 0 to 1"),
    ],
)
def test_pictures_are_scaled_by_the_range_of_their_mode(arrays, suffix, low, high, note, tmp_path):
    save_all(tmp_path, [Image.fromarray(a) for a in arrays], suffix)
    x, images = load_sorted(tmp_path)
    expected = np.stack([(a.astype(float) - low) / (high - low) for a in arrays])
    np.testing.assert_allclose(x[:, 0], expected, atol=1e-6)
    assert note in text_of(images)
    assert "(17 pictures)" in text_of(images)


def test_pictures_of_several_modes_meet_in_one_range(tmp_path):
    for n in range(4):
        Image.new("1", (4, 4), n % 2).save(tmp_path / f"1-{n}.png")
        Image.new("L", (4, 4), 51).save(tmp_path / f"L-{n}.png")
        Image.fromarray(np.full((4, 4), 26214, np.uint16)).save(tmp_path / f"I16-{n}.png")
        Image.new("CMYK", (4, 4), (0, 0, 0, 102)).save(tmp_path / f"CMYK-{n}.tif")
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([9, 9, 9, 204, 204, 204])
        palette.save(tmp_path / f"P-{n}.png")
    x, images = load_sorted(tmp_path)
    # 51 of 255, 26214 of 65535, 255 - 102 of 255, 204 of 255
    expected = np.repeat([0, 0.2, 0.4, 0.6, 0.8, 1], [2, 4, 4, 4, 4, 2])
    np.testing.assert_allclose(x, expected[:, None, None, None] + np.zeros((1, 1, 4, 4)), atol=1e-6)
    assert "16-bit grey: 0 to 65535 became 0 to 1; the values go from 26214 to 26214 (4" in text_of(
        images
    )
    assert "8-bit: 0 to 255 became 0 to 1 (16 pictures)" in text_of(images)


def drawn_in_alpha(mode: str, n: int) -> Image.Image:
    """Black ink; 10 n of 255 of it in the left half, none in the right."""
    alpha = Image.new("L", (4, 4), 0)
    alpha.paste(10 * n, (0, 0, 2, 4))
    picture = Image.new("LA", (4, 4), (0, 0))
    picture.putalpha(alpha)
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("LA", ".png"), ("RGBA", ".png"), ("RGBA", ".tif"), ("LA", ".tif"), ("La", ".tif")],
)
def test_transparency_is_drawn_on_white(mode, suffix, tmp_path):
    save_all(tmp_path, [drawn_in_alpha(mode.upper(), n) for n in range(1, 21)], suffix)
    for file in (
        tmp_path.iterdir() if mode == "La" else ()
    ):  # Pillow reads it, but does not write it
        straight, multiplied = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1))
        file.write_bytes(file.read_bytes().replace(straight, multiplied))
    assert Image.open(tmp_path / f"00{suffix}").mode == mode
    x, images = load_sorted(tmp_path)
    left = 1 - 10 * np.arange(20, 0, -1) / 255
    np.testing.assert_allclose(x[:, 0, :, :2], left[:, None, None] + np.zeros((4, 2)), atol=1e-6)
    np.testing.assert_array_equal(x[:, 0, :, 2:], 1)
    assert "transparency: drawn on white (20 pictures)" in text_of(images)


def half(mode: str, left: int, right: int) -> Image.Image:
    picture = Image.new(mode, (4, 4), right)
    picture.paste(left, (0, 0, 2, 4))
    return picture


def test_transparent_colours_are_drawn_on_white(tmp_path):
    grey = Image.fromarray(np.repeat([[100, 100, 200, 200]], 4, 0).astype(np.uint16))
    palette = half("P", 0, 1)
    palette.putpalette([0, 0, 0, 51, 51, 51])
    save_all(tmp_path / "16", [grey] * 8, transparency=200)
    save_all(tmp_path / "P", [palette] * 8, transparency=1)
    save_all(tmp_path / "alphas", [palette] * 8, transparency=bytes([255, 0]))
    save_all(tmp_path / "L", [half("L", 0, 51)] * 8, transparency=51)
    with_alpha = palette.convert("PA")
    with_alpha.putalpha(half("L", 255, 0))
    save_all(tmp_path / "PA", [with_alpha] * 8, ".tif")
    save_all(tmp_path / "gif", [palette] * 8, ".gif", transparency=1)
    save_all(tmp_path / "opaque", [half("LA", (0, 255), (255, 255))] * 8)
    x, images = load_sorted(tmp_path)
    np.testing.assert_allclose(x[:, 0, :, :2], 0, atol=0.002)
    np.testing.assert_array_equal(x[:, 0, :, 2:], 1)
    assert "drawn on white (48 pictures)" in text_of(images)


@pytest.mark.parametrize("held_out", ["test", "val", "Testing"])
@pytest.mark.parametrize("above", ["", "cats"])
def test_folders_of_train_and_test_are_that_split(held_out, above, tmp_path):
    root = tmp_path / "images"
    for name in ("a", "b"):
        shade = {"a": 50, "b": 100}[name]
        train = [Image.new("L", (4, 4), shade + n) for n in range(4)]
        save_all(root / above / "train" / name, train)
        save_all(root / above / held_out / name, [Image.new("L", (4, 4), shade + 100)])
    save_all(root / above / "masks", [Image.new("L", (4, 4), 255)] * 3)
    images = data.load(str(root), image_size=4)
    assert sorted((images.train[:, 0, 0, 0] * 255).round().tolist()) == [
        *range(50, 54),
        *range(100, 104),
    ]
    assert (images.test[:, 0, 0, 0] * 255).round().tolist() == [150, 200]
    assert images.classes == ("a", "b")
    assert images.train_labels.tolist() == 4 * [0] + 4 * [1]
    assert images.test_labels.tolist() == [0, 1]
    assert (
        f"left out: 3 pictures outside of train and {'val' if held_out == 'val' else 'test'}"
        in text_of(images)
    )


def test_a_test_without_classes_leaves_the_labels_out(tmp_path):
    shades = [Image.new("L", (4, 4), 20 * n) for n in range(8)]
    save_all(tmp_path / "train" / "a", shades)
    save_all(tmp_path / "train" / "b", shades)
    save_all(tmp_path / "test", shades[:3])
    images = data.load(str(tmp_path), image_size=4)
    assert (len(images.train), len(images.test), images.train_labels) == (16, 3, None)


def test_classes_called_train_alone_are_no_split(tmp_path):
    for name in ("train", "car"):
        save_all(tmp_path / name, [Image.new("L", (4, 4), 20 * n) for n in range(8)])
    assert data.load(str(tmp_path), image_size=4).classes == ("car", "train")


def test_hidden_files_are_skipped_and_links_followed(tmp_path):
    shades = [Image.new("L", (4, 4), 20 * n) for n in range(1, 9)]
    save_all(tmp_path / "elsewhere" / "b", shades)
    root = tmp_path / "images"
    save_all(root / "a.png", shades)  # a folder
    for hidden in (".cache", "__MACOSX"):
        save_all(root / hidden, shades)
    (root / "a.png" / "._00.png").write_bytes(b"Mac OS X")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "a.png" / "linked.png").symlink_to(tmp_path / "elsewhere" / "b" / "00.png")
    (root / "loop").symlink_to(root)
    (root / "b" / "up").symlink_to(tmp_path)
    (root / "again").symlink_to(root / "a.png")
    images = data.load(str(root), image_size=4)
    assert images.classes == ("a.png", "b")
    assert len(values(images)) == 8 + 1 + 8
    assert "skipped" not in text_of(images)


def big_png(path: Path) -> None:
    """The beginning of a picture of 20000 x 20000 pixels."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20000, 20000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


def test_unreadable_pictures_are_skipped_and_named(tmp_path, capsys):
    root = tmp_path / "images"
    save_all(root, [Image.new("L", (32, 32), 20 * n) for n in range(1, 11)])
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(root / "half.jpg")
    whole = (root / "half.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    big_png(root / "big.png")
    np.save(root / "array.npy", np.zeros(4))
    (root / "array.npy").rename(root / "array.png")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(root / "nan.tif")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "zero.gif").touch()
    options = ("--no-compare", "--epochs", 1, "--threads", 1)
    assert run("--data", root, "--out", tmp_path / "out", *options) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("skipped"))
    assert "6 of 16 pictures cannot be read: array.png (not a picture), big.png (" in line
    assert "gone.png (" in line and "half.jpg (" in line and "nan.tif (" in line
    assert "zero.gif" not in line  # the sixth
    assert "8-bit: 0 to 255 became 0 to 1 (10 pictures)" in out

    for index in range(5):
        (root / f"more{index}.png").touch()
    assert run("--data", root, "--out", tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastvae demo: {root}: 11 of 21 pictures cannot be read: array.png (")
    assert error.count("\n") == 1


def test_a_run_is_decided_by_its_seed():
    images = data.load("digits")
    config = train.Config(epochs=1)

    def steps(config, objective=objectives.fused, **kwargs):
        torch.rand(1)  # whatever was drawn before
        model = train.build_model(config, images.shape)
        return train.train(config, model, images.train, objective, **kwargs).steps

    ours = steps(config)
    assert torch.equal(ours, steps(config))
    assert not torch.equal(ours, steps(replace(config, seed=1)))
    # Handed its own noise, the objective does what it did when it drew it.
    assert torch.equal(ours, steps(config, given_noise=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--noise", "0.3"), ("--model", "ae")], ids=str)
def test_as_users_run_it(options, tmp_path):
    command = [sys.executable, "-m", "fastvae", "demo", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # not a terminal: no progress bar
    metrics = check_output(tmp_path / "demo")
    assert metrics["mean_image"]["ratio"] <= 0.5
    assert f"{metrics['test']['recon']:.3f} squared error" in done.stdout
