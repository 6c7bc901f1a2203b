"""Strided inputs: right results wherever the elements lie, the layout of empty_like, and no copy on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import OUTPUTS, check, evaluate
from cases import LAYOUTS, images, inputs, latents, noise, vae_inputs
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastvae
from fastvae import kl_normal, reconstruction_loss, reparameterize, sample_and_kl, vae_loss

OPS = list(OUTPUTS)
SHAPES = [(4, 6, 3, 5), (3, 520, 3), (5, 9), (8,)]


def options_of(op: str) -> list[dict[str, str]]:
    return [{}] if op == "reparameterize" else [{"reduction": "batchmean"}, {"reduction": "sample"}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_all_inputs_in_one_layout(op, layout, shape, device):
    tensors = {k: LAYOUTS[layout](t) for k, t in inputs(op, shape, device=device).items()}
    for options in options_of(op):
        check(op, tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes(op, layout, dtype, device):
    check(op, {k: LAYOUTS[layout](t) for k, t in inputs(op, (4, 6, 3, 5), dtype, device).items()})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_one_input_in_another_layout(op, layout, device):
    for odd in inputs(op, (4, 6, 3, 5)):
        tensors = inputs(op, (4, 6, 3, 5), device=device)
        tensors[odd] = LAYOUTS[layout](tensors[odd])
        for options in options_of(op):
            check(op, tensors, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prior_and_noise_in_each_layout(layout, device):
    posterior = latents((4, 6, 3, 5), device=device)
    prior = {
        k: LAYOUTS[layout](t)
        for k, t in latents((4, 6, 3, 5), device=device, prior=True).items()
        if "_p" in k
    }
    check("kl_normal", posterior | prior, reduction="none")
    check("sample_and_kl", posterior | prior, seed=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elementwise_results(layout, device):
    for op in ("kl_normal", "reconstruction_loss"):
        tensors = {
            k: LAYOUTS[layout](t) for k, t in inputs(op, (4, 6, 3, 5), device=device).items()
        }
        check(op, tensors, reduction="none")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_results_and_gradients_have_the_layout_of_empty_like(op, layout):
    tensors = {k: LAYOUTS[layout](t) for k, t in inputs(op, (4, 6, 3, 5)).items()}
    first = next(iter(tensors.values()))
    for options in options_of(op) + (
        [{"reduction": "none"}] if op in ("kl_normal", "reconstruction_loss") else []
    ):
        got = evaluate(getattr(fastvae, op), tensors, **options)
        for o in got.outputs:
            if o.dim() == first.dim():
                assert o.stride() == torch.empty_like(first).stride()
        for k, g in got.grads.items():
            if not (
                op in ("reparameterize",) and k == "mu"
            ):  # that is the upstream gradient as it came
                assert g.stride() == torch.empty_like(tensors[k]).stride(), k


@pytest.mark.parametrize("layout", LAYOUTS)
def test_returned_noise_has_the_layout_of_mu(layout):
    mu, logvar = (LAYOUTS[layout](t) for t in latents((4, 6, 3, 5)).values())
    z, eps = reparameterize(mu, logvar, return_eps=True)
    assert z.stride() == eps.stride() == torch.empty_like(mu).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_values_are_the_contiguous_ones(op, layout):
    """To the bit elementwise; a sum may run in memory order, and then rounds differently."""
    tensors = {k: LAYOUTS[layout](t) for k, t in inputs(op, (4, 6, 3, 5)).items()}
    for options in options_of(op):
        strided = evaluate(getattr(fastvae, op), tensors, **options)
        packed = evaluate(
            getattr(fastvae, op), {k: t.contiguous() for k, t in tensors.items()}, **options
        )
        torch.testing.assert_close(strided.outputs, packed.outputs)
        for k in tensors:
            assert torch.equal(strided.grads[k], packed.grads[k])


@pytest.mark.parametrize("dims", [5, 6, 7, 8])
def test_many_dimensions(dims, device):
    """Every second element in every dimension, so that no two of them can be merged."""
    shape = (2, 3, *[2] * (dims - 2))
    for op in OPS:
        tensors = {}
        for k, t in inputs(op, shape, device=device).items():
            wide = torch.full([2 * s for s in t.shape], torch.nan, device=device)
            tensors[k] = wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)
        check(op, tensors)


def test_lazily_negated_views(device):
    """The imaginary part of a conjugated tensor: torch has not negated it in memory."""
    tensors = {k: torch._neg_view(t) for k, t in images((4, 30), device=device).items()}
    check("reconstruction_loss", tensors)
    check(
        "vae_loss",
        tensors | {k: torch._neg_view(t) for k, t in latents((4, 5), device=device).items()},
    )


def test_overlapping_windows():
    """as_strided with rows that share elements, as unfold makes them."""
    rows = noise((40,)).unfold(0, 16, 4)
    check("kl_normal", {"mu": rows, "logvar": rows.flip(0)}, reduction="sample")


# No hidden copies

MiB = 1 << 20
SLACK = 64 << 10  # partial sums and results
B = 16
LATENT = (B, 16, 32, 32)  # 1 MiB
IMAGE = (B, 3, 76, 76)  # 1.1 MiB


def allocated(fn: Callable[[], object]) -> int:
    """Bytes that `fn` allocates on the CPU in all, whether it frees them or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = fn()
    del kept
    return sum(max(0, n) for n in changes(prof))


