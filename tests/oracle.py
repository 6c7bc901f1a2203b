"""The ops and their noise in NumPy, written from the formulas and independent of torch.

Every op takes arrays and `upstream`, one gradient per output (None where none arrives), and returns
``(outputs, gradients)``: a tuple of arrays, and a dict from each input's name to its gradient. The arithmetic runs in
NumPy's longdouble, which is 80 bits wide on x86 and float64 where the platform has nothing wider, so that float64 results
have something more exact to be compared with.

The noise is Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011) followed by the
transform of Box and Muller (1958).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.longdouble]
Upstream = Sequence[ArrayLike | None]
Result = tuple[tuple[Array, ...], dict[str, Array]]


def real(a: ArrayLike) -> Array:
    return np.asarray(a, dtype=np.longdouble)


def exp_residual(d: ArrayLike) -> Array:
    """exp(d) - 1 - d. Below 1 the difference cancels, so there it is the series d^2/2! + d^3/3! + ... in Horner form."""
    d = real(d)
    near = np.where(np.abs(d) < 1, d, 0)
    series = np.ones_like(near)
    for k in range(27, 2, -1):  # 27! is beyond the digits of a longdouble
        series = 1 + series * near / k
    return np.where(np.abs(d) < 1, near * near / 2 * series, np.expm1(d) - d)


# Reductions


def reduce(value: Array, reduction: str) -> Array:
    event = tuple(range(1, value.ndim))
    with np.errstate(invalid="ignore"):
        return {
            "none": lambda: value,
            "sample": lambda: value.sum(axis=event),
            "sum": lambda: value.sum(),
            "batchmean": lambda: np.divide(value.sum(), real(value.shape[0])),
            "mean": lambda: np.divide(value.sum(), real(value.size)),
        }[reduction]()


def spread(grad: ArrayLike | None, reduction: str, shape: tuple[int, ...]) -> Array:
    """The gradient that each element of `shape` gets from the gradient of the reduced value."""
    if grad is None:
        return np.zeros(shape, np.longdouble)
    grad = real(grad)
    if reduction == "sample":
        grad = grad.reshape(-1, *[1] * (len(shape) - 1))
    elif reduction == "batchmean":
        grad = grad / max(shape[0], 1)
    elif reduction == "mean":
        grad = grad / max(math.prod(shape), 1)
    return np.broadcast_to(grad, shape)


# Ops


def reparameterize(
    mu: ArrayLike, logvar: ArrayLike, eps: ArrayLike, *, upstream: Upstream
) -> Result:
    mu, logvar, eps = real(mu), real(logvar), real(eps)
    sigma = np.exp(logvar / 2)
    dz = spread(upstream[0], "none", mu.shape)
    return (mu + sigma * eps,), {"mu": dz, "logvar": dz * sigma * eps / 2, "eps": dz * sigma}


def kl_normal(
    mu: ArrayLike,
    logvar: ArrayLike,
    mu_p: ArrayLike | None = None,
    logvar_p: ArrayLike | None = None,
    *,
    reduction: str = "batchmean",
    upstream: Upstream,
) -> Result:
    mu, logvar = real(mu), real(logvar)
    mean_p = real(0 if mu_p is None else mu_p)
    log_p = real(0 if logvar_p is None else logvar_p)
    d, shift, precision = logvar - log_p, mu - mean_p, np.exp(-log_p)
    value = (exp_residual(d) + shift * shift * precision) / 2
    g = spread(upstream[0], reduction, mu.shape)
    gradients = {"mu": g * shift * precision, "logvar": g * np.expm1(d) / 2}
    if mu_p is not None:
        gradients["mu_p"] = -g * shift * precision
        gradients["logvar_p"] = -g * (np.expm1(d) + shift * shift * precision) / 2
    return (reduce(value, reduction),), gradients


def sample_and_kl(
    mu: ArrayLike,
    logvar: ArrayLike,
    mu_p: ArrayLike | None = None,
    logvar_p: ArrayLike | None = None,
    *,
    eps: ArrayLike,
    reduction: str = "batchmean",
    upstream: Upstream,
) -> Result:
    z, by_sample = reparameterize(mu, logvar, eps, upstream=upstream[:1])
    kl, by_kl = kl_normal(mu, logvar, mu_p, logvar_p, reduction=reduction, upstream=upstream[1:])
    return z + kl, {
        name: by_sample.get(name, real(0)) + by_kl.get(name, real(0)) for name in by_sample | by_kl
    }


def reconstruction_loss(
    recon_x: ArrayLike,
    x: ArrayLike,
    *,
    likelihood: str = "mse",
    reduction: str = "batchmean",
    upstream: Upstream,
) -> Result:
    weight = {"mse": real(1), "gaussian": real(0.5)}[likelihood]
    error = real(recon_x) - real(x)
    slope = 2 * weight * error * spread(upstream[0], reduction, error.shape)
    return (reduce(weight * error * error, reduction),), {"recon_x": slope, "x": -slope}


def vae_loss(
    recon_x: ArrayLike,
    x: ArrayLike,
    mu: ArrayLike,
    logvar: ArrayLike,
    *,
    beta: float = 1.0,
    likelihood: str = "mse",
    reduction: str = "batchmean",
    kl_reduction: str | None = None,
    upstream: Upstream,
) -> Result:
    d_loss, d_recon, d_kl = (real(0 if g is None else g) for g in upstream)
    (recon,), by_recon = reconstruction_loss(
        recon_x, x, likelihood=likelihood, reduction=reduction, upstream=[d_loss + d_recon]
    )
    (kl,), by_kl = kl_normal(
        mu, logvar, reduction=kl_reduction or reduction, upstream=[real(beta) * d_loss + d_kl]
    )
    return (recon + real(beta) * kl, recon, kl), by_recon | by_kl


# Noise

U64 = NDArray[np.uint64]
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: Sequence[U64 | int], key: tuple[int, int]) -> list[U64]:
    """Ten rounds of Philox4x32: four 32-bit words (held in uint64) for each counter."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        even, odd = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(odd >> HALF) ^ c[1] ^ k[0], odd & LOW, (even >> HALF) ^ c[3] ^ k[1], even & LOW]
        k = [
            np.uint64((int(k[0]) + 0x9E3779B9) & 0xFFFFFFFF),
            np.uint64((int(k[1]) + 0xBB67AE85) & 0xFFFFFFFF),
        ]
    return c


