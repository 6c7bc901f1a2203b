"""Holds values and gradients against float64 before anything is timed.

This is to find what computes something else, not to rank roundings (`fastvae verify` does that): the limits leave room
for what the plain expressions lose. Work goes by slices of the batch, so that float64 needs little memory at any size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvae import reference
from fastvae.bench.cases import DATASET_SIZE, LIKELIHOODS, SAMPLING, Case

# Of the largest value in a tensor.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7}
MIXTURE_LIMIT = 1e-3  # the usual code for mixtures of logistics has no more digits
STANDARD_ERRORS = 6.0  # of the mean and the variance of noise that the implementation drew itself
SLICE = 1 << 20  # elements


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest true value; infinite where `got` is not finite."""
    if got.shape != want.shape:
        return math.inf
    if not got.numel():
        return 0.0
    error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
    return float(error) if error.isfinite() else math.inf


class Moments:
    """Whether drawn noise has the mean and the variance of N(0, 1)."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, eps: Tensor) -> None:
        self.count += eps.numel()
        self.sum += float(eps.sum())
        self.squares += float(eps.square().sum())

    def wrong(self) -> str | None:
        mean = self.sum / self.count
        variance = self.squares / self.count  # about 0, the mean that it should have
        for name, off, error in (("mean", mean, 1.0), ("variance", variance - 1, math.sqrt(2))):
            if not abs(off) <= STANDARD_ERRORS * error / math.sqrt(self.count):
                return f"the {name} of its noise is off by {off:.2g}"
        return None


def _truth(case: Case, leaves: list[Tensor], batch: int) -> tuple[Tensor, ...]:
    """The slice's share of the outputs; a loss is the sum over the slice, divided by the whole batch."""
    function: Any = getattr(reference, case.op)
    if case.after_sigmoid:
        leaves = [leaves[0].sigmoid(), *leaves[1:]]
    if case.op == "reparameterize":
        return (function(leaves[0], leaves[1], eps=leaves[2]),)
    if case.op == "sample_and_kl":
        z, kl = function(leaves[0], leaves[1], eps=leaves[2], reduction="sum")
        return z, kl / batch
    if case.likelihood:
        form = LIKELIHOODS[case.likelihood].make(*leaves[2:])
        return (function(*leaves[:2], likelihood=form, reduction="sum") / batch,)
    result = function(*leaves, reduction="sum")
    return ((result.loss if case.op == "vae_loss" else result) / batch,)


def _wrong_pairs(
    case: Case,
    inputs: list[Tensor],
    upstream: list[Tensor | None],
    outputs: list[Tensor],
    gradients: list[Tensor],
) -> str | None:
    """By slices of the samples, each with all components. A slice's own come first, as `reference` has them."""
    z, mu, logvar = (t.detach().double().requires_grad_() for t in inputs)
    rows = max(1, SLICE * case.batch // case.pairs)
    values: list[list[Tensor]] = [[] for _ in outputs]
    for first in range(0, case.batch, rows):
        part = slice(first, first + rows)
        if case.op == "kl_decomposition":
            own_mu, own_logvar = torch.roll(mu, -first, 0), torch.roll(logvar, -first, 0)
            share = len(z[part]) / case.batch
            terms = reference.kl_decomposition(z[part], own_mu, own_logvar, DATASET_SIZE)
            truth = tuple(share * term for term in terms)
            flowing = upstream
        else:
            log_weight = torch.full(
                (len(mu),), -math.log(len(mu)), dtype=mu.dtype, device=mu.device
            )
            truth = (reference.mixture_log_prob(z[part], mu, logvar, log_weight),)
            flowing = [None if g is None else g[part] for g in upstream]
        torch.autograd.backward(truth, [None if g is None else g.double() for g in flowing])
        for value, whole in zip(truth, values, strict=True):
            whole.append(value.detach())
    exact = [torch.cat(v) if v[0].ndim else torch.stack(v).sum() for v in values]
    found = {
        f"output {i}": distance(o, v) for i, (o, v) in enumerate(zip(outputs, exact, strict=True))
    }
    leaves = zip(gradients, (z, mu, logvar), strict=True)
    found |= {
        f"gradient {i}": distance(g, t.grad)
        for i, (g, t) in enumerate(leaves)
        if t.grad is not None
    }
    for where, error in found.items():
        if not error <= LIMIT[case.dtype]:
            return f"{where} is off by {error:.2g} of its largest value"
    return None


def wrong(
    case: Case,
    inputs: list[Tensor],
    upstream: list[Tensor | None],
    outputs: list[Tensor],
    gradients: list[Tensor],
) -> str | None:
    """What is wrong with an implementation's outputs and gradients, or None.

    Noise that the implementation drew is found from its z, and has to be N(0, 1) as far as its moments show.
    """
    if case.components:
        return _wrong_pairs(case, inputs, upstream, outputs, gradients)
    moments = Moments()
    if case.op == "noise":
        moments.add(outputs[0].double())
        return moments.wrong()
    drawn = case.op in SAMPLING and not case.eps_given
    losses = [torch.zeros((), dtype=torch.float64, device=t.device) for t in outputs]
    worst: dict[str, float] = {}
    forms = case.parameters if case.likelihood else []
    common = {i for i, (by_sample, _) in enumerate(forms, 2) if not by_sample}
    shared: dict[int, Any] = {}
    rows = max(1, SLICE * case.batch // max(case.pixels, case.latents))
    for first in range(0, case.batch, rows):
        part = slice(first, first + rows)
        leaves = [
            (t if i in common else t[part]).detach().double().requires_grad_(t.requires_grad)
            for i, t in enumerate(inputs)
        ]
        if drawn:
            mu, logvar = (t.detach() for t in leaves)
            eps = (outputs[0][part].double() - mu) * torch.exp(-0.5 * logvar)
            moments.add(eps)
            leaves.append(eps)
        truth = _truth(case, leaves, case.batch)
        flowing = [None if g is None else g[part].double() for g in upstream]
        wanted = [t for t in leaves if t.requires_grad]
        exact = torch.autograd.grad(truth, wanted, flowing)
        for i, value in enumerate(truth):
            if value.ndim:
                where = f"output {i}"
                worst[where] = max(worst.get(where, 0), distance(outputs[i][part], value.detach()))
            else:
                losses[i] += value.detach()
        places = [i for i, t in enumerate(leaves) if t.requires_grad]
        for i, (got, want) in enumerate(zip(gradients, exact, strict=True)):
            where = f"gradient {i}"
            if places[i] in common:  # the sum over the slices
                shared[i] = shared.get(i, 0) + want
            else:
                worst[where] = max(worst.get(where, 0), distance(got[part], want))
    for i, total in shared.items():
        worst[f"gradient {i}"] = distance(gradients[i], total)
    for i, output in enumerate(outputs):
        if not output.ndim:
            worst[f"loss {i}"] = distance(output, losses[i])
    if drawn and (problem := moments.wrong()):
        return problem
    for where, error in worst.items():
        mixture = case.likelihood.startswith("logistic mixture")
        if not error <= (MIXTURE_LIMIT if mixture else LIMIT[case.dtype]):
            return f"{where} is off by {error:.2g} of its largest value"
    return None
