"""Likelihoods of counts where lgamma has no digits left, against mpmath in 60 digits; impossible data; and their limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from cases import elementary
from scipy import stats
from torch import Tensor

from fastvae import likelihoods, reconstruction_loss, vae_loss

REAL = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Of float32; float64 is held to as many of its own units.
VALUE, MEAN, THETA = 2e-6, 1e-6, 5e-6
LEAST = 1e-30  # what is less may be so by this much: in float32 its terms underflow
FINER = {torch.float32: 1.0, torch.float64: 2.0**-29}


def points() -> np.ndarray:
    """x, mu, theta: a grid of hard ones and random ones, some of them near x = mu."""
    rng = np.random.default_rng(11)
    hard = [0, 1, 2, 7, 90, 3000, 1e6], [2e-8, 3e-3, 0.4, 1.7, 60, 9e4]
    grid = np.array([*itertools.product(*hard, [1e-4, 0.03, 0.6, 0.98, 1.3, 20, 7e4, 2e8, 1e12])])
    log_uniform = 10 ** rng.uniform([0, -8, -4], [6, 5, 12], (300, 3))
    log_uniform[:, 0] = log_uniform[:, 0].round()
    near = log_uniform[:100].copy()
    near[:, 1] = near[:, 0] + rng.normal(0, 1, 100) * np.sqrt(near[:, 0])
    return np.concatenate([grid, log_uniform, near[near[:, 1] > 0]])


def truth(x: Any, mu: Any, theta: Any) -> tuple[Any, Any, Any, Any]:
    """The nll, its derivatives by mu and by theta, and the size of the terms of the last."""
    x, mu, theta = (mp.mpf(float(v)) for v in (x, mu, theta))
    nll = mp.loggamma(theta) + mp.loggamma(x + 1) - mp.loggamma(theta + x)
    nll += theta * mp.log1p(mu / theta) + x * mp.log1p(theta / mu)
    psi, log, line = (
        mp.digamma(theta) - mp.digamma(theta + x),
        mp.log1p(mu / theta),
        (x - mu) / (theta + mu),
    )
    terms = max(abs(psi), log, abs(line))
    if theta >= 1 and x > 0:

        def chi(z: Any) -> Any:
            return mp.log(z) - 1 / (2 * z) - mp.digamma(z)

        terms = line - mp.log1p(line) + x / (2 * theta * (theta + x)) + chi(theta) + chi(theta + x)
    elif x == 0:
        terms = abs(log + line)
    return nll, theta * (mu - x) / (mu * (theta + mu)), psi + log + line, terms


def evaluated(likelihood: Any, recon_x: Tensor, x: Tensor) -> tuple[np.ndarray, ...]:
    """The nll of each element, and its gradients by recon_x and the parameters."""
    leaves = [recon_x, *likelihood.parameters]
    nll = reconstruction_loss(recon_x, x, likelihood=likelihood, reduction="none")
    gradients = torch.autograd.grad(nll.sum(), [t for t in leaves if t.requires_grad])
    return tuple(t.detach().double().numpy() for t in (nll, *gradients))


def off(got: np.ndarray, want: list[Any], size: list[Any] | None = None) -> float:
    sizes = want if size is None else size
    errors = [
        float(abs(mp.mpf(float(g)) - w) / max(abs(s), LEAST))
        for g, w, s in zip(got, want, sizes, strict=True)
    ]
    return max(errors)


@REAL
def test_negative_binomial(dtype):
    with mp.workdps(60):
        x, mu, theta = torch.tensor(points().T, dtype=dtype)
        mu, theta = mu.requires_grad_(), theta.requires_grad_()
        got = evaluated(likelihoods.NegativeBinomial(theta), mu, x)
        rows = zip(x.tolist(), mu.tolist(), theta.tolist(), strict=True)
        nll, d_mu, d_theta, terms = zip(*[truth(*row) for row in rows], strict=True)
        finer = FINER[dtype]
        assert off(got[0], nll) <= VALUE * finer
        assert off(got[1], d_mu) <= MEAN * finer
        assert off(got[2], d_theta, terms) <= THETA * finer


@REAL
@pytest.mark.parametrize("logit", [-100.0, -30.0, -2.0, -0.01, 0.7, 25.0, 100.0])
def test_zero_inflated(dtype, logit):
    """At 0; q^theta down to 1e-30, since what lies below has fewer digits in its logarithm's rounding alone."""
    with mp.workdps(60):
        x, mu, theta = torch.tensor(points().T, dtype=dtype)
        few = (theta * torch.log1p(mu / theta) < 20) & (x == 0)
        mu, theta = mu[few].requires_grad_(), theta[few].requires_grad_()
        logits = torch.full_like(mu, logit).requires_grad_()
        got = evaluated(likelihoods.NegativeBinomial(theta, logits), mu, torch.zeros_like(mu))
        want = []
        for m, t in zip(mu.tolist(), theta.tolist(), strict=True):
            nll, d_mu, _, _ = truth(0, m, t)
            pi, rest = 1 / (1 + mp.exp(-mp.mpf(logit))), 1 / (1 + mp.exp(mp.mpf(logit)))
            p, missing = pi + rest * mp.exp(-nll), -rest * mp.expm1(-nll)
            share = rest * mp.exp(-nll) / p
            want.append((-mp.log1p(-missing), share * d_mu, -missing * pi / p))
        nll, d_mu, d_logit = zip(*want, strict=True)
        finer = FINER[dtype]
        assert off(got[0], nll) <= VALUE * finer
        assert off(got[1], d_mu) <= MEAN * finer
        assert off(got[3], d_logit) <= MEAN * finer


