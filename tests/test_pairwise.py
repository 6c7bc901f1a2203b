"""mixture_log_prob, aggregate_posterior and kl_decomposition: values and gradients, and all that an op has to get along with."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import evaluate, to_numpy, varied
from cases import pairs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from fastvae import aggregate_posterior, kl_decomposition, mixture_log_prob, reference
from fastvae.verify import oracle

DTYPES = [torch.float32, torch.float64]
# Fewer and more than the kernels' groups of 32 rows, tiles of 256 and blocks of 16 components.
SIZES = [(1, 1, 1), (5, 3, 2), (32, 16, 4), (33, 17, 3), (70, 40, 6), (300, 20, 5), (40, 150, 9)]
ESTIMATORS = ["stratified", "weighted"]
REDUCTIONS = ["batchmean", "sum", "sample"]


def near(got: Tensor, want: Any, limit: float, what: str) -> None:
    """Within `limit`, in float64 within as many of its units, of the largest value (of 1 where that is less)."""
    limit = limit if got.dtype != torch.float64 else limit * 2.0**-29
    error = np.abs(to_numpy(got) - want).max(initial=0)
    assert error <= limit * max(1, np.abs(want).max(initial=0)), f"{what} is off by {error}"


def of_log_q(got: Tensor, want: Any, dims: int, what: str) -> None:
    near(got, want, max(1e-6 * dims / max(1, np.abs(want).max(initial=0)), 4e-7), what)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("by_row", [None, False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mixtures(size, dtype, by_row, spread, device):
    """Joint and factorized; far from all components the exponents have few digits, and float32 gradients lose them."""
    tensors = pairs(*size, dtype, device, by_row=by_row, spread=spread)
    arrays = {k: to_numpy(t) for k, t in tensors.items()}
    arrays.setdefault("log_weight", np.zeros(size[1]))
    for factorized in (False, True):
        got = evaluate(mixture_log_prob, tensors, factorized=factorized)
        g = to_numpy(varied(got.outputs[0].shape, torch.float64))
        upstream = (None, g) if factorized else (g, None)
        outputs, gradients = oracle.aggregate_posterior(**arrays, upstream=upstream)
        of_log_q(got.outputs[0], outputs[factorized], size[2], "log q")
        for name, grad in got.grads.items():
            near(grad, gradients[name], 6e-6 if spread == 1 else 2e-4, name)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aggregate_posterior_with_given_weights(dtype, by_row, device):
    tensors = pairs(45, 70, 5, dtype, device, by_row=by_row)
    got = evaluate(aggregate_posterior, tensors)
    g = [to_numpy(varied(o.shape, torch.float64)) for o in got.outputs]
    outputs, gradients = oracle.aggregate_posterior(
        **{k: to_numpy(t) for k, t in tensors.items()}, upstream=g
    )
    for value, want in zip(got.outputs, outputs, strict=False):
        of_log_q(value, want, 5, "log q")
    for name, grad in got.grads.items():
        near(grad, gradients[name], 6e-6, name)


@pytest.mark.parametrize("more", [0, 23])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 2), (64, 10), (300, 4)], ids=str)
def test_decomposition(size, dtype, estimator, reduction, more, device):
    tensors = pairs(size[0], size[0] + more, size[1], dtype, device, by_row=None)
    options = {"dataset_size": 1234, "estimator": estimator, "reduction": reduction}
    got = evaluate(kl_decomposition, tensors, **options)
    g = [to_numpy(varied(o.shape, torch.float64)) for o in got.outputs]
    outputs, gradients = oracle.kl_decomposition(
        **{k: to_numpy(t) for k, t in tensors.items()}, **options, upstream=g
    )
    scale = max(float(np.abs(want).max()) for want in outputs)
    for value, want in zip(got.outputs, outputs, strict=True):
        near(value / scale, want / scale, 1e-6, "a term")
    for name, grad in got.grads.items():
        largest = np.abs(gradients[name]).max()
        near(grad / float(largest), gradients[name] / largest, 2e-6, name)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_terms_add_up_to_the_sampled_kl(estimator):
    t = pairs(50, 50, 6, torch.float64, by_row=None)
    terms = kl_decomposition(**t, dataset_size=700, estimator=estimator, reduction="sample")
    log_q = torch.distributions.Normal(t["mu"], (0.5 * t["logvar"]).exp()).log_prob(t["z"])
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(t["z"])
    torch.testing.assert_close(sum(terms), (log_q - log_p).sum(1))


def test_the_whole_data_set_as_a_batch_has_its_own_posterior():
    """Each weighs 1 / N: torch.distributions' mixture."""
    t = pairs(40, 40, 3, torch.float64, by_row=None)
    components = torch.distributions.Normal(t["mu"], (0.5 * t["logvar"]).exp())
    mixing = torch.distributions.Categorical(logits=torch.zeros(40, dtype=torch.float64))
    mixture = torch.distributions.MixtureSameFamily(
        mixing, torch.distributions.Independent(components, 1)
    )
    log_qz, log_qz_dims = aggregate_posterior(**t, dataset_size=40)
    torch.testing.assert_close(log_qz, mixture.log_prob(t["z"]))
    for d in range(3):
        of_d = torch.distributions.MixtureSameFamily(
            mixing,
            torch.distributions.Normal(t["mu"][:, d], (0.5 * t["logvar"][:, d]).exp()),
        )
        torch.testing.assert_close(log_qz_dims[:, d], of_d.log_prob(t["z"][:, d]))


