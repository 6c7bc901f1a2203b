"""What a machine with a GPU has to show, the most telling first: ``make gpu OUT=folder STAGES="build smoke"``.

    build      the library: the one that ``make gpu-binary`` made if it fits, else compiled here
    smoke      every op, dtype and way through memory once, each launch waited for (test_smoke.py)
    figures    microseconds and GB/s of the ops, from CUDA graphs, beside the bandwidth of a copy
    memcheck   compute-sanitizer on the smoke tests
    cuda       what only CUDA has: test_cuda.py, the slow tests too
    tests      all others, with --device cuda
    initcheck, racecheck   compute-sanitizer's other tools, as memcheck

It needs the Python it runs with (a CUDA torch, pytest, xdist), no network and no git; to compile, ninja and nvcc too. What is
found is written at once: report.md (after each stage), found.jsonl (each test as it begins and ends, each figure: it is a plugin
of pytest, too) and log.txt. A test after which the device is lost ends its process; the others go on in a new one. The next call
does what has not passed with these sources, which build/gpu remembers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "gpu"  # what earlier calls found
BINARIES = ROOT / "build" / "gpu-binary"
COMPILED = ("csrc/**/*", "setup.py")
STAGE = "FASTVAE_GPU_STAGE"  # tells the processes of a stage where to write, and what to leave out
PLUGIN = ("-p", "gpu")
FIGURES = "import gpu; gpu.figures({!r})"
LOST = "the device is lost: "
Outcome = tuple[bool, str, list[str]]  # of a stage: passed, a summary, details
Stage = Callable[["Runner"], Outcome]
SANITIZED = 9  # compute-sanitizer's exit status if it found something


def fingerprint(*patterns: str) -> str:
    digest = hashlib.sha256()
    files = {file for pattern in patterns for file in ROOT.glob(pattern) if file.is_file()}
    for file in sorted(file for file in files if file.suffix != ".pyc"):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def binary(architecture: str) -> str:
    """The name of a library that was built from these sources, for this torch."""
    return f"{fingerprint(*COMPILED)}-torch{torch.__version__}-sm{architecture}.so"


def told() -> dict[str, Any]:
    return dict(json.loads(os.environ[STAGE]))


def record(name: str, outcome: str, message: str = "") -> None:
    entry = {"name": name, "outcome": outcome, "message": message[-3000:]}
    for file in told()["files"]:
        with open(file, "a") as found:
            found.write(json.dumps(told()["entry"] | entry) + "\n")


def leave_if_lost(name: str) -> None:
    """After some errors no call to the device succeeds, and nothing that the process finds counts."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            record(name, "failed", f"{LOST}{error}")
            os._exit(70)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    done = json.loads(Path(told()["done"]).read_text())
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    record(nodeid, "begun")


def pytest_runtest_logreport(report: Any) -> None:
    if hasattr(report, "node"):  # of a worker, which has written it
        return
    if report.when == "call" or not report.passed:
        record(report.nodeid, report.outcome, report.longreprtext)
    if report.when == "teardown":
        leave_if_lost(report.nodeid)


def pytest_sessionfinish(session: Any) -> None:
    if not hasattr(session.config, "workerinput"):
        record("", "ended")


