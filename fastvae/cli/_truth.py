"""What ``fastvae verify`` holds the ops against, and how it counts an error.

The truth is `fastvae.reference` in float64, on the very inputs an op is given (after they were
rounded to its dtype). Float64 inputs, and a KL near the prior, where float64 itself cancels, are
held against the same formulas in 40-digit decimal arithmetic, with derivatives written out instead
of left to autograd. Problems marked `further` (other likelihoods, weights, free bits) have no such
formulas: in float64 they are held against the reference itself.

An error is counted in units of rounding: the spacing of the result dtype's numbers at the size of
the true result, so that a correctly rounded one is off by half a unit at most. Where terms of
either sign are added (z = mu + sigma * eps; an input whose gradient arrives by two ways), it is the
spacing at the largest rounded term: their rounding survives the addition whatever evaluates it in
that precision. In likelihoods the mean and x cancel, or 1 and z^2: there it is the spacing at x (or 1), or
at recon_x, times the derivative by it. PyTorch's own error is counted in the same way.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae import reference
from fastvae.likelihoods import NegativeBinomial

OUTPUTS = {
    "reparameterize": ("z",),
    "kl_normal": ("kl",),
    "sample_and_kl": ("z", "kl"),
    "reconstruction_loss": ("recon",),
    "vae_loss": ("loss", "recon", "kl"),
    "kl_decomposition": ("mutual information", "total correlation", "dimension-wise KL"),
    "mixture_log_prob": ("log q",),
}
DECIMALS = decimal.Context(prec=40)
SHIFT = 2.0**-20  # relative, for derivatives

Array = NDArray[Any]  # of float64, or of Decimal objects


@dataclass(frozen=True)
class Problem:
    """A call of an op: tensors by name, which want gradients, and what flows into each output.

    Where `generator_seed` is given the op draws its noise; ``tensors["eps"]`` is the same noise,
    for whatever the op is compared with. Tensors called ``likelihood.<field>`` are parameters, for
    the function that the option ``likelihood`` is then.
    """

    op: str
    case: str
    dtype: str
    tensors: dict[str, Tensor]
    wants: tuple[str, ...] = ()
    upstream: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    generator_seed: int | None = None
    further: bool = False

    @property
    def input_dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.promote_types(self.input_dtype, torch.float32)

    def result_dtype(self, name: str) -> torch.dtype:
        """As promised, not as found: too narrow a result must not be let off with wider units."""
        if name.startswith("d_"):
            return self.tensors[name[2:]].dtype
        return self.input_dtype if name == "z" else self.arithmetic


class Truth(NamedTuple):
    """The outputs' values, and for each output the gradients that flow through it alone."""

    values: dict[str, Array]
    gradients: dict[str, dict[str, Array]]


