"""Gaussians with full covariance, given by the Cholesky factors of their covariances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.compiler import is_exporting
from torch.onnx import is_in_onnx_export

from fastvae import _vmap  # noqa: F401 (it registers its rules)
from fastvae._ops import ops
from fastvae.functional import _OF_BOTH, _choice, _explain, kl_normal, reconstruction_loss

__all__ = ["kl_multivariate_normal", "sample_and_kl_multivariate_normal"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_multivariate_normal = ops.multivariate_normal.default
_composed = ops.multivariate_normal_composed.default


def kl_multivariate_normal(
    mu: Tensor,
    scale_tril: Tensor,
    mu_p: Tensor | None = None,
    scale_tril_p: Tensor | None = None,
    *,
    reduction: str = "batchmean",
) -> Tensor:
    """KL divergence in nats of N(mu, T T') from the prior N(mu_p, T_p T_p'), or from N(0, I).

    From N(0, I): ``sum(mu^2)/2 + sum(T_ij^2, i > j)/2 + sum((T_ii^2 - 1)/2 - log T_ii)``. Another prior is that of
    ``T_p^-1 (mu - mu_p)`` and ``T_p^-1 T`` (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006, equation
    A.23). ``T_p^-1 T - I`` is computed from ``T - T_p``, so that the KL keeps its digits where the two are close.

    Args:
        mu: [B, ..., L] mean of the posterior.
        scale_tril: [B, ..., L, L] the Cholesky factor T of its covariance, with a positive diagonal; what is above the diagonal
            is not read. Or packed, [B, ..., L (L + 1) / 2], row by row as in `torch.tril_indices`.
        mu_p, scale_tril_p: the prior, of the same shapes (its factor full or packed); ``.expand_as`` makes them of one that the
            batch shares.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"`` (over mu's elements) or ``"sample"``, as for `kl_normal`.

    Returns:
        A scalar, or [B] for ``"sample"``; float32, or float64 where all inputs are.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    op = "kl_multivariate_normal"
    reduced = _choice(op, "reduction", reduction, _OF_BOTH)
    given: Any = {"mu": mu, "scale_tril": scale_tril, "mu_p": mu_p, "scale_tril_p": scale_tril_p}
    try:
        _check(op, given)
        if mu_p is not None:
            return kl_of_factors(*_as_matrices(*given.values()), reduction=reduction)
        return _fused()(mu, scale_tril, None, reduced)[1]  # type: ignore[no-any-return]
    except Exception as error:
        _explain(op, error, **given)
        raise


