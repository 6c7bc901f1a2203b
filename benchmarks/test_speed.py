"""The pytest-benchmark suite: a group is one case and pass, its implementations side by side.

Cases, baselines and the check are those of ``fastvae bench`` (fastvae/bench), so that both time the same things.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from fastvae.bench.cases import Case, Timed, compiled, op_cases

SECONDS = 0.5  # for each benchmark, as nearly as whole rounds allow


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


ROWS = [
    pytest.param(case, which, name, id=f"{case} {which} {name}")
    for case in op_cases()
    for which in case.passes
    for name in (*case.functions, "compile")
]


@pytest.mark.parametrize("case, which, name", ROWS)
def test_speed(benchmark: Any, device: str, case: Case, which: str, name: str) -> None:
    benchmark.group = f"{case} {which}"
    # Always the same one is compiled, unlike the command's: stored runs have to be comparable.
    torch._dynamo.reset()
    make, plain = case.start(device), "functional" if "functional" in case.functions else "eager"
    implementation = make(plain, compiled) if name == "compile" else make(name)
    problem = case.wrong(implementation)
    assert not problem, problem
    _measure(benchmark, implementation.timed(which), device)
