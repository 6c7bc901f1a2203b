"""Loads the extension, which registers the kernels as ``torch.ops.fastvae``."""

from __future__ import annotations

from typing import Any

import torch

try:
    from fastvae import _C
except ImportError as error:
    raise ImportError(
        f"fastvae's compiled extension does not load ({error}). It is compiled for one version of torch (this is torch "
        f"{torch.__version__}); rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    ) from error

ops: Any = torch.ops.fastvae
build_info = _C.build_info
cpu_capability = _C.cpu_capability
