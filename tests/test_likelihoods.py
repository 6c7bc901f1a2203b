"""fastvae.likelihoods in plain PyTorch: torch's functions, the oracle, extremes, samples, and what the objects are."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import math

import numpy as np
import pytest
import torch
from accuracy import evaluate, for_the_oracle, to_numpy, varied
from cases import old_dynamo
from likelihoods_table import (
    EVERY_ROW,
    ROWS,
    WITH_ACTIVATION,
    WITH_PARAMETERS,
    Row,
    full,
)
from scipy import integrate
from torch.utils import _pytree

import fastvae
from fastvae import likelihoods, reference
from fastvae.likelihoods import parse
from fastvae.verify import oracle
from fastvae.verify.likelihoods import genes, probabilities

F64 = torch.float64


def compare(
    row: Row,
    tensors: dict,
    but: tuple[str, ...] = (),
    rtol: float = 1e-12,
    atol: float = 1e-15,
    **options,
) -> None:
    """`nll` and its gradients by all inputs (`but` some) against the oracle."""
    likelihood = row.likelihood(**options)
    got = evaluate(reference.reconstruction_loss, tensors, likelihood=likelihood, reduction="none")
    (value,), grads = oracle.reconstruction_loss(
        **{k: to_numpy(t) for k, t in tensors.items()},
        upstream=[to_numpy(varied(tensors["x"].shape, F64))],
        reduction="none",
        likelihood=for_the_oracle(likelihood(**row.every_parameter(0.0))),
    )
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    with np.errstate(over="ignore", under="ignore"):
        close(to_numpy(got.outputs[0]).astype(float), value.astype(float))
        for name in got.grads.keys() - set(but):
            close(to_numpy(got.grads[name]).astype(float), grads[name].astype(float), err_msg=name)


@EVERY_ROW
def test_is_what_torch_computes(row):
    tensors = row.tensors((4, 3, 50), F64)
    arguments = {k.removeprefix("likelihood."): t for k, t in tensors.items()}
    recon_x, x = arguments.pop("recon_x"), arguments.pop("x")
    options = full(row)
    constant = 0.5 * math.log(2 * math.pi) if row is ROWS["gaussian"] else 0.0
    torch.testing.assert_close(
        row.make(**arguments, **options).nll(recon_x, x),
        row.same(recon_x, x, **arguments),
        rtol=1e-10,
        atol=1e-12,
    )
    if options:
        without = row.make(**arguments).nll(recon_x, x)
        assert not torch.allclose(without, row.same(recon_x, x, **arguments))
        assert row.make(**arguments).constant == 0
    assert constant in (0.0, row.make(**arguments, **options).constant)


@WITH_ACTIVATION
def test_activation_and_x_scale_against_the_oracle(row, activation):
    tensors = row.tensors((4, 3, 50), F64)
    compare(row, tensors, activation=activation, x_scale=0.37)


@EVERY_ROW
def test_gradients_and_second_derivatives(row):
    tensors = {
        k: t.requires_grad_(t.is_floating_point()) for k, t in row.tensors((2, 3), F64).items()
    }
    if row is ROWS["continuous_bernoulli"]:  # on both sides of its series' end
        tensors["recon_x"] = torch.tensor(
            [[-0.2, 1e-3, 0.0], [0.26, -0.24, 5.0]], dtype=F64, requires_grad=True
        )

    def nll(recon_x, x, *parameters):
        return row.make(**dict(zip(row.parameters, parameters, strict=True))).nll(recon_x, x)

    assert torch.autograd.gradcheck(nll, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(nll, tuple(tensors.values()))


@pytest.mark.parametrize("parameter", [-50.0, 0.3, 50.0])
@EVERY_ROW
def test_extremes(row, parameter):
    tensors = row.extremes(parameter, F64)
    if row.counts:  # lgamma's error grows with its argument
        compare(row, tensors, rtol=1e-7, atol=1e-9)
    elif row is ROWS["bernoulli_probabilities"]:
        # torch's 1e-12 is a float32. The derivative by x is of the clamped logarithms here, and infinite in torch.
        compare(row, tensors, ("x",), rtol=1e-8)
    else:
        compare(row, tensors)


@EVERY_ROW
def test_nan_in_nan_out(row):
    """Of every input, in the value and in the gradient of recon_x."""
    good = row.tensors((3,), F64)
    for name in good:
        if not good[name].is_floating_point():
            continue
        tensors = dict(good) | {name: good[name].clone().index_fill_(0, torch.tensor(1), math.nan)}
        got = evaluate(
            reference.reconstruction_loss, tensors, likelihood=row.likelihood(), reduction="none"
        )
        assert got.outputs[0].isnan().tolist() == [False, True, False], name
        # l1's gradient is a sign, and torch's of NaN is 0
        if row.kind not in (likelihoods.L1, likelihoods.Laplace):
            assert got.grads["recon_x"].isnan().tolist() == [False, True, False], name


@EVERY_ROW
def test_infinite_errors(row):
    if not row.activations[1:]:
        pytest.skip("not of a mean")
    parameters = row.every_parameter(0.3)
    delta = torch.tensor([math.inf, -math.inf], dtype=F64)
    nll = row.make(**parameters).nll(delta, torch.zeros(2, dtype=F64))
    assert nll.tolist() == [math.inf, math.inf]


def test_the_series_of_the_continuous_bernoulli_meets_the_formula():
    l = torch.linspace(0.2499, 0.2501, 101, dtype=F64).requires_grad_()  # noqa: E741
    for sign in (1, -1):
        value = likelihoods.ContinuousBernoulli().nll(sign * l, torch.zeros_like(l))
        (slope,) = torch.autograd.grad(value.sum(), l)
        assert (value.diff() - slope[1:] * 2e-6).abs().max() < 1e-12


@EVERY_ROW
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_integers(row, dtype):
    recon_x = row.tensors((3, 5))["recon_x"]
    x = torch.arange(15).reshape(3, 5).to(dtype)
    made = row.make(**row.every_parameter(0.3), x_scale=1 / 15)
    assert torch.equal(made.nll(recon_x, x), made.nll(recon_x, x.float()))
    half = made.nll(recon_x.bfloat16(), x)
    assert half.dtype == torch.float32 or not row.parameters


# Means and samples


def moments(made: likelihoods.Likelihood, recon_x: float) -> tuple[float, float]:
    """The mean and the variance of the density exp(-nll), by quadrature or a sum."""

    def density(x: float) -> float:
        at = torch.tensor([recon_x], dtype=F64), torch.tensor([x], dtype=F64)
        return math.exp(-made.nll(*at).item())

    if isinstance(made, likelihoods.Poisson) and not made.full:
        terms = [(k, density(k) / math.factorial(k)) for k in range(80)]
    elif isinstance(made, COUNTS):
        terms = [(k, density(k)) for k in range(300)]
    elif isinstance(made, likelihoods.Bernoulli):
        terms = [(k, density(k)) for k in (0, 1)]
    else:
        unit = isinstance(made, likelihoods.ContinuousBernoulli)
        ends = (0, 1) if unit else (-200, 200)
        points = None if unit else made.mean(torch.tensor(recon_x)).item()
        integrals = [
            integrate.quad(lambda x, p=p: x**p * density(x), *ends, points=points, limit=500)[0]
            for p in range(3)
        ]
        total, first, second = integrals
        return first / total, second / total - (first / total) ** 2
    total = sum(d for _, d in terms)
    mean = sum(k * d for k, d in terms) / total
    return mean, sum((k - mean) ** 2 * d for k, d in terms) / total


def kolmogorov(made: likelihoods.Likelihood, recon_x: float, drawn: torch.Tensor) -> float:
    """How far the drawn values' distribution is from that of the density exp(-nll), at most."""
    if isinstance(made, likelihoods.ContinuousBernoulli):
        grid = torch.linspace(0, 1, 100_001, dtype=F64)
    else:
        grid = made.mean(torch.tensor(recon_x)) + torch.linspace(-9, 9, 100_001, dtype=F64).sinh()
    density = torch.exp(-made.nll(torch.tensor(recon_x, dtype=F64), grid)).numpy()
    below = integrate.cumulative_trapezoid(density, grid.numpy(), initial=0)
    ordered = drawn.double().sort().values.numpy()
    expected = np.interp(ordered, grid.numpy(), below / below[-1])
    return np.abs(expected - np.linspace(0, 1, len(ordered))).max()


