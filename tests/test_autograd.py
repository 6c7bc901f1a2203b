"""Derivatives of first and second order, and backward used in the ways that training loops use it."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import OUTPUTS, assert_accurate, check, evaluate, to_numpy, varied
from cases import DTYPES, REDUCTIONS, inputs, latents, noise, seeded_generator, vae_inputs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

import fastvae
from fastvae import kl_normal, reconstruction_loss, reparameterize, sample_and_kl, vae_loss

OPS = list(OUTPUTS)


def seeded(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with the same noise at every call."""
    return lambda *args, **kwargs: op(*args, **kwargs, generator=seeded_generator(8))


def leaves(op: str, shape=(3, 5), dtype=torch.float32, **kwargs) -> dict[str, Tensor]:
    return {k: t.requires_grad_() for k, t in inputs(op, shape, dtype, **kwargs).items()}


def as_tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def total(result) -> Tensor:
    """A scalar that reaches every output with a gradient of its own."""
    return sum(((i + 0.7) * o.float().square()).sum() for i, o in enumerate(as_tuple(result)))


# First and second derivatives against finite differences

KL_CASES = list(itertools.product(REDUCTIONS, [False, True]))


def differentiable_cases():
    for prior, noisy in itertools.product([False, True], repeat=2):
        if not prior:
            yield "reparameterize", {}, prior, noisy
        for reduction in ("sum", "batchmean", "mean", "sample"):
            yield "sample_and_kl", {"reduction": reduction}, prior, noisy
    for reduction, prior in KL_CASES:
        yield "kl_normal", {"reduction": reduction}, prior, False
    for reduction, likelihood in itertools.product(REDUCTIONS, ["mse", "gaussian"]):
        yield (
            "reconstruction_loss",
            {"reduction": reduction, "likelihood": likelihood},
            False,
            False,
        )
    for reduction, kl_reduction in [
        ("sum", "mean"),
        ("batchmean", None),
        ("mean", "batchmean"),
        ("sample", None),
    ]:
        for likelihood in ("mse", "gaussian"):
            options = {
                "reduction": reduction,
                "kl_reduction": kl_reduction,
                "likelihood": likelihood,
                "beta": 0.3,
            }
            yield "vae_loss", options, False, False


@pytest.mark.parametrize(
    ("name", "options", "prior", "noisy"), list(differentiable_cases()), ids=str
)
def test_gradcheck(name, options, prior, noisy):
    """gradcheck also demands that two backwards agree to the bit. `noisy`: the op draws, else it is given eps."""
    tensors = leaves(name, (3, 4), torch.float64, **({"prior": True} if prior else {}))
    op = functools.partial(getattr(fastvae, name), **options)
    if noisy:
        del tensors["eps"]
        op = seeded(op)
    names = list(tensors)

    def fn(*args):
        return as_tuple(op(**dict(zip(names, args, strict=True))))

    assert gradcheck(fn, tuple(tensors.values()), nondet_tol=0.0)
    assert gradgradcheck(fn, tuple(tensors.values()), nondet_tol=0.0)


@pytest.mark.parametrize("reached", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradgradcheck_of_some_outputs_of_vae_loss(reached):
    tensors = leaves("vae_loss", (3, 4), torch.float64)

    def fn(*args):
        out = vae_loss(*args, beta=0.3)
        return tuple(out[i] for i in reached)

    used = [
        n
        for n, i in [("recon_x", 1), ("x", 1), ("mu", 2), ("logvar", 2)]
        if 0 in reached or i in reached
    ]
    assert used
    assert gradcheck(fn, tuple(tensors.values()))
    assert gradgradcheck(fn, tuple(tensors.values()))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_create_graph_gives_the_same_gradient(name, dtype):
    """The differentiable gradient is another expression, so only as equal as rounding allows."""
    tensors = leaves(name, (3, 700), dtype)
    grads = {}
    for create_graph in (False, True):
        result = getattr(fastvae, name)(**tensors)
        grads[create_graph] = torch.autograd.grad(
            total(result), list(tensors.values()), create_graph=create_graph
        )
    assert all(g.requires_grad for g in grads[True])
    for a, b in zip(grads[True], grads[False], strict=True):
        rounding = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            a.detach(), b, rtol=rounding, atol=rounding * b.abs().max().item()
        )


