"""kl_divergence beside known values, torch.distributions in float64, 40 digits and numerical integrals."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.distributions as dist
from accuracy import to_numpy, varied
from cases import tensor
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

import fastvae
from fastvae import kl_divergence


def number(value: float) -> Tensor:
    return tensor(value, torch.float32)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Normal:
    """Some Normal."""
    rng = np.random.default_rng([5, *shape])
    return Normal(tensor(rng.normal(size=shape), dtype), tensor(rng.uniform(0.2, 3, shape), dtype))


def mvn(*shape: int) -> MultivariateNormal:
    rng = np.random.default_rng([6, *shape])
    a = rng.normal(size=(*shape, shape[-1]))
    covariance = a @ np.swapaxes(a, -1, -2) + 0.3 * np.eye(shape[-1])
    return MultivariateNormal(
        tensor(rng.normal(size=shape), torch.float64), tensor(covariance, torch.float64)
    )


STANDARD = Normal(number(0.0), number(1.0))
KNOWN = [  # hand-computed; the asymmetry, and infinity
    (Normal(number(1.0), number(2.0)), STANDARD, 1.306853),
    (STANDARD, Normal(number(1.0), number(2.0)), 0.443147),
    (dist.Uniform(number(0.0), number(1.0)), STANDARD, math.log(2 * math.pi) / 2 + 1 / 6),
    (STANDARD, dist.Uniform(number(0.0), number(1.0)), math.inf),
    (dist.Uniform(number(-2.0), number(2.0)), Normal(number(0.0), number(2 / 3**0.5)), 0.176486),
    (dist.Bernoulli(number(0.3)), dist.Bernoulli(number(0.6)), 0.183787),
]


@pytest.mark.parametrize(("q", "p", "want"), KNOWN, ids=str)
def test_known_values(q, p, want):
    kl = kl_divergence(q, p)
    assert kl.shape == ()
    assert kl.item() == pytest.approx(want, abs=2e-6)


def test_correlated_gaussians_both_ways():
    q = MultivariateNormal(torch.zeros(2), torch.tensor([[1, 0.5], [0.5, 1]]))
    p = MultivariateNormal(torch.tensor([1.0, 0.0]), torch.eye(2))
    apart = Independent(Normal(p.loc, torch.ones(2)), 1)
    for other in (p, apart, Normal(p.loc, number(1.0))):
        assert kl_divergence(q, other).item() == pytest.approx(0.643841, abs=2e-6)
        assert kl_divergence(other, q).item() == pytest.approx(0.856159, abs=2e-6)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 1.0, 30.0])
def test_gaussians_against_the_integral(sigma):
    q, p = stats.norm(0.7, sigma), stats.norm(-0.3, 1.4)
    want, _ = integrate.quad(
        lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), 0.7 - 12 * sigma, 0.7 + 12 * sigma
    )
    kl = kl_divergence(Normal(number(0.7), number(sigma)), Normal(number(-0.3), number(1.4)))
    assert kl.item() == pytest.approx(want, rel=1e-5)


PAIRS = {
    "normals": (normal(4, 3), normal(4, 3)),
    "a shared prior": (normal(4, 3), normal(3)),
    "more of the prior": (normal(3), normal(4, 3)),
    "a number": (normal(4, 3), normal()),
    "numbers": (normal(), normal()),
    "independent": (Independent(normal(4, 3), 1), Independent(normal(3), 1)),
    "independent, two": (Independent(normal(5, 2, 3), 2), Independent(normal(2, 3), 2)),
    "a larger batch": (Independent(normal(5, 2, 3), 1), Independent(normal(5, 2, 3), 1)),
    "nested": tuple(Independent(Independent(d, 1), 1) for d in (normal(5, 2, 3), normal(2, 3))),
    "no batch": (Independent(normal(3), 1), Independent(normal(3), 1)),
    "full": (mvn(4, 3), mvn(4, 3)),
    "full, a shared prior": (mvn(5, 2, 3), mvn(3)),
    "full, no batch": (mvn(3), mvn(3)),
    "full in Independent": (Independent(mvn(5, 2, 3), 1), Independent(mvn(2, 3), 1)),
    "laplace": (
        dist.Laplace(normal(4, 3).loc, normal(4, 3).scale),
        dist.Laplace(normal(3).loc, normal(3).scale),
    ),
    "gamma": (dist.Gamma(normal(4).scale, normal(4).scale), dist.Gamma(2.0, 1.0)),
}


def reduced(each: Tensor) -> dict[str, Tensor]:
    """By the documentation's words."""
    batch = each.shape[0] if each.dim() else 1
    rows = each.reshape(batch, -1).sum(1)
    return {
        "none": each,
        "sample": rows if each.dim() else rows[0],
        "sum": each.sum(),
        "batchmean": each.sum() / batch,
        "mean": each.mean(),
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_reductions(pair):
    q, p = PAIRS[pair]
    each = dist.kl_divergence(q, p)
    for reduction, want in reduced(each).items():
        got = kl_divergence(q, p, reduction=reduction)
        assert got.shape == want.shape, reduction
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-12, atol=1e-14)
    assert torch.equal(kl_divergence(q, p), kl_divergence(q, p, num_samples=3))  # not needed


