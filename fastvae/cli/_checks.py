"""The checks of ``fastvae verify``: on which inputs, of what, and what each contract allows."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastvae
from fastvae import likelihoods, reference
from fastvae._ops import build_info, cpu_capability
from fastvae.cli._truth import (
    OUTPUTS,
    Problem,
    call,
    expected,
    relative_error,
    units_off,
)

OPS = (*OUTPUTS, "noise")
LATENT_OPS = ("reparameterize", "kl_normal", "sample_and_kl")
PAIRS = ("kl_decomposition", "mixture_log_prob")
REDUCTIONS = ("none", "sample", "sum", "batchmean", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = 7

# Every likelihood: what makes it, ranges of recon_x and x in its domain, and of its parameters.
# (Not far out in tanh, where 1 - tanh^2 cancels.)
MEANS, LOGITS = ((-1, 1), (0, 1)), ((-9, 9), (0, 1))
RATES, LOG_RATES = ((0.05, 6), (0, 3)), ((-2, 2), (0, 6))
SCALE, POSITIVE = (-2, 0.5), (0.1, 4)
Range = tuple[float, float]
LIKELIHOODS: tuple[tuple[Callable[..., Any], tuple[Range, Range], dict[str, Range]], ...] = (
    (likelihoods.SquaredError, MEANS, {}),
    (likelihoods.Gaussian, MEANS, {}),
    (likelihoods.Gaussian, MEANS, {"logvar": SCALE}),
    (likelihoods.L1, MEANS, {}),
    (likelihoods.Laplace, MEANS, {"log_scale": SCALE}),
    (partial(likelihoods.Huber, 0.7), MEANS, {}),
    (partial(likelihoods.Charbonnier, 0.3), MEANS, {}),
    (partial(likelihoods.StudentT, 3.5), MEANS, {"log_scale": SCALE}),
    (likelihoods.Bernoulli, LOGITS, {}),
    (partial(likelihoods.Bernoulli, logits=False), ((0.02, 0.98), (0, 1)), {}),
    (likelihoods.ContinuousBernoulli, LOGITS, {}),
    (likelihoods.Poisson, LOG_RATES, {}),
    (partial(likelihoods.Poisson, full=True), LOG_RATES, {}),
    (likelihoods.NegativeBinomial, RATES, {"theta": POSITIVE}),
    (likelihoods.NegativeBinomial, RATES, {"theta": POSITIVE, "zero_logits": (-2, 2)}),
    (likelihoods.NegativeBinomial, LOG_RATES, {"total_count": POSITIVE}),
)

# The contracts, and what a user is to conclude from a broken one.
MEANING = {
    "rounding": "a result is further from the truth than rounding explains; do not rely on it here",
    "near the prior": "a small KL is wrong in its leading digits",
    "counts": "a likelihood of counts is wrong; with large dispersions a loss may mean nothing",
    "NaN and infinity": "a NaN or an overflow is hidden, or made up",
    "mixture": "a mixture of logistics or its gradients are further from the truth than promised",
    "pairs": "a density of many Gaussians, or a term of the decomposed KL, is wrong; beta-TCVAE or a mixture prior would train otherwise",
    "same bits": "equal inputs give different bits; runs cannot be reproduced exactly",
    "noise": "the noise is not the specified N(0, 1); samples may be biased or not reproducible",
}
VALUE_LIMIT, SUM_LIMIT = 4.0, 16.0  # units of rounding, where twice PyTorch's own error is less
ACTIVATION_LIMIT = 8.0  # for a gradient through an activation: the roundings of two functions
NEAR_PRIOR_LIMIT = {torch.float32: 1e-6, torch.float64: 2e-15}  # relative: about 8 units
# Of a mixture of logistics: relative for the value of a sample, and of the largest gradient.
MIXTURE_LIMITS = {torch.float32: (2e-7, 2e-5), torch.float64: (1e-12, 1e-12)}
# Of the largest value of a term and of a gradient; log q in each latent, absolute; in units of rounding of float32.
PAIRS_LIMIT, LOG_Q_LIMIT = (
    {"kl_decomposition": (5e-7, 2e-6), "mixture_log_prob": (5e-7, 6e-6)},
    1e-6,
)
COUNT_LIMIT = {torch.float32: 2e-6, torch.float64: 1e-14}  # relative
SUM_OF_PROBABILITIES_LIMIT = 1e-5
NOISE_LIMIT = {torch.float32: 1e-6, torch.float64: 1e-14}  # of max(1, |eps|)
STANDARD_ERRORS = 5.0  # for moments; their seed is fixed, so the verdict never varies

# Random123's known answers for philox4x32-10: counter, key, output.
PHILOX_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@dataclass(frozen=True)
class Check:
    """A comparison; it holds when ``error <= limit``, which a NaN never is."""

    contract: str
    op: str
    case: str
    dtype: str
    error: float
    limit: float
    unit: str
    result: str = ""  # rounding: "value", "sum" or "gradient"
    torch_error: float | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    @property
    def strain(self) -> float:
        """How much of the limit is used up: what checks are ranked by."""
        if not self.ok:
            return math.inf if math.isnan(self.error) or not self.limit else self.error / self.limit
        return self.error / self.limit if self.limit else 0.0


# Inputs -------------------------------------------------------------------------------------------


class _Maker:
    """Tensors from NumPy's generator: torch's own draws depend on the CPU's instruction set."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rng = np.random.default_rng(SEED)

    def uniform(self, shape: Sequence[int], low: float, high: float, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(self.rng.uniform(low, high, shape)).to(self.device, dtype)

    def posterior(
        self, shape: Sequence[int], dtype: torch.dtype, low: float = -5, high: float = 3
    ) -> dict[str, Tensor]:
        """As encoders deliver them: halves of one tensor, hence rows with gaps.

        Near the prior (logvar = 0) PyTorch's own error would excuse anything: `_near_prior` looks
        there, and these inputs keep away from it.
        """
        mu = self.uniform(shape, -3, 3, dtype)
        logvar = self.uniform(shape, low, high, dtype)
        logvar = torch.where(logvar.abs() < 0.25, logvar + 0.5, logvar)
        return dict(zip(("mu", "logvar"), torch.cat([mu, logvar], 1).chunk(2, 1), strict=True))

    def prior(self, logvar: Tensor) -> dict[str, Tensor]:
        """Of logvar's shape, and as far from it as `posterior` is from 0."""
        logvar_p = self.uniform(logvar.shape, -4, 2, logvar.dtype)
        logvar_p = torch.where((logvar - logvar_p).abs() < 0.25, logvar_p - 0.5, logvar_p)
        return {"mu_p": self.uniform(logvar.shape, -3, 3, logvar.dtype), "logvar_p": logvar_p}

    def upstream(self, shape: Sequence[int], reduction: str = "none") -> Tensor:
        """Not 1 but +-k / 64 in [0.5, 2), which every dtype holds exactly."""
        shapes = {"none": shape, "sample": shape[:1], "latent": shape[1:], "channel": shape[1:2]}
        shape = tuple(shapes.get(reduction, ()))
        value = self.rng.integers(32, 128, shape) / 64 * (1 - 2 * self.rng.integers(0, 2, shape))
        return torch.as_tensor(value, dtype=torch.float64, device=self.device)


def _generator(device: torch.device, seed: int = SEED) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _drawn_noise(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What an op draws for `shape` from `_generator`: in 16 bits float32's noise, unrounded."""
    wide = torch.promote_types(dtype, torch.float32)
    zeros = torch.zeros(tuple(shape), dtype=wide, device=device)
    _, eps = fastvae.reparameterize(zeros, zeros, generator=_generator(device), return_eps=True)
    return eps


def _latent_problems(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    reductions: Sequence[str],
) -> Iterator[Problem]:
    samples = "z" in OUTPUTS[op]
    ranges = {"typical": (-5, 3)}
    if samples:
        ranges["wide"] = (-40, 8)  # sigma << |mu|, where a gradient from z - mu would cancel
    for span, (low, high) in ranges.items():
        for reduction in reductions if op != "reparameterize" else (None,):
            for variant in (False, True):  # a prior; for reparameterize, a given eps
                make = _Maker(device)
                tensors = make.posterior(shape, dtype, low, high)
                upstream, options, case = {}, {}, span
                if reduction is None:
                    case += ", eps given" if variant else ", eps drawn"
                else:
                    tensors |= make.prior(tensors["logvar"]) if variant else {}
                    upstream["kl"] = make.upstream(shape, reduction)
                    options["reduction"] = reduction
                    case += f", {'prior' if variant else 'N(0, 1)'}, {reduction}"
                wants = tuple(tensors)
                drawn = samples and not (reduction is None and variant)
                if samples:
                    upstream["z"] = make.upstream(shape)
                    tensors["eps"] = _drawn_noise(shape, dtype, device)
                if samples and not drawn:
                    tensors["eps"] = tensors["eps"].to(dtype)
                    wants += ("eps",)
                seed = SEED if drawn else None
                yield Problem(op, case, _label(dtype), tensors, wants, upstream, options, seed)


def _image_problems(
    op: str,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    reductions: Sequence[str],
) -> Iterator[Problem]:
    pairs = [(reduction, reduction) for reduction in reductions]
    if op == "vae_loss" and "mean" in reductions:
        pairs.append(("mean", "batchmean"))
    for likelihood in ("mse", "gaussian"):
        for reduction, kl_reduction in pairs:
            # First the usual training step, where x is data and only the loss is differentiated.
            for everything in (False, True):
                make = _Maker(device)
                tensors = {
                    "recon_x": make.uniform(shape, -1, 2, dtypes[0]),
                    "x": make.uniform(shape, 0, 1, dtypes[1]),
                }
                options: dict[str, Any] = {"likelihood": likelihood, "reduction": reduction}
                case = f"{likelihood}, {reduction}"
                if op == "vae_loss":
                    tensors |= make.posterior((shape[0], 67), dtypes[0])
                    options |= {"beta": 0.3, "kl_reduction": kl_reduction}
                    case += f"/{kl_reduction}" if kl_reduction != reduction else ""
                case += ", every gradient" if everything else ""
                wants = tuple(n for n in tensors if everything or n != "x")
                reached = OUTPUTS[op] if everything else OUTPUTS[op][:1]
                upstream = {name: make.upstream(shape, reduction) for name in reached}
                yield Problem(op, case, _label(*dtypes), tensors, wants, upstream, options)


def _likelihood_problems(
    op: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, reductions: Any
) -> Iterator[Problem]:
    """Every likelihood, with each activation, size of its parameter, and with a weight or without."""
    for kind, (of_recon_x, of_x), of_parameters in LIKELIHOODS:
        example = kind(**dict.fromkeys(of_parameters, 1.0))
        named = example.formula
        of_a_mean = of_recon_x == MEANS[0]
        activations = (None, "sigmoid", "tanh") if of_a_mean else (None,)
        sizes = {"element": shape, "channel": (1, shape[1], *[1] * len(shape[2:]))}
        for activation, size, weighted, reduction in product(
            activations, sizes if of_parameters else ("",), (False, True), reductions
        ):
            make = _Maker(device)
            tensors = {
                "recon_x": make.uniform(shape, *of_recon_x, dtype),
                "x": make.uniform(shape, *of_x, dtype),
            }
            ready = partial(kind, activation=activation) if of_a_mean else kind
            options = {"likelihood": ready if of_parameters else ready(), "reduction": reduction}
            for name, span in of_parameters.items():
                tensors[f"likelihood.{name}"] = make.uniform(sizes[size], *span, dtype)
            if example.opaque:
                tensors["x"] = tensors["x"].round()
            if op == "vae_loss":
                tensors |= make.posterior((shape[0], 67), dtype)
                per = "latent" if weighted else "element"
                options |= {"beta": 0.3, "free_bits": 0.4, "free_bits_per": per}
            wants = tuple(name for name in tensors if name != "x" or not example.opaque)
            if weighted:
                tensors["weight"] = make.uniform(shape, -0.5, 1, dtype).clamp(min=0)
            parts = (named, activation, size, "weight" if weighted else "", reduction)
            case = ", ".join(filter(None, parts))
            upstream = {OUTPUTS[op][0]: make.upstream(shape, reduction)}
            yield Problem(op, case, _label(dtype), tensors, wants, upstream, options, further=True)


def _kl_problems(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, reductions: Any
) -> Iterator[Problem]:
    """Weights, and free bits of both kinds."""
    for prior, weighted, per, reduction in product(
        (False, True), (False, True), ("", "element", "latent"), reductions
    ):
        if per == "latent" and reduction not in ("sum", "batchmean"):
            continue
        make = _Maker(device)
        tensors = make.posterior(shape, dtype)
        tensors |= make.prior(tensors["logvar"]) if prior else {}
        wants = tuple(tensors)
        if weighted:
            tensors["weight"] = make.uniform(shape, -0.5, 1, dtype).clamp(min=0)
        options: dict[str, Any] = {"reduction": reduction}
        options |= {"free_bits": 2.0, "free_bits_per": per} if per else {}
        bits = f"free bits per {per}" if per else ""
        parts = ("prior" if prior else "N(0, 1)", "weight" if weighted else "", bits, reduction)
        case, upstream = ", ".join(filter(None, parts)), {"kl": make.upstream(shape, reduction)}
        yield Problem(
            "kl_normal", case, _label(dtype), tensors, wants, upstream, options, further=True
        )


def _further_problems(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    reductions: Sequence[str] = REDUCTIONS,
) -> Iterator[Problem]:
    """What `_problems` leaves out, and the decimals do not know."""
    if op == "kl_normal":
        yield from _kl_problems(shape, dtype, device, (*reductions, "latent"))
    elif op == "reconstruction_loss":
        yield from _likelihood_problems(op, shape, dtype, device, (*reductions, "channel"))
    elif op == "vae_loss":
        yield from _likelihood_problems(op, shape, dtype, device, ("sum",))


def _problems(
    op: str,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    reductions: Sequence[str] = REDUCTIONS,
) -> Iterator[Problem]:
    if op in ("sample_and_kl", "vae_loss"):
        reductions = [reduction for reduction in reductions if reduction != "none"]
    if op in LATENT_OPS:
        return _latent_problems(op, shape, dtypes[0], device, reductions)
    return _image_problems(op, shape, dtypes, device, reductions)


def _label(*dtypes: torch.dtype) -> str:
    return "/".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))


