"""Builds fastvae/_C.abi3.so: the ops, the CPU kernels once for each instruction set, and the CUDA kernels where there is a compiler
for them. All metadata is in pyproject.toml.

FASTVAE_CUDA=0 leaves CUDA out, FASTVAE_CUDA=1 insists on it; TORCH_CUDA_ARCH_LIST chooses the architectures. With
FASTVAE_CUDA=emulation the CPU runs the CUDA kernels, slowly, for its own tensors (tests/emulation). FASTVAE_LOCAL_VERSION=1, which
is for wheels, adds the torch that they fit to the version: 0.1.0+torch2.13cpu.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import setup
from setuptools.command.egg_info import egg_info

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError as error:
    sys.exit(
        f"fastvae: cannot import {error.name!r}. The extension must be compiled against the torch it will run with:\n"
        "  install torch first (pip install torch setuptools ninja), then\n"
        "  pip install --no-build-isolation ."
    )

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"fastvae: building needs setuptools 77 or later, but {setuptools.__version__} is installed. Update it first: "
        'pip install "setuptools>=77"'
    )

ROOT = Path(__file__).parent.resolve()
# pip puts ninja, which compiles files in parallel, in this folder. It is not in PATH if the environment is not activated.
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_LINUX = sys.platform.startswith("linux")

# No contraction, for the same bits on every instruction set. Only the kernels, which include no torch header, set -std: torch
# sets the one that it needs.
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
    "-fno-tree-vrp",  # it takes a fifth of the compiler's time, and the kernels are as fast without it
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
# -fmad=false, as on the CPU: the code says where a multiplication and an addition are fused (math/scalar.h), so that every
# kernel gives the same gradient.
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden", "-Xptxas=--warn-on-spills"]
# Turing to Blackwell. 11.0 cannot run the machine code of its neighbours: it takes the PTX of 10.0. Later architectures take
# the PTX of the newest one.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0+PTX")
# Apple's clang has no OpenMP; at::parallel_for is then serial.
OPENMP = ["-fopenmp"] if IS_LINUX else []
# Compiled once for each of the instruction sets. Those that take longest come first.
KERNELS = (
    "cpu/pass_float",
    "cpu/pass_double",
    "cpu/kernels",
    "cpu/logistic_mixture",
    "cpu/functions",
    "pairwise/kernels",
    "multivariate/kernels",
)
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


def output_of(*command: str | os.PathLike[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout + done.stderr).strip()


# CUDA ---------------------------------------------------------------------------------------------


class Toolkit(NamedTuple):
    """CUDA's compiler. `home` is what torch calls CUDA_HOME."""

    home: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


