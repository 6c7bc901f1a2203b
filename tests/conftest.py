"""Options, markers and the device that tests run on."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

# Its cache of traced programs knows our ops by name alone, and would go on with how they were composed before a change.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("accuracy")

# How many tests do not run, by the reason. Of each a line "skipped" would fill the screen.
LEFT_OUT = pytest.StashKey[dict[str, int]]()

# The same examples in every run, so that a failure belongs to the change that it appears with.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=150)
settings.register_profile("slow", deadline=None, derandomize=True, max_examples=2000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--device", default="cpu", help="where all tests run: cpu (default) or cuda")


# About the CPU's kernels, or about programs that are started on it.
CPU_ALONE = {
    "test_bench",
    "test_cli",
    "test_demo",
    "test_determinism",
    "test_devices",
    "test_distributed",
    "test_docs",
    "test_elementary",
    "test_examples",
    "test_gpu",
    "test_onnx",
    "test_likelihoods",
    "test_oracle",
    "test_recipes",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long; run with --slow")
    config.addinivalue_line("markers", "cuda: needs a CUDA device and fastvae built with CUDA")
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))
    settings.load_profile("slow" if config.getoption("--slow") else "quick")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The workers are the parallelism; tests about threads set their own number.
        torch.set_num_threads(1)


def no_cuda() -> str | None:
    """Why tests on a CUDA device cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    import fastvae._ops

    if fastvae._ops.build_info()["cuda"].startswith("not built"):
        return "fastvae was built without CUDA"
    return None


def is_of_the_cpu(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return item.path.stem in CPU_ALONE or parameters.get("device") == "cpu"


@pytest.hookimpl(trylast=True)  # after -k and -m: only what was asked for is counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = no_cuda()
    if config.getoption("--device") != "cpu":
        if reason:
            raise pytest.UsageError(f"--device {config.getoption('--device')}: {reason}")
        items[:] = [item for item in items if not is_of_the_cpu(item)]
    markers = {"cuda": f"they wait for a GPU ({reason})"} if reason else {}
    if not config.getoption("--slow"):
        markers["slow"] = "slow (--slow runs them)"
    kept, left_out = [], Counter[str]()
    for item in items:
        marker = next((name for name in markers if item.get_closest_marker(name)), None)
        if marker is None:
            kept.append(item)
        else:
            left_out[markers[marker]] += 1
    items[:] = kept
    config.stash[LEFT_OUT] = left_out
    if hasattr(config, "workeroutput"):  # of xdist
        config.workeroutput["left_out"] = dict(left_out)


@pytest.hookimpl(optionalhook=True)  # xdist's; every worker counts the same
def pytest_testnodedown(node: Any) -> None:
    if hasattr(node, "workeroutput"):  # it ended by itself
        node.config.stash[LEFT_OUT] = node.workeroutput["left_out"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for reason, count in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"{count} tests not run: {reason}")


# The tests of an op's results name both devices; all the others run where --device says.
@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
