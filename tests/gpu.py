"""All that a machine with a GPU has to show, in stages: ``make gpu OUT=folder STAGES="build test"``.

    build     the extension, in place, for this card's architecture
    test      pytest: the tests of CUDA alone, then all the others with --device cuda
    verify    fastvae verify --device cuda
    sanitize  compute-sanitizer (memcheck, racecheck, initcheck) on a short run of every op
    bench     fastvae bench --device cuda

It needs the Python it runs with (a CUDA torch, pytest, ninja, pybind11), nvcc, and no network. Every stage has a time budget
and is stopped when it is spent. A stage that has passed at this commit is not run again, unless --again is given: so a run
that was cut short is taken up where it stopped. The folder gets report.md, report.json, log.txt, and what verify and bench
write: at most six files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "gpu"  # what earlier runs found
BUDGETS = {"build": 240, "test": 240, "verify": 90, "sanitize": 150, "bench": 480}  # seconds
FAILURES_SHOWN = 40


@dataclass
class Outcome:
    stage: str
    ok: bool
    seconds: float
    summary: str
    details: list[str] = field(default_factory=list)
    commit: str = ""


class Runner:
    def __init__(self, out: Path, deadline: float) -> None:
        self.out = out
        self.deadline = deadline
        self.log = out / "log.txt"
        self.until = deadline  # of the stage that runs

    def __call__(self, *command: str | Path, **environment: str) -> tuple[int | None, str]:
        """The exit status (None: stopped when the time was up) and the output, which goes into the log too."""
        print("+", *command, flush=True)
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its children can be stopped with it
        )
        try:
            output, _ = process.communicate(timeout=max(self.until - time.monotonic(), 1))
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            status = None
        with self.log.open("a") as log:
            log.write(f"+ {' '.join(map(str, command))}\n{output[-200_000:]}\n= {status}\n")
        return status, output


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def said(status: int | None) -> str:
    return "stopped when its time was up" if status is None else f"exit status {status}"


def build(run: Runner) -> tuple[bool, str, list[str]]:
    status, output = run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--inplace",
        FASTVAE_CUDA="1",
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", architecture()),
        MAX_JOBS=str(os.cpu_count()),
    )
    if status != 0:
        return False, said(status), output.splitlines()[-30:]
    # The version comes from the metadata of an installed package: an in-place build has none yet.
    if subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; m.version('fastvae')"]
    ).returncode:
        run(sys.executable, "setup.py", "egg_info")
    status, output = run(sys.executable, "-m", "fastvae", "info")
    return status == 0, output.strip() if status == 0 else said(status), []


def read_tests(report: Path) -> tuple[dict[str, int], list[str]]:
    """Numbers of tests by outcome, and the failures' names and last lines."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((c for c in case if c.tag in ("failure", "error")), None)
        outcome = "failed" if bad is not None else "passed"
        if case.find("skipped") is not None:
            outcome = "skipped"
        counts[outcome] += 1
        if bad is not None:
            message = (bad.get("message") or "").strip().splitlines()
            failures.append(
                f"{case.get('classname')}::{case.get('name')}: {' '.join(message)[:400]}"
            )
    return counts, failures


