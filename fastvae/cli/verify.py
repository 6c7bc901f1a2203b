"""``fastvae verify``: hold every op against the truth, on the user's own machine."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import fastvae
from fastvae.cli._checks import (
    ACTIVATION_LIMIT,
    MEANING,
    OPS,
    SUM_LIMIT,
    VALUE_LIMIT,
    Check,
    checks,
)

DESCRIPTION = """\
Compare every op, dtype, reduction, likelihood, weight and prior, values and gradients, with
fastvae.reference evaluated in float64 on this machine, and check the other promises: a KL that is
right near the prior, NaN and infinity, equal bits for equal inputs, the noise. Exits with 1 if one
is broken.
"""

HEADER = """\
fastvae {version} on {device}, torch {torch}, against fastvae.reference in float64
(float64 itself: the KL, the samples, "mse" and "gaussian" against the same formulas in 40-digit decimals).

Errors are in units of rounding of the result's dtype: the spacing of its numbers at the size of the
result, or of its largest term where terms cancel. A correctly rounded result is off by 0.5 at most.
  error    the largest of fastvae's
  PyTorch  the reference's own, in the same dtype
  limit    {value:g} ({sums:g} for a sum, {act:g} for a gradient through an activation),
           or twice PyTorch's if more; for 16-bit inputs its error in float32
A line stands for several checks and shows the one that comes closest to its limit.
"""

PROMISES_HEADER = """\

Further promises, each in its own unit:
"""

ROUNDING = "{:<20} {:<9} {:<9} {:>6}  {:>8} {:>8} {:>8}  {:<7} {}"
PROMISE = "{:<17} {:<20} {:<22} {:>6}  {:>8} {:>8}  {:<7} {}"
LISTED = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "verify", help="compare every op with a float64 reference", description=DESCRIPTION
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


def _groups(
    found: Iterable[Check], key: Callable[[Check], tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], list[Check], Check]]:
    """Each group's key, checks and worst check."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for check in found:
        groups.setdefault(key(check), []).append(check)
    for name, group in groups.items():
        yield name, group, max(group, key=lambda check: check.strain)


def _verdict(group: Iterable[Check]) -> str:
    return "ok" if all(check.ok for check in group) else "BROKEN"


def _print_rounding(found: Iterable[Check]) -> None:
    def key(check: Check) -> tuple[str, ...]:
        return check.op, "mixed" if "/" in check.dtype else check.dtype, check.result

    titles = ("op", "dtype", "result", "checks", "error", "PyTorch", "limit", "", "in")
    print(ROUNDING.format(*titles))
    for (op, dtype, result), group, worst in _groups(found, key):
        case = f"{worst.case}, {worst.dtype}" if dtype == "mixed" else worst.case
        numbers = map(_number, (worst.error, worst.torch_error, worst.limit))
        print(ROUNDING.format(op, dtype, result, len(group), *numbers, _verdict(group), case))


def _print_promises(found: Iterable[Check]) -> None:
    def key(check: Check) -> tuple[str, ...]:
        op = check.op if check.limit else ""  # where nothing may differ, one line for all ops
        return check.contract, op, check.result or check.case, f"{check.limit} {check.unit}"

    titles = ("promise", "op", "case", "checks", "found", "limit", "", "unit")
    print(PROMISE.format(*titles))
    in_order = sorted(found, key=lambda check: list(MEANING).index(check.contract))
    for (promise, op, case, _), group, worst in _groups(in_order, key):
        numbers = map(_number, (worst.error, worst.limit))
        print(PROMISE.format(promise, op, case, len(group), *numbers, _verdict(group), worst.unit))


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
    print(
        HEADER.format(
            version=fastvae.__version__,
            device=device,
            torch=torch.__version__,
            value=VALUE_LIMIT,
            sums=SUM_LIMIT,
            act=ACTIVATION_LIMIT,
        )
    )
    started = time.perf_counter()
    found = list(checks(args.ops, args.quick, device))
    rounding = [check for check in found if check.contract == "rounding"]
    if rounding:
        _print_rounding(rounding)
    print(PROMISES_HEADER)
    _print_promises(check for check in found if check.contract != "rounding")
    if args.json:
        _write_json(args.json, device, found)
    broken = [check for check in found if not check.ok]
    if broken:
        _print_broken(broken)
        return 1
    print(f"\nAll {len(found)} checks hold ({time.perf_counter() - started:.1f} s).")
    return 0
