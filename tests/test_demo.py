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
    assert error == f'fastvae demo: needs {package}: pip install "fastvae[demo]"\n'


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


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3), "b": np.zeros(3)}, "'x'"),
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
    assert "x.npz" in str(caught.value)


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
