"""Gaussians with full covariance beside NumPy in extended precision, 60 digits near the prior, and draws."""

from __future__ import annotations

import math
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from accuracy import evaluate, to_numpy, varied
from cases import gaussians, noise, seeded_generator
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import MultivariateNormal, kl_divergence

from fastvae import (
    kl_multivariate_normal,
    kl_normal,
    reparameterize,
    sample_and_kl_multivariate_normal,
)
from fastvae.verify import oracle as truth
from fastvae.verify.oracle import kl_multivariate_normal as kl_of

MU, EYE = torch.zeros(2, 3), torch.eye(3).repeat(2, 1, 1)
NAMES = ("mu", "scale_tril", "mu_p", "scale_tril_p")


def packed(factor: Tensor) -> Tensor:
    """Row by row."""
    length = factor.shape[-1]
    return torch.cat([factor[..., i, : i + 1] for i in range(length)], -1)


def oracle(**given: Tensor) -> np.ndarray:
    """For each distribution, flat."""
    arrays = {k: to_numpy(t) for k, t in given.items()}
    arrays = {
        k: a.reshape(-1, *a.shape[a.ndim - (2 if "scale" in k else 1) :]) for k, a in arrays.items()
    }
    return kl_of(**arrays, reduction="sample", upstream=[None])[0][0]


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("form", ["full", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "length"), [((5,), 3), ((1,), 1), ((2, 3), 4), ((7,), 17)], ids=str
)
def test_values(batch, length, dtype, form, prior):
    given = gaussians(batch, length, dtype, prior)
    each = oracle(**given)
    rows = each.reshape(batch[0], -1).sum(1)
    if form == "packed":
        given = {k: packed(t) if "scale" in k else t for k, t in given.items()}
    wants = {
        "sample": rows,
        "sum": rows.sum(),
        "batchmean": rows.sum() / batch[0],
        "mean": rows.sum() / (each.size * length),
    }
    for reduction, want in wants.items():
        kl = kl_multivariate_normal(**given, reduction=reduction)
        assert kl.dtype == dtype
        rtol = 3e-6 if dtype == torch.float32 else 1e-11
        np.testing.assert_allclose(to_numpy(kl).astype(float), want, rtol=rtol)
    default = kl_multivariate_normal(**given)
    assert torch.equal(default, kl_multivariate_normal(**given, reduction="batchmean"))


def test_known_values():
    mu, one = torch.zeros(1, 2), torch.eye(2).unsqueeze(0)
    factor = torch.linalg.cholesky(torch.tensor([[[1, 0.5], [0.5, 1]]]))
    other = torch.tensor([[1.0, 0.0]])
    assert kl_multivariate_normal(mu, factor, other, one).item() == pytest.approx(
        0.643841, abs=2e-6
    )
    assert kl_multivariate_normal(other, one, mu, factor).item() == pytest.approx(
        0.856159, abs=2e-6
    )


@pytest.mark.parametrize("delta", [1e-4, -1e-4, 1e-2])
@pytest.mark.parametrize("prior", [False, True])
def test_digits_near_the_prior(prior, delta):
    """To 1e-6 in float32; next to another prior too, whose diagonal the factor's differs from by `delta`."""
    base = gaussians((1,), 4, prior=False)["scale_tril"] if prior else torch.eye(4).unsqueeze(0)
    factor = base + delta * torch.tril(torch.ones(4, 4)) * torch.tensor([1, 0.5, -0.3, 2.0])
    mu = torch.zeros(1, 4)
    given = (mu, factor, mu, base) if prior else (mu, factor)
    with mpmath.workdps(60):
        t, p = (mpmath.matrix(x[0].double().tolist()) for x in (factor, base))
        m = mpmath.inverse(p) * t
        want = sum(m[i, j] ** 2 for i in range(4) for j in range(i)) / 2
        want += sum((m[i, i] ** 2 - 1) / 2 - mpmath.log(m[i, i]) for i in range(4))
    got = kl_multivariate_normal(*given)
    assert got.item() == pytest.approx(float(want), rel=1e-6)


def test_a_diagonal_factor_is_kl_normal():
    given = gaussians((5,), 3)
    sigma, sigma_p = (given[k].diagonal(dim1=-2, dim2=-1) for k in NAMES[1::2])
    got = kl_multivariate_normal(
        given["mu"], torch.diag_embed(sigma), given["mu_p"], torch.diag_embed(sigma_p)
    )
    want = kl_normal(given["mu"], 2 * sigma.log(), given["mu_p"], 2 * sigma_p.log())
    torch.testing.assert_close(got, want)