def toolkit_homes() -> list[Path]:
    """Where nvcc may be, in the order in which it is looked for."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a link or a script outside of the toolkit's folder, so ask nvcc for the folder.
        top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "x.cu"), re.MULTILINE)
        homes.append(Path(top[1]) if top else Path(nvcc).resolve().parent.parent)
    homes.append(Path("/usr/local/cuda"))
    # The wheels of nvcc (nvidia-cuda-nvcc and what it needs), beside torch's own CUDA libraries.
    homes += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"))
    return [home.resolve() for home in homes if (home / "bin/nvcc").exists()]


def find_toolkit() -> Toolkit | str:
    """The toolkit that fits torch, or why there is none."""
    wanted = os.environ.get("FASTVAE_CUDA", "")
    if wanted not in ("", "0", "1", "emulation"):
        sys.exit(f"fastvae: FASTVAE_CUDA must be 0, 1, emulation or not set, but it is {wanted!r}")
    if wanted in ("0", "emulation"):
        return f"FASTVAE_CUDA={wanted} was set"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    found = []
    for home in toolkit_homes():
        version = re.search(r"release (\d+\.\d+)", output_of(home / "bin/nvcc", "--version"))
        toolkit = Toolkit(home, version[1] if version else "unknown")
        if toolkit.major == torch.version.cuda.split(".")[0]:
            return toolkit
        found.append(f"{toolkit.version} in {toolkit.home}")
    major = torch.version.cuda.split(".")[0]
    remedy = f"pip install 'nvidia-cuda-nvcc=={major}.*' 'nvidia-nvvm=={major}.*' 'nvidia-cuda-crt=={major}.*' 'nvidia-cuda-cccl=={major}.*'"
    if found:
        return f"torch was built with CUDA {torch.version.cuda}, but nvcc is {', '.join(found)}; one that fits: {remedy}"
    return f"no nvcc was found in CUDA_HOME, on the PATH, in /usr/local/cuda or in Python's packages; one from there: {remedy}"


def default_architectures(toolkit: Toolkit) -> str:
    """As many of ours as this nvcc knows: CUDA 12.6 has no Blackwell."""
    known = re.findall(r"compute_(\d+)", output_of(toolkit.home / "bin/nvcc", "--list-gpu-arch"))
    ours = [a for a in CUDA_ARCHITECTURES if a.removesuffix("+PTX").replace(".", "") in known]
    return ";".join(ours or CUDA_ARCHITECTURES).removesuffix("+PTX") + "+PTX"


CUDA = find_toolkit()
if isinstance(CUDA, str):
    if os.environ.get("FASTVAE_CUDA") == "1":
        sys.exit(f"fastvae: FASTVAE_CUDA=1, but CUDA cannot be built: {CUDA}")
    print(f"fastvae: building without CUDA: {CUDA}", file=sys.stderr)
else:
    # Without these, torch looks one folder too high if nvcc is a link, and asks a GPU for the architecture.
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(CUDA.home)
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(CUDA)
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    print(
        f"fastvae: building with CUDA {CUDA.version} for {architectures} "
        "(TORCH_CUDA_ARCH_LIST=9.0 builds for one architecture, FASTVAE_CUDA=0 for none)",
        file=sys.stderr,
    )


# The build ----------------------------------------------------------------------------------------


def commit() -> str:
    if Path(output_of("git", "rev-parse", "--show-toplevel") or "/").resolve() != ROOT:
        return "unknown"  # an sdist, perhaps unpacked inside another repository
    return (output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown") + (
        "+changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    )


def build_info() -> str:
    """A header with what `fastvae info` tells; only library.cpp includes it, so that a commit recompiles nothing else."""
    compiler = output_of(os.environ.get("CXX", "c++"), "--version").splitlines()
    built = not isinstance(CUDA, str)
    info = {
        "commit": commit(),
        "torch": torch.__version__,
        "compiler": compiler[0] if compiler else "unknown",
        "cuda": CUDA.version if built else f"not built: {CUDA}",
        "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"] if built else "",
        "cpu_kernels": " ".join(INSTRUCTION_SETS),
    }
    return f"#define FASTVAE_BUILD_INFO {json.dumps(json.dumps(info)[1:-1])}\n"


class Build(BuildExtension):
    """Compiles the CPU kernels once for each instruction set, then the rest."""

    def initialize_options(self) -> None:
        super().initialize_options()
        # pip does not delete this folder, so the next install compiles only what has changed.
        self.build_temp = "build/temp"

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        header = folder / "build_info.h"
        info = build_info()
        if not header.exists() or header.read_text() != info:
            header.write_text(info)
        extension.include_dirs.append(str(folder.resolve()))
        if not isinstance(CUDA, str):
            extension.library_dirs.append(str(cudart_folder(CUDA, folder).resolve()))
        extension.extra_objects += self.compile_kernels()
        super().build_extensions()

    def compile_kernels(self) -> list[str]:
        sources = [
            *ROOT.glob("csrc/*.h"),
            *ROOT.glob("csrc/math/*.h"),
            *ROOT.glob("csrc/formulas/*.h"),
            *ROOT.glob("csrc/cpu/*.*"),
            *ROOT.glob("csrc/pairwise/*.*"),
            *ROOT.glob("csrc/multivariate/*.*"),
            ROOT / "setup.py",
        ]
        changed = max(path.stat().st_mtime for path in sources)
        folder = Path(self.build_temp)
        objects = {
            folder / name / f"csrc/{kernels}.o": (kernels, name)
            for kernels in KERNELS
            for name in INSTRUCTION_SETS
        }
        old = [k for o, k in objects.items() if not o.exists() or o.stat().st_mtime < changed]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for count, done in enumerate(pool.map(self.compile_kernel, old), start=1):
                print(f"[{count}/{len(old)}] {done}", flush=True)
        return list(map(str, objects))

    def compile_kernel(self, kernel: tuple[str, str]) -> str:
        kernels, name = kernel
        self.compiler.compile(
            [f"csrc/{kernels}.cpp"],
            output_dir=str(Path(self.build_temp) / name),
            macros=[
                ("FASTVAE_ISA", name),
                ("FASTVAE_KERNELS", f"kernels_{name}"),
                ("FASTVAE_FUNCTIONS", f"functions_{name}"),
                ("FASTVAE_PAIRWISE", f"pairwise_{name}"),
                ("FASTVAE_MULTIVARIATE", f"multivariate_{name}"),
            ],
            extra_postargs=COMMON_FLAGS + KERNEL_FLAGS + INSTRUCTION_SETS[name],
        )
        return f"{kernels}.cpp, {name}"


class EggInfo(egg_info):
    """Makes the version; `make wheel` asks for its local part."""

    def finalize_options(self) -> None:
        if os.environ.get("FASTVAE_LOCAL_VERSION") == "1":
            release = ".".join(torch.__version__.split(".")[:2])
            cuda = "cpu" if isinstance(CUDA, str) else f"cu{torch.version.cuda.replace('.', '')}"
            self.tag_build = f"+torch{release}{cuda}"
        super().finalize_options()


def cudart_folder(toolkit: Toolkit, folder: Path) -> Path:
    """Where the linker finds libcudart.so: the wheels have it under its full name only."""
    for found in (toolkit.home / "lib64", toolkit.home / "lib"):
        if (found / "libcudart.so").exists():
            return found
        for library in found.glob("libcudart.so.*"):
            link = folder / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return folder


def formula_sources() -> list[str]:
    """Writes a file for each formula with the instances of CUDA's pass, so that they compile side by side."""
    listed = (ROOT / "csrc/formulas/list.h").read_text().split("#define FASTVAE_FORMULAS(visit)")[1]
    folder = ROOT / "build/formulas"
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for formula in (*re.findall(r"visit\((\w+)\)", listed), "NoLoss"):
        source = folder / f"{formula}.{'cpp' if isinstance(CUDA, str) else 'cu'}"
        text = f'#include "{ROOT}/csrc/cuda/pass.cuh"\n#include "{ROOT}/csrc/formulas/list.h"\n\nFASTVAE_INSTANCES({formula})\n'
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        sources.append(str(source.relative_to(ROOT)))
    return sources


