"""torch.func: its derivatives, vmap with its randomness flag, and forward mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import OUTPUTS, varied
from cases import REDUCTIONS, inputs, latents, noise, vae_inputs
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fastvae
from fastvae import kl_normal, reconstruction_loss, reparameterize, sample_and_kl, vae_loss

OPS = list(OUTPUTS)
V = 3  # what vmap maps over

# The options, and whether there is a prior, that reach every branch of an op.
VARIANTS: list[tuple[str, dict[str, Any], bool]] = [
    ("reparameterize", {}, False),
    *[("kl_normal", {"reduction": r}, prior) for r in REDUCTIONS for prior in (False, True)],
    *[("sample_and_kl", {"reduction": r}, r != "sum") for r in REDUCTIONS[:4]],
    *[("reconstruction_loss", {"reduction": r}, False) for r in REDUCTIONS],
    ("reconstruction_loss", {"likelihood": "gaussian"}, False),
    ("vae_loss", {"reduction": "sum", "kl_reduction": "mean", "beta": 0.3}, False),
    ("vae_loss", {"likelihood": "gaussian", "beta": 0.3}, False),
    ("vae_loss", {"reduction": "sample", "beta": 0.3}, False),
]
IDS = [f"{name}-{prior}-{options}" for name, options, prior in VARIANTS]
variants = pytest.mark.parametrize(("name", "options", "prior"), VARIANTS, ids=IDS)


def tensors_of(
    name: str, prior: bool, shape=(2, 3), dtype=torch.float64, **kwargs
) -> dict[str, Tensor]:
    return inputs(name, shape, dtype, **kwargs, **({"prior": True} if prior else {}))


def as_tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def weighed(op: Callable[..., Any], **options: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    """A number that reaches each element of each output with a gradient of its own."""

    def fn(tensors: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for o in as_tuple(op(**tensors, **options)):
            total = total.to(o.device) + (varied(o.shape, o.dtype, o.device) * o.square()).sum()
        return total

    return fn


# Derivatives, against those of the plain expressions


def squared_gradient(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return grad(lambda t: sum(g.square().sum() for g in grad(fn)(t).values()))


def directional(fn: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda t: jvp(fn, (t,), ({k: varied(v.shape, v.dtype, v.device) for k, v in t.items()},))


TRANSFORMS = {
    "grad": grad,
    "grad of grad": squared_gradient,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda fn: jacrev(jacrev(fn)),
    "jvp": directional,
    "jvp of grad": lambda fn: directional(grad(fn)),
}


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(t, marks=pytest.mark.slow if " of j" in t or " of g" in t else ())
        for t in TRANSFORMS
    ],
)
@variants
def test_derivatives(name, options, prior, transform, device):
    tensors = tensors_of(name, prior, device=device)
    got, want = (
        TRANSFORMS[transform](weighed(getattr(module, name), **options))(tensors)
        for module in (fastvae, fastvae.reference)
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["reparameterize", "sample_and_kl"])
def test_derivatives_of_a_draw(name, device):
    """Of one with the noise that the same seed gives eagerly."""
    mu, logvar = latents((4, 5), torch.float64, device).values()
    op = getattr(fastvae, name)

    def z(mu, logvar):
        return as_tuple(op(mu, logvar))[0]

    torch.manual_seed(3)
    eps = (z(mu, logvar) - mu) / torch.exp(0.5 * logvar)
    weights = varied((4, 5), torch.float64, device)
    d_logvar = 0.5 * torch.exp(0.5 * logvar) * eps
    torch.manual_seed(3)
    got = grad(lambda m, v: (weights * z(m, v)).sum(), argnums=(0, 1))(mu, logvar)
    torch.testing.assert_close(got, (weights, weights * d_logvar))
    torch.manual_seed(3)
    d_mu, d_v = varied((4, 5), torch.float64, device, low=-3.1), noise((4, 5)).to(mu)
    _, tangent = jvp(z, (mu, logvar), (d_mu, d_v))
    torch.testing.assert_close(tangent, d_mu + d_logvar * d_v)


@variants
def test_gradcheck_of_forward_mode_and_batches(name, options, prior):
    """Forward mode alone, over reverse mode, and both for a batch of directions at once."""
    tensors = {k: t.requires_grad_() for k, t in tensors_of(name, prior).items()}

    def fn(*args):
        return as_tuple(getattr(fastvae, name)(**dict(zip(tensors, args, strict=True)), **options))

    args = tuple(tensors.values())
    assert gradcheck(
        fn, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(fn, args, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_forward_mode_in_16_bits(name, dtype, device):
    """The tangent is rounded once, from the derivatives of the 16-bit inputs in float32."""
    tensors = tensors_of(name, False, (3, 40), dtype, device=device)
    directions = {k: varied(t.shape, dtype, device) for k, t in tensors.items()}
    _, got = jvp(lambda t: as_tuple(getattr(fastvae, name)(**t)), (tensors,), (directions,))
    wide, wide_directions = ({k: t.double() for k, t in ts.items()} for ts in (tensors, directions))
    reference = getattr(fastvae.reference, name)
    _, want = jvp(lambda t: as_tuple(reference(**t)), (wide,), (wide_directions,))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == (dtype if g.dim() > 0 else torch.float32)
        torch.testing.assert_close(g.double(), w, rtol=2 * torch.finfo(g.dtype).eps, atol=1e-5)


def test_a_tangent_goes_through_an_ordinary_backward():
    """Without create_graph the kernels make the gradients, and would lose the tangent without a word."""
    mu, logvar = (t.requires_grad_() for t in latents((3, 5), torch.float64).values())
    direction = varied((3, 5), torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logvar, direction)
        for reduction in ("sum", "sample"):
            kl = kl_normal(mu, dual, reduction=reduction).sum()
            (gradient,) = torch.autograd.grad(kl, dual)
            tangent = forward_ad.unpack_dual(gradient).tangent
            torch.testing.assert_close(tangent, (0.5 * logvar.exp() * direction).detach())
        # a tangent of the upstream gradient alone
        scale = forward_ad.make_dual(torch.tensor(2.0).double(), torch.tensor(3.0).double())
        (gradient,) = torch.autograd.grad(kl_normal(mu, logvar, reduction="sum"), mu, scale)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, 3 * mu.detach())


def test_a_batch_of_upstream_gradients():
    """jacobian(vectorize=True) and is_grads_batched, with the gradients of the forward pass and without."""
    mu, logvar = (t.requires_grad_() for t in latents((3, 5), torch.float64).values())
    upstream = torch.tensor([1.0, -0.4, 3.0]).double()
    kl = kl_normal(mu, logvar, reduction="sum")
    for _ in range(2):
        (got,) = torch.autograd.grad(kl, mu, upstream, is_grads_batched=True, retain_graph=True)
        torch.testing.assert_close(got, upstream[:, None, None] * mu.detach())
    z = reparameterize(mu, logvar)
    d_z = varied((4, 3, 5), torch.float64)
    got = torch.autograd.grad(z, (mu, logvar), d_z, is_grads_batched=True)
    torch.testing.assert_close(got, (d_z, 0.5 * d_z * (z - mu).detach()))


def test_gradients_of_a_model_without_state():
    layer = torch.nn.Linear(6, 8).double()
    x = noise((4, 6), torch.float64)

    def loss(parameters, module):
        mu, logvar = functional_call(layer, parameters, x).chunk(2, dim=1)
        recon_x = mu.sum(1, keepdim=True) * x
        return module.vae_loss(recon_x, x, mu, logvar, beta=0.3).loss

    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    got, want = (grad(loss)(parameters, module) for module in (fastvae, fastvae.reference))
    torch.testing.assert_close(got, want)
    value, pullback = vjp(lambda p: loss(p, fastvae), parameters)
    torch.testing.assert_close(
        pullback(torch.tensor(2.5, dtype=value.dtype))[0]["bias"], 2.5 * want["bias"]
    )


# vmap, against a loop


def mapped(tensors: dict[str, Tensor], dims: dict[str, int | None]) -> list[dict[str, Tensor]]:
    return [
        {k: t if dims[k] is None else t.select(dims[k], v) for k, t in tensors.items()}
        for v in range(V)
    ]


def stacked_inputs(
    name: str, prior: bool, which: str, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """Tensors of which all, or the first, or all but the first are mapped over, along dimensions that differ."""
    tensors, dims = {}, {}
    for i, (k, t) in enumerate(tensors_of(name, prior, (4, 5), dtype, device=device).items()):
        dims[k] = None if (which == "first" and i) or (which == "rest" and not i) else i % 3
        if dims[k] is not None:
            others = [t + 0.25 * v * t.abs() for v in range(V)]
            t = torch.stack(others, dim=dims[k])
        tensors[k] = t
    return tensors, dims


@pytest.mark.parametrize("which", ["all", "first", "rest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@variants
def test_vmap(name, options, prior, which, dtype, device):
    op = functools.partial(getattr(fastvae, name), **options)
    tensors, dims = stacked_inputs(name, prior, which, dtype, device)
    got = as_tuple(vmap(lambda t: op(**t), in_dims=(dims,))(tensors))
    loop = [as_tuple(op(**t)) for t in mapped(tensors, dims)]
    for g, w in zip(got, map(torch.stack, zip(*loop, strict=True)), strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=4e-7, atol=1e-7)


@pytest.mark.parametrize("which", ["all", "first", "rest"])
@variants
def test_vmap_of_grad(name, options, prior, which, device):
    """Gradients for each sample."""
    fn = weighed(getattr(fastvae, name), **options)
    tensors, dims = stacked_inputs(name, prior, which, torch.float64, device)
    got = vmap(grad(fn), in_dims=(dims,))(tensors)
    loop = [grad(fn)(t) for t in mapped(tensors, dims)]
    for k in tensors:
        torch.testing.assert_close(got[k], torch.stack([g[k] for g in loop]))


@variants
def test_grad_of_vmap(name, options, prior, device):
    """The fused kernels differentiate, whichever lies inside."""
    op = getattr(fastvae, name)
    tensors, dims = stacked_inputs(name, prior, "first", torch.float64, device)

    def of_vmap(t):
        return weighed(lambda **t: vmap(lambda t: op(**t, **options), in_dims=(dims,))(t))(t)

    def of_loop(t):
        outputs = [as_tuple(op(**s, **options)) for s in mapped(t, dims)]
        return weighed(lambda **_: tuple(map(torch.stack, zip(*outputs, strict=True))))(t)

    torch.testing.assert_close(grad(of_vmap)(tensors), grad(of_loop)(tensors))


def test_nested_vmap_and_a_beta_for_each():
    tensors = vae_inputs((4, 6), torch.float64)
    betas, scales = torch.tensor([0.1, 0.7, 2.0]).double(), torch.tensor([1.0, -0.5]).double()
    for reduction in ("mean", "sample"):

        def loss(beta, scale, reduction=reduction):
            scaled = tensors | {"mu": scale * tensors["mu"]}
            return vae_loss(**scaled, beta=beta, reduction=reduction).loss

        got = vmap(vmap(loss, in_dims=(0, None)), in_dims=(None, 0))(betas, scales)
        want = [torch.stack([loss(b, s) for b in betas]) for s in scales]
        torch.testing.assert_close(got, torch.stack(want))


def test_vmap_of_an_empty_batch():
    mu = torch.zeros(V, 0, 5)
    for reduction, want in (("sum", 0.0), ("mean", torch.nan), ("batchmean", torch.nan)):
        got = vmap(functools.partial(kl_normal, reduction=reduction))(mu, mu)
        torch.testing.assert_close(got, torch.full((V,), want), equal_nan=True)


def test_errors_inside_of_vmap_speak_of_what_the_user_sees():
    with pytest.raises(
        ValueError, match=r"kl_normal: mu and logvar must have the same shape.*\[5\] and \[4\]"
    ):
        vmap(kl_normal)(torch.zeros(V, 5), torch.zeros(V, 4))
    with pytest.raises(ValueError, match=r"recon_x must have a batch dimension, but it is a 0-dim"):
        vmap(reconstruction_loss)(torch.zeros(V), torch.zeros(V))
    with pytest.raises(ValueError, match=r'"sample" goes with "sample" only'):
        vmap(lambda t: vae_loss(t, t, t, t, reduction="sample", kl_reduction="sum").loss)(
            torch.zeros(V, 5)
        )
    with pytest.raises(ValueError, match="mu_p must have mu's shape"):
        vmap(lambda m, p: kl_normal(m, m, p, p))(torch.zeros(V, 2, 5), torch.zeros(V, 5))


# vmap's randomness flag


def drawing(op: str) -> Callable[[Tensor, Tensor], Tensor]:
    if op == "return_eps":
        return lambda mu, logvar: reparameterize(mu, logvar, return_eps=True)[1]
    return lambda mu, logvar: as_tuple(getattr(fastvae, op)(mu, logvar))[0]


@pytest.mark.parametrize("inside", ["plain", "grad"])
@pytest.mark.parametrize("which", ["both", "mu", "logvar", "none"])
@pytest.mark.parametrize("op", ["reparameterize", "sample_and_kl", "return_eps"])
def test_randomness(op, which, inside, device):
    """`which` of mu and logvar is mapped over; the noise is told from N(0, 1) itself, or from its gradient."""
    zeros = torch.zeros(4, 500, device=device)
    mu, logvar = (
        zeros.expand(V, 4, 500) if which in (k, "both") else zeros for k in ("mu", "logvar")
    )
    in_dims = (
        0 if which in ("mu", "both") else None,
        0 if which in ("logvar", "both") else None,
        0,
    )
    z = drawing(op)

    def fn(mu, logvar, _index):
        if inside == "grad" and op != "return_eps":  # d(sum z) / d(logvar) = eps / 2
            return 2 * grad(lambda v: z(mu, v).sum())(logvar)
        return z(mu, logvar)

    def draw(**kwargs):
        torch.manual_seed(5)
        return vmap(fn, in_dims=in_dims, **kwargs)(mu, logvar, torch.arange(V, device=device))

    with pytest.raises(RuntimeError, match="randomness"):
        draw()
    different, same = draw(randomness="different"), draw(randomness="same")
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    torch.manual_seed(5)
    torch.testing.assert_close(same[0], drawing("return_eps")(zeros, zeros))
    assert different.shape == (V, 4, 500)
    correlation = torch.corrcoef(different.flatten(1)) - torch.eye(V, device=device)
    assert correlation.abs().max() < 0.1  # 4.5 standard deviations
    assert abs(different.mean()) < 0.06 and abs(different.std() - 1) < 0.06
    assert not torch.equal(
        vmap(fn, in_dims, randomness="different")(mu, logvar, torch.arange(V)), different
    )


def test_randomness_with_noise_given_needs_no_flag():
    mu, logvar = latents((V, 4, 5)).values()
    eps = noise((V, 4, 5))
    got = vmap(lambda m, v, e: reparameterize(m, v, eps=e))(mu, logvar, eps)
    torch.testing.assert_close(got, reparameterize(mu, logvar, eps=eps))
    z, kl = vmap(lambda m, v, e: sample_and_kl(m, v, eps=e))(mu, logvar, eps)
    torch.testing.assert_close(z, got)
    torch.testing.assert_close(
        kl, torch.stack([kl_normal(m, v) for m, v in zip(mu, logvar, strict=True)])
    )


def test_randomness_of_nested_vmaps():
    mu = torch.zeros(2, V, 600)

    def nested(outer: str, inner: str) -> Tensor:
        draw = vmap(lambda m: reparameterize(m, m), randomness=inner)
        return vmap(draw, randomness=outer)(mu)

    z = nested("different", "same")
    assert torch.equal(z[0, 0], z[0, 1]) and not torch.equal(z[0, 0], z[1, 0])
    z = nested("same", "different")
    assert torch.equal(z[0], z[1]) and not torch.equal(z[0, 0], z[0, 1])
    z = nested("different", "different").flatten(0, 1)
    assert len({float(row[0]) for row in z}) == 2 * V


# In compiled programs


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    tensors = inputs("vae_loss", (4, 6), torch.float64)

    def loss(mu, logvar):
        rest = {k: tensors[k] for k in ("recon_x", "x")}
        return vae_loss(**rest, mu=mu, logvar=logvar, beta=0.3).loss

    def per_sample(mu, logvar):
        gradient = vmap(grad(loss), in_dims=(0, None))(mu, logvar)
        return gradient, vmap(reparameterize, randomness="different")(mu, mu)

    mu = torch.stack([tensors["mu"], -tensors["mu"]])
    run = torch.compile(per_sample, backend=backend, fullgraph=True)
    got, z = run(mu, tensors["logvar"])
    torch.testing.assert_close(got, per_sample(mu, tensors["logvar"])[0])
    assert not torch.equal(z, run(mu, tensors["logvar"])[1])