COUNTS = (likelihoods.Poisson, likelihoods.NegativeBinomial)
SAMPLED = [(n, {}) for n in ROWS] + [
    ("huber", {"delta": 3.0}),
    ("charbonnier", {"eps": 20.0}),
    ("gaussian_logvar", {"activation": "sigmoid"}),
    ("laplace", {"activation": "tanh"}),
]


@pytest.mark.parametrize(("name", "options"), SAMPLED, ids=str)
def test_mean_and_sample(name, options):
    row, n = ROWS[name], 100_000
    options = row.every_parameter(0.4) | options
    if name == "student_t":
        options["df"] = 9.0  # so that the variance of the variance is small
    made = row.make(**options)
    within_limits = (0.3, 0.9) if row.images in (probabilities, genes) else (-1.2, 0.0, 2.0)
    for recon_x in within_limits:
        mean, variance = moments(made, recon_x)
        many = torch.full((n,), recon_x)
        assert made.mean(many[:1].double()).item() == pytest.approx(mean, rel=1e-6, abs=1e-6)
        drawn = made.sample(many, torch.Generator(many.device).manual_seed(3))
        assert (drawn.dtype, drawn.shape) == (many.dtype, many.shape)
        assert abs(drawn.mean().item() - mean) < 5 * math.sqrt(variance / n)
        if not isinstance(made, (likelihoods.Bernoulli, *COUNTS)):
            assert kolmogorov(made, recon_x, drawn) < 2.2 / math.sqrt(n)  # 1.9 is 1 in 1000
        fourth = ((drawn.double() - mean) ** 4).mean().item()
        error = math.sqrt(max(fourth - variance**2, 0) / n)
        assert abs(drawn.double().var().item() - variance) < 5 * error + 1e-4 * variance


