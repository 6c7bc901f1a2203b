"""The policy of `fastvae.verify.accuracy` as assertions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastvae.verify import oracle
from fastvae.verify.accuracy import (  # noqa: F401
    EMULATED,
    OUTPUTS,
    TOP_BIT,
    UNITS,
    UNITS_OF_A_SUM,
    Evaluation,
    Tensors,
    compare,
    draw_seed,
    drawn,
    evaluate,
    for_the_oracle,
    key_of,
    oracle_options,
    result_dtype,
    results,
    three_ways,
    to_numpy,
    varied,
    with_likelihood,
)


def assert_accurate(
    got: Tensor,
    want: oracle.Array,
    plain: Tensor | None = None,
    *,
    units: float = UNITS,
    what: str = "result",
) -> None:
    """Fails where `got` is further from the oracle's `want` than the policy allows; `plain` is PyTorch's own result."""
    found = compare(got, want, plain, units=units)
    assert found.ok, f"{what} ({got.dtype}) is off, in units of rounding: {found}"


def check(
    name: str,
    tensors: Tensors,
    *,
    seed: int | None = None,
    upstream: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> Evaluation:
    """Values, gradients and their dtypes of the op `name` against the oracle, under the policy.

    With `seed` the op draws its own noise from a generator with that seed, and the others get that noise from
    `philox_normal`, which test_noise.py compares with the oracle's.
    """
    run = three_ways(name, tensors, seed, upstream, options)
    for label, _, dtype, got, found in results(
        name, tensors, run, options.get("reduction", "batchmean")
    ):
        assert got.dtype == dtype, label
        assert found.ok, f"{label} ({dtype}) is off, in units of rounding: {found}"
    for name_, gradient in run.got[0].grads.items():
        assert (gradient.device, gradient.shape) == (tensors[name_].device, tensors[name_].shape)
    return run.got[0]
