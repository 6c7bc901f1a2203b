"""The sample and the KL in one pass: the oracle, and agreement with the two ops that it joins."""

from __future__ import annotations

import pytest
import torch
from accuracy import check, varied
from cases import (
    DTYPES,
    EMPTY_SHAPES,
    MIXED_LATENTS,
    REDUCTIONS,
    SHAPES,
    latents,
    mixed_latents,
    noise,
    seeded_generator,
)

from fastvae import kl_normal, reparameterize, sample_and_kl

PRIORS = pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
# An elementwise KL is for kl_normal alone.
REDUCTIONS = [r for r in REDUCTIONS if r != "none"]


@PRIORS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_its_own_noise(shape, dtype, reduction, prior, device):
    check("sample_and_kl", latents(shape, dtype, device, prior=prior), seed=4, reduction=reduction)


@PRIORS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 513), (2, 3, 5, 7)], ids=str)
def test_with_given_noise(shape, dtype, prior, device):
    tensors = latents(shape, dtype, device, prior=prior) | {"eps": noise(shape, dtype, device)}
    check("sample_and_kl", tensors, reduction="mean")


@PRIORS
@pytest.mark.parametrize("dtypes", MIXED_LATENTS, ids=str)
def test_latents_of_two_dtypes(dtypes, prior, device):
    tensors = mixed_latents((3, 513), dtypes, device, prior=prior)
    check("sample_and_kl", tensors, seed=4)
    check("sample_and_kl", tensors | {"eps": noise((3, 513), torch.float16, device)})
    check("sample_and_kl", tensors, seed=4, upstream=[varied((3, 513), torch.float32), None])


@PRIORS
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(shape, reduction, prior, device):
    check("sample_and_kl", latents(shape, device=device, prior=prior), seed=4, reduction=reduction)


@PRIORS
@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
@pytest.mark.parametrize("reached", ["z", "kl"])
def test_gradient_into_one_output_alone(reached, reduction, prior, device):
    tensors = latents((5, 130), device=device, prior=prior) | {
        "eps": noise((5, 130), device=device)
    }
    upstream = {
        "z": [varied((5, 130), torch.float32, device), None],
        "kl": [None, varied((5,) if reduction == "sample" else (), torch.float32, device)],
    }[reached]
    check("sample_and_kl", tensors, upstream=upstream, reduction=reduction)


def test_gradient_of_mu_through_the_sample_alone_is_the_upstream_gradient_itself():
    mu, logvar = (t.requires_grad_() for t in latents((64, 20)).values())
    g = noise((64, 20))
    d_mu, _ = torch.autograd.grad(sample_and_kl(mu, logvar)[0], (mu, logvar), g)
    assert d_mu.data_ptr() == g.data_ptr()


@PRIORS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_two_ops(dtype, reduction, prior):
    """The sample to the bit; the KL, which takes sigma^2 for e^logvar where there is a sample, to rounding."""
    tensors = latents((9, 1000), dtype, prior=prior)
    z, kl = sample_and_kl(**tensors, reduction=reduction, generator=seeded_generator(6))
    alone = reparameterize(tensors["mu"], tensors["logvar"], generator=seeded_generator(6))
    assert torch.equal(z, alone)
    rounding = 4 * torch.finfo(kl.dtype).eps
    torch.testing.assert_close(kl, kl_normal(**tensors, reduction=reduction), rtol=rounding, atol=0)
