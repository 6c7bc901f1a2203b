"""The checks of ``fastvae verify``: on which inputs, of what, and what each contract allows."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import fastvae
from fastvae import likelihoods
from fastvae._ops import build_info, cpu_capability
from fastvae.verify import inputs, problems
from fastvae.verify import oracle as _oracle
from fastvae.verify.accuracy import (
    OUTPUTS,
    UNITS,
    Evaluation,
    Result,
    Run,
    compare,
    drawn,
    evaluate,
    evaluations,
    results,
    three_ways,
    to_numpy,
    varied,
    with_likelihood,
)
from fastvae.verify.inputs import DTYPES, REDUCTIONS
from fastvae.verify.problems import LATENT_OPS, SEED, Problem, dtype_name, wide

# These are made of torch's matrix products and sums as well, whose bits depend on the instruction set.
OF_TORCH = ("iwae_loss", "kl_divergence")
FURTHER_OPS = (
    *("normal_log_prob", "kl_one_sample", "mixture_log_prob", "aggregate_posterior", "kl_decomposition"),
    *("kl_multivariate_normal", "sample_and_kl_multivariate_normal", *OF_TORCH, "DiagonalGaussian"),
)  # fmt: skip
OPS = (*OUTPUTS, *FURTHER_OPS, "noise")
oracle: Any = _oracle  # of arrays of any kind

# The contracts, and what a user is to conclude from a broken one.
MEANING = {
    "rounding": "a result is further from the truth than rounding explains; do not rely on it here",
    "near the prior": "a small KL is wrong in its leading digits",
    "counts": "a likelihood of counts is wrong; with large dispersions a loss may mean nothing",
    "NaN and infinity": "a NaN or an overflow is hidden, or made up",
    "mixture": "a mixture of logistics or its gradients are further from the truth than promised",
    "further ops": "a density of many Gaussians, a bound, or a KL of distributions is wrong; what is trained with it would train otherwise",
    "same bits": "equal inputs give different bits; runs cannot be reproduced exactly",
    "noise": "the noise is not the specified N(0, 1); samples may be biased or not reproducible",
}
# Limits where PyTorch's error is no excuse, for float32.
NEAR_PRIOR = 8.0  # units of rounding, of any dtype
MIXTURE, MIXTURE_GRADIENT = 2e-7, 2e-5  # of the largest
VALUE, LOG_Q, GRADIENT = 1e-6, 1e-6, 6e-6  # of the largest; absolute in each latent
COUNT, ALL_PROBABILITIES = 2e-6, 1e-5  # relative; of log 1
NOISE = 1e-6  # of max(1, |eps|)
STANDARD_ERRORS = 5.0  # for moments; their seed is fixed, so the verdict never varies


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


def _limit(limit: float, dtype: torch.dtype, rounded: bool = False) -> float:
    """`limit` is float32's, for float64 so much less; a result that is `rounded` to 16 bits may be off by a unit besides."""
    if dtype == torch.float64:
        return limit * 2.0**-27
    return limit + (torch.finfo(dtype).eps if rounded and dtype != torch.float32 else 0)


# Values and gradients -----------------------------------------------------------------------------


def _found(problem: Problem) -> tuple[Run, list[Result]]:
    op, _, tensors, options, seed, upstream, fixed = problem
    run = three_ways(op, tensors, seed, upstream, options, backwards=2, fixed=fixed)
    with torch.no_grad():  # another path in the ops: no gradients are made on the way
        generator = {} if seed is None else {"generator": _generator(tensors["mu"].device)}
        bare = getattr(fastvae, op)(**with_likelihood(tensors, options), **generator)
    outputs = (bare,) if isinstance(bare, Tensor) else tuple(bare)
    reduction = options.get("reduction", "none")
    both = run, run._replace(got=[Evaluation(outputs, {})])
    return run, [r for one in both for r in results(op, tensors, one, reduction)]


def rounding(problem: Problem) -> Iterator[Check]:
    op, dtype = problem.op, problem.dtype
    run, found = _found(problem)
    for name, kind, promised, got, (error, own, limit) in found:
        error = error if got.dtype == promised else math.inf
        case = f"{name}: {problem.case}"
        yield Check("rounding", op, case, dtype, error, limit, "units", kind, own)
    first, second = (p.grads for p in run.got)
    wrong = sum(_differing(first[n], second[n]) for n in first)
    yield Check("same bits", op, "a second backward", dtype, wrong, 0, "elements differ")


