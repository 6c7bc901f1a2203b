"""Gaussians with full covariance beside NumPy in extended precision, 60 digits near the prior, and draws."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from accuracy import to_numpy, varied
from cases import noise, seeded_generator
from torch import Tensor

from fastvae import (
    kl_multivariate_normal,
    kl_normal,
    reparameterize,
    sample_and_kl_multivariate_normal,
)
from fastvae.verify.inputs import gaussians
from fastvae.verify.oracle import kl_multivariate_normal as kl_of

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


def test_an_empty_batch():
    mu, factor = torch.zeros(0, 3), torch.zeros(0, 3, 3)
    assert kl_multivariate_normal(mu, factor, reduction="sum").item() == 0
    assert kl_multivariate_normal(mu, factor).isnan()
    assert kl_multivariate_normal(mu, factor, reduction="sample").shape == (0,)


MU, FACTOR = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((None, FACTOR), TypeError, "mu must be a floating-point tensor, but got NoneType"),
        ((MU, None), TypeError, "scale_tril must be a floating-point tensor, but got NoneType"),
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