def test_factors_of_very_different_sizes():
    given = gaussians((5,), 3, torch.float32)
    for scale in (1e-6, 1e6):
        other = given | {"scale_tril": given["scale_tril"] * scale}
        want = oracle(**{k: t.double() for k, t in other.items()}).mean()
        assert kl_multivariate_normal(**other).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e4])
def test_gradients_beside_a_wider_or_narrower_prior(scale):
    given = gaussians((5,), 8, torch.float32, prior=True)
    given["scale_tril"] = scale * given["scale_tril"]

    def gradients(kl, dtype):
        leaves = {k: t.to(dtype).requires_grad_() for k, t in given.items()}
        return torch.autograd.grad(
            kl(**leaves).sum(), [leaves["scale_tril"], leaves["scale_tril_p"]]
        )

    def of_torch(mu, scale_tril, mu_p, scale_tril_p):
        q, p = (
            MultivariateNormal(mu, scale_tril=scale_tril),
            MultivariateNormal(mu_p, scale_tril=scale_tril_p),
        )
        return kl_divergence(q, p)

    got = gradients(partial(kl_multivariate_normal, reduction="sum"), torch.float32)
    for g, want in zip(got, gradients(of_torch, torch.float64), strict=True):
        below = want.tril(-1)
        assert (g.tril(-1) - below).norm() <= 1e-6 * below.norm()


def test_what_is_above_the_diagonal_is_not_read():
    given = gaussians((5,), 3, torch.float64)
    want = kl_multivariate_normal(**given)
    junk = {k: t + torch.triu(torch.ones(3, 3), 1).double() * 7 if "scale" in k else t for k, t in given.items()}  # fmt: skip
    leaves = {k: t.requires_grad_() for k, t in junk.items()}
    eps = noise((5, 3), torch.float64)
    z, kl = sample_and_kl_multivariate_normal(**leaves, eps=eps)
    assert torch.equal(kl, want)
    assert torch.equal(z, sample_and_kl_multivariate_normal(**given, eps=eps)[0])
    for g in torch.autograd.grad(kl + z.sum(), [leaves["scale_tril"], leaves["scale_tril_p"]]):
        assert not torch.triu(g, 1).any()
        assert torch.tril(g).any()


@pytest.mark.parametrize("prior", [False, True])
def test_gradients_beside_the_closed_forms(prior):
    """To N(0, I): mu, and T - T^-T on the diagonal; another prior by the plain formula in float64."""
    given = gaussians((5,), 3, prior=prior)

    def plain(mu, scale_tril, mu_p=None, scale_tril_p=None):
        if mu_p is None:
            mu_p, scale_tril_p = torch.zeros_like(mu), torch.eye(3, dtype=mu.dtype).expand(5, 3, 3)
        m = torch.linalg.inv(scale_tril_p) @ torch.cat([scale_tril, (mu - mu_p).unsqueeze(-1)], -1)
        logs = [t.diagonal(dim1=-2, dim2=-1).log().sum(-1) for t in (scale_tril_p, scale_tril)]
        return m.square().sum((1, 2)) / 2 - 1.5 + logs[0] - logs[1]

    def gradients(f, tensors, **options):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        kl = f(*leaves, **options)
        return torch.autograd.grad(kl, leaves, varied(kl.shape, kl.dtype))

    got = gradients(kl_multivariate_normal, given, reduction="sample")
    want = gradients(plain, {k: t.double() for k, t in given.items()})
    for name, g, w in zip(given, got, want, strict=True):
        w = torch.tril(w) if "scale" in name else w
        torch.testing.assert_close(g.double(), w, rtol=2e-5, atol=2e-5 * float(w.abs().max()))