def _generator(device: Any) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def _near_prior(op: str, device: torch.device) -> Iterator[Check]:
    """exp(d) - 1 - d cancels for small d = logvar - logvar_p; PyTorch's error is no excuse."""
    steps = np.logspace(-8, 0, 161)
    d = np.concatenate([steps, -steps])[:, None]  # [samples, 1], so "sample" shows each element
    for dtype, prior in product(DTYPES, (False, True)):
        given = inputs.latents(d.shape, dtype, device, prior=prior)
        given["mu"] = given["mu_p"].clone() if prior else torch.zeros_like(given["mu"])
        given["logvar"] = inputs.tensor(d, dtype, device) + (given["logvar_p"] if prior else 0)
        given |= {"eps": torch.zeros_like(given["mu"])} if op == "sample_and_kl" else {}
        run = three_ways(op, given, options={"reduction": "sample"})
        case = "prior" if prior else "N(0, 1)"
        check = partial(Check, "near the prior", op, case, dtype_name(dtype), unit="units")
        outputs: Any = run.got[0].outputs[-1], run.want[0][-1], run.plain.outputs[-1]
        grads: Any = [g["logvar"] for g in (run.got[0].grads, run.want[1], run.plain.grads)]
        rows = ("kl", outputs, NEAR_PRIOR), ("d_logvar", grads, UNITS)
        for name, (got, want, plain), units in rows:
            error, _, limit = compare(got, want, units=units)
            yield check(error, limit, result=name, torch_error=compare(plain, want).error)


def _counts(device: torch.device) -> Iterator[Check]:
    """Negative binomials: values beside a product, and sums of all probabilities.

    PyTorch's differences of lgamma are no excuse: they have no digits left at large theta.
    """
    powers = [10.0 ** np.array(k) for k in ((-8, -2, -1, 0, 1, 3), (-4, -2, -1, 0, 1, 3, 6, 9, 12))]
    x, mu, theta = (a.ravel() for a in np.meshgrid(np.arange(0, 31, 3.0), *powers))
    op = "reconstruction_loss"
    for dtype in (torch.float32, torch.float64):
        counts = inputs.tensor(x, dtype, device)
        given = {n: inputs.tensor(v, dtype, device) for n, v in (("recon_x", mu), ("theta", theta))}

        def nll(recon_x: Tensor, theta: Tensor, counts: Tensor = counts) -> Tensor:
            form = likelihoods.NegativeBinomial(theta)
            return fastvae.reconstruction_loss(recon_x, counts, likelihood=form, reduction="none")

        got = evaluate(nll, given, [torch.ones(len(x))])
        arrays = {k: to_numpy(t) for k, t in given.items()}
        (value,), grads = oracle.negative_binomial_of_few(**arrays, x=oracle.real(x), upstream=[1])
        by = "recon_x"
        for name, of, want in (("value", *got.outputs, value), ("d_mu", got.grads[by], grads[by])):
            error = np.abs(to_numpy(of) - want) / np.maximum(np.abs(want), np.finfo(float).tiny)
            worst, case = np.nan_to_num(error, nan=np.inf).max(), f"negative binomial: {name}"
            limit = _limit(COUNT, dtype)
            yield Check(
                "counts", op, case, dtype_name(dtype), float(worst), limit, "relative", name
            )
    every = torch.arange(1 << 18, dtype=torch.float32, device=device)[None]
    for theta_of in (1e-2, 1.0, 1e2, 1e4, 1e6):
        rows = 10 ** torch.arange(-3, 5, dtype=torch.float32, device=device)[:, None]
        tail = rows * (1 + 40 / theta_of) + 40 * rows.sqrt()  # beyond it there is nothing
        rows = rows[tail < every.numel()][:, None]
        grid = rows.expand(-1, every.numel()), every.expand(len(rows), -1)
        form = likelihoods.NegativeBinomial(theta_of)
        log_p = -fastvae.reconstruction_loss(*grid, likelihood=form, reduction="none")
        error = float(torch.exp(log_p.cpu().double()).sum(1).log().abs().max())
        case, limit = f"all probabilities, theta = {theta_of:g}", ALL_PROBABILITIES
        yield Check("counts", op, case, "float32", error, limit, "of log 1", "sum")


