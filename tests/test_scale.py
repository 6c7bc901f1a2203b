"""scale= and clamp=: what a Gaussian's second argument is, and its bounds, beside the formulas in sigma and by float64's autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import tensor
from torch import Tensor

import fastvae
import fastvae.reference as plain
from fastvae import (
    kl_normal,
    kl_one_sample,
    normal_log_prob,
    reparameterize,
    sample_and_kl,
    vae_loss,
)

SHAPE = (5, 37)
CLAMPS = [None, (-2.5, 0.75)]
SCALES = ["logvar", "log_sigma", "sigma"]


def given(scale: str, dtype: torch.dtype, shape=SHAPE, seed: int = 3) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    sigma = np.exp(rng.uniform(-2, 1.2, size=(2, *shape)))
    second = {"logvar": 2 * np.log(sigma), "log_sigma": np.log(sigma), "sigma": sigma}[scale]
    values = {
        "mu": rng.normal(size=shape),
        "logvar": second[0],
        "mu_p": rng.normal(size=shape),
        "logvar_p": second[1],
    }
    return {k: tensor(v, dtype) for k, v in values.items()}


def both(op: str, tensors: dict[str, Tensor], **options):
    """The results and gradients of the op, and those of the plain form in float64."""

    def run(module, inputs):
        inputs = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
        outputs = getattr(module, op)(**inputs, **options)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        upstream = [
            torch.linspace(0.3, 1.9, o.numel(), dtype=o.dtype, device=o.device).view(o.shape)
            for o in outputs
        ]
        return outputs, torch.autograd.grad(outputs, list(inputs.values()), upstream)

    options64 = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    got = run(fastvae, tensors)
    options = options64
    return got, run(plain, {k: t.double() for k, t in tensors.items()})


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1.5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_close(got, want, dtype):
    for g, w in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        rtol = TOLERANCE[g.dtype]
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=rtol * w.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clamp", CLAMPS, ids=["free", "clamped"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "op, prior",
    [
        ("kl_normal", False),
        ("kl_normal", True),
        ("sample_and_kl", False),
        ("sample_and_kl", True),
        ("reparameterize", False),
    ],
)
def test_values_and_gradients(op, scale, clamp, prior, dtype):
    tensors = given(scale, dtype)
    if not prior:
        tensors = {k: tensors[k] for k in ("mu", "logvar")}
    options = {"scale": scale, "clamp": clamp}
    if op != "kl_normal":
        eps = tensor(np.random.default_rng(4).normal(size=SHAPE), torch.float32).to(dtype)
        options["eps"] = eps
    else:
        options["reduction"] = "none"
    got, want = both(op, tensors, **options)
    assert_close(got, want, dtype)


def test_drawn_noise_is_that_of_logvar():
    tensors = given("sigma", torch.float32)
    torch.manual_seed(5)
    z = reparameterize(tensors["mu"], tensors["logvar"], scale="sigma")
    torch.manual_seed(5)
    z2, eps = reparameterize(tensors["mu"], tensors["logvar"], scale="sigma", return_eps=True)
    assert torch.equal(z, z2)
    torch.testing.assert_close(z, tensors["mu"] + tensors["logvar"] * eps, rtol=1e-6, atol=1e-6)


def test_sigma_zero_samples_mu_with_finite_gradients():
    mu = tensor([[0.25, -3.0, 1e4]], torch.float32).requires_grad_()
    sigma = torch.zeros_like(mu, requires_grad=True)
    z, eps = reparameterize(mu, sigma, scale="sigma", return_eps=True)
    assert torch.equal(z, mu)
    z.sum().backward()
    assert torch.equal(sigma.grad, eps) and torch.equal(mu.grad, torch.ones_like(mu))
    clamped = reparameterize(mu, sigma, scale="sigma", clamp=(-4.0, 4.0), eps=eps)
    torch.testing.assert_close(clamped, mu + np.exp(-2.0) * eps)
    sigma.grad = None
    clamped.sum().backward()
    assert torch.equal(sigma.grad, torch.zeros_like(sigma))
    # The KL goes to infinity there, and so does its slope.
    kl = kl_normal(mu, sigma, scale="sigma")
    assert kl.item() == np.inf


@pytest.mark.parametrize("op", ["kl_normal", "reparameterize"])
def test_clamp_has_torch_clamp_s_gradient(op):
    """At the bounds it passes, outside it does not, and a NaN stays."""
    logvar = tensor([[-2.0, -2.0000002, 1.0, 1.0000001, 0.5, 7.0, -9.0]], torch.float32)
    grads = []
    for how in ("inside", "before"):
        mu, lv = torch.ones_like(logvar), logvar.clone().requires_grad_()
        second, options = (
            (lv, {"clamp": (-2.0, 1.0)}) if how == "inside" else (lv.clamp(-2.0, 1.0), {})
        )
        if op == "reparameterize":
            options["eps"] = torch.full_like(mu, 0.7)
        getattr(fastvae, op)(mu, second, **options).sum().backward()
        grads.append(lv.grad)
    assert torch.equal(*grads)
    poisoned = tensor([[float("nan")]], torch.float32)
    assert kl_normal(poisoned * 0 + 1, poisoned, clamp=(-1.0, 1.0)).isnan()


def test_digits_near_the_prior_from_sigmas():
    """Where posterior and prior are nearly one, their difference comes from the ratio of the sigmas: right to 1e-6."""
    sigma_p = tensor([[0.3, 1.0, 7.0, 1234.5]], torch.float32)
    sigma = torch.nextafter(sigma_p, sigma_p * 2) * (1 + 1e-4)
    mu = torch.zeros_like(sigma)
    got = kl_normal(mu, sigma, mu, sigma_p, scale="sigma", reduction="none")
    r = (sigma.cpu().numpy().astype(np.longdouble) - sigma_p.cpu().numpy()) / sigma_p.cpu().numpy()
    want = 0.5 * (r * (2 + r) - 2 * np.log1p(r))
    np.testing.assert_allclose(got.cpu().numpy(), want.astype(float), rtol=1e-6)
    alone = kl_normal(mu, 1 + (sigma - sigma_p) / sigma_p, scale="sigma", reduction="none")
    np.testing.assert_allclose(alone.cpu().numpy(), want.astype(float), rtol=1e-2)


@pytest.mark.parametrize("scale", SCALES)
def test_vae_loss(scale):
    tensors = given(scale, torch.float32)
    x = tensor(np.random.default_rng(6).normal(size=(5, 11)), torch.float32)
    inputs = {"recon_x": x * 0.9, "x": x, "mu": tensors["mu"], "logvar": tensors["logvar"]}
    for clamp in CLAMPS:
        got, want = both("vae_loss", inputs, scale=scale, clamp=clamp, beta=0.7)
        assert_close(got, want, torch.float32)


@pytest.mark.parametrize("scale", SCALES)
def test_second_derivatives(scale):
    tensors = given(scale, torch.float64, (2, 3))
    mu, second = (tensors[k].requires_grad_() for k in ("mu", "logvar"))
    eps = torch.full_like(mu, 0.3)
    for clamp in (None, (-1.0, 0.5)):
        for f in (
            lambda m, s, clamp=clamp: kl_normal(m, s, scale=scale, clamp=clamp),
            lambda m, s, clamp=clamp: reparameterize(m, s, scale=scale, clamp=clamp, eps=eps),
            lambda m, s, clamp=clamp: sample_and_kl(m, s, scale=scale, clamp=clamp, eps=eps),
        ):
            torch.autograd.gradgradcheck(f, (mu, second))


@pytest.mark.parametrize("scale", SCALES)
def test_compiled_and_func(scale):
    tensors = given(scale, torch.float32)
    mu, second = tensors["mu"], tensors["logvar"]
    eps = torch.full_like(mu, 0.3)

    def f(m, s):
        z = reparameterize(m, s, scale=scale, clamp=(-3.0, 1.0), eps=eps)
        out = vae_loss(z, mu, m, s, scale=scale, clamp=(-3.0, 1.0))
        return (
            out.loss
            + kl_one_sample(z, m, s, scale=scale)
            + normal_log_prob(z, m, s, scale=scale).sum()
        )

    want = torch.func.grad(f, (0, 1))(mu, second)
    compiled = torch.compile(f, fullgraph=True)
    m, s = mu.clone().requires_grad_(), second.clone().requires_grad_()
    compiled(m, s).backward()
    torch.testing.assert_close((m.grad, s.grad), want, rtol=1e-5, atol=1e-5)
    each = torch.vmap(
        lambda a, b: kl_normal(a, b, scale=scale, clamp=(-3.0, 1.0), reduction="sum")
    )(mu.unsqueeze(1), second.unsqueeze(1))
    torch.testing.assert_close(
        each, kl_normal(mu, second, scale=scale, clamp=(-3.0, 1.0), reduction="sample")
    )
    z = torch.vmap(lambda a, b, e: reparameterize(a, b, scale=scale, eps=e))(mu, second, eps)
    assert torch.equal(z, reparameterize(mu, second, scale=scale, eps=eps))
    _, tangent = torch.func.jvp(
        lambda s: reparameterize(mu, s, scale=scale, eps=eps), (second,), (torch.ones_like(mu),)
    )
    want_tangent = torch.func.grad(lambda s: reparameterize(mu, s, scale=scale, eps=eps).sum())(
        second
    )
    torch.testing.assert_close(tangent, want_tangent)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": "std"}, 'scale must be "logvar", "log_sigma" or "sigma", but got "std"'),
        ({"clamp": (1.0, -1.0)}, "low <= high"),
        ({"clamp": 3.0}, "pair"),
        ({"clamp": ("a", 1.0)}, "must be numbers"),
    ],
)
@pytest.mark.parametrize("op", ["kl_normal", "reparameterize", "sample_and_kl"])
def test_errors(op, options, message):
    mu = torch.zeros(2, 3)
    with pytest.raises((TypeError, ValueError), match=message) as error:
        getattr(fastvae, op)(mu, mu, **options)
    assert f"fastvae.{op}" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_sigmas_beside_a_prior(dtype):
    """log(sigma / sigma_p) keeps its digits far from 1, and is finite where the ratio is no number any more."""
    tiny = (
        [1e-3, 1e-5, 1e-8, 1e-20, 1e-37]
        if dtype == torch.float32
        else [1e-3, 1e-10, 1e-100, 1e-300]
    )
    sigma = tensor([tiny], dtype)
    mu, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    for sigma_p in (one, one * (1e30 if dtype == torch.float32 else 1e200)):
        got = kl_normal(mu, sigma, mu, sigma_p, scale="sigma", reduction="none")
        exact = [t.cpu().numpy().astype(np.longdouble) for t in (sigma, sigma_p)]
        log_ratio = np.log(exact[0]) - np.log(exact[1])
        want = 0.5 * (np.expm1(2 * log_ratio) - 2 * log_ratio)
        rtol = 1e-6 if dtype == torch.float32 else 1e-14
        np.testing.assert_allclose(got.cpu().double().numpy(), want.astype(float), rtol=rtol)


def test_no_gradient_where_it_was_clamped_however_large_the_derivative():
    for arguments, clamp in (
        ((1.0, 200.0), (-30.0, 100.0)),
        ((1.0, 50.0, 0.0, -80.0), (-30.0, 20.0)),
    ):
        tensors = [tensor([[a]], torch.float32).requires_grad_() for a in arguments]
        kl_normal(*tensors, clamp=clamp).backward()
        assert tensors[1].grad.item() == 0
    z, mu, logvar = (tensor([[a]], torch.float32).requires_grad_() for a in (100.0, 0.0, -500.0))
    normal_log_prob(z, mu, logvar, clamp=(-80.0, 20.0)).backward(torch.ones(1))
    assert logvar.grad.item() == 0


def test_sigma_zero_below_an_open_clamp():
    mu = torch.zeros(1, 2)
    sigma = tensor([[0.0, 1e-42]], torch.float32).requires_grad_()
    eps = torch.full_like(mu, 0.5)
    reparameterize(mu, sigma, scale="sigma", clamp=(-np.inf, 20.0), eps=eps).sum().backward()
    assert torch.equal(sigma.grad, eps)
