"""normal_log_prob and kl_one_sample beside scipy's densities and longdouble differences; batch_dims."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import tensor
from scipy import stats
from torch import Tensor

import fastvae
import fastvae.reference as plain
from fastvae import kl_normal, kl_one_sample, normal_log_prob, reconstruction_loss
from fastvae.likelihoods import Gaussian

B, K, L = 4, 6, 9


def case(dtype=torch.float64, seed=8) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {
        "z": tensor(rng.normal(0, 1.5, size=(B, K, L)), dtype),
        "mu": tensor(rng.normal(size=(B, 1, L)), dtype),
        "logvar": tensor(rng.uniform(-3, 1, size=(B, 1, L)), dtype),
        "mu_p": tensor(rng.normal(size=(L,)), dtype),
        "logvar_p": tensor(rng.uniform(-1, 2, size=(L,)), dtype),
    }


def log_pdf(z, mu=0.0, logvar=0.0):
    return stats.norm.logpdf(z, mu, np.exp(np.asarray(logvar) / 2))


REDUCED = {
    "none": lambda v: v,
    "sample": lambda v: v.sum((1, 2)),
    "sum": lambda v: v.sum(),
    "batchmean": lambda v: v.sum() / B,
    "mean": lambda v: v.mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCED)
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "given"])
def test_values(reduction, prior, dtype):
    given = case(dtype)
    z, mu, logvar, mu_p, logvar_p = (t.cpu().double().numpy() for t in given.values())
    rtol = 2e-6 if dtype == torch.float32 else 1e-13
    q = log_pdf(z, mu, logvar)
    p = log_pdf(z, mu_p, logvar_p) if prior else log_pdf(z)
    if prior:
        got = normal_log_prob(given["z"], given["mu"], given["logvar"], reduction=reduction)
        want = REDUCED[reduction](q)
    else:
        got = normal_log_prob(given["z"], reduction=reduction)
        want = REDUCED[reduction](p)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=rtol, atol=rtol)
    tensors = given if prior else {k: given[k] for k in ("z", "mu", "logvar")}
    got = kl_one_sample(**tensors, reduction=reduction)
    want = REDUCED[reduction](q - p)
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=rtol, atol=rtol * np.abs(q).max() * K)


@pytest.mark.parametrize("scale", ["logvar", "log_sigma", "sigma"])
@pytest.mark.parametrize("op", ["normal_log_prob", "kl_one_sample"])
def test_gradients(op, scale):
    """Of all inputs, summed over what broadcasts, by float64's autograd of the plain form; and second derivatives."""
    given = case(torch.float32)
    if op == "normal_log_prob":
        given = {k: given[k] for k in ("z", "mu", "logvar")}
    for name in ("logvar", "logvar_p"):
        if name in given and scale != "logvar":
            given[name] = given[name] / 2 if scale == "log_sigma" else torch.exp(given[name] / 2)
    upstream = torch.linspace(0.4, 2.3, B * K).view(B, K)

    def gradients(module, dtype):
        inputs = {k: t.detach().to(dtype).requires_grad_() for k, t in given.items()}
        value = getattr(module, op)(
            **inputs, scale=scale, clamp=(-2.0, 1.5), reduction="sample", batch_dims=2
        )
        return torch.autograd.grad(value, list(inputs.values()), upstream.to(value))

    got, want = gradients(fastvae, torch.float32), gradients(plain, torch.float64)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=3e-6, atol=3e-6 * w.abs().max().item())
    inputs = [t.double().requires_grad_() for t in case(torch.float64).values()][: len(given)]
    if scale == "logvar":
        torch.autograd.gradgradcheck(
            lambda *a: getattr(fastvae, op)(*a, reduction="sample", batch_dims=2), inputs
        )


