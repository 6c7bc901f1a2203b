"""Variants of the emulated library: with sanitizers, or with a fault put into the sources, which a test has to find.

    make emulate-sanitized    stops where memory is touched that belongs to nobody
    make emulate-mutants      prints a line for each fault; fails if a test does not find it (with ONLY=text, of some)

Only the files that a variant concerns are compiled anew. They come first when the library is linked, so that what they
share with others (inline functions) is theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.cpp_extension import library_paths

SANITIZE = [
    "-fsanitize=address,bounds,alignment",
    "-fno-sanitize-recover=all",
    "--param",
    "asan-stack=0",
]
CAPTURE: dict[str, Any] = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
}
ALL = "NoLoss KlStandard KlBetween SquaredError Gaussian kernels pairwise"


class Mutant(NamedTuple):
    file: str  # in csrc
    old: str
    new: str
    units: str  # to compile
    test: str  # file, and words for -k
    sanitized: bool = False
    multiprocessors: int = 7


KL = "test_smoke: kl_normal and float32 and contiguous"
BF16 = "test_smoke: kl_normal and bfloat16 and misaligned"
CHUNKS = "test_emulation: take_chunks and kl_normal"
SMALL = "test_emulation: small_samples and 36-33"
DRAWS = "test_noise: test_the_ops_draw or test_backward_remakes"
BARRIER = "  __syncthreads();"
MUTANTS = [
    # Threads
    Mutant("cuda/reduce.cuh", BARRIER + "  // the last sum's readers are done\n", "", "KlStandard", CHUNKS),
    Mutant("cuda/reduce.cuh", BARRIER + "\n  x = 0;", "  x = 0;", "KlStandard", CHUNKS),
    Mutant("cuda/reduce.cuh", "0xffffffffu", "0x0000ffffu", "KlStandard", KL),
    Mutant("cuda/reduce.cuh", "warps[kThreads / kWarp];", "warps[kThreads / kWarp - 1];", "KlStandard", KL, True),
    Mutant("cuda/reduce.cuh", "step >> bits == 0", "true", "KlStandard", SMALL),
    Mutant("cuda/reduce.cuh", "    if (!exists) end = first;\n", "", "KlStandard", SMALL, True),
    Mutant("cuda/reduce.cuh", "if (lane == 0 && exists) result", "if (lane == 0) result", "KlStandard", SMALL, True),
    Mutant("cuda/fold.cuh", "    }\n    __syncthreads();\n    for (int r", "    }\n    for (int r", "KlStandard", "test_likelihoods_fused: the_kl_of_each_latent and float32"),
    Mutant("pairwise/pairwise.cu", "__syncthreads();", "", "pairwise", "test_pairwise: derivatives"),
    Mutant("multivariate/multivariate.cu", "j < i; j += kWarp", "j <= i; j += kWarp", "kernels", "test_multivariate: values and float32"),
    # Packs
    Mutant("cuda/memory.cuh", "step == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0", "step == 1", "KlStandard", "test_smoke: kl_normal and float32 and misaligned"),
    Mutant("cuda/memory.cuh", "reinterpret_cast<uintptr_t>(view.data) % align == 0 && ", "", "KlStandard", BF16),
    Mutant("cuda/memory.cuh", "view.dims == 1 || view.stride[0] % 4 == 0", "true", "KlStandard", "test_emulation: not_aligned and float32", True),
    Mutant("cuda/memory.cuh", " && stride % align == 0", "", "KlStandard", "test_emulation: not_aligned and bfloat16"),
    Mutant("cuda/memory.cuh", "i = pack * W;", "i = static_cast<uint32_t>(pack * W);", "device", "test_emulation: places"),
    Mutant("cuda/memory.cuh", "UINT64_MAX / columns_ + 1", "UINT64_MAX / columns_", "device", "test_emulation: places"),
    Mutant("cuda/memory.cuh", "i >> kRowBits)", "i >> (kRowBits + 1))", "device", "test_emulation: places"),
    Mutant("cuda/memory.cuh", "(columns_ == numel_ || (columns_ % width", "((columns_ % width", "KlStandard", "test_emulation: without_whole and kl_normal"),
    Mutant("cuda/reduce.cuh", "lane < work.rest)", "lane < 0)", "KlStandard", "test_smoke: kl_normal and float32 and ragged"),
    Mutant("cuda/reduce.cuh", "min(begin + work.chunk, (sample + 1) * work.row)", "begin + work.chunk", "KlStandard", CHUNKS),
    # Grids
    Mutant("cuda/reduce.cuh", "kMostBlocks = 1024", "kMostBlocks = 32", "SquaredError kernels", "test_emulation: by_one_block", multiprocessors=132),
    Mutant("cuda/reduce.cuh", "std::min<int64_t>(most, kMostBlocks)", "kMostBlocks", "KlStandard", "test_emulation: at_once and kl_normal"),
    Mutant("cuda/pass.cuh", "1, 1, most, alone);", "1, 1, most, is_alone(kl->numel, kl->sums));", "SquaredError", "test_emulation: by_one_block"),
    Mutant("cuda/reduce.cuh", "bits < kWarpBits && int64_t(1) << bits < count", "bits < kWarpBits", "KlStandard", "test_emulation: share_a_warp"),
    # Noise
    Mutant("cuda/noise.cuh", "  noise.keep[1] = static_cast<int64_t>(offset);\n", "", "NoLoss", DRAWS),
    Mutant("cuda/noise.cuh", "/ kPer + k, drawn", "/ kPer, drawn", "NoLoss", DRAWS),
    Mutant("kernels.h", "noise.offset + (noise.offset_at == nullptr ? 0 :", "noise.offset + (true ? 0 :", "NoLoss", DRAWS),
    Mutant("ops/draw.cpp", "kOurs + philox.offset_intragraph_", "kOurs", "draw", "test_emulation: draws"),
    Mutant("ops/draw.cpp", "kOurs + philox.offset_.val", "philox.offset_.val", "draw", "test_emulation: draws"),
    # Launches
    Mutant("ops/device.cpp", "c10::cuda::getCurrentCUDAStream(), guard", "nullptr, guard", "device", KL),
    Mutant("ops/device.cpp", "const c10::cuda::CUDAGuard guard(on.device());", "struct { c10::Device current_device() const { return {at::kCPU, 0}; } } guard;", "device", KL),
]  # fmt: skip


class Tree:
    """A copy of an emulation build's sources, to compile some of its units from."""

    def __init__(self, built: Path) -> None:
        self.built, self.root = built, built.parent / "variant"
        (plan,) = built.glob("build/temp*/build.ninja")
        text = plan.read_text()
        self.command = " ".join(re.findall(r"(?m)^(?:cxx|cflags|post_cflags) = (.*)", text))
        # (Of two files with one name, the emulation's comes last.)
        self.sources = {
            Path(o).stem: s for o, s in re.findall(r"(?m)^build (\S+): compile (\S+)", text)
        }
        self.objects = re.findall(r"(?m)^build (\S+): compile", text)
        self.objects += map(str, plan.parent.glob("*/csrc/*/*.o"))
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in ("csrc", "tests", "fastvae", "build/formulas"):
            shutil.copytree(built / folder, self.root / folder)
        for file in self.root.glob("build/formulas/*"):
            file.write_text(self.moved(file.read_text()))
        shutil.copyfile(built / "pyproject.toml", self.root / "pyproject.toml")

    def moved(self, text: str) -> str:
        return text.replace(f"{self.built}/", f"{self.root}/")

    def compile(self, unit: str, flags: list[str]) -> str:
        target = str(self.root / f"{unit}.o")
        command = [*self.moved(self.command).split(), *flags]
        run([*command, self.moved(self.sources[unit]), "-o", target])
        return target

    def link(self, units: str, flags: list[str]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda unit: self.compile(unit, flags), units.split()))
        objects += [*self.objects, *(f"-L{path}" for path in library_paths())]
        objects += ["-lc10", "-ltorch_cpu", "-ltorch", "-o", f"{self.root}/fastvae/_C.abi3.so"]
        run(["c++", "-shared", "-fopenmp", "-Wl,-z,muldefs", *flags, *objects])

    def test(self, tests: list[str], sanitized: bool, multiprocessors: int = 7) -> tuple[int, str]:
        environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
        environment["FASTVAE_EMULATED_MULTIPROCESSORS"] = str(multiprocessors)
        if sanitized:
            asan = subprocess.check_output(["c++", "-print-file-name=libasan.so"], text=True)
            environment["LD_PRELOAD"] = f"{asan.strip()} libstdc++.so.6"
            environment["ASAN_OPTIONS"] = "detect_leaks=0"
        command = [sys.executable, "-m", "pytest", "-qsx", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=self.root, env=environment, **CAPTURE)
        return done.returncode, done.stdout