@pytest.mark.parametrize("form", ["full", "packed"])
@pytest.mark.parametrize("prior", [False, True])
def test_gradcheck(prior, form):
    given = gaussians((2,), 3, torch.float64, prior)
    eps = noise((2, 3), torch.float64)

    def f(*tensors):
        named = dict(zip(NAMES, tensors, strict=False))
        named = {
            k: torch.tril(t) if "scale" in k and form == "full" else t for k, t in named.items()
        }
        return sample_and_kl_multivariate_normal(**named, eps=eps, reduction="sample")

    inputs = [
        (packed(t) if "scale" in k and form == "packed" else t).clone().requires_grad_()
        for k, t in given.items()
    ]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_samples():
    given = gaussians((5,), 3)
    eps = noise((5, 3))
    z, kl = sample_and_kl_multivariate_normal(**given, eps=eps)
    want = np.einsum("bij,bj->bi", to_numpy(given["scale_tril"]), to_numpy(eps))
    np.testing.assert_allclose(
        to_numpy(z).astype(float),
        (want + to_numpy(given["mu"])).astype(float),
        rtol=1e-5,
        atol=1e-6,
    )
    assert torch.equal(kl, kl_multivariate_normal(**given))
    other = given | {"scale_tril": packed(given["scale_tril"])}
    assert torch.equal(z, sample_and_kl_multivariate_normal(**other, eps=eps)[0])

    # its own noise is reparameterize's
    eye = torch.eye(3).expand(5, 3, 3)
    z, _ = sample_and_kl_multivariate_normal(given["mu"], eye, generator=seeded_generator(3))
    mu, one = given["mu"], torch.zeros(5, 3)
    torch.testing.assert_close(z, reparameterize(mu, one, generator=seeded_generator(3)))


def test_the_covariance_of_the_samples():
    given = gaussians((1,), 3, prior=False)
    wide = {k: t.expand(200_000, *t.shape[1:]) for k, t in given.items()}
    z, _ = sample_and_kl_multivariate_normal(**wide)
    factor = given["scale_tril"][0]
    torch.testing.assert_close(torch.cov(z.T), factor @ factor.T, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype):
    given = gaussians((5,), 3, dtype)
    z, kl = sample_and_kl_multivariate_normal(**given, reduction="sample")
    assert z.dtype == dtype
    assert kl.dtype == torch.float32
    np.testing.assert_allclose(to_numpy(kl).astype(float), oracle(**given), rtol=2e-6)
    mixed = given | {"mu": given["mu"].float()}
    assert sample_and_kl_multivariate_normal(**mixed)[0].dtype == torch.float32


def test_compiled():
    given = gaussians((4,), 3)
    f = torch.compile(sample_and_kl_multivariate_normal, fullgraph=True, backend="aot_eager")
    for tensors in (given, given | {"scale_tril": packed(given["scale_tril"])}):
        torch.manual_seed(3)
        want = sample_and_kl_multivariate_normal(**tensors)
        torch.manual_seed(3)
        torch.testing.assert_close(f(**tensors), want)


def test_vmap():
    given = gaussians((4, 5), 3)
    for tensors in (given, given | {"scale_tril_p": packed(given["scale_tril_p"])}):
        got = torch.vmap(lambda *t: kl_multivariate_normal(*t))(*tensors.values())
        want = [kl_multivariate_normal(*(t[i] for t in tensors.values())) for i in range(4)]
        torch.testing.assert_close(got, torch.stack(want))


# The fused op: N(0, I) as the prior. Its columns come in groups of 32 (16 in double), and matrices are shared among threads.

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 64, 70]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_values_and_gradients_of_many_sizes(length, dtype, device):
    given = gaussians((3, 2), length, dtype, prior=False, device=device)
    given["eps"] = noise((3, 2, length), dtype, device)
    got = evaluate(sample_and_kl_multivariate_normal, given, reduction="sum")
    flat = {k: to_numpy(t).reshape(6, *t.shape[2:]) for k, t in given.items()}
    g_z, g_kl = (to_numpy(varied(o.shape, o.dtype)) for o in got.outputs)
    wants, gradients = truth.sample_and_kl_multivariate_normal(
        **flat, upstream=[g_z.reshape(6, length), g_kl], reduction="sum"
    )
    limit = 3e-6 if dtype == torch.float32 else 1e-14
    for o, w in zip(got.outputs, wants, strict=True):
        off = np.abs(to_numpy(o).reshape(w.shape) - w).max()
        assert off <= limit * np.abs(w).max()
    for name, g in got.grads.items():
        w = gradients[name].reshape(g.shape)
        assert np.abs(to_numpy(g) - w).max() <= limit * np.abs(w).max(), name

    other = given | {"scale_tril": packed(given["scale_tril"])}
    of_packed = evaluate(sample_and_kl_multivariate_normal, other, reduction="sum")
    assert all(map(torch.equal, got.outputs, of_packed.outputs))
    for name, g in got.grads.items():
        assert torch.equal(packed(g) if "scale" in name else g, of_packed.grads[name])