def test_gaussians_of_two_kinds():
    """Independent beside MultivariateNormal, and a Normal that stands for components, which torch does not know."""
    factors, full = normal(4, 3), mvn(4, 3)
    as_full = MultivariateNormal(factors.loc, scale_tril=torch.diag_embed(factors.scale))
    for other in (factors, Independent(factors, 1)):
        torch.testing.assert_close(kl_divergence(other, full), dist.kl_divergence(as_full, full))
        torch.testing.assert_close(kl_divergence(full, other), dist.kl_divergence(full, as_full))
    want = kl_divergence(factors, normal(3))
    torch.testing.assert_close(kl_divergence(Independent(factors, 1), normal(3)), want)
    torch.testing.assert_close(kl_divergence(factors, Independent(normal(3), 1)), want)
    one = kl_divergence(full, STANDARD)
    eye = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    torch.testing.assert_close(one, dist.kl_divergence(full, eye))


@pytest.mark.parametrize("reduction", ["none", "sample", "sum", "batchmean", "mean"])
def test_gradients(reduction):
    """To all four parameters, for an upstream gradient other than 1, beside torch's own in float64."""
    values = [t for d in (normal(4, 3), normal(3)) for t in (d.loc, d.scale)]

    def gradients(kl):
        leaves = [t.clone().requires_grad_() for t in values]
        result = kl(*leaves)
        return torch.autograd.grad(result, leaves, varied(result.shape, result.dtype))

    def ours(a, b, c, d):
        return kl_divergence(Normal(a, b), Normal(c, d), reduction=reduction)

    def torchs(a, b, c, d):
        return reduced(dist.kl_divergence(Normal(a, b), Normal(c, d)))[reduction]

    for got, want in zip(gradients(ours), gradients(torchs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradgradcheck(ours, [t.clone().requires_grad_() for t in values])


@pytest.mark.parametrize("delta", [1e-4, -3e-4, 1e-2])
def test_digits_near_the_prior(delta):
    """In float32, where torch's own of a MultivariateNormal is off by a multiple of the value, or a good part of it."""
    sigma = number(1 + delta)
    with mpmath.workdps(40):
        s = mpmath.mpf(sigma.item())
        want = float((s * s - 1) / 2 - mpmath.log(s))
    eye = MultivariateNormal(torch.zeros(3), torch.eye(3))
    near = MultivariateNormal(torch.zeros(3), scale_tril=sigma * torch.eye(3))
    for kl, times in (
        (kl_divergence(Normal(number(0.0), sigma), STANDARD), 1),
        (kl_divergence(Independent(Normal(torch.zeros(3), sigma), 1), eye), 3),
        (kl_divergence(near, eye), 3),
    ):
        assert kl.item() == pytest.approx(times * want, rel=1e-6)
    if abs(delta) < 1e-3:
        assert abs(dist.kl_divergence(near, eye).item() / (3 * want) - 1) > 0.05


def test_16_bits():
    q = normal(4, 3)
    low = Normal(q.loc.bfloat16(), q.scale.bfloat16())
    want = dist.kl_divergence(Normal(low.loc.double(), low.scale.double()), normal())
    assert kl_divergence(low, Normal(0.0, 1.0)).dtype == torch.float32
    torch.testing.assert_close(
        kl_divergence(low, normal(), reduction="none"), want, rtol=1e-6, atol=1e-7
    )


# Monte-Carlo


def test_monte_carlo_only_on_demand():
    t, p = dist.StudentT(number(5.0)), Normal(number(0.2), number(1.5))
    with pytest.raises(NotImplementedError, match=r"StudentT and Normal; give num_samples="):
        kl_divergence(t, p)
    one, other = stats.t(5), stats.norm(0.2, 1.5)
    want, _ = integrate.quad(
        lambda z: one.pdf(z) * (one.logpdf(z) - other.logpdf(z)), -np.inf, np.inf
    )
    kl = kl_divergence(t, p, num_samples=200_000)
    assert kl.shape == ()
    assert kl.item() == pytest.approx(want, abs=0.01)


def mixture(logits: Tensor, loc: Tensor) -> dist.MixtureSameFamily:
    return dist.MixtureSameFamily(
        dist.Categorical(logits=logits), Normal(loc, torch.ones_like(loc) * 0.6)
    )


def test_the_gradient_of_an_estimate_is_unbiased():
    """Of a mixture as q, which cannot be differentiated through its samples, and as p, beside the integral's."""
    logits, loc = torch.tensor([0.3, -0.4]).double(), torch.tensor([-1.0, 1.2]).double()
    p = Normal(torch.tensor(0.5).double(), torch.tensor(1.3).double())
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)

    for swapped in (False, True):
        leaves = [t.clone().requires_grad_() for t in (logits, loc)]
        pair = (p, mixture(*leaves)) if swapped else (mixture(*leaves), p)
        log_q, log_p = (d.log_prob(grid) for d in pair)
        exact = torch.trapezoid(log_q.exp() * (log_q - log_p), grid)
        want = torch.autograd.grad(exact, leaves, retain_graph=True)
        estimate = kl_divergence(*pair, num_samples=400_000)
        got = torch.autograd.grad(estimate, leaves)
        assert estimate.item() == pytest.approx(exact.item(), abs=5e-3)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=8e-3)


