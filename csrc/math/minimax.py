"""Prints the polynomial coefficients of elementary.h and gamma.h: `python csrc/math/minimax.py` (needs mpmath, which torch brings).

Each function is written as known leading terms, whose coefficients are exact in binary, and a polynomial times a power of x. The
polynomial is the Remez exchange's minimax fit of the whole function's relative error, in 60 digits.
"""

from collections.abc import Callable

import mpmath as mp

mp.mp.dps = 60


def remez(f: Callable, scale: Callable, lo: float, hi: float, degree: int) -> tuple[list, mp.mpf]:
    """Coefficients (constant first) minimising max |(p(x) - f(x)) / scale(x)| on [lo, hi], and that maximum."""
    lo, hi, n = mp.mpf(lo), mp.mpf(hi), degree + 2
    nodes = [(lo + hi) / 2 - (hi - lo) / 2 * mp.cos(mp.pi * k / (n - 1)) for k in range(n)]
    grid = [lo + (hi - lo) * k / mp.mpf(2000) for k in range(2001)]
    values, scales = [f(x) for x in grid], [scale(x) for x in grid]
    for _ in range(30):
        a = mp.matrix(n, n)
        for i, x in enumerate(nodes):
            for j in range(degree + 1):
                a[i, j] = x**j / scale(x)
            a[i, degree + 1] = (-1) ** i
        solution = mp.lu_solve(a, mp.matrix([f(x) / scale(x) for x in nodes]))
        coefficients = [solution[j] for j in range(degree + 1)]
        error = [
            (mp.polyval(coefficients[::-1], x) - v) / s
            for x, v, s in zip(grid, values, scales, strict=True)
        ]
        # One extremum between each two sign changes.
        pieces, start = [], 0
        for k in range(1, len(grid) + 1):
            if k == len(grid) or mp.sign(error[k]) != mp.sign(error[start]):
                pieces.append(max(range(start, k), key=lambda m: abs(error[m])))
                start = k
        if len(pieces) != n:
            break
        new = [grid[k] for k in pieces]
        if max(abs(u - v) for u, v in zip(new, nodes, strict=True)) < (hi - lo) / 1000:
            break
        nodes = new
    return coefficients, max(abs(e) for e in error)


def series(f: Callable, terms: Callable[[int], mp.mpf]) -> Callable:
    """f, but its Taylor series (terms(k) * x^k) near zero, where f cancels."""
    return lambda x: mp.nsum(lambda k: terms(int(k)) * x**k, [0, 60]) if abs(x) < 1e-3 else f(x)


def over_power(f: Callable, power: int) -> Callable:
    """f(x) / x^power; at zero a number that is large enough for an error there not to count."""
    return lambda x: f(x) / x**power if x else mp.mpf(10) ** 12


def stirling(exact: Callable, term: Callable[[int], mp.mpf], power: int) -> Callable:
    """exact(1 / t) / t^power, but its asymptotic series, the sum of term(k) t^(2k - 2), near zero, where `exact` cancels."""
    return lambda t: (
        mp.fsum(term(k) * t ** (2 * k - 2) for k in range(1, 12))
        if t < 1e-3
        else exact(1 / t) / t**power
    )


def of_root(f: Callable) -> Callable:
    return lambda y: f(mp.sqrt(y))


# The error of Stirling's formula for log z!, and minus its derivative.
DELTA = stirling(
    lambda z: mp.loggamma(z + 1) - (z + 0.5) * mp.log(z) + z - mp.log(2 * mp.pi) / 2,
    lambda k: mp.bernoulli(2 * k) / (2 * k * (2 * k - 1)),
    1,
)
CHI = stirling(
    lambda z: mp.log(z) - 1 / (2 * z) - mp.digamma(z), lambda k: mp.bernoulli(2 * k) / (2 * k), 2
)

LN2_2 = mp.log(2) / 2
QUARTER_PI_SQUARED = (mp.pi / 4) ** 2