def test_second_derivative_in_float32():
    """A gradient penalty: d/dlogvar of |dKL/dlogvar|^2 with dKL/dlogvar = (exp(logvar) - 1) / 2."""
    mu, logvar = latents((4, 300)).values()
    logvar.requires_grad_()
    (d,) = torch.autograd.grad(kl_normal(mu, logvar, reduction="sum"), logvar, create_graph=True)
    d.square().sum().backward()
    assert logvar.grad is not None
    torch.testing.assert_close(logvar.grad, 0.5 * logvar.detach().expm1() * logvar.detach().exp())


# Backward more than once


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_second_backward_gives_the_bits_of_the_first(name, dtype, factor):
    tensors = list(leaves(name, (3, 1700), dtype).values())
    outputs = as_tuple(getattr(fastvae, name)(**leaves_by_name(name, tensors)))
    upstream = [torch.full_like(outputs[0], factor)]
    kwargs = {"retain_graph": True, "allow_unused": True}
    first = torch.autograd.grad(outputs[0], tensors, upstream, **kwargs)
    kept = [None if g is None else g.clone() for g in first]
    second = torch.autograd.grad(outputs[0], tensors, upstream, **kwargs)
    third = torch.autograd.grad(outputs[0], tensors, [2 * upstream[0]], **kwargs)
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        if a is not None:
            assert torch.equal(a, b), "a later backward changed the gradient that was handed out"
            assert torch.equal(b, c)
            assert torch.equal(2 * b.double(), d.double())


def leaves_by_name(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(inputs(name, (1, 1)), tensors, strict=True))


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["ones", "threes", "graph", "recon"])), ids="-".join
)
def test_backwards_in_any_order_agree(order):
    """The gradients made in the forward are spent once; whoever comes first must not change what others get."""
    tensors = list(leaves("vae_loss", (5, 900)).values())
    out = vae_loss(*tensors, beta=0.3)

    def backward(kind):
        output = out.recon if kind == "recon" else out.loss
        g = torch.full_like(output, 3.0 if kind == "threes" else 1.0)
        grads = torch.autograd.grad(
            output,
            tensors,
            g,
            retain_graph=True,
            create_graph=kind == "graph",
            materialize_grads=True,
        )
        return [g.detach().clone() for g in grads]

    fresh = vae_loss(*tensors, beta=0.3)
    expected = {
        "ones": torch.autograd.grad(fresh.loss, tensors, retain_graph=True),
        "recon": torch.autograd.grad(
            fresh.recon, tensors, retain_graph=True, materialize_grads=True
        ),
    }
    expected["graph"] = expected["ones"]
    expected["threes"] = torch.autograd.grad(
        vae_loss(*tensors, beta=0.3).loss, tensors, torch.tensor(3.0)
    )
    for kind in order:
        if kind == "graph":  # another expression: equal up to rounding
            torch.testing.assert_close(backward(kind), list(expected[kind]))
        else:
            assert all(
                torch.equal(a, b) for a, b in zip(backward(kind), expected[kind], strict=True)
            ), kind


@pytest.mark.parametrize("name", OPS)
def test_second_backward_without_retain_graph_raises(name):
    result = as_tuple(getattr(fastvae, name)(**leaves(name)))[-1]
    result.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_weight_of_latent_diffusion(dtype):
    """autograd.grad of the reconstruction to the last layer, then backward of the loss through the same graph."""
    tensors = vae_inputs((4, 600), dtype)
    last_layer = torch.tensor(1.25, dtype=dtype, requires_grad=True)
    latent = {k: tensors[k].requires_grad_() for k in ("mu", "logvar")}
    out = vae_loss(tensors["recon_x"] * last_layer, tensors["x"], **latent, beta=0.3)
    (norm,) = torch.autograd.grad(out.recon, last_layer, retain_graph=True)
    (0.5 * out.loss).backward()

    again = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    fresh = vae_loss(
        again["recon_x"] * last_layer.detach(), again["x"], again["mu"], again["logvar"], beta=0.3
    )
    (0.5 * fresh.loss).backward()
    for k, t in latent.items():
        assert torch.equal(t.grad, again[k].grad)
    torch.testing.assert_close(last_layer.grad, 0.5 * norm)


