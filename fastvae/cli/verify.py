"""``fastvae verify``: hold every op against the truth, on the user's own machine."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import fastvae
from fastvae.verify.accuracy import UNITS, UNITS_OF_A_SUM
from fastvae.verify.checks import MEANING, OPS, Check, checks

DESCRIPTION = """\
Compare every op, dtype, reduction, likelihood, weight and prior, values and gradients, with formulas
in NumPy's extended precision, and check the other promises: a KL that is right near the prior, NaN
and infinity, equal bits for equal inputs, the noise. Exits with 1 if one is broken.
"""

HEADER = f"""\
fastvae {{version}} on {{device}}, torch {{torch}}, against formulas in NumPy's extended precision.

Errors are in units of rounding of the result's dtype: the spacing of its numbers at the true value.
  error    fastvae's, in the element that comes closest to its limit
  PyTorch  the largest error of the plain expression in that tensor (in float32 for 16-bit inputs)
  limit    {UNITS} ({UNITS_OF_A_SUM} for a sum), or twice PyTorch's if more
A line stands for several checks and shows the one that comes closest to its limit.
"""

PROMISES_HEADER = """\

Further promises, each in its own unit:
"""

ROUNDING = "{:<20} {:<9} {:<9} {:>6}  {:>8} {:>8} {:>8}  {:<7} {}"
PROMISE = "{:<17} {:<34} {:<22} {:>6}  {:>8} {:>8}  {:<7} {}"
LISTED = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="compare every op with formulas in extended precision",
        description=DESCRIPTION,
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller inputs: seconds")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=f"of: {', '.join(OPS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single check here")
    parser.set_defaults(run=run)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == 0 or 1 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:.2g}" if 0.01 <= abs(value) < 1 else f"{value:.1e}"


def _print(
    line: str,
    titles: Sequence[str],
    found: Iterable[tuple[Check, tuple[str, ...]]],
    row: Callable[[Check], Sequence[object]],
) -> None:
    """A line for each group of checks, which has a key: the key, how many, the worst one's `row`."""
    print(line.format(*titles))
    groups: dict[tuple[str, ...], list[Check]] = {}
    for check, key in found:
        groups.setdefault(key, []).append(check)
    for key, group in groups.items():
        worst = max(group, key=lambda check: check.strain)
        verdict = "ok" if all(check.ok for check in group) else "BROKEN"
        *numbers, last = row(worst)
        print(line.format(*key[:3], len(group), *map(_number, numbers), verdict, last))  # type: ignore[arg-type]


def _print_broken(broken: Sequence[Check]) -> None:
    print(f"\n{len(broken)} checks failed:")
    for check in sorted(broken, key=lambda check: -check.strain)[:LISTED]:
        found = f"{_number(check.error)} > {_number(check.limit)} {check.unit}"
        print(f"  {check.contract}: {check.op} {check.dtype}, {check.case}: {found}")
    if len(broken) > LISTED:
        print(f"  and {len(broken) - LISTED} more; --json FILE lists them all")
    print("\nWhat that means:")
    for contract in dict.fromkeys(check.contract for check in broken):
        print(f"  {contract}: {MEANING[contract]}.")
    print("Please report this with the output of `fastvae info`.")


def _write_json(path: Path, device: torch.device, found: Sequence[Check]) -> None:
    """JSON has no infinity: such an error is written as a string, "inf" or "nan"."""

    def plain(value: object) -> object:
        finite = not isinstance(value, float) or math.isfinite(value)
        return value if finite else str(value)

    rows = [{k: plain(v) for k, v in asdict(c).items()} | {"ok": c.ok} for c in found]
    report = {
        "fastvae": fastvae.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "ok": all(check.ok for check in found),
        "checks": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def run(args: argparse.Namespace) -> int:
    try:
        probe = torch.zeros(1, 1, device=args.device)
        fastvae.kl_normal(probe, probe)
    except (RuntimeError, AssertionError) as error:  # torch, or fastvae, without that device
        print(f"fastvae verify: cannot run on {args.device!r}: {error}", file=sys.stderr)
        return 2
    device = probe.device
    print(HEADER.format(version=fastvae.__version__, device=device, torch=torch.__version__))
    started = time.perf_counter()
    found = checks(args.ops, args.quick, device)
    rounding = [
        (c, (c.op, "mixed" if "/" in c.dtype else c.dtype, c.result))
        for c in found
        if c.contract == "rounding"
    ]
    titles = ("op", "dtype", "result", "checks", "error", "PyTorch", "limit", "", "in")
    if rounding:
        _print(ROUNDING, titles, rounding, lambda c: (c.error, c.torch_error, c.limit, c.case))
    print(PROMISES_HEADER)
    # Where nothing may differ, one line stands for all ops.
    others = [
        (c, (c.contract, c.op if c.limit else "", c.result or c.case, c.dtype * bool(c.limit)))
        for c in sorted(found, key=lambda c: list(MEANING).index(c.contract))
        if c.contract != "rounding"
    ]
    headings = ("promise", "op", "case", "checks", "found", "limit", "", "unit")
    _print(PROMISE, headings, others, lambda c: (c.error, c.limit, c.unit))
    if args.json:
        _write_json(args.json, device, found)
    broken = [check for check in found if not check.ok]
    if broken:
        _print_broken(broken)
        return 1
    print(f"\nAll {len(found)} checks hold ({time.perf_counter() - started:.1f} s).")
    return 0