def figures(on: str) -> None:
    from fastvae.bench.cases import BOTH, FORWARD, Timed, latent, objective
    from fastvae.bench.run import Device

    device, cuda, cases = Device(on), on == "cuda", []
    copy = device.copy_bandwidth()
    record("a copy", "passed", f"{copy / 1e9:.0f} GB/s")
    sizes = [(128, 784), (1 << 16 if cuda else 8, 1 << 10)]
    for (batch, n), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        size = (batch, (n,), (n // 16,))
        cases += [objective(op, size, dtype) for op in ("vae_loss", "reconstruction_loss")]
        latent_ops = ("kl_normal", "reparameterize", "sample_and_kl")
        cases += [latent(op, (batch, n), dtype) for op in latent_ops]
    done, repeats = json.loads(Path(told()["done"]).read_text()), 20 if cuda else 1
    for case, which in itertools.product(cases, (FORWARD, BOTH)):
        if (name := f"{case} {which}") in done:
            continue
        record(name, "begun")
        try:
            made = case.start(device.torch_device)("fastvae")
            if cuda:
                inputs = tuple(made.inputs)
                made.function = torch.cuda.make_graphed_callables(made.function, inputs)
            call = made.timed(which).call
            repeated = Timed(lambda _, call=call: [call(None) for _ in range(repeats)])
            times = [device.time(repeated) / repeats for _ in range(9)]
            rate = case.least_bytes(which) / (median := statistics.median(times[2:]))
            text = f"{median * 1e6:.1f} us, {rate / 1e9:.0f} GB/s, {rate / copy:.0%} of a copy's"
            record(name, "passed", text)
            if cuda:
                torch.cuda.empty_cache()
        except Exception as error:
            leave_if_lost(name)
            record(name, "failed", f"{type(error).__name__}: {error}")
    record("", "ended")


class Runner:
    def __init__(self, out: Path, deadline: float, device: str = "cuda") -> None:
        self.files = [STATE / "found.jsonl", out / "found.jsonl"]
        self.log = out / "log.txt"
        self.log.touch()
        self.deadline = self.until = deadline  # of all, and of the stage that runs
        self.device = device
        self.sources = fingerprint(*COMPILED, "fastvae/**/*.py", "tests/**/*")
        self.pytest = (sys.executable, "-m", "pytest", "-q", "--tb=short", "--device", device)

    def __call__(self, *command: str | Path, **environment: str) -> int | None:
        """The exit status; None if it was stopped since the time was up. What it prints goes into the log at once."""
        with self.log.open("a") as log:
            print("+", *command, file=log, flush=True)
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}",
                }
                | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children can be stopped with it
            )
        try:
            return process.wait(max(self.until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)  # pytest then says what it has
                process.wait(15)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)

    def enter(self, stage: str) -> None:
        self.entry = {"sources": self.sources, "stage": stage}
        told = {"entry": self.entry, "files": self.files, "done": f"{STATE}/done.json"}
        os.environ[STAGE] = json.dumps(told, default=str)

    def tail(self, begin: int, having: str = "") -> list[str]:
        """The last lines of the log, of those after `begin` that have `having` in them."""
        text = self.log.read_bytes()[begin:].decode(errors="replace")
        return [line for line in text.splitlines() if having in line][-40:]

    def found(self) -> dict[str, dict[str, str]]:
        """The last word on each test of the stage; under "" on the stage. What failed in earlier calls is left out."""
        found: dict[str, dict[str, str]] = {}
        for line in self.files[0].read_text().splitlines() if self.files[0].exists() else ():
            entry = json.loads(line)
            if not self.entry.items() <= entry.items():
                continue
            name, outcome = entry["name"], entry["outcome"]
            if outcome == "begun" and not name:
                found = {k: e for k, e in found.items() if e["outcome"] in ("passed", "skipped")}
            elif outcome == "begun" and name in found:
                continue  # the process that hands out the tests says so too
            elif name and name in found and found[name]["outcome"] == "failed":  # once more
                entry = found[name] | {"message": f"{entry['message']}\n{found[name]['message']}"}
            found[name] = entry
        return found

    def watched(self, *command: str | Path, **environment: str) -> Outcome:
        """Runs a command that records what it finds, again for what is left where its process was lost."""
        begin, count = self.log.stat().st_size, -1
        record("", "begun")
        while (found := self.found())[""]["outcome"] == "begun" and len(found) > count:
            count = len(found)
            (STATE / "done.json").write_text(json.dumps(sorted(found)))
            status = self(*command, **environment)
            if status is None:
                break
        found = self.found()
        whole = found.pop("")["outcome"] == "ended" and status is not None
        counts = Counter(entry["outcome"] for entry in found.values())
        bad = [entry for entry in found.values() if entry["outcome"] in ("failed", "begun")]
        stopped = "it broke off" if status is not None else "stopped as its time was up"
        summary = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
        told = [e for e in found.values() if e["outcome"] == "passed" and e["message"]]
        details = [
            f"{e['name']}: {e['message'] or 'its process ended meanwhile'}" for e in told + bad
        ]
        if status == SANITIZED or not whole:
            details += self.tail(begin, "=========" if status == SANITIZED else "")
        for entry in [e for e in bad if e["message"].startswith(LOST) and "::" in e["name"]][:3]:
            begin = self.log.stat().st_size  # with each launch waited for, to learn which it was
            self(*self.pytest, entry["name"], CUDA_LAUNCH_BLOCKING="1")
            details += [f"{entry['name']}, waited for:", *self.tail(begin, "E  ")]
        passed = whole and not bad and status in (0, 5)  # 5: all was done before
        return passed, summary if whole else f"{summary}; {stopped}", details


