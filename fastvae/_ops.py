"""Loads the compiled library, which registers the kernels as ``torch.ops.fastvae``."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")

try:
    _library = ctypes.CDLL(str(LIBRARY))
except OSError as error:
    raise ImportError(
        f"fastvae's compiled library does not load ({error}). It is compiled for one version of torch (this is torch "
        f"{torch.__version__}); rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    ) from error
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