# Values and gradients -----------------------------------------------------------------------------


def _fastvae(problem: Problem) -> Callable[..., Any]:
    """The op; where it draws its noise, with a generator that starts afresh at each call."""
    function: Callable[..., Any] = getattr(fastvae, problem.op)
    seed = problem.generator_seed
    if seed is None:
        return function

    def drawing(*, eps: Tensor, **kwargs: Any) -> Any:
        return function(**kwargs, generator=_generator(eps.device, seed))

    return drawing


def _with_gradients(
    function: Callable[..., Any], problem: Problem, tensors: dict[str, Tensor], backwards: int = 1
) -> list[dict[str, Tensor]]:
    """Outputs and gradients (``d_<input>``), for each of `backwards` passes through one graph."""
    leaves = {n: t.detach().requires_grad_(n in problem.wants) for n, t in tensors.items()}
    outputs = call(function, problem, leaves)
    reached = [outputs[n] for n in problem.upstream]
    flowing = [g.to(outputs[n].dtype) for n, g in problem.upstream.items()]
    wanted = [leaves[n] for n in problem.wants]
    passes = []
    for i in range(backwards):
        grads = torch.autograd.grad(reached, wanted, flowing, retain_graph=i + 1 < backwards)
        named = {f"d_{n}": g for n, g in zip(problem.wants, grads, strict=True)}
        passes.append({n: o.detach() for n, o in outputs.items()} | named)
    return passes


