"""What only a CUDA device has: streams, graphs, several devices, synchronisation, memory and launches.

All other tests run there too: ``pytest --device cuda``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import OUTPUTS, TOP_BIT, evaluate
from cases import DTYPES, inputs, latents, noise, vae_inputs
from torch import Tensor

import fastvae
from fastvae import kl_normal, reconstruction_loss, reparameterize, sample_and_kl, vae_loss
from fastvae.random import philox_normal

pytestmark = pytest.mark.cuda
OPS = list(OUTPUTS)
CUDA = torch.device("cuda", 0)
SLACK = (
    64 << 10
)  # bytes for what does not grow with the inputs: partial sums, scalars, the noise's state


def leaves(
    op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    tensors = inputs(op, shape, dtype, CUDA)
    tensors.pop("eps", None)
    return {k: t.requires_grad_(k != "x") for k, t in tensors.items()}


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def first_loss(op: str, tensors: dict[str, Tensor]) -> Tensor:
    """What a training step would call backward on."""
    outputs = outputs_of(getattr(fastvae, op)(**tensors))
    return outputs[0].float().sum() if op in ("reparameterize", "sample_and_kl") else outputs[0]


# The noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_noise_is_the_cpus(dtype):
    for seed, offset, start in ((0, 0, 0), (2**62 + 3, 2**40, 5), (-1, 7, 2**33 + 2)):
        there, here = (
            philox_normal(10_007, seed=seed, offset=offset, start=start, dtype=dtype, device=device)
            for device in (CUDA, "cpu")
        )
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("shape", [(3, 5), (64, 20), (129, 4099)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_draw_is_the_generators_seed_and_offset(shape, dtype):
    """Every draw has an offset of its own, and the backward pass finds it again."""
    mu, logvar = (t.requires_grad_() for t in latents(shape, dtype, CUDA).values())
    generator = torch.Generator(CUDA).manual_seed(11)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for _ in range(3):
        offset = generator.get_offset()
        z = reparameterize(mu, logvar, generator=generator)
        eps = philox_normal(*shape, seed=11, offset=offset | TOP_BIT, dtype=wide, device=CUDA)
        expected = reparameterize(mu, logvar, eps=eps)
        assert torch.equal(z, expected)
        g = torch.randn_like(z)
        got = torch.autograd.grad(z, [mu, logvar], g)
        want = torch.autograd.grad(expected, [mu, logvar], g)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert generator.get_offset() > offset


def test_a_draw_moves_torchs_own_generator():
    mu, logvar = latents((4, 8), device=CUDA).values()
    torch.manual_seed(3)
    first, second = reparameterize(mu, logvar), reparameterize(mu, logvar)
    torch.manual_seed(3)
    assert torch.equal(first, reparameterize(mu, logvar))
    assert not torch.equal(first, second)


# The same bits, and the CPU's numbers


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_after_run(op, dtype):
    tensors = inputs(op, (37, 4099), dtype, CUDA)
    runs = [evaluate(getattr(fastvae, op), tensors) for _ in range(3)]
    for run in runs[1:]:
        assert all(map(torch.equal, run.outputs, runs[0].outputs))
        assert all(torch.equal(run.grads[k], runs[0].grads[k]) for k in tensors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
def test_as_on_the_cpu(op, reduction):
    options = {} if op == "reparameterize" else {"reduction": reduction}
    for shape in ((5, 7), (3, 2048), (129, 3, 67), (2, 100_003)):
        tensors = inputs(op, shape)
        here = evaluate(getattr(fastvae, op), tensors, **options)
        there = evaluate(
            getattr(fastvae, op), {k: t.to(CUDA) for k, t in tensors.items()}, **options
        )
        for a, b in zip(here.outputs, there.outputs, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=2e-6, atol=1e-6)
        for k, a in here.grads.items():
            torch.testing.assert_close(there.grads[k].cpu(), a, rtol=2e-6, atol=1e-6)


# Streams and devices


@pytest.mark.parametrize("op", OPS)
def test_the_current_stream(op):
    """The inputs are written late on a stream of their own: a launch on another stream would miss them."""
    tensors = inputs(op, (64, 3000), device=CUDA)
    expected = evaluate(getattr(fastvae, op), tensors)
    stream = torch.cuda.Stream(CUDA)
    late = {k: torch.full_like(t, torch.nan) for k, t in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for k, t in late.items():
            t.copy_(tensors[k])
        got = evaluate(getattr(fastvae, op), late)
    stream.synchronize()
    assert all(map(torch.equal, got.outputs, expected.outputs))
    assert all(torch.equal(got.grads[k], expected.grads[k]) for k in tensors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_another_device_than_the_current_one(op):
    tensors = inputs(op, (17, 1000), device="cuda:1")
    with torch.cuda.device(0):
        there = evaluate(getattr(fastvae, op), tensors)
        eps = philox_normal(100, seed=1, device="cuda:1")
    here = evaluate(getattr(fastvae, op), {k: t.to(CUDA) for k, t in tensors.items()})
    assert all(o.device.index == 1 for o in there.outputs) and eps.device.index == 1
    assert all(
        torch.equal(a.cpu(), b.cpu()) for a, b in zip(there.outputs, here.outputs, strict=True)
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_generator_of_another_device_is_refused():
    mu, logvar = latents((2, 3), device=CUDA).values()
    with pytest.raises(RuntimeError, match="generator must be on mu's device"):
        reparameterize(mu, logvar, generator=torch.Generator("cuda:1"))


# No synchronisation, no memory, few launches


@pytest.fixture
def forbid_synchronisation() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op, dtype, forbid_synchronisation):
    tensors = leaves(op, (64, 500), dtype)
    options = {"beta": torch.tensor(0.3, device=CUDA)} if op == "vae_loss" else {}
    scale = torch.tensor(3.0, device=CUDA)
    forbid_synchronisation()
    for reduction in ("batchmean", "sample"):
        if op != "reparameterize":
            options["reduction"] = reduction
        for factor in (None, scale):
            outputs = outputs_of(getattr(fastvae, op)(**tensors, **options))
            loss = outputs[0].sum() if factor is None else outputs[0].sum() * factor
            loss.backward()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(op, dtype):
    """At its peak: the outputs and the gradients, and nothing else that grows with the inputs."""
    shape = (64, 65536) if op != "vae_loss" else (64, 3, 128, 128)
    tensors = leaves(op, shape, dtype)
    first_loss(op, tensors).backward()
    for t in tensors.values():
        t.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = outputs_of(getattr(fastvae, op)(**tensors))
    torch.autograd.backward(outputs[0], torch.ones_like(outputs[0]))
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(o.nbytes for o in outputs)
    # The upstream gradient of z is ours; that of mu is it, or a clone of it.
    upstream = outputs[0].nbytes if op in ("reparameterize", "sample_and_kl") else 0
    gradients = sum(t.nbytes for t in tensors.values() if t.requires_grad)
    assert peak <= results + upstream + gradients + SLACK


def launches(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels of fastvae that `call` launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    return [name for name in names if "fastvae" in name]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(4, 20), (128, 784), (64, 3, 64, 64)], ids=str)
def test_launches(op, shape):
    """One forward where a block does it all, two at most; one backward."""
    tensors = leaves(op, shape)
    whole = op == "reparameterize" or torch.Size(shape).numel() <= 4096
    with torch.no_grad():
        assert len(launches(lambda: getattr(fastvae, op)(**tensors))) == (1 if whole else 2)
    output = outputs_of(getattr(fastvae, op)(**tensors))[0]
    g = torch.ones_like(output)
    assert len(launches(lambda: torch.autograd.backward(output, g, retain_graph=True))) == 1


# Graphs


def test_a_captured_step_replays_with_fresh_noise_and_right_gradients():
    data = vae_inputs((128, 784), device=CUDA)
    mu, logvar = (data[k].clone().requires_grad_() for k in ("mu", "logvar"))
    weight = torch.randn(5, 784, device=CUDA, requires_grad=True)
    beta = torch.tensor(0.5, device=CUDA)
    x = data["x"]

    def step() -> tuple[Tensor, Tensor]:
        z = reparameterize(mu, logvar)
        loss = vae_loss(z @ weight, x, mu, logvar, beta=beta).loss
        for t in (mu, logvar, weight):
            t.grad = None
        loss.backward()
        return z, loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, loss = step()

    drawn = []
    for factor in (0.5, 2.0):  # beta is read at each replay
        beta.fill_(factor)
        graph.replay()
        torch.cuda.synchronize()
        drawn.append(z.detach().clone())
        eps = (drawn[-1] - mu.detach()) / (0.5 * logvar.detach()).exp()
        exact = [t.detach().double().requires_grad_() for t in (mu, logvar, weight)]
        m, v, w = exact
        sample = fastvae.reference.reparameterize(m, v, eps=eps.double())
        want = fastvae.reference.vae_loss(sample @ w, x.double(), m, v, beta=factor).loss
        want.backward()
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)
        for got, leaf in zip((mu, logvar, weight), exact, strict=True):
            torch.testing.assert_close(got.grad.double(), leaf.grad, rtol=1e-3, atol=1e-3)
    assert not torch.equal(*drawn)


def test_make_graphed_callables():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = torch.nn.Linear(784, 40), torch.nn.Linear(20, 784)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            mu, logvar = self.encoder(x).chunk(2, dim=1)
            z = reparameterize(mu, logvar)
            return (*vae_loss(self.decoder(z), x, mu, logvar, beta=0.1), z)

    model = Model().to(CUDA)
    x = torch.rand(128, 784, device=CUDA)
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    samples = []
    for _ in range(2):
        model.zero_grad()
        loss, recon, kl, z = graphed(x)
        loss.backward()
        samples.append(z.detach().clone())
        torch.testing.assert_close(loss, recon + 0.1 * kl)
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not torch.equal(*samples)


# Sizes


@pytest.mark.slow
def test_more_elements_than_an_int_counts():
    n = 2**31 + 8
    needed = 5 * 2 * n
    if torch.cuda.mem_get_info()[0] < needed + (2 << 30):
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    recon_x = torch.zeros(2, n // 2, dtype=torch.bfloat16, device=CUDA)
    recon_x[1, -3:] = 2
    x = torch.zeros_like(recon_x)
    x[0, 5] = 1
    recon_x.requires_grad_()
    loss = reconstruction_loss(recon_x, x, reduction="sum")
    loss.backward()
    assert loss.item() == 13
    assert recon_x.grad[1, -4:].tolist() == [0, 4, 4, 4] and recon_x.grad[0, 5].item() == -2
    assert recon_x.grad.count_nonzero().item() == 4
    per_sample = reconstruction_loss(recon_x.detach(), x, reduction="sample")
    assert per_sample.tolist() == [1, 12]
    del recon_x, x, loss
    mu = torch.zeros(2, n // 2, dtype=torch.bfloat16, device=CUDA)
    z, kl = sample_and_kl(mu, mu, reduction="sum", generator=torch.Generator(CUDA).manual_seed(5))
    tail = philox_normal(8, seed=5, start=n - 8, dtype=torch.bfloat16, device=CUDA)
    assert torch.equal(z.view(-1)[-8:], tail) and kl.item() == 0


@pytest.mark.parametrize("count", [1, 3, 8, 255, 4097, 16384, 16385, 300_001])
def test_ragged_ends_and_the_seam_of_the_single_block(count):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs("vae_loss", (1, count), dtype, CUDA)
        want = fastvae.reference.vae_loss(**{k: t.double() for k, t in tensors.items()})
        got = vae_loss(**tensors)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=0)
        eps = noise((1, count), dtype, CUDA)
        mu, logvar = latents((1, count), dtype, CUDA).values()
        z, kl = sample_and_kl(mu, logvar, eps=eps)
        wide = [t.double() for t in (mu, logvar)]
        torch.testing.assert_close(
            kl.double(), fastvae.reference.kl_normal(*wide), rtol=2e-6, atol=0
        )
        sample = fastvae.reference.reparameterize(*wide, eps=eps.double()).to(dtype)
        torch.testing.assert_close(z, sample, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_odd_addresses_fall_back_to_single_elements():
    """A slice that begins 2 or 4 bytes after a 16-byte boundary has no 16-byte accesses, and the same results."""
    for dtype in (torch.float32, torch.float16):
        t = inputs("kl_normal", (33, 128), dtype, CUDA)
        shifted = {
            k: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape) for k, v in t.items()
        }
        for reduction in ("none", "sample"):
            got = kl_normal(**shifted, reduction=reduction)
            torch.testing.assert_close(got, kl_normal(**t, reduction=reduction), rtol=1e-6, atol=0)