def run(command: list[str]) -> None:
    done = subprocess.run(command, **CAPTURE)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")


def selected(test: str) -> list[str]:
    file, words = test.split(": ")
    return [f"tests/{file}.py", "-k", words]


def sanitized(tree: Tree, _: str) -> int:
    tree.link(ALL, SANITIZE)
    names = ("emulation", "smoke", "layout", "multivariate", "noise", "pairwise")
    code, output = tree.test([f"tests/test_{name}.py" for name in names], True)
    print(output[-5000:])
    return code


def mutants(tree: Tree, only: str) -> int:
    chosen = [m for m in MUTANTS if only in f"{m}"]
    survivors = 0
    for wanted in (False, True):  # without a fault the tests pass
        some = [m for m in chosen if m.sanitized == wanted]
        tree.link(" ".join({m.units for m in some if wanted}), SANITIZE if wanted else [])
        tests: dict[tuple[int, str], list[str]] = {}
        for m in some:
            file, words = m.test.split(": ")
            tests.setdefault((m.multiprocessors, file), []).append(f"({words})")
        for (multiprocessors, file), all_words in tests.items():
            test = f"{file}: {' or '.join(all_words)}"
            code, output = tree.test(selected(test), wanted, multiprocessors)
            if code != 0:
                sys.exit(f"without a fault, this fails too: {test}\n{output}")
    for m in chosen:
        began, file = time.monotonic(), tree.root / "csrc" / m.file
        text = file.read_text()
        if m.old not in text:
            sys.exit(f"{m.file} has no {m.old!r}: change the mutant with it")
        file.write_text(text.replace(m.old, m.new, 1))
        tree.link(m.units, SANITIZE if m.sanitized else [])
        code, _ = tree.test(selected(m.test), m.sanitized, m.multiprocessors)
        file.write_text(text)
        survivors += code == 0
        change = " -> ".join(" ".join(part.split()) for part in (m.old, m.new))
        verdict = f"{'survives' if code == 0 else 'found':8} {time.monotonic() - began:4.0f} s"
        print(f"{verdict}  {m.file}: {change}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults are found")
    return survivors


if __name__ == "__main__":
    command, built, only = [*sys.argv[1:], ""][:3]
    do = {"mutants": mutants, "sanitized": sanitized}[command]
    sys.exit(do(Tree(Path(built).resolve()), only))