def _rounding(problem: Problem) -> Iterator[Check]:
    ours, again = _with_gradients(_fastvae(problem), problem, problem.tensors, backwards=2)
    with torch.no_grad():  # another path in the ops: no gradients are made on the way
        bare = call(_fastvae(problem), problem, problem.tensors)

    plain = getattr(reference, problem.op)
    narrow = dict(problem.tensors)
    if "eps" in narrow:
        narrow["eps"] = narrow["eps"].to(problem.input_dtype)
    (torch_own,) = _with_gradients(plain, problem, narrow)
    # In 16 bits PyTorch's own error would excuse anything; its error in float32 sets the limit.
    wide = {n: t.to(problem.arithmetic) for n, t in problem.tensors.items()}
    truths = excusing = expected(
        problem, problem.input_dtype is torch.float64 and not problem.further
    )
    if problem.further and problem.input_dtype is torch.float64:
        # There the reference is the truth: its error in float32, in units, stands for its own.
        wide = {n: t.float() for n, t in wide.items()}
        excusing = expected(replace(problem, tensors=wide), exact=False)
    (torch_wide,) = _with_gradients(plain, problem, wide)

    for name, truth in truths.items():
        dtype = problem.result_dtype(name)
        if name.startswith("d_"):
            kind = "gradient"
        else:
            kind = "value" if name == "z" or problem.options["reduction"] == "none" else "sum"
        results = [ours[name], bare[name]] if name in bare else [ours[name]]
        summed = kind == "sum" or ("." in name and ours[name].shape != ours["d_recon_x"].shape)
        excused = torch_wide[name] if dtype is torch.float64 else torch_wide[name].to(dtype)
        excuse = 2 * units_off(excused, excusing[name], excused.dtype)
        through = kind == "gradient" and ("sigmoid" in problem.case or "tanh" in problem.case)
        least = ACTIVATION_LIMIT if through else VALUE_LIMIT
        if excusing is not truths and "negative_binomial" in problem.case:
            excuse *= 4  # the reference's d_theta cancels at 0, in float64 by other digits than in float32
        limit = max(excuse, SUM_LIMIT if summed else least)
        yield Check(
            contract="rounding",
            op=problem.op,
            case=f"{name}: {problem.case}",
            dtype=problem.dtype,
            error=max(units_off(r, truth, dtype) for r in results),
            limit=limit + excuse / 2 if excusing is not truths else limit,
            unit="units",
            result=kind,
            torch_error=units_off(torch_own[name], truth, dtype),
        )
    yield Check(
        contract="same bits",
        op=problem.op,
        case="a second backward",
        dtype=problem.dtype,
        error=sum(_differing(ours[n], again[n]) for n in ours),
        limit=0,
        unit="elements differ",
    )


