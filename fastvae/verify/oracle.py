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
from fractions import Fraction
from typing import Any

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


def reduce(value: Array, reduction: str, weight: Array | None = None) -> Array:
    count = real(value.size)
    if weight is not None:
        value, count = np.where(weight == 0, 0, value * weight), weight.sum()
    event = tuple(range(1, value.ndim))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "none": lambda: value,
            "sample": lambda: value.sum(axis=event),
            "sum": lambda: value.sum(),
            "batchmean": lambda: np.divide(value.sum(), real(value.shape[0])),
            "mean": lambda: np.divide(value.sum(), count),
            "latent": lambda: value.sum(axis=0) / real(value.shape[0]),
            "channel": lambda: value.sum(axis=(0, *event[1:])) / real(value.shape[0]),
        }[reduction]()


def spread(
    grad: ArrayLike | None, reduction: str, shape: tuple[int, ...], weight: Array | None = None
) -> Array:
    """The gradient that each element of `shape` gets from the gradient of the reduced value."""
    if grad is None:
        return np.zeros(shape, np.longdouble)
    grad = real(grad)
    if reduction == "sample":
        grad = grad.reshape(-1, *[1] * (len(shape) - 1))
    elif reduction == "channel":
        grad = grad.reshape(-1, *[1] * (len(shape) - 2))
    if reduction in ("batchmean", "latent", "channel"):
        grad = grad / max(shape[0], 1)
    elif reduction == "mean":
        grad = grad / (max(math.prod(shape), 1) if weight is None else weight.sum())
    return np.broadcast_to(grad if weight is None else grad * weight, shape)


def times(grad: Array, derivatives: dict[str, Array], weight: Array | None) -> dict[str, Array]:
    """Each input's gradient; nothing reaches an element of weight 0."""
    with np.errstate(invalid="ignore"):
        products = {name: grad * d for name, d in derivatives.items()}
    if weight is None:
        return products
    return {name: np.where(weight == 0, 0, g) for name, g in products.items()}