@EVERY_ROW
def test_samples_are_reproduced_by_a_seed(row):
    made = row.make(**row.every_parameter(0.4))
    recon_x = row.tensors((50, 4))["recon_x"].requires_grad_()

    def draw(seed: int) -> torch.Tensor:
        return made.sample(recon_x, torch.Generator(recon_x.device).manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not draw(1).requires_grad
    torch.manual_seed(5)
    first = made.sample(recon_x)
    torch.manual_seed(5)
    assert torch.equal(first, made.sample(recon_x))
    assert made.sample(recon_x.bfloat16()).dtype == torch.bfloat16


def test_continuous_bernoulli_near_zero():
    logit = torch.tensor([0.0, 1e-30, -1e-30, 1e-8, -1e-8])
    made = likelihoods.ContinuousBernoulli()
    assert torch.equal(made.mean(logit), torch.full_like(logit, 0.5))
    drawn = made.sample(logit.repeat(20_000))
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.var().item() == pytest.approx(1 / 12, rel=0.02)


# Objects


@WITH_PARAMETERS
def test_the_leaves_are_the_parameters(row):
    tensors = [torch.randn(3) for _ in row.parameters]
    options = full(row)
    made = row.make(**dict(zip(row.parameters, tensors, strict=True)), **options, x_scale=0.5)
    leaves, spec = _pytree.tree_flatten(made)
    assert all(a is b for a, b in zip(leaves, tensors, strict=True))
    assert all(a is b for a, b in zip(made.parameters, tensors, strict=True))
    doubled = _pytree.tree_unflatten([2 * t for t in leaves], spec)
    assert (doubled.x_scale, doubled.numbers) == (0.5, made.numbers)
    assert not options or doubled.full
    assert torch.equal(doubled.parameters[0], 2 * tensors[0])


@WITH_PARAMETERS
def test_torch_func(row):
    recon_x, x, *parameters = row.tensors((3, 5), F64).values()
    made = row.make(**dict(zip(row.parameters, parameters, strict=True)))
    got = torch.func.grad(lambda m: m.nll(recon_x, x).sum())(made)
    leaves = [t.requires_grad_() for t in made.parameters]
    expected = torch.autograd.grad(made.nll(recon_x, x).sum(), leaves)
    torch.testing.assert_close(got.parameters, expected)
    each = torch.vmap(lambda m, r, x: m.nll(r, x))(made, recon_x, x)
    torch.testing.assert_close(each, made.nll(recon_x, x))


@EVERY_ROW
def test_compiles_whole(row):
    """Built inside, passed in, and returned."""
    torch._dynamo.reset()
    tensors = row.tensors((3, 5), F64)
    recon_x, x, *parameters = (t.requires_grad_(t.is_floating_point()) for t in tensors.values())
    named = dict(zip(row.parameters, parameters, strict=True))
    made = row.make(**named)

    def inside(recon_x, x, named):
        made = row.make(**named, **full(row))
        return made.nll(recon_x, x).sum(), made

    def passed(recon_x, x, made):
        return made.nll(recon_x, x).sum(), made.mean(recon_x)

    for function, last in ((inside, named), (passed, made)):
        expected = function(recon_x, x, last)[0]
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got = compiled(recon_x, x, last)[0]
        torch.testing.assert_close(got, expected)
        wanted = [recon_x, *parameters]
        torch.testing.assert_close(
            torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted)
        )


