"""The rows of likelihoods as parameters of tests."""

from __future__ import annotations

import pytest

from fastvae import likelihoods
from fastvae.verify.likelihoods import ROWS, Row

EVERY_ROW = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
WITH_PARAMETERS = pytest.mark.parametrize(
    "row",
    [r for r in ROWS.values() if r.parameters],
    ids=[n for n, r in ROWS.items() if r.parameters],
)
WITH_ACTIVATION = pytest.mark.parametrize(
    ("row", "activation"),
    [(r, a) for r in ROWS.values() for a in r.activations if a],
    ids=[f"{n}-{a}" for n, r in ROWS.items() for a in r.activations if a],
)


def full(row: Row) -> dict[str, bool]:
    """The option that adds the constant; Poisson's is none."""
    has_it = "full" in row.kind.__dataclass_fields__ and row.kind is not likelihoods.Poisson
    return {"full": True} if has_it else {}