def summed_to(grad: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of what was broadcast from `shape`."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    ones = tuple(i for i, n in enumerate(shape) if n == 1)
    return grad.sum(axis=ones, keepdims=True) if ones else grad


def bernoulli_numbers(count: int) -> list[Fraction]:
    """B_2, B_4, ..."""
    b = [Fraction(1)]
    for n in range(1, 2 * count + 1):
        b.append(-sum(math.comb(n + 1, k) * b[k] for k in range(n)) / (n + 1))
    return b[2::2]


BERNOULLI = bernoulli_numbers(12)

# Likelihoods: the value of an element and its derivatives by the mean (or logit, or log-rate), x, and the parameters.


def of_delta(value: Array, slope: Array, **parameters: Array) -> tuple[Array, dict[str, Array]]:
    return value, {"recon_x": slope, "x": -slope, **parameters}


def squared_error(r, x):
    return of_delta((r - x) ** 2, 2 * (r - x))


def gaussian(r, x, logvar=None, full=False):
    constant = np.log(8 * np.arctan(real(1))) / 2 if full else 0
    if logvar is None:
        return of_delta((r - x) ** 2 / 2 + constant, r - x)
    square = (r - x) ** 2 / np.exp(logvar)
    value = (logvar + square) / 2 + constant
    return of_delta(value, (r - x) / np.exp(logvar), logvar=(1 - square) / 2)


def l1(r, x):
    return of_delta(np.abs(r - x), np.sign(r - x))


def laplace(r, x, log_scale, full=False):
    scale, size = np.exp(log_scale), np.abs(r - x)
    value = log_scale + size / scale + (np.log(real(2)) if full else 0)
    return of_delta(value, np.sign(r - x) / scale, log_scale=1 - size / scale)


def huber(r, x, delta):
    inside = np.minimum(np.abs(r - x), delta)
    return of_delta(inside * (np.abs(r - x) - inside / 2), np.sign(r - x) * inside)


def charbonnier(r, x, eps):
    value = np.sqrt((r - x) ** 2 + real(eps) ** 2)
    return of_delta(value, (r - x) / value)


def student_t(r, x, df, log_scale, full=False):
    scale, df = np.exp(log_scale), real(df)
    square = ((r - x) / scale) ** 2
    pull = (df + 1) / (df + square)
    value = log_scale + (df + 1) / 2 * np.log1p(square / df)
    if full:
        normalizer = gammas(df / 2)[0] - gammas((df + 1) / 2)[0]
        value = value + normalizer + np.log(4 * np.arctan(real(1)) * df) / 2
    return of_delta(value, pull * (r - x) / scale**2, log_scale=1 - pull * square)


def bernoulli(l, x, logits=True):  # noqa: E741
    if logits:
        t = np.exp(-np.abs(l))
        value = np.maximum(l, 0) - l * x + np.log1p(t)
        return value, {"recon_x": np.where(l < 0, t, 1) / (1 + t) - x, "x": -l}
    p, yes, no = l, np.log(l), np.log1p(-l)
    value = -x * np.maximum(yes, -100) - (1 - x) * np.maximum(no, -100)
    return value, {"recon_x": (p - x) / np.maximum(p * (1 - p), real("1e-12")), "x": no - yes}


def continuous_bernoulli(l, x):  # noqa: E741
    near = np.abs(l) < 1
    d = np.where(near, l, 1)
    d = np.where(d == 0, np.sqrt(np.sqrt(np.finfo(np.longdouble).tiny)), d)  # as good as 0
    residual = exp_residual(d)  # (e^d - 1) / d is 1 + residual / d
    far = np.where(near, 1, l)
    size = np.abs(far)
    a = np.where(near, np.log1p(residual / d), np.maximum(far, 0) + np.log(-np.expm1(-size) / size))
    slope = np.where(
        near, (d * d + residual * (d - 1)) / (d * (d + residual)), -1 / np.expm1(-far) - 1 / far
    )
    return a - l * x, {"recon_x": slope - x, "x": -l}


def gammas(z):
    """log Gamma(z) and digamma(z) for z > 0: Stirling's series from 30 on, and the recurrence down to z."""
    z = real(z)
    log, psi = np.zeros_like(z), np.zeros_like(z)
    for _ in range(30):
        below = z < 30
        log = log - np.where(below, np.log(z), 0)
        psi = psi - np.where(below, 1 / z, 0)
        z = np.where(below, z + 1, z)
    log = log + (z - real(1) / 2) * np.log(z) - z + np.log(8 * np.arctan(real(1))) / 2
    psi = psi + np.log(z) - 1 / (2 * z)
    for k, b in enumerate(BERNOULLI, 1):
        b = real(b.numerator) / b.denominator
        log = log + b / (2 * k * (2 * k - 1) * z ** (2 * k - 1))
        psi = psi - b / (2 * k * z ** (2 * k))
    return log, psi


def poisson(l, x, full=False):  # noqa: E741
    constant = gammas(x + 1)[0] if full else 0
    return np.exp(l) - l * x + constant, {"recon_x": np.exp(l) - x, "x": -l}


def negative_binomial(r, x, theta=None, zero_logits=None, total_count=None):
    logits = theta is None
    theta = total_count if logits else theta
    if logits:
        p, q, log_q = 1 / (1 + np.exp(-r)), 1 / (1 + np.exp(r)), -np.logaddexp(0, r)
        log_p, by_r = r + log_q, theta * p - x * q
    else:
        p, q, log_q = r / (theta + r), theta / (theta + r), -np.log1p(r / theta)
        log_p, by_r = np.log(p), np.where(x == 0, q, q * (r - x) / r)
    (all_log, all_psi), (own_log, own_psi) = gammas(theta + x), gammas(theta)
    value = own_log + gammas(x + 1)[0] - all_log - theta * log_q - np.where(x == 0, 0, x * log_p)
    by_theta = own_psi - all_psi - log_q + (0 if logits else (x - r) / (theta + r))
    if zero_logits is None:
        return value, {"recon_x": by_r, "x": 0 * x, "theta": by_theta, "total_count": by_theta}
    l, zero = zero_logits, x == 0  # noqa: E741
    # -log(sigmoid(l) + sigmoid(-l) e^-value), and the share of the second term; near 0 as log1p of what is missing from 1
    missing = -np.expm1(-value) / (1 + np.exp(l))
    far = np.logaddexp(0, l) - np.logaddexp(l, -value)
    share = np.where(zero, 1 / (1 + np.exp(l + value)), 1)
    pi = 1 / (1 + np.exp(-l))
    return np.where(
        zero, np.where(missing < 0.5, -np.log1p(-missing), far), value + np.logaddexp(0, l)
    ), {
        "recon_x": share * by_r,
        "x": 0 * x,
        "theta": share * by_theta,
        "zero_logits": np.where(zero, -missing / (1 + np.exp(-l - value)), pi),
    }


def negative_binomial_of_few(recon_x, theta, *, x, upstream):
    """For small counts: the quotient of gamma functions is a product of x factors, which keep their digits for any theta."""
    r, k = recon_x, np.arange(x.max(), dtype=np.longdouble)[:, None]
    near, ratio = np.log1p((k - r) / (theta + r)), np.log((theta + k) / (theta + r))
    factors = np.where(np.abs(k - r) < (theta + r) / 2, near, ratio) - np.log(k + 1)
    value = theta * np.log1p(r / theta) - x * np.log(r) - np.where(k < x, factors, 0).sum(0)
    return (value,), {"recon_x": upstream[0] * theta / (theta + r) * (r - x) / r}


LIKELIHOODS = {
    "SquaredError": squared_error,
    "Gaussian": gaussian,
    "L1": l1,
    "Laplace": laplace,
    "Huber": huber,
    "Charbonnier": charbonnier,
    "StudentT": student_t,
    "Bernoulli": bernoulli,
    "ContinuousBernoulli": continuous_bernoulli,
    "Poisson": poisson,
    "NegativeBinomial": negative_binomial,
}
NAMES = {
    "mse": {"kind": "SquaredError"},
    "gaussian": {"kind": "Gaussian"},
    "l1": {"kind": "L1"},
    "bce_with_logits": {"kind": "Bernoulli"},
    "bce": {"kind": "Bernoulli", "logits": False},
    "continuous_bernoulli": {"kind": "ContinuousBernoulli"},
    "poisson": {"kind": "Poisson"},
}


def activate(l: Array, activation: str | None) -> tuple[Array, Array]:  # noqa: E741
    """The mean, and its derivative."""
    t = np.exp(-np.abs(l))
    if activation == "sigmoid":
        return np.where(l < 0, t, 1) / (1 + t), t / (1 + t) ** 2
    if activation == "tanh":
        return np.tanh(l), (2 * t / (1 + t * t)) ** 2
    return l, np.ones_like(l)


def nll(recon_x: Array, x: Array, likelihood: str | dict[str, Any]) -> tuple[Array, dict]:
    """`likelihood` is a name, or a dict of the ``kind`` and the fields of an object of `fastvae.likelihoods`."""
    fields = dict(NAMES[likelihood] if isinstance(likelihood, str) else likelihood)
    x_scale = real(fields.pop("x_scale", 1))
    with np.errstate(all="ignore"):
        mean, slope = activate(recon_x, fields.pop("activation", None))
        value, derivatives = LIKELIHOODS[fields.pop("kind")](mean, x * x_scale, **fields)
        return value, {
            **derivatives,
            "recon_x": derivatives["recon_x"] * slope,
            "x": derivatives["x"] * x_scale,
        }


# Ops


def reparameterize(
    mu: ArrayLike, logvar: ArrayLike, eps: ArrayLike, *, upstream: Upstream
) -> Result:
    mu, logvar, eps = real(mu), real(logvar), real(eps)
    sigma = np.exp(logvar / 2)
    dz = spread(upstream[0], "none", mu.shape)
    return (mu + sigma * eps,), {"mu": dz, "logvar": dz * sigma * eps / 2, "eps": dz * sigma}


def _density(z: Array, mu: Array, logvar: Array) -> tuple[Array, Array, Array]:
    """log N(z; mu, exp(logvar)), and its derivatives by mu (by z it is the negative) and by logvar."""
    precision = np.exp(-logvar)
    square = (z - mu) ** 2 * precision
    value = -(np.log(8 * np.arctan(real(1))) + logvar + square) / 2
    return value, (z - mu) * precision, (square - 1) / 2


def normal_log_prob(
    z: ArrayLike, mu: ArrayLike, logvar: ArrayLike, *, reduction: str = "sample", upstream: Upstream
) -> Result:
    z, mu, logvar = real(z), real(mu), real(logvar)
    value, by_mu, by_logvar = _density(z, mu, logvar)
    g = spread(upstream[0], reduction, z.shape)
    grads = {"z": -g * by_mu, "mu": g * by_mu, "logvar": g * by_logvar}
    return (reduce(value, reduction),), {
        n: summed_to(d, a.shape) for (n, d), a in zip(grads.items(), (z, mu, logvar), strict=True)
    }


def kl_one_sample(
    z: ArrayLike,
    mu: ArrayLike,
    logvar: ArrayLike,
    mu_p: ArrayLike,
    logvar_p: ArrayLike,
    *,
    reduction: str = "batchmean",
    upstream: Upstream,
) -> Result:
    (log_q,), of_q = normal_log_prob(z, mu, logvar, reduction=reduction, upstream=upstream)
    (log_p,), of_p = normal_log_prob(z, mu_p, logvar_p, reduction=reduction, upstream=upstream)
    grads = {"mu_p": -of_p["mu"], "logvar_p": -of_p["logvar"], "z": of_q["z"] - of_p["z"]}
    return (log_q - log_p,), of_q | grads


def kl_normal(
    mu: ArrayLike,
    logvar: ArrayLike,
    mu_p: ArrayLike | None = None,
    logvar_p: ArrayLike | None = None,
    *,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
    free_bits_per: str = "latent",
    weight: ArrayLike | None = None,
    upstream: Upstream,
) -> Result:
    mu, logvar = real(mu), real(logvar)
    mean_p = real(0 if mu_p is None else mu_p)
    log_p = real(0 if logvar_p is None else logvar_p)
    w = None if weight is None else np.broadcast_to(real(weight), mu.shape)
    d, shift, precision = logvar - log_p, mu - mean_p, np.exp(-log_p)
    value = (exp_residual(d) + shift * shift * precision) / 2
    derivatives = {"mu": shift * precision, "logvar": np.expm1(d) / 2}
    if mu_p is not None:
        derivatives["mu_p"] = -shift * precision
        derivatives["logvar_p"] = -(np.expm1(d) + shift * shift * precision) / 2
    g = spread(upstream[0], reduction, mu.shape, w)
    if free_bits and free_bits_per == "element":
        g, value = np.where(value < free_bits, 0, g), np.maximum(value, free_bits)
    if free_bits and free_bits_per == "latent":
        sums, least = reduce(value, "none", w).sum(axis=0), real(free_bits) * len(mu)
        g = np.where(sums < least, 0, g)
        total = np.maximum(sums, least).sum()
        with np.errstate(invalid="ignore"):
            total = np.divide(total, real(1 if reduction == "sum" else len(mu)))
    else:
        total = reduce(value, reduction, w)
    return (total,), times(g, derivatives, w)


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
    likelihood: str | dict[str, Any] = "mse",
    reduction: str = "batchmean",
    weight: ArrayLike | None = None,
    upstream: Upstream,
    **parameters: ArrayLike,
) -> Result:
    """The likelihood's parameters come as ``likelihood.<field>``, and so do their gradients."""
    recon_x, x = real(recon_x), real(x)
    if parameters:
        likelihood = dict(likelihood) | {k.split(".")[1]: real(v) for k, v in parameters.items()}
    w = None if weight is None else np.broadcast_to(real(weight), x.shape)
    value, derivatives = nll(recon_x, x, likelihood)
    g = spread(upstream[0], reduction, x.shape, w)
    gradients = times(g, derivatives, w)
    by_parameters = {
        k: summed_to(gradients[k.split(".")[1]], np.shape(v)) for k, v in parameters.items()
    }
    by_images = {k: gradients[k] for k in ("recon_x", "x")}
    return (reduce(value, reduction, w),), by_images | by_parameters


