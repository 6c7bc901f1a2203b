"""IWAE and DReG beside the formulas in float64, and on models whose evidence is known or estimated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import noise, old_dynamo, tensor
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor, nn

import fastvae
from fastvae import importance_log_weight, iwae_loss, reparameterize
from fastvae.likelihoods import Gaussian

B, K, L, D = 4, 5, 3, 7


def case(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = np.random.default_rng(21)
    return {
        "recon_x": tensor(rng.normal(size=(B, K, D)), dtype),
        "x": tensor(rng.uniform(size=(B, D)), dtype),
        "z": tensor(rng.normal(0, 1.5, size=(B, K, L)), dtype),
        "mu": tensor(rng.normal(size=(B, L)), dtype),
        "logvar": tensor(rng.uniform(-3, 1, size=(B, L)), dtype),
    }


def log_weight(recon_x, x, z, mu, logvar):
    """By scipy's densities, for a Gaussian decoder of unit variance."""
    px = stats.norm.logpdf(x[:, None], recon_x).sum(2)
    pz = stats.norm.logpdf(z).sum(2)
    qz = stats.norm.logpdf(z, mu[:, None], np.exp(logvar / 2)[:, None]).sum(2)
    return px + pz - qz


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_values(estimator, dtype):
    given = case(dtype)
    want = log_weight(**{k: t.cpu().double().numpy() for k, t in given.items()})
    got = importance_log_weight(**given, likelihood=Gaussian(full=True), estimator=estimator)
    assert got.dtype == dtype
    rtol = 2e-6 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=rtol, atol=10 * rtol)  # they cancel
    loss = iwae_loss(got, estimator=estimator, z=given["z"])
    bound = -(logsumexp(want, 1) - math.log(K)).mean()
    assert loss.item() == pytest.approx(bound, rel=rtol)


def test_digits_near_the_prior():
    """log p(z) - log q(z) where the two are almost one: to 1e-5 of a difference of 1e-4 between numbers of 1."""
    given = case(torch.float32) | {
        "mu": tensor(np.full((B, L), 1e-4), torch.float32),
        "logvar": tensor(np.full((B, L), -2e-4), torch.float32),
    }
    both = given | {"recon_x": torch.zeros(B, K, D), "x": torch.zeros(B, D)}
    z, mu, logvar = (both[k].double().cpu().numpy() for k in ("z", "mu", "logvar"))
    t = (z - mu[:, None]) * np.exp(-logvar / 2)[:, None]
    want = (((t - z) * (t + z) + logvar[:, None]) / 2).sum(2)
    got = importance_log_weight(**both).cpu().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


def test_one_sample_is_an_elbo():
    given = {k: t[:, :1] if k in ("recon_x", "z") else t for k, t in case().items()}
    log_w = importance_log_weight(**given)
    assert iwae_loss(log_w).item() == pytest.approx(-log_w.mean().item())


# Gradients. The encoder's weights are phi, the decoder's theta; x -> z -> x in float64.


def weights() -> dict[str, Tensor]:
    rng = np.random.default_rng(22)
    return {
        "phi": tensor(rng.normal(0, 0.5, (D, 2 * L)), torch.float64).requires_grad_(),
        "theta": tensor(rng.normal(0, 0.5, (L, D)), torch.float64).requires_grad_(),
    }


def gradients(estimator: str, eps: Tensor, x: Tensor) -> dict[str, Tensor]:
    w = weights()
    mu, logvar = (x @ w["phi"]).chunk(2, 1)
    shape = (len(x), eps.shape[1], L)
    z = reparameterize(mu.unsqueeze(1).expand(shape), logvar.unsqueeze(1).expand(shape), eps=eps)
    log_w = importance_log_weight(
        z @ w["theta"], x, z, mu, logvar, likelihood="bce_with_logits", estimator=estimator
    )
    grads = torch.autograd.grad(2.5 * iwae_loss(log_w, estimator=estimator, z=z), list(w.values()))
    return dict(zip(w, grads, strict=True))


