"""Shapes, dtypes, layouts and inputs that the tests of all ops share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae  # noqa: F401
from fastvae.verify.inputs import (  # noqa: F401
    DTYPES,
    REDUCTIONS,
    WEIGHTS,
    gaussians,
    images,
    inputs,
    latents,
    noise,
    pairs,
    tensor,
    vae_inputs,
    weight,
)

SCALAR_REDUCTIONS = REDUCTIONS[:3]
HALVES = [torch.bfloat16, torch.float16]
MIXED = [
    (a, b)
    for a in (torch.float32, torch.bfloat16, torch.float16)
    for b in (torch.float32, torch.bfloat16, torch.float16)
    if a != b
]
# Of mu and logvar and of a prior, as autocast leaves them.
MIXED_LATENTS = [(a, b, p) for a, b in MIXED for p in [*HALVES, torch.float32]]
# Before torch 2.13 (2.11 was tried) Dynamo makes a constant of a number's power, for plain code as well, and cannot trace
# an object that is made from a changing number or inside a module's own, nor a hook on a tensor.
old_dynamo = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="what Dynamo can do from torch 2.13 on",
)
# The kernels sum in blocks of 512 elements and chunks of 4096: one below, at and above each, in rows and over rows.
SHAPES = [
    (1,),
    (7,),
    (3, 5),
    (1, 511),
    (2, 512),
    (3, 513),
    (1, 4095),
    (2, 4097),
    (64, 20),
    (9, 1000),
    (2, 3, 5, 7),
]
EMPTY_SHAPES = [(0,), (0, 4), (4, 0), (0, 3, 5), (2, 0, 3)]


# Where no device is given, a tensor is on torch's default one: the CPU, unless the tests run with --device cuda.


def seeded_generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random_state() -> Tensor:
    """Of the default generator of the default device."""
    cuda = torch.get_default_device().type == "cuda"
    return torch.cuda.get_rng_state() if cuda else torch.get_rng_state()


def mixed_latents(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: Any = None, *, prior: bool
) -> dict[str, Tensor]:
    """mu and logvar of two dtypes; both parameters of the prior have the third."""
    return {
        k: t.to(dtypes[2] if "_p" in k else dtypes["logvar" in k])
        for k, t in latents(shape, device=device, prior=prior).items()
    }


# Layouts. Each function returns a tensor with the shape (and unless it says otherwise, the values) of the one it is
# given. What lies between the elements is NaN: a kernel that reads it shows.


# The functions of csrc/math by themselves


def elementary(function: str, *x: np.ndarray) -> np.ndarray:
    """As the CPU's kernels compute it."""
    return torch.ops.fastvae.elementary(function, [torch.from_numpy(a) for a in x]).numpy()


def random_bits(dtype: type, n: int) -> np.ndarray:
    """Of all exponents; infinities and NaNs among them."""
    return np.frombuffer(np.random.default_rng(0).bytes(n * dtype(0).itemsize), dtype).copy()


def sums_to_round(dtype: type, n: int) -> list[np.ndarray]:
    """a, b and c for a b + c: most cancel in part or down to the product's rounding, and some overflow or are subnormal."""
    rng, info = np.random.default_rng(4), np.finfo(dtype)
    a, b = rng.normal(size=(2, n)).astype(dtype)
    c = (-a * b * np.exp2(rng.integers(-60, 60, n)) * rng.choice([1, 1, -1], n)).astype(dtype)
    c[::3] = -(a * b)[::3]
    scale = rng.integers(info.minexp // 3, info.maxexp // 3, n)
    scale[::4] = rng.integers(info.minexp - info.nmant - 5, info.minexp + 5, len(a[::4])) // 2
    scale[::16] = info.maxexp // 2
    with np.errstate(over="ignore", under="ignore"):
        return [
            np.ldexp(a, scale),
            np.ldexp(b, scale),
            np.ldexp(c, 2 * scale).clip(-info.max, info.max),
        ]


def _gap(t: Tensor) -> Tensor:
    return torch.full_like(t, math.nan)


def _channel(t: Tensor) -> int:
    return min(1, t.dim() - 1)


def _misaligned(t: Tensor) -> Tensor:
    return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape)


def _chunk(t: Tensor) -> Tensor:
    return torch.cat([_gap(t), t], dim=_channel(t)).chunk(2, dim=_channel(t))[1] if t.numel() else t


def _channel_slice(t: Tensor) -> Tensor:
    d = _channel(t)
    return torch.cat([_gap(t), t, _gap(t), _gap(t)], dim=d).narrow(d, t.shape[d], t.shape[d])


def _interleaved(t: Tensor) -> Tensor:
    return torch.stack([_gap(t), t], dim=-1).unbind(-1)[1]


def _row_step(t: Tensor) -> Tensor:
    return torch.stack([t, _gap(t)], dim=1).flatten(0, 1)[::2]


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(_channel(t), -1).contiguous().movedim(-1, _channel(t))


def _channels_last_slice(t: Tensor) -> Tensor:
    return (
        torch.cat([t, _gap(t)], dim=_channel(t))
        .movedim(_channel(t), -1)
        .contiguous()
        .movedim(-1, _channel(t))
        .narrow(_channel(t), 0, t.shape[_channel(t)])
    )


def _expanded_batch(t: Tensor) -> Tensor:
    """The first row for all rows."""
    return t[:1].expand_as(t)


def _expanded_inside(t: Tensor) -> Tensor:
    """The first value of each row for the whole row."""
    return t[..., :1].expand_as(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "misaligned": _misaligned,
    "chunk": _chunk,
    "channel_slice": _channel_slice,
    "interleaved": _interleaved,
    "row_step": _row_step,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "channels_last_slice": _channels_last_slice,
    "expanded_batch": _expanded_batch,
    "expanded_inside": _expanded_inside,
}
