"""The noise: Philox's known answers, the transform, the distribution, and what a draw depends on."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from accuracy import draw_seed, drawn, to_numpy
from cases import DTYPES, HALVES, LAYOUTS, latents, noise, random_state, seeded_generator
from scipy import stats

from fastvae import reparameterize, sample_and_kl
from fastvae.random import philox_normal
from fastvae.verify import oracle


# counter, key, result: Random123's kat_vectors for philox4x32-10
@pytest.mark.parametrize(("counter", "key", "words"), oracle.KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert [int(w) for w in oracle.philox4x32(counter, tuple(key))] == words
    assert torch.ops.fastvae.philox_words(counter, key).tolist() == words


def assert_is_noise(got: torch.Tensor, want: oracle.Array) -> None:
    tolerance = {torch.float64: 2e-15, torch.float32: 5e-7}.get(
        got.dtype, torch.finfo(got.dtype).eps
    )
    error = np.abs(to_numpy(got).ravel() - want) / np.maximum(1, np.abs(want))
    worst = int(error.argmax())
    assert error[worst] <= tolerance, (
        f"element {worst}: got {got.ravel()[worst]!r}, want {want[worst]!r}"
    )


# seed, offset, start; the bits of the first elements, and a digest of 100,003 of them
KNOWN_NORMALS = [
    (torch.float32, 0, 0, 0, "3F7DBB33 BF6CB6B0 BF1E1B9E BEF6D1B1", "cf086d356d899b48"),
    (torch.float32, 42, 7, 1, "BF51494E BF289034 3F9101BF BEA841A0", "2a28bafd9408ad84"),
    (
        torch.float32,
        -1,
        2**40 + 3,
        2**34 - 6,
        "3E77F5F0 BD7CB049 3EFD939C 400F6627",
        "dea2ead4c50aa6a3",
    ),
    (torch.float32, 0, 0, 4 * 900933047, "3F3F4650 C0CB6115 BEE552E9 BD87A803", "9d9a64dbfffa94bd"),
    (
        torch.float64,
        0,
        0,
        0,
        "BFD973628C131C05 BFD3DD84FF91E70B 3FF63083C830BEA5 3FD511D43E0F2703",
        "cc6d3c02285a1167",
    ),
    (
        torch.float64,
        42,
        7,
        1,
        "3FD9F4B6F89E4931 3FE493E12D59BBAB 3FF3E65CF6167AD3 3FC4AE53C0F8F8E1",
        "7a33429a779df384",
    ),
    (
        torch.float64,
        -1,
        2**40 + 3,
        2**34 - 6,
        "3FFE8E8E22094DCD 3FB7F6DA1EE84A82 BFE52A9475F7D8CA BFE01218A241AE5E",
        "8fc9d71c7c628eaa",
    ),
]


@pytest.mark.parametrize(("dtype", "seed", "offset", "start", "bits", "digest"), KNOWN_NORMALS)
def test_known_bits(dtype, seed, offset, start, bits, digest, device):
    """Of every CPU and every GPU. A change of these is another noise: users' runs give other numbers."""
    normals = philox_normal(
        100_003, seed=seed, offset=offset, start=start, dtype=dtype, device=device
    )
    words = normals[:4].cpu().numpy().view(f"u{dtype.itemsize}")
    assert [f"{w:0{2 * dtype.itemsize}X}" for w in words] == bits.split()
    assert hashlib.sha256(normals.cpu().numpy().tobytes()).hexdigest().startswith(digest)