def normal(n: int, seed: int, offset: int = 0, start: int = 0, *, double: bool = False) -> Array:
    """Elements start .. start + n - 1 of the draw (seed, offset).

    The key is the seed, the counter's low half is the number of the group of elements that one call of Philox makes, its
    high half is `offset`. A group has four float32 elements from one word each, or two float64 ones from two words each.
    """
    group = 2 if double else 4
    first, last = start // group, (start + max(n, 1) - 1) // group
    block = np.uint64(first) + np.arange(last - first + 1, dtype=np.uint64)
    seed, offset = seed % 2**64, offset % 2**64
    w = philox4x32(
        [block & LOW, block >> HALF, offset & 0xFFFFFFFF, offset >> 32],
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    if double:
        a, b = w[0] | w[1] << HALF, w[2] | w[3] << HALF
        pairs = [((real(a >> np.uint64(11)) + 0.5) * 2.0**-53, real(b >> np.uint64(11)) * 2.0**-53)]
    else:
        pairs = [((real(w[j]) + 0.5) * 2.0**-32, real(w[j + 1]) * 2.0**-32) for j in (0, 2)]
    columns = []
    for u, turn in pairs:
        # log u keeps its digits near u = 1 only as log1p(u - 1); both uniforms are exact, and so is u - 1
        radius = np.sqrt(-2 * np.where(u < 0.5, np.log(u), np.log1p(u - 1)))
        angle = turn * (8 * np.arctan(real(1)))
        columns += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(columns, axis=1).reshape(-1)[start - first * group :][:n]
