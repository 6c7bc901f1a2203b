"""Statistics of latents beside NumPy over all samples at once; schedules in compiled programs and checkpoints."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from accuracy import to_numpy
from cases import latents, tensor

import fastvae
from fastvae.diagnostics import LatentStatistics
from fastvae.schedules import Capacity, Cyclical, Linear


def used(n: int = 200) -> dict[str, torch.Tensor]:
    """A latent far from the origin that varies little, one that is used, one at the prior, and one just off it."""
    rng = np.random.default_rng(8)
    mu = rng.normal(size=(n, 4)) * [0.2, 1.3, 0.01, 0.05] + [1000, 0, 0, 0.2]
    logvar = rng.normal(size=(n, 4)) * 0.01 + [-2, -3, 0, 0]
    return {"mu": tensor(mu, torch.float32), "logvar": tensor(logvar, torch.float32)}


@pytest.mark.parametrize("sizes", [[200], [1, 60, 0, 139], [100, 100]], ids=str)
def test_batches_add_up(sizes):
    given = used()
    statistics = LatentStatistics()
    for mu, logvar in zip(given["mu"].split(sizes), given["logvar"].split(sizes), strict=True):
        statistics.update(mu.requires_grad_(False), logvar)
    mu, logvar = (to_numpy(t).astype(float) for t in given.values())
    kl = ((mu**2 + np.exp(logvar) - 1 - logvar) / 2).mean(0)
    np.testing.assert_allclose(to_numpy(statistics.kl).astype(float), kl, rtol=1e-6)
    np.testing.assert_allclose(
        to_numpy(statistics.variance).astype(float), mu.var(0, ddof=1), rtol=1e-6
    )
    assert statistics.count == 200
    assert statistics.active_units().item() == 2
    assert statistics.active_units(threshold=1.0).item() == 1
    assert statistics.active_units(threshold=1e-5).item() == 4
    assert statistics.collapsed().item() == 0.25
    assert statistics.collapsed(threshold=0.05).item() == 0.5
    assert statistics.collapsed(threshold=0.0).item() == 0


def test_another_prior_and_shape():
    given = latents((6, 2, 3), prior=True)
    statistics = LatentStatistics()
    statistics.update(**{k: t.requires_grad_() for k, t in given.items()})
    assert statistics.kl.shape == statistics.variance.shape == (2, 3)
    assert not statistics.kl.requires_grad
    want = fastvae.kl_normal(**given, reduction="latent")
    torch.testing.assert_close(statistics.kl.float(), want.detach())


def test_nothing_yet():
    with pytest.raises(
        RuntimeError, match=r"^fastvae.diagnostics.LatentStatistics: no samples.*update"
    ):
        LatentStatistics().active_units()


# Schedules


def values(schedule, n: int) -> list[float]:
    seen = []
    for _ in range(n):
        seen.append(schedule.value.item())
        schedule.step()
    return seen


def test_linear():
    assert values(Linear(4.0, steps=4), 6) == pytest.approx([0, 1, 2, 3, 4, 4])
    delayed = Linear(0.5, steps=2, start=1.5, delay=2)
    assert values(delayed, 6) == pytest.approx([1.5, 1.5, 1.5, 1, 0.5, 0.5])


def test_cyclical():
    """Fu et al.: tau = mod(t, T / M) / (T / M), beta = tau / R up to R, and 1 from there on."""
    got = values(Cyclical(2.0, period=8, ramp=0.5, start=0.4), 18)
    one = [0.4 + 1.6 * min(t / 8 / 0.5, 1) for t in range(8)]
    assert got == pytest.approx([*one, *one, *one[:2]])
    two = values(Cyclical(period=4, ramp=0.25, cycles=2), 11)
    assert two == pytest.approx([0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1])


def test_capacity():
    """Burgess et al.: gamma |KL - C|, with its gradient."""
    capacity = Capacity(25.0, steps=100_000)
    capacity.count += 40_000
    kl = torch.tensor([3.0, 12.5], requires_grad=True)
    loss = capacity(kl)
    assert loss.tolist() == pytest.approx([7000, 2500])
    (gradient,) = torch.autograd.grad(loss.sum(), kl)
    assert gradient.tolist() == [-1000, 1000]
    assert values(Capacity(10.0, steps=2, gamma=1.0, start=2.0), 4) == pytest.approx([2, 6, 10, 10])


SCHEDULES = {
    "linear": lambda: Linear(4.0, steps=4),
    "cyclical": lambda: Cyclical(2.0, period=3),
    "capacity": lambda: Capacity(5.0, steps=4, gamma=2.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_checkpoints(name):
    """A run that is broken off and goes on is the run that is not."""
    want = values(SCHEDULES[name](), 7)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), SCHEDULES[name]())
    assert values(model[1], 3) == want[:3]
    file = io.BytesIO()
    torch.save(model.half().state_dict(), file)  # which takes no digit of a count
    file.seek(0)
    again = torch.nn.Sequential(torch.nn.Linear(2, 2), SCHEDULES[name]())
    again.load_state_dict(torch.load(file, weights_only=True))
    assert values(again[1], 4) == want[3:]
    assert values(copy.deepcopy(model[1]), 4) == want[3:]
    assert not list(again[1].parameters())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["linear", "cyclical"])
def test_a_compiled_step_sees_each_value(name, inside):
    """Whether the schedule is moved on in it or outside; and it is compiled once."""
    schedule, compiled = SCHEDULES[name](), []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    x = tensor(np.arange(6).reshape(2, 3), torch.float32)

    def objective(mu):
        loss = fastvae.vae_loss(x, 0.5 * x, mu, torch.zeros_like(mu), beta=schedule.value)
        if inside:
            schedule.step()
        return loss.loss - loss.recon

    program = torch.compile(objective, fullgraph=True, backend=backend)
    got = []
    for _ in range(6):
        got.append(program(torch.ones(2, 4)).item() / 2)
        if not inside:
            schedule.step()
    assert got == pytest.approx(values(SCHEDULES[name](), 6), abs=1e-6)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Linear(steps=0), "Linear: steps must be above 0 and finite, but got 0"),
        (lambda: Cyclical(period=-3), "Cyclical: period must be above 0 and finite, but got -3"),
        (lambda: Cyclical(period=3, ramp=0.0), "Cyclical: ramp must be above 0"),
        (lambda: Capacity(steps=0), "Capacity: steps must be above 0"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=f"^fastvae.schedules.{match}"):
        make()


def test_repr():
    assert repr(Linear(steps=3)) == "Linear(1.0, steps=3, start=0.0, delay=0)"
    assert repr(Cyclical(period=3)).startswith("Cyclical(1.0, period=3, ramp=0.5")
    assert repr(Capacity(steps=3)) == "Capacity(25.0, steps=3, start=0.0, delay=0, gamma=1000.0)"
