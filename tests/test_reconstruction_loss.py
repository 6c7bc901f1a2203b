"""The reconstruction term: the oracle and mixed dtypes. test_likelihoods_fused has every likelihood."""

from __future__ import annotations

import pytest
from accuracy import check
from cases import DTYPES, MIXED, REDUCTIONS, SHAPES, images

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
