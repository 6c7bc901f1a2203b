"""Autocast, the loss scale of float16, and bfloat16 from end to end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accuracy import to_numpy
from cases import HALVES, noise
from torch import Tensor, nn

import fastvae
import fastvae.reference
from fastvae import kl_normal, reparameterize, sample_and_kl, vae_loss

LATENTS = 6


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(40, 2 * LATENTS)
        self.decoder = nn.Linear(LATENTS, 40)

    def forward(self, x: Tensor, eps: Tensor, module: Any = fastvae) -> tuple[Tensor, ...]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return self.decoder(module.reparameterize(mu, logvar, eps=eps)), x, mu, logvar


def problem(device: str, batch: int = 32) -> tuple[VAE, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        VAE().to(device),
        noise((batch, 40), device=device),
        noise((batch, LATENTS), device=device),
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_adds_no_cast(dtype, device):
    """The ops read what the layers give, whatever its dtype, and give float32: as without autocast, to the bit."""
    model, x, eps = problem(device)
    with torch.autocast(device, dtype=dtype):
        recon_x, _, mu, logvar = model(x, eps)
        assert recon_x.dtype == mu.dtype == dtype
        inside = (*vae_loss(recon_x, x, mu, logvar, beta=0.3), kl_normal(mu, logvar))
        inside += sample_and_kl(mu, logvar, eps=eps)
        inside_grads = torch.autograd.grad(inside[0], (recon_x, mu, logvar), retain_graph=True)
    outside = (*vae_loss(recon_x, x, mu, logvar, beta=0.3), kl_normal(mu, logvar))
    outside += sample_and_kl(mu, logvar, eps=eps)
    outside_grads = torch.autograd.grad(outside[0], (recon_x, mu, logvar))
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype == (dtype if a.dim() == 2 else torch.float32)
        assert torch.equal(a, b)
    for a, b in zip(inside_grads, outside_grads, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


def gradients(model: VAE, x: Tensor, eps: Tensor, module: Any, dtype: torch.dtype, scale: float):
    """Of the parameters, by autocast to `dtype` and a loss scale that is taken out again, as GradScaler does."""
    model = copy.deepcopy(model)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast(x.device.type, dtype=dtype):
        recon_x, x, mu, logvar = model(x, eps, module)
        if module is fastvae.reference:  # what eager code has to do to keep its sums in float32
            recon_x, mu, logvar = recon_x.float(), mu.float(), logvar.float()
        loss = module.vae_loss(recon_x, x, mu, logvar, beta=0.3, reduction="mean").loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_under_a_loss_scale_are_as_exact_as_eagers(dtype, device):
    """A gradient of 2 (recon_x - x) / N is mostly below float16's smallest number before the loss scale reaches it."""
    model, x, eps = problem(device, batch=2048)
    scale = 2.0**16
    ours = gradients(model, x, eps, fastvae, dtype, scale)
    eager = gradients(model, x, eps, fastvae.reference, dtype, scale)
    wide = copy.deepcopy(model).double()
    recon_x, target, mu, logvar = wide(x.double(), eps.double(), fastvae.reference)
    loss = fastvae.reference.vae_loss(recon_x, target, mu, logvar, beta=0.3, reduction="mean").loss
    for got, plain, want in zip(
        ours, eager, torch.autograd.grad(loss, list(wide.parameters())), strict=True
    ):
        error, own = (abs(to_numpy(g) - to_numpy(want)).max() for g in (got, plain))
        assert error <= 2 * own + 4 * torch.finfo(torch.float32).eps * want.abs().max().item()


def test_a_step_whose_gradients_overflow_is_left_out(device):
    model, x, eps = problem(device)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-30)
    losses = []
    for step in range(6):
        with torch.autocast(device, dtype=torch.float16):
            loss = vae_loss(*model(x, eps), beta=0.3).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if step == 0:
            assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items())
            assert scaler.get_scale() == 2.0**10
    assert losses[0] == losses[1] > losses[2] > losses[5]


def test_bfloat16_throughout(device):
    """Model, images, noise and optimizer in bfloat16: the objective follows that of the plain expression in float64."""
    model, x, eps = problem(device)
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        recon_x, _, mu, logvar = model(x, eps)
        out = vae_loss(recon_x, x, mu, logvar, beta=0.3)
        want = fastvae.reference.vae_loss(*(t.double() for t in (recon_x, x, mu, logvar)), beta=0.3)
        torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-6, atol=0)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    z = reparameterize(mu, logvar)
    assert z.dtype == torch.bfloat16
