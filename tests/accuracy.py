"""Run an op beside the plain expression and the oracle, and compare errors rather than numbers.

The policy. In an element the error against the oracle may be at most the larger of

* 2 x the largest error that PyTorch makes anywhere in the same tensor with the plain expression, and
* `UNITS` (4, or 16 for a sum) units of rounding of the result's dtype at the true value.

For 16-bit inputs PyTorch's expression is evaluated in float32, since that is the arithmetic that fastvae promises there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from torch import Tensor

import fastvae
import fastvae.reference
from fastvae.random import philox_normal

UNITS = 4
UNITS_OF_A_SUM = 16

Tensors = Mapping[str, Tensor]
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


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """The dtype of every result but z."""
    return torch.float64 if inputs[0].dtype == torch.float64 else torch.float32


def z_dtype(tensors: Tensors) -> torch.dtype:
    return torch.promote_types(tensors["mu"].dtype, tensors["logvar"].dtype)


def to_numpy(t: Tensor) -> oracle.Array:
    return oracle.real(t.detach().cpu().double().numpy())


def varied(
    shape: Sequence[int], dtype: torch.dtype, device: Any = None, low: float = -1.7123
) -> Tensor:
    """An upstream gradient that differs in every element and is 0 or 1 in none."""
    values = np.linspace(low, 2.3457, num=int(np.prod(shape)) + 1)[1:].reshape(shape)
    return torch.tensor(values, dtype=dtype, device=device)


def with_likelihood(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op. Tensors named ``likelihood.<field>`` go to the function that the option ``likelihood`` is then."""
    arguments = {k: t for k, t in tensors.items() if "." not in k} | options
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
    op: Any, tensors: Tensors, upstream: Sequence[Tensor | None] | None = None, **options: Any
) -> Evaluation:
    """The outputs of `op` and the gradients of all floating `tensors`, for arbitrary upstream gradients unless given."""
    likelihood = with_likelihood(tensors, options).get("likelihood")
    fixed = {"x"} if getattr(likelihood, "opaque", False) else set()  # counts get no gradient
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
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        list(leaves.values()),
        [g.to(o.device, o.dtype) for o, g in pairs],
        materialize_grads=True,
    )
    return Evaluation(tuple(o.detach() for o in outputs), dict(zip(leaves, grads, strict=True)))


def assert_accurate(
    got: Tensor,
    want: oracle.Array,
    plain: Tensor | None = None,
    *,
    units: float = UNITS,
    what: str = "result",
) -> None:
    """Fails where `got` is further from the oracle's `want` than the policy allows; `plain` is PyTorch's own result."""
    info = np.finfo(np.float64) if got.dtype == torch.float64 else torch.finfo(got.dtype)
    actual = to_numpy(got)
    assert actual.shape == want.shape, f"{what}: shape {actual.shape}, expected {want.shape}"
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.where(np.abs(want) > info.max, np.sign(want) * np.inf, want)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(actual[~finite], want[~finite], err_msg=what)
    actual, want = actual[finite], want[finite]
    # smallest normal x eps is the spacing of subnormals: nothing can be closer than that
    bound = units * info.eps * np.maximum(np.abs(want), float(info.tiny))
    if plain is not None:
        own = np.abs(to_numpy(plain)[finite] - want)
        bound = np.maximum(bound, 2 * np.max(own, initial=0, where=np.isfinite(own)))
    error = np.abs(actual - want)
    bad = ~(error <= bound)
    if bad.any():
        i = int(np.argmax(np.where(np.isnan(error), np.inf, error / bound)))
        raise AssertionError(
            f"{what} ({got.dtype}): {bad.sum()} of {bad.size} elements are off, worst at finite element {i}: "
            f"got {actual[i]!r}, want {want[i]!r}, error {error[i]:.3g} > {bound[i]:.3g}"
        )


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
    got, plain, (want_outputs, want_grads) = three_ways(name, tensors, seed, upstream, options)
    first = next(iter(tensors.values()))
    reduced = options.get("reduction", "batchmean") != "none"
    for label, g, p, w in zip(OUTPUTS[name], got.outputs, plain.outputs, want_outputs, strict=True):
        assert g.dtype == (z_dtype(tensors) if label == "z" else result_dtype(first)), label
        assert_accurate(
            g, w, p, units=UNITS_OF_A_SUM if reduced and label != "z" else UNITS, what=label
        )
    for label, g in got.grads.items():
        t, what = tensors[label], f"gradient of {label}"
        assert (g.dtype, g.device, g.shape) == (t.dtype, t.device, t.shape), what
        units = UNITS_OF_A_SUM if "." in label and t.shape != first.shape else UNITS
        assert_accurate(g, want_grads[label], plain.grads[label], units=units, what=what)
    return got


def three_ways(
    name: str,
    tensors: Tensors,
    seed: int | None,
    upstream: Sequence[Tensor | None] | None,
    options: dict[str, Any],
) -> tuple[Evaluation, Evaluation, oracle.Result]:
    first = next(iter(tensors.values()))
    generator, noise = {}, {}
    if seed is not None:
        generator["generator"] = torch.Generator(first.device).manual_seed(seed)
        noise["eps"] = drawn(first.shape, seed, result_dtype(first), first.device)
    got = evaluate(getattr(fastvae, name), tensors, upstream, **generator, **options)
    if upstream is None:
        upstream = [varied(o.shape, o.dtype, o.device) for o in got.outputs]
    wide = {k: t.detach().to(result_dtype(t)) for k, t in tensors.items()}
    plain = evaluate(getattr(fastvae.reference, name), wide, upstream, **noise, **options)
    want = getattr(oracle, name)(
        **{k: to_numpy(t) for k, t in tensors.items()},
        **{k: to_numpy(t) for k, t in noise.items()},
        upstream=[None if g is None else to_numpy(g) for g in upstream],
        **oracle_options(tensors, options),
    )
    return got, plain, want


def drawn(
    shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, device: Any = None
) -> Tensor:
    """The noise that an op draws from a generator that was just seeded with `seed`."""
    device = torch.device(device or torch.get_default_device())
    if device.type == "cpu":  # on CUDA the key is the generator's own seed
        seed = draw_seed(torch.Generator(device).manual_seed(seed))
    return philox_normal(shape, seed=seed, dtype=dtype, device=device)


def draw_seed(generator: torch.Generator) -> int:
    """The next 64 bits of a CPU generator."""
    return int(
        torch.empty((), dtype=torch.int64, device="cpu").random_(
            -(2**63), None, generator=generator
        )
    )
