"""DiagonalGaussian beside the formulas of the class it takes the place of, and beside diffusers' own; GaussianHead."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from accuracy import to_numpy
from cases import noise, old_dynamo, seeded_generator, tensor
from torch import Tensor

import fastvae
from fastvae import DiagonalGaussian
from fastvae.nn import GaussianHead

SHAPES = {
    (5, 6): 1,
    (2, 8, 4, 3): 1,
    (3, 7, 10): -1,
    (2, 6, 3, 2, 2): 1,
    (8, 3): 0,
    (3, 4, 6, 5): 2,
}


def packed(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return tensor(np.random.default_rng([seed, *shape]).normal(0, 1.3, shape), dtype)


def halves(parameters: Tensor, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """mean and clamped logvar, by NumPy."""
    mean, logvar = np.split(to_numpy(parameters), 2, axis=dim)
    return mean, np.clip(logvar, -30, 20)


def summed(value: np.ndarray) -> np.ndarray:
    return value.sum(axis=tuple(range(1, value.ndim)))


def close(got: Tensor, want: np.ndarray, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(
        to_numpy(got).astype(float), want.astype(float), rtol=rtol, atol=rtol
    )


@pytest.mark.parametrize(("shape", "dim"), SHAPES.items(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_against_the_formulas(shape, dim, dtype):
    parameters, prior = packed(shape, dtype), packed(shape, dtype, 1)
    q, p = DiagonalGaussian(parameters, dim=dim), DiagonalGaussian(prior, dim=dim)
    (mean, logvar), (mean_p, logvar_p) = halves(parameters, dim), halves(prior, dim)
    assert q.parameters is parameters
    for t in (q.mean, q.logvar, q.std, q.var, q.mode(), q.sample(), q.sample_and_kl()[0]):
        assert t.dtype == dtype
        assert t.shape == mean.shape
    step = torch.finfo(dtype).eps
    for got, want in ((q.mean, mean), (q.logvar, logvar), (q.std, np.exp(logvar / 2))):
        close(got, want, 2 * step)
    close(q.var, np.exp(logvar), 2 * step)

    want = summed(mean**2 + np.exp(logvar) - 1 - logvar) / 2
    for kl in (q.kl(), q.sample_and_kl()[1]):
        assert kl.dtype == torch.promote_types(dtype, torch.float32)
        close(kl, want)
    variance_p = np.exp(logvar_p)
    want = (mean - mean_p) ** 2 / variance_p + np.exp(logvar) / variance_p - 1 - logvar + logvar_p
    for kl in (q.kl(p), q.sample_and_kl(p)[1]):
        close(kl, summed(want) / 2)

    x = packed(mean.shape, dtype, 2)
    nll = (math.log(2 * math.pi) + logvar + (to_numpy(x) - mean) ** 2 / np.exp(logvar)) / 2
    assert q.nll(x).dtype == torch.promote_types(dtype, torch.float32)
    close(q.nll(x), summed(nll), 2e-6)
    close(q.nll(x, dims=[0, -1]), nll.sum((0, -1)), 2e-6)


def test_mean_and_logvar_apart():
    mean, logvar = packed((3, 4, 5)), packed((3, 4, 5), seed=1)
    q = DiagonalGaussian(mean, logvar, dim=-1)
    both = DiagonalGaussian(torch.cat([mean, logvar], -1), dim=-1)
    assert torch.equal(q.parameters, both.parameters)
    assert torch.equal(q.kl(), both.kl())
    assert torch.equal(q.sample(seeded_generator(3)), both.sample(seeded_generator(3)))


def test_the_clamp_and_its_gradient():
    logvar = torch.tensor([[-31.0, -30.0, 0.5, 20.0, 21.0]], requires_grad=True)
    q = DiagonalGaussian(torch.zeros(1, 5), logvar)
    assert q.logvar.tolist() == [[-30, -30, 0.5, 20, 20]]
    (gradient,) = torch.autograd.grad(q.kl().sum(), logvar)
    close(gradient, np.array([[0, np.expm1(-30) / 2, np.expm1(0.5) / 2, np.expm1(20) / 2, 0]]))
    narrow = DiagonalGaussian(torch.zeros(1, 5), logvar, clamp=(-1.0, 0.25))
    assert narrow.logvar.tolist() == [[-1, -1, 0.25, 0.25, 0.25]]
    assert DiagonalGaussian(torch.zeros(1, 5), logvar, clamp=None).logvar is logvar


def test_it_keeps_its_digits_near_the_prior():
    logvar = tensor(np.full((2, 3), 1e-4), torch.float32)
    with mpmath.workdps(40):
        v = mpmath.mpf(float(logvar[0, 0]))
        want = float(3 * (mpmath.exp(v) - 1 - v) / 2)
    close(1e8 * DiagonalGaussian(torch.zeros(2, 3), logvar).kl(), np.full(2, 1e8 * want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_in_16_bits_are_finite(dtype):
    """A latent of Stable Diffusion's size, whose KL float16 does not hold."""
    parameters = packed((1, 8, 128, 128), dtype)
    q = DiagonalGaussian(parameters * 1.25)
    mean, logvar = halves(parameters * 1.25, 1)
    want = summed(mean**2 + np.exp(logvar) - 1 - logvar) / 2
    assert want > torch.finfo(torch.float16).max
    close(q.kl(), want)
    assert q.nll(torch.zeros_like(q.mean)).isfinite().all()


