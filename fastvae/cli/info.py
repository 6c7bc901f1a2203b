"""``fastvae info``: what this fastvae is, how it was built, and what it runs on."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

import fastvae
from fastvae._ops import build_info, cpu_capability


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "info",
        help="version, build and machine, as a bug report needs them",
        description="Print the version, how the extension was built, and what it runs on.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    parser.set_defaults(run=run)


def info() -> dict[str, dict[str, str]]:
    """What `fastvae info` prints: sections of names and values."""
    build = dict(build_info())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    now = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu kernels": cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda or "none: this torch was built for the CPU alone",
        "cuda devices": ", ".join(gpus) or "none",
    }
    return {
        "fastvae": {"version": fastvae.__version__, "commit": build.pop("commit")},
        "built with": {name.replace("_", " "): value or "none" for name, value in build.items()},
        "running on": now,
    }


def run(args: argparse.Namespace) -> int:
    sections = info()
    for title, entries in sections.items():
        print(title)
        for name, value in entries.items():
            print(f"  {name:<13} {value}")
    if args.json:
        args.json.write_text(json.dumps(sections, indent=1) + "\n")
    return 0