# The polynomial p, what its error is relative to, the interval, and the degrees.
FITS = {
    # exp(r) = 1 + r + r^2 p(r), |r| <= ln2 / 2
    "exp": (
        series(lambda r: (mp.exp(r) - 1 - r) / r**2, lambda k: 1 / mp.factorial(k + 2)),
        over_power(mp.exp, 2),
        -LN2_2,
        LN2_2,
        {"float": 4, "double": 9},
    ),
    # exp(l) - 1 - l = l^2 p(l), -1 <= l <= 2
    "expm1_minus": (
        series(lambda r: (mp.exp(r) - 1 - r) / r**2, lambda k: 1 / mp.factorial(k + 2)),
        None,
        -1,
        2,
        {"float": 8, "double": 15},
    ),
    # log(1 + f) = f - f^2 / 2 + f^3 p(f), sqrt(1/2) <= 1 + f <= sqrt(2)
    "log": (
        series(lambda f: (mp.log1p(f) - f + f**2 / 2) / f**3, lambda k: mp.mpf(-1) ** k / (k + 3)),
        over_power(mp.log1p, 3),
        mp.sqrt(0.5) - 1,
        mp.sqrt(2) - 1,
        {"float": 7, "double": 18},
    ),
    # sin(x) = x + x y p(y), y = x^2, |x| <= pi / 4
    "sin": (
        series(
            lambda y: (mp.sin(mp.sqrt(y)) / mp.sqrt(y) - 1) / y,
            lambda k: (-1) ** (k + 1) / mp.factorial(2 * k + 3),
        ),
        over_power(lambda y: mp.sinc(mp.sqrt(y)), 1),
        0,
        QUARTER_PI_SQUARED,
        {"float": 2, "double": 5},
    ),
    # cos(x) = 1 - y / 2 + y^2 p(y)
    "cos": (
        series(
            lambda y: (mp.cos(mp.sqrt(y)) - 1 + y / 2) / y**2,
            lambda k: (-1) ** k / mp.factorial(2 * k + 4),
        ),
        over_power(lambda y: mp.cos(mp.sqrt(y)), 2),
        0,
        QUARTER_PI_SQUARED,
        {"float": 2, "double": 5},
    ),
    # gamma.h: delta(z) = t p(t), chi(z) = t^2 p(t), t = 1 / z <= 1
    "delta": (DELTA, None, 0, 1, {"float": 6}),
    "chi": (CHI, None, 0, 1, {"float": 8}),
    # delta(z) = t p(y), chi(z) = y p(y), y = t^2, t <= 1 / 8
    # delta(z) - delta(z + 1) = y p(y), the same of chi = s y p(y), s = 1 / (2 z + 1), y = s^2 <= 1 / 9
    "step of delta": (
        series(
            lambda y: (mp.atanh(mp.sqrt(y)) / mp.sqrt(y) - 1) / y, lambda k: mp.mpf(1) / (2 * k + 3)
        ),
        None,
        0,
        mp.mpf(1) / 9,
        {"double": 11},
    ),
    "step of chi": (
        series(
            lambda y: 2 * (1 / (1 - y) - mp.atanh(mp.sqrt(y)) / mp.sqrt(y)) / y,
            lambda k: mp.mpf(4 * k + 4) / (2 * k + 3),
        ),
        None,
        0,
        mp.mpf(1) / 9,
        {"double": 12},
    ),
    "delta of y": (of_root(DELTA), None, 0, mp.mpf(1) / 64, {"double": 7}),
    "chi of y": (of_root(CHI), None, 0, mp.mpf(1) / 64, {"double": 7}),
}

if __name__ == "__main__":
    for name, (f, scale, lo, hi, degrees) in FITS.items():
        for dtype, degree in degrees.items():
            coefficients, error = remez(f, scale or f, lo, hi, degree)
            digits = 10 if dtype == "float" else 19
            print(f"{name} {dtype} degree {degree}, relative error {mp.nstr(error, 3)}")
            print("  " + ", ".join(mp.nstr(c, digits) for c in coefficients))
