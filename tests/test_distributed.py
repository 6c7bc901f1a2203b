"""Two processes over gloo train as one does with the whole batch and the same noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import fastvae
from fastvae import (
    kl_decomposition,
    kl_normal,
    recipes,
    reparameterize,
    sample_and_kl,
    vae_loss,
)
from fastvae.demo.model import Autoencoder
from fastvae.random import philox_normal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]
RANKS, BATCH, LATENTS, BETA = 2, 8, 4, 0.3


def in_two_processes(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `work(rank, *args)` returns in each of two processes."""
    mp.spawn(_rank, (work, str(folder), args), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    dist.barrier()  # one that left while the other is still connecting would take it down
    dist.destroy_process_group()


def problem() -> tuple[Autoencoder, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Autoencoder(torch.Size((1, 6, 6)), LATENTS).double()
    x = torch.rand(BATCH, 1, 6, 6, dtype=torch.float64)
    return model, x, torch.randn(BATCH, LATENTS, dtype=torch.float64)


def whole_batch() -> tuple[Tensor, dict[str, Tensor]]:
    model, x, eps = problem()
    loss = model(x, BETA, eps).loss
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def distributed_data_parallel(rank: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Ranks that take `cut` samples and the rest, with the weights that the README gives for shards of any size."""
    results = []
    for cut in (4, 5, 1):
        model, x, eps = problem()
        part = slice(0, cut) if rank == 0 else slice(cut, BATCH)
        trained = torch.nn.parallel.DistributedDataParallel(model)
        loss = trained(x[part], BETA, eps[part]).loss
        loss = loss * (part.stop - part.start) * RANKS / BATCH
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append((mean / RANKS, grads))
    return results


def test_ddp(tmp_path):
    want_loss, want = whole_batch()
    for results in in_two_processes(distributed_data_parallel, tmp_path):
        for loss, grads in results:
            torch.testing.assert_close(loss, want_loss)
            torch.testing.assert_close(grads, want)


def tcvae_objective(model: Autoencoder, x: Tensor, eps: Tensor, gather: bool) -> Tensor:
    """beta-TCVAE's, with the posteriors of all ranks."""
    mu, logvar = model.encode(x)
    z = reparameterize(mu, logvar, eps=eps)
    recon = fastvae.reconstruction_loss(model.decoder(z), x)
    posteriors = recipes.gather_posteriors(mu, logvar) if gather else (mu, logvar)
    mi, tc, dim = kl_decomposition(z, *posteriors, dataset_size=1000)
    return recon + mi + 6 * tc + dim


class OfTcvae(torch.nn.Module):
    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        return tcvae_objective(self.model, x, eps, gather=True)


def with_posteriors_of_all_ranks(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    model, x, eps = problem()
    mine = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    trained = torch.nn.parallel.DistributedDataParallel(OfTcvae(model))
    loss = trained(x[mine], eps[mine])
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean / RANKS, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_ddp_with_the_posteriors_of_all_ranks(tmp_path):
    model, x, eps = problem()
    want_loss = tcvae_objective(model, x, eps, gather=False)
    want_loss.backward()
    want = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    for loss, grads in in_two_processes(with_posteriors_of_all_ranks, tmp_path):
        torch.testing.assert_close(loss, want_loss.detach())
        torch.testing.assert_close(grads, want)


def fully_sharded(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    from torch.distributed.fsdp import fully_shard

    model, x, eps = problem()
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (model.encoder, model.decoder, model):
        fully_shard(module, mesh=mesh)
    mine = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    loss = model(x[mine], BETA, eps[mine]).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    grads = {}
    for name, p in model.named_parameters():
        assert isinstance(p.grad, DTensor)
        grads[name] = p.grad.full_tensor()
    return mean / RANKS, grads


def test_fsdp2(tmp_path):
    want_loss, want = whole_batch()
    for loss, grads in in_two_processes(fully_sharded, tmp_path):
        torch.testing.assert_close(loss, want_loss)
        torch.testing.assert_close(grads, want)


def draws(rank: int) -> dict[str, Tensor]:
    zeros = torch.zeros(3, 50)
    z = {}
    for name, seed in (("equal", 7), ("apart", 7 + rank)):
        torch.manual_seed(seed)
        z[name] = reparameterize(zeros, zeros)
    z["slice"] = philox_normal(3, 50, seed=11, start=150 * rank)
    return z


def test_ranks_seeded_apart_draw_apart(tmp_path):
    """And equal seeds draw alike, as torch.randn's do; the slices of one global draw make it up."""
    a, b = in_two_processes(draws, tmp_path)
    assert torch.equal(a["equal"], b["equal"])
    assert (
        abs(torch.corrcoef(torch.stack([a["apart"].flatten(), b["apart"].flatten()]))[0, 1]) < 0.4
    )
    assert torch.equal(torch.cat([a["slice"], b["slice"]]), philox_normal(6, 50, seed=11))


def of_dtensors(rank: int) -> tuple[list[str], Tensor]:
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    whole = {k: torch.randn(BATCH, 5) for k in ("recon_x", "x", "mu", "logvar")}
    parts = {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in whole.items()}
    latents = {k: parts[k].requires_grad_() for k in ("mu", "logvar")}
    messages = []
    for op in (
        lambda: vae_loss(**parts, reduction="sum"),
        lambda: kl_normal(**latents, reduction="sum"),
        lambda: reparameterize(**latents),
        lambda: sample_and_kl(whole["mu"], parts["logvar"]),
        lambda: fastvae.reconstruction_loss(parts["recon_x"].detach(), parts["x"]),
    ):
        try:
            op()
        except TypeError as error:
            messages.append(str(error))
    # what the message says to do
    total = vae_loss(**{k: t.to_local() for k, t in parts.items()}, reduction="sum").loss.detach()
    dist.all_reduce(total)
    return messages, total - vae_loss(**whole, reduction="sum").loss


def test_dtensors_are_refused_clearly(tmp_path):
    for messages, difference in in_two_processes(of_dtensors, tmp_path):
        ops = ["vae_loss: recon_x", "kl_normal: mu", "reparameterize: mu", "sample_and_kl: logvar"]
        ops.append("reconstruction_loss: recon_x")
        for message, op in zip(messages, ops, strict=True):
            assert message.startswith(f"fastvae.{op} must be a plain tensor, but it is a DTensor; ")
            assert "to_local()" in message
        assert abs(difference) < 1e-4


def test_the_demo_under_torchrun(tmp_path):
    """Shards of 8 and 9 images, and a last batch with one image, which cannot be shared."""
    pytest.importorskip("sklearn", reason="the demo extra is not installed")
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((103, 6, 6)))
    options = ["-m", "fastvae", "demo", "--data", "x.npz", "--epochs", "4", "--batch-size", "17"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    epochs = {}
    for name, command in (("one", [sys.executable]), ("two", [*torchrun, str(RANKS)])):
        done = subprocess.run(
            [*command, *options, "--out", name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test error") == 1, "one process tells, not each"
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["processes"] == (1 if name == "one" else RANKS)
        assert metrics["images"]["train"] % 17 == 1
        epochs[name] = metrics["epochs"]
    for objective, terms in epochs["one"].items():
        for term, values in terms.items():
            np.testing.assert_allclose(epochs["two"][objective][term], values, rtol=1e-5)