@pytest.mark.parametrize("name", OPS)
def test_accumulation_over_micro_batches(name):
    tensors = leaves(name, (4, 300))
    expected = {k: torch.zeros_like(t) for k, t in tensors.items()}
    for factor in (1.0, 1.0, 0.25):
        result = as_tuple(getattr(fastvae, name)(**tensors))[-1].sum()
        for k, g in zip(
            tensors,
            torch.autograd.grad(result, list(tensors.values()), allow_unused=True),
            strict=True,
        ):
            expected[k] += factor * g if g is not None else 0
        (factor * as_tuple(getattr(fastvae, name)(**tensors))[-1].sum()).backward()
    for k, t in tensors.items():
        torch.testing.assert_close(
            t.grad if t.grad is not None else torch.zeros_like(t), expected[k]
        )


def test_gradients_of_two_losses_of_one_input_do_not_share_memory():
    """The engine adds in place into a gradient that it was handed: nothing of ours may be behind it."""
    recon_x = vae_inputs((4, 300))["recon_x"].requires_grad_()
    rest = [t for k, t in vae_inputs((4, 300)).items() if k != "recon_x"]
    loss = vae_loss(recon_x, *rest).loss
    (loss + 3 * loss + recon_x.sum()).backward()
    expected = (
        4
        * evaluate(
            vae_loss,
            {"recon_x": recon_x},
            [torch.tensor(1.0), None, None],
            **dict(zip(("x", "mu", "logvar"), rest, strict=True)),
        ).grads["recon_x"]
        + 1
    )
    torch.testing.assert_close(recon_x.grad, expected)


# In-place arithmetic


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_outputs_may_be_changed_in_place(name, dtype):
    tensors = leaves(name, (3, 5), dtype)
    outputs = as_tuple(getattr(fastvae, name)(**tensors))
    untouched = [o.detach().clone() for o in outputs]
    outputs[-1].mul_(3).add_(1)
    for o, before in zip(outputs[:-1], untouched[:-1], strict=True):
        assert torch.equal(o, before), "outputs share memory"
    outputs[0].mul_(-2)
    got = torch.autograd.grad(
        [o.sum() for o in outputs],
        list(tensors.values()),
        [torch.ones_like(o.sum()) for o in outputs],
    )
    factors = [1.0] * len(outputs)
    factors[-1] *= 3
    factors[0] *= -2
    upstream = [torch.full_like(o, f) for o, f in zip(untouched, factors, strict=True)]
    expected = evaluate(getattr(fastvae, name), tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected.grads.values(), strict=True))


def test_annealing_the_returned_kl_in_place():
    mu, logvar = (t.requires_grad_() for t in latents((4, 9)).values())
    z, kl = sample_and_kl(mu, logvar, eps=noise((4, 9)))
    kl *= 0.1
    (z.square().sum() + kl).backward()
    expected = evaluate(
        sample_and_kl,
        {"mu": mu, "logvar": logvar},
        [2 * z.detach(), torch.tensor(0.1)],
        eps=noise((4, 9)),
    )
    assert torch.equal(mu.grad, expected.grads["mu"])
    assert torch.equal(logvar.grad, expected.grads["logvar"])


IN_PLACE = [(name, changed) for name in OPS for changed in inputs(name, (1, 1))]