def _specials(op: str, device: torch.device) -> Iterator[Check]:
    """NaN and infinity stand in the results exactly where they stand in the oracle's."""
    inf, nan = math.inf, math.nan
    names = ("mu", "logvar", "mu_p", "logvar_p", "recon_x", "x", "eps")
    some = [r for r in REDUCTIONS if r != "none" or op in ("kl_normal", "reconstruction_loss")]
    for dtype in DTYPES:
        overflow = 800.0 if dtype is torch.float64 else 100.0  # exp(logvar), in the arithmetic
        infinite = {"mu": [inf, -inf], "recon_x": [inf, -inf], "x": [inf]}
        planted: dict[str, dict[str, list[float]]] = {
            "NaN": {name: [nan] for name in names},
            "infinity": infinite | {"logvar": [-inf, overflow]},
            "logvar = inf": {"logvar": [inf]},
        }
        for case, specials in planted.items():
            found = problems.images(op, (4, 33), (dtype, dtype), device, some)
            if op in LATENT_OPS:
                found = problems.latents(op, (4, 33), dtype, device, some)
            wrong = 0
            for problem in found:
                for i, (name, tensor) in enumerate(problem.tensors.items()):
                    special = torch.tensor(specials.get(name, [])).to(tensor)
                    tensor[1, 5 * i : 5 * i + len(special)] = special
                wrong += sum(r.comparison.error == inf for r in _found(problem)[1])
            yield Check("NaN and infinity", op, case, dtype_name(dtype), wrong, 0, "results differ")


# Further ops: no plain expression stands beside them ------------------------------------------------


class Further(NamedTuple):
    """A call: `function` takes the tensors; `truth` is the oracle's, with outputs and gradients."""

    op: str
    case: str
    tensors: dict[str, Tensor]
    function: Callable[..., Any]
    truth: Callable[..., Any]
    limit: float = VALUE  # of the values, relative to the largest one
    gradient: float = GRADIENT
    absolute: float = 0.0  # another limit of the values, if that is larger
    contract: str = "further ops"


def _given_as(scale: str, logvar: Tensor) -> Tensor:
    return (logvar / 2).exp() if scale == "sigma" else logvar / 2


def _of_scale(scale: str, *, upstream: Any, **given: Any) -> Any:
    """The KL from log_sigma or sigma in the place of logvar."""
    sigma = scale == "sigma"
    logvars = {n: 2 * np.log(a) if sigma else 2 * a for n, a in given.items() if "logvar" in n}
    kl, grads = oracle.kl_normal(**given | logvars, reduction="sample", upstream=upstream)
    return kl, grads | {n: 2 * grads[n] / (given[n] if sigma else 1) for n in logvars}


def _of_scales(loc: Any, scale: Any, loc_p: Any, scale_p: Any, *, upstream: Any) -> Any:
    given = {"mu": loc, "logvar": scale, "mu_p": loc_p, "logvar_p": scale_p}
    kl, grads = _of_scale("sigma", **given, upstream=upstream)
    return kl, {n.replace("mu", "loc").replace("logvar", "scale"): g for n, g in grads.items()}


def _density(x: Any, mu: Any, logvar: Any, *, upstream: Any) -> Any:
    options = {"likelihood": {"kind": "Gaussian", "full": True}, "reduction": "sample"}
    parameters = {"likelihood.logvar": logvar}
    nll, by = oracle.reconstruction_loss(mu, x, **options, **parameters, upstream=upstream)
    return nll, {"x": by["x"], "mu": by["recon_x"], "logvar": by["likelihood.logvar"]}


def _kl_of(kind: Any, name: str) -> Callable[..., Tensor]:
    """Of distributions that let NaN through."""

    def kl(*_: Any, **given: Tensor) -> Tensor:
        q, p = (
            kind(given[mean], **{name: given[scale]}, validate_args=False)
            for mean, scale in (list(given)[:2], list(given)[2:])
        )
        return fastvae.kl_divergence(q, p)

    return kl


