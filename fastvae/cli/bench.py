"""``fastvae bench``: how fast fastvae is on the user's own machine, beside what it replaces."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import fastvae

__all__ = ["add_parser", "run"]

# The bench extra, as pip calls it.
EXTRA = ("matplotlib", "pandas", "tabulate", "py-cpuinfo")
QUICK_SECONDS = 0.1  # for a pass

DESCRIPTION = """\
Time every op and whole training steps beside the plain PyTorch expression, torch.nn.functional, torch.distributions, torch.compile of
the fastest of them and JAX (where it is installed), on the same inputs and in turns. Every result is first checked against float64;
what is wrong is not timed, and the exit status is 1. benchmarks/README.md in the repository has the method.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench", help="time fastvae beside what it replaces", description=DESCRIPTION
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--quick", action="store_true", help="a few rows, in less than a minute")
    add("--ops", nargs="+", metavar="OP", help="functions of fastvae, steps (default: all)")
    limit = "for everything: rows get shorter, then the last are dropped, and the output says so"
    add("--seconds", type=float, metavar="S", help=limit)
    add("--json", type=Path, metavar="FILE", help="write machine and rows")
    folder = "write all: results.json, results.csv, pictures, a page"
    add("--results", type=Path, metavar="DIR", help=folder)
    parser.set_defaults(run=run)


def _fail(message: str, status: int = 1) -> int:
    print(f"fastvae bench: {message}", file=sys.stderr)
    return status


def run(args: argparse.Namespace) -> int:
    try:
        import tabulate  # noqa: F401

        from fastvae.bench import report
        from fastvae.bench import run as bench
    except ModuleNotFoundError as error:
        return _fail(f"needs {error.name}: pip install {' '.join(EXTRA)}")
    if unknown := set(args.ops or ()) - set(bench.OPS):
        return _fail(f"--ops takes {', '.join(bench.OPS)}, but got {', '.join(unknown)}", 2)
    try:
        device = bench.Device(args.device)
        probe = torch.zeros(1, 1, device=device.torch_device)
        fastvae.kl_normal(probe, probe)
        for folder in (args.results, args.json and args.json.parent):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        return _fail(f"cannot run on {args.device!r}: {error}", 2)
    entries = bench.plan(device, args.quick, args.ops or bench.OPS)
    row_seconds = QUICK_SECONDS if args.quick else bench.SECONDS
    result = bench.run(device, entries, row_seconds, args.seconds)
    found = report.report(result, args.words)
    print("\n\n".join([*report.sections(found, every=True), "\n".join(report.notes(found))]))
    if not found["rows"]:
        return _fail("nothing was timed; see above")
    if args.json:
        report.write_json(args.json, found)
    if args.results:
        report.write_json(args.results / "results.json", found)
        report.write_folder(args.results, found)
    wrong = sum(item["wrong"] for item in result.left_out)
    return _fail(f"{wrong} results are wrong; see above") if wrong else 0
