"""Gaussians with full covariance, given by the Cholesky factors of their covariances."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from fastvae._ops import ops
from fastvae.functional import _OF_BOTH, _choice, kl_normal, reconstruction_loss

__all__ = ["kl_multivariate_normal", "sample_and_kl_multivariate_normal"]


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
    _choice(op, "reduction", reduction, _OF_BOTH)
    posterior = _checked(op, mu, scale_tril, mu_p, scale_tril_p)
    return _kl(*posterior, reduction=reduction)


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
    _choice(op, "reduction", reduction, _OF_BOTH)
    mean, factor, *prior = _checked(op, mu, scale_tril, mu_p, scale_tril_p)
    if eps is None:
        eps = ops._normal_like(mu, generator)
    elif not isinstance(eps, Tensor) or eps.shape != mu.shape:
        got = list(eps.shape) if isinstance(eps, Tensor) else type(eps).__name__
        raise ValueError(
            f"fastvae.{op}: eps must be a tensor of mu's shape {list(mu.shape)}, but got {got}"
        )
    # Products and their sum: on the CPU a third of the time that a batch of products of matrix and vector takes.
    moved = torch.tril(factor).mul(eps.to(mean.dtype).unsqueeze(-2)).sum(-1)
    z = (mean + moved).to(torch.promote_types(mu.dtype, scale_tril.dtype))
    return z, _kl(mean, factor, *prior, reduction=reduction)


def kl_of_factors(mu: Tensor, factor: Tensor, *prior: Tensor) -> Tensor:
    """[...] the KL of N(mu, factor factor'), for mu [..., L] and factor [..., L, L] of one dtype."""
    return _kl(mu, factor, *prior, reduction="sample", batch_dims=mu.dim() - 1)


def _kl(
    mu: Tensor,
    factor: Tensor,
    mu_p: Tensor | None = None,
    factor_p: Tensor | None = None,
    *,
    reduction: str,
    batch_dims: int = 1,
) -> Tensor:
    """Two passes: the components that the diagonal makes, and half of the squares below it."""
    diagonal, scale = factor.diagonal(dim1=-2, dim2=-1), "sigma"
    if mu_p is not None and factor_p is not None:
        lower = torch.tril(factor) - torch.tril(factor_p)
        known = torch.cat([lower, (mu - mu_p).unsqueeze(-1)], dim=-1)
        solved = torch.linalg.solve_triangular(torch.tril(factor_p), known, upper=False)
        factor, mu = solved[..., :-1], solved[..., -1]
        diagonal = _log_ratio(diagonal, factor_p.diagonal(dim1=-2, dim2=-1))
        scale = "log_sigma"
    divisor = mu.numel() if reduction == "mean" else 1
    reduction = "sum" if reduction == "mean" else reduction
    of_diagonal = kl_normal(mu, diagonal, scale=scale, reduction=reduction, batch_dims=batch_dims)
    length = mu.shape[-1]
    below = reconstruction_loss(
        factor,
        factor.new_zeros(()).expand_as(factor),
        likelihood="gaussian",
        weight=factor.new_ones(length, length).tril(-1),
        reduction=reduction,
        batch_dims=batch_dims,
    )
    kl = of_diagonal + below
    return kl / divisor if divisor != 1 else kl


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b), with its digits where a is near b."""
    delta = (a - b) / b
    near = delta.abs() < 0.5
    far = torch.log(torch.where(near, 1, a)) - torch.log(torch.where(near, 1, b))
    return torch.where(near, torch.log1p(torch.where(near, delta, 0)), far)


def _checked(op: str, mu: Tensor, scale_tril: Tensor, *prior: Tensor | None) -> list[Tensor]:
    """All in one dtype, factors as matrices."""
    given: dict[str, Tensor | None] = {"mu": mu, "scale_tril": scale_tril}
    given |= dict(zip(("mu_p", "scale_tril_p"), prior, strict=True))
    if (prior[0] is None) != (prior[1] is None):
        raise ValueError(
            f"fastvae.{op}: mu_p and scale_tril_p belong together; give both, or neither for N(0, I)"
        )
    tensors: dict[str, Tensor] = {}
    for name, t in given.items():
        if t is None and name.endswith("_p"):
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"fastvae.{op}: {name} must be a floating-point tensor, but got {got}")
        tensors[name] = t
    shape = mu.shape
    length = shape[-1] if shape else 0
    packed = length * (length + 1) // 2
    if mu.dim() < 2:
        raise ValueError(f"fastvae.{op}: mu must be [B, ..., L], but got {list(shape)}")
    for name, t in tensors.items():
        wide, full = (*shape[:-1], packed), (*shape, length)
        if "scale" not in name and t.shape != shape:
            raise ValueError(
                f"fastvae.{op}: {name} must have mu's shape {list(shape)}, but got {list(t.shape)}"
            )
        if "scale" in name and t.shape not in (wide, full):
            raise ValueError(
                f"fastvae.{op}: {name} must be {list(full)}, or packed {list(wide)}, beside mu {list(shape)}, but got "
                f"{list(t.shape)}"
            )
    dtypes = {t.dtype for t in tensors.values()}
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise TypeError(
            f"fastvae.{op}: float64 goes with float64 only, but got {sorted(map(str, dtypes))}; convert one of them"
        )
    dtype = torch.promote_types(mu.dtype, torch.float32)
    for name, t in tensors.items():
        tensors[name] = t = t.to(dtype)
        if "scale" in name and t.dim() == mu.dim():
            i = torch.arange(length, device=t.device)
            tensors[name] = t[..., torch.tril((i * (i + 1) // 2).unsqueeze(1) + i)]
    return list(tensors.values())