def retained(fn: Callable[[], object]) -> int:
    """Bytes that `fn` leaves allocated while its result lives."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = fn()
    del kept
    return sum(changes(prof))


def changes(prof: profile) -> list[int]:
    return [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_measure_sees_a_copy():
    t = torch.ones(MiB)
    assert allocated(lambda: t.clone()) >= size_of(t)
    assert allocated(lambda: t.add(1).add_(1).mul(2)) >= 2 * size_of(t)
    assert size_of(t) <= retained(lambda: t.add(1).mul(2)) < size_of(t) + SLACK


READ_IN_PLACE = [
    "contiguous",
    "misaligned",
    "chunk",
    "channel_slice",
    "row_step",
    "channels_last",
    "channels_last_slice",
    "expanded_batch",
    "interleaved",
    "transposed",
]


@pytest.mark.parametrize("layout", READ_IN_PLACE)
@pytest.mark.parametrize("op", OPS)
def test_no_copy_of_an_input(op, layout):
    if op in ("reconstruction_loss", "vae_loss"):
        tensors = images(IMAGE) | (latents(LATENT) if op == "vae_loss" else {})
    else:
        tensors = inputs(op, LATENT)
    tensors = {k: LAYOUTS[layout](t) for k, t in tensors.items()}
    results = size_of(tensors["mu"]) if op in ("reparameterize", "sample_and_kl") else 0
    assert allocated(lambda: getattr(fastvae, op)(**tensors)) <= results + SLACK


@pytest.mark.parametrize("layout", ["contiguous", "chunk", "channel_slice", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_training_allocates_the_gradients_and_nothing_else(layout, dtype):
    tensors = {
        k: LAYOUTS[layout](t).detach()
        for k, t in (images(IMAGE, dtype) | latents(LATENT, dtype)).items()
    }
    for k in ("recon_x", "mu", "logvar"):
        tensors[k].requires_grad_()
    wanted = [tensors[k] for k in ("recon_x", "mu", "logvar")]
    for reduction in ("batchmean", "sample"):
        one = torch.ones(B) if reduction == "sample" else torch.ones(())

        def step(reduction=reduction, one=one):
            return torch.autograd.grad(vae_loss(**tensors, reduction=reduction).loss, wanted, one)

        assert allocated(step) <= size_of(*wanted) + SLACK


def test_where_the_gradients_of_the_loss_are_made():
    """In the forward, except for float16 (they would underflow), other reductions and forwards without gradients."""
    for dtype, reduction, in_forward in [
        (torch.float32, "batchmean", True),
        (torch.bfloat16, "sum", True),
        (torch.float64, "mean", True),
        (torch.float16, "batchmean", False),
        (torch.float32, "sample", False),
    ]:
        tensors = images(IMAGE, dtype) | latents(LATENT, dtype)
        assert allocated(lambda: vae_loss(**tensors, reduction=reduction)) <= SLACK  # noqa: B023
        recon_x = tensors["recon_x"].requires_grad_()
        expected = size_of(recon_x) if in_forward else 0
        made = allocated(lambda: vae_loss(**tensors, reduction=reduction))  # noqa: B023
        assert expected <= made <= expected + SLACK, f"{dtype} {reduction}"


def test_nothing_is_kept_beside_what_hooks_see():
    """Under saved-tensor hooks (offloading, checkpointing) gradients made in the forward would defeat the purpose."""
    tensors = images(IMAGE) | latents(LATENT)
    for k in ("recon_x", "mu", "logvar"):
        tensors[k].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert allocated(lambda: vae_loss(**tensors)) <= SLACK


def test_a_backward_that_does_not_use_them_frees_the_gradients_of_the_forward():
    tensors = images(IMAGE)
    recon_x = tensors["recon_x"].requires_grad_()
    rest = latents((B, 5))

    def from_recon():
        out = vae_loss(**tensors, **rest)
        torch.autograd.grad(out.recon, recon_x)
        return out

    assert retained(lambda: vae_loss(**tensors, **rest)) >= size_of(recon_x)
    assert retained(from_recon) <= SLACK


@pytest.mark.parametrize("layout", ["contiguous", "chunk", "channels_last"])
def test_backward_of_a_sample(layout):
    """d_mu is the upstream gradient itself; d_logvar is the one thing to be made. No noise is stored."""
    mu, logvar = (LAYOUTS[layout](t).detach().requires_grad_() for t in latents(LATENT).values())
    z = reparameterize(mu, logvar)
    g = torch.ones_like(z)
    assert allocated(lambda: torch.autograd.grad(z, [mu, logvar], g)) <= size_of(logvar) + SLACK
    z, kl = sample_and_kl(mu, logvar)
    assert (
        allocated(lambda: torch.autograd.grad([z, kl], [mu, logvar], [g, torch.ones(())]))
        <= size_of(mu, logvar) + SLACK
    )
    assert allocated(lambda: reparameterize(mu, logvar)) <= size_of(mu) + SLACK


def test_backward_of_a_sum_does_not_fill_the_expanded_gradient():
    mu, logvar = (t.requires_grad_() for t in latents(LATENT).values())
    z = reparameterize(mu, logvar)
    assert allocated(lambda: torch.autograd.grad(z.sum(), [logvar])) <= size_of(logvar) + SLACK


def test_a_learned_prior_is_not_expanded_in_memory():
    posterior = latents(LATENT)
    prior = [t.expand_as(posterior["mu"]) for t in latents((1, 16, 1, 1), seed=1).values()]
    assert allocated(lambda: kl_normal(*posterior.values(), *prior)) <= SLACK


def test_mixed_dtypes_are_converted_on_the_fly():
    tensors = images(IMAGE, torch.bfloat16, torch.float32)
    assert allocated(lambda: reconstruction_loss(**tensors)) <= SLACK


def test_inputs_that_want_no_gradient_cost_nothing():
    tensors = vae_inputs(IMAGE)
    tensors["mu"].requires_grad_()
    made = allocated(lambda: torch.autograd.grad(vae_loss(**tensors).loss, tensors["mu"]))
    assert made <= size_of(tensors["mu"]) + SLACK


def test_a_lazy_clone_is_read_without_being_copied() -> None:
    mu = torch.randn(4, 6)
    clone = torch._lazy_clone(mu)
    fastvae.kl_normal(clone, clone)
    assert torch._C._is_cow_tensor(clone)
