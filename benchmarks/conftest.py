from __future__ import annotations

from typing import Any

import pytest
import torch

import fastvae
from fastvae._ops import build_info


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the benchmarks run: cpu, cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """A figure without its versions, threads and commit says nothing: stored runs carry them."""
    device = config.getoption("--device")
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["device"] = torch.cuda.get_device_name(device) if "cuda" in device else device
    machine_info["fastvae"] = fastvae.__version__
    machine_info["commit"] = build_info()["commit"]