def _near_prior(op: str, device: torch.device) -> Iterator[Check]:
    """exp(d) - 1 - d cancels for small d = logvar - logvar_p; PyTorch's error is no excuse."""
    steps = torch.logspace(-8, 0, 161, dtype=torch.float64, device=device)
    d = torch.cat([steps, -steps]).unsqueeze(1)  # [samples, 1], so that "sample" shows each element
    for dtype in DTYPES:
        for prior in (False, True):
            make = _Maker(device)
            tensors = {"mu": torch.zeros_like(d).to(dtype), "logvar": d.to(dtype)}
            if prior:
                tensors |= make.prior(d.to(dtype))
                tensors["mu"] = tensors["mu_p"].clone()
                tensors["logvar"] = (tensors["logvar_p"] + d).to(dtype)
            if op == "sample_and_kl":
                tensors["eps"] = torch.zeros_like(tensors["mu"])
            upstream = {"kl": make.upstream(d.shape, "sample")}
            options = {"reduction": "sample"}
            case = "prior" if prior else "N(0, 1)"
            problem = Problem(op, case, _label(dtype), tensors, ("logvar",), upstream, options)
            truth = expected(problem, exact=True)
            (ours,) = _with_gradients(getattr(fastvae, op), problem, tensors)
            (plain,) = _with_gradients(getattr(reference, op), problem, tensors)
            check = partial(Check, "near the prior", op, case, problem.dtype)
            yield check(
                result="kl",
                error=relative_error(ours["kl"], truth["kl"]),
                limit=NEAR_PRIOR_LIMIT[problem.arithmetic],
                unit="relative",
                torch_error=relative_error(plain["kl"], truth["kl"]),
            )
            yield check(
                result="d_logvar",
                error=units_off(ours["d_logvar"], truth["d_logvar"], dtype),
                limit=VALUE_LIMIT,
                unit="units",
                torch_error=units_off(plain["d_logvar"], truth["d_logvar"], dtype),
            )


