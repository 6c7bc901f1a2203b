"""Looks at what the compiler made of the CUDA kernels; needs no GPU. ``make cuda-build`` runs it.

It fails where a kernel spills registers or keeps an array in memory, where a kernel that streams has no 16-byte loads and
stores in its machine code, where an architecture that was asked for is missing, and where an op has no CUDA kernel.

``check.py --predict table.md`` counts the instructions of the ops' loops, and writes which time they should take. It takes
another library or object file than fastvae's after that.
"""

from __future__ import annotations

import heapq
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastvae._ops import LIBRARY, build_info

# Loads and stores of 16 bytes, in the machine code of every architecture.
LOAD, STORE = re.compile(r"\bLDG\.E\.128"), re.compile(r"\bSTG\.E\.128")
PHILOX = re.compile(r"\bIMAD\.WIDE\.U32 .*-0x(?:2daee0ad|326172a9)")
HEADER = """# What the machine code predicts

Not measured: no line of this comes from a GPU. `python csrc/cuda/check.py --predict benchmarks/predicted-cuda.md` makes it from the
machine code for sm_90: the instructions of a loop, and times of 2^26 elements if nothing but its limit takes time. Issue: 132 multiprocessors
take 4 instructions of a warp in each cycle of 1.7 GHz. Memory: each operand is read or written once, at 3.0 TB/s on an H100 and 4.3 TB/s on
an H200, which are speeds of a large copy. A pack is 4 elements of float32 or 8 of bfloat16.

| op | dtype | registers | blocks of 256 threads a multiprocessor | instructions a pack | 16-byte loads in flight a multiprocessor | issue, us | H100, us | H200, us |
|---|---|---|---|---|---|---|---|---|""".splitlines()


