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
            "batch_dims must be an integer above 0",
        ),
        (
            lambda: normal_log_prob(z, torch.zeros(4)),
            "logvar must be a torch.Tensor, but got NoneType",
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