def _mixture_inputs(
    make: _Maker, channels: int, dtype: torch.dtype, log_scale: Range, near: float
) -> tuple[Tensor, Tensor]:
    """Parameters and pictures; the means, given the channels before, are `near` them."""
    shape, double = (channels, 10, 3, 17, 19), torch.float64
    x = (make.uniform((channels, 3, 17, 19), 0, 256, double).floor() / 127.5 - 1).unsqueeze(1)
    means = x + make.uniform(shape, -near, near, double)
    scales, raw = make.uniform(shape, *log_scale, double), make.uniform(shape, -2, 2, double)
    if channels == 3:
        by = raw.tanh()
        means[1] -= by[0] * x[0]
        means[2] -= by[1] * x[0] + by[2] * x[1]
    of_channel = torch.stack([means, scales, raw] if channels == 3 else [means, scales], 1)
    logits = make.uniform(shape[1:], -2, 2, double)
    recon_x = torch.cat([logits, of_channel.flatten(0, 2)]).movedim(0, 1)
    return recon_x.to(dtype), x.squeeze(1).movedim(0, 1).to(dtype)


def _mixture(device: torch.device) -> Iterator[Check]:
    """Logistics as they are met in training, and some that are as narrow as they may be."""
    kinds = {"typical": ((-7.5, 0.5), 0.3), "narrow": ((-7.5, -6.5), 0.04)}
    for dtype, channels, dim, (kind, spread) in product(DTYPES, (3, 1), (1, -1), kinds.items()):
        make = _Maker(device)
        tensors = [t.movedim(1, dim) for t in _mixture_inputs(make, channels, dtype, *spread)]
        arithmetic = torch.promote_types(dtype, torch.float32)
        form = likelihoods.LogisticMixture(channel_dim=dim)
        flowing = make.upstream((3,))

        def passes(op: Any, *images: Tensor) -> list[Tensor]:
            leaves = [t.detach().clone().requires_grad_() for t in images]
            value = op(*leaves, likelihood=form, reduction="sample")  # noqa: B023
            g = flowing.to(value)  # noqa: B023
            grads = [torch.autograd.grad(value, leaves, g, retain_graph=True) for _ in range(2)]
            return [value.detach(), *grads[0], *grads[1]]

        ours = passes(fastvae.reconstruction_loss, *tensors)
        plain = passes(reference.reconstruction_loss, *(t.to(arithmetic) for t in tensors))
        truth = passes(reference.reconstruction_loss, *(t.double() for t in tensors))
        to_value, to_gradient = MIXTURE_LIMITS[arithmetic]
        case = f"{channels} channels in {dim}, {kind}"
        for i, result in enumerate(("value", "d_recon_x", "d_x")):
            size = truth[i].abs() if i == 0 else truth[i].abs().max()
            own, error = (((t[i] - truth[i]).abs() / size).max() for t in (plain, ours))
            yield Check(
                contract="mixture",
                op="reconstruction_loss",
                case=f"{result}: {case}",
                dtype=_label(dtype),
                error=float(error.nan_to_num(math.inf)),
                limit=to_gradient + torch.finfo(dtype).eps if i else to_value,
                unit="of the largest" if i else "relative",
                result=result,
                torch_error=float(own),
            )
        wrong = sum(_differing(a, b) for a, b in zip(ours[1:3], ours[3:], strict=True))
        yield Check(
            "same bits",
            "reconstruction_loss",
            "a second backward",
            _label(dtype),
            wrong,
            0,
            "elements differ",
        )


def _counts(device: torch.device) -> Iterator[Check]:
    """Negative binomials: values beside the product that the gamma functions' quotient is, and sums of all probabilities.

    Differences of lgamma are no excuse: PyTorch's have no digits left at large theta.
    """
    means, thetas = (-8, -2, -1, 0, 1, 3), (-4, -2, -1, 0, 1, 3, 6, 9, 12)
    counts = torch.arange(0, 31, 3, dtype=torch.float64, device="cpu")
    powers = [10 ** torch.tensor(ks, dtype=torch.float64, device="cpu") for ks in (means, thetas)]
    x, mu, theta = torch.cartesian_prod(counts, *powers).T
    for dtype, limit in COUNT_LIMIT.items():
        given = [t.to(device, dtype).requires_grad_() for t in (mu, theta)]
        nll = fastvae.reconstruction_loss(
            given[0],
            x.to(device, dtype),
            likelihood=likelihoods.NegativeBinomial(given[1]),
            reduction="none",
        )
        m, t = (g.detach().cpu().double() for g in given)
        k = torch.arange(30, dtype=torch.float64, device="cpu")[:, None]
        near, ratio = torch.log1p((k - m) / (t + m)), torch.log((t + k) / (t + m))
        factors = torch.where((k - m).abs() < 0.5 * (t + m), near, ratio)
        product = torch.where(k < x, factors, 0).sum(0)
        truth = torch.lgamma(x + 1) - x * torch.log(m) + t * torch.log1p(m / t) - product
        (slope,) = torch.autograd.grad(nll.sum(), given[0])
        true_slope = t / (t + m) * (m - x) / m
        check = partial(
            Check, "counts", "reconstruction_loss", dtype=_label(dtype), unit="relative"
        )
        for result, got, true in (("value", nll, truth), ("gradient", slope, true_slope)):
            error = (got.detach().cpu().double() - true).abs() / true.abs()
            worst = float(error.nan_to_num(0 if result == "gradient" else math.inf).max())
            yield check(f"negative binomial: {result}", error=worst, limit=limit, result=result)
    every = torch.arange(1 << 18, dtype=torch.float32, device=device)[None]
    for theta_of in (1e-2, 1.0, 1e2, 1e4, 1e6):
        rows = 10 ** torch.arange(-3, 5, dtype=torch.float32, device=device)[:, None]
        tail = rows * (1 + 40 / theta_of) + 40 * rows.sqrt()  # beyond it there is nothing
        rows = rows[tail < every.numel()][:, None]
        likelihood = likelihoods.NegativeBinomial(theta_of)
        nll = fastvae.reconstruction_loss(
            rows.expand(-1, every.numel()),
            every.expand(len(rows), -1),
            likelihood=likelihood,
            reduction="none",
        )
        error = float(torch.exp(-nll.cpu().double()).sum(1).log().abs().max())
        yield Check(
            contract="counts",
            op="reconstruction_loss",
            case=f"all probabilities, theta = {theta_of:g}",
            dtype="float32",
            error=error,
            limit=SUM_OF_PROBABILITIES_LIMIT,
            unit="of log 1",
            result="sum",
        )


