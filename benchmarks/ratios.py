"""How much faster than PyTorch, in one interleaved run: ``python benchmarks/ratios.py``.

Every implementation of a row is called in turn, round after round, so that whatever else the
machine does meets all of them alike; a ratio is that of the medians. Gradients are freed between
calls, outside what is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import cpuinfo
import torch
from cases import (
    BOTH,
    DTYPES,
    FORWARD,
    LATENT_SIZES,
    NOISE_SIZE,
    VAE_SIZES,
    Case,
    Copy,
    Step,
    implementations,
)

import fastvae
from fastvae._ops import build_info, cpu_capability


class Row(NamedTuple):
    """A case with the least speed-ups aimed at, and the most of the floor (float32, CPU)."""

    case: Case
    eager: float | None = None
    compile: float | None = None
    floor: float | None = None


def table(dtype: torch.dtype) -> list[Row]:
    tiny, mnist, small, large = (Case("vae_loss", *size, dtype) for size in VAE_SIZES)
    rows = [
        Row(tiny, 2.8, 2.0),
        Row(mnist, 2.8, 2.0),
        Row(small, 3.2, 2.5),
        Row(large, 3.0, 2.0, floor=1.3),
    ]
    for op, least in (("reparameterize", 1.8), ("sample_and_kl", 2.5)):
        for batch, latent in LATENT_SIZES:
            case = Case(op, batch, latent=latent, dtype=dtype)
            rows.append(Row(case, least if batch == 128 else 4.0))
    batch, latent = NOISE_SIZE
    return [*rows, Row(Case("noise", batch, latent=latent, dtype=dtype), 4.0)]


def interleave(steps: Mapping[str, Step | Copy], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, from rounds that call all of them in turn."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():
        for _ in range(3):  # compiles, faults pages in, settles the allocator
            step()
            step.clear()
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 7 or time.perf_counter() < deadline:
        first = rounds % len(names)  # no one always runs after the same other
        for name in names[first:] + names[:first]:
            step = steps[name]
            step.clear()
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
            step.clear()
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def measure(row: Row, seconds: float, compiled: bool, device: str) -> dict[str, float]:
    case = row.case
    which = FORWARD if case.op == "noise" else BOTH
    names = [name for name in implementations(case.op) if compiled or name != "compile"]
    steps: dict[str, Step | Copy] = {name: Step(case, name, which, device) for name in names}
    if case.elements >= 1 << 18:  # a smaller copy measures the call, not the memory
        steps["copy"] = Copy(3 * case.elements * case.dtype.itemsize // 4, device)
    return interleave(steps, seconds)


LINE = "{:<42} {:>10} {:>10} {:>15} {:>15} {:>15} {:>15}"


def _ratio(times: dict[str, float], name: str, target: float | None) -> str:
    if name not in times:
        return ""
    ratio = times[name] / times["fastvae"]
    return f"{ratio:.2f}x" + (f" (>= {target:g})" if target else "")


def _floor(times: dict[str, float], target: float | None) -> str:
    if "copy" not in times:
        return ""
    return f"{times['fastvae'] / times['copy']:.2f}" + (f" (<= {target:g})" if target else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time fastvae against plain and compiled PyTorch, forward and backward, "
        "interleaved; in brackets what is aimed at on 2 cores with AVX-512 in float32."
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row (default: 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    parser.add_argument(
        "--dtype", default="float32", choices=[str(d).removeprefix("torch.") for d in DTYPES]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="for PyTorch (default: its own choice)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(
        f"fastvae {fastvae.__version__}, torch {torch.__version__}, {args.device}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n"
    )
    print(LINE.format("", "fastvae ms", "eager ms", "eager", "functional", "compile", "of copy_"))
    results = {}
    for row in table(getattr(torch, args.dtype)):
        name = str(row.case)
        if args.only not in name:
            continue
        times = measure(row, args.seconds, not args.no_compile, args.device)
        results[name] = times
        target = row if args.dtype == "float32" and args.device == "cpu" else Row(row.case)
        print(
            LINE.format(
                name,
                f"{times['fastvae'] * 1e3:.4g}",
                f"{times['eager'] * 1e3:.4g}",
                _ratio(times, "eager", target.eager),
                _ratio(times, "functional", None),
                _ratio(times, "compile", target.compile),
                _floor(times, target.floor),
            ),
            flush=True,
        )
    if args.json:
        about = {
            "torch": torch.__version__,
            "fastvae": fastvae.__version__,
            "commit": build_info()["commit"],
            "device": args.device,
            "threads": torch.get_num_threads(),
            "cpu": cpuinfo.get_cpu_info().get("brand_raw", "unknown"),
            "instruction_set": cpu_capability(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(["python", *sys.argv]),
        }
        args.json.write_text(json.dumps({"machine": about, "seconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
