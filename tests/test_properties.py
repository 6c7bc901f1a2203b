"""Properties over arbitrary shapes, strides, dtypes and values."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from accuracy import OUTPUTS, check, evaluate
from cases import (
    DTYPES,
    LAYOUTS,
    REDUCTIONS,
    SCALAR_REDUCTIONS,
    inputs,
    latents,
    seeded_generator,
    tensor,
)
from hypothesis import given

import fastvae
from fastvae import kl_normal, reconstruction_loss, reparameterize, sample_and_kl, vae_loss

dimensions = st.integers(0, 9)
shapes = st.one_of(
    st.lists(dimensions, min_size=1, max_size=5).map(tuple),
    st.tuples(st.integers(1, 5), st.integers(1, 1300)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
)
layouts = st.sampled_from(list(LAYOUTS))
dtypes = st.sampled_from(DTYPES)
floats = st.floats(-20, 20, width=32)


@st.composite
def permuted(draw, t: torch.Tensor) -> torch.Tensor:
    """`t` in any order of dimensions in memory, then in any of the layouts, then with some dimensions reversed in order."""
    order = draw(st.permutations(range(t.dim())))
    inverse = np.argsort(order).tolist()
    return LAYOUTS[draw(layouts)](t.permute(order).contiguous()).permute(inverse)


@st.composite
def calls(draw):
    name = draw(st.sampled_from(list(OUTPUTS)))
    prior = name in ("kl_normal", "sample_and_kl") and draw(st.booleans())
    shape, dtype = draw(shapes), draw(dtypes)
    tensors = inputs(
        name, shape, dtype, seed=draw(st.integers(0, 9)), **({"prior": True} if prior else {})
    )
    tensors = {k: draw(permuted(t)) for k, t in tensors.items()}
    options: dict[str, object] = {}
    if "eps" in tensors and draw(st.booleans()):
        del tensors["eps"]
        options["seed"] = draw(st.integers(0, 2**40))
    if name != "reparameterize":
        allowed = (
            REDUCTIONS
            if name in ("kl_normal", "reconstruction_loss")
            else [*SCALAR_REDUCTIONS, "sample"]
        )
        options["reduction"] = draw(st.sampled_from(allowed))
    if name in ("reconstruction_loss", "vae_loss"):
        options["likelihood"] = draw(st.sampled_from(["mse", "gaussian"]))
    if name == "vae_loss":
        options["beta"] = draw(st.sampled_from([0.0, 0.25, 1.0, 3.7]))
        if options["reduction"] != "sample":
            options["kl_reduction"] = draw(st.sampled_from([None, *SCALAR_REDUCTIONS]))
    return name, tensors, options


@given(calls())
def test_every_call_is_right(call):
    name, tensors, options = call
    check(name, tensors, **options)


@given(calls())
def test_every_call_repeats_to_the_bit(call):
    name, tensors, options = call
    seed = options.pop("seed", None)
    generators = [{} if seed is None else {"generator": seeded_generator(seed)} for _ in range(2)]
    a, b = (evaluate(getattr(fastvae, name), tensors, **options, **g) for g in generators)
    for x, y in zip((*a.outputs, *a.grads.values()), (*b.outputs, *b.grads.values()), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.tuples(floats, floats, floats, floats), min_size=1, max_size=40), dtypes)
def test_kl_is_never_negative(values, dtype):
    mu, logvar, mu_p, logvar_p = tensor(values, dtype).unsqueeze(1).unbind(-1)
    for kl in (
        kl_normal(mu, logvar, reduction="none"),
        kl_normal(mu, logvar, mu_p, logvar_p, reduction="none"),
    ):
        assert (kl >= 0).all()
        assert not torch.signbit(kl).any()


@given(shapes.filter(all), dtypes)
def test_reductions_are_sums_of_one_another(shape, dtype):
    t = latents(shape, dtype)
    by_reduction = {r: kl_normal(**t, reduction=r).double() for r in REDUCTIONS}
    total = by_reduction["none"].sum()
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(by_reduction["sum"], total, **close)
    torch.testing.assert_close(by_reduction["sample"].sum(), total, **close)
    torch.testing.assert_close(by_reduction["batchmean"], total / shape[0], **close)
    torch.testing.assert_close(by_reduction["mean"], total / t["mu"].numel(), **close)


@given(st.integers(1, 6), st.integers(1, 700), dtypes)
def test_rows_do_not_see_each_other(batch, width, dtype):
    """A batch gives for each sample what the sample gives alone."""
    t = inputs("vae_loss", (batch, width), dtype)
    whole = vae_loss(**t, reduction="sample", beta=0.3)
    for i in range(batch):
        alone = vae_loss(**{k: v[i : i + 1] for k, v in t.items()}, reduction="sample", beta=0.3)
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b)


@given(shapes, dtypes)
def test_arguments_swapped(shape, dtype):
    """The squared error is symmetric, to the bit."""
    recon_x, x = inputs("reconstruction_loss", shape, dtype).values()
    a, b = (
        reconstruction_loss(recon_x, x, reduction="none"),
        reconstruction_loss(x, recon_x, reduction="none"),
    )
    assert torch.equal(a, b)


@given(shapes, dtypes, st.integers(0, 2**63 - 1))
def test_sampling_ops_agree(shape, dtype, seed):
    mu, logvar = latents(shape, dtype).values()
    z = reparameterize(mu, logvar, generator=seeded_generator(seed))
    joint = sample_and_kl(mu, logvar, generator=seeded_generator(seed))
    assert torch.equal(z, joint[0])