def test_lazy():
    """mode() computes nothing."""
    q = DiagonalGaussian(torch.empty(2, 8, 4, device="meta"))
    assert q.mode() is q.mean
    assert q._logvar is q._std is q._var is None
    assert q.std is q.std
    assert q.logvar is q.logvar


def test_deterministic():
    q = DiagonalGaussian(packed((2, 8, 4, 3)), deterministic=True)
    assert torch.equal(q.sample(), q.mean)
    assert torch.equal(q.sample_and_kl()[0], q.mean)
    for zero in (q.kl(), q.sample_and_kl()[1], q.nll(q.mean), q.kl(q)):
        assert zero.tolist() == [0, 0]
    assert q.nll(q.mean, dims=[0, 1]).shape == (4, 3)
    assert not q.std.any()
    assert not q.var.any()
    close(q.logvar, halves(q.parameters, 1)[1])


def test_generators():
    q = DiagonalGaussian(packed((3, 8, 5)))
    one = q.sample(seeded_generator(7))
    assert torch.equal(one, fastvae.reparameterize(q.mean, q.logvar, generator=seeded_generator(7)))
    assert torch.equal(one, q.sample([seeded_generator(7)]))
    torch.manual_seed(7)
    assert torch.equal(one, q.sample())

    several = q.sample([seeded_generator(seed) for seed in (3, 4, 5)])
    for i, seed in enumerate((3, 4, 5)):  # each sample's noise is its own
        alone = DiagonalGaussian(q.parameters[i : i + 1]).sample(seeded_generator(seed))
        assert torch.equal(several[i : i + 1], alone)
    z, kl = q.sample_and_kl(generator=[seeded_generator(seed) for seed in (3, 4, 5)])
    assert torch.equal(z, several)
    close(kl, to_numpy(q.kl()))


def test_a_generator_of_another_device():
    """Meta stands for a device here; `test_a_cpu_generator_on_cuda` has the numbers."""
    q = DiagonalGaussian(torch.empty(2, 8, 5, device="meta"))
    g = torch.Generator().manual_seed(1)
    before = g.get_state()
    assert q.sample(g).device.type == "meta"
    assert not torch.equal(before, g.get_state())
    assert q.sample([g, g]).shape == (2, 4, 5)


@pytest.mark.cuda
def test_a_cpu_generator_on_cuda():
    parameters = packed((3, 8, 5)).cpu()
    q, on_cuda = DiagonalGaussian(parameters), DiagonalGaussian(parameters.cuda())
    for seeds in ([3], [3, 4, 5]):
        z = q.sample([torch.Generator("cpu").manual_seed(seed) for seed in seeds])
        got = on_cuda.sample([torch.Generator("cpu").manual_seed(seed) for seed in seeds])
        torch.testing.assert_close(got.cpu(), z, rtol=1e-6, atol=1e-6)


def test_gradients_in_float64():
    parameters, other = packed((2, 4, 3), torch.float64), packed((2, 4, 3), torch.float64, 1)

    def terms(a, b, x):
        q, p = DiagonalGaussian(a), DiagonalGaussian(b)
        return q.kl(), q.kl(p), q.nll(x), q.nll(x, [2]), q.std, q.var

    inputs = [t.requires_grad_() for t in (parameters, other, packed((2, 2, 3), torch.float64, 2))]
    assert torch.autograd.gradcheck(terms, inputs)
    assert torch.autograd.gradgradcheck(terms, inputs)