def sample_and_kl_multivariate_normal(
    mu: Tensor,
    scale_tril: Tensor,
    mu_p: Tensor | None = None,
    scale_tril_p: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A sample z = mu + T eps, eps ~ N(0, I), and `kl_multivariate_normal`.

    Args and errors: its; eps is the noise to use, of mu's shape, and generator is where it comes from otherwise, as in
    `fastvae.reparameterize`, whose noise it is.

    Returns:
        (z, kl): z [B, ..., L] in the wider of mu's and scale_tril's dtypes, and the KL.
    """
    op = "sample_and_kl_multivariate_normal"
    reduced = _choice(op, "reduction", reduction, _OF_BOTH)
    given: Any = {"mu": mu, "scale_tril": scale_tril, "mu_p": mu_p, "scale_tril_p": scale_tril_p}
    try:
        _check(op, given)
        if eps is None:
            eps = ops._normal_like(mu, generator)
        elif generator is not None:
            raise ValueError(
                f"fastvae.{op}: got both eps and generator, but with eps given nothing is drawn; give one of them"
            )
        elif not isinstance(eps, Tensor) or eps.shape != mu.shape:
            got = list(eps.shape) if isinstance(eps, Tensor) else type(eps).__name__
            raise ValueError(
                f"fastvae.{op}: eps must be a tensor of mu's shape {list(mu.shape)}, but got {got}"
            )
        z, kl = _fused()(mu, scale_tril, eps, reduced)
        if mu_p is not None:
            kl = kl_of_factors(*_as_matrices(*given.values()), reduction=reduction)
        return z, kl
    except Exception as error:
        _explain(op, error, generator, **given, eps=eps)
        raise


def _fused() -> Any:
    """The sample (if there is eps) and the KL from N(0, I)."""
    return _composed if is_exporting() and is_in_onnx_export() else _multivariate_normal


def kl_of_factors(
    mu: Tensor,
    factor: Tensor,
    mu_p: Tensor,
    factor_p: Tensor,
    *,
    reduction: str,
    batch_dims: int = 1,
) -> Tensor:
    """For means [..., L] and factors [..., L, L] of one dtype, in two passes: the components that the diagonal makes, and half
    of the squares below it.
    """
    diagonals = [t.diagonal(dim1=-2, dim2=-1) for t in (factor, factor_p)]
    lower, lower_p = torch.tril(factor), torch.tril(factor_p)
    # T_p^-1 (T - T_p) has the digits of small differences. Where a column of T is much smaller than T_p's, T - T_p would
    # lose the column's own digits. Both give the same below the diagonal.
    apart, scale = (diagonals[0] - diagonals[1]).abs(), diagonals[1].abs()
    near = (apart < 0.5 * scale).unsqueeze(-2)
    known = torch.cat([lower - torch.where(near, lower_p, 0), (mu - mu_p).unsqueeze(-1)], dim=-1)
    solved = torch.linalg.solve_triangular(lower_p, known, upper=False)
    below, mean = solved[..., :-1], solved[..., -1]
    divisor = mu.numel() if reduction == "mean" else 1
    reduction = "sum" if reduction == "mean" else reduction
    of_diagonal = kl_normal(
        mean, _log_ratio(*diagonals), scale="log_sigma", reduction=reduction, batch_dims=batch_dims
    )
    length = mu.shape[-1]
    of_squares = reconstruction_loss(
        below,
        below.new_zeros(()).expand_as(below),
        likelihood="gaussian",
        weight=below.new_ones(length, length).tril(-1),
        reduction=reduction,
        batch_dims=batch_dims,
    )
    kl = of_diagonal + of_squares
    return kl / divisor if divisor != 1 else kl


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b), with its digits where a is near b."""
    delta = (a - b) / b
    near = delta.abs() < 0.5
    far = torch.log(torch.where(near, 1, a)) - torch.log(torch.where(near, 1, b))
    return torch.where(near, torch.log1p(torch.where(near, delta, 0)), far)


def _check(op: str, given: dict[str, Any]) -> None:
    if (given["mu_p"] is None) != (given["scale_tril_p"] is None):
        raise ValueError(
            f"fastvae.{op}: mu_p and scale_tril_p belong together; give both, or neither for N(0, I)"
        )
    mu = given["mu"]
    given = {name: t for name, t in given.items() if t is not None or name in ("mu", "scale_tril")}
    for name, t in given.items():
        if not isinstance(t, Tensor) or t.dtype not in _DTYPES:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            need = "a tensor of float32, float64, bfloat16 or float16"
            raise TypeError(f"fastvae.{op}: {name} must be {need}, but got {got}")
        if t.layout is not torch.strided or t.is_nested:
            raise TypeError(name)  # _explain says what is wrong
        if t.device != mu.device:
            got = f"but got {t.device} and {mu.device}"
            raise RuntimeError(f"fastvae.{op}: {name} and mu must be on the same device, {got}")
    shape = mu.shape
    if len(shape) < 2:
        raise ValueError(f"fastvae.{op}: mu must be [B, ..., L], but got {list(shape)}")
    length = shape[-1]
    full, packed = (*shape, length), (*shape[:-1], length * (length + 1) // 2)
    for name, t in given.items():
        if "scale" not in name and t.shape != shape:
            raise ValueError(
                f"fastvae.{op}: {name} must have mu's shape {list(shape)}, but got {list(t.shape)}"
            )
        if "scale" in name and t.shape not in (full, packed):
            raise ValueError(
                f"fastvae.{op}: {name} must be {list(full)}, or packed {list(packed)}, beside mu {list(shape)}, but got "
                f"{list(t.shape)}"
            )
    dtypes = {t.dtype for t in given.values()}
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise TypeError(
            f"fastvae.{op}: float64 goes with float64 only, but got {sorted(map(str, dtypes))}; convert one of them"
        )


def _as_matrices(*tensors: Tensor) -> list[Tensor]:
    """mu, scale_tril, mu_p and scale_tril_p in one dtype, and packed factors as matrices."""
    mu = tensors[0]
    wide = [t.to(torch.promote_types(mu.dtype, torch.float32)) for t in tensors]
    i = torch.arange(mu.shape[-1], device=mu.device)
    place = torch.tril((i * (i + 1) // 2).unsqueeze(1) + i)
    for k in (1, 3):
        if wide[k].dim() == mu.dim():
            wide[k] = wide[k][..., place]
    return wide
