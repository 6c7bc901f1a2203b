"""``make gpu`` without a GPU: every stage reports what is wrong, keeps what it found, and takes up where it stopped."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import gpu
import pytest

from fastvae.bench import cases
from fastvae.bench import run as bench

TESTS = """
import os, time, torch
from pathlib import Path
def test_good(): pass
def test_bad(): assert 6 * 7 == 41
def test_dies(): os.abort()
def test_loses_the_device():
    print("blocking:", os.environ.get("CUDA_LAUNCH_BLOCKING"))
    def raises(): raise RuntimeError("an illegal address")
    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, raises
    raises()
def test_after(): pass
def test_slow(): assert Path(__file__).with_name("quick").exists() or time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> gpu.Runner:
    (tmp_path / "test_tiny.py").write_text(TESTS)
    for folder in ("ROOT", "STATE", "BINARIES"):
        monkeypatch.setattr(gpu, folder, tmp_path)
    (tmp_path / "out").mkdir()
    run = gpu.Runner(tmp_path / "out", time.monotonic() + 100, "cpu")
    run.pytest = (sys.executable, "-m", "pytest", "-q", f"--rootdir={tmp_path}", "-c/dev/null")
    monkeypatch.setenv(gpu.STAGE, "")
    run.enter("tiny")
    return run


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_lost_process_is_named_and_the_rest_goes_on(run, workers, tmp_path):
    (tmp_path / "quick").touch()
    ok, summary, details = run.watched(*run.pytest, *gpu.PLUGIN, *workers, "test_tiny.py")
    text = "\n".join(details)
    assert not ok and summary.startswith("1 begun, 2 failed, 3 passed")
    assert "test_bad: " in text and "assert (6 * 7) == 41" in text
    assert "test_dies: its process ended" in text
    assert "test_loses_the_device: the device is lost: an illegal address" in text
    assert "blocking: 1" in run.log.read_text()  # it was run once more to learn the launch


def test_what_is_stopped_keeps_what_it_found_and_goes_on_in_the_next_call(run, tmp_path):
    command = (*run.pytest, *gpu.PLUGIN, "test_tiny.py", "-k", "good or slow")
    run.until = time.monotonic() + 10
    ok, summary, _ = run.watched(*command)
    assert (ok, summary) == (False, "1 begun, 1 passed; stopped as its time was up")
    (tmp_path / "quick").touch()
    run.until = run.deadline
    begin = run.log.stat().st_size
    assert run.watched(*command) == (True, "2 passed", [])
    assert "1 passed" in run.log.read_text()[begin:]  # the other one only


def test_a_sanitizer_that_finds_something(run, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho ========= Invalid __global__ write\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ok, _, details = gpu.STAGES["memcheck"][1](run)
    assert not ok and details == ["========= Invalid __global__ write"]


def test_a_figure_that_fails_leaves_the_others(run, monkeypatch, tmp_path):
    broken = cases.FUNCTIONS["kl_normal"] | {"fastvae": None}
    monkeypatch.setitem(cases.FUNCTIONS, "kl_normal", broken)
    monkeypatch.setattr(bench.Device, "copy_bandwidth", lambda device: 1e9)
    (tmp_path / "done.json").write_text("[]")
    gpu.figures("cpu")
    outcomes = [entry["outcome"] for entry in run.found().values()]
    assert outcomes.count("failed") == 8 and outcomes.count("passed") == 33


def main(monkeypatch, out: Path, *options: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(out), *options])
    return gpu.main(), (out / "report.md").read_text()


def test_a_build_that_fails_ends_the_call_and_a_binary_is_taken(run, tmp_path, monkeypatch):
    status, report = main(monkeypatch, tmp_path)
    assert (
        status == 1 and "build: FAILED" in report and "setup.py" in report and "smoke" not in report
    )
    (tmp_path / "fastvae").mkdir()
    (tmp_path / gpu.binary("")).write_text("a library")
    assert "the carried binary" in main(monkeypatch, tmp_path)[1]
    assert (tmp_path / "fastvae" / "_C.abi3.so").read_text() == "a library"


def test_what_has_passed_with_these_sources_is_not_run_again(run, tmp_path, monkeypatch):
    ran, broken = [], ["still"]
    smoke = (60, lambda run: (ran.append("smoke") or not broken, "", []))
    cuda = (60, lambda run: (ran.append("cuda") or True, "", []))
    monkeypatch.setattr(gpu, "STAGES", {"smoke": smoke, "cuda": cuda})
    assert main(monkeypatch, tmp_path, "--minutes", "0.1")[0] == 1 and not ran  # no time
    assert main(monkeypatch, tmp_path)[0] == 1
    broken.clear()
    assert main(monkeypatch, tmp_path)[0] == 0 and ran == ["smoke", "cuda", "smoke"]
    monkeypatch.setattr(gpu, "fingerprint", lambda *patterns: "others")
    assert main(monkeypatch, tmp_path)[0] == 0 and ran[3:] == ["smoke", "cuda"]