@old_dynamo
def test_compiled():
    def objective(parameters):
        q = DiagonalGaussian(parameters)
        z, kl = q.sample_and_kl()
        return kl.sum() + q.nll(z.detach()).sum() + q.std.sum(), q

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    results = []
    for f in (objective, compiled):
        parameters = packed((2, 8, 3)).requires_grad_()
        torch.manual_seed(5)
        loss, q = f(parameters)
        assert isinstance(q, DiagonalGaussian)
        loss.backward()
        results.append((loss.detach(), parameters.grad, q.kl().detach()))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda q: DiagonalGaussian(None),
            TypeError,
            "parameters must be a torch.Tensor.*NoneType",
        ),
        (
            lambda q: DiagonalGaussian(q.mean, True),
            TypeError,
            "logvar .*bool; give deterministic by",
        ),
        (
            lambda q: DiagonalGaussian(torch.zeros(2, 3)),
            ValueError,
            r"dimension 1, .*\[2, 3\].*dim",
        ),
        (lambda q: DiagonalGaussian(torch.zeros(4)), ValueError, r"dimension 1, .*\[4\]"),
        (lambda q: DiagonalGaussian(q.mean, q.mean[:1]), ValueError, r"\[2, 2, 3\].*\[1, 2, 3\]"),
        (lambda q: q.sample(7), TypeError, "generator must be .*list of them, but got 7"),
        (lambda q: q.sample([seeded_generator(1), None]), TypeError, "generator must be"),
        (lambda q: q.sample([seeded_generator(1)] * 3), ValueError, "each of the 2 samples.*got 3"),
    ],
)
def test_errors(make, error, match):
    with pytest.raises(error, match=f"^fastvae.DiagonalGaussian: .*{match}"):
        make(DiagonalGaussian(packed((2, 4, 3))))


# diffusers' own


@pytest.fixture(scope="module")
def autoencoder():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    ).to(torch.get_default_device())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_in_the_autoencoder_of_diffusers(autoencoder, dtype, monkeypatch):
    """The same loss and the same gradients of all weights with the same noise."""
    module = __import__("diffusers.models.autoencoders.autoencoder_kl", fromlist=["x"])
    autoencoder = autoencoder.to(dtype)
    x = packed((2, 3, 16, 16), dtype)
    noise = packed((2, 4, 8, 8), dtype, 3)
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor", lambda *args, **kwargs: noise
    )

    def step() -> tuple[Tensor, list[Tensor]]:
        q = autoencoder.encode(x).latent_dist
        assert isinstance(q, DiagonalGaussian) == ours
        z = fastvae.reparameterize(q.mean, q.logvar, eps=noise) if ours else q.sample()
        recon_x = autoencoder.decode(z).sample
        loss = (recon_x - x).square().mean() + 0.1 * q.kl().mean() + 0.01 * q.nll(z).mean()
        return loss, list(torch.autograd.grad(loss, list(autoencoder.parameters())))

    ours = False
    want, want_gradients = step()
    monkeypatch.setattr(module, "DiagonalGaussianDistribution", DiagonalGaussian)
    ours = True
    got, gradients = step()
    torch.testing.assert_close(got, want)
    largest = max(float(g.abs().max()) for g in want_gradients)
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    for g, w in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=limit * largest)
    # and as it is called there: with its own noise, and in eval mode
    autoencoder(x, sample_posterior=True, generator=seeded_generator(1)).sample.sum().backward()
    autoencoder(x).sample.sum().backward()


# Other parameterizations