def test_digits_near_the_prior():
    """log q - log p of 1e-5 from densities of 1: right to 1e-6 of its terms, where a difference of two sums has no digit."""
    rng = np.random.default_rng(2)
    z, mu_p = rng.normal(size=(2, 64)).astype(np.float32)
    logvar_p = rng.uniform(-1, 1, 64).astype(np.float32)
    mu, logvar = (mu_p * np.float32(1 + 1e-6)), (logvar_p * np.float32(1 - 1e-6))
    got = kl_one_sample(
        *(tensor(a[None], torch.float32) for a in (z, mu, logvar, mu_p, logvar_p)), reduction="none"
    )
    z, mu, logvar, mu_p, logvar_p = (
        a.astype(np.longdouble) for a in (z, mu, logvar, mu_p, logvar_p)
    )
    t2, t2_p = (z - mu) ** 2 * np.exp(-logvar), (z - mu_p) ** 2 * np.exp(-logvar_p)
    want = (t2_p - t2 - (logvar - logvar_p)) / 2
    size = np.abs(t2_p - t2) + np.abs(logvar - logvar_p)
    assert np.abs(got.cpu().numpy()[0] - want).max() < 2e-12
    assert (np.abs(got.cpu().numpy()[0] - want) <= 2e-6 * size + 1e-14).all()


def test_it_estimates_the_kl():
    torch.manual_seed(1)
    mu, logvar = torch.full((1, 1), 0.7), torch.full((1, 1), -0.9)
    z = fastvae.reparameterize(mu.expand(100_000, 1), logvar.expand(100_000, 1))
    assert kl_one_sample(z, mu, logvar).item() == pytest.approx(
        kl_normal(mu, logvar).item(), abs=0.01
    )


def test_batch_dims():
    """[B, K] of x that is expanded, and read in place: the same numbers as of a copy."""
    rng = np.random.default_rng(3)
    recon_x = tensor(rng.normal(size=(B, K, 5, 3)), torch.float32).requires_grad_()
    x = tensor(rng.normal(size=(B, 5, 3)), torch.float32)
    wide = x.unsqueeze(1).expand(-1, K, -1, -1)
    got = reconstruction_loss(
        recon_x, wide, likelihood=Gaussian(), reduction="sample", batch_dims=2
    )
    want = 0.5 * (recon_x - wide).square().sum((2, 3))
    torch.testing.assert_close(got, want)
    g = torch.linspace(0.1, 2, B * K).view(B, K)
    (d,) = torch.autograd.grad(got, recon_x, g)
    torch.testing.assert_close(d, (recon_x - wide).detach() * g[:, :, None, None])
    mu = tensor(rng.normal(size=(B, K, L)), torch.float32)
    kl = kl_normal(mu.transpose(0, 1), mu.transpose(0, 1), reduction="sample", batch_dims=2)
    torch.testing.assert_close(kl, kl_normal(mu, mu, reduction="none").sum(2).T)
    all_dims = kl_normal(mu, mu, reduction="sample", batch_dims=3)
    torch.testing.assert_close(all_dims, kl_normal(mu, mu, reduction="none"))
    each = torch.vmap(lambda m: kl_normal(m, m, reduction="sample", batch_dims=2))(mu.unsqueeze(1))
    torch.testing.assert_close(
        each, kl_normal(mu, mu, reduction="sample", batch_dims=2).unsqueeze(1)
    )
    compiled = torch.compile(
        lambda m: kl_normal(m, m, reduction="sample", batch_dims=2), fullgraph=True
    )
    torch.testing.assert_close(compiled(mu), each.squeeze(1))


def test_errors():
    z = torch.zeros(2, 3)
    for call, message in [
        (lambda: kl_normal(z, z, batch_dims=2), 'batch_dims goes with reduction="sample"'),
        (lambda: kl_normal(z, z, reduction="sample", batch_dims=3), "batch_dims is 3"),
        (
            lambda: kl_normal(z, z, reduction="sample", batch_dims=0),
            "batch_dims must be an integer from 1 on",
        ),
        (
            lambda: normal_log_prob(z, torch.zeros(4)),
            "give both mu and logvar, or neither",
        ),
        (lambda: kl_one_sample(z, z, z, torch.zeros(4), z), "mu_p must broadcast"),
        (lambda: kl_one_sample(z, z, None), "logvar must be a torch.Tensor, but got NoneType"),
        (lambda: normal_log_prob(z, reduction="latent"), "reduction must be"),
        (lambda: normal_log_prob([1.0]), "z must be a torch.Tensor, but got list"),
    ]:
        with pytest.raises((TypeError, ValueError), match="fastvae") as error:
            call()
        assert message in str(error.value), str(error.value)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script"):
        torch.jit.script(kl_one_sample)