def test_the_stratified_estimate_is_unbiased_for_the_density():
    """The mean of exp(log q) over batches of a data set is its density: exact, but for the batches drawn."""
    whole = pairs(12, 12, 2, torch.float64, by_row=None)
    n, b = 12, 4
    mu, logvar = whole["mu"], whole["logvar"]
    z = whole["z"][:1]
    exact = mixture_log_prob(z, mu, logvar).exp() / n
    rest = [(i, j, k) for i in range(1, n) for j in range(i + 1, n) for k in range(j + 1, n)]
    total = 0.0
    for batch in rest:  # all batches of b that sample 0 is in
        index = torch.tensor([0, *batch])
        log_qz, _ = aggregate_posterior(
            torch.cat([z, mu[list(batch)]]), mu[index], logvar[index], dataset_size=n
        )
        total += float(log_qz[0].exp()) / len(rest)
    assert b == len(batch) + 1
    assert total == pytest.approx(float(exact), rel=1e-12)


# Values at their ends


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_all_components(dtype, distance, factorized):
    """Below the smallest exponential; one component is the nearest, and all of the gradient is its."""
    t = pairs(40, 30, 3, dtype, by_row=False)
    z = t["z"] + distance
    got = evaluate(mixture_log_prob, t | {"z": z}, factorized=factorized)
    arrays = {k: to_numpy(v) for k, v in (t | {"z": z}).items()}
    g = to_numpy(varied(got.outputs[0].shape, torch.float64))
    outputs, gradients = oracle.aggregate_posterior(
        **arrays, upstream=(None, g) if factorized else (g, None)
    )
    assert got.outputs[0].isfinite().all()
    near(got.outputs[0], outputs[factorized], 5e-7, "log q")
    for name in ("z", "mu", "logvar"):
        near(got.grads[name], gradients[name], 5e-6, name)


@pytest.mark.parametrize("where", ["z", "mu", "logvar", "log_weight"])
def test_nan_stays(where):
    t = pairs(40, 30, 3, by_row=True)
    t[where][2, 1] = math.nan
    log_q, log_q_dims = aggregate_posterior(**t)
    rows = torch.zeros(40, dtype=torch.bool)
    rows[2 if where in ("z", "log_weight") else slice(None)] = True
    dims = torch.zeros(40, 3, dtype=torch.bool)
    dims[
        2 if where in ("z", "log_weight") else slice(None),
        slice(None) if where == "log_weight" else 1,
    ] = True
    assert torch.equal(log_q.isnan(), rows)
    assert torch.equal(log_q_dims.isnan(), dims)
    grads = evaluate(aggregate_posterior, t).grads
    assert torch.equal(grads["z"].isnan().any(1), rows)