HEADS = {
    "logvar": ({}, lambda r: mpmath.exp(r / 2)),
    "scvi": ({"eps": 1e-4}, lambda r: mpmath.sqrt(mpmath.exp(r) + mpmath.mpf(1e-4))),
    "log_sigma": ({"scale": "log_sigma"}, mpmath.exp),
    "softplus": ({"scale": "softplus"}, lambda r: mpmath.log1p(mpmath.exp(r))),
    "oobleck": (
        {"scale": "softplus", "eps": 1e-4},
        lambda r: mpmath.log1p(mpmath.exp(r)) + mpmath.mpf(1e-4),
    ),
    "nvae": (
        {"scale": "log_sigma", "eps": 1e-2, "soft_clamp": 5.0},
        lambda r: mpmath.exp(5 * mpmath.tanh(r / 5)) + mpmath.mpf(1e-2),
    ),
}
RAW = [-80.0, -31.0, -29.0, -7.3, -1.5, -0.46, -0.4, -0.01, -1e-4, 0.0, 2e-4, 0.54, 0.5413, 0.55]
RAW += [0.541_324_85, 1.2, 1.541_3, 1.542, 6.0, 19.0, 23.0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heads(head, dtype):
    """sigma, the KL and its gradient beside 40 digits, from far below the prior to near it and above."""
    options, sigma_of = HEADS[head]
    clamped = "soft_clamp" in options
    raw = tensor(RAW, dtype).reshape(-1, 1)
    mean = tensor(np.linspace(-2, 2, len(raw)), dtype).reshape(-1, 1)
    mean[8:13] = 0
    parameters = torch.cat([mean, raw], 1).requires_grad_()
    q = GaussianHead(**options)(parameters)
    (gradient,) = torch.autograd.grad(q.kl().sum(), parameters)
    step = 16 * torch.finfo(dtype).eps
    with mpmath.workdps(40):

        def kl(m, r):
            m = 5 * mpmath.tanh(m / 5) if clamped else m
            sigma = sigma_of(r)
            return (m * m + (sigma - 1) * (sigma + 1)) / 2 - mpmath.log(sigma)

        for i in range(len(raw)):
            m, r = (mpmath.mpf(t[i, 0].item()) for t in (mean, raw))
            sigma, want = sigma_of(r), kl(m, r)
            # what one more step of rounding in r, or in sigma, does to the result
            own = abs(mpmath.diff(lambda s, m=m: kl(m, s), r)) * (abs(r) + options.get("eps", 0))
            assert q.kl()[i].item() == pytest.approx(float(want), rel=step, abs=float(step * own))
            assert q.std[i, 0].item() == pytest.approx(float(sigma), rel=40 * step)
            slopes = (mpmath.diff(kl, (m, r), n) for n in ((1, 0), (0, 1)))
            for g, w in zip(gradient[i].tolist(), slopes, strict=True):
                assert g == pytest.approx(float(w), rel=100 * step, abs=float(step))


def test_a_head_near_the_prior():
    """Where the sigma of softplus differs from 1 by 1e-4: its KL to 1e-6."""
    raw = torch.tensor([[0.541_324_854 + 1.58e-4]])
    kl = GaussianHead("softplus")(torch.cat([torch.zeros(1, 1), raw], 1)).kl()
    with mpmath.workdps(40):
        s = mpmath.log1p(mpmath.exp(mpmath.mpf(float(raw))))
        want = (s * s - 1) / 2 - mpmath.log(s)
    assert float(kl) == pytest.approx(float(want), rel=1e-6)


def test_a_head_in_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), GaussianHead("softplus", eps=1e-4))
    q = model(packed((5, 3)))
    assert q.mean.shape == (5, 4)
    assert "GaussianHead('softplus', eps=0.0001" in repr(model)
    bf16 = GaussianHead("softplus")(packed((5, 8), torch.bfloat16))
    assert bf16.mean.dtype == bf16.logvar.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale": "sigma"}, "scale must be \"logvar\", .* but got 'sigma'"),
        ({"eps": -1e-3}, "eps must be at least 0 and finite, but got -0.001"),
        ({"soft_clamp": 0.0}, "soft_clamp must be above 0 and finite, or None, but got 0.0"),
    ],
    ids=str,
)
def test_errors_of_heads(options, match):
    with pytest.raises(ValueError, match=f"^fastvae.nn.GaussianHead: {match}"):
        GaussianHead(**options)


def test_nll_does_not_broadcast():
    posterior = DiagonalGaussian(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4))
    with pytest.raises(ValueError, match="sample must have the mean's shape"):
        posterior.nll(torch.zeros(5, 2, 4, 4, 4))


def test_dimensions():
    mean, logvar = noise((2, 3, 4))
    q, x = DiagonalGaussian(mean, logvar), noise((3, 4))
    assert torch.equal(q.nll(x, 1), q.nll(x, [1]))
    fixed = DiagonalGaussian(mean[0], logvar[0], deterministic=True)
    assert fixed.kl().shape == DiagonalGaussian(mean[0], logvar[0]).kl().shape == (4,)
