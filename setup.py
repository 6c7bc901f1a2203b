"""Builds fastvae._C: the ops, and the CPU kernels once for each instruction set. All metadata is in pyproject.toml."""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    sys.exit(
        f"fastvae: cannot import {error.name!r}. The extension must be compiled against the torch it will run with:\n"
        "  install torch first (pip install torch setuptools pybind11 ninja), then\n"
        "  pip install --no-build-isolation ."
    )
try:
    import pybind11
except ModuleNotFoundError:
    sys.exit("fastvae: building needs pybind11: pip install pybind11 ninja")

ROOT = Path(__file__).parent.resolve()
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_LINUX = sys.platform.startswith("linux")

# No contraction: the same bits on every instruction set. No -std but for the kernels, which see no torch header: torch sets
# the one it needs.
COMMON_FLAGS = [
    "-O2",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-ffp-contract=off",
]
KERNEL_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-maybe-uninitialized",
]
# Apple's clang has no OpenMP; at::parallel_for is then serial.
OPENMP = ["-fopenmp"] if IS_LINUX else []
INSTRUCTION_SETS = {"baseline": []}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bw",
        "-mfma",
        "-mf16c",
    ]


def output_of(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    if Path(output_of("git", "rev-parse", "--show-toplevel") or "/").resolve() != ROOT:
        return "unknown"  # an sdist, perhaps unpacked inside another repository
    return (output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown") + (
        "+changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    )


def build_info() -> str:
    """A header with what `fastvae info` tells; only python.cpp includes it, so that a commit recompiles nothing else."""
    compiler = output_of(os.environ.get("CXX", "c++"), "--version").splitlines()
    info = {
        "COMMIT": commit(),
        "TORCH": torch.__version__,
        "COMPILER": compiler[0] if compiler else "unknown",
        "CUDA": "not built: this version has CPU kernels only",
        "CUDA_ARCHS": "",
        "CPU_KERNELS": " ".join(INSTRUCTION_SETS),
    }
    return "".join(f"#define FASTVAE_{name} {json.dumps(value)}\n" for name, value in info.items())


class Build(BuildExtension):
    """Compiles the CPU kernels once for each instruction set, then the rest."""

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        header = folder / "build_info.h"
        info = build_info()
        if not header.exists() or header.read_text() != info:
            header.write_text(info)
        extension.include_dirs.append(str(folder.resolve()))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            extension.extra_objects += pool.map(self.compile_kernels, INSTRUCTION_SETS)
        super().build_extensions()

    def compile_kernels(self, name: str) -> str:
        sources = [
            *ROOT.glob("csrc/*.h"),
            *ROOT.glob("csrc/math/*.h"),
            *ROOT.glob("csrc/cpu/*.*"),
            ROOT / "setup.py",
        ]
        folder = Path(self.build_temp) / name
        target = folder / "csrc/cpu/kernels.o"
        if not target.exists() or target.stat().st_mtime < max(
            path.stat().st_mtime for path in sources
        ):
            self.compiler.compile(
                ["csrc/cpu/kernels.cpp"],
                output_dir=str(folder),
                macros=[("FASTVAE_ISA", name), ("FASTVAE_KERNELS", f"kernels_{name}")],
                extra_postargs=COMMON_FLAGS + KERNEL_FLAGS + INSTRUCTION_SETS[name],
            )
        return str(target)


setup(
    ext_modules=[
        CppExtension(
            "fastvae._C",
            [
                "csrc/python.cpp",
                "csrc/cpu/dispatch.cpp",
                *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/ops/*.cpp")),
            ],
            include_dirs=[pybind11.get_include()],
            # Torch's headers by op: a third of the compile time.
            define_macros=[("AT_PER_OPERATOR_HEADERS", None)]
            + ([("FASTVAE_X86_KERNELS", None)] if IS_X86 else []),
            extra_compile_args={"cxx": COMMON_FLAGS + OPENMP},
            extra_link_args=OPENMP,
        )
    ],
    cmdclass={"build_ext": Build},
)
