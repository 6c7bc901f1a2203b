"""The fused ops over the table of likelihoods: parameters, weights, activations, integers, free bits, derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import check, evaluate, with_likelihood
from cases import (
    DTYPES,
    EMPTY_SHAPES,
    HALVES,
    MIXED,
    REDUCTIONS,
    WEIGHTS,
    images,
    latents,
    old_dynamo,
    tensor,
    weight,
)
from likelihoods_table import EVERY_ROW, ROWS, WITH_ACTIVATION, WITH_PARAMETERS, full
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastvae
from fastvae import kl_normal, likelihoods, reconstruction_loss, vae_loss

SHAPES = [(7,), (3, 513), (2, 3, 5, 7), (2, 4097)]
SHAPE = (3, 5, 130)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", [*REDUCTIONS, "channel"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def loss(tensors: dict[str, Tensor], **options: Any) -> Tensor:
    """reconstruction_loss, with the likelihood's parameters among the tensors."""
    return reconstruction_loss(**with_likelihood(tensors, options))


def wanted(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [t for t in leaves.values() if t.requires_grad]


@EVERY_ROW
@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(row, shape, dtype, reduction, device):
    tensors = row.tensors(shape, dtype, device=device)
    check("reconstruction_loss", tensors, reduction=reduction, likelihood=row.likelihood())


@EVERY_ROW
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7), (2, 1, 600), (700, 3)], ids=str)
def test_a_sum_for_each_channel(row, shape, dtype, device):
    tensors = row.tensors(shape, dtype, device=device)
    check("reconstruction_loss", tensors, reduction="channel", likelihood=row.likelihood())


@WITH_PARAMETERS
@EVERY_REDUCTION
@EVERY_DTYPE
@pytest.mark.parametrize("parameters", ["channel", "scalar"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (9, 1000), (64, 3, 33)], ids=str)
def test_parameters_that_broadcast(row, shape, parameters, dtype, reduction, device):
    """Their gradients are summed inside the pass."""
    tensors = row.tensors(shape, dtype, device=device, parameters=parameters)
    likelihood = row.likelihood(**full(row))
    check("reconstruction_loss", tensors, reduction=reduction, likelihood=likelihood)


@WITH_PARAMETERS
@pytest.mark.parametrize("size", [(5, 130), (130,), (3, 1, 130), (1, 1, 1), (3, 5, 1)], ids=str)
def test_parameters_of_any_shape_that_broadcasts(row, size, device):
    tensors = row.tensors(SHAPE, device=device)
    for name in row.parameters:
        tensors[f"likelihood.{name}"] = tensor(
            row.parameter(name, np.linspace(-1.5, 0.4, math.prod(size)).reshape(size)),
            torch.float32,
            device,
        )
    for reduction in ("mean", "none"):
        check("reconstruction_loss", tensors, reduction=reduction, likelihood=row.likelihood())


@WITH_PARAMETERS
@pytest.mark.parametrize("number", [0, -0.7, 0.1])
def test_a_number_for_a_parameter(row, number, device):
    for dtype in DTYPES:
        tensors = row.tensors(SHAPE, dtype, device=device)
        images = {k: tensors[k] for k in ("recon_x", "x")}
        made = row.make(**row.every_parameter(number))
        check("reconstruction_loss", images, likelihood=made)


@WITH_ACTIVATION
@EVERY_REDUCTION
@EVERY_DTYPE
def test_activation(row, activation, dtype, reduction, device):
    tensors = row.tensors(SHAPE, dtype, device=device)
    likelihood = row.likelihood(activation=activation, x_scale=0.37)
    check("reconstruction_loss", tensors, reduction=reduction, likelihood=likelihood)


@EVERY_ROW
@pytest.mark.parametrize(
    "x_dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_integers(row, dtype, x_dtype, device):
    tensors = row.tensors(SHAPE, dtype, device=device)
    x = (tensors["x"].float().abs() * 30).clamp(max=100).round()
    tensors["x"] = x > 15 if x_dtype == torch.bool else x.to(x_dtype)
    likelihood = row.likelihood(x_scale=1.0 if x_dtype == torch.bool else 1 / 255)
    for reduction in ("mean", "sample", "none", "channel"):
        check("reconstruction_loss", tensors, reduction=reduction, likelihood=likelihood)


@EVERY_ROW
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, *HALVES], ids=str)
def test_mixed_dtypes(row, dtypes, parameter_dtype, device):
    tensors = {
        k: t.to(parameter_dtype if "." in k else dtypes[k == "x"])
        for k, t in row.tensors(SHAPE, device=device).items()
    }
    for reduction in ("mean", "sample", "none"):
        check("reconstruction_loss", tensors, reduction=reduction, likelihood=row.likelihood())


