"""The policy: what an error may be, and how an op is run beside PyTorch's expression and the oracle.

In an element the error against the oracle may be at most the larger of

* 2 x the largest error that PyTorch makes anywhere in the same tensor with the plain expression, and
* `UNITS` (4, or 16 for a sum) units of rounding of the result's dtype at the true value.

For 16-bit inputs PyTorch's expression is evaluated in float32, since that is the arithmetic that fastvae promises there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastvae
import fastvae.reference
from fastvae._ops import build_info
from fastvae.verify import oracle

EMULATED = "emulation" in build_info()["cuda"]  # the CPU runs the CUDA kernels (tests/emulation)
TOP_BIT = 1 << 63  # of the offset of noise that is drawn on CUDA
UNITS = 4
UNITS_OF_A_SUM = 16

Tensors = dict[str, Tensor]
OUTPUTS = {
    "reparameterize": ("z",),
    "kl_normal": ("kl",),
    "sample_and_kl": ("z", "kl"),
    "reconstruction_loss": ("recon",),
    "vae_loss": ("loss", "recon", "kl"),
}


class Evaluation(NamedTuple):
    outputs: tuple[Tensor, ...]
    grads: dict[str, Tensor]


class Comparison(NamedTuple):
    """In units of rounding, of the element that comes closest to its limit. The error is infinite where NaN or infinity differ."""

    error: float
    own: float  # the largest error of PyTorch's expression, 0 without it
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


def compare(
    got: Tensor, want: oracle.Array, plain: Tensor | None = None, *, units: float = UNITS
) -> Comparison:
    """`got` beside the oracle's `want`, under the policy; `plain` is PyTorch's own result."""
    info = torch.finfo(got.dtype)
    if got.dtype == torch.float64 and np.finfo(np.longdouble).eps >= info.eps:
        units *= 2  # this platform's NumPy has nothing wider: the oracle rounds as well
    actual = to_numpy(got)
    if actual.shape != want.shape:
        return Comparison(math.inf, 0, units)
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.where(np.abs(want) > info.max, np.sign(want) * np.inf, want)
    finite = np.isfinite(want)
    if not np.array_equal(actual[~finite], want[~finite], equal_nan=True):
        return Comparison(math.inf, 0, units)
    actual, want = actual[finite], want[finite]
    if not want.size:
        return Comparison(0, 0, units)
    # smallest normal x eps is the spacing of subnormals: nothing can be closer than that
    unit = info.eps * np.maximum(np.abs(want), info.tiny)
    error, own, bound = np.abs(actual - want), oracle.real(0), units * unit
    if plain is not None:
        errors = np.abs(to_numpy(plain)[finite] - want)
        own = np.max(errors, initial=0, where=np.isfinite(errors))
        bound = np.maximum(bound, 2 * own)
    error = np.where(np.isnan(error), np.inf, error)
    i = int(np.argmax(error / bound))
    return Comparison(*(float(v / unit[i]) for v in (error[i], own, bound[i])))


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """The dtype of every result but z."""
    return torch.float64 if inputs[0].dtype == torch.float64 else torch.float32


def to_numpy(t: Tensor) -> oracle.Array:
    return oracle.real(t.detach().cpu().double().numpy())


def varied(
    shape: Sequence[int], dtype: torch.dtype | None, device: Any = None, low: float = -1.7123
) -> Tensor:
    """An upstream gradient that differs in every element and is 0 or 1 in none."""
    values = np.linspace(low, 2.3457, num=int(np.prod(shape)) + 1)[1:].reshape(shape)
    return torch.tensor(values, dtype=dtype, device=device)


def with_likelihood(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op. Tensors named ``likelihood.<field>`` go to the function that the option ``likelihood`` is then."""
    arguments = {k: t for k, t in tensors.items() if "." not in k} | dict(options)
    if callable(likelihood := options.get("likelihood")):
        arguments["likelihood"] = likelihood(
            **{k.removeprefix("likelihood."): t for k, t in tensors.items() if "." in k}
        )
    return arguments


def for_the_oracle(value: Any) -> Any:
    """Tensors as arrays, a likelihood as the dict of its kind and fields."""
    if isinstance(value, Tensor):
        return to_numpy(value)
    if isinstance(value, fastvae.likelihoods.Likelihood):
        fields = {k: for_the_oracle(v) for k, v in vars(value).items()}
        return {"kind": type(value).__name__, **fields}
    return value


def oracle_options(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: for_the_oracle(v) for k, v in with_likelihood(tensors, options).items() if k in options
    }


