"""Inputs for the ops, as they are met in training. NumPy draws them, so that every device and instruction set sees the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

REDUCTIONS = ["sum", "batchmean", "mean", "sample", "none"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tensor(values: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
    """Rounded once, from float64, so that every device and instruction set sees the same numbers."""
    return torch.tensor(np.array(values, dtype=np.float64, order="C"), dtype=dtype, device=device)


def latents(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    *,
    prior: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """mu and logvar of a posterior as it is met in training, and of a prior."""
    rng = np.random.default_rng([seed, *shape])
    names = ["mu", "logvar"] + ["mu_p", "logvar_p"] * prior
    values = {
        n: rng.uniform(-3, 2, shape) if "logvar" in n else rng.normal(0, 1.5, shape) for n in names
    }
    return {n: tensor(v, dtype, device) for n, v in values.items()}


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    return tensor(np.random.default_rng([99, *shape]).normal(size=shape), dtype, device)


def images(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    device: Any = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """recon_x and x."""
    rng = np.random.default_rng([1000 + seed, *shape])
    recon_x, x = rng.normal(0, 1, (2, *shape))
    return {"recon_x": tensor(recon_x, dtype, device), "x": tensor(x, x_dtype or dtype, device)}


def vae_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Images of `shape` and latents with five values for each of them."""
    return images(shape, dtype, device=device, **kwargs) | latents(
        (shape[0], 5), dtype, device, **kwargs
    )


def inputs(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Inputs for the op of that name, noise included where it takes some."""
    if op == "reconstruction_loss":
        return images(shape, dtype, device=device, **kwargs)
    if op == "vae_loss":
        return vae_inputs(shape, dtype, device, **kwargs)
    tensors = latents(shape, dtype, device, **kwargs)
    return tensors if op == "kl_normal" else tensors | {"eps": noise(shape, dtype, device)}


WEIGHTS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "element": lambda shape: shape,
    "sample": lambda shape: (shape[0], *[1] * len(shape[1:])),
    "channel": lambda shape: (1, *shape[1:2], *[1] * len(shape[2:])),
    "event": lambda shape: shape[1:],
    "scalar": lambda shape: (),
}


def weight(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: Any = None
) -> Tensor:
    """A weight that broadcasts to `shape`, some of it 0."""
    size = WEIGHTS[kind](shape)
    rng = np.random.default_rng([3000, *size])
    values = rng.uniform(0.3, 1.7, size)
    if size:
        values = np.where(rng.uniform(size=size) < 0.2, 0, values)
    return tensor(values, dtype, device)


def pairs(
    rows: int,
    components: int,
    dims: int,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    *,
    by_row: bool | None = False,
    spread: float = 1.0,
) -> dict[str, Tensor]:
    """Samples and Gaussian components; log-weights shared by the rows, one for each of them, or (None) none at all."""
    rng = np.random.default_rng([rows, components, dims])
    values = {
        "z": rng.normal(size=(rows, dims)) * spread,
        "mu": rng.normal(size=(components, dims)),
        "logvar": rng.normal(-1, 1, size=(components, dims)),
    }
    if by_row is not None:
        values["log_weight"] = rng.normal(-2, 1, size=(rows, components)[1 - by_row :])
    return {k: tensor(v, dtype, device) for k, v in values.items()}


def pictures(
    shape: tuple[int, ...] = (3, 5, 7),
    channels: int = 3,
    components: int = 10,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    *,
    last: bool = False,
    log_scale: tuple[float, float] = (-7.5, 0.5),
    near: float = 0.3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Pixels of all 256 values, and components whose means, given the channels before, are `near` them."""
    rng = np.random.default_rng([seed, channels, components, *shape])
    batch, *rest = shape
    x = rng.integers(0, 256, (channels, batch, *rest)) / 127.5 - 1
    logits = rng.normal(0, 1, (1, components, *shape))
    means = x[:, None] + near * rng.normal(0, 1, (channels, components, *shape))
    scales = rng.uniform(*log_scale, means.shape)
    raw = rng.normal(0, 1, means.shape)
    if channels == 3:
        by = np.tanh(raw)
        means[1] -= by[0] * x[0]
        means[2] -= by[1] * x[0] + by[2] * x[1]
    of_channel = np.stack([means, scales, raw][: channels if channels == 3 else 2], 1)
    p = np.concatenate([logits[0], of_channel.reshape(np.prod(of_channel.shape[:3]), *shape)])
    to = -1 if last else 1
    return {
        "recon_x": tensor(np.moveaxis(p, 0, to), dtype, device),
        "x": tensor(np.moveaxis(x, 0, to), dtype, device),
    }


def gaussians(
    batch: tuple[int, ...],
    length: int,
    dtype: torch.dtype = torch.float32,
    prior: bool = True,
    device: Any = None,
) -> dict[str, Tensor]:
    rng = np.random.default_rng([9, *batch, length])
    made = {}
    for suffix in ("", "_p"):
        factor = np.tril(rng.normal(0, 0.6, (*batch, length, length)))
        factor[..., range(length), range(length)] = rng.uniform(0.3, 2.5, (*batch, length))
        made["mu" + suffix] = tensor(rng.normal(0, 1.2, (*batch, length)), dtype, device)
        made["scale_tril" + suffix] = tensor(factor, dtype, device)
    return made if prior else {k: made[k] for k in ("mu", "scale_tril")}