def call(
    function: Callable[..., Any], problem: Problem, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The op's outputs by name."""
    options = dict(problem.options)
    if parameters := {n.split(".")[1]: t for n, t in tensors.items() if "." in n}:
        options["likelihood"] = options["likelihood"](**parameters)
    outputs = function(**{n: t for n, t in tensors.items() if "." not in n}, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return dict(zip(OUTPUTS[problem.op], outputs, strict=True))


def from_reference(problem: Problem) -> Truth:
    """`fastvae.reference` and autograd, in float64."""
    leaves = {n: t.double().cpu().detach().requires_grad_() for n, t in problem.tensors.items()}
    outputs = call(getattr(reference, problem.op), problem, leaves)
    gradients = {}
    for name, upstream in problem.upstream.items():
        wanted = [leaves[n] for n in problem.wants]
        grads = torch.autograd.grad(
            outputs[name], wanted, upstream.double().cpu(), retain_graph=True, allow_unused=True
        )
        pairs = zip(problem.wants, grads, strict=True)
        gradients[name] = {n: g.numpy() for n, g in pairs if g is not None}
    return Truth({n: o.detach().numpy() for n, o in outputs.items()}, gradients)


class _Term(NamedTuple):
    """coefficient * reduce(value), and the derivatives of value, elementwise."""

    value: Array
    derivatives: dict[str, Array]
    reduction: str
    coefficient: Decimal = Decimal(1)

    @property
    def divisor(self) -> int:
        divisors: dict[str, int] = {"batchmean": self.value.shape[0], "mean": self.value.size}
        return divisors.get(self.reduction, 1)

    def reduced(self) -> Array:
        value = self.coefficient * self.value
        if self.reduction == "sample":
            value = value.reshape(value.shape[0], -1).sum(1)
        elif self.reduction != "none":
            value = value.sum() / self.divisor
        return np.asarray(value)

    def gradient(self, name: str, upstream: Array) -> Array:
        """upstream has the shape of the reduced value."""
        upstream = upstream.reshape(upstream.shape + (1,) * (self.value.ndim - upstream.ndim))
        return np.asarray(self.coefficient * upstream / self.divisor * self.derivatives[name])


_to_decimal = np.frompyfunc(Decimal, 1, 1)
_exp = np.frompyfunc(lru_cache(maxsize=1 << 16)(Decimal.exp), 1, 1)


def _decimals(tensor: Tensor) -> Array:
    return np.asarray(_to_decimal(tensor.detach().double().cpu().numpy()), dtype=object)


def _terms(problem: Problem) -> dict[str, list[_Term]]:
    t = {n: _decimals(x) for n, x in problem.tensors.items()}
    reduction = problem.options.get("reduction", "none")
    terms: dict[str, list[_Term]] = {}
    if "z" in OUTPUTS[problem.op]:
        sigma = _exp(t["logvar"] / 2)
        noise = sigma * t["eps"]
        derivatives = {"mu": np.full_like(noise, Decimal(1)), "logvar": noise / 2, "eps": sigma}
        terms["z"] = [_Term(t["mu"] + noise, derivatives, "none")]
    if "recon" in OUTPUTS[problem.op]:
        c = Decimal({"mse": 1, "gaussian": 0.5}[problem.options["likelihood"]])
        diff = t["recon_x"] - t["x"]
        derivatives = {"recon_x": 2 * c * diff, "x": -2 * c * diff}
        terms["recon"] = [_Term(c * diff * diff, derivatives, reduction)]
    if "kl" in OUTPUTS[problem.op]:
        zero = np.full_like(t["mu"], Decimal(0))
        mu_p, logvar_p = t.get("mu_p", zero), t.get("logvar_p", zero)
        d = t["logvar"] - logvar_p
        diff = t["mu"] - mu_p
        precision = _exp(-logvar_p)
        scaled = diff * diff * precision
        growth = _exp(d) - 1
        derivatives = {
            "mu": diff * precision,
            "mu_p": -diff * precision,
            "logvar": growth / 2,
            "logvar_p": -(growth + scaled) / 2,
        }
        kl_reduction = problem.options.get("kl_reduction") or reduction
        terms["kl"] = [_Term((growth - d + scaled) / 2, derivatives, kl_reduction)]
    if "loss" in OUTPUTS[problem.op]:
        beta = Decimal(problem.options["beta"])
        terms["loss"] = [*terms["recon"], terms["kl"][0]._replace(coefficient=beta)]
    return terms


def from_decimals(problem: Problem) -> Truth:
    """The formulas of `fastvae.reference` and their derivatives, in decimal arithmetic."""
    with decimal.localcontext(DECIMALS):
        terms = _terms(problem)
        values = {n: np.asarray(sum(t.reduced() for t in terms[n])) for n in OUTPUTS[problem.op]}
        gradients = {
            output: {
                name: term.gradient(name, _decimals(upstream))
                for term in terms[output]
                for name in problem.wants
                if name in term.derivatives
            }
            for output, upstream in problem.upstream.items()
        }
        return Truth(values, gradients)


class Expected(NamedTuple):
    """A true result, and the size of the terms it is made of, which sets the unit of its error."""

    value: Array
    size: Array


def expected(problem: Problem, exact: bool) -> dict[str, Expected]:
    """Every output, and every gradient as ``d_<input>``: from decimals if `exact`, or else from the
    reference."""
    values, parts = from_decimals(problem) if exact else from_reference(problem)

    def tensor(name: str) -> Array:
        array = problem.tensors[name]
        return _decimals(array) if exact else array.double().cpu().numpy()

    with decimal.localcontext(DECIMALS):
        results = {name: Expected(value, abs(value)) for name, value in values.items()}
        if "z" in values:
            z = values["z"]
            results["z"] = Expected(z, np.maximum(abs(z), abs(z - tensor("mu"))))
        for name in problem.wants:
            flows = [part[name] for part in parts.values() if name in part]
            results[f"d_{name}"] = Expected(np.sum(flows, 0), np.sum(np.abs(flows), 0))
        if "logvar_p" in problem.wants:
            # Its terms are -expm1(d) / 2, which is logvar's gradient but for the sign, and
            # -(mu - mu_p)^2 exp(-logvar_p) / 2, which is mu's times -(mu - mu_p) / 2.
            kl = parts["kl"]
            distance = tensor("mu") - tensor("mu_p")
            size = abs(kl["logvar"]) + abs(kl["mu"] * distance) / 2
            results["d_logvar_p"] = Expected(results["d_logvar_p"].value, size)
    if problem.further and "x" in problem.tensors:
        for one in ("recon_x", "x"):
            there = problem.tensors[one].double()
            shift = SHIFT * (there if one == "recon_x" else there.abs().clamp(min=1))
            if one == "x" and problem.options["likelihood"] is NegativeBinomial:
                shift = torch.where(there == 0, 0, shift)  # which is a case of its own
            shifted = problem.tensors | {one: there + shift}
            moved = expected(replace(problem, tensors=shifted, further=False), exact=False)
            for name, (value, size) in results.items():
                change = abs(moved[name].value - value) / SHIFT
                results[name] = Expected(value, np.maximum(size, change))
    return results


def _error(result: Tensor, true: Array) -> Array:
    """|result - true| in float64, infinite where the result is not finite."""
    exact = true.dtype == object
    got = _decimals(result) if exact else result.detach().double().cpu().numpy()
    with decimal.localcontext(DECIMALS):
        error = np.asarray(abs(got - true), dtype=float)
    return np.where(np.isfinite(error), error, np.inf)


def units_off(result: Tensor, truth: Expected, dtype: torch.dtype) -> float:
    """The largest error, in units of rounding of dtype."""
    info = torch.finfo(dtype)
    # Below the smallest normal number the spacing stays what it is there. frexp gives
    # size = m * 2^e with m in [0.5, 1).
    _, e = np.frexp(np.maximum(np.asarray(truth.size, dtype=float), info.smallest_normal))
    return float((_error(result, truth.value) / np.ldexp(info.eps, e - 1)).max())


def relative_error(result: Tensor, truth: Expected) -> float:
    """The largest relative error; a true 0 allows nothing but 0."""
    error, size = _error(result, truth.value), np.asarray(abs(truth.value), dtype=float)
    at_zero = np.where(error > 0, np.inf, 0.0)
    return float(np.divide(error, size, out=at_zero, where=size > 0).max())