@old_dynamo
def test_a_number_that_changes_is_right_in_compiled_programs():
    torch._dynamo.reset()
    r, x = torch.randn(2, 3, 4)

    def nll(s):
        return likelihoods.Laplace(s).nll(r, x) + likelihoods.Huber(s).nll(r, x)

    compiled = torch.compile(nll, fullgraph=True, backend="aot_eager")
    for s in (0.1, 0.2, 0.3, 0.4):
        torch.testing.assert_close(compiled(s), nll(s))


@EVERY_ROW
def test_saved_copied_and_replaced(row):
    made = row.make(**row.every_parameter(0.4), x_scale=0.25)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(made)):
        assert other == made
        assert other is not made
    assert dataclasses.replace(made, x_scale=0.5).x_scale == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.x_scale = 1.0


@EVERY_ROW
def test_what_the_ops_take(row):
    name = next(k for k, r in ROWS.items() if r is row)
    made = row.make(**row.every_parameter(0.4))
    assert made.formula == name
    assert [t.item() for t in made.parameters] == list(row.every_parameter(0.4).values())
    assert all(t.shape == () for t in made.parameters)
    assert made.numbers == tuple(v for v in row.fields.values() if type(v) is float)
    assert (made.constant, made.activation, made.x_scale) == (0.0, None, 1.0)


def test_constants():
    assert likelihoods.Gaussian(full=True).constant == pytest.approx(math.log(2 * math.pi) / 2)
    assert likelihoods.Laplace(0.0, full=True).constant == pytest.approx(math.log(2))
    assert likelihoods.StudentT(1, 0.0, full=True).constant == pytest.approx(math.log(math.pi))


STRINGS = {
    "mse": "mse",
    "gaussian": "gaussian",
    "l1": "l1",
    "bce_with_logits": "bernoulli",
    "bce": "bernoulli_probabilities",
    "continuous_bernoulli": "continuous_bernoulli",
    "poisson": "poisson",
}


@pytest.mark.parametrize(("string", "formula"), STRINGS.items())
def test_names(string, formula):
    made = parse(string, "fastvae.vae_loss")
    assert made.formula == formula
    assert made is parse(string, "fastvae.vae_loss")
    assert parse(made, "fastvae.vae_loss") is made
    assert made == ROWS[formula].kind(
        **{k: v for k, v in ROWS[formula].fields.items() if k == "logits"}
    )


@pytest.mark.parametrize("bad", ["l2", "MSE", "", 1, None, likelihoods.L1, torch.nn.MSELoss()])
def test_what_is_no_likelihood(bad):
    """The message lists the names and says what was given."""
    error = ValueError if isinstance(bad, str) else TypeError
    names = ".*".join(f'"{name}"' for name in STRINGS)
    with pytest.raises(
        error, match=rf"fastvae\.vae_loss: likelihood must be {names}.*likelihoods.*"
    ) as caught:
        parse(bad, "fastvae.vae_loss")
    assert str(caught.value).endswith(f"but got {bad!r:.80}")