def vae_loss(
    recon_x: ArrayLike,
    x: ArrayLike,
    mu: ArrayLike,
    logvar: ArrayLike,
    *,
    beta: float = 1.0,
    likelihood: str | dict[str, Any] = "mse",
    reduction: str = "batchmean",
    kl_reduction: str | None = None,
    weight: ArrayLike | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "latent",
    upstream: Upstream,
    **parameters: ArrayLike,
) -> Result:
    d_loss, d_recon, d_kl = (real(0 if g is None else g) for g in upstream)
    (recon,), by_recon = reconstruction_loss(
        recon_x,
        x,
        likelihood=likelihood,
        reduction=reduction,
        weight=weight,
        upstream=[d_loss + d_recon],
        **parameters,
    )
    (kl,), by_kl = kl_normal(
        mu,
        logvar,
        reduction=kl_reduction or reduction,
        free_bits=free_bits,
        free_bits_per=free_bits_per,
        upstream=[real(beta) * d_loss + d_kl],
    )
    return (recon + real(beta) * kl, recon, kl), by_recon | by_kl


# The discretized mixture of logistics


def sigmoid(z: Array) -> Array:
    t = np.exp(-np.abs(z))
    return np.where(z < 0, t, 1) / (1 + t)


def softmax(z: Array) -> Array:
    p = np.exp(z - z.max(axis=0))
    return p / p.sum(axis=0)


