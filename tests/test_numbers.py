"""Where careless arithmetic goes wrong: near the prior, at the ends of exp, in long sums, with NaN and infinity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accuracy import (
    OUTPUTS,
    UNITS_OF_A_SUM,
    assert_accurate,
    check,
    evaluate,
    result_dtype,
    to_numpy,
)
from cases import (
    DTYPES,
    HALVES,
    SCALAR_REDUCTIONS,
    images,
    inputs,
    latents,
    noise,
    tensor,
    vae_inputs,
)

import fastvae
import fastvae.reference
from fastvae import kl_normal, reconstruction_loss, reparameterize, sample_and_kl, vae_loss
from fastvae.verify import oracle

# Near the prior

NEAR = np.concatenate([s * np.logspace(-8, 0, 400) for s in (1, -1)])[:, None]
RELATIVE = {torch.float64: 1e-14}


def assert_relative(got: torch.Tensor, want: oracle.Array, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(to_numpy(got), want, rtol=RELATIVE.get(got.dtype, rtol), atol=0)


def oracle_kl(t: dict[str, torch.Tensor], reduction: str = "none") -> oracle.Array:
    arrays = {k: to_numpy(v) for k, v in t.items()}
    return oracle.kl_normal(**arrays, reduction=reduction, upstream=[None])[0][0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_near_the_standard_normal(dtype):
    """logvar from 1 down to 1e-8, where expm1(l) - l has not a digit left in float32, and its relative error is 1e-6."""
    logvar = tensor(NEAR, dtype)
    t = {"mu": torch.zeros_like(logvar), "logvar": logvar}
    for with_mu in (t, t | {"mu": tensor(NEAR[::-1] * 1e-3, dtype)}):
        assert_relative(kl_normal(**with_mu, reduction="none"), oracle_kl(with_mu))
        for op in (kl_normal, lambda **k: sample_and_kl(**k)[1]):
            assert_relative(op(**with_mu, reduction="sample"), oracle_kl(with_mu, "sample"))
        got = vae_loss(*images((len(NEAR), 3)).values(), **with_mu, reduction="sample").kl
        assert_relative(got, oracle_kl(with_mu, "sample"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_a_batch_near_the_standard_normal(dtype):
    logvar = tensor(np.full((64, 128), -3e-5), dtype)
    t = {"mu": torch.zeros_like(logvar), "logvar": logvar}
    for reduction in SCALAR_REDUCTIONS:
        assert_relative(kl_normal(**t, reduction=reduction), oracle_kl(t, reduction))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_near_another_gaussian(dtype):
    """The difference of the logvars is exact here, so nothing but its residual is rounded."""
    step = np.exp2(np.round(np.log2(np.abs(NEAR)))) * np.sign(NEAR)
    step = step[np.abs(step) >= 2.0**-20]
    t = {
        "logvar_p": tensor(np.full((step.size, 1), -1.5), dtype),
        "logvar": tensor(-1.5 + step[:, None], dtype),
    }
    t |= {"mu": torch.full_like(t["logvar"], 0.75), "mu_p": torch.full_like(t["logvar"], 0.75)}
    assert_relative(kl_normal(**t, reduction="none"), oracle_kl(t))
    assert_relative(sample_and_kl(**t, reduction="sample")[1], oracle_kl(t, "sample"))


def test_kl_of_subnormal_logvar():
    """Down to the smallest float32: the KL underflows to 0, it is not -0.0, negative or NaN."""
    logvar = tensor(
        [[s * m] for m in (1e-15, 1e-19, 1e-20, 1e-30, 1e-38, 1e-40, 1.4e-45) for s in (1, -1)],
        torch.float32,
    )
    kl = kl_normal(torch.zeros_like(logvar), logvar, reduction="none")
    assert not torch.signbit(kl).any()
    np.testing.assert_allclose(to_numpy(kl), (to_numpy(logvar) / 2) ** 2, rtol=1e-6, atol=2e-45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_is_accurate_across_the_seams_of_its_evaluation(dtype):
    """Wherever a series gives way to exp, both have to be right on either side."""
    logvar = tensor(np.linspace(-4, 4, 20_001)[:, None], dtype)
    t = {"mu": torch.zeros_like(logvar), "logvar": logvar}
    assert_relative(kl_normal(**t, reduction="none"), oracle_kl(t), rtol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
def test_gradients_near_the_prior(dtype, prior):
    """d KL / d logvar = (exp(d) - 1) / 2: beside PyTorch's own error nothing, beside 0 half of d."""
    logvar = tensor(NEAR, dtype)
    t = {"mu": tensor(NEAR[::-1], dtype), "logvar": logvar}
    if prior:
        t |= {"mu_p": torch.zeros_like(logvar), "logvar_p": torch.zeros_like(logvar)}
    check("kl_normal", t, reduction="sum", upstream=[torch.tensor(0.7)])
    check("kl_normal", t, reduction="none")


