"""The same inputs give the same bits: run after run, for any number of threads and any instruction set of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fingerprint import by_threads

import fastvae  # noqa: F401

# torch obeys ATEN_CPU_CAPABILITY without asking the CPU, and then meets instructions that are not there.
CAPABILITIES = ["default", "avx2", "avx512"]
BEST = torch.backends.cpu.get_cpu_capability().lower()
AVAILABLE = CAPABILITIES[: CAPABILITIES.index(BEST) + 1] if BEST in CAPABILITIES else ["default"]


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return by_threads([1])["1"]


def differences(a: dict[str, str], b: dict[str, str]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if a[key] != b[key]]


def test_run_after_run(here):
    assert differences(by_threads([1])["1"], here) == []


def test_different_cases_have_different_digests(here):
    """Else the digest would be of something that all of them share."""
    assert len(set(here.values())) > 0.9 * len(here)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads, here):
    assert differences(by_threads([threads])[str(threads)], here) == []


@pytest.mark.parametrize("capability", AVAILABLE)
def test_instruction_sets(capability, here):
    script = Path(__file__).with_name("fingerprint.py")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(
        [sys.executable, str(script), "1", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for threads, digests in json.loads(run.stdout).items():
        assert differences(digests, here) == [], f"with {threads} threads"