@EVERY_ROW
@EVERY_REDUCTION
def test_the_additive_constant(row, reduction, device):
    if not full(row):
        pytest.skip("has none")
    tensors = row.tensors(SHAPE, device=device)
    w = weight("sample", SHAPE, torch.float32, device)
    for options in ({}, {"weight": w}):
        likelihood = row.likelihood(full=True)
        check("reconstruction_loss", tensors, reduction=reduction, likelihood=likelihood, **options)


@EVERY_ROW
@EVERY_REDUCTION
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(row, shape, reduction, device):
    if reduction == "channel" and len(shape) == 1:
        pytest.skip("has no channels")
    for parameters in ("element", "scalar"):
        tensors = row.tensors(shape, device=device, parameters=parameters)
        check("reconstruction_loss", tensors, reduction=reduction, likelihood=row.likelihood())


@EVERY_ROW
@pytest.mark.parametrize("parameter", [-50.0, 0.3, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_extremes(row, parameter, dtype, reduction, device):
    """All at once, and each in a sum of its own."""
    tensors = row.extremes(parameter, dtype, device)
    options = {"reduction": reduction, "likelihood": row.likelihood()}
    # The same upstream gradient for all: a small one would bring back what has overflowed.
    if reduction == "none":
        check(
            "reconstruction_loss",
            tensors,
            upstream=[torch.full_like(tensors["recon_x"], 0.7)],
            **options,
        )
        return
    for i in range(tensors["x"].numel()):
        one = {k: t.flatten()[i : i + 1] for k, t in tensors.items()}
        check("reconstruction_loss", one, upstream=[torch.tensor(0.7, dtype=dtype)], **options)


@EVERY_ROW
@pytest.mark.parametrize("reduction", ["none", "sample"])
def test_nan_in_nan_out(row, reduction, device):
    """In values and gradients alike."""
    good = row.tensors((3, 40), device=device)
    for name in good:
        tensors = good | {name: good[name].to(good["recon_x"].dtype, copy=True)}
        tensors[name][1, 7] = math.nan
        got = check(
            "reconstruction_loss", tensors, reduction=reduction, likelihood=row.likelihood()
        )
        assert got.outputs[0].isnan().sum() == 1, name


@EVERY_ROW
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_as_the_formula_gives_it(row, value, device):
    if not row.activations[1:]:
        pytest.skip("not of a mean")
    tensors = row.tensors((3, 40), device=device)
    tensors["recon_x"][1, 7] = value
    got = evaluate(reconstruction_loss, tensors, likelihood=row.likelihood(), reduction="none")
    assert got.outputs[0][1, 7] == math.inf
    assert got.outputs[0].isfinite().sum() == 119


@pytest.mark.parametrize(
    ("string", "name"),
    [
        ("mse", "mse"),
        ("gaussian", "gaussian"),
        ("l1", "l1"),
        ("bce_with_logits", "bernoulli"),
        ("bce", "bernoulli_probabilities"),
        ("continuous_bernoulli", "continuous_bernoulli"),
        ("poisson", "poisson"),
    ],
)
def test_a_name_is_the_object(string, name):
    tensors = ROWS[name].tensors(SHAPE)
    made = ROWS[name].make()
    for reduction in REDUCTIONS:
        assert torch.equal(
            reconstruction_loss(**tensors, likelihood=string, reduction=reduction),
            reconstruction_loss(**tensors, likelihood=made, reduction=reduction),
        )


# Weights


@EVERY_ROW
@EVERY_REDUCTION
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights(row, dtype, kind, reduction, device):
    tensors = row.tensors(SHAPE, dtype, device=device, parameters="channel")
    w = weight(kind, SHAPE, dtype, device)
    check(
        "reconstruction_loss", tensors, reduction=reduction, likelihood=row.likelihood(), weight=w
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, *HALVES], ids=str)
@EVERY_REDUCTION
def test_weights_of_another_dtype(dtype, weight_dtype, reduction, device):
    w = weight("element", SHAPE, weight_dtype, device)
    check("reconstruction_loss", images(SHAPE, dtype, device=device), reduction=reduction, weight=w)


@EVERY_ROW
@EVERY_REDUCTION
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_has_no_weight_counts_for_nothing(row, reduction, bad, device):
    """Whatever its value: the result and the gradients are those to the bit that another value gives."""
    tensors = row.tensors(SHAPE, x_dtype=torch.float32, device=device)
    w = weight("element", SHAPE, torch.float32, device)
    spoiled = {k: t.masked_fill(w == 0, bad) for k, t in tensors.items()}
    options = {"reduction": reduction, "likelihood": row.likelihood(), "weight": w}
    expected, got = (evaluate(reconstruction_loss, t, **options) for t in (tensors, spoiled))
    assert torch.equal(got.outputs[0], expected.outputs[0])
    assert got.outputs[0].isfinite().all()
    for name, grad in got.grads.items():
        assert torch.equal(grad, expected.grads[name]), name
        assert not grad[w == 0].any(), name


def test_what_has_no_weight_counts_for_nothing_in_the_objective(device):
    w = weight("element", SHAPE, torch.float32, device)
    tensors = images(SHAPE, device=device) | latents((3, 5), device=device)
    spoiled = tensors | {"x": tensors["x"].masked_fill(w == 0, math.nan)}
    for reduction in ("mean", "batchmean", "sample"):
        expected, got = (
            evaluate(vae_loss, t, reduction=reduction, weight=w) for t in (tensors, spoiled)
        )
        for a, b in zip(got.outputs, expected.outputs, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(got.grads["recon_x"], expected.grads["recon_x"])


def test_no_weight_at_all(device):
    tensors = images(SHAPE, device=device)
    w = torch.zeros(SHAPE, device=device)
    assert reconstruction_loss(**tensors, weight=w) == 0
    assert reconstruction_loss(
        **tensors, weight=w, reduction="mean"
    ).isnan()  # 0 / 0, as of nothing


def test_a_weight_that_wants_a_gradient_is_refused(device):
    w = torch.rand(3, 1, 1, device=device, requires_grad=True)
    tensors = images(SHAPE, device=device)
    for call in (
        lambda: reconstruction_loss(**tensors, weight=w),
        lambda: kl_normal(*latents(SHAPE, device=device).values(), weight=w),
    ):
        with pytest.raises(
            ValueError, match=r"weight must not require a gradient.*weight\.detach\(\)"
        ):
            call()


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "latent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_weighted_kl(dtype, reduction, kind, prior, device):
    tensors = latents((40, 3, 6), dtype, device, prior=prior)
    w = weight(kind, (40, 3, 6), dtype, device)
    check("kl_normal", tensors, reduction=reduction, weight=w)


# Of each latent, and free bits


@pytest.mark.parametrize("prior", [False, True])
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(5,), (1, 7), (64, 20), (9, 1000), (600, 3, 2)], ids=str)
def test_the_kl_of_each_latent(shape, dtype, prior, device):
    tensors = latents(shape, dtype, device, prior=prior)
    got = check("kl_normal", tensors, reduction="latent")
    assert got.outputs[0].shape == shape[1:]


