"""The discretized mixture of logistics: numbers, layouts, derivatives, compiled programs and samples."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from accuracy import evaluate, key_of, to_numpy, varied
from cases import DTYPES, REDUCTIONS, tensor
from scipy import stats
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastvae
from fastvae import kl_normal, reconstruction_loss, vae_loss
from fastvae._ops import ops
from fastvae.likelihoods import LogisticMixture
from fastvae.verify import oracle
from fastvae.verify.inputs import pictures

Tensors = dict[str, Tensor]
NARROW = {"log_scale": (-7.5, -6.5), "near": 0.02}  # where digits are dear


def weight_of(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = 1
    values = np.random.default_rng(5).uniform(-0.5, 1.5, shape).clip(0)
    return tensor(values, torch.float32 if x.dtype != torch.float64 else x.dtype, x.device)


def loss(recon_x: Tensor, x: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    reduction = options.pop("reduction", "batchmean")
    mixture = LogisticMixture(**options)
    return reconstruction_loss(recon_x, x, likelihood=mixture, reduction=reduction, weight=weight)


def check(
    tensors: Tensors, weight: Tensor | None = None, *, exact: float = 1e-13, **options: Any
) -> None:
    """Values to 2e-7, gradients to 2e-5 of the largest and what their dtype rounds; `exact` in float64."""
    got = evaluate(lambda **t: loss(**t, weight=weight, **options), tensors)
    arrays = {k: to_numpy(t) for k, t in tensors.items()}
    if weight is not None:
        arrays["weight"] = to_numpy(weight)
    upstream = [to_numpy(varied(o.shape, o.dtype, o.device)) for o in got.outputs]
    (value,), wanted = oracle.logistic_mixture(**arrays, **options, upstream=upstream)
    double = tensors["recon_x"].dtype == torch.float64
    assert got.outputs[0].dtype == (torch.float64 if double else torch.float32)
    # A pixel may have a small value by chance, a sample if each of its pixels is certain.
    size = np.abs(value) + (10 if options.get("reduction") == "none" else 1e-3)
    assert np.all(np.abs(to_numpy(got.outputs[0]) - value) <= (exact if double else 2e-7) * size)
    for name, g in got.grads.items():
        t, want = tensors[name], wanted[name]
        assert (g.dtype, g.shape, g.stride()) == (t.dtype, t.shape, torch.empty_like(t).stride())
        rounding = torch.finfo(g.dtype).eps * np.abs(want) + float(torch.finfo(g.dtype).tiny)
        bound = (exact if double else 2e-5) * np.abs(want).max(initial=0) + rounding
        assert np.all(np.abs(to_numpy(g) - want) <= bound), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("last", [False, True])
def test_against_the_oracle(dtype, reduction, channels, last, device):
    tensors = pictures((3, 5, 7), channels, dtype=dtype, device=device, last=last)
    dim = -1 if last else 1
    for weight in (None, weight_of(tensors["x"], dim)):
        check(tensors, weight, reduction=reduction, channel_dim=dim)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_narrow_logistics(channels, dtype, device):
    """Where the usual float32 code is off by 2 nats a bin."""
    for seed in range(3):
        tensors = pictures((4, 24, 24), channels, dtype=dtype, device=device, seed=seed, **NARROW)
        check(tensors, reduction="sample")


@pytest.mark.parametrize("log_scale", [(-3, 4), (10, 60), (-12, -8)])
def test_wide_and_very_narrow_logistics(log_scale, device):
    """The narrow ones in float64: float32 has not the digits of x - mean that they ask for."""
    least = min(log_scale[0], -7)
    dtype, near = (torch.float64, 0.02) if least < -7 else (torch.float32, 0.3)
    tensors = pictures((4, 9, 9), dtype=dtype, device=device, log_scale=log_scale, near=near)
    check(tensors, reduction="sample", least_log_scale=least, exact=1e-11)


def test_as_narrow_as_may_be(device):
    """A bin is certain, or impossible by a finite number of nats."""
    recon_x = torch.zeros(1, 3, 3, device=device)
    recon_x[0, 2], recon_x[0, 1, 1], recon_x[0, 1, 2] = -100, 2 / 255, -0.5
    recon_x.requires_grad_()
    options = {"components": 1, "least_log_scale": -40.0, "reduction": "none"}
    value = loss(recon_x, torch.zeros(1, 1, 3, device=device), **options)
    (g,) = torch.autograd.grad(value.sum(), recon_x)
    far = math.exp(40) * torch.tensor([1 / 255, 0.5 - 1 / 255], device=device)
    assert value[0, 0] == 0 and g[0, :, 0].abs().max() < 1e-8
    torch.testing.assert_close(value[0, 1:], far, rtol=1e-6, atol=0)
    assert g.isfinite().all() and g[0, 1, 1] > 1e17 and g[0, 1, 2] < -1e17


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 1), (5, 31), (2, 33), (3, 257), (1, 300), (2, 16, 16, 2)]
)
@pytest.mark.parametrize("components", [1, 3, 10])
def test_shapes_and_components(shape, components, device):
    for channels in (1, 3):
        for last in (False, True):
            tensors = pictures(shape, channels, components, device=device, last=last)
            dim = -1 if last else 1
            for reduction in ("mean", "sample"):
                check(tensors, reduction=reduction, components=components, channel_dim=dim)


def test_options(device):
    """Bins, edges, least log-scale and range of x."""
    tensors = pictures(device=device)
    check(tensors, bins=32, edges=(-0.99, 0.99), least_log_scale=-5.0)
    check(tensors, edges=(-0.999, 0.99))
    check({**tensors, "x": (tensors["x"] + 1) / 2}, x_range=(0, 1))
    for dtype in (torch.uint8, torch.int16, torch.int64):
        x = ((tensors["x"] + 1) * 127.5).round().to(dtype)
        for channels_last in (False, True):
            both = {**tensors, "x": x}
            if channels_last:
                both = {k: t.movedim(1, -1).contiguous() for k, t in both.items()}
            dim = -1 if channels_last else 1
            check(both, x_range=(0, 255), channel_dim=dim, reduction="sample")
    narrow = pictures(device=device, **NARROW)
    narrow["x"] = ((narrow["x"] + 1) * 127.5).round().to(torch.uint8)
    check(narrow, x_range=(0, 255))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_mixed_dtypes(dtypes, device):
    tensors = pictures(device=device)
    check({"recon_x": tensors["recon_x"].to(dtypes[0]), "x": tensors["x"].to(dtypes[1])})


def log_p(parameters: list[float], x: list[float], h: Any) -> Any:
    """Of one pixel, as the paper has it: differences of distribution functions, in many digits."""
    k = len(parameters) // (10 if len(x) == 3 else 3)
    per = 3 if len(x) == 3 else 2
    p = [mp.mpf(v) for v in parameters]
    x = [mp.mpf(v) for v in x]
    total = mp.mpf(0)
    for j in range(k):
        at = lambda c, t: p[k + (per * c + t) * k + j]  # noqa: E731, B023
        product = mp.exp(p[j])
        for c in range(len(x)):
            mean = at(c, 0)
            if c == 1:
                mean += mp.tanh(at(0, 2)) * x[0]
            if c == 2:
                mean += mp.tanh(at(1, 2)) * x[0] + mp.tanh(at(2, 2)) * x[1]
            scale = mp.exp(max(at(c, 1), mp.mpf(-7)))
            cdf = lambda z: 1 / (1 + mp.exp((mean - z) / scale))  # noqa: E731, B023
            upper = mp.mpf(1) if x[c] > mp.mpf("0.999") else cdf(x[c] + h)
            lower = mp.mpf(0) if x[c] < mp.mpf("-0.999") else cdf(x[c] - h)
            product *= upper - lower
        total += product
    return mp.log(total) - mp.log(sum(mp.exp(v) for v in p[:k]))


@pytest.mark.parametrize("channels", [3, 1])
def test_against_the_definition_in_300_digits(channels):
    """Values, and gradients as difference quotients."""
    with mp.workdps(300):
        tensors = pictures((1, 6), channels, 2, torch.float64, log_scale=(-5, -2), near=0.1)
        tensors["x"][0, :, 0], tensors["x"][0, :, 1] = -1, 1
        got = evaluate(
            lambda **t: loss(**t, components=2, reduction="none"), tensors, [torch.ones(1, 6)]
        )
        step = mp.mpf(10) ** -25
        for pixel in range(6):
            p = tensors["recon_x"][0, :, pixel].tolist()
            x = tensors["x"][0, :, pixel].tolist()
            h = mp.mpf(1) / 255
            want = -log_p(p, x, h)
            assert abs(got.outputs[0][0, pixel].item() - want) <= 1e-13 * (1 + abs(want))
            slopes = [
                -(log_p([*p[:i], mp.mpf(p[i]) + step, *p[i + 1 :]], x, h) + want) / step
                for i in range(len(p))
            ]
            largest = max(map(abs, slopes))
            for i, slope in enumerate(slopes):
                assert abs(got.grads["recon_x"][0, i, pixel].item() - slope) <= 1e-12 * largest


def test_bins_add_up_to_one(device):
    """With edges around the first and the last of them."""
    tensors = pictures((1, 40), 1, dtype=torch.float64, device=device, log_scale=(-6, 1))
    every = torch.arange(256, device=device, dtype=torch.float64)
    recon_x = tensors["recon_x"].expand(256, -1, -1)
    x = every.view(256, 1, 1).expand(-1, 1, 40)
    nll = loss(recon_x, x, x_range=(0, 255), reduction="none")
    torch.testing.assert_close((-nll).exp().sum(0), torch.ones(40).to(nll), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["recon_x", "x"])
def test_nan_stays(name, device):
    tensors = pictures((2, 4, 4), 3, 2, device=device)
    for index in range(tensors[name].shape[1]):
        broken = {k: t.clone() for k, t in tensors.items()}
        broken[name][1, index, 2, 3] = math.nan
        got = evaluate(lambda **t: loss(**t, components=2, reduction="none"), broken)
        nan = got.outputs[0].isnan()
        assert nan[1, 2, 3] and nan.sum() == 1
        grads = got.grads["recon_x"].isnan()
        assert grads[1, :, 2, 3].any() and grads.sum() == grads[1, :, 2, 3].sum()


def test_extremes(device):
    """Far means, impossible components, and none that is possible."""
    tensors = pictures((1, 5), 1, 2, device=device)
    p = tensors["recon_x"]
    p[0, 2:4, 0] = torch.tensor([1e30, 0.1])  # one component is infinitely far
    p[0, 0, 1] = -math.inf  # one has no weight
    p[0, 4:6, 2] = torch.tensor([1e30, -1e30])  # scales beyond all and below the least
    p[0, 2:4, 3] = math.inf  # no component can be
    got = evaluate(lambda **t: loss(**t, components=2, reduction="none"), tensors)
    value = got.outputs[0][0]
    assert value[:3].isfinite().all() and value[3] == math.inf and value[4].isfinite()
    assert got.grads["recon_x"][0, :, :3].isfinite().all()
    assert got.grads["recon_x"][0, 0, 1] == 0 and got.grads["recon_x"][0, 5, 2] == 0


# Layouts and memory


def strided(t: Tensor, kind: str) -> Tensor:
    """The same numbers elsewhere in memory."""
    if kind == "channels last":
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "a slice":
        wide = t.new_full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), math.nan)
        return wide[:, 2:-1].copy_(t)
    if kind == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
    return wide[..., ::2].copy_(t)


@pytest.mark.parametrize("kind", ["channels last", "a slice", "transposed", "every other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_strides_give_the_same_bits(kind, dtype, device):
    tensors = pictures((3, 6, 8), dtype=dtype, device=device)
    want = evaluate(lambda **t: loss(**t, reduction="sample"), tensors)
    others = {k: strided(t, kind) for k, t in tensors.items()}
    got = evaluate(lambda **t: loss(**t, reduction="sample"), others)
    assert torch.equal(got.outputs[0], want.outputs[0])
    assert all(torch.equal(got.grads[k], want.grads[k]) for k in tensors)
    moved = {k: t.movedim(1, -1) for k, t in others.items()}
    got = evaluate(lambda **t: loss(**t, reduction="sample", channel_dim=-1), moved)
    assert torch.equal(got.outputs[0], want.outputs[0])
    assert all(torch.equal(got.grads[k].movedim(-1, 1), want.grads[k]) for k in tensors)


def test_expanded_pictures(device):
    tensors = pictures((1, 6, 8), device=device)
    recon_x = tensors["recon_x"].expand(4, -1, -1, -1).requires_grad_()
    x = tensors["x"].expand(4, -1, -1, -1)
    value = loss(recon_x, x, reduction="sample")
    assert torch.equal(value, value[:1].expand(4))
    (g,) = torch.autograd.grad(value.sum(), recon_x)
    assert torch.equal(g, g[:1].expand_as(g))


def bytes_used(call: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_memory_is_the_gradient_alone(reduction):
    tensors = pictures((8, 16, 16))
    recon_x, x = tensors["recon_x"].requires_grad_(), tensors["x"]

    def step() -> None:
        torch.autograd.grad(loss(recon_x, x, reduction=reduction).sum(), recon_x)

    step()
    assert recon_x.nbytes <= bytes_used(step) <= recon_x.nbytes + 2048
    with torch.no_grad():
        assert bytes_used(lambda: loss(recon_x, x, reduction=reduction)) <= 1024


# Backward passes


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_a_second_backward_has_the_same_bits(reduction, dtype, last, device):
    """The first takes the gradients that the forward pass made, the second makes them again."""
    tensors = pictures((3, 5, 9), dtype=dtype, device=device, last=last)
    leaves = [t.requires_grad_() for t in tensors.values()]
    dim = -1 if last else 1
    value = loss(
        **tensors, weight=weight_of(tensors["x"], dim), reduction=reduction, channel_dim=dim
    )
    upstream = varied(value.shape, value.dtype, device)
    first, second, third = (
        torch.autograd.grad(value, leaves, upstream, retain_graph=True) for _ in range(3)
    )
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, third))


def test_inputs_that_need_no_gradient(device):
    tensors = pictures(device=device)
    want = evaluate(lambda **t: loss(**t), tensors).grads
    for name in tensors:
        leaves = {k: t.clone().requires_grad_(k == name) for k, t in tensors.items()}
        loss(**leaves).backward(torch.tensor(0.5, device=device))
        (other,) = set(tensors) - {name}
        assert leaves[other].grad is None
        scale = varied((), torch.float32).item() / 0.5
        torch.testing.assert_close(leaves[name].grad * scale, want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("reduction", ["mean", "sample", "none"])
def test_derivatives(channels, reduction, device):
    """First and second ones, forward and backward, with the edges and a mask."""
    tensors = pictures((2, 3), channels, 2, torch.float64, device, log_scale=(-3.5, 0))
    tensors["x"][0, :, 0], tensors["x"][1, :, 1] = -1.0, 1.0
    leaves = [t.requires_grad_() for t in tensors.values()]
    weight = torch.tensor([[[0.7, 0.0, 2.0]]], dtype=torch.float64, device=device)

    def function(recon_x: Tensor, x: Tensor) -> Tensor:
        return loss(
            recon_x, x, weight, components=2, edges=(-0.9, 0.9), bins=16, reduction=reduction
        )

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_differentiable_gradients_are_the_fused_ones(device):
    tensors = pictures(device=device)
    leaves = [t.requires_grad_() for t in tensors.values()]
    value = loss(**tensors, reduction="sample")
    g = varied(value.shape, value.dtype, device)
    fused = torch.autograd.grad(value, leaves, g, retain_graph=True)
    composed = torch.autograd.grad(value, leaves, g, create_graph=True)
    for a, b in zip(fused, composed, strict=True):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func(reduction, device):
    """grad and vmap, of pictures, of the parameters alone, and with a weight that is shared."""
    tensors = pictures((4, 2, 5), 3, 2, torch.float64, device)
    recon_x, x = (t.unflatten(0, (2, 2)) for t in tensors.values())
    weight = weight_of(x[0], 1)

    def total(p: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return loss(p, x, w, components=2, reduction=reduction).sum()

    want = torch.stack(
        [torch.func.grad(total)(p, one, weight) for p, one in zip(recon_x, x, strict=True)]
    )
    leaf = recon_x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(
        sum(total(p, one, weight) for p, one in zip(leaf, x, strict=True)), leaf
    )
    torch.testing.assert_close(want, backward, rtol=1e-9, atol=1e-9)
    got = torch.vmap(torch.func.grad(total), (0, 0, None))(recon_x, x, weight)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    values = torch.vmap(lambda p: loss(p, x[0], components=2, reduction=reduction))(recon_x)
    plain = torch.stack([loss(p, x[0], components=2, reduction=reduction) for p in recon_x])
    torch.testing.assert_close(values, plain, rtol=1e-13, atol=0)


def test_opcheck(device):
    tensors = pictures((2, 4, 4), 3, 2, torch.float64, device)
    mixture = LogisticMixture(2)
    leaves = [t.requires_grad_() for t in tensors.values()]
    for reduction in (1, 3, 4):
        arguments = (*leaves, None, 2, 1, mixture.numbers, reduction)
        torch.library.opcheck(ops.logistic_mixture.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "sample", "none"])
def test_compile(reduction, device):
    """One graph, an opaque op, the same bits, and sizes that vary."""
    mixture = LogisticMixture(2)

    def step(recon_x: Tensor, x: Tensor) -> Tensor:
        return reconstruction_loss(2 * recon_x, x, likelihood=mixture, reduction=reduction)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 4), (3, 5, 6)):
        tensors = pictures(shape, 3, 2, device=device)
        want = evaluate(step, tensors)
        got = evaluate(compiled, tensors)
        assert torch.equal(got.outputs[0], want.outputs[0])
        for name in tensors:
            torch.testing.assert_close(got.grads[name], want.grads[name], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_inductor(device):
    tensors = pictures((2, 4, 4), device=device)
    mixture = LogisticMixture()

    def step(recon_x: Tensor, x: Tensor) -> Tensor:
        return reconstruction_loss(recon_x.tanh(), x, likelihood=mixture, reduction="sample")

    want, got = evaluate(step, tensors), evaluate(torch.compile(step, fullgraph=True), tensors)
    torch.testing.assert_close(got.outputs, want.outputs)
    torch.testing.assert_close(got.grads, want.grads, rtol=1e-3, atol=1e-3)


# In the objective


@pytest.mark.parametrize(
    "free_bits", [{}, {"free_bits": 0.5}, {"free_bits": 0.2, "free_bits_per": "element"}]
)
def test_vae_loss(free_bits, device):
    tensors = pictures(device=device)
    mu, logvar = tensor(np.random.default_rng(3).normal(size=(2, 3, 6)), torch.float32, device)
    mixture = LogisticMixture()
    got = vae_loss(**tensors, mu=mu, logvar=logvar, beta=0.3, likelihood=mixture, **free_bits)
    recon = reconstruction_loss(**tensors, likelihood=mixture)
    kl = kl_normal(mu, logvar, **free_bits)
    assert torch.equal(got.recon, recon) and torch.equal(got.kl, kl)
    torch.testing.assert_close(got.loss, recon + 0.3 * kl)
    assert vae_loss(
        **tensors, mu=mu, logvar=logvar, likelihood=mixture, reduction="sample"
    ).loss.shape == (3,)


def test_the_reference(device):
    tensors = pictures(dtype=torch.float64, device=device)
    weight = weight_of(tensors["x"], 1)
    weight[0] = 0
    tensors["recon_x"][0] = math.nan
    for reduction in REDUCTIONS:
        options = {"likelihood": LogisticMixture(), "reduction": reduction, "weight": weight}
        want = evaluate(lambda **t: reconstruction_loss(**t, **options), tensors)  # noqa: B023
        got = evaluate(
            lambda **t: fastvae.reference.reconstruction_loss(**t, **options),  # noqa: B023
            tensors,
        )
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-10)


# Pictures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_are_drawn_from_the_documented_noise(dtype, device):
    """Element j of pixel i takes word (K + C) i + j: a component by Gumbel-max, then the channels."""
    components, double = 3, dtype == torch.float64
    tensors = pictures((2, 30, 33), 3, components, dtype, device, log_scale=(-5, -1))
    generator = torch.Generator(device).manual_seed(12)
    seed, offset = key_of(12, torch.device(device))
    got = LogisticMixture(components, x_range=(0, 255)).sample(tensors["recon_x"], generator)
    p = np.moveaxis(to_numpy(tensors["recon_x"]), 1, 0).reshape(10 * components, -1)
    each, pixels = components + 3, p.shape[1]
    calls = np.arange(each * pixels // (2 if double else 4) + 1, dtype=np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    words = oracle.philox4x32(
        [calls & low, calls >> half, offset & 0xFFFFFFFF, offset >> 32],
        (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
    )
    if double:
        pairs = [(words[i] | words[i + 1] << half) >> np.uint64(11) for i in (0, 2)]
        u = (oracle.real(np.stack(pairs, 1)) + 0.5) * 2.0**-53
    else:
        u = (oracle.real(np.stack(words, 1)) + 0.5) * 2.0**-32
    u = u.reshape(-1)[: each * pixels].reshape(pixels, each).T
    best = np.argmax(p[:components] - np.log(-np.log(u[:components])), axis=0)
    mean, scale, by = (
        [p[components * (1 + t + 3 * c) + best, np.arange(pixels)] for c in range(3)]
        for t in range(3)
    )
    x: list[Any] = []
    for c in range(3):
        m = mean[c] + (np.tanh(by[0]) * x[0] if c == 1 else 0)
        m = m + (np.tanh(by[1]) * x[0] + np.tanh(by[2]) * x[1] if c == 2 else 0)
        v = u[components + c]
        drawn = m + np.exp(np.maximum(scale[c], -7)) * (np.log(v) - np.log1p(-v))
        x.append(np.rint((np.clip(drawn, -1, 1) + 1) * 127.5) / 127.5 - 1)
    want = (np.stack(x) + 1) * 127.5
    got = np.moveaxis(to_numpy(got), 1, 0).reshape(3, -1)
    assert np.array_equal(got, np.rint(got)) and got.min() >= 0 and got.max() <= 255
    different = np.any(np.abs(got - want) > 0.01, axis=0)
    assert different.sum() <= (0 if double else 4)  # a draw that lies on the edge of two bins


def test_a_picture_of_a_batch_does_not_depend_on_the_others(device):
    recon_x = pictures((5, 7, 9), device=device)["recon_x"]
    mixture = LogisticMixture()
    draw = lambda t, m=mixture: m.sample(t, torch.Generator(device).manual_seed(3))  # noqa: E731
    whole = draw(recon_x)
    assert torch.equal(draw(recon_x[:2]), whole[:2])
    assert torch.equal(draw(recon_x.contiguous(memory_format=torch.channels_last)), whole)
    last = draw(recon_x.movedim(1, -1).contiguous(), LogisticMixture(channel_dim=-1))
    assert torch.equal(last.movedim(-1, 1), whole)
    assert not torch.equal(mixture.sample(recon_x), mixture.sample(recon_x))
    torch.manual_seed(8)
    first = mixture.sample(recon_x)
    torch.manual_seed(8)
    assert torch.equal(first, mixture.sample(recon_x))


def test_samples_have_the_likelihoods_frequencies(device):
    """Of every value of one channel, and of every color of three channels of two values."""
    count = 200_000
    for channels, bins, components in ((1, 256, 3), (3, 2, 2)):
        edges = (-1 + 1e-6, 1 - 1e-6)
        mixture = LogisticMixture(components, bins=bins, edges=edges)
        one = pictures((1, 1), channels, components, torch.float64, device, log_scale=(-3, -1))
        recon_x = one["recon_x"].expand(-1, -1, count)
        drawn = mixture.sample(recon_x, torch.Generator(device).manual_seed(4))
        values = torch.linspace(-1, 1, bins, dtype=torch.float64, device=device)
        colors = torch.cartesian_prod(*[values] * channels).reshape(-1, channels)
        every = recon_x[..., : len(colors)]
        p = (
            -reconstruction_loss(every, colors.T[None], likelihood=mixture, reduction="none")
        ).exp()
        digits = ((drawn + 1) / 2 * (bins - 1)).round().long()[0]
        index = sum(d * bins ** (channels - 1 - c) for c, d in enumerate(digits))
        seen = torch.bincount(index, minlength=len(colors)).double()
        expected = p[0] * count
        often = expected > 5
        chi = ((seen - expected)[often].square() / expected[often]).sum().item()
        assert stats.chi2.sf(chi, int(often.sum()) - 1) > 1e-4


def test_mean(device):
    """That of many samples, where bins are narrow and no logistic reaches the edges."""
    one = pictures((1, 1), 3, 3, torch.float64, device, log_scale=(-5, -3), seed=4)
    of_channel = one["recon_x"][:, 3:].view(3, 3, 3)
    of_channel[:, 0] *= 0.2
    of_channel[:, 2] *= 0.3
    recon_x = one["recon_x"].expand(-1, -1, 100_000)
    for mixture in (LogisticMixture(3), LogisticMixture(3, x_range=(0, 255))):
        drawn = mixture.sample(recon_x, torch.Generator(device).manual_seed(9))
        mean, error = drawn.mean(-1), drawn.std(-1) / math.sqrt(100_000)
        assert ((mixture.mean(recon_x)[..., 0] - mean).abs() <= 5 * error).all()
    pictures_of = pictures((2, 4, 5), dtype=torch.bfloat16, device=device)["recon_x"]
    for kind in (LogisticMixture().mean, LogisticMixture().sample):
        assert (kind(pictures_of).dtype, kind(pictures_of).shape) == (torch.bfloat16, (2, 3, 4, 5))


def test_a_sample_of_nan_is_nan(device):
    recon_x = pictures((1, 4), device=device)["recon_x"]
    recon_x[0, 3, 2] = math.nan
    assert LogisticMixture().sample(recon_x).isnan().any(1).tolist() == [
        [False, False, True, False]
    ]


# Messages


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"recon_x": torch.zeros(3, 99, 5, 7)}, ValueError, "10 components need 100 channels.*99"),
        ({"x": torch.zeros(3, 1, 5, 7)}, ValueError, r"goes with an x of shape \[3, 3, 5, 7\]"),
        ({"x": torch.zeros(3, 3, 5, 7, dtype=torch.uint8)}, ValueError, r"x_range=\(0, 255\)"),
        ({"x": torch.zeros(3, 3, 5, 7, dtype=torch.float64)}, TypeError, "float64"),
        ({"x": None}, TypeError, "x must be a torch.Tensor"),
        ({"recon_x": torch.zeros(3, 100, 5, 7, dtype=torch.int32)}, TypeError, "recon_x must be"),
        ({"weight": torch.ones(3, 5, 6)}, ValueError, "broadcast"),
        ({"weight": torch.ones(3, 3, 5, 7)}, ValueError, "weight must have size 1 in dimension 1"),
        ({"reduction": "channel"}, ValueError, 'no reduction "channel"'),
        ({"reduction": "total"}, ValueError, "reduction must be"),
    ],
)
def test_messages(change, error, match):
    arguments = {**pictures(), "likelihood": LogisticMixture(), **change}
    with pytest.raises(error, match=match) as caught:
        reconstruction_loss(**arguments)
    assert "fastvae.reconstruction_loss" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"components": 0},
        {"components": 2.5},
        {"bins": 1},
        {"channel_dim": None},
        {"x_range": (1, 0)},
        {"edges": (0.9, 0.9)},
        {"least_log_scale": -250.0},
    ],
)
def test_bad_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"LogisticMixture: {name} must be"):
        LogisticMixture(**options)


def test_a_bad_channel_dim():
    with pytest.raises(ValueError, match="channel_dim=0 must be a dimension of recon_x after"):
        loss(**pictures(), channel_dim=0)


def test_empty(device):
    for shape in ((0, 3, 4), (2, 0, 4)):
        tensors = pictures(shape, device=device)
        got = evaluate(lambda **t: loss(**t, reduction="sample"), tensors)
        assert torch.equal(got.outputs[0], torch.zeros(shape[0], device=device))
        assert loss(**tensors, reduction="sum") == 0
        assert loss(**tensors, reduction="mean").isnan()
        assert LogisticMixture().sample(tensors["recon_x"]).shape == tensors["x"].shape
