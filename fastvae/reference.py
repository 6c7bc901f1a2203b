"""The ops of fastvae in plain PyTorch: the specification that people read and what ``fastvae verify`` compares with.

Each function has the signature of its fused namesake and is written in its numerically best plain form, so that in
float64 it can serve as the truth. The fused functions document the arguments and check them; these do neither. Sources:
Kingma & Welling, *Auto-Encoding Variational Bayes* (2014), equation 10 and appendix B, for the sample and for
KL(N(mu, sigma^2) || N(0, 1)); the KL between two Gaussians is the same integral with the prior's moments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

__all__ = [
    "VAELossOutput",
    "kl_normal",
    "reconstruction_loss",
    "reparameterize",
    "sample_and_kl",
    "vae_loss",
]


class VAELossOutput(NamedTuple):
    """What `vae_loss` returns: ``loss = recon + beta * kl``; it unpacks like a tuple."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


# torch.export.save writes the name of what a program returns, and asks for it here.
_register_namedtuple(VAELossOutput, serialized_type_name="fastvae.VAELossOutput")
# A checkpoint with one loads under weights_only.
torch.serialization.add_safe_globals([VAELossOutput])


def _reduce(value: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return value
    if reduction == "sample":
        return (
            value.unsqueeze(-1).flatten(1).sum(1)
        )  # unsqueezed so that [B] has an event to sum over
    if reduction == "sum":
        return value.sum()
    if reduction == "mean":
        return value.mean()
    if reduction == "batchmean":
        return value.sum() / value.shape[0]
    raise ValueError(f"unknown reduction {reduction!r}")


def _sample(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if eps is None:
        eps = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    return mu + torch.exp(0.5 * logvar) * eps.to(mu.dtype), eps


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_eps: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """z = mu + sigma * eps with sigma = exp(logvar / 2) and eps ~ N(0, 1)."""
    z, eps = _sample(mu, logvar, eps, generator)
    return (z, eps) if return_eps else z


def kl_normal(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(N(mu, exp logvar) || N(mu_p, exp logvar_p)) in nats; without a prior, N(0, 1).

    With d = logvar - logvar_p it is 0.5 * (exp(d) - 1 - d + (mu - mu_p)^2 / exp(logvar_p)).
    """
    if mu_p is None and logvar_p is None:
        return _reduce(0.5 * (torch.expm1(logvar) - logvar + mu.square()), reduction)
    if mu_p is None or logvar_p is None:
        raise ValueError("a prior has both mu_p and logvar_p")
    d = logvar - logvar_p
    scaled = (mu - mu_p).square() * torch.exp(-logvar_p)
    return _reduce(0.5 * (torch.expm1(d) - d + scaled), reduction)


def sample_and_kl(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize` and `kl_normal` of the same posterior."""
    z, _ = _sample(mu, logvar, eps, generator)
    return z, kl_normal(mu, logvar, mu_p, logvar_p, reduction=reduction)


def reconstruction_loss(
    recon_x: Tensor, x: Tensor, *, likelihood: str = "mse", reduction: str = "batchmean"
) -> Tensor:
    """Squared error ("mse") or half of it ("gaussian": -log N(x; recon_x, 1) up to its constant)."""
    value = (recon_x - x).square()
    if likelihood == "gaussian":
        value = 0.5 * value
    elif likelihood != "mse":
        raise ValueError(f"unknown likelihood {likelihood!r}")
    return _reduce(value, reduction)


def vae_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    beta: float | Tensor = 1.0,
    likelihood: str = "mse",
    reduction: str = "batchmean",
    kl_reduction: str | None = None,
) -> VAELossOutput:
    """recon + beta * kl: the negative ELBO when the likelihood's scale and beta agree."""
    recon = reconstruction_loss(recon_x, x, likelihood=likelihood, reduction=reduction)
    kl = kl_normal(mu, logvar, reduction=kl_reduction or reduction)
    return VAELossOutput(recon + beta * kl, recon, kl)