def extension() -> object:
    sources = ["csrc/library.cpp"]
    sources += [f"csrc/{folder}/dispatch.cpp" for folder in ("cpu", "pairwise", "multivariate")]
    sources += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/ops/*.cpp"))
    # Torch's headers by op reduce the compile time to a third.
    macros = [("AT_PER_OPERATOR_HEADERS", None)]
    if IS_X86:
        macros.append(("FASTVAE_X86_KERNELS", None))
    include_dirs = []
    kind, flags = CppExtension, {"cxx": COMMON_FLAGS + OPENMP}
    if os.environ.get("FASTVAE_CUDA") == "emulation":
        sources.remove("csrc/ops/device.cpp")
        sources.remove("csrc/ops/draw.cpp")
        sources += sorted(
            str(path.relative_to(ROOT)) for path in ROOT.glob("tests/emulation/*.cpp")
        )
        sources += formula_sources()
        include_dirs.append(str(ROOT / "tests/emulation"))
        flags["cxx"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
    if not isinstance(CUDA, str):
        kind = CUDAExtension
        sources += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*.cu"))
        sources += formula_sources()
        macros.append(("FASTVAE_CUDA", None))
        flags["nvcc"] = NVCC_FLAGS
    return kind(
        "fastvae._C",
        sources,
        include_dirs=include_dirs,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=OPENMP,
        py_limited_api=True,
    )


# The library does not use Python's C API: one wheel serves all versions from requires-python on.
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": Build, "egg_info": EggInfo},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