def test_composed_forms_have_no_floor():
    """A clamp comes with numbers, and among them is a least value: not 0, as a log density may be negative."""
    given = {k: case()[k] for k in ("z", "mu", "logvar")}
    for op in ("normal_log_prob", "kl_one_sample"):

        def value(z, op=op, module=fastvae):
            mu, logvar = (given[k][: len(z)] for k in ("mu", "logvar"))
            return getattr(module, op)(z, mu, logvar, clamp=(-2.0, 0.5), reduction="sum")

        direction = torch.ones_like(given["z"])
        got = torch.func.jvp(value, (given["z"],), (direction,))[1]
        want = torch.func.jvp(lambda z, f=value: f(z, module=plain), (given["z"],), (direction,))[1]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.func.hessian(value)(given["z"][:1, :1]),
            torch.func.hessian(lambda z, f=value: f(z, module=plain))(given["z"][:1, :1]),
        )
        each = torch.func.vmap(torch.func.grad(value))(given["z"].unsqueeze(1))
        torch.testing.assert_close(each[0], torch.func.grad(value)(given["z"][:1]))


@pytest.mark.parametrize("reduction", ["none", "sum", "sample"])
def test_an_expanded_z_beside_parameters_in_another_order(reduction):
    """The order of memory is that of an operand of z's shape, never that of one that broadcasts."""
    rng = np.random.default_rng(5)
    z = tensor(rng.normal(size=(1, 4, 5)), torch.float64).expand(3, 4, 5)
    mu = tensor(rng.normal(size=(5, 4)), torch.float64).t()
    logvar = tensor(rng.normal(size=(4, 5)), torch.float64)
    got = normal_log_prob(z, mu, logvar, reduction=reduction)
    torch.testing.assert_close(got, plain.normal_log_prob(z, mu, logvar, reduction=reduction))
    strided = tensor(rng.normal(size=10), torch.float64)[::2]
    got = normal_log_prob(z, strided, logvar, reduction="sample", batch_dims=2)
    torch.testing.assert_close(
        got, plain.normal_log_prob(z, strided, logvar, reduction="sample", batch_dims=2)
    )


def test_second_derivative_where_z_is_mu():
    """It is -exp(-logvar) there as well; the likelihood's is the negative."""
    z = tensor([[0.5, -1.0]], torch.float64).requires_grad_()
    mu, logvar = z.detach().clone(), tensor([[2.0, -0.5]], torch.float64)
    values = (
        (1, normal_log_prob(z, mu, logvar, reduction="sum")),
        (-1, reconstruction_loss(z, mu, likelihood=Gaussian(logvar), reduction="sum")),
    )
    for sign, value in values:
        (g,) = torch.autograd.grad(value, z, create_graph=True)
        (second,) = torch.autograd.grad(g.sum(), z)
        torch.testing.assert_close(second, -sign * torch.exp(-logvar))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes_of_kl_one_sample(dtype):
    """Where sigma underflows or the prior is far wider: no 0 times infinity."""
    far = 200.0 if dtype == torch.float32 else 1600.0
    rows = [(0.3, 0.3, -far, 0.0, 0.0), (0.5, 0.2, 1.0, 0.0, far), (0.3, 0.3, -far, 0.3, -far)]
    z, mu, logvar, mu_p, logvar_p = (
        tensor(column, dtype).unsqueeze(0) for column in zip(*rows, strict=True)
    )
    z.requires_grad_()
    got = kl_one_sample(z, mu, logvar, mu_p, logvar_p, reduction="none")
    wide = [t.detach().cpu().numpy().astype(np.longdouble) for t in (z, mu, logvar, mu_p, logvar_p)]
    z_, mu_, logvar_, mu_p_, logvar_p_ = wide
    want = (
        (z_ - mu_p_) ** 2 * np.exp(-logvar_p_)
        - (z_ - mu_) ** 2 * np.exp(-logvar_)
        - (logvar_ - logvar_p_)
    ) / 2
    np.testing.assert_allclose(
        got.detach().cpu().double().numpy(), want.astype(float), rtol=1e-6, atol=1e-6
    )
    got.sum().backward()
    slope = (z_ - mu_p_) * np.exp(-logvar_p_) - (z_ - mu_) * np.exp(-logvar_)
    np.testing.assert_allclose(
        z.grad.cpu().double().numpy(), slope.astype(float), rtol=1e-6, atol=1e-6
    )