def evaluate(
    op: Callable[..., Any],
    tensors: Tensors,
    upstream: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> Evaluation:
    """The outputs of `op` and the gradients of all floating `tensors`, for arbitrary upstream gradients unless given."""
    return evaluations(op, tensors, upstream, **options)[0]


def evaluations(
    op: Callable[..., Any],
    tensors: Tensors,
    upstream: Sequence[Tensor | None] | None = None,
    backwards: int = 1,
    fixed: Sequence[str] = (),
    **options: Any,
) -> list[Evaluation]:
    """Of as many backward passes through one graph; the `fixed` tensors want no gradient."""
    likelihood = with_likelihood(tensors, options).get("likelihood")
    if getattr(likelihood, "opaque", False):  # counts get no gradient
        fixed = ("x",)
    inputs = {
        k: t.detach().requires_grad_(t.is_floating_point() and k not in fixed)
        for k, t in tensors.items()
    }
    leaves = {k: t for k, t in inputs.items() if t.requires_grad}
    result = op(**with_likelihood(inputs, options))
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    if upstream is None:
        upstream = [varied(o.shape, o.dtype, o.device) for o in outputs]
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
    reached = [o for o, _ in pairs]
    flowing = [g.to(o.device, o.dtype) for o, g in pairs]
    passes = []
    for i in range(backwards):
        grads = torch.autograd.grad(
            reached,
            list(leaves.values()),
            flowing,
            materialize_grads=True,
            retain_graph=i + 1 < backwards,
        )
        named = dict(zip(leaves, grads, strict=True))
        passes.append(Evaluation(tuple(o.detach() for o in outputs), named))
    return passes


class Run(NamedTuple):
    """An op, PyTorch's expression in the op's arithmetic, and the oracle, on the same inputs."""

    got: list[Evaluation]  # of each backward pass
    plain: Evaluation
    want: oracle.Result


def three_ways(
    name: str,
    tensors: Tensors,
    seed: int | None = None,
    upstream: Sequence[Tensor | None] | None = None,
    options: Mapping[str, Any] = {},
    **how: Any,
) -> Run:
    """With `seed` the op draws its own noise, from a generator with that seed; the others are given it.

    `how`: backwards and fixed, as in `evaluations`.
    """
    first = next(iter(tensors.values()))
    generator: dict[str, Any] = {}
    noise = {}
    if seed is not None:
        generator["generator"] = torch.Generator(first.device).manual_seed(seed)
        noise["eps"] = drawn(first.shape, seed, result_dtype(first), first.device)
    got = evaluations(getattr(fastvae, name), tensors, upstream, **how, **generator, **options)
    if upstream is None:
        upstream = [varied(o.shape, o.dtype, o.device) for o in got[0].outputs]
    wide = {k: t.detach().to(result_dtype(t)) for k, t in tensors.items()}
    plain = evaluate(getattr(fastvae.reference, name), wide, upstream, **noise, **options)
    want = getattr(oracle, name)(
        **{k: to_numpy(t) for k, t in (tensors | noise).items()},
        upstream=[None if g is None else to_numpy(g) for g in upstream],
        **oracle_options(tensors, options),
    )
    return Run(got, plain, want)


class Result(NamedTuple):
    """An output, or (``d_<input>``) a gradient."""

    name: str
    kind: str  # "value", "sum" or "gradient"
    dtype: torch.dtype  # as promised
    got: Tensor
    comparison: Comparison


def results(name: str, tensors: Tensors, run: Run, reduction: str) -> list[Result]:
    """All that the op `name` has computed, under the policy."""
    found = []
    (got, *_), plain, (outputs, grads) = run
    first = next(iter(tensors.values()))
    for label, g, p, w in zip(OUTPUTS[name], got.outputs, plain.outputs, outputs, strict=True):
        elementwise = label == "z" or reduction == "none"
        dtype = result_dtype(first)
        if label == "z":
            dtype = torch.promote_types(tensors["mu"].dtype, tensors["logvar"].dtype)
        # Against the promised dtype: a result that is too narrow must not get wider units.
        compared = compare(g.to(dtype), w, p, units=UNITS if elementwise else UNITS_OF_A_SUM)
        found.append(Result(label, "value" if elementwise else "sum", dtype, g, compared))
    for label, g in got.grads.items():
        summed = "." in label and tensors[label].shape != first.shape
        units = UNITS_OF_A_SUM if summed else UNITS
        compared = compare(g, grads[label], plain.grads[label], units=units)
        found.append(Result(f"d_{label}", "gradient", tensors[label].dtype, g, compared))
    return found


def drawn(
    shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, device: Any = None
) -> Tensor:
    """The noise that an op draws from a generator that was just seeded with `seed`."""
    device = torch.device(device or torch.get_default_device())
    seed, offset = key_of(seed, device)
    return fastvae.random.philox_normal(shape, seed=seed, offset=offset, dtype=dtype, device=device)


def key_of(seed: int, device: torch.device) -> tuple[int, int]:
    """The seed and offset of what an op draws first from a generator that was just seeded with `seed`."""
    if device.type != "cpu":  # on CUDA the key is the generator's own seed
        return seed, TOP_BIT
    seed = draw_seed(torch.Generator(device).manual_seed(seed))
    # As tests/emulation/ATen/cuda/CUDAGeneratorImpl.h has it.
    return seed, TOP_BIT + seed % 2 * 48 if EMULATED else 0


def draw_seed(generator: torch.Generator) -> int:
    """The next 64 bits of a CPU generator."""
    drawn = torch.empty((), dtype=torch.int64, device="cpu")
    return int(drawn.random_(-(2**63), None, generator=generator))