@pytest.mark.parametrize(
    ("kind", "field", "bad"),
    [
        (likelihoods.SquaredError, "activation", "relu"),
        (likelihoods.L1, "activation", torch.sigmoid),
        (likelihoods.Poisson, "x_scale", 0),
        (likelihoods.Bernoulli, "x_scale", "1/255"),
        (likelihoods.ContinuousBernoulli, "x_scale", math.inf),
        (likelihoods.Huber, "delta", 0.0),
        (likelihoods.Huber, "delta", math.nan),
        (likelihoods.Huber, "delta", torch.tensor(1.0)),
        (likelihoods.Charbonnier, "eps", -1e-3),
        (likelihoods.StudentT, "df", math.inf),
        (likelihoods.StudentT, "log_scale", "0"),
        (likelihoods.Laplace, "log_scale", [0.0]),
        (likelihoods.Gaussian, "logvar", np.zeros(3)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_fields_that_make_no_sense(kind, field, bad):
    needed = {"df": 3.0, "log_scale": 0.0} if kind is likelihoods.StudentT else {}
    with pytest.raises(
        ValueError, match=rf"(?s)fastvae\.likelihoods\.{kind.__name__}: {field} must be .*but got"
    ) as caught:
        kind(**needed | {field: bad})
    assert repr(bad)[:80] in str(caught.value)


def test_an_activation_goes_with_a_mean_alone():
    for kind in (likelihoods.Bernoulli, likelihoods.ContinuousBernoulli, likelihoods.Poisson):
        with pytest.raises(TypeError, match="activation"):
            kind(activation="sigmoid")


# The Gaussian of the best variance


def best_gaussian(recon_x, x):
    variance = torch.mean((recon_x - x) ** 2)
    return -torch.distributions.Normal(recon_x, variance.sqrt()).log_prob(x).sum()


@pytest.mark.parametrize(
    ("likelihood", "recon_x", "mean"),
    [
        (likelihoods.Poisson(), 44.0, 1e8),
        (likelihoods.NegativeBinomial(0.0), 5.0, 0.0),
        (likelihoods.NegativeBinomial(math.inf), 5.0, 5.0),
        (likelihoods.NegativeBinomial(torch.ones(1, dtype=torch.bfloat16)), 5.0, 5.0),
    ],
    ids=str,
)
def test_samples_of_extreme_counts(likelihood, recon_x, mean):
    drawn = likelihood.sample(torch.full((4000,), recon_x), torch.Generator().manual_seed(3))
    assert drawn.mean().item() == pytest.approx(mean, rel=0.1)


def test_optimal_gaussian_of_nothing():
    for shape in ((0, 5), (4, 0)):
        nll = likelihoods.optimal_gaussian(torch.zeros(shape), torch.zeros(shape))
        assert nll == 0


@pytest.mark.parametrize(
    "options", [{"x_range": 3}, {"edges": None}, {"least_log_scale": "a"}], ids=str
)
def test_a_mixture_refuses_what_is_no_number(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"LogisticMixture: {name} must be"):
        likelihoods.LogisticMixture(**options)


def test_optimal_gaussian():
    recon_x, x = torch.randn(2, 4, 3, 5, dtype=F64)
    recon_x.requires_grad_()
    expected = best_gaussian(recon_x, x)
    for reduction, divisor in {"sum": 1, "batchmean": 4, "mean": 60}.items():
        got = likelihoods.optimal_gaussian(recon_x, x, reduction=reduction)
        torch.testing.assert_close(got, expected / divisor)
    torch.testing.assert_close(likelihoods.optimal_gaussian(recon_x, x), expected)
    got = likelihoods.optimal_gaussian(recon_x, x, reduction="sample")
    torch.testing.assert_close(
        got, torch.stack([best_gaussian(a, b) for a, b in zip(recon_x, x, strict=True)])
    )
    (slope,) = torch.autograd.grad(likelihoods.optimal_gaussian(recon_x, x), recon_x)
    torch.testing.assert_close(slope, (recon_x - x).detach() / ((recon_x - x) ** 2).mean().detach())


def test_optimal_gaussian_refuses():
    a = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"optimal_gaussian: reduction .*batchmean.*'none'"):
        likelihoods.optimal_gaussian(a, a, reduction="none")
    with pytest.raises(ValueError, match="reconstruction_loss"):
        likelihoods.optimal_gaussian(a, a[:, :4])
    assert fastvae.likelihoods is likelihoods