@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
@pytest.mark.parametrize(("name", "changed"), IN_PLACE)
def test_input_changed_in_place_before_backward(name, changed, reduction):
    """Either the backward needs the input and raises, or it gives the gradients at the values that the forward saw."""
    before = inputs(name, (4, 9))
    tensors = {k: t.clone().requires_grad_() for k, t in before.items()}
    options = {} if name == "reparameterize" else {"reduction": reduction}
    copies = {k: t * 1 for k, t in tensors.items()}  # a leaf cannot be changed in place
    outputs = as_tuple(getattr(fastvae, name)(**copies, **options))
    with torch.no_grad():
        copies[changed].add_(1)
    upstream = [varied(o.shape, o.dtype) for o in outputs]
    try:
        grads = torch.autograd.grad(outputs, list(tensors.values()), upstream)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        expected = evaluate(getattr(fastvae, name), before, upstream, **options).grads.values()
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(("name", "changed"), IN_PLACE)
def test_input_changed_in_place_before_a_backward_that_needs_it_raises(name, changed):
    if changed == "mu" and name == "reparameterize":
        pytest.skip("no gradient of the sample depends on mu")
    copies = {k: t * 1 for k, t in leaves(name, (4, 9)).items()}
    outputs = as_tuple(getattr(fastvae, name)(**copies))
    # a second backward recomputes: gradients made in the forward are gone with the first
    torch.autograd.grad(
        outputs,
        list(copies.values()),
        [varied(o.shape, o.dtype) for o in outputs],
        retain_graph=True,
    )
    with torch.no_grad():
        copies[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(
            outputs, list(copies.values()), [varied(o.shape, o.dtype) for o in outputs]
        )


# Upstream gradients that are not plain dense tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_upstream_gradient(dtype):
    """What z.sum().backward() hands over: one number with strides of zero."""
    for name in ("reparameterize", "sample_and_kl"):
        tensors = leaves(name, (3, 700), dtype)
        as_tuple(getattr(fastvae, name)(**tensors))[0].sum().backward()
        upstream = [torch.ones(3, 700, dtype=dtype), torch.zeros(())][: len(OUTPUTS[name])]
        expected = evaluate(getattr(fastvae, name), tensors, upstream)
        for k, t in tensors.items():
            assert torch.equal(t.grad, expected.grads[k]), f"{name}: {k}"


@pytest.mark.parametrize("name", ["kl_normal", "reconstruction_loss", "reparameterize"])
def test_strided_upstream_gradient(name):
    options = {} if name == "reparameterize" else {"reduction": "none"}
    tensors = inputs(name, (4, 6, 5))
    g = varied((4, 6, 5), torch.float32)
    for strided in (g.mT.contiguous().mT, torch.stack([g, g], -1)[..., 0], g[:1].expand(4, 6, 5)):
        want = evaluate(getattr(fastvae, name), tensors, [strided.contiguous()], **options).grads
        got = evaluate(getattr(fastvae, name), tensors, [strided], **options).grads
        assert all(torch.equal(got[k], want[k]) for k in tensors)


@pytest.mark.parametrize("name", [n for n in OPS if n != "reparameterize"])
def test_strided_upstream_gradient_of_samples(name):
    """A [B] result that is summed or weighed by a column hands back strides of 0, or of more than 1."""
    tensors = inputs(name, (4, 30))
    column = varied((4, 3), torch.float32)[:, 1]
    for strided in (torch.tensor(-0.6).expand(4), column):
        rest = [torch.zeros(4, 30)] if name == "sample_and_kl" else []
        rest += [strided] * (3 if name == "vae_loss" else 1)
        want = evaluate(
            getattr(fastvae, name), tensors, [g.contiguous() for g in rest], reduction="sample"
        ).grads
        got = evaluate(getattr(fastvae, name), tensors, rest, reduction="sample").grads
        assert all(torch.equal(got[k], want[k]) for k in tensors)


def test_loss_scale_of_float16():
    """Unscaled, these gradients (2 (recon_x - x) / N) are below float16's smallest normal and mostly lost."""
    tensors = vae_inputs((16, 3, 32, 32), torch.float16)
    options: dict[str, Any] = {"reduction": "mean", "beta": 1e-3}
    check("vae_loss", tensors, upstream=[torch.tensor(65536.0), None, None], **options)
    scaled = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    (65536.0 * vae_loss(**scaled, **options).loss).backward()
    want = evaluate(
        vae_loss,
        {k: t.double() for k, t in tensors.items()},
        [torch.tensor(65536.0), None, None],
        **options,
    ).grads
    for k, t in scaled.items():
        assert t.grad is not None
        assert_accurate(t.grad, to_numpy(want[k]), what=f"gradient of {k}")


# Which gradients there are


@pytest.mark.parametrize("name", OPS)
def test_only_inputs_that_want_a_gradient_get_one(name):
    names = list(inputs(name, (1, 1)))
    every = leaves(name, (3, 5))
    expected = evaluate(getattr(fastvae, name), every).grads
    for n in range(1, len(names) + 1):
        for wanted in itertools.combinations(names, n):
            tensors = inputs(name, (3, 5))
            for k in wanted:
                tensors[k].requires_grad_()
            outputs = [o for o in as_tuple(getattr(fastvae, name)(**tensors)) if o.requires_grad]
            torch.autograd.backward(outputs, [varied(o.shape, o.dtype) for o in outputs])
            for k, t in tensors.items():
                if k not in wanted:
                    assert t.grad is None
                else:
                    assert torch.equal(t.grad, expected[k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_without_gradients_gives_the_same_values(name, dtype):
    alone = name in ("kl_normal", "reconstruction_loss")
    reductions = REDUCTIONS if alone else REDUCTIONS[:-1]  # all but "none"
    priors = [{}, {"prior": True}] if name in ("kl_normal", "sample_and_kl") else [{}]
    for prior, reduction in itertools.product(priors, reductions):
        tensors = inputs(name, (9, 1000), dtype, **prior)
        draws = tensors.pop("eps", None) is not None
        op = seeded(getattr(fastvae, name)) if draws else getattr(fastvae, name)
        options = {} if name == "reparameterize" else {"reduction": reduction}
        expected = evaluate(op, tensors, **options).outputs
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                got = as_tuple(op(**tensors, **options))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_no_graph_without_need(name):
    outputs = as_tuple(getattr(fastvae, name)(**inputs(name, (3, 5))))
    assert not any(o.requires_grad for o in outputs)
    with torch.no_grad():
        outputs = as_tuple(getattr(fastvae, name)(**leaves(name)))
    assert not any(o.requires_grad for o in outputs)


def test_eps_that_requires_grad(device):
    for name in ("reparameterize", "sample_and_kl"):
        tensors = inputs(name, (3, 5), device=device)
        eps = tensors.pop("eps").requires_grad_()
        z = as_tuple(getattr(fastvae, name)(**tensors, eps=eps))[0]
        (grad,) = torch.autograd.grad(z, eps, torch.full_like(z, 0.3))
        torch.testing.assert_close(grad, 0.3 * torch.exp(0.5 * tensors["logvar"]))


def test_a_prior_that_alone_wants_gradients():
    tensors = latents((3, 5), prior=True)
    expected = evaluate(kl_normal, tensors).grads
    for k in ("mu_p", "logvar_p"):
        tensors[k].requires_grad_()
    grads = torch.autograd.grad(
        kl_normal(**tensors), (tensors["mu_p"], tensors["logvar_p"]), varied((), torch.float32)
    )
    assert torch.equal(grads[0], expected["mu_p"])
    assert torch.equal(grads[1], expected["logvar_p"])


def test_the_same_tensor_as_two_inputs():
    t = noise((3, 5)).requires_grad_()
    kl_normal(t, t, reduction="sum").backward()
    assert t.grad is not None
    torch.testing.assert_close(t.grad, (t + 0.5 * torch.expm1(t)).detach())
    assert reconstruction_loss(t, t).item() == 0


@pytest.mark.parametrize("name", OPS)
def test_backward_releases_what_the_graph_kept(name):
    """Loops keep losses for their logs; a kept loss must not keep the batch."""
    copies = {k: t * 1 for k, t in leaves(name, (3, 700)).items()}
    held = [TensorWeakRef(t) for t in copies.values()]
    outputs = as_tuple(getattr(fastvae, name)(**copies))
    del copies
    torch.autograd.backward(outputs, [varied(o.shape, o.dtype) for o in outputs])
    assert not any(ref() is not None for ref in held)
    assert all(o.grad_fn is not None for o in outputs)


# Checkpointing and hooks


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_checkpointing(name, dtype, use_reentrant):
    tensors = leaves(name, (3, 700), dtype)
    tensors.pop("eps", None)  # drawn, and drawn again in the recomputation
    args = list(tensors.values())

    def fn(*args):
        return as_tuple(getattr(fastvae, name)(*args))

    grads = []
    for run in (fn, lambda *a: checkpoint(fn, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(12)
        for t in args:
            t.grad = None
        outputs = run(*args)
        torch.autograd.backward(outputs, [varied(o.shape, o.dtype) for o in outputs])
        grads.append([t.grad.clone() for t in args])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_the_loss_of_a_network(use_reentrant):
    """With the upstream gradient of the loss alone, for which the forward makes the gradients."""
    torch.manual_seed(3)
    layer = torch.nn.Linear(20, 12)
    rest = vae_inputs((8, 12))
    x = noise((8, 20)).requires_grad_()

    def fn(x):
        return vae_loss(layer(x), rest["x"], rest["mu"], rest["logvar"]).loss

    grads = []
    for run in (fn, lambda x: checkpoint(fn, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        run(x).backward()
        grads.append(layer.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", OPS)
def test_saved_tensor_hooks_see_everything_that_is_kept(name):
    """As with save_on_cpu: what a node keeps outside of SavedVariable escapes offloading."""
    tensors = leaves(name, (3, 7000))
    expected = evaluate(getattr(fastvae, name), tensors).grads
    packed: list[Tensor] = []

    def pack(t):
        packed.append(t)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i].clone()):
        outputs = as_tuple(getattr(fastvae, name)(**tensors))
    assert packed
    torch.autograd.backward(outputs, [varied(o.shape, o.dtype) for o in outputs])
    assert all(torch.equal(tensors[k].grad, g) for k, g in expected.items())


def test_saved_tensors_offloaded_to_the_cpu():
    tensors = leaves("vae_loss", (3, 700))
    with torch.autograd.graph.save_on_cpu():
        loss = vae_loss(**tensors).loss
    loss.backward()
    expected = evaluate(vae_loss, tensors, [torch.tensor(1.0), None, None]).grads
    assert all(torch.equal(tensors[k].grad, g) for k, g in expected.items())


def test_hooks_on_the_outputs_run():
    tensors = leaves("vae_loss")
    out = vae_loss(**tensors)
    out.loss.register_hook(lambda g: 5 * g)
    out.loss.backward()
    expected = evaluate(vae_loss, tensors, [torch.tensor(5.0), None, None]).grads
    assert all(torch.equal(tensors[k].grad, g) for k, g in expected.items())


@pytest.mark.filterwarnings("ignore:Error detected")
def test_anomaly_mode():
    tensors = leaves("vae_loss")
    with torch.autograd.set_detect_anomaly(True):
        vae_loss(**tensors).loss.backward()
        with pytest.raises(RuntimeError, match="returned nan values"):
            reparameterize(tensors["mu"], tensors["logvar"] + torch.nan).sum().backward()


def test_backward_from_another_thread():
    tensors = leaves("vae_loss", (3, 700))
    loss = vae_loss(**tensors).loss
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    expected = evaluate(vae_loss, tensors, [torch.tensor(1.0), None, None]).grads
    assert all(torch.equal(tensors[k].grad, g) for k, g in expected.items())


def test_an_upstream_gradient_that_is_lazily_negated_or_zero() -> None:
    mu = torch.randn(3, 5, requires_grad=True)
    kl = fastvae.kl_normal(mu, torch.zeros(3, 5), reduction="sum")
    negated = torch.tensor(2 + 3j).conj().imag
    assert negated.is_neg()
    for _ in range(2):  # with the gradients made in the forward pass, then with new ones
        (gradient,) = torch.autograd.grad(kl, mu, negated, retain_graph=True)
        torch.testing.assert_close(gradient, -3 * mu.detach())
    kl = fastvae.kl_normal(mu, torch.zeros(3, 5))
    (gradient,) = torch.autograd.grad(kl, mu, torch._efficientzerotensor((), device=mu.device))
    assert not gradient.any()


@pytest.mark.parametrize("name", OPS)
def test_deterministic_algorithms(name, device):
    """The kernels are deterministic as they are; the mode fills new memory with NaN, which none of it may keep."""
    tensors = {k: t.to(device) for k, t in inputs(name, (3, 700)).items()}
    expected = evaluate(getattr(fastvae, name), tensors)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = evaluate(getattr(fastvae, name), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(
        (*got.outputs, *got.grads.values()),
        (*expected.outputs, *expected.grads.values()),
        strict=True,
    ):
        assert torch.equal(a, b)
