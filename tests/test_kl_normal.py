"""KL(N(mu, exp logvar) || prior): values and gradients against the oracle, and against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import check
from cases import (
    DTYPES,
    EMPTY_SHAPES,
    MIXED_LATENTS,
    REDUCTIONS,
    SHAPES,
    latents,
    mixed_latents,
)
from torch.distributions import Normal, kl_divergence

from fastvae import kl_normal

PRIORS = pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])


@PRIORS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape, dtype, reduction, prior, device):
    check("kl_normal", latents(shape, dtype, device, prior=prior), reduction=reduction)


@PRIORS
@pytest.mark.parametrize("reduction", ["batchmean", "sample", "none"])
@pytest.mark.parametrize("dtypes", MIXED_LATENTS, ids=str)
def test_latents_of_two_dtypes(dtypes, reduction, prior, device):
    check("kl_normal", mixed_latents((3, 513), dtypes, device, prior=prior), reduction=reduction)


@PRIORS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(shape, reduction, prior, device):
    check("kl_normal", latents(shape, device=device, prior=prior), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learned_prior_of_the_event_alone(dtype, device):
    posterior = latents((6, 40), dtype, device)
    prior = {
        k: t.expand_as(posterior["mu"])
        for k, t in latents((40,), dtype, device, prior=True).items()
        if "_p" in k
    }
    check("kl_normal", posterior | prior)


def test_gradient_of_a_learned_prior_reaches_its_parameter():
    posterior = latents((6, 40))
    mu_p, logvar_p = (t.requires_grad_() for t in latents((40,), seed=1).values())
    kl = kl_normal(*posterior.values(), mu_p.expand(6, 40), logvar_p.expand(6, 40), reduction="sum")
    (0.3 * kl).backward()
    assert mu_p.grad is not None and logvar_p.grad is not None
    full = [t.detach().expand(6, 40).clone().requires_grad_() for t in (mu_p, logvar_p)]
    (0.3 * kl_normal(*posterior.values(), *full, reduction="sum")).backward()
    for parameter, whole in zip((mu_p, logvar_p), full, strict=True):
        torch.testing.assert_close(parameter.grad, whole.grad.sum(0))


@PRIORS
def test_agrees_with_torch_distributions(prior):
    t = latents((64, 20), torch.float64, prior=prior)
    posterior = Normal(t["mu"], torch.exp(0.5 * t["logvar"]))
    other = Normal(t["mu_p"], torch.exp(0.5 * t["logvar_p"])) if prior else Normal(0.0, 1.0)
    torch.testing.assert_close(kl_normal(**t, reduction="none"), kl_divergence(posterior, other))


def test_standard_normal_given_as_the_prior():
    tensors = latents((64, 20))
    zero = torch.zeros(64, 20)
    for reduction in REDUCTIONS:
        torch.testing.assert_close(
            kl_normal(**tensors, reduction=reduction),
            kl_normal(**tensors, mu_p=zero, logvar_p=zero, reduction=reduction),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_zero_and_not_minus_zero_where_posterior_and_prior_agree(dtype):
    t = latents((64, 20), dtype)
    for kl in (
        kl_normal(t["mu"], t["logvar"], t["mu"].clone(), t["logvar"].clone(), reduction="none"),
        kl_normal(torch.zeros(3, 5, dtype=dtype), torch.zeros(3, 5, dtype=dtype), reduction="none"),
    ):
        assert (kl == 0).all()
        assert not torch.signbit(kl).any()


def test_known_value():
    """KL(N(0, s^2) || N(0, 1)) = (s^2 - 1) / 2 - ln s."""
    kl = kl_normal(
        torch.zeros(1, 1, dtype=torch.float64),
        torch.full((1, 1), math.log(4.0), dtype=torch.float64),
    )
    assert kl.item() == pytest.approx(1.5 - math.log(2), rel=1e-14)


def test_derivatives_by_a_float32_logvar_beside_a_bfloat16_mu():
    """Each has its tensor's own dtype and digits, in the form that can be differentiated again too."""
    posterior = latents((3, 40))
    mu, logvar = posterior["mu"].bfloat16().requires_grad_(), posterior["logvar"].requires_grad_()
    kl = kl_normal(mu, logvar, reduction="sum")
    d_mu, d_logvar = torch.autograd.grad(kl, (mu, logvar), create_graph=True)
    assert d_mu.dtype == torch.bfloat16
    torch.testing.assert_close(d_logvar, 0.5 * torch.expm1(logvar))
