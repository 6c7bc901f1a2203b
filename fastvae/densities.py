"""The density of a Gaussian at a sample, and the KL divergence as one sample estimates it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting
from torch.onnx import is_in_onnx_export

from fastvae._ops import ops
from fastvae.functional import (
    _FORMULAS,
    _OF_BOTH,
    _as_tensor,
    _choice,
    _explain,
    kept,
    latents,
)

__all__ = ["kl_one_sample", "normal_log_prob"]

_REDUCTIONS = _OF_BOTH | {"none": 4}
_NORMAL_LOG_PROB, _KL_ONE_SAMPLE = _FORMULAS["normal_log_prob"], _FORMULAS["kl_one_sample"]


def normal_log_prob(
    z: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    reduction: str = "sample",
    batch_dims: int = 1,
) -> Tensor:
    """log N(z; mu, exp(logvar)) in nats, with its constant; without mu and logvar, log N(z; 0, 1).

    For each element ``-0.5 * (log(2 pi) + logvar + (z - mu)^2 * exp(-logvar))``.

    Args:
        z: [B, ...] the sample.
        mu, logvar: broadcast to z, and are read in place; their gradients are summed in the pass. float32, bfloat16 and float16
            may be mixed; float64 goes with float64.
        scale, clamp: what logvar is, and its bounds, as in `fastvae.reparameterize`.
        reduction: ``"sample"`` ([B], summed over the event), ``"sum"``, ``"batchmean"``, ``"mean"`` or ``"none"``.
        batch_dims: how many leading dimensions ``"sample"`` keeps; 2 gives [B, K].

    Returns:
        [B] for ``"sample"``, a scalar, or z's shape for ``"none"``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    _both("normal_log_prob", mu=mu, logvar=logvar)
    code, own = latents("normal_log_prob", scale, clamp)
    loss = _NORMAL_LOG_PROB + code + _reduced("normal_log_prob", reduction, batch_dims)
    try:
        if mu is None and logvar is None:
            mu, logvar = _standard(z, scale)
        op, own = _op(own, z)
        log_prob: Tensor = op(z, mu, loss, logvar, None, None, own)
    except Exception as error:
        _explain("normal_log_prob", error, z=z, mu=mu, logvar=logvar)
        raise
    return log_prob


def kl_one_sample(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    reduction: str = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """log q(z) - log p(z) in nats: q = N(mu, exp(logvar)), p = N(mu_p, exp(logvar_p)) or N(0, 1). For z ~ q it estimates the KL.

    It is what importance weighted bounds, flows and Monte-Carlo objectives add up. With d = logvar - logvar_p,
    t = (z - mu) exp(-logvar / 2) and t_p = (z - mu_p) exp(-logvar_p / 2) it is ``0.5 * ((t_p - t) * (t_p + t) - d)`` for each
    element: from differences, since near the prior the two densities cancel.

    Args:
        z: [B, ...] the sample.
        mu, logvar: the posterior; mu_p, logvar_p: the prior. They broadcast to z (``mu.unsqueeze(1)`` for z [B, K, ...]) and are
            read in place; their gradients are summed in the pass. dtypes may be mixed as in `fastvae.reparameterize`.
        scale, clamp: what logvar and logvar_p are, and the bounds of the posterior's logvar, as in `fastvae.reparameterize`.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"``, ``"sample"`` or ``"none"``.
        batch_dims: how many leading dimensions ``"sample"`` keeps; 2 gives [B, K].

    Returns:
        A scalar, [B] for ``"sample"``, or z's shape for ``"none"``; float32, or float64 for float64. All five inputs get gradients.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    _both("kl_one_sample", mu_p=mu_p, logvar_p=logvar_p)
    code, own = latents("kl_one_sample", scale, clamp)
    loss = _KL_ONE_SAMPLE + code + _reduced("kl_one_sample", reduction, batch_dims)
    try:
        if mu_p is None and logvar_p is None:
            mu_p, logvar_p = _standard(z, scale)
        op, own = _op(own, z)
        kl: Tensor = op(z, mu, loss, logvar, mu_p, None, own, logvar_p)
    except Exception as error:
        _explain("kl_one_sample", error, z=z, mu=mu, logvar=logvar, mu_p=mu_p, logvar_p=logvar_p)
        raise
    return kl


def _both(op: str, **parameters: Tensor | None) -> None:
    if len({value is None for value in parameters.values()}) > 1:
        names = " and ".join(parameters)
        raise ValueError(f"fastvae.{op}: give both {names}, or neither for N(0, 1)")


def _reduced(op: str, reduction: str, batch_dims: int) -> int:
    return _choice(op, "reduction", reduction, _REDUCTIONS) + kept(op, reduction, batch_dims)


def _standard(z: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    """N(0, 1), which the op's numbers broadcast."""
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    return zero, torch.ones_like(zero) if scale == "sigma" else zero


def _op(own: Any, z: Tensor) -> tuple[Any, Any]:
    """The op, and its numbers as it takes them."""
    if is_exporting() and is_in_onnx_export():
        return ops.elementwise_loss_composed.default, _as_tensor(own, z)
    return ops.elementwise_loss.default, own
