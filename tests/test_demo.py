"""``fastvae demo``: what it writes, what it refuses, and that its comparison can fail."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.cli import demo
from fastvae.demo import data, model, train

MISSING = "the demo extra is not installed"
Image = pytest.importorskip("PIL.Image", reason=MISSING)
load_digits = pytest.importorskip("sklearn.datasets", reason=MISSING).load_digits
pytest.importorskip("matplotlib", reason=MISSING)
pytest.importorskip("tqdm", reason=MISSING)

PICTURES = ("reconstructions.png", "samples.png", "latent.png", "curves.png")
# Few steps, large ones: enough to leave the mean image behind.
QUICK = ("--epochs", "8", "--lr", "5e-3")


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
    assert all(seconds > 0 for seconds in metrics["step_seconds"].values())
    assert config["beta"] == pytest.approx(2 * config["sigma"] ** 2)
    variance, pixels = config["sigma"] ** 2, math.prod(metrics["images"]["shape"])
    nll = test["recon"] / (2 * variance) + pixels / 2 * math.log(2 * math.pi * variance)
    assert test["elbo"] == pytest.approx(-(nll + test["kl"]))
    return metrics


def test_digits(tmp_path, capsys):
    out, copy = tmp_path / "out", tmp_path / "new" / "metrics.json"
    assert run("--out", out, "--json", copy, *QUICK) == 0
    metrics = check_output(out)
    assert json.loads(copy.read_text()) == metrics
    assert metrics["images"] == {"train": 1500, "test": 297, "shape": [1, 8, 8]}
    assert metrics["mean_image"]["ratio"] <= 0.5
    assert metrics["test"]["kl"] > 3
    last = capsys.readouterr().out.splitlines()[-len(PICTURES) :]
    for line, name in zip(last, PICTURES, strict=True):
        assert line.startswith("look at") and f"{out / name}: " in line


def test_npz_in_two_dimensions(npz, tmp_path):
    assert run("--data", npz, "--out", tmp_path / "out", "--latent-dim", 2, *QUICK) == 0
    assert check_output(tmp_path / "out")["images"]["shape"] == [1, 8, 8]


def test_folder(folder, tmp_path):
    out = tmp_path / "out"
    assert run("--data", folder, "--image-size", 10, "--out", out, *QUICK) == 0
    assert check_output(out)["images"] == {"train": 33, "test": 7, "shape": [3, 10, 10]}


def test_unlabelled_and_one_latent_dimension_without_comparison(tmp_path):
    np.save(tmp_path / "x.npy", load_digits(return_X_y=True)[0][:100].reshape(-1, 8, 8))
    out = tmp_path / "out"
    options = ("--data", tmp_path / "x.npy", "--latent-dim", 1, "--no-compare")
    assert run("--out", out, *options, *QUICK) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["agreement"] is None
    assert metrics["epochs"].keys() == metrics["step_seconds"].keys() == {"fastvae"}
    assert all((out / name).exists() for name in PICTURES)


PLAIN = model.plain


def other_beta(decode, x, mu, logvar, beta, eps):
    return PLAIN(decode, x, mu, logvar, 1.01 * beta, eps)


def other_noise(decode, x, mu, logvar, beta, eps):
    return PLAIN(decode, x, mu, logvar, beta, -eps)


@pytest.mark.parametrize("objective", [other_beta, other_noise])
def test_another_objective_disagrees(objective, npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "plain", objective)
    assert run("--data", npz, "--out", tmp_path / "out", *QUICK) == 1
    assert "disagree" in capsys.readouterr().err
    assert not json.loads((tmp_path / "out" / "metrics.json").read_text())["agreement"]["ok"]


def test_agreement_is_relative_and_knows_nan():
    steps, epochs = torch.rand(150, 3).double() + 1, torch.rand(4, 3).double() + 1

    def ok(steps_factor, epochs_factor):
        moved = train.History(steps * steps_factor, epochs * epochs_factor, steps)
        return train.agreement(moved, train.History(steps, epochs, steps))["ok"]

    late = torch.ones(150, 3)
    late[100:] = 2  # late steps drift apart by rounding alone
    assert ok(1, 1) and ok(1, 1.0009) and ok(1.00009, 1) and ok(late, 1)
    assert not (ok(1, 1.0011) or ok(1.00011, 1) or ok(1, math.nan) or ok(math.nan, 1))


def test_collapse_fails_for_the_digits_and_warns_for_other_data(npz, tmp_path, capsys):
    collapsed = ("--sigma", 1, "--no-compare", "--out", tmp_path / "out", *QUICK)
    assert run(*collapsed) == 1
    error = capsys.readouterr().err
    assert "has collapsed to the prior" in error
    assert "mean image" in error
    assert run("--data", npz, *collapsed) == 0
    assert "warning: the posterior has collapsed" in capsys.readouterr().err


def test_divergence_is_named(tmp_path, capsys):
    assert run("--lr", "1e30", "--epochs", 2, "--out", tmp_path / "out") == 1
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
    assert set(error.split("pip install ")[1].split()) == set(demo.EXTRA.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "absent.npz"), "absent.npz: No such file"),
        (("--data", __file__), __file__),
        (("--device", "abacus"), "abacus"),
        (("--sigma", 0), "--sigma must be a finite number above 0"),
        (("--lr", "nan"), "--lr"),
        (("--epochs", 0), "--epochs"),
        (("--batch-size", -1), "--batch-size"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastvae demo: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


RAMP = np.arange(20)[:, None, None] * np.ones((1, 2, 2), int)  # 20 flat images


@pytest.mark.parametrize(
    "shape", [(10, 9), (10, 4, 5), (10, 4, 5, 3), (10, 3, 4, 5), (10, 4, 5, 1)], ids=str
)
def test_layouts_of_arrays(shape, tmp_path):
    x = np.random.default_rng(0).random(shape)
    np.savez(tmp_path / "x.npz", x=x)
    expected = x.reshape(10, 3, 3) if len(shape) == 2 else x
    expected = expected[:, None] if expected.ndim == 3 else expected
    expected = expected if shape[-1] not in (1, 3) else expected.transpose(0, 3, 1, 2)
    images = data.load(str(tmp_path / "x.npz")).images.numpy()
    # The split has shuffled them; bring both into the order of their first pixel.
    images, expected = (a[a[:, 0, 0, 0].argsort()] for a in (images, expected))
    np.testing.assert_allclose(images, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (RAMP.astype(np.uint8), 0, 255),
        (RAMP.astype(np.uint16) * 3000, 0, 65535),
        (RAMP % 2 == 0, 0, 1),
        ((RAMP % 2).astype(np.uint8), 0, 1),  # dSprites
        (RAMP / 40, 0, 1),
        (RAMP / 10 - 1, -1, 0.9),
        (2**40 + RAMP, 2**40, 2**40 + 19),  # lost in float32
    ],
)
def test_arrays_are_scaled_by_their_type_or_range_and_labels_follow(x, low, high, tmp_path):
    expected = (x.astype(float) - low) / (high - low)
    values = expected[:, 0, 0]
    np.savez(tmp_path / "x.npz", images=x, labels=[f"{value:.3f}" for value in values])
    images = data.load(str(tmp_path / "x.npz"))
    found = images.images[:, 0, 0, 0].numpy()
    np.testing.assert_allclose(np.sort(found), np.sort(values), atol=1e-6)
    assert [images.classes[label] for label in images.labels] == [f"{v:.3f}" for v in found]
    assert f"values from {low:g} to {high:g} became 0 to 1" == images.note


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "x_test", "y_train", "y_test"),
        ("train_images", "val_images", "train_labels", "val_labels"),
    ],
)
def test_arrays_of_train_and_test_are_that_split(names, tmp_path):
    x, y = RAMP.astype(np.uint8), np.arange(15)[:, None] % 7
    arrays = zip(names, (x[:15], x[15:], y, y[:5]), strict=True)
    np.savez(tmp_path / "some.npz", **dict(reversed(list(arrays))))
    images = data.load(str(tmp_path / "some.npz"))
    torch.testing.assert_close(images.images[:, 0, 0, 0] * 255, torch.arange(20.0))
    assert images.cut == 15
    assert images.labels.tolist() == [n % 7 for n in range(15)] + list(range(5))


DIGITS = load_digits().images[:20].astype(np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": DIGITS, "b": DIGITS}, "no array is called x or images, but a, b; rename"),
        ({"x": np.array([None] * 9)}, "allow_pickle"),
        ({"x_train": DIGITS, "x_test": DIGITS[:, 1:]}, "must match"),
        ({"x": DIGITS, "y": np.zeros((20, 2))}, "40 labels for 20 images"),
        ({"x": np.random.rand(10, 7)}, r"images of shape \[10, 7\]: needs \[N, H, W\]"),
        ({"x": np.random.rand(10, 4, 4, 4)}, r"\[10, 4, 4, 4\]: needs"),
        ({"x": np.random.rand(3, 4, 4)}, "N from 8 on"),
        ({"x": np.full((10, 2, 2), np.nan)}, "finite numbers"),
        ({"x": np.ones((10, 2, 2))}, "every pixel"),
        ({"x": np.full((10, 2, 2), "a")}, "finite numbers"),
    ],
)
def test_npz_errors(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        data.load(str(tmp_path / "x.npz"))
    assert str(caught.value).startswith(str(tmp_path / "x.npz"))
    assert "\n" not in str(caught.value)


def save_all(folder: Path, pictures: list, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index:02}{suffix}")


def test_pictures_of_several_modes_meet_in_one_range(tmp_path):
    for n in range(4):
        Image.new("1", (4, 4), n % 2).save(tmp_path / f"1-{n}.png")
        Image.new("L", (4, 4), 51).save(tmp_path / f"L-{n}.png")
        Image.fromarray(np.full((4, 4), 26214, np.uint16)).save(tmp_path / f"I16-{n}.png")
        Image.new("CMYK", (4, 4), (0, 0, 0, 102)).save(tmp_path / f"CMYK-{n}.tif")
        # a quarter of 204 black ink on white
        Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / f"RGBA-{n}.png")
    images = data.load(str(tmp_path), image_size=4)
    assert images.images.shape[1:] == (1, 4, 4)  # grey, and no classes
    assert len(images.classes) == 1
    # 51 of 255, 26214 of 65535, 255 - 102 of 255, 255 - 51 of 255
    expected = np.repeat([0, 0.2, 0.4, 0.6, 0.8, 1], [2, 4, 4, 4, 4, 2])
    np.testing.assert_allclose(images.images[:, 0, 0, 0].sort().values, expected, atol=1e-6)


def test_folder_classes_are_its_folders(folder):
    images = data.load(str(folder))
    assert images.classes == ("blue", "red")
    strongest = images.images.mean((2, 3)).argmax(1)  # 0 where red, 2 where blue
    assert torch.equal(strongest, 2 - 2 * images.labels)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_of_train_and_test_are_that_split(held_out, tmp_path):
    for name, shade in (("a", 50), ("b", 100)):
        save_all(tmp_path / "train" / name, [Image.new("L", (4, 4), shade + n) for n in range(4)])
        save_all(tmp_path / held_out / name, [Image.new("L", (4, 4), shade + 100)])
    save_all(tmp_path / "masks", [Image.new("L", (4, 4), 255)] * 3)
    save_all(tmp_path / "train" / ".hidden", [Image.new("L", (4, 4), 255)] * 3)
    images = data.load(str(tmp_path), image_size=4)
    shades = (images.images[:, 0, 0, 0] * 255).round().tolist()
    assert shades == [*range(50, 54), *range(100, 104), 150, 200]
    assert (images.cut, images.classes) == (8, ("a", "b"))
    assert images.labels.tolist() == 4 * [0] + 4 * [1] + [0, 1]


def test_unreadable_pictures_are_skipped_and_named(tmp_path, capsys):
    root = tmp_path / "images"
    save_all(root, [Image.new("L", (32, 32), 20 * n) for n in range(1, 11)])
    (root / "half.png").write_bytes((root / "03.png").read_bytes()[:60])
    (root / "text.png").write_text("no picture")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    options = ("--data", root, "--out", tmp_path / "out", "--no-compare", "--epochs", 1)
    assert run(*options) == 0
    assert "3 of 13 pictures cannot be read: gone.png (" in capsys.readouterr().out
    for index in range(9):
        (root / f"more{index}.png").touch()
    assert run(*options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastvae demo: {root}: 12 of 22 pictures cannot be read: gone.png (")
    assert error.count("\n") == 1


def test_a_run_is_decided_by_its_seed():
    images = data.load("digits")
    config = train.Config(epochs=1)

    def steps(config):
        torch.rand(1)  # whatever was drawn before
        models = {"ours": train.build_model(config, images.images.shape[1:])}
        return train.train(config, models, images.images[: images.cut])["ours"].steps

    ours = steps(config)
    assert torch.equal(ours, steps(config))
    assert not torch.equal(ours, steps(replace(config, seed=1)))


def test_without_given_noise_the_objectives_draw_it():
    ours = train.build_model(train.Config(), torch.Size((1, 8, 8)))
    plain = train.build_model(train.Config(), torch.Size((1, 8, 8)), model.plain)
    x = torch.rand(2000, 1, 8, 8)
    for net in (ours, plain):
        assert net(x, 0.1).loss != net(x, 0.1).loss
    torch.testing.assert_close(ours(x, 0.1).loss, plain(x, 0.1).loss, rtol=1e-2, atol=0)


@pytest.mark.slow
def test_as_users_run_it(tmp_path):
    command = [sys.executable, "-m", "fastvae", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # not a terminal: no progress bar
    metrics = check_output(tmp_path / "demo")
    assert metrics["mean_image"]["ratio"] <= 0.5
    assert f"{metrics['test']['recon']:.3f} squared error" in done.stdout