def test_all_probabilities_sum_to_one():
    """72 pairs; what lies beyond the last count is scipy's."""
    x = torch.arange(1 << 17, dtype=torch.float32)[None]
    for theta in (1e-2, 0.1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6):
        mu = 10 ** torch.arange(-3, 5, dtype=torch.float32)[:, None]
        theta32 = torch.tensor(theta)
        nll = reconstruction_loss(
            mu.expand(-1, x.numel()),
            x.expand(len(mu), -1),
            likelihood=likelihoods.NegativeBinomial(theta32),
            reduction="none",
        )
        t, m = theta32.double().numpy(), mu[:, 0].double().numpy()
        beyond = stats.nbinom.sf(x.numel() - 1, t, t / (t + m))
        total = torch.exp(-nll.double()).sum(1).numpy() + beyond
        assert np.abs(np.log(total)).max() <= 1e-5, theta


@REAL
def test_is_scipys(dtype):
    rng = np.random.default_rng(5)
    mu, theta = rng.uniform(0.1, 20, (2, 500))
    x = rng.poisson(mu)
    want = -stats.nbinom.logpmf(x, theta, theta / (theta + mu))
    likelihood = likelihoods.NegativeBinomial(torch.tensor(theta, dtype=dtype))
    got = reconstruction_loss(
        torch.tensor(mu, dtype=dtype), torch.tensor(x), likelihood=likelihood, reduction="none"
    )
    np.testing.assert_allclose(got, want, rtol=5e-7 if dtype == torch.float32 else 1e-12)


@REAL
@pytest.mark.parametrize("inflated", [False, True])
def test_an_element_does_not_see_its_neighbours(dtype, inflated):
    """The CPU packs the counts above 0 where there are few of them: ordered by x, there are only such or none."""
    rng = np.random.default_rng(23)
    n = 3 * 512 + 37
    x = torch.from_numpy(rng.poisson(4, n) * (rng.uniform(size=n) < 0.2)).to(dtype)
    of = {"dtype": dtype, "requires_grad": True}
    mu, theta = (torch.tensor(rng.lognormal(0, 1, n), **of) for _ in range(2))
    zero_logits = torch.tensor(rng.normal(0, 2, n), **of) if inflated else None
    given = [mu, theta, *([] if zero_logits is None else [zero_logits])]

    def evaluate(order: Tensor) -> list[Tensor]:
        at = [t.detach()[order].requires_grad_() for t in given]
        likelihood = likelihoods.NegativeBinomial(at[1], zero_logits=at[2] if inflated else None)
        nll = reconstruction_loss(at[0], x[order], likelihood=likelihood, reduction="none")
        return [nll.detach(), *torch.autograd.grad(nll.sum(), at)]

    mixed, ordered = evaluate(torch.arange(n)), evaluate(order := x.argsort())
    for got, want in zip(ordered, mixed, strict=True):
        torch.testing.assert_close(got, want[order], rtol=0, atol=0)


def test_limits():
    """A large theta is Poisson's; zero_logits of -inf are none; and the expected score is 0."""
    mu, x = torch.tensor([0.3, 4.0, 50.0]), torch.tensor([0, 3, 61])
    poisson = reconstruction_loss(
        mu.log(), x, likelihood=likelihoods.Poisson(full=True), reduction="none"
    )
    for theta in (1e12, 1e30, math.inf):
        one = likelihoods.NegativeBinomial(theta)
        got = reconstruction_loss(mu, x, likelihood=one, reduction="none")
        torch.testing.assert_close(got, poisson, rtol=1e-6, atol=0)
    plain, inflated = (
        reconstruction_loss(mu, x, likelihood=likelihoods.NegativeBinomial(2.0, z))
        for z in (None, -math.inf)
    )
    torch.testing.assert_close(inflated, plain, rtol=1e-6, atol=0)
    every = torch.arange(3000.0, dtype=torch.float64)[None]
    m, t = (torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (7.0, 0.6))
    nll = reconstruction_loss(
        m.expand_as(every), every, likelihood=likelihoods.NegativeBinomial(t), reduction="none"
    )
    score = torch.autograd.grad((nll * torch.exp(-nll.detach())).sum(), (m, t))
    assert all(abs(g.item()) < 1e-12 for g in score)


