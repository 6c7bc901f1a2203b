"""``fastvae bench``: how fast fastvae is on the user's own machine, beside what it replaces."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastvae
from fastvae.bench.cases import OPS

__all__ = ["add_parser", "run"]

# The bench extra: modules, and what pip calls them.
EXTRA = {"rich": "rich", "matplotlib": "matplotlib", "cpuinfo": "py-cpuinfo"}
QUICK_SECONDS = 0.1  # for a pass
WIDTH = 220  # of the tables where the output is not a terminal

DESCRIPTION = """\
Time every op beside the plain PyTorch expression, torch.nn.functional, torch.distributions, torch.compile of the fastest
of them and JAX (where it is installed), on the same inputs and in turns. Every result is first checked against float64;
what is wrong is not timed, and the exit status is 1. benchmarks/README.md in the repository has the method.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench", help="time fastvae beside what it replaces", description=DESCRIPTION
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--quick", action="store_true", help="a few rows, in less than a minute")
    add("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=f"of: {', '.join(OPS)}")
    add(
        "--seconds",
        type=_positive,
        metavar="S",
        help="for everything: rows get shorter, then the last and largest are dropped, and the output says so",
    )
    add("--threads", type=int, metavar="N", help="of the CPU (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="write machine and rows")
    add("--csv", type=Path, metavar="FILE", help="write the rows")
    add("--plots", type=Path, metavar="DIR", help="write the pictures")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="write all: results.json, results.csv, pictures, a page",
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"needs a number above 0, got {text}")
    return value


def _fail(message: str, status: int = 1) -> int:
    print(f"fastvae bench: {message}", file=sys.stderr)
    return status


def _command(args: argparse.Namespace) -> list[str]:
    """The command as given, from the arguments: what a published figure is made again with."""
    words = ["bench", "--device", args.device]
    words += ["--quick"] if args.quick else []
    words += ["--ops", *args.ops] if tuple(args.ops) != OPS else []
    for name in ("seconds", "threads", "json", "csv", "plots", "results"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def run(args: argparse.Namespace) -> int:
    try:
        import cpuinfo  # noqa: F401
        from rich.console import Console

        from fastvae.bench import devices, plots, report
        from fastvae.bench import run as bench
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA:
            raise
        return _fail(f"needs {EXTRA[module]}: pip install {' '.join(EXTRA.values())}")
    try:
        device = devices.of(args.device)
        probe = torch.zeros(1, 1, device=device.torch_device)
        fastvae.kl_normal(probe, probe)
        folders = [args.plots, args.results]
        folders += [path.parent for path in (args.json, args.csv) if path]
        for folder in filter(None, folders):
            folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        return _fail(f"cannot run on {args.device!r}: {error}", 2)
    if args.threads:
        torch.set_num_threads(args.threads)

    row_seconds = QUICK_SECONDS if args.quick else bench.SECONDS
    entries = bench.plan(device, args.quick, args.ops)
    entries, dropped = bench.that_fit(entries, device)
    estimate = bench.estimate(entries, device, row_seconds)
    limit = f", of which {_minutes(args.seconds)} are allowed" if args.seconds else ""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    where = device.gpu or f"the CPU, {torch.get_num_threads()} threads"
    console.print(
        f"fastvae {fastvae.__version__} on {where}, torch {torch.__version__}: "
        f"{sum(e.timings for e in entries)} timings of {len(entries)} cases, about {_minutes(estimate)}{limit}",
        highlight=False,
    )
    started = time.perf_counter()
    result = _run(bench, device, entries, row_seconds, args.seconds)
    result.left_out[:0] = dropped
    if reason := bench.why_no_jax(device):
        result.left_out.insert(0, bench.LeftOut("all", "jax", reason))

    found = report.report(device, result, _command(args))
    report.print_tables(console, found)
    console.print(f"It took {_minutes(time.perf_counter() - started)}.", highlight=False)
    try:
        if args.json:
            report.write_json(args.json, found)
        if args.csv:
            report.write_csv(args.csv, found)
        if args.plots:
            plots.draw_all(args.plots, found)
        if args.results:
            report.write_json(args.results / "results.json", found)
            report.write_folder(args.results, found, plots.draw_all)
    except OSError as error:
        return _fail(str(error))
    if result.wrong:
        return _fail(f"{len(result.wrong)} results are wrong; see above")
    return 0


def _run(bench: Any, device: Any, entries: Any, row_seconds: float, seconds: float | None) -> Any:
    """Run with a progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("copy bandwidth", total=None)

        def on_progress(name: str, done: float, total: float) -> None:
            bar.update(task, completed=done, total=total, description=name)

        return bench.run(device, entries, row_seconds, seconds, on_progress)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
