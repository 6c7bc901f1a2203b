"""csrc/math's functions by themselves: multiply_add rounds once, the elementary functions err by little more."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from cases import elementary, random_bits, sums_to_round

from fastvae.verify import oracle

REAL = [np.float32, np.float64]

FUNCTIONS = {
    "exponential": np.exp,
    "exponential_of_log_weight": np.exp,
    "expm1": np.expm1,
    "expm1_minus": oracle.exp_residual,
    "expm1_of_negative": np.expm1,
    "logarithm": np.log,
    "log1p": np.log1p,
    "sine": np.sin,
    "cosine": np.cos,
}


def arguments(dtype: type) -> np.ndarray:
    """Of all magnitudes, and more of them where functions have zeros, seams and ends."""
    rng, n = np.random.default_rng(3), 100_000
    away = rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-17, 0.5, n)
    near = [point + away for point in (-1, 0, 1)]
    parts = [random_bits(dtype, n), *near, rng.uniform(-750, 720, n), [0, np.inf, -np.inf, np.nan]]
    with np.errstate(under="ignore"):
        return np.concatenate([np.asarray(p).astype(dtype) for p in parts])


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="NumPy's longdouble is no wider")
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_two_units_of_rounding(name, dtype):
    x, info = arguments(dtype), np.finfo(dtype)
    if name in ("sine", "cosine"):
        x = x[np.abs(x) <= np.pi / 4]
    if name == "exponential_of_log_weight":  # where the result is a normal number
        x = x[(x <= 0) & (x > np.log(info.tiny))]
    if name == "expm1_of_negative":
        x = x[x <= 0]
    if name == "expm1_minus":
        x = x[np.isfinite(x) & (x < info.max / 2)]  # else infinity - infinity
    with np.errstate(all="ignore"):
        want = FUNCTIONS[name](oracle.real(x))
        clear = ~(np.abs(np.abs(want) / oracle.real(info.max) - 1) < 4 * info.eps)  # of an overflow
        x, want = x[clear], want[clear]
        rounded = want.astype(dtype)
    got = elementary(name, x)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite])
    x, got, want = x[finite], got[finite], want[finite]
    error = np.abs(got - want) / (info.eps * np.maximum(np.abs(want), oracle.real(info.tiny)))
    if name == "exponential_of_log_weight":  # which takes one number for log 2
        error = error / (1 + np.abs(x) / 12)
    worst = np.argmax(np.where(np.isnan(error), np.inf, error))
    assert error[worst] <= 2, f"{name}({x[worst]!r}) is off by {error[worst]} units"


@pytest.mark.parametrize("dtype", REAL)
def test_logarithms_at_their_ends(dtype):
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    ends = {
        "logarithm": [(0, -np.inf), (-0.0, -np.inf), (-tiny, np.nan), (-np.inf, np.nan), (1, 0)],
        "log1p": [(-1, -np.inf), (-1.5, np.nan), (-np.inf, np.nan), (tiny, tiny), (-tiny, -tiny)],
    }
    for name, pairs in ends.items():
        x, want = np.array([*pairs, (np.inf, np.inf), (np.nan, np.nan)], dtype).T.copy()
        np.testing.assert_array_equal(elementary(name, x), want, err_msg=name)
        largest = elementary(name, np.array([huge], dtype))
        np.testing.assert_allclose(largest, np.log(huge), rtol=np.finfo(dtype).eps)
    zeros = elementary("log1p", np.array([0.0, -0.0], dtype))
    np.testing.assert_array_equal(np.signbit(zeros), [False, True])
    assert not zeros.any()


@pytest.mark.parametrize("dtype", REAL)
def test_the_exponential_of_log_weight_numbers_ends_in_zero(dtype):
    """It has no subnormal results but near the smallest normal one, and NaN stays."""
    lowest = np.log(np.finfo(dtype).tiny)
    below = np.array([lowest - 1, -1e4, -np.finfo(dtype).max, -np.inf], dtype)
    np.testing.assert_array_equal(elementary("exponential_of_log_weight", below), 0)
    got = elementary("exponential_of_log_weight", np.array([0.0, -0.0, np.nan], dtype))
    np.testing.assert_array_equal(got, [1, 1, np.nan])


# multiply_add


def nearest(x: Fraction, dtype: type) -> float:
    """x rounded to dtype, ties to even, in integers."""
    info = np.finfo(dtype)
    if x == 0:
        return 0.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent  # 2^exponent <= |x|
    unit = Fraction(2) ** (max(exponent, info.minexp) - info.nmant)
    rounded = round(x / unit) * unit
    if abs(rounded) > int(info.max):
        return math.inf if x > 0 else -math.inf
    return float(rounded)


def exact_sums(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c rounded once, for finite numbers whose sum is not 0."""
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return np.array(
        [nearest(Fraction(x) * Fraction(y) + Fraction(z), a.dtype.type) for x, y, z in rows],
        a.dtype,
    )


@pytest.mark.parametrize("dtype", REAL)
def test_multiply_add_rounds_once(dtype):
    a, b, c = sums_to_round(dtype, 20_000)
    want = exact_sums(a, b, c)
    got = elementary("multiply_add", a, b, c)
    np.testing.assert_array_equal(got, want)
    with np.errstate(all="ignore"):
        assert (got != a * b + c).mean() > 0.2, "the cases do not tell one rounding from two"
    assert (np.abs(got) < np.finfo(dtype).tiny).sum() > 1000 and np.isinf(got).sum() > 10


def test_multiply_add_does_not_round_to_double_on_the_way():
    """The sum lies 2^-64 beside a tie of float32: as a double it is the tie."""
    half, step = 2.0**-24, 2.0**-20
    rows = [  # a b = 2^-24 (1 + 2^-20)(1 - 2^-20) = 2^-24 - 2^-64
        (half * (1 + step), 1 - step, 1.0),
        (half * (1 + step), 1 - step, 1.0 + 2 * half),
        (2.0**-75 * (1 + step), 2.0**-75 * (1 - step), 2.0**-149),
        (2.0**-75 * (1 + step), 2.0**-75 * (1 - step), 0.0),
        (half, 1.0, 1.0),
    ]
    columns = zip(*[(s * a, b, s * c) for a, b, c in rows for s in (1, -1)], strict=True)
    a, b, c = (np.array(column, np.float32) for column in columns)
    want = exact_sums(a, b, c)
    np.testing.assert_array_equal(elementary("multiply_add", a, b, c), want)
    via_double = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (via_double != want).any(), "no case tells"


@pytest.mark.parametrize("dtype", REAL)
def test_multiply_add_of_infinity_zero_and_nan(dtype):
    special = np.array([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, np.finfo(dtype).max], dtype)
    a, b, c = (x.ravel() for x in np.meshgrid(special, special, special))
    with np.errstate(all="ignore"):
        want = (oracle.real(a) * b + c).astype(dtype)
    got = elementary("multiply_add", a, b, c)
    np.testing.assert_array_equal(got, want)
    zero = got == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))
