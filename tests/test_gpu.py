"""The stages of ``make gpu``, as far as they can be run without a GPU: budgets, reports, and what is taken up again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gpu
import pytest

ABOUT = {"gpu": "none", "commit": "abc"}


@pytest.fixture
def run(tmp_path: Path) -> gpu.Runner:
    return gpu.Runner(tmp_path, time.monotonic() + 60)


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Two stages that count how often they run; the first fails as long as `broken` holds something."""
    ran, broken = [], []

    def stage(name, fails):
        def execute(run):
            ran.append(name)
            return not (fails and broken), f"{name} ran", []

        return execute

    monkeypatch.setattr(
        gpu, "STAGES", {"test": stage("test", True), "verify": stage("verify", False)}
    )
    monkeypatch.setattr(gpu, "STATE", tmp_path / "state")
    monkeypatch.setattr(gpu, "machine", lambda: ABOUT)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    return ran, broken


def main(monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    return gpu.main()


def test_a_command_is_stopped_when_its_time_is_up(run):
    run.until = time.monotonic() + 1
    started = time.monotonic()
    status, output = run(
        sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"
    )
    assert status is None and "begun" in output and time.monotonic() - started < 20
    assert "begun" in run.log.read_text()


def test_the_exit_status_and_the_environment_of_a_command(run):
    status, output = run(
        sys.executable, "-c", "import os; print(os.environ['GIVEN']); exit(3)", GIVEN="yes"
    )
    assert (status, output.strip()) == (3, "yes")


def test_reading_pytests_report(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='a' name='good'/>"
        "<testcase classname='a' name='bad'><failure message='assert 1 == 2'/></testcase>"
        "<testcase classname='a' name='broken'><error message='no'/></testcase>"
        "<testcase classname='a' name='left'><skipped/></testcase></testsuite></testsuites>"
    )
    counts, failures = gpu.read_tests(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == ["a::bad: assert 1 == 2", "a::broken: no"]


def test_a_stage_that_failed_is_run_again_and_one_that_passed_is_not(tmp_path, monkeypatch, stages):
    ran, broken = stages
    out = tmp_path / "out"
    broken.append("still")
    assert main(monkeypatch, "--out", str(out)) == 1
    assert ran == ["test", "verify"]
    broken.clear()
    assert main(monkeypatch, "--out", str(out)) == 0
    assert ran == ["test", "verify", "test"]
    report = json.loads((out / "report.json").read_text())
    assert [(s["stage"], s["ok"]) for s in report["stages"]] == [("test", True), ("verify", True)]
    assert "test: passed" in (out / "report.md").read_text()
    assert main(monkeypatch, "--out", str(out), "--again", "verify") == 0
    assert ran[3:] == ["verify"]


def test_what_passed_at_another_commit_is_run_again(tmp_path, monkeypatch, stages):
    ran, _ = stages
    main(monkeypatch, "--out", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "machine", lambda: ABOUT | {"commit": "def"})
    main(monkeypatch, "--out", str(tmp_path / "out"))
    assert ran == ["test", "verify"] * 2


def test_without_time_a_stage_is_left_for_the_next_run(tmp_path, monkeypatch, stages):
    ran, _ = stages
    assert main(monkeypatch, "--out", str(tmp_path / "out"), "--minutes", "0.1") == 1
    assert ran == [] and "no time was left" in (tmp_path / "out" / "report.md").read_text()
