"""The noise of the ops, by itself."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae._ops import ops

__all__ = ["philox_normal"]


def philox_normal(
    *size: int | Sequence[int],
    seed: int,
    offset: int = 0,
    start: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals that depend on (seed, offset, index of the element) alone: the very noise the ops make.

    It is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011) turned into
    normals by Box and Muller. Neither threads, instruction set nor the tensor's shape matter, and the CPU and CUDA make
    the same bits.

    An op that draws on the CPU takes its seed from the generator's next 64 bits and offset 0, so that this is its noise::

        seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=g).item()
        eps = philox_normal(*mu.shape, seed=seed)

    On CUDA it takes the generator's own seed and offset, and moves the offset on. It sets the offset's top bit: torch's
    own kernels use the same seed, and without that bit a draw could repeat their random numbers::

        seed, offset = g.initial_seed(), g.get_offset() | 1 << 63  # before the draw
        eps = philox_normal(*mu.shape, seed=seed, offset=offset, device="cuda")

    Args:
        size: the shape, as integers or one sequence of them.
        seed: 64 bits, signed or unsigned.
        offset: the number of the draw, 64 bits.
        start: the index of the first element, so that ``philox_normal(n, seed=s, start=k)`` is
            ``philox_normal(k + n, seed=s)[k:]``: a rank takes its slice of a global draw.
        dtype: float32 (default), float64, bfloat16 or float16. float64 noise has 53-bit uniforms of its own; the 16-bit
            dtypes are the float32 noise, rounded.
        device: the CPU (by default) or a CUDA device.

    Raises:
        ValueError: a negative size or start, a seed of more than 64 bits.
        TypeError: another dtype, or what is not an integer.
        RuntimeError: a device that this build has no kernels for.
    """
    first = _integer("start", start)
    if not 0 <= first < 2**63:
        raise ValueError(
            f"fastvae.random.philox_normal: start must be in [0, 2**63), but got {first}"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"fastvae.random.philox_normal: dtype must be a torch.dtype, but got {type(dtype).__name__}"
        )
    return ops.philox_normal.default(  # type: ignore[no-any-return]
        _shape(size),
        seed=_signed("seed", seed),
        offset=_signed("offset", offset),
        start=first,
        dtype=torch.float32 if dtype is None else dtype,
        device=torch.device("cpu" if device is None else device),
    )


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"fastvae.random.philox_normal: {name} must be an integer, but got {value!r}"
        ) from None


def _signed(name: str, value: object) -> int:
    """64 bits as the signed integer that an op's schema takes."""
    bits = _integer(name, value)
    if not -(2**63) <= bits < 2**64:
        raise ValueError(f"fastvae.random.philox_normal: {name} must have 64 bits, but got {bits}")
    return bits - 2**64 if bits >= 2**63 else bits


def _shape(size: tuple[object, ...]) -> list[int]:
    if len(size) == 1 and isinstance(size[0], Sequence):
        size = tuple(size[0])
    shape = [_integer("size", n) for n in size]
    if any(n < 0 for n in shape):
        raise ValueError(
            f"fastvae.random.philox_normal: size must not be negative, but got {tuple(shape)}"
        )
    return shape


@torch.library.register_fake("fastvae::philox_normal")
def _(size, *, seed, offset=0, start=0, dtype, device):  # type: ignore[no-untyped-def]
    return torch.empty(size, dtype=dtype, device=device)