def test_components_of_weight_zero_count_for_nothing():
    t = pairs(40, 30, 3, torch.float64, by_row=False)
    off = torch.arange(30) % 3 == 0
    t["log_weight"][off] = -math.inf
    t["mu"][off] += 1e5
    for factorized in (False, True):
        got = evaluate(mixture_log_prob, t, factorized=factorized)
        kept = {k: (v if k == "z" else v[~off]) for k, v in t.items()}
        want = evaluate(mixture_log_prob, kept, factorized=factorized)
        torch.testing.assert_close(got.outputs, want.outputs)
        torch.testing.assert_close(got.grads["z"], want.grads["z"])
        for name in ("mu", "logvar", "log_weight"):
            assert not got.grads[name][off].any()
            torch.testing.assert_close(got.grads[name][~off], want.grads[name])


def test_without_a_component_the_density_is_zero():
    z, none = torch.zeros(3, 2), torch.zeros(0, 2)
    assert torch.equal(mixture_log_prob(z, none, none), torch.full((3,), -math.inf))
    t = pairs(3, 4, 2, by_row=None)
    log_weight = torch.full((4,), -math.inf)
    assert torch.equal(
        mixture_log_prob(**t, log_weight=log_weight, factorized=True), torch.full((3, 2), -math.inf)
    )
    assert mixture_log_prob(z[:0], z, z).shape == (0,)


# Shapes, layouts and dtypes


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3), (2, 0)], ids=str)
def test_batches_of_any_rank(batch, factorized):
    t = pairs(6, 4, 3, torch.float64)
    z = torch.randn(*batch, 3, dtype=torch.float64)
    by_row = torch.randn(*batch, 4, dtype=torch.float64)
    for log_weight in (None, t["log_weight"], by_row):
        arguments = {"z": z, "mu": t["mu"], "logvar": t["logvar"]}
        if log_weight is not None:
            arguments["log_weight"] = log_weight
        got = evaluate(mixture_log_prob, arguments, factorized=factorized)
        want = evaluate(reference.mixture_log_prob, arguments, factorized=factorized)
        torch.testing.assert_close(got.outputs, want.outputs)
        torch.testing.assert_close(got.grads, want.grads)