def logistic_mixture(
    recon_x: ArrayLike,
    x: ArrayLike,
    *,
    components: int = 10,
    channel_dim: int = 1,
    bins: int = 256,
    x_range: tuple[float, float] = (-1, 1),
    edges: tuple[float, float] = (-0.999, 0.999),
    least_log_scale: float = -7,
    reduction: str = "batchmean",
    weight: ArrayLike | None = None,
    upstream: Upstream,
) -> Result:
    """The parameters in their order are the logits, then for each channel means, log-scales and coefficients."""
    p, low, high = np.moveaxis(real(recon_x), channel_dim, 0), real(x_range[0]), real(x_range[1])
    data = 2 * (np.moveaxis(real(x), channel_dim, 0) - low) / (high - low) - 1
    count, (logits, *rest) = len(data), np.split(p, len(p) // components)
    per = 3 if count == 3 else 2
    means, log_scales = [*rest[::per]], rest[1::per]
    tanh = [np.tanh(c) for c in rest[2::3]] if count == 3 else []
    if count == 3:
        means[1] = means[1] + tanh[0] * data[0]
        means[2] = means[2] + tanh[1] * data[0] + tanh[2] * data[1]
    half, joint, by_mean, by_scale = 1 / real(bins - 1), logits, [], []
    for mean, given, z in zip(means, log_scales, data, strict=True):
        log_scale = np.maximum(given, least_log_scale)
        i = np.exp(-log_scale)
        a, b, y = i * (z - mean + half), i * (z - mean - half), 2 * half * i
        first, last = np.broadcast_to(z < edges[0], a.shape), np.broadcast_to(z > edges[1], a.shape)
        # log sigma(a), log sigma(-b), and the rest of log(sigma(a) - sigma(b))
        below, above, between = -np.logaddexp(0, -a), -np.logaddexp(0, b), np.log(-np.expm1(-y))
        inside = below + above + between
        joint = joint + np.where(first, below, np.where(last, above, inside))
        from_below = np.where(last, 0, sigmoid(-a))
        from_above = np.where(first, 0, sigmoid(b))
        from_width = np.where(first | last, 0, y * np.exp(-y) / -np.expm1(-y))
        by_mean.append(-i * (from_below - from_above))
        with np.errstate(invalid="ignore"):
            slope = b * from_above - a * from_below - from_width
        by_scale.append(np.where(given < least_log_scale, 0, slope))
    posterior = softmax(joint)
    m = joint.max(axis=0)
    value = logits.max(axis=0) + np.log(np.exp(logits - logits.max(axis=0)).sum(axis=0))
    value = value - m - np.log(np.exp(joint - m).sum(axis=0))

    g_mean, g_scale = ([-posterior * d for d in ds] for ds in (by_mean, by_scale))
    g_x = [-g.sum(axis=0) for g in g_mean]
    parts = [softmax(logits) - posterior]
    uses = ((1, 0), (2, 0), (2, 1))  # which coefficient is in whose mean, of which channel
    for c in range(count):
        parts += [g_mean[c], g_scale[c]]
        if count == 3:
            to, of = uses[c]
            parts.append(g_mean[to] * data[of] * (1 - tanh[c] ** 2))
            g_x[of] = g_x[of] + (g_mean[to] * tanh[c]).sum(axis=0)
    w = None
    if weight is not None:
        w = np.broadcast_to(real(weight), np.shape(x)).take(0, channel_dim)
    each = count if reduction == "mean" else 1
    g = spread(upstream[0], reduction, value.shape, w) / each
    absent = False if w is None else w == 0
    by = {"recon_x": np.concatenate(parts), "x": np.stack(g_x) * 2 / (high - low)}
    gradients = {k: np.moveaxis(np.where(absent, 0, g * d), 0, channel_dim) for k, d in by.items()}
    return (reduce(value, reduction, w) / each,), gradients


# Noise

# Random123's known answers for philox4x32-10: counter, key, output
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
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


# Pairs of samples and components. The arithmetic is longdouble's, with all pairs in memory.


def shares(exponents: Array) -> tuple[Array, Array]:
    """logsumexp over axis 1, and each one's share of the sum."""
    largest = exponents.max(axis=1, keepdims=True)
    terms = np.exp(exponents - largest)
    total = terms.sum(axis=1, keepdims=True)
    return (largest + np.log(total)).squeeze(1), terms / total


def aggregate_posterior(z, mu, logvar, log_weight, upstream, own=None) -> Result:
    """log q and its marginals; `own` is a gradient of log N(z_i; mu_i, exp(logvar_i))."""
    z, mu, logvar, log_weight = map(real, (z, mu, logvar, log_weight))
    weight = np.broadcast_to(log_weight, (len(z), len(mu)))
    t = (z[:, None] - mu) / np.exp(logvar / 2)
    log_prob = -(np.log(8 * np.arctan(real(1))) + logvar + t**2) / 2
    log_q, share = shares(log_prob.sum(axis=2) + weight)
    log_q_dims, share_dims = shares(log_prob + weight[:, :, None])
    g, h = (real(0) if u is None else real(u) for u in upstream)
    d_joint = np.broadcast_to(g, len(z))[:, None] * share
    d_dims = np.broadcast_to(h, z.shape)[:, None] * share_dims
    d_log_prob = d_joint[:, :, None] + d_dims
    if own is not None:
        index = np.arange(len(z))
        d_log_prob[index, index] += real(own)[:, None]
    pull = d_log_prob * t / np.exp(logvar / 2)
    d_weight = d_joint + d_dims.sum(axis=2)
    gradients = {
        "z": -pull.sum(axis=1),
        "mu": pull.sum(axis=0),
        "logvar": (d_log_prob * (t**2 - 1) / 2).sum(axis=0),
        "log_weight": summed_to(d_weight, log_weight.shape),
    }
    return (log_q, log_q_dims, log_prob), gradients


def kl_decomposition(z, mu, logvar, dataset_size, estimator, reduction, upstream) -> Result:
    n, b, k = real(dataset_size), len(z), len(mu)
    weight = np.full((b, k), (n - 1) / (n * max(k - 1, 1)))
    weight[np.arange(b), np.arange(b)] = 1 / n
    if estimator == "weighted":
        weight = np.full((b, k), 1 / (n * k))
    spread_to = [spread(u, reduction, (b,)) for u in upstream]
    mi, tc, dim = spread_to
    h = np.broadcast_to((dim - tc)[:, None], np.shape(z))
    (log_q, log_q_dims, log_prob), gradients = aggregate_posterior(
        z, mu, logvar, np.log(weight), (tc - mi, h), own=mi
    )
    del gradients["log_weight"]
    gradients["z"] = gradients["z"] + dim[:, None] * real(z)
    log_p = -(np.log(8 * np.arctan(real(1))) + real(z) ** 2).sum(axis=1) / 2
    own, log_prod = log_prob.sum(axis=2)[np.arange(b), np.arange(b)], log_q_dims.sum(axis=1)
    terms = (own - log_q, log_q - log_prod, log_prod - log_p)
    return tuple(reduce(t, reduction) for t in terms), gradients


def mixture_log_prob(z, mu, logvar, log_weight, factorized, upstream) -> Result:
    upstream = (None, *upstream) if factorized else (*upstream, None)
    outputs, gradients = aggregate_posterior(z, mu, logvar, log_weight, upstream)
    return outputs[factorized : factorized + 1], gradients


# Gaussians of full covariance, importance weights


def inverse(factor: Array) -> Array:
    """Of lower triangles [..., L, L], by forward substitution: numpy.linalg knows no longdouble."""
    rows = []
    eye = np.broadcast_to(np.eye(factor.shape[-1], dtype=np.longdouble), factor.shape)
    for i in range(factor.shape[-1]):
        known = sum(factor[..., i, j, None] * rows[j] for j in range(i))
        rows.append((eye[..., i, :] - known) / factor[..., i, i, None])
    return np.stack(rows, axis=-2)


def kl_multivariate_normal(
    mu, scale_tril, mu_p=None, scale_tril_p=None, *, reduction="batchmean", upstream
) -> Result:
    """Rasmussen and Williams, *Gaussian Processes for Machine Learning* (2006), equation A.23."""
    m, t, length = real(mu), np.tril(real(scale_tril)), np.shape(mu)[-1]
    eye = np.broadcast_to(np.eye(length, dtype=np.longdouble), t.shape)
    m_p, t_p = (0 * m, eye) if mu_p is None else (real(mu_p), np.tril(real(scale_tril_p)))
    root = inverse(t_p)
    precision, apart = np.swapaxes(root, -1, -2) @ root, (m - m_p)[..., None]
    diagonal, diagonal_p = (np.einsum("...ii->...i", x) for x in (t, t_p))
    squares = ((root @ t) ** 2).sum((-2, -1)) + ((root @ apart) ** 2).sum((-2, -1))
    value = (squares - length) / 2 - np.log(diagonal / diagonal_p).sum(-1)
    by_mu = (precision @ apart)[..., 0]
    covariance = t @ np.swapaxes(t, -1, -2) + apart @ np.swapaxes(apart, -1, -2)
    by_t = np.tril(precision @ t) - eye / diagonal[..., None]
    by_t_p = eye / diagonal_p[..., None] - np.tril(precision @ covariance @ precision @ t_p)
    g = spread(upstream[0], reduction, value.shape) / (length if reduction == "mean" else 1)
    gradients = {"mu": g[..., None] * by_mu, "scale_tril": g[..., None, None] * by_t}
    if mu_p is not None:
        gradients |= {"mu_p": -gradients["mu"], "scale_tril_p": g[..., None, None] * by_t_p}
    return (reduce(value, reduction) / (length if reduction == "mean" else 1),), gradients


def sample_and_kl_multivariate_normal(mu, scale_tril, *prior, eps, upstream, **options) -> Result:
    kl, gradients = kl_multivariate_normal(mu, scale_tril, *prior, upstream=upstream[1:], **options)
    t, eps = np.tril(real(scale_tril)), real(eps)
    dz = spread(upstream[0], "none", eps.shape)
    gradients["mu"] = gradients["mu"] + dz
    gradients["scale_tril"] = gradients["scale_tril"] + np.tril(dz[..., None] * eps[..., None, :])
    gradients["eps"] = (np.swapaxes(t, -1, -2) @ dz[..., None])[..., 0]
    return (real(mu) + (t @ eps[..., None])[..., 0], *kl), gradients


def iwae_loss(log_weight, *, upstream) -> Result:
    """-log of the mean of K weights, a mean over the batch."""
    log_sum, share = shares(real(log_weight))
    loss = np.log(real(np.shape(log_weight)[1])) - log_sum
    return (loss.mean(),), {"log_weight": -spread(upstream[0], "batchmean", share.shape) * share}
