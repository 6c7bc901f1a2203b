"""The examples' two objectives train alike: from one seed and with the same noise, their losses stay together."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
# Two epochs are 30 to 60 steps. The two objectives round differently in each, and what a step of training makes of that is
# mostly small: a thousand roundings leave room. Where the sign of a gradient near 0 turns, it is more; then the curves may
# part by twice as much as plain PyTorch's own, if its noise is off by a rounding. In float64 a beta that is off by 0.1% shows.
EPOCHS = 2
ROUNDINGS = 1000
# latent_diffusion computes in float16 whatever the dtype, and one rounding of that is as much as a network may add.
CASES = [(name, "float32") for name in NAMES]
CASES += [(name, "float64") for name in NAMES if name != "latent_diffusion"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # lightning's


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn", reason="the demo extra is not installed")
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def share_noise(monkeypatch: pytest.MonkeyPatch, roundings: int = 0) -> None:
    """torch.randn_like gives what fastvae draws from the same generator, so that no example needs an eps."""

    def randn_like(like: Tensor) -> Tensor:
        zeros = torch.zeros_like(like)
        noise = fastvae.reparameterize(zeros, zeros, return_eps=True)[1]
        return noise * (1 + roundings * torch.finfo(noise.dtype).eps)

    monkeypatch.setattr(torch, "randn_like", randn_like)


@pytest.fixture
def _defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def curves(module: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    plain, ours = (np.array(module.train(flag, EPOCHS)) for flag in (False, True))
    assert len(plain) == len(ours) >= 30
    # counts keep most of their entropy whatever is known of them
    least = 0.9 if module.__name__ == "single_cell" else 0.6
    assert plain[-1] < least * plain[0], "the example learns nothing"
    return plain, ours


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.usefixtures("_defaults")
def test_the_curves_stay_together(name, dtype, device, monkeypatch):
    if name == "lightning_module" and device == "cuda":
        pytest.skip("its trainer is told to use the CPU")
    module = example(name, monkeypatch)
    share_noise(monkeypatch)
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_default_device(device)
    plain, ours = curves(module)
    eps = torch.finfo(getattr(torch, dtype)).eps
    if name == "latent_diffusion":
        eps = torch.finfo(torch.float16).eps / ROUNDINGS
    rtol = ROUNDINGS * eps
    for roundings in (1, -2):
        share_noise(monkeypatch, roundings)
        disturbed = np.array(module.train(False, EPOCHS))
        rtol = max(rtol, 2 * np.abs(disturbed / plain - 1).max())
    np.testing.assert_allclose(ours, plain, rtol=rtol)


@pytest.mark.parametrize("name", NAMES)
def test_the_curves_come_apart_when_the_noise_does(name, monkeypatch):
    """What the test above holds together would not be so by itself."""
    plain, ours = curves(example(name, monkeypatch))
    assert np.max(np.abs(ours / plain - 1)) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_as_users_run_it(name, tmp_path):
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="lightning is not installed")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--fastvae", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("epoch"))
    losses = [float(word) for word in line.split()[2:]]
    assert len(losses) >= 15 and all(map(math.isfinite, losses))