SEEDS = [0, 1, 42, 2**32, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_against_the_oracle(seed, dtype, device):
    want = oracle.normal(5001, seed, double=dtype == torch.float64)
    assert_is_noise(philox_normal(5001, seed=seed, dtype=dtype, device=device), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [1, 7, 2**32, 2**40 + 3])
def test_offset(offset, dtype, device):
    want = oracle.normal(999, 42, offset, double=dtype == torch.float64)
    got = philox_normal(999, seed=42, offset=offset, dtype=dtype, device=device)
    assert_is_noise(got, want)
    assert not torch.equal(got, philox_normal(999, seed=42, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [1, 2, 3, 4, 5, 1023, 2**31 + 1, 2**34 - 6, 2**40 + 3])
def test_start(start, dtype, device):
    """2^34 elements use up the low word of the counter: the carry must reach the next."""
    want = oracle.normal(999, 42, 0, start, double=dtype == torch.float64)
    assert_is_noise(philox_normal(999, seed=42, start=start, dtype=dtype, device=device), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_make_up_the_whole(dtype, device):
    whole = philox_normal(10_007, seed=9, offset=2, dtype=dtype, device=device)
    cuts = [0, 1, 2, 5, 511, 512, 4100, 4103, 10_007]
    parts = [
        philox_normal(b - a, seed=9, offset=2, start=a, dtype=dtype, device=device)
        for a, b in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bits_are_the_float32_noise_rounded(dtype, device):
    expected = philox_normal(3001, seed=9, device=device).to(dtype)
    assert torch.equal(philox_normal(3001, seed=9, dtype=dtype, device=device), expected)


def test_shape_of_the_result():
    flat = philox_normal(60, seed=3)
    for size in ((3, 4, 5), ((3, 4, 5),), ([3, 4, 5],), (torch.Size([3, 4, 5]),)):
        got = philox_normal(*size, seed=3)
        assert got.shape == (3, 4, 5) and got.is_contiguous() and got.dtype == torch.float32
        assert torch.equal(got.ravel(), flat)
    assert philox_normal(0, 4, seed=3).shape == (0, 4)


def test_the_tail_reaches_beyond_six_sigma(device):
    """Call 900933047 of seed 0 has a radius of 5.5 * 2^-32, the middle of a word's sixth smallest value."""
    got = philox_normal(4, seed=0, start=4 * 900933047, device=device)
    assert got.abs().max() > 6.3
    assert_is_noise(got, oracle.normal(4, 0, 0, 4 * 900933047))


@pytest.mark.parametrize("block", [281247292, 410702502, 2024541361])
def test_the_smallest_radii_keep_their_digits(block, device):
    """These have a uniform within 2^-31 of 1: as a float32 it is 1, and the radius would be 0."""
    got = philox_normal(4, seed=0, start=4 * block, device=device)
    want = oracle.normal(4, 0, 0, 4 * block)
    np.testing.assert_allclose(to_numpy(got), want, rtol=1e-5)
    assert np.abs(want).min() < 3e-5


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def million(request):
    return philox_normal(1 << 20, seed=2024, dtype=request.param).double().cpu().numpy()


def test_moments(million):
    """Each within five standard errors of that of N(0, 1)."""
    n = million.size
    for power, (mean, variance) in {
        1: (0, 1),
        2: (1, 2),
        3: (0, 15),
        4: (3, 96),
        6: (15, 10170),
    }.items():
        assert abs((million**power).mean() - mean) < 5 * np.sqrt(variance / n), f"moment {power}"


def test_kolmogorov_smirnov(million):
    assert stats.kstest(million, "norm").pvalue > 1e-3
    for lane in range(4):
        assert stats.kstest(million[lane::4], "norm").pvalue > 1e-3, f"lane {lane}"


def test_tails_have_their_share(million):
    for sigma in (2, 3, 4):
        expected = million.size * 2 * stats.norm.sf(sigma)
        assert abs((np.abs(million) > sigma).sum() - expected) < 5 * np.sqrt(expected), (
            f"{sigma} sigma"
        )


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 512, 4096])
@pytest.mark.parametrize("power", [1, 2])
def test_neighbours_are_independent(million, lag, power):
    """Also their squares: the two of a Box-Muller pair share a radius, and only the angle parts them."""
    a, b = million[:-lag] ** power, million[lag:] ** power
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize(
    "other", [{"seed": 2025}, {"seed": 2024, "offset": 1}, {"seed": 2024 + 2**32}], ids=str
)
def test_draws_are_independent_of_each_other(other):
    n = 1 << 18
    a, b = (philox_normal(n, **key).cpu().numpy() for key in ({"seed": 2024}, other))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


# What the ops draw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 4099)], ids=str)
def test_the_ops_draw_this_noise(shape, dtype):
    zeros = torch.zeros(shape, dtype=dtype)
    expected = drawn(shape, 21, dtype)
    for op in (reparameterize, lambda *a, **k: sample_and_kl(*a, **k)[0]):
        assert torch.equal(op(zeros, zeros, generator=seeded_generator(21)), expected)
        torch.manual_seed(21)  # the default generator likewise
        assert torch.equal(op(zeros, zeros), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_is_by_logical_index_whatever_the_layout(layout):
    zeros = LAYOUTS[layout](torch.zeros(4, 6, 5, 7))
    expected = drawn((4, 6, 5, 7), 21)
    for other in (zeros, torch.zeros(4, 6, 5, 7)):
        assert torch.equal(reparameterize(zeros, other, generator=seeded_generator(21)), expected)
        assert torch.equal(reparameterize(other, zeros, generator=seeded_generator(21)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [reparameterize, sample_and_kl])
def test_backward_remakes_the_noise_of_the_forward(op, dtype):
    """With sigma = 1 the gradient of logvar is 0.5 * g * eps, and beside mu = 1000 the sample itself has lost eps."""
    mu = torch.full((5, 4099), 1000, dtype=dtype)
    logvar = torch.zeros(5, 4099, dtype=dtype, requires_grad=True)
    result = op(mu, logvar, generator=seeded_generator(21))
    z = result if isinstance(result, torch.Tensor) else result[0]
    (grad,) = torch.autograd.grad(z, logvar, torch.full_like(z, 2))
    assert torch.equal(grad, drawn((5, 4099), 21, dtype))


def test_a_draw_takes_one_number_from_the_generator():
    mu, logvar = latents((5, 300)).values()
    for op in (reparameterize, sample_and_kl):
        g, expected = seeded_generator(1), seeded_generator(1)
        op(mu, logvar, generator=g)
        if g.device.type == "cuda":
            expected.set_offset(4)  # the least by which torch's own draws move it
        else:
            draw_seed(expected)
        assert torch.equal(g.get_state(), expected.get_state())


def test_a_given_eps_leaves_nothing_to_draw():
    mu, logvar = latents((5, 300)).values()
    before = random_state()
    for op in (reparameterize, sample_and_kl):
        op(mu, logvar, eps=noise((5, 300)))
    assert torch.equal(random_state(), before)


def test_draws_follow_the_generator():
    mu, logvar = latents((5, 300)).values()
    torch.manual_seed(1)
    first, second = reparameterize(mu, logvar), reparameterize(mu, logvar)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(reparameterize(mu, logvar), first)
    assert torch.equal(reparameterize(mu, logvar), second)


def test_a_generator_of_its_own_leaves_the_default_one_alone():
    mu, logvar = latents((5, 300)).values()
    before = random_state()
    reparameterize(mu, logvar, generator=seeded_generator(0))
    assert torch.equal(random_state(), before)


def test_philox_normal_draws_from_no_generator():
    before = random_state()
    philox_normal(10, seed=1)
    assert torch.equal(random_state(), before)