@pytest.mark.parametrize("prior", [False, True])
@EVERY_DTYPE
@pytest.mark.parametrize("free_bits", [0.05, 1.7, 30.0])
@pytest.mark.parametrize(
    ("per", "reduction"),
    [("latent", "sum"), ("latent", "batchmean"), *[("element", r) for r in REDUCTIONS]],
)
def test_free_bits(per, reduction, free_bits, dtype, prior, device):
    for shape in ((64, 20), (5,), (3, 513), (4, 3, 50)):
        tensors = latents(shape, dtype, device, prior=prior)
        options = {"reduction": reduction, "free_bits": free_bits, "free_bits_per": per}
        check("kl_normal", tensors, **options)
        check(
            "kl_normal",
            tensors,
            **options,
            weight=weight("sample", shape, tensors["mu"].dtype, device),
        )


def test_free_bits_that_all_latents_lack(device):
    mu = torch.zeros(8, 5, device=device, requires_grad=True)
    kl = kl_normal(mu, mu, free_bits=0.5)
    assert kl == 2.5
    assert not torch.autograd.grad(kl, mu)[0].any()


def test_free_bits_of_0_are_none(device):
    tensors = latents((8, 5), device=device)
    for per in ("latent", "element"):
        assert torch.equal(
            kl_normal(**tensors, free_bits=0.0, free_bits_per=per), kl_normal(**tensors)
        )


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean", "sample"])
@EVERY_ROW
def test_in_the_objective(row, reduction, device):
    """Weights and free bits too."""
    tensors = row.tensors(SHAPE, device=device, parameters="channel") | latents(
        (3, 7), device=device
    )
    options = {"reduction": reduction, "likelihood": row.likelihood(), "beta": 0.3}
    check("vae_loss", tensors, **options)
    check("vae_loss", tensors, **options, weight=weight("channel", SHAPE, torch.float32, device))
    check("vae_loss", tensors, **options, free_bits=0.8, free_bits_per="element")
    if reduction in ("sum", "batchmean"):
        check("vae_loss", tensors, **options, free_bits=0.8)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EVERY_ROW