def test(run: Runner) -> tuple[bool, str, list[str]]:
    pytest = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "8",
        "--dist",
        "worksteal",
        "--maxfail=200",
    )
    parts = {
        "what only CUDA has": ("tests/test_cuda.py", "--slow", "-n", "0"),
        "every op on the device": ("tests", "-m", "cuda", "--deselect", "tests/test_cuda.py"),
        "all others there": ("tests", "--device", "cuda", "-m", "not cuda"),
    }
    ok, summary, details = True, [], []
    for name, options in parts.items():
        report = STATE / "junit.xml"
        report.unlink(missing_ok=True)
        status, output = run(*pytest, *options, f"--junitxml={report}")
        ok &= status == 0
        if report.exists():
            counts, failures = read_tests(report)
            summary.append(f"{name}: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
            details += failures
        else:
            summary.append(f"{name}: {said(status)}, no report")
            details += output.splitlines()[-15:]
    return ok, "; ".join(summary), details


def verify(run: Runner) -> tuple[bool, str, list[str]]:
    report = run.out / "verify.json"
    status, output = run(
        sys.executable, "-m", "fastvae", "verify", "--device", "cuda", "--json", report
    )
    lines = output.strip().splitlines()
    return (
        status == 0,
        lines[-1] if status == 0 else said(status),
        [] if status == 0 else lines[-60:],
    )


def short_run() -> None:
    """Every op, dtype and way through memory once, small: what compute-sanitizer watches."""
    import fastvae
    from fastvae.random import philox_normal

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((5, 7), (3, 2048), (9, 2056)):

            def rows(shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> list[Any]:
                wide = torch.rand(shape[0], 2 * shape[1], device="cuda", dtype=dtype)
                return [t.requires_grad_() for t in wide.detach().chunk(2, 1)]

            for reduction in ("batchmean", "sample"):
                mu, logvar = rows()
                recon_x, x = rows()
                losses = [
                    fastvae.vae_loss(recon_x, x, mu, logvar, reduction=reduction).loss,
                    fastvae.kl_normal(mu, logvar, *rows(), reduction=reduction),
                    *fastvae.sample_and_kl(mu, logvar, reduction=reduction),
                    fastvae.reconstruction_loss(recon_x.t(), x.t(), reduction=reduction),
                ]
                (3 * sum(loss.float().sum() for loss in losses)).backward()
            philox_normal(*shape, seed=1, start=3, device="cuda", dtype=dtype)
    torch.cuda.synchronize()
    print("short run done")


def sanitize(run: Runner) -> tuple[bool, str, list[str]]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return True, "skipped: no compute-sanitizer", []
    ok, summary, details = True, [], []
    for check in ("memcheck", "racecheck", "initcheck"):
        status, output = run(
            tool, "--tool", check, "--kernel-name", "kernel_substring=fastvae", "--error-exitcode", "9",
            sys.executable, __file__, "--short-run",
        )  # fmt: skip
        if status not in (0, 9) and "short run done" not in output:
            summary.append(f"{check}: skipped, it cannot attach here ({said(status)})")
            details += output.splitlines()[-5:]
            continue
        ok &= status == 0
        summary.append(f"{check}: {'clean' if status == 0 else said(status)}")
        if status != 0:
            details += [line for line in output.splitlines() if line.startswith("=========")][:60]
    return ok, "; ".join(summary), details


def bench(run: Runner) -> tuple[bool, str, list[str]]:
    seconds = max(30, int(min(BUDGETS["bench"] - 60, run.until - time.monotonic() - 45)))
    status, output = run(
        sys.executable, "-m", "fastvae", "bench", "--device", "cuda", "--seconds", str(seconds),
        "--json", run.out / "results.json", "--csv", run.out / "results.csv",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )  # fmt: skip
    return status == 0, said(status), output.splitlines()[-120:]


STAGES: dict[str, Callable[[Runner], tuple[bool, str, list[str]]]] = {
    "build": build,
    "test": test,
    "verify": verify,
    "sanitize": sanitize,
    "bench": bench,
}


def commit() -> str:
    """With the changes that are not committed, as far as git can say."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def machine() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_report(out: Path, about: dict[str, str], outcomes: list[Outcome]) -> None:
    report = {"machine": about, "stages": [asdict(o) for o in outcomes]}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = ["# On a GPU", "", *(f"* {k}: {v}" for k, v in about.items()), ""]
    for o in outcomes:
        lines += [
            f"## {o.stage}: {'passed' if o.ok else 'FAILED'}, {o.seconds:.0f} s",
            "",
            o.summary,
            "",
        ]
        if o.details:
            lines += ["```", *o.details[:FAILURES_SHOWN], "```", ""]
    (out / "report.md").write_text("\n".join(lines))


def earlier(stage: str) -> Outcome | None:
    file = STATE / f"{stage}.json"
    return Outcome(**json.loads(file.read_text())) if file.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of: {', '.join(STAGES)}")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="where the report goes"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    parser.add_argument("--again", action="store_true", help="also what has passed at this commit")
    parser.add_argument("--short-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        print("make gpu: no CUDA device is available to torch here", file=sys.stderr)
        return 2
    if args.short_run:
        short_run()
        return 0

    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    STATE.mkdir(parents=True, exist_ok=True)
    run = Runner(args.out.resolve(), started + 60 * args.minutes)
    about = machine()
    print(json.dumps(about))
    outcomes = []
    for stage in args.stages or list(STAGES):
        before = earlier(stage)
        if (
            before
            and before.ok
            and before.commit == about["commit"]
            and not args.again
            and stage != "build"
        ):
            outcomes.append(before)
            continue
        begun = time.monotonic()
        if run.deadline - begun < 20:
            outcomes.append(Outcome(stage, False, 0, "not run: no time was left; run it next"))
            continue
        run.until = min(run.deadline, begun + BUDGETS[stage])
        ok, summary, details = STAGES[stage](run)
        outcome = Outcome(stage, ok, time.monotonic() - begun, summary, details, about["commit"])
        (STATE / f"{stage}.json").write_text(json.dumps(asdict(outcome)))
        outcomes.append(outcome)
        write_report(
            run.out, about, outcomes
        )  # after each: the machine may be gone before the next
        print(
            f"{stage}: {'passed' if ok else 'FAILED'} in {outcome.seconds:.0f} s: {summary}",
            flush=True,
        )
        if stage == "build" and not ok:
            break
    write_report(run.out, about, outcomes)
    print((run.out / "report.md").read_text())
    return 0 if all(o.ok for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
