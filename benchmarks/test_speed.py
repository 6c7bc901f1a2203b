"""The pytest-benchmark suite: a group is one case and pass, its implementations side by side."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from cases import BOTH, FORWARD, PASSES, Case, Copy, Step, cases, implementations

SECONDS = 0.5  # for each benchmark, as nearly as whole rounds allow


def _measure(benchmark: Any, step: Step | Copy) -> None:
    shortest = math.inf
    for _ in range(5):  # the first call compiles
        step.clear()
        started = time.perf_counter()
        step()
        shortest = min(shortest, time.perf_counter() - started)
    rounds = int(min(max(SECONDS / shortest, 10), 5000))
    benchmark.pedantic(step, setup=step.clear, rounds=rounds, warmup_rounds=rounds // 10)


def _table() -> list[Any]:
    rows = []
    for case in cases():
        for which in PASSES if case.op != "noise" else (FORWARD,):
            for implementation in implementations(case.op):
                row = f"{case} {which}"
                rows.append(pytest.param(case, which, implementation, id=f"{row} {implementation}"))
    return rows


@pytest.mark.parametrize("case, which, implementation", _table())
def test_speed(benchmark: Any, device: str, case: Case, which: str, implementation: str) -> None:
    benchmark.group = f"{case} {which}"
    _measure(benchmark, Step(case, implementation, which, device))


@pytest.mark.parametrize("case", [c for c in cases() if c.elements >= 1 << 18], ids=str)
def test_floor(benchmark: Any, device: str, case: Case) -> None:
    """recon_x and x read, the gradient written: 3N values at the speed of copy_."""
    benchmark.group = f"{case} {BOTH}"
    _measure(benchmark, Copy(3 * case.elements * case.dtype.itemsize // 4, device))