def _classes(tensor: Tensor) -> Tensor:
    """0 where finite, 1 or -1 where infinite, 2 where NaN."""
    classes = torch.where(torch.isinf(tensor), tensor.sign(), 0.0)
    return torch.where(torch.isnan(tensor), 2.0, classes).cpu()


def _specials(op: str, device: torch.device) -> Iterator[Check]:
    """NaN and infinity stand in the results exactly where they stand in the reference's."""
    inf, nan = math.inf, math.nan
    for dtype in DTYPES:
        overflow = 800.0 if dtype is torch.float64 else 100.0  # exp(logvar), in the arithmetic
        planted: dict[str, dict[str, list[float]]] = {
            "NaN": {
                "mu": [nan],
                "logvar": [nan],
                "mu_p": [nan],
                "logvar_p": [nan],
                "recon_x": [nan],
                "x": [nan],
                "eps": [nan],
            },
            "infinity": {
                "mu": [inf, -inf],
                "logvar": [-inf, overflow],
                "recon_x": [inf, -inf],
                "x": [inf],
            },
            "logvar = inf": {"logvar": [inf]},
        }
        for case, specials in planted.items():
            wrong = 0
            for problem in _problems(op, (4, 33), (dtype, dtype), device):
                for i, (name, tensor) in enumerate(problem.tensors.items()):
                    drawn = name == "eps" and problem.generator_seed is not None
                    if name in specials and not drawn:
                        special = torch.tensor(specials[name]).to(tensor)
                        tensor[1, 5 * i : 5 * i + len(special)] = special
                (ours,) = _with_gradients(_fastvae(problem), problem, problem.tensors)
                doubles = {n: t.double() for n, t in problem.tensors.items()}
                (true,) = _with_gradients(getattr(reference, op), problem, doubles)
                for name in ours:
                    right = _classes(true[name].to(problem.result_dtype(name)))
                    wrong += int((_classes(ours[name]) != right).sum())
            yield Check("NaN and infinity", op, case, _label(dtype), wrong, 0, "elements differ")


# Pairs --------------------------------------------------------------------------------------------