# At the ends of exp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_small_logvar(dtype):
    """sigma and the KL over the whole range of the arithmetic, also where exp(logvar) overflows the 16-bit dtype."""
    end = 700 if dtype == torch.float64 else 88
    logvar = tensor(np.linspace(-end, end, 1001)[:, None], dtype)
    t = {"mu": noise((1001, 1), dtype), "logvar": logvar}
    check("kl_normal", t, reduction="none", upstream=[torch.full((1001, 1), 0.01)])
    eps = noise((1001, 1), dtype) / 8
    if dtype == torch.float16:  # z and its gradients have float16's range
        t = {k: v[logvar.abs() < 20].unsqueeze(1) for k, v in t.items()}
        eps = eps[: len(t["mu"])]
    check("reparameterize", t | {"eps": eps})


def test_float16_beyond_its_own_range():
    """Results are float32: a squared error of (1.2e5)^2 and a variance of exp(20) are finite there."""
    t = {
        "recon_x": torch.full((2, 3), 6e4, dtype=torch.float16),
        "x": torch.full((2, 3), -6e4, dtype=torch.float16),
    }
    assert reconstruction_loss(**t, reduction="mean").item() == pytest.approx(
        120_000.0**2, rel=1e-6
    )
    logvar = torch.full((2, 3), 20, dtype=torch.float16)
    kl = kl_normal(torch.zeros_like(logvar), logvar, reduction="mean")
    assert kl.item() == pytest.approx(0.5 * (math.exp(20) - 21), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_prior_far_from_the_standard_one(dtype):
    """exp(logvar - logvar_p) is moderate where exp(logvar) and exp(-logvar_p) are not."""
    far = 85 if dtype == torch.float32 else 700
    for shift in (-far, far):
        t = latents((3, 130), dtype, prior=True)
        t["logvar_p"] = t["logvar_p"] / 4 + shift
        t["logvar"] = t["logvar_p"] + t["logvar"]
        t["mu_p"] = t["mu"] + torch.exp(0.5 * t["logvar_p"])  # one sigma away, as rounding allows
        got = check("kl_normal", t, reduction="none", upstream=[torch.full((3, 130), 1e-3)])
        assert got.outputs[0].isfinite().all()


# Infinity and NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e4, -1e4])
@pytest.mark.parametrize(("name", "argument"), [(n, a) for n in OUTPUTS for a in inputs(n, (1, 1))])
def test_infinity_as_the_formula_gives_it(name, argument, value, dtype):
    """The plain expression of PyTorch is the formula; 1e4 overflows in exp, or is lost in it."""
    tensors = inputs(name, (3, 9), dtype)
    tensors[argument].flatten()[4] = value
    options = {} if name == "reparameterize" else {"reduction": "sample"}
    got = evaluate(getattr(fastvae, name), tensors, **options)
    want = evaluate(getattr(fastvae.reference, name), tensors, **options)
    results = zip(
        (*got.outputs, *got.grads.values()), (*want.outputs, *want.grads.values()), strict=True
    )
    for a, b in results:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


PLACES = [(0, 0), (1, 517), (2, 1029)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sample", "none"])
@pytest.mark.parametrize(
    ("name", "argument", "prior"),
    [(n, a, False) for n in OUTPUTS for a in inputs(n, (1, 1))]
    + [
        (n, a, True)
        for n in ("kl_normal", "sample_and_kl")
        for a in ("mu", "logvar", "mu_p", "logvar_p")
    ],
)
def test_nan_in_nan_out(name, argument, prior, reduction, dtype):
    """In every result that depends on the NaN, and in no other: users look for it, to learn where it comes from."""
    if reduction == "none" and name not in ("kl_normal", "reconstruction_loss"):
        pytest.skip("has no elementwise result")
    options = {} if name == "reparameterize" else {"reduction": reduction}
    for place in PLACES:
        tensors = inputs(name, (3, 1030), dtype, **({"prior": True} if prior else {}))
        row, column = place
        tensors[argument][row, column % tensors[argument].shape[1]] = math.nan
        got = evaluate(getattr(fastvae, name), tensors, **options)
        wide = {k: t.to(result_dtype(t)) for k, t in tensors.items()}
        want = evaluate(getattr(fastvae.reference, name), wide, **options)
        for a, b in zip(got.outputs, want.outputs, strict=True):
            assert torch.equal(a.isnan(), b.isnan()), "values"
        assert any(o.isnan().any() for o in got.outputs)
        for k, g in got.grads.items():
            assert torch.equal(g.isnan(), want.grads[k].isnan()), f"gradient of {k}"


@pytest.mark.parametrize("upstream", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
@pytest.mark.parametrize("name", ["kl_normal", "reconstruction_loss", "vae_loss"])
def test_upstream_gradient_that_is_not_finite(name, reduction, upstream):
    """Gradient scalers detect an overflow by what comes out of backward."""
    tensors = inputs(name, (3, 700))
    outputs = getattr(fastvae, name)(
        **{k: t.requires_grad_() for k, t in tensors.items()}, reduction=reduction
    )
    first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    for g in torch.autograd.grad(first, list(tensors.values()), torch.full_like(first, upstream)):
        assert not g.isfinite().any()


def test_overflow_of_float16_gradients_is_infinite():
    """A loss scale that is too large has to show as infinity, which GradScaler looks for, and not be clamped."""
    tensors = {
        "recon_x": torch.full((2, 3), 4.0, dtype=torch.float16),
        "x": torch.zeros(2, 3, dtype=torch.float16),
    }
    grads = evaluate(reconstruction_loss, tensors, [torch.tensor(65536.0)], reduction="sum").grads
    assert (grads["recon_x"] == math.inf).all() and (grads["x"] == -math.inf).all()


# Long sums


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean", "sample"])
def test_the_error_of_a_sum_does_not_grow_with_its_length(reduction):
    """4 million equal terms: a float32 accumulator is off by 1e-4 here, and one in each of 16 lanes by 1e-6."""
    n = 1 << 21
    recon_x = torch.full((2, n), 0.1)
    exact = (
        float(recon_x[0, 0].double() ** 2)
        * {"sum": 2 * n, "batchmean": n, "mean": 1, "sample": n}[reduction]
    )
    got = reconstruction_loss(recon_x, torch.zeros(1).expand(2, n), reduction=reduction)
    assert_accurate(got, oracle.real(np.full(got.shape, exact)), units=4)


def test_counts_beyond_the_integers_of_float32():
    """2^24 + 2 ones: a float32 accumulator stops at 2^24."""
    ones = torch.ones(1, dtype=torch.bfloat16).expand(2, (1 << 23) + 1)
    zeros = torch.zeros(1, dtype=torch.bfloat16).expand_as(ones)
    assert reconstruction_loss(ones, zeros, reduction="sum").item() == (1 << 24) + 2
    assert reconstruction_loss(ones, zeros, reduction="mean").item() == 1


@pytest.mark.parametrize("name", ["kl_normal", "vae_loss"])
def test_sum_of_terms_of_all_magnitudes(name):
    rng = np.random.default_rng(0)
    logvar = tensor(rng.uniform(-20, 20, (64, 3000)), torch.float32)
    tensors = {
        "mu": tensor(
            rng.normal(size=(64, 3000)) * 10.0 ** rng.integers(-6, 4, (64, 3000)), torch.float32
        )
    }
    tensors |= {"logvar": logvar}
    if name == "vae_loss":
        tensors = images((64, 500)) | tensors
    for reduction in ("sum", "sample"):
        arrays = {k: to_numpy(t) for k, t in tensors.items()}
        upstream = [None] * len(OUTPUTS[name])
        want = getattr(oracle, name)(**arrays, reduction=reduction, upstream=upstream)[0]
        got = getattr(fastvae, name)(**tensors, reduction=reduction)
        for g, w in zip([got] if isinstance(got, torch.Tensor) else got, want, strict=True):
            assert_accurate(g, w, units=UNITS_OF_A_SUM)


# Conversions


def every_float(n: int = 200_000) -> torch.Tensor:
    """float32 of random bits: all exponents, subnormal numbers, infinities and NaNs; and the edges of the 16-bit dtypes."""
    bits = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    edges = np.array(
        [65504, 65519.996, 65520, 65536, 2**-24, 2**-25, 1.5 * 2**-25, 2**-14, 0], np.float32
    )
    special = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF, 0x7F7F8000], np.uint32)
    floats = np.concatenate([bits.view(np.float32), edges, -edges, special.view(np.float32)])
    return torch.from_numpy(floats).to(torch.get_default_device())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_sixteen_bits(dtype):
    """As torch rounds, to the nearest and ties to even: with mu = 0 and sigma = 1 a sample is its noise."""
    eps = every_float()
    zeros = torch.zeros(eps.shape, dtype=dtype)
    torch.testing.assert_close(
        reparameterize(zeros, zeros, eps=eps), eps.to(dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_sixteen_bit_numbers_are_read(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    zeros = torch.zeros(numbers.shape)
    eps = noise((1,)).expand(numbers.shape)
    z = reparameterize(zeros, zeros, eps=numbers)
    torch.testing.assert_close(z, numbers.float(), rtol=0, atol=0, equal_nan=True)
    finite = numbers[numbers.isfinite()]
    z = reparameterize(finite, torch.full_like(finite, -torch.inf), eps=eps[: len(finite)])
    assert torch.equal(z, finite)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_elements_than_an_int_counts(dtype):
    """2^31 + 2^16 elements that take 128 KiB: a row expanded over the batch is read where it lies."""
    width, rows = 1 << 16, (1 << 15) + 1
    recon_x = tensor(np.linspace(0, 1, width), dtype).expand(rows, width)
    x = torch.zeros(1, dtype=dtype).expand(rows, width)
    per_row = float((to_numpy(recon_x[0]) ** 2).sum())
    got = reconstruction_loss(recon_x, x, reduction="sum")
    assert_accurate(got, oracle.real(per_row * rows), units=UNITS_OF_A_SUM)
    got = reconstruction_loss(recon_x, x, reduction="sample")
    assert_accurate(got, oracle.real(np.full(rows, per_row)), units=UNITS_OF_A_SUM)
    got = kl_normal(recon_x, x, reduction="batchmean")
    assert_accurate(got, oracle.real(per_row / 2), units=UNITS_OF_A_SUM)


# Small change


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bit_gradients_are_rounded_once(dtype):
    """Arithmetic in float32 and one rounding at the end: half a unit, and not the several of 16-bit arithmetic."""
    for reduction in ("sum", "sample"):
        tensors = vae_inputs((5, 700), dtype)
        g = torch.ones(5) if reduction == "sample" else torch.tensor(1.0)
        got = evaluate(vae_loss, tensors, [g, None, None], beta=0.3, reduction=reduction)
        arrays = {k: to_numpy(t) for k, t in tensors.items()}
        upstream = [to_numpy(g), None, None]
        want = oracle.vae_loss(**arrays, beta=0.3, reduction=reduction, upstream=upstream)[1]
        for k, grad in got.grads.items():
            assert_accurate(grad, want[k], units=0.51, what=f"gradient of {k}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bit_samples_are_rounded_once(dtype):
    tensors = latents((5, 700), dtype) | {"eps": noise((5, 700), dtype)}
    z = reparameterize(**tensors)
    want = oracle.reparameterize(**{k: to_numpy(t) for k, t in tensors.items()}, upstream=[None])[
        0
    ][0]
    scale = np.abs(to_numpy(tensors["mu"])) + np.abs(want)
    assert (
        np.abs(to_numpy(z) - want) <= 0.5 * torch.finfo(dtype).eps * np.abs(want) + 1e-6 * scale
    ).all()