def test_strided_and_shared_inputs():
    given = gaussians((5,), 7, prior=False) | {"eps": noise((5, 7))}
    given["scale_tril"] = given["scale_tril"][:1].expand(5, 7, 7)
    strided = {k: torch.stack([t, t], -1).unbind(-1)[1] for k, t in given.items()}
    strided["scale_tril"] = given["scale_tril"].mT.contiguous().mT
    outcomes = [evaluate(sample_and_kl_multivariate_normal, t) for t in (given, strided)]
    a, b = [(*o.outputs, *o.grads.values()) for o in outcomes]
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_float32_inside(dtype):
    given = gaussians((5,), 17, dtype, prior=False) | {"eps": noise((5, 17))}
    upstream = [varied((5, 17), dtype), torch.tensor(1.5)]
    got = evaluate(sample_and_kl_multivariate_normal, given, upstream)
    wide = {k: t.float() for k, t in given.items()}
    want = evaluate(sample_and_kl_multivariate_normal, wide, [upstream[0].float(), upstream[1]])
    assert torch.equal(got.outputs[0], want.outputs[0].to(dtype))
    assert torch.equal(got.outputs[1], want.outputs[1])
    for name, g in got.grads.items():
        assert torch.equal(g, want.grads[name].to(given[name].dtype))