def build(run: Runner) -> Outcome:
    cuda = run.device == "cuda"
    card = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else ""
    carried, library = BINARIES / binary(card), ROOT / "fastvae" / "_C.abi3.so"
    if carried.exists():
        library.unlink(missing_ok=True)
        shutil.copyfile(carried, library)
    else:
        begin = run.log.stat().st_size
        options = {"FASTVAE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": card} if cuda else {}
        if run(sys.executable, "setup.py", "build_ext", "--inplace", **options) != 0:
            return False, "it does not compile", run.tail(begin, "rror") or run.tail(begin)
    run(sys.executable, "setup.py", "egg_info")  # where the version is read from
    begin = run.log.stat().st_size
    loads = run(sys.executable, "-m", "fastvae", "info") == 0
    what = "the carried binary" if carried.exists() else "compiled here"
    return loads, what + ("" if loads else ", which does not load"), run.tail(begin)


def checked(*options: str, **environment: str) -> Stage:
    return lambda run: run.watched(*run.pytest, *PLUGIN, *options, **environment)


def sanitized(check: str, *options: str) -> Stage:
    def stage(run: Runner) -> Outcome:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return True, "there is no compute-sanitizer here", []
        command = (tool, "--tool", check, *options, "--error-exitcode", str(SANITIZED))
        # Each tensor in an allocation of its own: in the allocator's blocks a wrong address is another tensor's.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return run.watched(*command, *run.pytest, *PLUGIN, "tests/test_smoke.py", **alone)

    return stage


STAGES: dict[str, tuple[int, Stage]] = {  # with a limit in seconds
    "build": (240, build),
    "smoke": (90, checked("tests/test_smoke.py", CUDA_LAUNCH_BLOCKING="1")),
    "figures": (90, lambda run: run.watched(sys.executable, "-c", FIGURES.format(run.device))),
    "memcheck": (150, sanitized("memcheck", "--padding", "64", "--report-api-errors", "no")),
    "cuda": (150, checked("--slow", "tests/test_cuda.py")),
    "tests": (
        540,
        checked("-n", "8", "--dist", "worksteal", "--ignore=tests/test_cuda.py", "tests"),
    ),
    "initcheck": (150, sanitized("initcheck")),
    "racecheck": (150, sanitized("racecheck", "--kernel-name", "kernel_substring=fastvae")),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of: {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="for the report")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (default: 9.5)")
    parser.add_argument("--device", default="cuda", help="cpu tries the stages without a GPU")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: no CUDA device is available to torch here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    STATE.mkdir(parents=True, exist_ok=True)
    run = Runner(args.out.resolve(), time.monotonic() + 60 * args.minutes, args.device)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    report = f"# {gpu}, torch {torch.__version__}, Python {sys.version.split()[0]}, {run.sources}\n"
    failed = False
    for stage in args.stages or STAGES:
        (limit, function), begun = STAGES[stage], time.monotonic()
        run.enter(stage)
        before = run.found().get("", {})
        if before.get("outcome") == "passed" and stage != "build":
            ok, summary, details = True, f"earlier: {before['message']}", []
        elif run.deadline - begun < 20:
            ok, summary, details = False, "not run: no time was left; run it next", []
        else:
            run.until = min(run.deadline, begun + limit)
            ok, summary, details = function(run)
            record("", "passed" if ok else "failed", summary)
        failed |= not ok
        line = f"{stage}: {'passed' if ok else 'FAILED'}, {time.monotonic() - begun:.0f} s"
        print(f"{line}: {summary}", flush=True)
        report += f"\n## {line}: {summary}\n\n{textwrap.indent(chr(10).join(details), '    ')}\n"
        (args.out / "report.md").write_text(report)  # the machine may be gone before the next
        if stage == "build" and not ok:
            break
    print(report)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