def _pair_problems(
    op: str, dtype: torch.dtype, device: torch.device, large: bool = False
) -> Iterator[Problem]:
    """Of samples near the components, and (mixtures) of some that are far from all."""
    rows, components, dims = (300, 300, 11) if op == "kl_decomposition" else (300, 70, 11)
    rows, components = (rows, components) if large else (rows // 4, components // 4)
    decomposes = op == "kl_decomposition"
    variants: list[dict[str, Any]] = [{"factorized": False}, {"factorized": True}]
    if decomposes:
        variants = [{"estimator": e, "reduction": "batchmean"} for e in ("stratified", "weighted")]
        variants.append({"reduction": "sample"})
    # (Far away the reference in float64 is no truth for float64.)
    nearby = decomposes or dtype is torch.float64
    for options, far in product(variants, (False,) if nearby else (False, True)):
        make = _Maker(device)
        tensors = {
            "z": make.uniform((rows, dims), -2, 2, dtype),
            "mu": make.uniform((components, dims), -2, 2, dtype),
            "logvar": make.uniform((components, dims), -2, 1, dtype),
        }
        case = ", ".join(str(v) for v in options.values())
        if decomposes:
            options |= {"dataset_size": 50_000}
            shape: tuple[int, ...] = (rows,) if options["reduction"] == "sample" else ()
        else:
            case = ("marginals" if options["factorized"] else "mixture") + ", far" * far
            tensors["log_weight"] = make.uniform((components,), -5, -3, dtype)
            tensors["z"][::3] += 60 * far
            shape = (rows, dims) if options["factorized"] else (rows,)
        upstream = {name: make.upstream(shape) for name in OUTPUTS[op]}
        wants = tuple(tensors)
        yield Problem(op, case, _label(dtype), tensors, wants, upstream, options, further=True)


def _pairs(op: str, quick: bool, device: torch.device) -> Iterator[Check]:
    for dtype in DTYPES:
        for problem in _pair_problems(op, dtype, device, large=not quick):
            (ours,) = _with_gradients(_fastvae(problem), problem, problem.tensors)
            truths = expected(problem, exact=False)
            of_values, of_gradients = PAIRS_LIMIT[op]
            largest = max(float(np.abs(truths[n].value).max()) for n in OUTPUTS[op])
            for name, (true, _) in truths.items():
                is_gradient = name.startswith("d_")
                scale = float(np.abs(true).max()) if is_gradient else largest
                limit = of_gradients if is_gradient else of_values
                if op == "mixture_log_prob" and not is_gradient:
                    dims = 1 if problem.options["factorized"] else problem.tensors["mu"].shape[1]
                    limit = max(limit, LOG_Q_LIMIT * dims / largest)
                if dtype is torch.float64:
                    limit *= (
                        4 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
                    )  # as the reference errs
                elif is_gradient and dtype is not torch.float32:
                    limit += torch.finfo(dtype).eps / 2  # rounded at the end
                got = ours[name].detach().double().cpu().numpy()
                error = float(np.abs(got - true).max()) / scale
                where = f"{name}: {problem.case}"
                unit = "of the largest"
                yield Check("pairs", op, where, _label(dtype), error, limit, unit)
            tensors = dict(problem.tensors)
            tensors["z"] = tensors["z"].clone()
            tensors["z"][1, 0] = math.nan
            outputs = call(_fastvae(problem), problem, tensors)
            doubles = {n: t.double() for n, t in tensors.items()}
            true_outputs = call(getattr(reference, op), problem, doubles)
            wrong = sum(
                int((_classes(o) != _classes(true_outputs[n])).sum()) for n, o in outputs.items()
            )
            case = f"NaN: {problem.case}"
            yield Check("NaN and infinity", op, case, _label(dtype), wrong, 0, "elements differ")


# Bits ---------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _differing(a: Tensor, b: Tensor) -> int:
    """The number of elements whose bits differ."""
    unequal = (_bytes(a) != _bytes(b)).reshape(a.numel(), a.element_size())
    return int(unequal.any(1).sum())


@lru_cache(maxsize=1)
def _shared_out(op: str, device: torch.device, quick: bool) -> list[Problem]:
    """With enough elements for several threads; the other reductions scale the sums of these."""
    shape = (17, 4099) if op in LATENT_OPS else (5, 3, 71, 67)
    reductions = ("sum",) if quick else ("sum", "sample")
    found = [p for d in DTYPES for p in _problems(op, shape, (d, d), device, reductions)]
    return [*found, *_further_problems(op, shape, torch.float32, device, ())]


def digest(op: str, device: torch.device, quick: bool) -> str:
    """A hash of the bits of all results and gradients."""
    hashed = hashlib.sha256()
    if op == "noise":
        for dtype in DTYPES:
            eps = fastvae.random.philox_normal(70_003, seed=SEED, dtype=dtype, device=device)
            hashed.update(_bytes(eps).numpy().data)
        return hashed.hexdigest()
    problems: Iterable[Problem]
    if op in PAIRS:
        problems = (p for dtype in DTYPES for p in _pair_problems(op, dtype, device, large=True))
    else:
        problems = _shared_out(op, device, quick)
    for problem in problems:
        (results,) = _with_gradients(_fastvae(problem), problem, problem.tensors)
        for tensor in results.values():
            hashed.update(_bytes(tensor).numpy().data)
    return hashed.hexdigest()


def print_digests(*ops: str) -> None:
    """What `_same_bits` runs in a process of its own."""
    print(json.dumps({op: digest(op, torch.device("cpu"), quick=False) for op in ops}))


def _lesser_instruction_sets() -> list[str]:
    """Those the extension has kernels for, below the one in use."""
    built: list[str] = build_info()["cpu_kernels"].split()
    return built[: built.index(cpu_capability())]


def _same_bits(ops: Sequence[str], quick: bool, device: torch.device) -> Iterator[Check]:
    """In two runs, with one thread and with all, and unless quick for lesser instruction sets."""
    check = partial(Check, "same bits", dtype="all", limit=0, unit="hash differs")
    threads = torch.get_num_threads()
    many = max(threads, 2)
    case = f"1 and {many} threads" if device.type == "cpu" else "run after run"
    first = {}
    try:
        for op in ops:
            torch.set_num_threads(1)
            first[op] = digest(op, device, quick)
            torch.set_num_threads(many)
            yield check(op, case, error=digest(op, device, quick) != first[op])
    finally:
        torch.set_num_threads(threads)
    if quick or device.type != "cpu":
        return
    code = "import sys; from fastvae.cli import _checks; _checks.print_digests(*sys.argv[1:])"
    for name in _lesser_instruction_sets():
        ran = subprocess.run(  # torch chooses the instruction set once, when it starts
            [sys.executable, "-c", code, *ops],
            env=os.environ | {"ATEN_CPU_CAPABILITY": name.replace("baseline", "default")},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for op, other in json.loads(ran.stdout).items():
            yield check(op, f"{name} instructions", error=other != first[op])


# Noise --------------------------------------------------------------------------------------------


def _box_muller(start: int, count: int, seed: int, offset: int, dtype: torch.dtype) -> Tensor:
    """The specified normals in ordinary arithmetic, from the Philox words."""
    low = 0xFFFFFFFF
    lanes = 2 if dtype is torch.float64 else 4
    normals: list[float] = []
    for k in range(start // lanes, (start + count - 1) // lanes + 1):
        counter = [k & low, k >> 32, offset & low, offset >> 32]
        w = torch.ops.fastvae.philox_words(counter, [seed & low, seed >> 32]).tolist()
        if dtype is torch.float64:
            pairs, bits = [((w[0] | w[1] << 32) >> 11, (w[2] | w[3] << 32) >> 11)], 53
        else:
            pairs, bits = [(w[0], w[1]), (w[2], w[3])], 32
        for u, turn in pairs:
            radius = math.sqrt(-2 * math.log(math.ldexp(u + 0.5, -bits)))
            angle = 2 * math.pi * math.ldexp(turn, -bits)
            normals += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(normals, dtype=torch.float64)[start % lanes :][:count]


def _noise(quick: bool, device: torch.device) -> Iterator[Check]:
    philox_normal = fastvae.random.philox_normal
    check = partial(Check, "noise", "noise")
    wrong = 0
    for counter, key, answer in PHILOX_ANSWERS:
        words = torch.ops.fastvae.philox_words(counter, key).tolist()
        wrong += sum(word != a for word, a in zip(words, answer, strict=True))
    yield check("Philox's known answers", "uint32", wrong, 0, "words differ")

    for dtype, limit in NOISE_LIMIT.items():
        worst = 0.0
        for start, seed, offset in ((0, 0, 0), (3, 2**62 + 11, 2**40 + 5), (2**35 - 101, 1, 2**33)):
            got = philox_normal(
                203, seed=seed, offset=offset, start=start, dtype=dtype, device=device
            )
            true = _box_muller(start, 203, seed, offset, dtype)
            off = (got.cpu().double() - true).abs() / true.abs().clamp(min=1)
            worst = max(worst, float(off.nan_to_num(math.inf).max()))
        yield check("Box-Muller of its words", _label(dtype), worst, limit, "of max(1, |eps|)")

    if device.type == "cpu":  # a CUDA generator's offset takes part as well
        for dtype in DTYPES:
            shape = (3, 1025)
            generator = _generator(device)
            drawn = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)
            wide = torch.promote_types(dtype, torch.float32)
            noise = philox_normal(*shape, seed=int(drawn), dtype=wide, device=device).to(dtype)
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            z, eps = fastvae.reparameterize(
                zeros, zeros, generator=_generator(device), return_eps=True
            )
            both, _ = fastvae.sample_and_kl(zeros, zeros, generator=_generator(device))
            wrong = sum(_differing(noise, of_op) for of_op in (eps, z, both))
            yield check("the ops draw it", _label(dtype), wrong, 0, "elements differ")

    n = 1 << (18 if quick else 21)
    for dtype in NOISE_LIMIT:
        eps = philox_normal(n, seed=SEED, dtype=dtype, device=device).double()
        centred = eps.square() - 1
        moments = {  # samples, their mean, their variance
            "mean": (eps, 0, 1),
            "variance": (centred, 0, 2),
            "skewness": (eps**3, 0, 15),
            "kurtosis": (eps**4, 3, 96),
            "neighbours": (eps[1:] * eps[:-1], 0, 1),
            "neighbours' squares": (centred[1:] * centred[:-1], 0, 4),
        }
        for name, (samples, mean, variance) in moments.items():
            error = abs(float(samples.mean()) - mean) / math.sqrt(variance / n)
            yield check(name, _label(dtype), error, STANDARD_ERRORS, "standard errors")


# All of it ----------------------------------------------------------------------------------------


def _all_problems(op: str, quick: bool, device: torch.device) -> Iterator[Problem]:
    """Of odd shapes, larger than the blocks in which sums run; unless quick, long sums too."""
    latent = op in LATENT_OPS
    # Decimals are slow: fewer elements in float64.
    small: Sequence[int] = (5, 1031) if latent else (5, 3, 19, 19)
    exact: Sequence[int] = (3, 183) if latent else (3, 3, 61)
    large: Sequence[int] = (37, 4099) if latent else (7, 3, 83, 87)
    for first in DTYPES:
        for second in (first,) if latent else DTYPES:
            pair = (first, second)
            if first is second is torch.float64:
                yield from _problems(op, exact, pair, device)
            elif torch.float64 not in pair:
                yield from _problems(op, small, pair, device)
                if first is second and not quick:
                    yield from _problems(op, large, pair, device, ("sum", "sample"))
        some = ("none", "sum") if quick else REDUCTIONS
        yield from _further_problems(op, small, first, device, some)


def checks(ops: Sequence[str], quick: bool, device: torch.device) -> Iterator[Check]:
    """Every check of `ops` (of `OPS`), as it is done."""
    for op in ops:
        if op == "noise":
            yield from _noise(quick, device)
            continue
        if op in PAIRS:
            yield from _pairs(op, quick, device)
            continue
        for problem in _all_problems(op, quick, device):
            yield from _rounding(problem)
        if op in ("kl_normal", "sample_and_kl"):
            yield from _near_prior(op, device)
        if op == "reconstruction_loss":
            yield from _mixture(device)
            yield from _counts(device)
        yield from _specials(op, device)
    yield from _same_bits(ops, quick, device)
