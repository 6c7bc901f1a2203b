"""z = mu + exp(logvar / 2) * eps: values and gradients against the oracle, and what the options do."""

from __future__ import annotations

import pytest
import torch
from accuracy import check, drawn, evaluate
from cases import (
    DTYPES,
    EMPTY_SHAPES,
    HALVES,
    MIXED,
    SHAPES,
    elementary,
    latents,
    mixed_latents,
    noise,
    seeded_generator,
)

from fastvae import reparameterize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_given_noise(shape, dtype, device):
    check("reparameterize", latents(shape, dtype, device) | {"eps": noise(shape, dtype, device)})


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_latents_of_two_dtypes(dtypes, device):
    tensors = mixed_latents((3, 513), dtypes, device, prior=False)
    check("reparameterize", tensors, seed=11)
    check("reparameterize", tensors | {"eps": noise((3, 513), torch.float16, device)})
    z, eps = reparameterize(**tensors, return_eps=True)
    assert eps.dtype == z.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_its_own_noise(shape, dtype, device):
    check("reparameterize", latents(shape, dtype, device), seed=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_device_makes_the_same_bits(dtype, device):
    """Those of the CPU's own functions, one by one."""
    mu, logvar = latents((5, 4099), dtype).values()
    logvar = logvar * 30
    eps = drawn((5, 4099), 11, dtype, device).cpu()
    sigma = elementary("exponential", logvar.numpy() / 2)
    generator = torch.Generator(device).manual_seed(11)
    z = reparameterize(mu.to(device), logvar.to(device), generator=generator)
    want = elementary("multiply_add", sigma, eps.numpy(), mu.numpy())
    assert torch.equal(z.cpu(), torch.from_numpy(want))


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(shape, device):
    check("reparameterize", latents(shape, device=device), seed=0)


@pytest.mark.parametrize("eps_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_noise_is_converted(dtype, eps_dtype):
    tensors = latents((3, 7), dtype) | {"eps": noise((3, 7), eps_dtype)}
    got = evaluate(reparameterize, tensors)
    expected = evaluate(reparameterize, tensors | {"eps": tensors["eps"].to(dtype)})
    assert got.outputs[0].dtype == dtype
    assert {k: g.dtype for k, g in got.grads.items()} == {
        "mu": dtype,
        "logvar": dtype,
        "eps": eps_dtype,
    }
    # whether the conversion rounds to mu's dtype or to that of the arithmetic is left open
    rounding = max(torch.finfo(dtype).eps, torch.finfo(eps_dtype).eps)
    tolerance = {"rtol": 2 * rounding, "atol": 4 * rounding}
    torch.testing.assert_close(got.outputs, expected.outputs, **tolerance)
    torch.testing.assert_close(got.grads, expected.grads, check_dtype=False, **tolerance)


def test_given_noise_wider_than_mu_is_rounded_once():
    eps = noise((3, 7), torch.float64)
    mu, logvar = latents((3, 7)).values()
    assert torch.equal(
        reparameterize(mu, logvar, eps=eps), reparameterize(mu, logvar, eps=eps.float())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_return_eps_gives_the_noise_that_was_used(dtype):
    mu, logvar = latents((5, 300), dtype).values()
    z, eps = reparameterize(mu, logvar, generator=seeded_generator(3), return_eps=True)
    assert (eps.dtype, eps.shape, eps.requires_grad) == (dtype, mu.shape, False)
    assert torch.equal(eps, drawn((5, 300), 3, dtype))
    assert torch.equal(z, reparameterize(mu, logvar, generator=seeded_generator(3)))
    if dtype not in HALVES:  # there the noise is used unrounded
        assert torch.equal(z, reparameterize(mu, logvar, eps=eps))


def test_return_eps_returns_a_given_one():
    mu, logvar = latents((5, 3)).values()
    eps = noise((5, 3))
    z, returned = reparameterize(mu, logvar, eps=eps, return_eps=True)
    assert torch.equal(returned, eps)
    assert torch.equal(z, reparameterize(mu, logvar, eps=eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_return_eps_with_gradients(dtype):
    tensors = latents((5, 300), dtype)
    z, eps = reparameterize(
        *(t.requires_grad_() for t in tensors.values()),
        generator=seeded_generator(3),
        return_eps=True,
    )
    assert not eps.requires_grad
    g = noise((5, 300), dtype)
    grads = torch.autograd.grad(z, list(tensors.values()), g)
    alone = evaluate(reparameterize, tensors, [g], generator=seeded_generator(3))
    assert torch.equal(grads[0], alone.grads["mu"])
    assert torch.equal(grads[1], alone.grads["logvar"])


def test_gradient_of_mu_is_the_upstream_gradient_itself():
    mu, logvar = (t.requires_grad_() for t in latents((64, 20)).values())
    g = noise((64, 20))
    d_mu, _ = torch.autograd.grad(reparameterize(mu, logvar), (mu, logvar), g)
    assert d_mu.data_ptr() == g.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_logvar_does_not_cancel_when_sigma_is_tiny(dtype):
    """Diffusion autoencoders: sigma << |mu|. From 0.5 * g * (z - mu) nothing would be left here."""
    tensors = latents((4, 100), dtype)
    tensors = {"mu": tensors["mu"] + 1000, "logvar": tensors["logvar"] - 30}
    got = check("reparameterize", tensors, seed=5)
    assert torch.equal(got.outputs[0], tensors["mu"])
    assert (got.grads["logvar"] != 0).all()
