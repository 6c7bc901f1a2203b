"""The pytest-benchmark suite: a group is one case and pass, its implementations side by side.

Cases, baselines and the check are those of ``fastvae bench`` (fastvae/bench), so that both time the same things.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from fastvae.bench import baselines, check
from fastvae.bench.baselines import Compiled, Timed, Torch
from fastvae.bench.cases import BOTH, Case, op_cases

SECONDS = 0.5  # for each benchmark, as nearly as whole rounds allow
FLOOR = 1 << 18  # elements: a smaller copy measures the call, not the memory


def _measure(benchmark: Any, timed: Timed, device: str) -> None:
    cuda = device.startswith("cuda")

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        state = timed.setup()
        if cuda:
            torch.cuda.synchronize()
        return (state,), {}

    def call(state: Any) -> None:
        timed.call(state)
        if cuda:
            torch.cuda.synchronize()

    shortest = math.inf
    for _ in range(5):  # the first call compiles
        arguments, _ = setup()
        started = time.perf_counter()
        call(*arguments)
        shortest = min(shortest, time.perf_counter() - started)
    rounds = int(min(max(SECONDS / shortest, 10), 5000))
    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=rounds // 10)


def _table() -> list[Any]:
    rows = []
    for case in op_cases():
        names = [*baselines.functions(case), "compile"]
        for which in case.passes:
            for name in names:
                rows.append(pytest.param(case, which, name, id=f"{case} {which} {name}"))
    return rows


@pytest.mark.parametrize("case, which, name", _table())
def test_speed(benchmark: Any, device: str, case: Case, which: str, name: str) -> None:
    benchmark.group = f"{case} {which}"
    functions = baselines.functions(case)
    inputs = case.inputs(device)
    upstream = case.upstream(inputs)
    if name == "compile":
        # Always of the same one, unlike the command's: stored runs have to be comparable.
        torch._dynamo.reset()
        plain = functions.get("functional", functions["eager"])
        implementation: Torch = Compiled(plain, inputs, upstream)
    else:
        implementation = Torch(functions[name], inputs, upstream)
    problem = check.wrong(case, inputs, upstream, *implementation.results())
    assert problem is None, problem
    timed = implementation.timed(which)
    assert timed is not None
    _measure(benchmark, timed, device)


LARGE = [c for c in op_cases() if BOTH in c.passes and c.pixels + c.latents >= FLOOR]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_floor(benchmark: Any, device: str, case: Case) -> None:
    """The least bytes of both passes at the speed of copy_, which reads half of them and writes half."""
    benchmark.group = f"{case} {BOTH}"
    source = torch.ones(case.least_bytes(BOTH) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _measure(benchmark, Timed(lambda _: target.copy_(source)), device)