def written_out(estimator: str, eps: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Sample by sample, from the papers: the sum of w d(log w), or of w^2 d(log w)/dz dz/dphi for phi under DReG."""
    w = weights()
    total = {name: torch.zeros_like(t) for name, t in w.items()}
    for i in range(len(x)):
        terms = []
        for k in range(eps.shape[1]):
            mu, logvar = (x[i] @ w["phi"]).chunk(2)
            z = mu + torch.exp(logvar / 2) * eps[i, k]
            zz = z.detach().requires_grad_() if estimator == "dreg" else z
            m, v = (mu.detach(), logvar.detach()) if estimator == "dreg" else (mu, logvar)
            log_w = -F.binary_cross_entropy_with_logits(zz @ w["theta"], x[i], reduction="sum")
            log_w = log_w - zz.square().sum() / 2 + ((zz - m) ** 2 / v.exp() + v).sum() / 2
            terms.append((log_w, z, zz))
        share = torch.softmax(torch.stack([t[0].detach() for t in terms]), 0)
        for s, (log_w, z, zz) in zip(share, terms, strict=True):
            if estimator == "dreg":
                theta, dz = torch.autograd.grad(log_w, [w["theta"], zz])
                (phi,) = torch.autograd.grad(z, w["phi"], s * dz)
            else:
                phi, theta = torch.autograd.grad(log_w, [w["phi"], w["theta"]])
            total["phi"] -= 2.5 * s * phi / len(x)
            total["theta"] -= 2.5 * s * theta / len(x)
    return total


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_gradients(estimator):
    x, eps = case()["x"], noise((B, K, L), torch.float64)
    got, want = gradients(estimator, eps, x), written_out(estimator, eps, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


def test_dreg_is_unbiased_and_less_noisy():
    """Both estimate one gradient; with many samples DReG's varies less."""
    x = case()["x"][:1].expand(20_000, D)
    eps = noise((20_000, 8, L), torch.float64)
    found = {}
    for estimator in ("iwae", "dreg"):
        parts = [gradients(estimator, e, x[:500])["phi"] for e in eps.split(500)]
        found[estimator] = torch.stack(parts)
    means = {k: t.mean(0) for k, t in found.items()}
    spread = {k: t.std(0) / len(t) ** 0.5 for k, t in found.items()}
    error = (spread["iwae"].square() + spread["dreg"].square()).sqrt()
    assert ((means["iwae"] - means["dreg"]).abs() < 4.5 * error).all()
    assert spread["dreg"].mean() < 0.7 * spread["iwae"].mean()


@old_dynamo
def test_compiled():
    x, eps = case()["x"], noise((B, K, L), torch.float64)

    def loss(phi, theta):
        mu, logvar = (x @ phi).chunk(2, 1)
        shape = (B, K, L)
        z = reparameterize(
            mu.unsqueeze(1).expand(shape), logvar.unsqueeze(1).expand(shape), eps=eps
        )
        log_w = importance_log_weight(z @ theta, x, z, mu, logvar, estimator="dreg")
        return iwae_loss(log_w, estimator="dreg", z=z)

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        w = list(weights().values())
        value = f(*w)
        results.append((value.detach(), *torch.autograd.grad(value, w)))
    torch.testing.assert_close(results[0], results[1])


def test_x_is_not_repeated():
    """The target is one expanded view, also where the batch is an image's, in uint8."""
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    recon_x = torch.zeros(2, 5, 3, 8, 8)
    latent = torch.zeros(2, 4)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.extend(t for t in args if isinstance(t, Tensor) and t.dtype == torch.uint8)
            return op(*args, **(kwargs or {}))

    with Watch():
        importance_log_weight(
            recon_x,
            x,
            torch.zeros(2, 5, 4),
            latent,
            latent,
            likelihood=fastvae.likelihoods.Bernoulli(x_scale=1 / 255),
        )
    assert seen
    assert {t.data_ptr() for t in seen} == {x.data_ptr()}


# The bound


def test_it_tightens_to_the_evidence():
    """x = z + noise, with a posterior that is too wide: the bound grows with K, up to log N(x; 0, 2)."""
    x = tensor([[0.8], [-1.9], [0.1]], torch.float64)
    mu, logvar = 0.5 * x + 0.3, torch.zeros_like(x)
    evidence = stats.norm(0, math.sqrt(2)).logpdf(x.cpu().numpy()).mean()
    bounds = []
    for k in (1, 4, 16, 2000):
        n = 200_000 // k
        eps = noise((3, n, k, 1), torch.float64)
        z = (mu[:, None, None] + eps).reshape(3 * n, k, 1)
        wide = [t.repeat_interleave(n, 0) for t in (x, mu, logvar)]
        log_w = importance_log_weight(z, wide[0], z, *wide[1:], likelihood=Gaussian(full=True))
        bounds.append(-iwae_loss(log_w).item())
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(evidence, abs=1e-3)
    assert bounds[0] < evidence - 0.1


@pytest.mark.slow
def test_it_tightens_on_digits():
    """A small model of the demo's digits: each larger K gives a larger bound on test images."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images = tensor(datasets.load_digits().images.reshape(-1, 64) / 16, torch.float32)
    encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
    decoder = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)

    def bound(x: Tensor, k: int, estimator: str = "iwae") -> Tensor:
        mu, logvar = encoder(x).chunk(2, 1)
        z = reparameterize(*(t.unsqueeze(1).expand(-1, k, -1) for t in (mu, logvar)))
        log_w = importance_log_weight(
            decoder(z), x, z, mu, logvar, likelihood="bce_with_logits", estimator=estimator
        )
        return -iwae_loss(log_w, estimator=estimator, z=z)

    for _ in range(6):
        for x in images[:1500].split(100):
            optimizer.zero_grad()
            (-bound(x, 5, "dreg")).backward()
            optimizer.step()
    with torch.no_grad():
        bounds = [bound(images[1500:], k).item() for k in (1, 5, 25, 250)]
    assert bounds[0] > -30  # it has learned: ln 2 for each pixel would be -44
    assert bounds == sorted(bounds)
    assert bounds[1] > bounds[0] + 0.1


@pytest.mark.parametrize(
    ("spoiled", "error", "match"),
    [
        ({"x": None}, TypeError, "x must be a torch.Tensor, but got NoneType"),
        ({"x": torch.zeros(B + 1, D)}, ValueError, r"recon_x must be \[B, K, ...\] beside x"),
        ({"recon_x": torch.zeros(B, D)}, ValueError, r"recon_x must be .*\[4, 7\] and \[4, 7\]"),
        (
            {"mu": torch.zeros(B, 1)},
            ValueError,
            r"z must be .* beside mu .*\[4, 5, 3\] and \[4, 1\]",
        ),
        ({"logvar": torch.zeros(1, L)}, ValueError, r"z must be .* beside logvar"),
        ({"z": torch.zeros(B, 2, L)}, ValueError, "one number of samples, but got 5 and 2"),
        ({"estimator": "stl"}, ValueError, 'estimator must be "iwae" or "dreg", but got \'stl\''),
        ({"likelihood": "poison"}, ValueError, "likelihood must be .*'poison'"),
    ],
)
def test_errors(spoiled, error, match):
    with pytest.raises(error, match=f"^fastvae.importance_log_weight: .*{match}"):
        importance_log_weight(**case() | spoiled)


def test_an_event_of_another_shape_is_an_error_of_the_reconstruction():
    with pytest.raises(ValueError, match=r"reconstruction_loss: .*x .*\[4, 5, 7\].*\[4, 5, 8\]"):
        importance_log_weight(**case() | {"x": torch.zeros(B, D + 1).double()})


def test_errors_of_the_loss():
    for arguments, error, match in (
        (
            {"log_weight": torch.zeros(3)},
            ValueError,
            r"log_weight must be a tensor \[B, K\].*\[3\]",
        ),
        ({"log_weight": 1.0}, TypeError, r"log_weight must be a tensor \[B, K\].*float"),
        ({"estimator": "x"}, ValueError, 'estimator must be "iwae" or "dreg"'),
        ({"estimator": "dreg"}, ValueError, r'"dreg" needs z, .*\[2, 3\], but got NoneType'),
        ({"estimator": "dreg", "z": torch.zeros(2, 4)}, ValueError, r"\[2, 3\], but got \[2, 4\]"),
    ):
        with pytest.raises(error, match=f"^fastvae.iwae_loss: .*{match}"):
            iwae_loss(**{"log_weight": torch.zeros(2, 3)} | arguments)


def test_a_parameter_for_each_sample_of_x_is_not_read_along_k():
    logvar = torch.zeros(B, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must broadcast to recon_x .*unsqueeze\(1\)"):
        importance_log_weight(**case(), likelihood=Gaussian(logvar))
    got = importance_log_weight(**case(), likelihood=Gaussian(logvar.unsqueeze(1)))
    torch.testing.assert_close(got, importance_log_weight(**case(), likelihood="gaussian"))
