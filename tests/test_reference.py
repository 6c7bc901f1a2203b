"""fastvae.reference against the oracle and torch's own functions, and its signatures against the fused ones."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import OUTPUTS, evaluate, oracle_options, to_numpy, varied
from cases import EMPTY_SHAPES, REDUCTIONS, WEIGHTS, inputs, latents, seeded_generator, weight
from likelihoods_table import EVERY_ROW
from torch.distributions import Normal, kl_divergence

import fastvae
from fastvae import reference
from fastvae.verify import oracle

OPS = list(OUTPUTS)


@pytest.mark.parametrize("name", OPS)
def test_signatures_agree(name):
    """Names, order, kinds and defaults; the fused function's annotations may be more precise."""
    fused, plain = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(m, name)).parameters.values()
        ]
        for m in (fastvae, reference)
    )
    assert fused == plain


def test_exports():
    assert set(OPS) <= set(reference.__all__)
    assert fastvae.VAELossOutput._fields == reference.VAELossOutput._fields


CASES = [("reparameterize", {}, False)]
CASES += [("kl_normal", {"reduction": r}, prior) for r in REDUCTIONS for prior in (False, True)]
CASES += [("sample_and_kl", {"reduction": r}, prior) for r in REDUCTIONS for prior in (False, True)]
CASES += [
    ("reconstruction_loss", {"reduction": r, "likelihood": likelihood}, False)
    for r in REDUCTIONS
    for likelihood in ("mse", "gaussian")
]
CASES += [("vae_loss", {"reduction": r, "beta": 0.3}, False) for r in REDUCTIONS if r != "none"]
CASES += [("vae_loss", {"kl_reduction": "mean"}, False)]
CASES += [("kl_normal", {"reduction": "latent"}, prior) for prior in (False, True)]
FREE_BITS = [{"reduction": r, "free_bits": 0.8} for r in ("sum", "batchmean")]
FREE_BITS += [{"reduction": r, "free_bits": 0.8, "free_bits_per": "element"} for r in REDUCTIONS]
CASES += [("kl_normal", options, prior) for options in FREE_BITS for prior in (False, True)]
CASES += [("vae_loss", FREE_BITS[0], False)]


@pytest.mark.parametrize("shape", [(7,), (3, 130), (2, 3, 5, 7), *EMPTY_SHAPES], ids=str)
@pytest.mark.parametrize(("name", "options", "prior"), CASES, ids=str)
def test_against_the_oracle(name, options, prior, shape):
    compare(name, inputs(name, shape, torch.float64, **({"prior": True} if prior else {})), options)


WEIGHTED = [r for r in REDUCTIONS if r != "none"] + ["latent"]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("options", [*({"reduction": r} for r in WEIGHTED), *FREE_BITS], ids=str)
def test_weighted_kl(options, prior, kind):
    tensors = latents((4, 5, 6), torch.float64, prior=prior)
    compare("kl_normal", tensors, options | {"weight": weight(kind, (4, 5, 6))})


@pytest.mark.parametrize("kind", [*WEIGHTS, "none"])
@pytest.mark.parametrize("parameters", ["element", "channel", "scalar"])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "channel"])
@EVERY_ROW
def test_likelihoods(row, reduction, parameters, kind):
    tensors = row.tensors((4, 3, 5), torch.float64, parameters=parameters)
    options = {"reduction": reduction, "likelihood": row.likelihood(x_scale=0.7)}
    if kind != "none":
        options["weight"] = weight(kind, (4, 3, 5))
    compare("reconstruction_loss", tensors, options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "channel"])
@EVERY_ROW
def test_what_has_no_weight_counts_for_nothing(row, reduction, bad):
    tensors = row.tensors((4, 3, 5), torch.float64, torch.float64)
    w = weight("element", (4, 3, 5)).masked_fill(torch.rand(4, 3, 5) < 0.3, 0)
    spoiled = {k: t.masked_fill(w == 0, bad) for k, t in tensors.items()}
    options = {"reduction": reduction, "likelihood": row.likelihood(), "weight": w}
    expected, got = (
        evaluate(reference.reconstruction_loss, t, **options) for t in (tensors, spoiled)
    )
    assert torch.equal(got.outputs[0], expected.outputs[0])
    for name, grad in got.grads.items():
        assert torch.equal(grad, expected.grads[name]), name
        assert not grad[w == 0].any()


def test_a_weight_gets_no_gradient():
    tensors = inputs("reconstruction_loss", (3, 4))
    w = torch.rand(3, 1).requires_grad_()
    assert not reference.reconstruction_loss(**tensors, weight=w).requires_grad


def test_free_bits_are_kingmas():
    mu, logvar = latents((64, 20), torch.float64).values()
    kl = reference.kl_normal(mu, logvar, reduction="none")
    expected = kl.mean(0).clamp(min=1.5).sum()
    torch.testing.assert_close(reference.kl_normal(mu, logvar, free_bits=1.5), expected)
    with pytest.raises(ValueError, match="free bits"):
        reference.kl_normal(mu, logvar, reduction="mean", free_bits=1.5)


def compare(name, tensors, options):
    got = evaluate(getattr(reference, name), tensors, **options)
    outputs, grads = getattr(oracle, name)(
        **{k: to_numpy(t) for k, t in tensors.items()},
        upstream=[to_numpy(varied(o.shape, o.dtype)) for o in got.outputs],
        **oracle_options(tensors, options),
    )
    for actual, expected in zip(got.outputs, outputs, strict=True):
        np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-12, atol=1e-15)
    for k, actual in got.grads.items():
        np.testing.assert_allclose(to_numpy(actual), grads[k], rtol=1e-12, atol=1e-15)


def test_agrees_with_torch():
    t = latents((64, 20), torch.float64, prior=True)
    posterior, prior = (Normal(t["mu" + s], torch.exp(0.5 * t["logvar" + s])) for s in ("", "_p"))
    torch.testing.assert_close(
        reference.kl_normal(**t, reduction="none"), kl_divergence(posterior, prior)
    )
    a, b = t["mu"], t["mu_p"]
    torch.testing.assert_close(
        reference.reconstruction_loss(a, b, reduction="mean"), F.mse_loss(a, b)
    )
    nll = -Normal(a, 1.0).log_prob(b) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(
        reference.reconstruction_loss(a, b, likelihood="gaussian", reduction="none"), nll
    )


def test_draws_with_torch():
    mu, logvar = latents((3, 5)).values()
    z, eps = reference.reparameterize(mu, logvar, generator=seeded_generator(1), return_eps=True)
    assert torch.equal(eps, torch.randn(3, 5, generator=seeded_generator(1)))
    assert torch.equal(z, reference.reparameterize(mu, logvar, eps=eps))
    z, _ = reference.sample_and_kl(mu, logvar, generator=seeded_generator(1))
    assert torch.equal(z, reference.reparameterize(mu, logvar, eps=eps))


def test_refuses_what_it_would_misread():
    mu, logvar = latents((3, 5)).values()
    with pytest.raises(ValueError, match="mu_p and logvar_p"):
        reference.kl_normal(mu, logvar, mu)
    with pytest.raises(ValueError, match="reduction"):
        reference.kl_normal(mu, logvar, reduction="avg")
    with pytest.raises(ValueError, match="likelihood"):
        reference.reconstruction_loss(mu, logvar, likelihood="l2")
