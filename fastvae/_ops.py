"""Loads the compiled library, which registers the kernels as ``torch.ops.fastvae``."""

from __future__ import annotations

import ctypes
import json
import mmap
import re
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _built_for() -> str:
    """The torch it was compiled with, read from the file: a library of another torch may crash when it is loaded."""
    with (
        LIBRARY.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        found = re.search(rb'"torch": "(.+?)"', content)
        return found[1].decode() if found else "unknown"


def _load() -> ctypes.CDLL:
    here = torch.__version__
    release = ".".join(here.split(".")[:2])
    cause = None
    try:
        built_for = _built_for()
        # The C++ interface may change between 2.13 and 2.14, not between 2.13.0 and 2.13.1.
        if built_for.startswith(f"{release}."):
            return ctypes.CDLL(str(LIBRARY))
        problem = f"was built for torch {built_for}, but torch {here} is installed"
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        cause, problem = error, f"does not load beside torch {here}: {error}"
    raise ImportError(
        f"fastvae: the compiled library {problem}. Install the torch it was built for, or install fastvae-kernels for "
        f"torch {release}: a wheel with +torch{release} in its version, or from fastvae's source folder with "
        "`pip install --no-build-isolation --force-reinstall --no-deps .`"
    ) from cause


_library = _load()
_library.fastvae_build_info.restype = ctypes.c_char_p
_library.fastvae_cpu_capability.restype = ctypes.c_char_p

ops: Any = torch.ops.fastvae


def build_info() -> dict[str, str]:
    """How the library was built."""
    info: dict[str, str] = json.loads(_library.fastvae_build_info())
    return info


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use in this process."""
    return str(_library.fastvae_cpu_capability().decode())
