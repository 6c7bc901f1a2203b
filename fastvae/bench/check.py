"""Holds values and gradients against float64 before anything is timed.

This is to find what computes something else, not to rank roundings (`fastvae verify` does that): the limits leave room for what the
plain expressions lose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvae.bench.cases import Case, as_tuple

# Of the largest value in a tensor.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7}
STANDARD_ERRORS = 6.0  # of the mean and the variance of noise that the implementation drew itself


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest true value; infinite where `got` is not finite."""
    if got.shape != want.shape:
        return math.inf
    want = want.detach()
    error = (got.detach().double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
    return float(error) if error.isfinite() else math.inf


def wrong_noise(eps: Tensor, dtype: torch.dtype) -> str:
    """Whether drawn noise has the mean and the variance of N(0, 1), as far as its dtype can show."""
    for name, off, error in (("mean", eps, 1.0), ("variance", eps.square() - 1, math.sqrt(2))):
        mean = float(off.double().mean())
        if not abs(mean) <= STANDARD_ERRORS * error / math.sqrt(eps.numel()) + LIMIT[dtype]:
            return f"the {name} of its noise is off by {mean:.2g}"
    return ""


def wrong(case: Case, name: str, made: Any) -> str:
    """What is wrong with an implementation's outputs and gradients, or "".

    Noise that it drew is found from its z, and has to be N(0, 1) as far as its moments show.
    """
    outputs, gradients = made.results()
    if case.op == "noise":
        return wrong_noise(outputs[0], case.dtype)
    truth = case.truths.get(name) or case.truths.get("", case.functions["eager"])
    values = [t.detach() for t in made.inputs]
    if case.noise:
        values.append(case.noise(outputs[0].double(), *(t.double() for t in values)))
        if problem := wrong_noise(values[-1], case.dtype):
            return problem
    leaves = [t.double() for t in values]
    wanted = [
        a.requires_grad_() for a, t in zip(leaves, made.inputs, strict=False) if t.requires_grad
    ]
    exact = as_tuple(truth(*leaves))
    flowing = [None if u is None else u.double() for u in made.upstream]
    found = {"gradient": (gradients, torch.autograd.grad(exact, wanted, flowing))}
    found["output"] = (outputs, exact)
    for kind, (got, want) in found.items():
        for i, pair in enumerate(zip(got, want, strict=True)):
            if not (error := distance(*pair)) <= (case.limit or LIMIT[case.dtype]):
                return f"{kind} {i} is off by {error:.2g} of its largest value"
    return ""