def _kl_of_posteriors(mu: Tensor, logvar: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    posterior = fastvae.DiagonalGaussian(mu, logvar)
    return posterior.kl(fastvae.DiagonalGaussian(mu_p, logvar_p))


def _nll_of_posterior(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return fastvae.DiagonalGaussian(torch.cat([mu, logvar], 1)).nll(x)


def further(
    op: str, dtype: torch.dtype, device: torch.device, large: bool = False
) -> Iterator[Further]:
    rows, components = (300, 70) if large else (75, 17)
    call: Any = getattr(fastvae, op)
    of: Any = {"dtype": dtype, "device": device}
    sample: Any = {"reduction": "sample"}

    def alike(case: str, given: dict[str, Tensor], how: dict[str, Any], *limits: Any) -> Further:
        truth = partial(getattr(oracle, op), **how)
        return Further(op, case, given, partial(call, **how), truth, *limits)

    if op == "reconstruction_loss":  # logistics as they are met in training, and very narrow ones
        kinds: Any = {"typical": {}, "narrow": {"log_scale": (-7.5, -6.5), "near": 0.04}}
        for channels, last, (kind, spread) in product((3, 1), (False, True), kinds.items()):
            form = likelihoods.LogisticMixture(channel_dim=-1 if last else 1)
            given = inputs.pictures((3, 17, 19), channels, last=last, **spread, **of)
            truth = partial(oracle.logistic_mixture, channel_dim=form.channel_dim, **sample)
            function, case = (
                partial(call, likelihood=form, **sample),
                f"{channels} channels, {kind}",
            )
            yield Further(op, case, given, function, truth, MIXTURE, MIXTURE_GRADIENT, 0, "mixture")
    elif op == "kl_normal":  # what else the second argument may be
        for scale, prior in product(("log_sigma", "sigma"), (False, True)):
            given = inputs.latents((rows, 11), prior=prior, **of)
            given |= {n: _given_as(scale, t) for n, t in given.items() if "logvar" in n}
            how = {"scale": scale, **sample}
            function, case = partial(call, **how), f"{scale}, {'prior' if prior else 'N(0, 1)'}"
            yield Further(op, case, given, function, partial(_of_scale, scale))
    elif op in ("normal_log_prob", "kl_one_sample"):
        given = inputs.latents((rows, 11), prior=op == "kl_one_sample", **of)
        one_for_all = {n: t[:1] if n.endswith("_p") else t for n, t in given.items()}
        yield alike("sample", {"z": inputs.noise((rows, 11), **of)} | one_for_all, sample)
    elif op == "mixture_log_prob":
        for factorized, far in product((False, True), (1.0, 30.0)):
            given = inputs.pairs(rows, components, 11, by_row=False, spread=far, **of)
            case = ("marginals" if factorized else "mixture") + ", far" * (far > 1)
            limits = (
                VALUE / 2,
                GRADIENT * far,
                11 * LOG_Q,
            )  # far away the exponents have few digits
            yield alike(case, given, {"factorized": factorized}, *limits)
    elif op == "aggregate_posterior":
        for by_row in (False, True):
            given = inputs.pairs(rows, components, 11, by_row=by_row, **of)
            yield alike(
                "of rows" if by_row else "shared", given, {}, VALUE / 2, GRADIENT, 11 * LOG_Q
            )
    elif op == "kl_decomposition":
        for estimator, reduction in product(("stratified", "weighted"), ("batchmean", "sample")):
            how = {"dataset_size": 50_000, "estimator": estimator, "reduction": reduction}
            given = inputs.pairs(rows, rows, 11, by_row=None, **of)
            yield alike(f"{estimator}, {reduction}", given, how)
    elif dtype in (torch.bfloat16, torch.float16):
        return  # what follows is of torch's own operations, in float32 for 16 bits
    elif "multivariate" in op:
        # `large` is for the bits; those of another prior are torch.linalg's
        for prior, reduction in product((False, True)[: 2 - large], ("sample", "mean")):
            given = inputs.gaussians((rows,), 7, prior=prior, **of)
            given |= {"eps": inputs.noise((rows, 7), **of)} if "sample" in op else {}
            case = f"{'prior' if prior else 'N(0, I)'}, {reduction}"
            yield alike(case, given, {"reduction": reduction})
    elif op == "iwae_loss":
        yield alike("50 samples", {"log_weight": inputs.noise((rows, 50), **of) * 5}, {})
    elif op == "kl_divergence":
        latents = inputs.latents((rows, 11), prior=True, **of)
        given = {n.replace("mu", "loc").replace("logvar", "scale"): t for n, t in latents.items()}
        given = {n: t.exp() if "scale" in n else t for n, t in given.items()}
        yield Further(op, "Normal", given, _kl_of(Normal, "scale"), _of_scales)
        given = inputs.gaussians((rows,), 7, **of)
        of_factors = _kl_of(MultivariateNormal, "scale_tril")
        truth = partial(oracle.kl_multivariate_normal, **sample)
        yield Further(op, "MultivariateNormal", given, of_factors, truth)
    else:
        given = inputs.latents((rows, 3, 5), prior=True, **of)
        yield Further(op, "kl", given, _kl_of_posteriors, partial(oracle.kl_normal, **sample))
        given = {"x": inputs.noise((rows, 3, 5), **of)} | {n: given[n] for n in ("mu", "logvar")}
        yield Further(op, "nll", given, _nll_of_posterior, _density)


def _of_further(one: Further, dtype: torch.dtype) -> Iterator[Check]:
    given, label = one.tensors, dtype_name(dtype)
    got, again = evaluations(one.function, given, backwards=2)
    upstream = [to_numpy(varied(o.shape, o.dtype)) for o in got.outputs]
    arrays = {k: to_numpy(t) for k, t in given.items()}
    outputs, grads = one.truth(**arrays, upstream=upstream)
    outputs = outputs[: len(upstream)]
    largest = max(float(np.abs(want).max()) for want in outputs)
    limit = _limit(max(one.limit, one.absolute / largest), dtype)
    values = zip(got.outputs, outputs, strict=True)
    rows = [(f"output {i}", *pair, largest, limit) for i, pair in enumerate(values)]
    limit = _limit(one.gradient, dtype, rounded=True)
    for n, g in got.grads.items():
        rows.append((f"d_{n}", g, grads[n], float(np.abs(grads[n]).max()), limit))
    for name, result, want, size, limit in rows:
        error = np.nan_to_num(np.abs(to_numpy(result) - want), nan=np.inf).max() / size
        case, unit = f"{name}: {one.case}", "of the largest"
        kind = "gradient" if name.startswith("d_") else "value"
        yield Check(one.contract, one.op, case, label, float(error), limit, unit, kind)
    wrong = sum(_differing(g, again.grads[n]) for n, g in got.grads.items())
    yield Check("same bits", one.op, "a second backward", label, wrong, 0, "elements differ")


def _further_nan(one: Further, dtype: torch.dtype) -> Check:
    given = dict(one.tensors)
    name = next(iter(given))
    given[name] = given[name].clone()
    given[name][1, 0] = math.nan
    arrays = {k: to_numpy(t) for k, t in given.items()}
    outputs = one.function(**given)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    true, _ = one.truth(**arrays, upstream=[None] * len(outputs))
    pairs = zip(outputs, true, strict=False)
    wrong = sum(int((np.isnan(to_numpy(a)) != np.isnan(b)).sum()) for a, b in pairs)
    case = f"NaN: {one.case}"
    return Check("NaN and infinity", one.op, case, dtype_name(dtype), wrong, 0, "elements differ")


# Bits ---------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _differing(a: Tensor, b: Tensor) -> int:
    """The number of elements whose bits differ."""
    unequal = (_bytes(a) != _bytes(b)).reshape(a.numel(), a.element_size())
    return int(unequal.any(1).sum())


def _evaluated(op: str, device: torch.device, quick: bool) -> Iterator[Evaluation]:
    """With enough elements for several threads; the other reductions scale the sums of these."""
    reductions = ["sum"] if quick else ["sum", "sample"]
    for dtype in DTYPES:
        if op in FURTHER_OPS:
            yield from (
                evaluate(s.function, s.tensors) for s in further(op, dtype, device, large=True)
            )
            continue
        if op in LATENT_OPS:
            found = list(problems.latents(op, (17, 4099), dtype, device, reductions))
        else:
            found = list(problems.images(op, (5, 3, 71, 67), (dtype, dtype), device, reductions))
        if dtype == torch.float32 and op == "kl_normal":
            found += problems.kls((17, 4099), dtype, device, [])
        elif dtype == torch.float32 and op not in LATENT_OPS:
            some = ["channel"] if op == "reconstruction_loss" else ["sum"]
            found += problems.likelihoods(op, (5, 3, 71, 67), dtype, device, some)
        for _, _, tensors, options, seed, upstream, _ in found:
            generator = {} if seed is None else {"generator": _generator(device)}
            yield evaluate(getattr(fastvae, op), tensors, upstream, **generator, **options)


def digest(op: str, device: torch.device, quick: bool) -> str:
    """A hash of the bits of all results and gradients."""
    hashed = hashlib.sha256()
    if op == "noise":
        draw = partial(fastvae.random.philox_normal, 70_003, seed=SEED, device=device)
        found = iter([Evaluation(tuple(draw(dtype=dtype) for dtype in DTYPES), {})])
    else:
        found = _evaluated(op, device, quick)
    for outputs, grads in found:
        for tensor in (*outputs, *grads.values()):
            hashed.update(_bytes(tensor).numpy().data)
    return hashed.hexdigest()


def print_digests(*ops: str) -> None:
    """What `_same_bits` runs in a process of its own."""
    print(json.dumps({op: digest(op, torch.device("cpu"), quick=False) for op in ops}))


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
    built: list[str] = build_info()["cpu_kernels"].split()
    ours = [op for op in ops if op not in OF_TORCH]
    if quick or device.type != "cpu" or not ours:
        return
    code = "import sys; from fastvae.verify import checks; checks.print_digests(*sys.argv[1:])"
    for name in built[: built.index(cpu_capability())]:
        ran = subprocess.run(  # torch chooses the instruction set once, when it starts
            [sys.executable, "-c", code, *ours],
            env=os.environ | {"ATEN_CPU_CAPABILITY": name.replace("baseline", "default")},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for op, other in json.loads(ran.stdout).items():
            yield check(op, f"{name} instructions", error=other != first[op])


# Noise --------------------------------------------------------------------------------------------


def _noise(quick: bool, device: torch.device) -> Iterator[Check]:
    philox_normal = fastvae.random.philox_normal
    check = partial(Check, "noise", "noise")
    wrong = 0
    for counter, key, answer in oracle.KNOWN_ANSWERS:
        words = torch.ops.fastvae.philox_words(counter, key).tolist()
        wrong += sum(word != a for word, a in zip(words, answer, strict=True))
    yield check("Philox's known answers", "uint32", wrong, 0, "words differ")

    for dtype in (torch.float32, torch.float64):
        worst = 0.0
        for start, seed, offset in ((0, 0, 0), (3, 2**62 + 11, 2**40 + 5), (2**35 - 101, 1, 2**33)):
            where = {"seed": seed, "offset": offset, "start": start}
            got = philox_normal(203, **where, dtype=dtype, device=device)
            want = oracle.normal(203, **where, double=dtype == torch.float64)
            off = np.abs(to_numpy(got) - want) / np.maximum(np.abs(want), 1)
            worst = max(worst, float(np.where(np.isnan(off), np.inf, off).max()))
        limit = _limit(NOISE, dtype)
        yield check("Box-Muller of its words", dtype_name(dtype), worst, limit, "of max(1, |eps|)")

    for dtype in DTYPES:
        noise = drawn((3, 1025), SEED, wide(dtype), device).to(dtype)
        zeros = torch.zeros((3, 1025), dtype=dtype, device=device)
        z, eps = fastvae.reparameterize(zeros, zeros, generator=_generator(device), return_eps=True)
        both, _ = fastvae.sample_and_kl(zeros, zeros, generator=_generator(device))
        wrong = sum(_differing(noise, of_op) for of_op in (eps, z, both))
        yield check("the ops draw it", dtype_name(dtype), wrong, 0, "elements differ")

    n = 1 << (18 if quick else 21)
    for dtype in (torch.float32, torch.float64):
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
            yield check(name, dtype_name(dtype), error, STANDARD_ERRORS, "standard errors")


@np.errstate(all="ignore")  # infinities and NaNs are meant
def checks(ops: Sequence[str], quick: bool, device: torch.device) -> list[Check]:
    """Every check of `ops` (of `OPS`)."""
    return list(_checks(ops, quick, device))


def _checks(ops: Sequence[str], quick: bool, device: torch.device) -> Iterator[Check]:
    for op in ops:
        if op == "noise":
            yield from _noise(quick, device)
        elif op in FURTHER_OPS:
            for dtype in DTYPES:
                for one in further(op, dtype, device, large=not quick):
                    yield from _of_further(one, dtype)
                    yield _further_nan(one, dtype)
        else:
            for problem in problems.of_op(op, quick, device):
                yield from rounding(problem)
            if op in ("kl_normal", "sample_and_kl"):
                yield from _near_prior(op, device)
            if op in ("kl_normal", "reconstruction_loss"):
                for dtype in DTYPES:
                    for one in further(op, dtype, device):
                        yield from _of_further(one, dtype)
            if op == "reconstruction_loss":
                yield from _counts(device)
            yield from _specials(op, device)
    yield from _same_bits(ops, quick, device)
