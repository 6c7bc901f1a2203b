"""What only an emulated device shows (tests/emulation): which way through memory a launch takes, and with how many blocks."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import EMULATED, OUTPUTS, draw_seed, drawn
from cases import LAYOUTS, inputs, latents
from torch import Tensor

import fastvae
from fastvae import kl_normal, reparameterize, vae_loss

pytestmark = pytest.mark.skipif(not EMULATED, reason="not an emulation build (make emulate)")
# As tests/emulation/cuda_runtime_api.h has it: two blocks a multiprocessor.
RESIDENT = 2 * int(os.environ.get("FASTVAE_EMULATED_MULTIPROCESSORS", "7"))


def launches() -> list[tuple[str, int]]:
    """Of the kernels since the last call: the type of the parameters, and the blocks."""
    lines = torch.ops.fastvae_emulation.launches()
    return [
        (re.split("Params = ", name)[1], int(n)) for name, n in (s.rsplit(" ", 1) for s in lines)
    ]


def forward_and_backward(
    op: str, tensors: dict[str, Tensor], **options: Any
) -> list[tuple[str, int]]:
    leaves = {k: t.detach().requires_grad_(k != "x") for k, t in tensors.items()}
    launches()
    result = getattr(fastvae, op)(**leaves, **options)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    torch.autograd.grad(
        sum(o.float().sum() for o in outputs), [t for t in leaves.values() if t.requires_grad]
    )
    return launches()


def drop_eps(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t for k, t in tensors.items() if k != "eps"}


@pytest.mark.parametrize("op", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_without_whole_packs_goes_by_packs_too(op, dtype):
    for eps in (True, False):
        tensors = inputs(op, (3, 4097), dtype)
        found = forward_and_backward(op, tensors if eps else drop_eps(tensors))
        passes = [name for name, _ in found if "PassParams" in name]
        width = 4 if dtype == torch.float32 else 8
        assert passes and all(re.search(rf"Rows<float, {width}", name) for name in passes), found


def test_what_is_expanded_goes_by_packs_too():
    """A prior with one value for a row, and the gradient that z.sum() gives."""
    tensors = latents((64, 128), prior=True)
    tensors |= {k: LAYOUTS["expanded_inside"](tensors[k]) for k in ("mu_p", "logvar_p")}
    for found in (
        forward_and_backward("kl_normal", tensors),
        forward_and_backward("reparameterize", latents((64, 128))),
    ):
        assert all("Rows<float, 4" in name for name, _ in found if "PassParams" in name), found


def test_only_what_needs_no_second_launch_is_done_by_one_block():
    small = latents((64, 20))
    launches()
    kl_normal(**small)
    assert [n for _, n in launches()] == [1]
    assert (
        forward_and_backward("reparameterize", small)[0][1] == 2
    )  # nothing is added up: 320 packs
    # There is a second launch for the pixels: the KL's 2,560 elements take ten blocks meanwhile.
    found = forward_and_backward(
        "vae_loss", inputs("reconstruction_loss", (128, 784)) | latents((128, 20))
    )
    assert found[0][1] == min(49, RESIDENT) + min(10, RESIDENT)


@pytest.mark.parametrize("op", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_pass_has_no_more_blocks_than_run_at_once(op, dtype):
    found = forward_and_backward(op, inputs(op, (512, 1030), dtype))
    both = 2 if op == "vae_loss" else 1  # the KL's blocks, which come first and are short
    assert max(n for name, n in found if "PassParams" in name) <= both * RESIDENT


@pytest.mark.parametrize("event,threads", [(1, 1), (4, 1), (8, 2), (20, 8), (100, 32), (1024, 32)])
def test_samples_of_few_elements_share_a_warp(event, threads):
    batch = 512
    launches()
    kl_normal(**latents((batch, event)), reduction="sample")
    (found,) = launches()
    assert found[1] == min(batch * threads // 256, RESIDENT)


@pytest.mark.parametrize("batch", [1, 31, 33, 1000])
@pytest.mark.parametrize("event", [1, 2, 4, 7, 8, 12, 20, 33, 36, 100])
def test_sums_of_small_samples(batch, event):
    tensors = latents((batch, event))
    want = fastvae.reference.kl_normal(
        **{k: t.double() for k, t in tensors.items()}, reduction="sample"
    )
    for dtype in (torch.float32, torch.float64):
        got = kl_normal(**{k: t.to(dtype) for k, t in tensors.items()}, reduction="sample")
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    images = inputs("reconstruction_loss", (batch, event))
    got = vae_loss(**images, **tensors, reduction="sample", beta=0.5)
    torch.testing.assert_close(got.loss, got.recon + 0.5 * got.kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.kl.double(), want, rtol=1e-6, atol=1e-6)
    recon = ((images["recon_x"] - images["x"]).double() ** 2).sum(1)
    torch.testing.assert_close(got.recon.double(), recon, rtol=1e-6, atol=1e-6)


def test_draws_inside_and_outside_of_a_graph():
    """Odd seeds stand for a graph that is captured."""
    zeros = torch.zeros(9)
    seeds = range(6)
    for seed in seeds:
        z = reparameterize(zeros, zeros, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(z, drawn((9,), seed))
    assert {draw_seed(torch.Generator().manual_seed(seed)) % 2 for seed in seeds} == {0, 1}


def test_many_elements():
    """More than a row's 2^24, and so many that a block of a real device takes several tiles."""
    n = (1 << 24) + 5
    mu = torch.linspace(-2, 2, n)[None]
    logvar = mu.flip(1)
    want = fastvae.reference.kl_normal(mu.double(), logvar.double())
    torch.testing.assert_close(kl_normal(mu, logvar).double(), want, rtol=1e-6, atol=0)
    z = reparameterize(mu, logvar, eps=mu)
    torch.testing.assert_close(z, torch.addcmul(mu, (logvar / 2).exp(), mu), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["kl_normal", "sample_and_kl", "vae_loss"])
def test_more_samples_than_blocks_that_take_chunks(op):
    tensors = latents((530, 1028))
    want = fastvae.reference.kl_normal(
        **{k: t.double() for k, t in tensors.items()}, reduction="sample"
    )
    if op == "vae_loss":
        tensors |= inputs("reconstruction_loss", (530, 1028))
    result = getattr(fastvae, op)(**tensors, reduction="sample")
    got = result if op == "kl_normal" else result[-1]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_whole_packs_that_are_not_aligned(dtype):
    """Each row but the first begins between two packs."""
    mu, logvar = latents((9, 2057), dtype).values()
    got = kl_normal(mu[:, :2056], logvar[:, :2056], reduction="sample")
    want = kl_normal(mu[:, :2056].contiguous(), logvar[:, :2056].contiguous(), reduction="sample")
    assert torch.equal(got, want)


def test_places_of_elements_beyond_32_bits():
    """Of tensors that no test has the time to go through."""
    rng = np.random.default_rng(0)
    for rows, columns in itertools.product((2, 1 << 20, (1 << 30) + 1), (4, 12, 1000, 65_532)):
        for at in [0, rows * columns - 4, *rng.integers(0, rows * columns, 20)]:
            row, column = torch.ops.fastvae_emulation.place(rows, columns, int(at) // 4)
            assert (row, column) == divmod(int(at) // 4 * 4, columns)
    for at in (0, (1 << 24) - 4, 1 << 24, (1 << 33) + 8):  # a single row
        row, column = torch.ops.fastvae_emulation.place(1, 1 << 34, at // 4)
        assert (row << 24) + column == at