@pytest.mark.parametrize("where", ["mu", "scale_tril", "eps"])
def test_nan_stays(where):
    given = gaussians((70,), 20, prior=False) | {"eps": noise((70, 20))}
    given[where][3, 2] = math.nan
    z, kl = sample_and_kl_multivariate_normal(**given, reduction="sample")
    rows = torch.zeros(70, dtype=torch.bool)
    rows[3] = True
    assert torch.equal(z.isnan().any(1), rows)
    assert torch.equal(kl.isnan(), rows & (where != "eps"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_diagonal_that_is_not_positive(dtype):
    """As a logarithm has it. The sample alone may have a zero there."""
    factor = torch.eye(3, dtype=dtype).repeat(3, 1, 1)
    factor[0, 1, 1], factor[1, 2, 2] = 0, -1
    mu = torch.zeros(3, 3, dtype=dtype)
    kl = kl_multivariate_normal(mu, factor, reduction="sample")
    assert kl[0] == math.inf and kl[1].isnan() and kl[2] == 0
    leaf, eps = factor.requires_grad_(), noise((3, 3), dtype)
    z, _ = sample_and_kl_multivariate_normal(mu, leaf, eps=eps)
    (g,) = torch.autograd.grad(z.sum(), leaf)
    assert torch.equal(g, torch.tril(eps.unsqueeze(1).expand(3, 3, 3)))


@pytest.mark.parametrize("form", ["full", "packed"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sample"])
def test_derivatives(reduction, form):
    mu, factor = gaussians((3,), 4, torch.float64, prior=False).values()

    def op(mu: Tensor, factor: Tensor, *eps: Tensor):
        factor = torch.tril(factor) if form == "full" else factor
        if not eps:
            return kl_multivariate_normal(mu, factor, reduction=reduction)
        return sample_and_kl_multivariate_normal(mu, factor, eps=eps[0], reduction=reduction)

    factor = packed(factor) if form == "packed" else factor
    inputs = [t.clone().requires_grad_() for t in (mu, factor, noise((3, 4), torch.float64))]
    for some in (inputs, inputs[:2]):
        assert gradcheck(op, some, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(op, some)


@pytest.mark.parametrize("form", ["full", "packed"])
@pytest.mark.parametrize("reduction", range(4))
def test_the_composed_form_is_the_same(reduction, form):
    """Near the prior too."""
    given = gaussians((4,), 5, prior=False)
    given["scale_tril"] = torch.eye(5) + 1e-4 * given["scale_tril"]
    factor = packed(given["scale_tril"]) if form == "packed" else given["scale_tril"]
    arguments = (given["mu"] * 1e-4, factor, noise((4, 5)), reduction)
    got = torch.ops.fastvae.multivariate_normal_composed(*arguments)
    torch.testing.assert_close(
        got, torch.ops.fastvae.multivariate_normal(*arguments), rtol=1e-6, atol=0
    )


def test_gradients_of_some_outputs_and_inputs():
    given = gaussians((5,), 6, prior=False) | {"eps": noise((5, 6))}
    g = [varied((5, 6), torch.float32), torch.tensor(1.5)]
    for k in range(2):
        some = evaluate(
            sample_and_kl_multivariate_normal, given, [g[0], None] if k else [None, g[1]]
        )
        zeros = [g[0], 0 * g[1]] if k else [0 * g[0], g[1]]
        assert all(
            map(
                torch.equal,
                some.grads.values(),
                evaluate(sample_and_kl_multivariate_normal, given, zeros).grads.values(),
            )
        )
    want = evaluate(sample_and_kl_multivariate_normal, given, g).grads
    for name in given:
        leaves = {k: t.detach().requires_grad_(k == name) for k, t in given.items()}
        outputs = sample_and_kl_multivariate_normal(**leaves)
        (got,) = torch.autograd.grad(outputs, leaves[name], g)
        assert torch.equal(got, want[name])


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "sample"])
@pytest.mark.parametrize("form", ["full", "packed"])
def test_vmap_of_the_fused_op(form, reduction):
    given = gaussians((4, 5), 3, prior=False) | {"eps": noise((4, 5, 3))}
    if form == "packed":
        given["scale_tril"] = packed(given["scale_tril"])
    given["mu"] = given["mu"][0]

    def f(mu, scale_tril, eps):
        kl = kl_multivariate_normal(mu, scale_tril, reduction=reduction)
        return kl, *sample_and_kl_multivariate_normal(mu, scale_tril, reduction=reduction, eps=eps)

    got = torch.vmap(f, in_dims=(None, 0, 0))(*given.values())
    want = [f(given["mu"], given["scale_tril"][i], given["eps"][i]) for i in range(4)]
    for g, *w in zip(got, *want, strict=True):
        torch.testing.assert_close(g, torch.stack(w))

    def loss(scale_tril):
        return f(given["mu"], scale_tril, given["eps"][0])[2].sum()

    each = torch.vmap(torch.func.grad(loss))(given["scale_tril"])
    torch.testing.assert_close(each[2], torch.func.grad(loss)(given["scale_tril"][2]))


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "sample"])
def test_nested_vmap(reduction):
    given = gaussians((2, 3, 4), 5, torch.float64, prior=False)

    def f(mu, factor, eps):
        return sample_and_kl_multivariate_normal(mu, factor, eps=eps, reduction=reduction)

    tensors = (*given.values(), noise((2, 3, 4, 5), torch.float64))
    z, kl = torch.vmap(torch.vmap(f))(*tensors)
    one_by_one = [[f(*(t[i, j] for t in tensors)) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(z, torch.stack([torch.stack([o[0] for o in r]) for r in one_by_one]))
    torch.testing.assert_close(
        kl, torch.stack([torch.stack([o[1] for o in r]) for r in one_by_one])
    )


def test_what_an_absent_gradient_multiplies_is_not_read(device):
    """An infinite eps where only the KL is used, an infinite mean where only the sample is."""
    given = gaussians((3,), 4, torch.float32, prior=False, device=device)
    eps = noise((3, 4), device=device)
    leaves = [t.clone().requires_grad_() for t in (*given.values(), eps)]
    with torch.no_grad():
        leaves[2][0, 1] = math.inf
    _, kl = sample_and_kl_multivariate_normal(*leaves[:2], eps=leaves[2])
    for grad in torch.autograd.grad(kl, leaves, retain_graph=True, materialize_grads=True):
        assert grad.isfinite().all()
    for grad in torch.autograd.grad(kl, leaves, create_graph=True, materialize_grads=True):
        assert grad.isfinite().all()
    leaves = [t.clone().requires_grad_() for t in (*given.values(), eps)]
    with torch.no_grad():
        leaves[0][0, 1] = math.inf
        leaves[1][1, 2, 0] = math.inf
    z, _ = sample_and_kl_multivariate_normal(*leaves[:2], eps=leaves[2])
    d_mu, d_factor, _ = torch.autograd.grad(z.sum(), leaves)
    assert torch.equal(d_mu, torch.ones_like(d_mu))
    assert torch.equal(d_factor, eps.unsqueeze(1).expand(3, 4, 4).tril())


def test_the_sample_has_the_strides_of_mu():
    mu, factor = noise((4, 3, 5)).transpose(0, 1), torch.eye(5).expand(3, 4, 5, 5)
    z, _ = sample_and_kl_multivariate_normal(mu, factor, eps=torch.ones(3, 4, 5))
    assert z.stride() == torch.empty_like(mu).stride()
    torch.testing.assert_close(z, mu + 1)


def test_compiled_with_gradients_of_any_batch():
    def loss(mu, scale_tril, eps):
        z, kl = sample_and_kl_multivariate_normal(mu * 1.5, scale_tril, eps=eps)
        return z.square().sum() + kl + kl_multivariate_normal(mu, scale_tril, reduction="mean")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    given = gaussians((20,), 6, prior=False) | {"eps": noise((20, 6))}
    for count in (20, 13):
        leaves = [t[:count].clone().requires_grad_() for t in given.values()]
        want = torch.autograd.grad(loss(*leaves), leaves)
        got = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_an_empty_batch():
    mu, factor = torch.zeros(0, 3), torch.zeros(0, 3, 3)
    assert kl_multivariate_normal(mu, factor, reduction="sum").item() == 0
    assert kl_multivariate_normal(mu, factor).isnan()
    assert kl_multivariate_normal(mu, factor, reduction="sample").shape == (0,)
    eps = {"eps": torch.zeros(0, 3)}
    got = evaluate(sample_and_kl_multivariate_normal, {"mu": mu, "scale_tril": factor} | eps)
    assert got.grads["scale_tril"].shape == (0, 3, 3)
    none = torch.zeros(4, 0), torch.zeros(4, 0, 0)
    assert torch.equal(kl_multivariate_normal(*none, reduction="sample"), torch.zeros(4))


MU, FACTOR = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            (None, FACTOR),
            TypeError,
            "mu must be a torch.Tensor, but got NoneType",
        ),
        (
            (MU, None),
            TypeError,
            "scale_tril must be a tensor of float32, float64, bfloat16 or float16, but got NoneType",
        ),
        ((MU, FACTOR.long()), TypeError, "scale_tril must be .*torch.int64"),
        ((MU[0], FACTOR[0]), ValueError, r"mu must be \[B, ..., L\], but got \[3\]"),
        ((MU, FACTOR[:1]), ValueError, r"scale_tril must be \[2, 3, 3\], or packed \[2, 6\]"),
        ((MU, torch.ones(2, 5)), ValueError, r"beside mu \[2, 3\], but got \[2, 5\]"),
        ((MU, FACTOR, MU[:1], FACTOR), ValueError, r"mu_p must have mu's shape \[2, 3\]"),
        ((MU, FACTOR, MU), ValueError, "mu_p and scale_tril_p belong together; give both"),
        ((MU, FACTOR.double()), TypeError, "float64 goes with float64 only"),
    ],
)
@pytest.mark.parametrize("f", [kl_multivariate_normal, sample_and_kl_multivariate_normal])
def test_errors(f, arguments, error, match):
    with pytest.raises(error, match=f"^fastvae.{f.__name__}: .*{match}"):
        f(*arguments)
    with pytest.raises(ValueError, match=f'^fastvae.{f.__name__}: reduction .*but got "none"'):
        f(MU, FACTOR, reduction="none")