def test_in_the_objective_of_16_bits(row, dtype, device):
    tensors = row.tensors(SHAPE, dtype, device=device) | latents((3, 7), dtype, device)
    check("vae_loss", tensors, likelihood=row.likelihood(), beta=0.3)


# Derivatives, programs and functions


@EVERY_ROW
@pytest.mark.parametrize("reduction", ["sum", "mean", "sample", "none", "channel"])
@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivatives(row, reduction, weighted):
    tensors = row.tensors((3, 2, 2), torch.float64, parameters="channel")
    options: dict[str, Any] = {"reduction": reduction, "likelihood": row.likelihood(x_scale=0.9)}
    if weighted:
        options["weight"] = weight("element", (3, 2, 2))

    def op(*values: Tensor) -> Tensor:
        return loss(dict(zip(tensors, values, strict=True)), **options)

    leaves = tuple(t.requires_grad_(t.is_floating_point()) for t in tensors.values())
    assert gradcheck(op, leaves)
    assert gradgradcheck(op, leaves)


@WITH_ACTIVATION
def test_second_derivatives_through_an_activation(row, activation):
    tensors = row.tensors((3, 4), torch.float64)
    options = {"likelihood": row.likelihood(activation=activation)}

    def op(*values: Tensor) -> Tensor:
        return loss(dict(zip(tensors, values, strict=True)), **options)

    assert gradgradcheck(op, tuple(t.requires_grad_() for t in tensors.values()))


def at_zero(likelihood: Any, x: float) -> Callable[[Tensor], Tensor]:
    return lambda v: reconstruction_loss(v, torch.full_like(v, x), likelihood=likelihood)


def zero_inflated(x: float) -> Callable[[Tensor], Tensor]:
    def of(zero_logits: Tensor) -> Tensor:
        mu, inflated = torch.ones_like(zero_logits), likelihoods.NegativeBinomial(2.0, zero_logits)
        return reconstruction_loss(mu, x * mu, likelihood=inflated)

    return of


CORNERS = {
    "bce_with_logits": at_zero("bce_with_logits", 0.8),
    "sigmoid": at_zero(likelihoods.SquaredError(activation="sigmoid"), 0.3),
    "tanh": at_zero(likelihoods.Gaussian(0.3, activation="tanh"), 0.2),
    "continuous_bernoulli": at_zero("continuous_bernoulli", 0.3),
    "logits of counts": at_zero(likelihoods.NegativeBinomial(total_count=2.0), 3.0),
    "zero_logits, a zero": zero_inflated(0.0),
    "zero_logits, a count": zero_inflated(1.0),
    "student_t": at_zero(likelihoods.StudentT(3.0, 0.3), 0.0),
    "charbonnier": at_zero(likelihoods.Charbonnier(0.4), 0.0),
}


