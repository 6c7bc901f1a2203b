"""torch.compile without graph breaks, and torch.library.opcheck of every op that is registered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import OUTPUTS, UNITS_OF_A_SUM, assert_accurate, evaluate, to_numpy, varied
from cases import gaussians, inputs, latents, noise, old_dynamo, tensor, vae_inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae import kl_normal, reconstruction_loss, reparameterize, sample_and_kl, vae_loss
from fastvae.random import philox_normal
from fastvae.verify import oracle

OPS = list(OUTPUTS)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(
    fn: Callable[..., Any], backend: str = "aot_eager", **kwargs: Any
) -> Callable[..., Any]:
    return torch.compile(fn, backend=backend, fullgraph=True, **kwargs)


def keyed(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """An op that takes its tensors by name; Dynamo wants a function of its own for each."""
    op = getattr(fastvae, name)

    def fn(**arguments):
        return op(**arguments, **options)

    return fn


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("reparameterize", {}),
    ("kl_normal", {"reduction": "none"}),
    ("kl_normal", {"reduction": "batchmean"}),
    ("sample_and_kl", {"reduction": "sample"}),
    ("reconstruction_loss", {"likelihood": "gaussian", "reduction": "mean"}),
    ("vae_loss", {"beta": 0.3}),
    ("vae_loss", {"reduction": "sample"}),
]


def assert_same(got, want) -> None:
    """Compiled code may decompose an op, so it is held to rounding and not to the bit."""
    torch.testing.assert_close(got.outputs, want.outputs)
    torch.testing.assert_close(got.grads, want.grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_training(name, options, dtype, backend):
    tensors = inputs(name, (4, 30), dtype)
    fn = keyed(name, options)
    assert_same(evaluate(compiled(fn, backend), tensors), evaluate(fn, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_inference(name, options, backend):
    tensors = inputs(name, (4, 30))
    fn = keyed(name, options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fn, backend)(**tensors), fn(**tensors))
    torch._dynamo.reset()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(fn, backend)(**tensors), fn(**tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_dynamic_shapes(name, backend):
    fn = keyed(name, {})
    counter = CompileCounterWithBackend(backend)
    dynamic = torch.compile(fn, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for batch in (4, 5, 9):
        tensors = inputs(name, (batch, 30))
        assert_same(evaluate(dynamic, tensors), evaluate(fn, tensors))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1], "recompiled for another batch size"


def train_step(layer, x):
    mu, logvar = layer(x).chunk(2, dim=1)
    z = reparameterize(mu, logvar)
    return vae_loss(z.sum(1, keepdim=True) * x, x, mu, logvar, beta=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_of_a_network(backend):
    layer = torch.nn.Linear(30, 12)
    x = noise((8, 30))
    step = compiled(train_step, backend)
    out = step(layer, x)
    out.loss.backward()
    assert isinstance(out, fastvae.VAELossOutput)
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    torch.testing.assert_close(out.loss, out.recon + 0.1 * out.kl)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_model_follows_eager_while_beta_and_the_batch_size_change(backend):
    """Encoder, sample, decoder and loss; the second batch size compiles dynamic shapes, and that is the last time."""
    encoder = torch.nn.Linear(30, 12)
    decoder = torch.nn.Sequential(torch.nn.Linear(6, 30), torch.nn.Sigmoid())
    parameters = [*encoder.parameters(), *decoder.parameters()]

    def model(x, beta):
        mu, logvar = encoder(x).chunk(2, dim=1)
        return vae_loss(decoder(reparameterize(mu, logvar)), x, mu, logvar, beta=beta)

    counter = CompileCounterWithBackend(backend)
    run = torch.compile(model, backend=counter, fullgraph=True)
    for step, batch in enumerate((8, 9, 8, 11, 5)):
        x, beta = noise((batch, 30)), torch.tensor(0.25 * step)
        results = []
        for fn in (model, run):
            torch.manual_seed(step)
            out = fn(x, beta)
            results.append((*out, *torch.autograd.grad(out.loss, parameters)))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_two_draws_in_one_graph_differ(training, backend):
    """AOTAutograd merges equal calls in training graphs; a draw must not look equal to another."""
    mu, logvar = (t.requires_grad_(training) for t in latents((4, 30)).values())

    @compiled_with(backend)
    def two(mu, logvar):
        return reparameterize(mu, logvar), reparameterize(mu, logvar)

    @compiled_with(backend)
    def two_joint(mu, logvar):
        return sample_and_kl(mu, logvar)[0], sample_and_kl(mu, logvar)[0]

    for fn in (two, two_joint):
        a, b = fn(mu, logvar)
        assert not torch.equal(a, b)
        assert not torch.equal(fn(mu, logvar)[0], a), "the next call draws anew"
        if training:  # each with the gradient of its own noise
            sigma = torch.exp(0.5 * logvar).detach()
            for z in fn(mu, logvar):
                (grad,) = torch.autograd.grad(z.sum(), logvar, retain_graph=True)
                eps = (z.detach() - mu.detach()) / sigma
                torch.testing.assert_close(grad, 0.5 * sigma * eps, rtol=1e-4, atol=1e-5)


def compiled_with(backend: str):
    return lambda fn: compiled(fn, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_draw_follows_the_seed_and_is_the_eager_one(backend):
    mu, logvar = latents((4, 30)).values()

    def fn(mu, logvar):
        return reparameterize(mu, logvar)

    run = compiled(fn, backend)
    torch.manual_seed(4)
    eager = fn(mu, logvar)
    for _ in range(2):
        torch.manual_seed(4)
        torch.testing.assert_close(run(mu, logvar), eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_inside_a_compiled_graph(backend):
    """The recomputation must remake the noise of the forward, not draw anew."""
    mu, logvar = (t.requires_grad_() for t in latents((4, 30)).values())

    def inner(mu, logvar):
        return reparameterize(mu, logvar).square()

    @compiled_with(backend)
    def fn(mu, logvar):
        return checkpoint(inner, mu, logvar, use_reentrant=False)

    squared = fn(mu, logvar)
    (grad,) = torch.autograd.grad(squared.sum(), mu)
    torch.testing.assert_close(grad.square(), 4 * squared.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beta_as_a_tensor_needs_no_recompilation(backend):
    counter = CompileCounterWithBackend(backend)
    tensors = vae_inputs((4, 30))

    def fn(beta, **tensors):
        return vae_loss(**tensors, beta=beta)

    annealed = torch.compile(fn, backend=counter, fullgraph=True)
    compilations = []
    for value in (0.0, 0.1, 1.0):
        beta = torch.tensor(value)
        torch.testing.assert_close(
            annealed(beta, **tensors).loss, vae_loss(**tensors, beta=value).loss
        )
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    both = torch.cat(list(latents((4, 6, 5, 5)).values()), dim=1)

    def fn(both):
        mu, logvar = both.chunk(2, dim=1)
        return kl_normal(mu, logvar), reparameterize(mu, logvar, eps=torch.ones_like(mu))

    got, want = evaluate(compiled(fn, backend), {"both": both}), evaluate(fn, {"both": both})
    assert_same(got, want)
    assert got.outputs[1].stride() == want.outputs[1].stride()


def captures() -> int:
    """How many backward graphs compiled autograd has recorded in this test."""
    return torch._dynamo.utils.counters["compiled_autograd"]["captures"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_compiled_autograd_over_an_eager_graph(name, options, backend):
    """A graph that was compiled for one backward pass serves the next, whose saved tensors and gradient are others."""
    compiler = torch.compile(backend=backend, fullgraph=True)
    op = getattr(fastvae, name)
    for seed, factor in ((0, 1.0), (1, -2.5), (2, 1.0)):
        tensors = inputs(name, (4, 30), seed=seed)
        tensors.pop("eps", None)  # drawn: the noise is made again in the compiled backward
        grads = []
        for enabled in (False, True):
            leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
            torch.manual_seed(seed)
            outputs = op(**leaves, **options)
            outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
            weight = torch.tensor(factor)
            loss = weight * sum(o.sum() * (i + 1) for i, o in enumerate(outputs))
            with torch._dynamo.compiled_autograd._enable(compiler) if enabled else nullcontext():
                loss.backward()
            grads.append([t.grad for t in leaves.values()])
        torch.testing.assert_close(grads[1], grads[0])
    assert captures() == 1


# Numbers that change between calls. Plain code compiles two graphs for a Python number: one with the first value, one in which
# it is an input.

STEPS = [0.05 * step for step in range(1, 13)]
TWO_TERMS = vae_inputs((4, 30)), vae_inputs((4, 30), seed=1)


def elbo(b, t, u):
    return vae_loss(**t, beta=2 * b**2).loss / (2 * b**2)


def scaled_input_noise(b, t, u):
    noisy = {**t, "recon_x": t["recon_x"] + b * u["x"]}
    return vae_loss(**noisy, beta=b).loss * b


def weights_and_complements(b, t, u):
    return (1 - b) * vae_loss(**t, beta=b).loss + b * vae_loss(**u, beta=1 - b).kl


def two_numbers(b, t, u):
    a = 1 / (3 * b + 1)
    return vae_loss(**t, beta=a).loss / b + vae_loss(**u, beta=b, reduction="mean").loss * a


def two_ops(b, t, u):
    return reconstruction_loss(t["recon_x"], t["x"]) + b * kl_normal(u["mu"], u["logvar"])


class Scheduled(torch.nn.Module):
    """The number is an attribute, as in a LightningModule."""

    def forward(self, t, u):
        return vae_loss(**t, beta=self.beta).loss + self.beta * vae_loss(**u, beta=self.beta).kl


SCHEDULED, LOSS = Scheduled(), fastvae.nn.VAELoss()


def attribute(b, t, u):
    SCHEDULED.beta = b
    return SCHEDULED(t, u)


def assigned(b, t, u):
    LOSS.beta = b
    return LOSS(**t).loss * float(b)


ANNEALED = [
    pytest.param(elbo, marks=old_dynamo),
    scaled_input_noise,
    weights_and_complements,
    two_numbers,
    two_ops,
    attribute,
    assigned,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("number", [float, np.float64, np.float32], ids=str)
@pytest.mark.parametrize("fn", ANNEALED, ids=lambda fn: fn.__name__)
def test_a_number_that_changes_at_every_step(fn, number, dynamic, backend):
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(fn, backend=counter, fullgraph=True, dynamic=dynamic)
    t, u = ({k: x.clone().requires_grad_() for k, x in term.items()} for term in TWO_TERMS)
    leaves = [*t.values(), *u.values()]
    for b in map(number, STEPS):
        results = []
        for way in (fn, run):
            loss = way(b, t, u)
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            results.append((loss.to(torch.float32), *grads))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_0_dim_array_is_a_number(backend):
    """(The arithmetic of such an array with a tensor is NumPy's, and has no gradients: beta is all it can be.)"""
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(keyed("vae_loss", {}), backend=counter, fullgraph=True)
    for beta in map(np.array, STEPS):
        want = evaluate(keyed("vae_loss", {"beta": float(beta)}), TWO_TERMS[0])
        assert_same(evaluate(lambda **t: run(**t, beta=beta), TWO_TERMS[0]), want)  # noqa: B023
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_assigning_beta_compiles_nothing_anew(backend):
    counter = CompileCounterWithBackend(backend)
    module = fastvae.nn.VAELoss()
    run = torch.compile(module, backend=counter, fullgraph=True)
    for beta in STEPS:
        module.beta = beta
        torch.testing.assert_close(run(**TWO_TERMS[0]), vae_loss(**TWO_TERMS[0], beta=beta))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_annealing_under_compiled_autograd(backend):
    """One backward graph for every beta; the same node then goes on in eager."""
    compiler = torch.compile(backend=backend, fullgraph=True)
    for beta in STEPS:
        leaves = {k: t.clone().requires_grad_() for k, t in TWO_TERMS[0].items()}
        loss = vae_loss(**leaves, beta=beta).loss
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward(retain_graph=True)
        want = evaluate(vae_loss, TWO_TERMS[0], [torch.tensor(1.0), None, None], beta=beta).grads
        torch.testing.assert_close({k: t.grad for k, t in leaves.items()}, want)
        again = torch.autograd.grad(loss, list(leaves.values()))
        torch.testing.assert_close(dict(zip(leaves, again, strict=True)), want)
    assert captures() == 1


# opcheck


class Recorder(TorchDispatchMode):
    """Keeps one call of every distinct kind that reaches the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, tuple, dict]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastvae":
            calls = self.calls.setdefault(func._schema.name, [])
            calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


NEVER_TRACED = {"fastvae::formulas"}


def registered_ops() -> set[str]:
    """Those of the library that have kernels; what is handed to a compiler decomposes before it gets there."""
    names = torch._C._dispatch_get_all_op_names()
    return {
        n.split(".")[0]
        for n in names
        if n.startswith("fastvae::") and not n.endswith("_composed") and n not in NEVER_TRACED
    }


def recorded_calls() -> dict[str, list[tuple[Any, tuple, dict]]]:
    """Calls of every op of the library as the public functions make them, with and without gradients."""
    with Recorder() as recorder:
        for name, options in VARIANTS:
            for dtype in (torch.float32, torch.bfloat16):
                tensors = inputs(name, (3, 5), dtype)
                for kept in (tensors, {k: t for k, t in tensors.items() if k != "eps"}):
                    getattr(fastvae, name)(**kept, **options)
                    result = evaluate(getattr(fastvae, name), kept, **options)
                    if name == "vae_loss":
                        shape = result.outputs[0].shape
                        upstream = [varied(shape, result.outputs[0].dtype), None, None]
                        evaluate(getattr(fastvae, name), kept, upstream, **options)
        for name in ("kl_normal", "sample_and_kl"):
            evaluate(getattr(fastvae, name), latents((3, 5), prior=True))
        evaluate(reconstruction_loss, inputs("reconstruction_loss", (3, 5)), reduction="sample")
        mu, logvar = (t.requires_grad_() for t in latents((3, 5)).values())
        reparameterize(mu, logvar, return_eps=True)
        # the second derivative of a drawn sample makes the noise by itself
        torch.autograd.grad(reparameterize(mu, logvar).sum(), logvar, create_graph=True)
        philox_normal(3, 5, seed=1)
        mixture = fastvae.likelihoods.LogisticMixture(2)
        pixels = {"recon_x": torch.randn(2, 20, 3), "x": torch.rand(2, 3, 3)}
        evaluate(reconstruction_loss, pixels, likelihood=mixture)
        half = {k: t.half() for k, t in pixels.items()}
        evaluate(reconstruction_loss, half, likelihood=mixture, reduction="sample")
        mixture.sample(pixels["recon_x"])
        triple = {k: torch.randn(3, 5) for k in ("z", "mu", "logvar")}
        evaluate(fastvae.kl_one_sample, triple, scale="log_sigma", clamp=(-1.0, 1.0))
        evaluate(fastvae.normal_log_prob, triple, reduction="none")
        evaluate(sample_and_kl, latents((3, 5)), scale="log_sigma", clamp=(-1.0, 1.0))
        evaluate(fastvae.kl_decomposition, triple, dataset_size=50)
        fastvae.mixture_log_prob(**triple)
        given = gaussians((3,), 5, prior=False)
        evaluate(fastvae.sample_and_kl_multivariate_normal, given)
        evaluate(fastvae.kl_multivariate_normal, given, reduction="sample")
    return recorder.calls


def clone(value: Any, wanting: bool) -> Any:
    if isinstance(value, Tensor):
        return (
            value.detach()
            .clone()
            .requires_grad_(wanting and value.is_floating_point() and value.dim() > 0)
        )
    if isinstance(value, (list, tuple)):
        return type(value)(clone(v, wanting) for v in value)
    return value


def signature(args: tuple, kwargs: dict) -> tuple:
    """Calls that differ only in numbers test the same."""
    return tuple(
        (a.dtype, a.dim())
        if isinstance(a, Tensor)
        else type(a)
        if isinstance(a, float)
        else repr(a)
        for a in (*args, *kwargs.values())
    )


HOOKS = {"fastvae::philox_words", "fastvae::elementary"}  # for tests; never in a graph


@pytest.mark.parametrize("wanting", [False, True], ids=["plain", "requires_grad"])
def test_opcheck_of_every_registered_op(wanting):
    """The inner ops, which start with an underscore, are called below autograd only and raise when differentiated."""
    calls = recorded_calls()
    assert registered_ops() <= calls.keys() | HOOKS, "an op that no public function calls"
    failures = []
    for name, made in calls.items():
        if name in HOOKS or (wanting and name.startswith("fastvae::_")):
            continue
        distinct = {signature(args, kwargs): (func, args, kwargs) for func, args, kwargs in made}
        for func, args, kwargs in list(distinct.values())[:4]:
            try:
                kept = {k: clone(v, wanting) for k, v in kwargs.items()}
                torch.library.opcheck(func, clone(args, wanting), kept)
            except Exception as error:
                failures.append(f"{name}{args}: {error}")
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("wanting", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("beta", [None, torch.tensor(0.3)], ids=str)
def test_opcheck_of_what_is_handed_to_a_compiler(beta, wanting):
    """Formula 3 is a Gaussian, 0 the KL from N(0, 1)."""
    numbers = torch.tensor([0.25, 0.5, 0.0, -math.inf, math.inf], dtype=torch.float64)
    ops = torch.ops.fastvae
    for dtype, reductions in ((torch.float32, (2, 0)), (torch.bfloat16, (3, 3))):
        recon_x, x, mu, logvar = clone(tuple(vae_inputs((3, 5), dtype).values()), wanting)
        loss, rest = 3 * 32 + reductions[0], (None, None, None, numbers)
        torch.library.opcheck(ops.elementwise_loss_composed.default, (recon_x, x, loss, *rest))
        args = (recon_x, x, mu, logvar, loss, reductions[1], 1.0, *rest, None, beta)
        torch.library.opcheck(ops.vae_loss_composed.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_hold_in_compiled_programs(backend):
    """The KL near the prior, 16-bit sums, the error of a long sum, and NaN; `check` is the policy of all tests."""

    def recon(recon_x, x, reduction):
        return reconstruction_loss(recon_x, x, reduction=reduction)

    def loss(recon_x, x, mu, logvar):
        return vae_loss(recon_x, x, mu, logvar, beta=0.3)

    long = inputs("reconstruction_loss", (3, 400_000))
    run = compiled(recon, backend)
    for reduction in ("sum", "mean", "sample"):
        got, plain = (
            evaluate(fn, long, reduction=reduction)
            for fn in (run, fastvae.reference.reconstruction_loss)
        )
        want = oracle.reconstruction_loss(
            **{k: to_numpy(t) for k, t in long.items()},
            upstream=[to_numpy(varied(plain.outputs[0].shape, torch.float32))],
            reduction=reduction,
        )
        assert_accurate(
            got.outputs[0], want[0][0], plain.outputs[0], units=UNITS_OF_A_SUM, what=reduction
        )
        for k in long:
            assert_accurate(got.grads[k], want[1][k], plain.grads[k], what=f"gradient of {k}")
    tensors = vae_inputs((4, 30))
    tensors |= {"mu": torch.zeros(4, 5), "logvar": torch.full((4, 5), 1e-4)}
    kl = compiled(loss, backend)(**tensors).kl.item()
    assert kl == pytest.approx(5 * 0.5 * (math.expm1(1e-4) - 1e-4), rel=1e-6)
    halves = {k: t.half() * (300 if "x" in k else 1) for k, t in tensors.items()}
    torch.testing.assert_close(compiled(loss, backend)(**halves), loss(**halves))
    assert compiled(loss, backend)(**halves).recon > 65504
    tensors["recon_x"][2, 3] = torch.nan
    broken = evaluate(compiled(loss, backend), tensors)
    assert broken.outputs[0].isnan() and broken.grads["recon_x"][2, 3].isnan()
    assert broken.grads["recon_x"].isnan().sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_kl_keeps_its_digits_in_compiled_programs(dtype, rtol, backend):
    """Near the prior, across the seams of its evaluation and far away: values and gradients, element by element."""
    near = np.logspace(-8, 0, 60)
    logvar = np.concatenate([near, -near, np.linspace(-20, 20, 101)])[:, None]
    tensors = {"mu": tensor(1e-3 * logvar[::-1], dtype), "logvar": tensor(logvar, dtype)}
    x = torch.zeros(len(logvar), 1, dtype=dtype)

    def kl(mu, logvar):
        return vae_loss(x, x, mu, logvar, reduction="sample").kl

    got = evaluate(compiled(kl, backend), tensors, [torch.ones(len(x), dtype=dtype)])
    arrays = {k: to_numpy(t) for k, t in tensors.items()}
    values, gradients = oracle.kl_normal(**arrays, reduction="sample", upstream=[np.ones(len(x))])
    np.testing.assert_allclose(to_numpy(got.outputs[0]), values[0], rtol=rtol, atol=0)
    for k in tensors:
        np.testing.assert_allclose(to_numpy(got.grads[k]), gradients[k], rtol=rtol, atol=0)


def test_compiled_programs_check_their_input():
    """What is handed to the compiler would broadcast."""
    x = torch.zeros(4, 6)
    for fn, args in (
        (lambda a, b: reconstruction_loss(a, b), (x, x[:1])),
        (lambda a, b: vae_loss(a, a, b, b).loss, (x, x[:2])),
    ):
        with pytest.raises(Exception, match=r"(same shape|same batch size)"):
            compiled(fn)(*args)


def test_inner_ops_are_not_differentiated_in_silence():
    """Called with tensors that want a gradient and without an autograd kernel, an op would give no gradient at all."""
    seen = set()
    for name, made in recorded_calls().items():
        if (
            not name.startswith("fastvae::_") or name == "fastvae::_normal_like"
        ):  # its noise has no gradient
            continue
        func, args, kwargs = made[0]
        out = func(*clone(args, True), **kwargs)
        tensors = [o for o in torch.utils._pytree.tree_leaves(out) if o.is_floating_point()]
        with pytest.raises(RuntimeError, match="not implemented"):
            tensors[0].sum().backward()
        seen.add(name)
    assert seen


def test_every_op_has_a_meta_kernel():
    missing = {
        n for n in registered_ops() if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "Meta")
    }
    assert missing <= HOOKS