def test_an_eps_of_another_shape():
    with pytest.raises(
        ValueError, match=r"eps must be a tensor of mu's shape \[2, 3\], but got \[3\]"
    ):
        sample_and_kl_multivariate_normal(MU, FACTOR, eps=torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale_tril": EYE.to_sparse()}, "scale_tril must be a dense"),
        ({"mu": MU.to_sparse()}, "mu must be a dense"),
        ({"mu": MU.to(torch.float8_e4m3fn)}, "mu must be a tensor of .*float8"),
        ({"mu_p": MU.to_sparse(), "scale_tril_p": EYE}, "mu_p must be a dense"),
        ({"mu_p": MU, "scale_tril_p": EYE.to("meta")}, "scale_tril_p and mu must be on the same"),
        ({"generator": 3}, "generator must be a torch.Generator, but got int"),
        ({"eps": MU, "generator": torch.Generator()}, "got both eps and generator"),
        ({"eps": MU.long()}, "eps must be float32"),
        ({"eps": MU + 5j}, "eps must be float32"),
    ],
)
def test_what_is_wrong_is_named(change, match):
    given = {"mu": MU, "scale_tril": EYE} | change
    with pytest.raises(
        (TypeError, ValueError, RuntimeError),
        match=rf"fastvae\.sample_and_kl_multivariate_normal: {match}",
    ):
        sample_and_kl_multivariate_normal(**given)
