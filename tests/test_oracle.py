"""The oracle itself: mpmath for what cancels, finite differences for its gradients, scipy for its noise."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from accuracy import OUTPUTS, for_the_oracle, to_numpy, varied
from cases import REDUCTIONS, inputs
from likelihoods_table import ROWS
from scipy import stats

from fastvae.verify import oracle

DIGITS = 4 * float(np.finfo(np.longdouble).eps)


@pytest.mark.parametrize("sign", [1, -1])
def test_exp_residual(sign):
    """exp(d) - 1 - d over all magnitudes, also across the seam of series and expm1 at 1."""
    d = sign * np.concatenate([10.0 ** np.arange(-30, 2.6, 0.25), [0.5, 0.999, 1.0, 1.001]])
    with mpmath.workdps(80):
        want = [mpmath.exp(mpmath.mpf(v)) - 1 - mpmath.mpf(v) for v in d]
        error = [
            abs(mpmath.mpf(np.format_float_scientific(g, precision=30)) / w - 1)
            for g, w in zip(oracle.exp_residual(d), want, strict=True)
        ]
    assert max(error) < 4 * DIGITS


CASES = [("reparameterize", {})]
CASES += [("kl_normal", {"reduction": r}) for r in REDUCTIONS]
CASES += [("sample_and_kl", {"reduction": r}) for r in ("mean", "sample")]
CASES += [
    ("reconstruction_loss", {"reduction": r, "likelihood": k})
    for r in REDUCTIONS
    for k in ("mse", "gaussian")
]
CASES += [
    ("vae_loss", {"reduction": "sum", "kl_reduction": "mean", "beta": 0.3}),
    ("vae_loss", {"reduction": "sample"}),
]
WEIGHT = oracle.real([[0.0, 1.3, 0.4, 1.0], [0.7, 0.0, 2.0, 0.1], [1.0, 1.0, 0.0, 0.2]])
CASES += [("kl_normal", {"reduction": r, "weight": WEIGHT}) for r in ("mean", "latent", "none")]
CASES += [("kl_normal", {"reduction": r, "free_bits": 1.1}) for r in ("sum", "batchmean")]
CASES += [("kl_normal", {"free_bits": 1.1, "weight": WEIGHT})]
CASES += [("kl_normal", {"reduction": "mean", "free_bits": 1.1, "free_bits_per": "element"})]
CASES += [("reconstruction_loss", {"reduction": r, "weight": WEIGHT}) for r in ("mean", "channel")]
CASES += [("vae_loss", {"beta": 0.3, "free_bits": 1.1, "weight": WEIGHT})]


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradients_are_those_of_the_values(name, options, prior):
    if prior and name not in ("kl_normal", "sample_and_kl"):
        prior = False
    assert_gradients(name, inputs(name, (3, 4), **({"prior": True} if prior else {})), options)


LIKELIHOODS = [(n, {}) for n in ROWS] + [("laplace", {"activation": "tanh", "x_scale": 0.3})]
LIKELIHOODS += [("gaussian_logvar", {"activation": "sigmoid", "full": True})]


@pytest.mark.parametrize("parameters", ["element", "channel", "scalar"])
@pytest.mark.parametrize(("name", "options"), LIKELIHOODS, ids=str)
def test_gradients_of_likelihoods(name, options, parameters):
    row = ROWS[name]
    likelihood = for_the_oracle(row.make(**row.every_parameter(0.0), **options))
    tensors = row.tensors((3, 4), torch.float64, parameters=parameters)
    assert_gradients(
        "reconstruction_loss",
        tensors,
        {"likelihood": likelihood, "weight": WEIGHT, "reduction": "mean"},
    )


def assert_gradients(name, tensors, options, count=None):
    arrays = {k: to_numpy(t) for k, t in tensors.items()}
    op = name if callable(name) else getattr(oracle, name)
    outputs, _ = op(**arrays, upstream=[None] * (count or len(OUTPUTS[name])), **options)
    upstream = [to_numpy(varied(o.shape, None, low=0.2 + i)) for i, o in enumerate(outputs)]
    _, grads = op(**arrays, upstream=upstream, **options)

    def objective(**moved):
        values, _ = op(**arrays | moved, upstream=upstream, **options)
        return sum((v * g).sum() for v, g in zip(values, upstream, strict=True))

    assert grads.keys() == arrays.keys()
    for k, array in arrays.items():
        if not tensors[k].is_floating_point():
            continue
        for index in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[index] = 1e-5
            slope = (objective(**{k: array + step}) - objective(**{k: array - step})) / 2e-5
            np.testing.assert_allclose(grads[k][index], slope, rtol=1e-7, atol=1e-8)


def test_gradients_of_full_covariances():
    rng = np.random.default_rng(1)
    tensors = {k: torch.from_numpy(rng.normal(size=(3, 4))) for k in ("mu", "mu_p", "eps")}
    for name in ("scale_tril", "scale_tril_p"):
        factor = rng.normal(0, 0.6, (3, 4, 4)) + 2 * np.eye(4)
        tensors[name] = torch.from_numpy(np.tril(factor))

    def call(mu, scale_tril, mu_p, scale_tril_p, eps, **options):
        return oracle.sample_and_kl_multivariate_normal(
            mu, scale_tril, mu_p, scale_tril_p, eps=eps, **options
        )

    for reduction in ("mean", "sample"):
        assert_gradients(call, tensors, {"reduction": reduction}, 2)


def test_gradients_of_importance_weights():
    tensors = {"log_weight": torch.from_numpy(np.random.default_rng(2).normal(size=(3, 4)))}
    assert_gradients(oracle.iwae_loss, tensors, {}, 1)


@pytest.mark.parametrize("double", [False, True])
def test_noise(double):
    draw = oracle.normal(100_000, 7, double=double).astype(np.float64)
    assert stats.kstest(draw, "norm").pvalue > 1e-3
    parts = [
        oracle.normal(n, 7, start=s, double=double) for s, n in [(0, 3), (3, 1), (4, 6), (10, 90)]
    ]
    assert np.array_equal(np.concatenate(parts), oracle.normal(100, 7, double=double))