@REAL
@pytest.mark.parametrize(
    ("x", "mu", "theta"),
    [(-1, 1, 1), (0, -1, 1), (2, -1, 1), (0, 1, -1), (2, 1, -1), (math.inf, 1, 1)]
    + [tuple(math.nan if i == j else 1 for j in range(3)) for i in range(3)]
    + [(0, math.nan, 1), (0, 1, math.nan)],
)
def test_what_cannot_be_is_nan(x, mu, theta, dtype):
    """In the value and every gradient, and nowhere else."""
    others = torch.tensor([[0.0, 1, 1], [3, 1, 1]], dtype=dtype)
    rows = torch.cat([others[:1], torch.tensor([[x, mu, theta]], dtype=dtype), others[1:]])
    x, mu, theta = rows.T.contiguous()
    for zero_logits in (None, torch.zeros(3, dtype=dtype, requires_grad=True)):
        leaves = (mu.clone().requires_grad_(), theta.clone().requires_grad_())
        one = likelihoods.NegativeBinomial(leaves[1], zero_logits)
        for result in evaluated(one, leaves[0], x)[:3]:
            assert np.isnan(result).tolist() == [False, True, False]


def test_a_mean_of_0_and_a_theta_of_0():
    mu = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
    theta = torch.tensor([2.0, 2.0, 0.0, 0.0], requires_grad=True)
    nll, d_mu, d_theta = evaluated(
        likelihoods.NegativeBinomial(theta), mu, torch.tensor([0, 1, 0, 1])
    )
    assert nll[:2].tolist() == [0, math.inf] and d_mu[:2].tolist() == [1, -math.inf]
    assert np.isfinite(nll[2:]).all() and np.isfinite(d_mu[2:]).all() and np.isfinite(d_theta).all()


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.NegativeBinomial(1.0),
        likelihoods.NegativeBinomial(1.0, 0.0),
        likelihoods.NegativeBinomial(total_count=1.0),
        likelihoods.Poisson(full=True),
    ],
    ids=lambda one: one.formula,
)
def test_an_x_that_wants_a_gradient_is_refused(likelihood):
    recon_x, x = torch.rand(2, 3, 5)
    x.requires_grad_()
    latents = torch.randn(2, 3, 4)
    for call in (
        lambda: reconstruction_loss(recon_x, x, likelihood=likelihood),
        lambda: vae_loss(recon_x, x, *latents, likelihood=likelihood),
    ):
        with pytest.raises(ValueError, match=r"x must not require a gradient.*x\.detach\(\)"):
            call()


def test_parameters_that_make_no_sense():
    for bad in ({}, {"theta": 1.0, "total_count": 1.0}):
        with pytest.raises(ValueError, match="NegativeBinomial: give theta or total_count"):
            likelihoods.NegativeBinomial(**bad)
    with pytest.raises(ValueError, match="zero_logits go with theta"):
        likelihoods.NegativeBinomial(total_count=1.0, zero_logits=0.0)


def test_fractions_are_the_continuation_of_the_counts():
    with mp.workdps(60):
        x, mu, theta = torch.tensor([[0.02, 0.5, 0.97, 2.5], [0.1, 1, 3, 2], [0.05, 0.3, 4, 1]])
        mu, theta = mu.requires_grad_(), theta.requires_grad_()
        got = evaluated(likelihoods.NegativeBinomial(theta), mu, x)
        rows = zip(x.tolist(), mu.tolist(), theta.tolist(), strict=True)
        want = [truth(*row) for row in rows]
        for k in range(3):
            np.testing.assert_allclose(got[k], [float(w[k]) for w in want], rtol=5e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stirlings_error(dtype):
    rng, eps = np.random.default_rng(2), np.finfo(dtype).eps
    z = np.concatenate([10 ** rng.uniform(-6, 8, 500), [1, 8, 7.9999, 0.5, 0.9999]]).astype(dtype)
    with mp.workdps(60):
        delta, chi = (elementary(name, z) for name in ("delta", "chi"))
        for v, got_delta, got_chi in zip(z.tolist(), delta.tolist(), chi.tolist(), strict=True):
            w = mp.mpf(v)
            log = (w + 0.5) * mp.log(w) - w + mp.log(2 * mp.pi) / 2
            units = 2 if v >= 1 else 20
            want = mp.loggamma(w + 1) - log
            assert abs(got_delta - want) <= units * eps * want, v
            want = mp.log(w) - 1 / (2 * w) - mp.digamma(w)
            assert abs(got_chi - want) <= units * eps * want, v
