"""The reconstruction term: the oracle, mixed dtypes, and agreement with torch.nn.functional."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, evaluate
from cases import DTYPES, EMPTY_SHAPES, MIXED, REDUCTIONS, SHAPES, images

from fastvae import reconstruction_loss

LIKELIHOODS = pytest.mark.parametrize("likelihood", ["mse", "gaussian"])


@LIKELIHOODS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape, dtype, reduction, likelihood, device):
    check(
        "reconstruction_loss",
        images(shape, dtype, device=device),
        reduction=reduction,
        likelihood=likelihood,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4097)], ids=str)
def test_mixed_dtypes(shape, dtypes, reduction, device):
    check("reconstruction_loss", images(shape, *dtypes, device=device), reduction=reduction)


@LIKELIHOODS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(shape, reduction, likelihood, device):
    check(
        "reconstruction_loss",
        images(shape, device=device),
        reduction=reduction,
        likelihood=likelihood,
    )


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_mse_is_what_torch_computes(reduction):
    tensors = images((9, 1000), torch.float64)
    torch.testing.assert_close(
        reconstruction_loss(**tensors, reduction=reduction),
        F.mse_loss(*tensors.values(), reduction=reduction),
    )


def test_gaussian_is_what_torch_computes():
    recon_x, x = images((9, 1000), torch.float64).values()
    expected = F.gaussian_nll_loss(recon_x, x, torch.ones_like(x), reduction="sum")
    torch.testing.assert_close(
        reconstruction_loss(recon_x, x, likelihood="gaussian", reduction="sum"), expected
    )


def test_defaults():
    tensors = images((3, 5))
    assert torch.equal(
        reconstruction_loss(**tensors),
        reconstruction_loss(**tensors, likelihood="mse", reduction="batchmean"),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [("recon_x",), ("x",), ("recon_x", "x")], ids="+".join)
def test_any_choice_of_inputs_that_want_a_gradient(wanted, reduction):
    """The gradients that are made do not depend on which others are."""
    tensors = images((3, 1000))
    for name in wanted:
        tensors[name].requires_grad_()
    value = reconstruction_loss(**tensors, reduction=reduction)
    g = torch.full_like(value, -0.7)
    both = evaluate(reconstruction_loss, tensors, [g], reduction=reduction).grads
    for name, grad in zip(
        wanted, torch.autograd.grad(value, [tensors[n] for n in wanted], g), strict=True
    ):
        assert torch.equal(grad, both[name])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients_gives_the_same_value(reduction):
    tensors = images((9, 1000))
    value = reconstruction_loss(**tensors, reduction=reduction)
    assert torch.equal(
        value, evaluate(reconstruction_loss, tensors, reduction=reduction).outputs[0]
    )
