"""The command line: ``fastvae COMMAND`` or ``python -m fastvae COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fastvae
from fastvae.cli import bench, demo, info, verify

COMMANDS = (demo, bench, verify, info)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastvae",
        description="Fused kernels for the objective of variational autoencoders.",
    )
    parser.add_argument("--version", action="version", version=f"fastvae {fastvae.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(words, argparse.Namespace(words=words))
    return int(args.run(args))