@pytest.mark.parametrize("function", CORNERS.values(), ids=CORNERS)
def test_second_derivatives_at_zero(function):
    """A formula in |recon_x|, or one that tests for recon_x = x, has a corner there, and the loss has none."""

    def gradient(at: float, **options: Any) -> tuple[Tensor, Tensor]:
        v = torch.full((1, 1), at, dtype=torch.float64, requires_grad=True)
        return v, torch.autograd.grad(function(v), v, **options)[0]

    v, first = gradient(0.0, create_graph=True)
    h = 1e-5
    expected = (gradient(h)[1] - gradient(-h)[1]) / (2 * h)
    torch.testing.assert_close(torch.autograd.grad(first, v)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("likelihood", ["l1", likelihoods.Laplace(0.3)], ids=str)
def test_second_derivatives_at_the_corner_of_an_absolute_error(likelihood):
    v = torch.zeros(1, 1, requires_grad=True)
    (first,) = torch.autograd.grad(at_zero(likelihood, 0.0)(v), v, create_graph=True)
    assert torch.autograd.grad(first, v)[0] == 0


@pytest.mark.parametrize(
    "options",
    [{"free_bits": 1.2}, {"free_bits": 1.2, "free_bits_per": "element"}, {"reduction": "latent"}],
    ids=str,
)
def test_second_derivatives_of_the_kl(options):
    tensors = latents((3, 4), torch.float64, prior=True)
    leaves = tuple(t.requires_grad_() for t in tensors.values())
    assert gradcheck(lambda *t: kl_normal(*t, **options), leaves)
    assert gradgradcheck(lambda *t: kl_normal(*t, **options), leaves)


@EVERY_ROW
@pytest.mark.parametrize("reduction", ["sum", "mean", "sample", "none"])
def test_any_choice_of_inputs_that_want_a_gradient(row, reduction):
    """The gradients that are made do not depend on which others are."""
    tensors = row.tensors((3, 1000), parameters="scalar")
    options = {"reduction": reduction, "likelihood": row.likelihood()}
    value = loss(tensors, **options)
    g = torch.full_like(value, -0.7)
    every = evaluate(reconstruction_loss, tensors, [g], **options)
    assert torch.equal(value, every.outputs[0])
    for name in every.grads:
        one = {k: t.clone().requires_grad_(k == name) for k, t in tensors.items()}
        (grad,) = torch.autograd.grad(loss(one, **options), one[name], g)
        assert torch.equal(grad, every.grads[name]), name


@EVERY_ROW
def test_two_backwards_agree(row, device):
    """The gradients kept from the forward pass, and those that are made again."""
    tensors = row.tensors((9, 1000), device=device, parameters="scalar")
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    value = loss(leaves, likelihood=row.likelihood(), reduction="mean")
    g = torch.tensor(-0.7, device=device)
    first, second = (
        torch.autograd.grad(value, wanted(leaves), g, retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@EVERY_ROW
@pytest.mark.parametrize("reduction", ["batchmean", "sample", "none", "channel"])
@pytest.mark.parametrize("mapped", ["all", "recon_x", "parameters"])
def test_vmap(row, reduction, mapped, device):
    """Against a loop."""
    tensors = row.tensors((4, 3, 5, 6), torch.float64, device=device)
    options = {"reduction": reduction, "likelihood": row.likelihood()}
    dims = {
        k: 0 if mapped == "all" or k == mapped or (mapped == "parameters" and "." in k) else None
        for k in tensors
    }
    if not any(d == 0 for d in dims.values()):
        pytest.skip("has no parameters")
    shared = {k: t if dims[k] == 0 else t[0] for k, t in tensors.items()}
    got = torch.vmap(lambda t: loss(t, **options), in_dims=(dims,))(shared)
    one_by_one = [
        loss({k: t[i] if dims[k] == 0 else t for k, t in shared.items()}, **options)
        for i in range(4)
    ]
    torch.testing.assert_close(got, torch.stack(one_by_one))


@WITH_PARAMETERS
def test_a_sparse_parameter_is_named(row):
    given = row.tensors((3, 5), parameters="element")
    recon_x, x, *parameters = given.values()
    sparse = dict(zip(row.parameters, (p.to_sparse() for p in parameters), strict=True))
    with pytest.raises(TypeError, match=rf"likelihood's {row.parameters[0]} must be .*to_dense"):
        reconstruction_loss(recon_x, x, likelihood=row.make(**sparse))


@WITH_PARAMETERS
def test_torch_func_takes_the_object(row):
    tensors = row.tensors((3, 5), torch.float64, parameters="channel")
    recon_x, x, *parameters = tensors.values()
    made = row.make(**dict(zip(row.parameters, parameters, strict=True)))
    got = torch.func.grad(lambda m: reconstruction_loss(recon_x, x, likelihood=m))(made)
    want = evaluate(
        reconstruction_loss,
        tensors,
        [torch.ones((), dtype=torch.float64)],
        likelihood=row.likelihood(),
    )
    for name, parameter in zip(row.parameters, got.parameters, strict=True):
        torch.testing.assert_close(parameter, want.grads[f"likelihood.{name}"])


@EVERY_ROW
@pytest.mark.parametrize("op", [reconstruction_loss, vae_loss])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(row, op, backend):
    """Built inside, and passed in."""
    torch._dynamo.reset()
    tensors = row.tensors(SHAPE, parameters="channel")
    if op is vae_loss:
        tensors |= latents((3, 7))
    w = weight("sample", SHAPE, torch.float32)
    extra = {"likelihood": row.likelihood(x_scale=0.5), "weight": w}

    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    made = with_likelihood(leaves, extra)

    def total(result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else sum(result)

    def built_inside(leaves: dict[str, Tensor]) -> Tensor:
        return total(op(**with_likelihood(leaves, extra)))

    def passed_in(arguments: dict[str, Any]) -> Tensor:
        return total(op(**arguments))

    want = total(op(**made))
    gradients = torch.autograd.grad(want, wanted(leaves))
    for function, argument in ((built_inside, leaves), (passed_in, made)):
        got = torch.compile(function, fullgraph=True, backend=backend)(argument)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, wanted(leaves)), gradients)


@old_dynamo
def test_numbers_that_change_are_right_in_compiled_programs():
    """free_bits, a likelihood's numbers and its parameter given as a number."""
    torch._dynamo.reset()
    tensors = images((4, 6)) | latents((4, 2))

    def total(s):
        first = vae_loss(**tensors, likelihood=likelihoods.Huber(s), free_bits=s).loss
        return first + vae_loss(**tensors, likelihood=likelihoods.Laplace(s, x_scale=s)).loss

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for s in (0.1, 0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(s), total(s))


def test_a_learned_scale_in_a_training_step():
    """The gradient of a shared scale is 0 where the scale is right: log_scale = log(mean |error|)."""
    recon_x, x = images((16, 3, 8, 8), torch.float64).values()
    log_scale = (recon_x - x).abs().mean().log().requires_grad_()
    reconstruction_loss(recon_x, x, likelihood=likelihoods.Laplace(log_scale)).backward()
    assert abs(log_scale.grad.item()) < 1e-10


def test_module_keeps_the_likelihood():
    tensors = ROWS["bernoulli"].tensors(SHAPE) | latents((3, 7))
    module = fastvae.nn.VAELoss(likelihood=likelihoods.Bernoulli())
    want = vae_loss(**tensors, likelihood="bce_with_logits")
    assert torch.equal(module(**tensors).loss, want.loss)


# Errors


def refused(
    match: str,
    *,
    error: type[Exception] = ValueError,
    op: Any = reconstruction_loss,
    **spoiled: Any,
) -> None:
    arguments = images((3, 5)) if op is reconstruction_loss else latents((3, 5))
    with pytest.raises(error, match=rf"(?is){op.__name__}.*{match}"):
        op(**arguments | spoiled)


@pytest.mark.parametrize("size", [(4,), (3, 4), (5, 3), (2, 3, 5), (3,), (0,)], ids=str)
def test_what_does_not_broadcast(size):
    bad = torch.ones(size)
    refused(r"log_scale.*\[3, 5\]", likelihood=likelihoods.Laplace(bad))
    refused(r"weight.*\[3, 5\]", weight=bad)
    refused(r"weight.*\[3, 5\]", op=kl_normal, weight=bad)


def test_dtypes_and_devices():
    refused(
        "log_scale.*float64",
        error=TypeError,
        likelihood=likelihoods.Laplace(torch.zeros(5).double()),
    )
    refused(
        "log_scale.*(dtype|long)",
        error=TypeError,
        likelihood=likelihoods.Laplace(torch.zeros(5).long()),
    )
    refused("weight.*(dtype|long)", error=TypeError, weight=torch.ones(5).long())
    refused("weight.*device", error=(ValueError, RuntimeError), weight=torch.ones(5, device="meta"))
    refused(
        "log_scale.*device",
        error=(ValueError, RuntimeError),
        likelihood=likelihoods.Laplace(torch.zeros(5, device="meta")),
    )
    refused("recon_x.*(dtype|long)", error=TypeError, recon_x=torch.ones(3, 5).long())


def test_reductions_that_belong_to_others():
    refused("channel.*latent", reduction="latent")
    refused("latent.*channel", op=kl_normal, reduction="channel")
    refused("channel", reduction="channel", recon_x=torch.ones(3), x=torch.ones(3))
    for reduction in ("latent", "channel", "none"):
        with pytest.raises(ValueError, match=rf"vae_loss.*{reduction}"):
            vae_loss(**images((3, 5)), **latents((3, 2)), reduction=reduction)


def test_free_bits_that_make_no_sense():
    for bad in (-0.1, math.nan, math.inf):
        refused("free_bits", op=kl_normal, free_bits=bad)
    refused("free_bits", error=TypeError, op=kl_normal, free_bits="1")
    refused("free_bits_per.*latent.*element", op=kl_normal, free_bits=0.1, free_bits_per="sample")
    for reduction in ("mean", "sample", "none", "latent"):
        refused(f"free_bits.*{reduction}", op=kl_normal, free_bits=0.1, reduction=reduction)
