"""The whole objective: the oracle over reductions, beta, upstream gradients and dtypes, and agreement with its parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import check, evaluate, varied
from cases import (
    DTYPES,
    EMPTY_SHAPES,
    MIXED,
    SCALAR_REDUCTIONS,
    SHAPES,
    images,
    latents,
    vae_inputs,
)

from fastvae import VAELossOutput, kl_normal, reconstruction_loss, vae_loss

LIKELIHOODS = pytest.mark.parametrize("likelihood", ["mse", "gaussian"])
PAIRS = [(a, b) for a in SCALAR_REDUCTIONS for b in (*SCALAR_REDUCTIONS, None)] + [
    ("sample", "sample"),
    ("sample", None),
]


@pytest.mark.parametrize("reduction", [*SCALAR_REDUCTIONS, "sample"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape, dtype, reduction, device):
    check("vae_loss", vae_inputs(shape, dtype, device), beta=0.3, reduction=reduction)


@LIKELIHOODS
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reductions_of_the_two_terms(dtype, pair, likelihood, device):
    reduction, kl_reduction = pair
    check(
        "vae_loss",
        vae_inputs((6, 3, 11), dtype, device),
        beta=2.5,
        likelihood=likelihood,
        reduction=reduction,
        kl_reduction=kl_reduction,
    )


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.0, 4, -0.5])
@pytest.mark.parametrize(
    "reached", [r for n in (1, 2, 3) for r in itertools.combinations(range(3), n)], ids=str
)
@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
def test_every_choice_of_outputs_that_a_gradient_reaches(reached, beta, reduction, device):
    shape = (5,) if reduction == "sample" else ()
    upstream = [
        varied(shape, torch.float32, low=-1.7 + i) if i in reached else None for i in range(3)
    ]
    check(
        "vae_loss",
        vae_inputs((5, 130), device=device),
        upstream=upstream,
        beta=beta,
        reduction=reduction,
    )


@pytest.mark.parametrize("factor", [1.0, 3.0, -0.25, 0.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient_of_the_loss(dtype, factor, device):
    """1 needs no work in backward and everything else a scaling: both have to be right."""
    check(
        "vae_loss",
        vae_inputs((5, 700), dtype, device),
        upstream=[torch.tensor(factor, dtype=torch.float64), None, None],
        beta=0.7,
    )


@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beta_as_a_tensor_is_beta_as_a_number(dtype, reduction, device):
    tensors = vae_inputs((6, 33), dtype, device)
    number = evaluate(vae_loss, tensors, beta=0.375, reduction=reduction)
    for beta_dtype in (torch.float32, torch.float64):
        beta = torch.tensor(0.375, dtype=beta_dtype, device=device)
        check("vae_loss", tensors, beta=beta, reduction=reduction)
        got = evaluate(vae_loss, tensors, beta=beta, reduction=reduction)
        assert all(torch.equal(a, b) for a, b in zip(got.outputs, number.outputs, strict=True))
        assert all(torch.equal(got.grads[k], number.grads[k]) for k in tensors)


def test_beta_as_a_tensor_may_change_after_the_forward():
    """An annealing schedule advances its beta in place; the gradients are those of the forward's value or an error."""
    tensors = {k: t.requires_grad_() for k, t in vae_inputs((6, 33)).items()}
    beta = torch.tensor(0.375)
    out = vae_loss(**tensors, beta=beta)
    beta.fill_(100.0)
    try:
        grads = torch.autograd.grad(out.loss, list(tensors.values()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        expected = evaluate(
            vae_loss, tensors, [torch.tensor(1.0), None, None], beta=0.375
        ).grads.values()
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("latent_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(dtypes, latent_dtype, device):
    tensors = images((4, 300), *dtypes, device=device) | latents((4, 9), latent_dtype, device)
    check("vae_loss", tensors, beta=0.3)


@pytest.mark.parametrize("latent_shape", [(3,), (3, 1), (3, 4, 32, 32), (3, 4097)], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 2, 8, 8)], ids=str)
def test_event_shapes_differ(shape, latent_shape, device):
    for reduction in ("mean", "sample"):
        check(
            "vae_loss",
            images(shape, device=device) | latents(latent_shape, device=device),
            reduction=reduction,
        )


@pytest.mark.parametrize("reduction", [*SCALAR_REDUCTIONS, "sample"])
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(shape, reduction, device):
    check("vae_loss", vae_inputs(shape, device=device), reduction=reduction, beta=0.3)


def test_empty_batch_sums_to_zero_and_means_to_nan():
    tensors = vae_inputs((0, 4))
    assert [v.item() for v in vae_loss(**tensors, reduction="sum")] == [0, 0, 0]
    for reduction in ("batchmean", "mean"):
        assert all(v.isnan() for v in vae_loss(**tensors, reduction=reduction))
    assert [v.shape for v in vae_loss(**tensors, reduction="sample")] == [(0,)] * 3


@LIKELIHOODS
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_is_its_parts_to_the_bit(pair, likelihood):
    reduction, kl_reduction = pair
    t = vae_inputs((9, 1000))
    out = vae_loss(
        **t, beta=0.3, likelihood=likelihood, reduction=reduction, kl_reduction=kl_reduction
    )
    assert torch.equal(
        out.recon,
        reconstruction_loss(t["recon_x"], t["x"], likelihood=likelihood, reduction=reduction),
    )
    assert torch.equal(out.kl, kl_normal(t["mu"], t["logvar"], reduction=kl_reduction or reduction))


def test_returns_a_named_tuple():
    out = vae_loss(**vae_inputs((3, 5)))
    assert isinstance(out, VAELossOutput)
    assert out._fields == ("loss", "recon", "kl")
    loss, recon, kl = out
    assert loss is out.loss and recon is out.recon and kl is out.kl


NAMES = ("recon_x", "x", "mu", "logvar")


@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
@pytest.mark.parametrize(
    "wanted", [w for n in (1, 2, 3) for w in itertools.combinations(NAMES, n)], ids="+".join
)
def test_any_choice_of_inputs_that_want_a_gradient(wanted, reduction):
    """The gradients that are made do not depend on which others are."""
    tensors = vae_inputs((3, 1000))
    g = varied((3,) if reduction == "sample" else (), torch.float32)
    every = evaluate(vae_loss, tensors, [g, None, None], beta=0.3, reduction=reduction).grads
    for name in wanted:
        tensors[name].requires_grad_()
    out = vae_loss(**tensors, beta=0.3, reduction=reduction)
    for name, grad in zip(
        wanted, torch.autograd.grad(out.loss, [tensors[n] for n in wanted], g), strict=True
    ):
        assert torch.equal(grad, every[name])