def test_an_infinite_estimate_is_infinite():
    q = mixture(torch.zeros(2, requires_grad=True), torch.tensor([-1.0, 1.2]))
    p = dist.Uniform(number(-0.5), number(0.5), validate_args=False)
    assert kl_divergence(q, p, num_samples=100).item() == math.inf


def test_an_estimate_with_a_batch():
    q, p = dist.StudentT(torch.full((4, 3), 5.0)), Normal(torch.zeros(3), number(1.0))
    assert kl_divergence(q, p, num_samples=7).shape == (4,)
    assert kl_divergence(q, p, num_samples=7, reduction="none").shape == (4, 3)


# Errors

Q = Normal(torch.zeros(4, 3), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("q", "p", "options", "error", "match"),
    [
        (Q.loc, Q, {}, TypeError, "q must be a torch.distributions.Distribution, but got Tensor"),
        (Q, None, {}, TypeError, "p must be a torch.distributions.Distribution, but got NoneType"),
        (Q, Q, {"reduction": "latent"}, ValueError, 'reduction must be .* but got "latent"'),
        (Q, Q, {"num_samples": 0}, ValueError, "num_samples must be an integer above 0.*got 0"),
        (Q, Q, {"num_samples": 2.5}, ValueError, "num_samples must be an integer above 0.*got 2.5"),
        (Q, normal(2), {}, ValueError, r"batch shapes that broadcast.*\[4, 3\] and \[2\]"),
        (
            Independent(Q, 1),
            Independent(normal(4, 1), 1),
            {},
            ValueError,
            r"events \[3\] and \[1\]",
        ),
        (
            Independent(normal(5, 2, 3), 1),
            Independent(normal(5, 2, 3), 2),
            {},
            ValueError,
            r"events \[3\] and \[2, 3\]",
        ),
        (mvn(3), mvn(1), {}, ValueError, r"events \[3\] and \[1\]"),
        (
            Independent(dist.StudentT(torch.full((4, 3), 5.0)), 1),
            Q,
            {"num_samples": 4},
            ValueError,
            r"one event shape, but got \[3\] and \[\]; .*Independent",
        ),
    ],
)
def test_errors(q, p, options, error, match):
    with pytest.raises(error, match=f"^fastvae.kl_divergence: .*{match}"):
        kl_divergence(q, p, **options)