def test_strided_inputs():
    t = pairs(20, 20, 6, by_row=None)
    strided = {k: torch.stack([v, v], -1).unbind(-1)[1] for k, v in t.items()}
    strided["mu"] = t["mu"].T.contiguous().T
    a = evaluate(kl_decomposition, t, dataset_size=99)
    b = evaluate(kl_decomposition, strided, dataset_size=99)
    for x, y in zip((*a.outputs, *a.grads.values()), (*b.outputs, *b.grads.values()), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_float32_inside(dtype):
    t = {k: v.to(dtype) for k, v in pairs(50, 50, 4, by_row=None).items()}
    t["mu"] = t["mu"].float()  # as autocast mixes them
    got = evaluate(kl_decomposition, t, dataset_size=99)
    want = evaluate(kl_decomposition, {k: v.float() for k, v in t.items()}, dataset_size=99)
    for x, y in zip(got.outputs, want.outputs, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)
    for name, grad in got.grads.items():
        assert torch.equal(grad, want.grads[name].to(t[name].dtype))


# Derivatives


def double(*size: int, by_row: bool | None) -> list[Tensor]:
    return [
        t.requires_grad_()
        for t in pairs(*size, torch.float64, by_row=by_row, device="cpu").values()
    ]


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("by_row", [None, False, True])
def test_derivatives_of_mixtures(by_row, factorized):
    def op(*tensors: Tensor) -> Tensor:
        return mixture_log_prob(*tensors, factorized=factorized)

    inputs = double(4, 3, 2, by_row=by_row)
    assert gradcheck(op, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(op, inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_derivatives_of_the_decomposition(estimator, reduction):
    def op(*tensors: Tensor) -> Any:
        return kl_decomposition(*tensors, dataset_size=90, estimator=estimator, reduction=reduction)

    inputs = double(3, 4, 2, by_row=None)
    assert gradcheck(op, inputs, check_forward_ad=True)
    assert gradgradcheck(op, inputs)


def test_upstream_gradients_of_some_outputs():
    t = pairs(30, 30, 4, by_row=None)
    for k in range(3):
        upstream = [None if i != k else torch.tensor(1.7) for i in range(3)]
        zeros = [torch.tensor(0.0 if i != k else 1.7) for i in range(3)]
        some = evaluate(kl_decomposition, t, upstream, dataset_size=50)
        all_of_them = evaluate(kl_decomposition, t, zeros, dataset_size=50)
        assert all(torch.equal(some.grads[n], all_of_them.grads[n]) for n in t)


def test_gradients_that_are_not_wanted_are_not_made():
    t = pairs(30, 20, 4)
    want = evaluate(mixture_log_prob, t).grads
    for name in t:
        leaves = {k: v.detach().requires_grad_(k == name) for k, v in t.items()}
        out = mixture_log_prob(**leaves)
        out.backward(varied(out.shape, out.dtype))
        assert torch.equal(leaves[name].grad, want[name])


def test_backward_again_has_the_same_bits_and_outputs_may_be_changed_in_place():
    t = {k: v.requires_grad_() for k, v in pairs(30, 20, 4).items()}
    log_q, log_q_dims = aggregate_posterior(**t)
    loss = log_q.mul_(2).sum() + log_q_dims.mul_(3).sum()
    first = torch.autograd.grad(loss, list(t.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(t.values()))
    plain = aggregate_posterior(**t)
    third = torch.autograd.grad(2 * plain[0].sum() + 3 * plain[1].sum(), list(t.values()))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_func_and_vmap():
    t = pairs(5, 4, 3, torch.float64)
    one = torch.func.vmap(torch.func.grad(lambda z: mixture_log_prob(z, t["mu"], t["logvar"])))
    leaf = t["z"].clone().requires_grad_()
    (want,) = torch.autograd.grad(mixture_log_prob(leaf, t["mu"], t["logvar"]).sum(), leaf)
    torch.testing.assert_close(one(t["z"]), want)
    many = {k: torch.stack([v, v + 0.5, v - 0.25]) for k, v in pairs(5, 5, 3, by_row=None).items()}
    got = torch.vmap(lambda *a: kl_decomposition(*a, dataset_size=50), in_dims=(0, 0, 0))(
        *many.values()
    )
    for k in range(3):
        want = kl_decomposition(*[v[k] for v in many.values()], dataset_size=50)
        torch.testing.assert_close([g[k] for g in got], list(want))


def test_compiled_whole_it_stays_one_op():
    t = pairs(40, 40, 4, by_row=None)

    def loss(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        mi, tc, dim = kl_decomposition(z * 1.5, mu, logvar, 77)
        return mi + 4 * tc + dim + mixture_log_prob(z, mu, logvar).mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for count in (40, 25):
        leaves = [v[:count].clone().requires_grad_() for v in t.values()]
        want = torch.autograd.grad(loss(*leaves), leaves)
        got = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("of", range(4))
def test_opcheck(of):
    z, mu, logvar, log_weight = double(5, 6, 2, by_row=False)
    weight = log_weight if of < 3 else None
    opcheck(torch.ops.fastvae.pairwise.default, (z, mu, logvar, weight, 60.0, 0, of, 1))
    inner = [t.detach() for t in (z, mu, logvar)]
    options = (None if weight is None else weight.detach(), 60.0, 0, of, 1)
    opcheck(torch.ops.fastvae._pairwise.default, (*inner, *options))
    *out, stats = torch.ops.fastvae._pairwise.default(*inner, *options)
    g = [o if o.numel() else None for o in out] if of < 3 else out
    opcheck(
        torch.ops.fastvae._pairwise_gradients.default,
        (*g, *inner, options[0], stats, 60.0, 0, of, 1, (True, True, True, weight is not None)),
    )


@pytest.mark.parametrize("of", range(4))
def test_the_composed_form_is_the_same(of):
    t = pairs(20, 25, 3, torch.float64)
    weight = t["log_weight"] if of < 2 else None
    arguments = (t["z"], t["mu"], t["logvar"], weight, 60.0, 0, of, 1)
    got = torch.ops.fastvae.pairwise_composed(*arguments)
    torch.testing.assert_close(got, torch.ops.fastvae.pairwise(*arguments))


# Wrong input


def refused(function: Any, match: str, error: type[Exception] = ValueError, **spoiled: Any) -> None:
    name = function.__name__
    by_row = None if function is not mixture_log_prob else False
    arguments: dict[str, Any] = dict(pairs(5, 5, 3, by_row=by_row))
    if function is not mixture_log_prob:
        arguments["dataset_size"] = 50
    with pytest.raises(error, match=re.compile(rf"fastvae\.{name}: .*{match}", re.DOTALL)):
        function(**arguments | spoiled)


@pytest.mark.parametrize("function", [mixture_log_prob, aggregate_posterior, kl_decomposition])
def test_wrong_tensors(function):
    for name in ("z", "mu", "logvar"):
        refused(function, f"{name} must be", TypeError, **{name: None})
        refused(function, f"{name} must be float32", TypeError, **{name: torch.ones(5, 3).long()})
        refused(
            function,
            "float64 goes with float64 only",
            TypeError,
            **{name: torch.ones(5, 3).double()},
        )
        refused(function, "same device", RuntimeError, **{name: torch.ones(5, 3, device="meta")})
    refused(function, r"mu must be \[K, L\].*3.*\[5, 4\]", mu=torch.ones(5, 4))
    refused(function, r"mu must be \[K, L\]", mu=torch.ones(3))
    refused(function, r"mu and logvar must have the same shape", logvar=torch.ones(4, 3))
    refused(function, "0-dim", z=torch.tensor(1.0))


def test_wrong_weights():
    refused(
        mixture_log_prob, r"log_weight must be \[5\].*or \[5, 5\].*\[4\]", log_weight=torch.ones(4)
    )
    refused(mixture_log_prob, "log_weight must be", log_weight=torch.ones(1, 5))
    refused(mixture_log_prob, "log_weight must be", TypeError, log_weight=[0.2] * 5)
    refused(aggregate_posterior, "but got both", log_weight=torch.ones(5))
    refused(aggregate_posterior, "but got neither", dataset_size=None)


@pytest.mark.parametrize("function", [aggregate_posterior, kl_decomposition])
def test_wrong_batches(function):
    refused(function, "dataset_size must be at least the number", dataset_size=4)
    refused(function, "dataset_size must be at least 1", dataset_size=0)
    refused(function, "dataset_size must be a number", TypeError, dataset_size="60000")
    refused(function, r"z must be \[B, L\]", z=torch.ones(2, 5, 3))
    refused(function, "5 rows for 6 samples", z=torch.ones(6, 3))
    refused(function, 'estimator must be "stratified" or "weighted"', estimator="mss")


def test_wrong_reductions():
    refused(kl_decomposition, "reduction must be", reduction="mean")
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile it"):
        torch.jit.script(kl_decomposition)


def test_vmap_of_nothing():
    m = torch.zeros(3, 2)
    out = torch.vmap(lambda z: mixture_log_prob(z, m, m))(torch.zeros(0, 5, 2))
    assert out.shape == (0, 5)
    with pytest.raises(TypeError, match=r"dataset_size must be a number, but got Tensor"):
        kl_decomposition(m, m, m, torch.tensor(50))
