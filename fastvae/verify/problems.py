"""The calls of the objective's ops that ``fastvae verify`` looks at, one for each combination of what they take."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.verify import inputs
from fastvae.verify.accuracy import OUTPUTS, varied
from fastvae.verify.inputs import DTYPES, REDUCTIONS
from fastvae.verify.likelihoods import ROWS

LATENT_OPS = ("reparameterize", "kl_normal", "sample_and_kl")
SEED = 7
BETA = {"beta": 0.3}


class Problem(NamedTuple):
    """A call of one of `OUTPUTS`, as `three_ways` takes it."""

    op: str
    case: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    seed: int | None = None
    upstream: list[Tensor | None] | None = None
    fixed: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return dtype_name(*(t.dtype for t in self.tensors.values() if t.is_floating_point()))


def dtype_name(*dtypes: torch.dtype) -> str:
    return "/".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def latents(op: str, shape: Any, dtype: torch.dtype, device: Any, reductions: Any) -> Any:
    samples = op == "reparameterize"
    for narrow, other, reduction in product(
        (False, True) if op != "kl_normal" else (False,),
        (False, True),
        reductions[:1] if samples else reductions,
    ):
        given = inputs.latents(shape, dtype, device, prior=other and not samples)
        given["logvar"] -= 25 * narrow  # sigma << |mu|: a gradient from z - mu would cancel
        # As encoders deliver them: halves of one tensor, so that there are gaps between the rows.
        halves = torch.cat([given["mu"], given["logvar"]], 1).chunk(2, 1)
        given |= dict(zip(("mu", "logvar"), halves, strict=True))
        if samples and other:
            given["eps"] = inputs.noise(shape, dtype, device)
        seed = SEED if op == "sample_and_kl" or (samples and not other) else None
        what = ("eps drawn", "eps given") if samples else ("N(0, 1)", "prior")
        case = f"{'narrow, ' * narrow}{what[other]}{'' if samples else f', {reduction}'}"
        yield Problem(op, case, given, {} if samples else {"reduction": reduction}, seed)


def kls(shape: Any, dtype: torch.dtype, device: Any, reductions: Any) -> Iterator[Problem]:
    """Weights, and free bits of both kinds."""
    for prior, weighted, per, reduction in product(
        (False, True), (False, True), ("", "element", "latent"), (*reductions, "latent")
    ):
        if per == "latent" and reduction not in ("sum", "batchmean"):
            continue
        options: dict[str, Any] = {"reduction": reduction}
        options |= {"free_bits": 2.0, "free_bits_per": per} if per else {}
        if weighted:
            options["weight"] = inputs.weight("element", shape, wide(dtype), device)
        bits = f"free bits per {per}" if per else ""
        parts = ("prior" if prior else "N(0, 1)", "weight" * weighted, bits, reduction)
        given = inputs.latents(shape, dtype, device, prior=prior)
        yield Problem("kl_normal", ", ".join(filter(None, parts)), given, options)


def images(
    op: str, shape: Any, dtypes: tuple[torch.dtype, torch.dtype], device: Any, reductions: Any
) -> Iterator[Problem]:
    pairs = [(r, {"reduction": r}) for r in reductions]
    if op == "vae_loss":
        pairs = [(r, o | BETA) for r, o in pairs if r != "none"]
        both = {"reduction": "mean", "kl_reduction": "batchmean"} | BETA
        pairs += [("mean/batchmean", both)] if "mean" in reductions else []
    for likelihood, (case, options), everything in product(("mse", "gaussian"), pairs, (0, 1)):
        given = inputs.images(shape, *dtypes, device)
        given |= inputs.latents((shape[0], 67), dtypes[0], device) if op == "vae_loss" else {}
        how: Any = {}
        if (
            not everything
        ):  # the usual training step: x is data, and only the loss is differentiated
            size = {"none": shape, "sample": shape[:1]}.get(options["reduction"], ())
            upstream = [varied(size, torch.float64), None, None][: len(OUTPUTS[op])]
            how = {"upstream": upstream, "fixed": ("x",)}
        case = f"{likelihood}, {case}{', every gradient' * everything}"
        yield Problem(op, case, given, options | {"likelihood": likelihood}, **how)


def likelihoods(
    op: str, shape: Any, dtype: torch.dtype, device: Any, reductions: Any
) -> Iterator[Problem]:
    """Every likelihood, with each activation, size of its parameter, and with a weight or without."""
    for (name, row), weighted, reduction in product(ROWS.items(), (False, True), reductions):
        sizes = ("element", "channel") if row.parameters else ("element",)
        for activation, size in product(row.activations, sizes):
            given = row.tensors(shape, dtype, device=device, parameters=size)
            more = {"activation": activation} if activation else {}
            options = {"likelihood": row.likelihood(**more), "reduction": reduction}
            if weighted:
                options["weight"] = inputs.weight("element", shape, wide(dtype), device)
            if op == "vae_loss":
                given |= inputs.latents((shape[0], 67), dtype, device)
                per = "latent" if weighted else "element"
                options |= BETA | {"free_bits": 0.4, "free_bits_per": per}
            parts = (name, activation, size * bool(row.parameters), "weight" * weighted, reduction)
            yield Problem(op, ", ".join(filter(None, parts)), given, options)


def of_op(op: str, quick: bool, device: torch.device) -> Iterator[Problem]:
    """Of odd shapes, larger than the blocks in which sums run; unless quick, long sums too."""
    some = ["none", "sum"] if quick else REDUCTIONS
    row, image = ((3, 523), (2, 3, 11, 19)) if quick else ((5, 1031), (5, 3, 19, 19))
    for dtype in DTYPES:
        if op in LATENT_OPS:
            mine = REDUCTIONS if op == "kl_normal" else [r for r in REDUCTIONS if r != "none"]
            yield from latents(op, row, dtype, device, mine)
            if op == "kl_normal":
                yield from kls(row, dtype, device, some)
            if not quick:
                yield from latents(op, (37, 4099), dtype, device, ["sum", "sample"])
            continue
        for x_dtype in DTYPES:
            if dtype == x_dtype or torch.float64 not in (dtype, x_dtype):
                yield from images(op, image, (dtype, x_dtype), device, REDUCTIONS)
        if not quick:
            yield from images(op, (7, 3, 83, 87), (dtype, dtype), device, ["sum", "sample"])
        mine = [*some, "channel"] if op == "reconstruction_loss" else ["sum"]
        yield from likelihoods(op, image, dtype, device, mine)
