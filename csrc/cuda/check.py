"""Looks at what the compiler made of the CUDA kernels; needs no GPU. ``make cuda-build`` runs it.

It fails where a kernel spills registers or keeps an array in memory, where a kernel that streams has no 16-byte loads and
stores in its machine code, where an architecture that was asked for is missing, and where an op has no CUDA kernel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fastvae._ops import LIBRARY, build_info

# Loads and stores of 16 bytes, in the machine code of every architecture.
LOAD, STORE = re.compile(r"\bLDG\.E\.128"), re.compile(r"\bSTG\.E\.128")


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def dump(*options: str) -> str:
    command = [cuobjdump(), *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_kernel(text: str, header: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, what is said of it)."""
    arch = "?"
    for part in re.split(r"(?m)^(?=Fatbin elf code|\s*" + header + ")", text):
        if found := re.search(r"^arch = (\S+)", part, re.MULTILINE):
            arch = found[1]
        if found := re.match(r"\s*" + header + r"\s*:?\s*([^\s:]+)", part):
            yield arch, found[1], part


def main() -> int:
    problems = []
    info = build_info()
    print(f"CUDA {info['cuda']} for {info['cuda_archs']}, torch {torch.__version__}")

    usage = list(by_kernel(dump("--dump-resource-usage"), "Function"))
    kernels = [(a, n, p) for a, n, p in usage if "_kernel" in n]
    architectures = sorted({arch for arch, _, _ in kernels})
    wanted = [
        f"sm_{a.replace('.', '').removesuffix('+PTX')}" for a in info["cuda_archs"].split(";")
    ]
    if missing := set(wanted) - set(architectures):
        problems.append(f"no kernels for {', '.join(sorted(missing))}")
    most: dict[str, int] = {}
    for arch, name, text in kernels:
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        most[arch] = max(most.get(arch, 0), numbers["REG"])
        if numbers["STACK"] or numbers["LOCAL"]:
            problems.append(f"{arch}: {name} has registers or arrays in memory: {numbers}")
    for arch in architectures:
        count = sum(a == arch for a, _, _ in kernels)
        print(f"{arch}: {count} kernels, at most {most[arch]} registers")

    vectors = 0
    for arch, name, text in by_kernel(dump("--dump-sass"), "Function"):
        # Packs of 16 bytes; those of four or eight elements of any dtype have them in one of their branches.
        if not re.search(r"4RowsI[fd]Li[248]E|scale_kernel|normal_kernel", name):
            continue
        vectors += 1
        if not STORE.search(text) or not (LOAD.search(text) or "normal_kernel" in name):
            problems.append(f"{arch}: {name} has no 16-byte loads and stores")
    print(f"{vectors} kernels that stream were searched for 16-byte accesses")
    if vectors == 0:
        problems.append("no streaming kernel was found")

    ops = sorted(
        {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastvae::")}
    )
    ops.remove("fastvae::elementary")  # the CPU's functions by themselves, for tests
    for op in ops:  # by itself, or as one function for all devices
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, "CUDA"):
            problems.append(f"{op} has no CUDA kernel")
    print(f"{len(ops)} ops are registered for CUDA")

    print(*(problems or ["no spills, 16-byte accesses, every op registered"]), sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