# The predicted passes: the op, parts of its kernel's mangled name, the 16-byte loads and stores of a pack of 4 floats (or 8
# elements of 16 bits), and whether noise is drawn.
ROWS = {"float32": (4, 4, "4RowsIfLi4ELb1E"), "bfloat16": (8, 2, "4RowsIfLi8ELb0E")}
FORWARD, BACKWARD = "LNS0_9DirectionE0E", "LNS0_9DirectionE1E"
PREDICTED = [
    ("reconstruction_loss, forward and gradient", "12SquaredError", FORWARD, "Lb0E", 2, 1, False),
    ("kl_normal, forward and gradients", "10KlStandard", FORWARD, "Lb0E", 2, 2, False),
    ("reparameterize, forward", "6NoLoss", FORWARD, "Lb1E", 2, 1, True),
    ("reparameterize, backward", "6NoLoss", BACKWARD, "Lb1E", 2, 1, True),
    ("sample_and_kl, forward", "10KlStandard", FORWARD, "Lb1E", 2, 1, True),
    ("sample_and_kl, backward", "10KlStandard", BACKWARD, "Lb1E", 3, 2, True),
]
ELEMENTS, THREADS, WARP = 1 << 26, 256, 32
ISSUES = 132 * 4 * 1.7e9  # per second: multiprocessors, schedulers and clock of an H100 and an H200
COPY = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second of a large copy


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def dump(*options: str, file: str | Path = LIBRARY) -> str:
    command = [cuobjdump(), *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_kernel(text: str, header: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, what is said of it)."""
    arch = "?"
    for part in re.split(r"(?m)^(?=Fatbin elf code|\s*" + header + ")", text):
        if found := re.search(r"^arch = (\S+)", part, re.MULTILINE):
            arch = found[1]
        if found := re.match(r"\s*" + header + r"\s*:?\s*([^\s:]+)", part):
            yield arch, found[1], part


class Block(NamedTuple):
    """Instructions that run one after the other, and where it goes from there."""

    size: int
    loads: range  # of 16 bytes; one under a predicate may be skipped
    stores: range
    products: int  # of Philox rounds
    is_other: bool  # accesses memory in another way, or calls a function
    after: list[int]


def block_of(lines: list[str], after: list[int]) -> Block:
    joined = "\n".join(lines)

    def number(of: re.Pattern[str]) -> range:
        found = [line for line in lines if of.search(line)]
        sure = sum(not line.startswith("@") for line in found)
        return range(sure, len(found) + 1)

    loads, stores = number(LOAD), number(STORE)
    others = len(re.findall(r"\b(?:LDG|STG)\.", joined)) != loads[-1] + stores[-1]
    ends = re.search(r"(?m)^(?:EXIT|RET|BRX)|CALL", joined) is not None
    return Block(len(lines), loads, stores, len(PHILOX.findall(joined)), others or ends, after)


def blocks_of(text: str) -> dict[int, Block]:
    code = [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)]
    branches = {
        a: (int(m[2], 16), bool(m[1]))
        for a, i in code
        if (m := re.match(r"(@!?U?P\w+\s+)?BRA(?:\.\w+)* (?:!?U?P\w+, )?0x([0-9a-f]+)", i))
    }
    addresses = [a for a, _ in code]
    following = dict(itertools.pairwise(addresses))
    starts = {addresses[0], *(to for to, _ in branches.values())}
    starts |= {following[a] for a in branches if a in following}
    blocks: dict[int, Block] = {}
    start, lines = addresses[0], []
    for address, line in code:
        if address in starts and lines:
            blocks[start] = block_of(lines, [address])
            lines = []
        start = start if lines else address
        lines.append(line)
        if address in branches:
            to, may_go_on = branches[address]
            blocks[start] = block_of(lines, [to, *[following[address]] * may_go_on])
            lines = []
    return blocks


def loop_length(text: str, wanted: tuple[int, int, int]) -> int | None:
    """Of the shortest way round a loop that makes these accesses (16-byte loads and stores), and so many products."""
    blocks, shortest = blocks_of(text), None
    heads = {to for at, block in blocks.items() for to in block.after if to <= at}
    for head in heads & set(blocks):
        known: set[tuple[int, tuple[int, ...]]] = set()
        queue: list[tuple[int, int, tuple[int, ...]]] = [(0, head, (0, 0, 0))]
        while queue:
            length, at, done = heapq.heappop(queue)
            if shortest is not None and length >= shortest:
                break
            if at == head and length > 0:
                if done == wanted:
                    shortest = length
                continue
            if (at, done) in known or at not in blocks or blocks[at].is_other:
                continue
            known.add((at, done))
            block = blocks[at]
            products = min(done[2] + block.products, wanted[2])
            for loads, stores, to in itertools.product(block.loads, block.stores, block.after):
                now = (done[0] + loads, done[1] + stores, products)
                if now[0] <= wanted[0] and now[1] <= wanted[1]:
                    heapq.heappush(queue, (length + block.size, to, now))
    return shortest


def predict(file: str) -> str:
    """A table of the ops' times on a GPU as the machine code has them, without running it."""
    only = ("--gpu-architecture", "sm_90")
    registers = {
        name: int(found[1])
        for _, name, text in by_kernel(dump("--dump-resource-usage", *only, file=file), "Function")
        if "pass_kernelI" in name and (found := re.search(r"REG:(\d+)", text))
    }
    lines = [*HEADER]
    for (dtype, (width, size, rows)), row in itertools.product(ROWS.items(), PREDICTED):
        op, formula, direction, sample, loads, stores, draws = row
        wanted = (formula, rows, direction, f"{sample}EEv")
        (name,) = (name for name in registers if all(part in name for part in wanted))
        text = dump("--dump-sass", *only, "--function", name, file=file)
        unroll = 2 if formula == "12SquaredError" and width == 4 else 1
        length = loop_length(text, (loads * unroll, stores * unroll, 3 * width * draws))
        if length is None:
            raise SystemExit(f"{name} has no loop of {loads} loads and {stores} stores a pack")
        per_pack = length / unroll
        blocks = 65536 // (THREADS * (-(-registers[name] // 8) * 8))
        issue = ELEMENTS / width * per_pack / WARP / ISSUES * 1e6
        cells = [op, dtype, registers[name], blocks, f"{per_pack:.0f}"]
        cells += [loads * unroll * blocks * THREADS, f"{issue:.0f}"]
        for copy in COPY.values():
            memory = ELEMENTS * size * (loads + stores) / copy * 1e6
            cells.append(f"{max(issue, memory):.0f}, {'memory' if memory > issue else 'issue'}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    if sys.argv[1:2] == ["--predict"]:
        Path(sys.argv[2]).write_text(predict(sys.argv[3] if len(sys.argv) > 3 else str(LIBRARY)))
        return 0
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
    for arch in info["cuda_archs"].split(";"):
        name = f"sm_{arch.removesuffix('+PTX').replace('.', '')}"
        if arch.endswith("+PTX") and f"{name}.ptx" not in dump("--list-ptx"):
            problems.append(f"no PTX for {name}")
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
        # Kernels with packs of 16 bytes. Those for any dtype have 16-byte accesses in one of their branches.
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
    ops.remove("fastvae::elementary")  # single functions of the CPU, for tests
    for op in ops:  # a kernel of its own, or one function for all devices
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, "CUDA"):
            problems.append(f"{op} has no CUDA kernel")
    print(f"{len(ops)} ops are registered for CUDA")

    print(*(problems or ["no spills, 16-byte accesses, every op registered"]), sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