# torch's registry


@pytest.fixture
def registered():
    fastvae.distributions.register()
    yield
    fastvae.distributions.unregister()


def test_register(registered):
    """torch.distributions.kl_divergence gets the digits and the pairs; all else is as it was."""
    fastvae.distributions.register()  # twice is once
    sigma = number(1 + 1e-4)
    got = dist.kl_divergence(Normal(number(0.0), sigma), STANDARD)
    assert torch.equal(got, kl_divergence(Normal(number(0.0), sigma), STANDARD))
    for name in PAIRS:
        q, p = PAIRS[name]
        got = dist.kl_divergence(q, p)
        torch.testing.assert_close(got, kl_divergence(q, p, reduction="none"), rtol=0, atol=0)
    factors = Independent(normal(4, 3), 1)
    for q, p in ((factors, mvn(4, 3)), (mvn(4, 3), factors)):
        assert torch.equal(dist.kl_divergence(q, p), kl_divergence(q, p))
    laplace = Independent(PAIRS["laplace"][0], 1)
    torch.testing.assert_close(
        dist.kl_divergence(laplace, laplace), torch.zeros(4, dtype=torch.float64)
    )
    with pytest.raises(NotImplementedError):
        dist.kl_divergence(laplace, mvn(4, 3))


def test_unregister():
    before = dict(dist.kl._KL_REGISTRY)
    fastvae.distributions.unregister()  # of nothing
    fastvae.distributions.register()
    assert before != dist.kl._KL_REGISTRY
    dist.kl_divergence(normal(3), normal(3))
    fastvae.distributions.unregister()
    assert before == dist.kl._KL_REGISTRY
    sigma = number(1 + 1e-4)
    torchs = dist.kl_divergence(Normal(number(0.0), sigma), STANDARD)
    assert not torch.equal(torchs, kl_divergence(Normal(number(0.0), sigma), STANDARD))
    if (Independent, MultivariateNormal) in before:  # another library's, such as pyro's
        return
    with pytest.raises(NotImplementedError):
        dist.kl_divergence(Independent(normal(4, 3), 1), mvn(4, 3))


def test_a_subclass_keeps_what_torch_has_for_it(registered):
    class Mine(Normal):
        pass

    q = Mine(number(0.0), number(2.0))
    assert kl_divergence(q, STANDARD).item() == pytest.approx(1.5 - math.log(2), rel=1e-6)


def test_compiled():
    def kl(mu, sigma):
        q = Independent(Normal(mu, sigma, validate_args=False), 1, validate_args=False)
        return kl_divergence(q, Normal(0.0, 1.0, validate_args=False))

    q = normal(4, 3, dtype=torch.float32)
    compiled = torch.compile(kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q.loc, q.scale), kl(q.loc, q.scale))
    assert to_numpy(kl(q.loc, q.scale)).shape == (4,)
