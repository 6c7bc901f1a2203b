"""The ops of fastvae in plain PyTorch: the specification that people read and what ``fastvae verify`` compares with.

Each function has the signature of its fused namesake and is written in its numerically best plain form, so that in
float64 it can serve as the truth. The fused functions document the arguments and check them; these do neither. Sources:
Kingma & Welling, *Auto-Encoding Variational Bayes* (2014), equation 10 and appendix B, for the sample and for
KL(N(mu, sigma^2) || N(0, 1)); the KL between two Gaussians is the same integral with the prior's moments.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple, tree_map_only

from fastvae.likelihoods import Likelihood, LogisticMixture, parse

__all__ = [
    "VAELossOutput",
    "aggregate_posterior",
    "kl_decomposition",
    "kl_normal",
    "kl_one_sample",
    "mixture_log_prob",
    "normal_log_prob",
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


Clamp = tuple[float, float] | None


def _reduce(
    value: Tensor, reduction: str, weight: Tensor | None = None, batch_dims: int = 1
) -> Tensor:
    count: Tensor | int = value.numel()
    if weight is not None:
        value, count = value * weight, weight.sum()
    if reduction == "none":
        return value
    if reduction == "sample":  # unsqueezed so that [B] has an event to sum over
        return value.unsqueeze(-1).flatten(batch_dims).sum(batch_dims)
    if reduction == "sum":
        return value.sum()
    if reduction == "mean":
        return value.sum() / count
    if reduction == "batchmean":
        return value.sum() / value.shape[0]
    if reduction == "latent":
        return value.sum(0) / value.shape[0]
    if reduction == "channel":
        return value.transpose(0, 1).flatten(1).sum(1) / value.shape[0]
    raise ValueError(f"unknown reduction {reduction!r}")


def _weighted(weight: Tensor, x: Tensor, *inputs: object) -> list[Any]:
    """The weight of each element of x, and the inputs with 1, which every formula takes, where that is 0.

    That goes before the formula, since afterwards NaN times 0 is NaN, in gradients too.
    """
    weight = weight.detach().expand_as(x)
    off = weight == 0
    # A 0-dim parameter is left alone: it belongs to all elements, and would become one for each.
    kept = tree_map_only(Tensor, lambda t: torch.where(off, 1, t) if t.dim() else t, inputs)
    return [weight, *kept]


def _logvar(given: Tensor, scale: str, clamp: Clamp = None) -> Tensor:
    if scale != "logvar":
        given = 2 * (torch.log(given) if scale == "sigma" else given)
    return given if clamp is None else given.clamp(*clamp)


def _sample(
    mu: Tensor,
    given: Tensor,
    scale: str,
    clamp: Clamp,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    if eps is None:
        eps = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    direct = scale == "sigma" and clamp is None
    sigma = given if direct else torch.exp(0.5 * _logvar(given, scale, clamp))
    return mu + sigma * eps.to(mu.dtype), eps


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    scale: str = "logvar",
    clamp: Clamp = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_eps: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """z = mu + sigma * eps with sigma = exp(logvar / 2) and eps ~ N(0, 1)."""
    z, eps = _sample(mu, logvar, scale, clamp, eps, generator)
    return (z, eps) if return_eps else z


def kl_normal(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: Clamp = None,
    reduction: str = "batchmean",
    batch_dims: int = 1,
    free_bits: float = 0.0,
    free_bits_per: str = "latent",
    weight: Tensor | None = None,
) -> Tensor:
    """KL(N(mu, exp logvar) || N(mu_p, exp logvar_p)) in nats; without a prior, N(0, 1).

    With d = logvar - logvar_p it is 0.5 * (exp(d) - 1 - d + (mu - mu_p)^2 / exp(logvar_p)). Free bits: Kingma et al.,
    *Improving variational inference with inverse autoregressive flow* (2016), appendix C.
    """
    if weight is not None:
        weight, mu, logvar, mu_p, logvar_p = _weighted(weight, mu, mu, logvar, mu_p, logvar_p)
    logvar = _logvar(logvar, scale, clamp)
    if mu_p is None and logvar_p is None:
        value = 0.5 * (torch.expm1(logvar) - logvar + mu.square())
    elif mu_p is None or logvar_p is None:
        raise ValueError("a prior has both mu_p and logvar_p")
    else:
        logvar_p = _logvar(logvar_p, scale)
        d = logvar - logvar_p
        scaled = (mu - mu_p).square() * torch.exp(-logvar_p)
        value = 0.5 * (torch.expm1(d) - d + scaled)
    if free_bits and free_bits_per == "element":
        value = value.clamp(min=free_bits)
    elif free_bits:
        if free_bits_per != "latent" or reduction not in ("sum", "batchmean"):
            raise ValueError(f"no free bits for each {free_bits_per} with {reduction!r}")
        latents = _reduce(value, "none", weight).sum(0)
        total = latents.clamp(min=free_bits * len(mu)).sum()
        return total if reduction == "sum" else total / len(mu)
    return _reduce(value, reduction, weight, batch_dims)


def sample_and_kl(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: Clamp = None,
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize` and `kl_normal` of the same posterior."""
    z, _ = _sample(mu, logvar, scale, clamp, eps, generator)
    return z, kl_normal(mu, logvar, mu_p, logvar_p, scale=scale, clamp=clamp, reduction=reduction)


def reconstruction_loss(
    recon_x: Tensor,
    x: Tensor,
    *,
    likelihood: str | Likelihood = "mse",
    reduction: str = "batchmean",
    batch_dims: int = 1,
    weight: Tensor | None = None,
) -> Tensor:
    """-log p(x | recon_x) in nats, without additive constants: `fastvae.likelihoods` has the formulas."""
    form = parse(likelihood, "fastvae.reference.reconstruction_loss")
    if isinstance(form, LogisticMixture):  # a pixel has one value
        dim = form.channel_dim
        if weight is not None:
            weight = weight.detach().expand_as(x).narrow(dim, 0, 1)
            recon_x, x = (torch.where(weight == 0, 0, t) for t in (recon_x, x))
            weight = weight.squeeze(dim)
        nll = _reduce(form.nll(recon_x, x), reduction, weight, batch_dims)
        return nll / x.shape[dim] if reduction == "mean" else nll
    if weight is not None:
        weight, recon_x, x, form = _weighted(weight, x, recon_x, x, form)
    return _reduce(form.nll(recon_x, x), reduction, weight, batch_dims)


def vae_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    beta: float | Tensor = 1.0,
    likelihood: str | Likelihood = "mse",
    scale: str = "logvar",
    clamp: Clamp = None,
    reduction: str = "batchmean",
    kl_reduction: str | None = None,
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "latent",
) -> VAELossOutput:
    """recon + beta * kl: the negative ELBO when the likelihood's scale and beta agree. The weight is that of recon."""
    recon = reconstruction_loss(
        recon_x, x, likelihood=likelihood, reduction=reduction, weight=weight
    )
    kl = kl_normal(
        mu,
        logvar,
        scale=scale,
        clamp=clamp,
        reduction=kl_reduction or reduction,
        free_bits=free_bits,
        free_bits_per=free_bits_per,
    )
    return VAELossOutput(recon + beta * kl, recon, kl)


def normal_log_prob(
    z: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: Clamp = None,
    reduction: str = "sample",
    batch_dims: int = 1,
) -> Tensor:
    """log N(z; mu, exp(logvar)); without parameters log N(z; 0, 1)."""
    value = _log_density(z, mu, None if logvar is None else _logvar(logvar, scale, clamp))
    return _reduce(value, reduction, batch_dims=batch_dims)


def kl_one_sample(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: Clamp = None,
    reduction: str = "batchmean",
    batch_dims: int = 1,
) -> Tensor:
    """log q(z) - log p(z), in float64 without a second thought: the difference of two densities."""
    prior = None if logvar_p is None else _logvar(logvar_p, scale)
    value = _log_density(z, mu, _logvar(logvar, scale, clamp)) - _log_density(z, mu_p, prior)
    return _reduce(value, reduction, batch_dims=batch_dims)


def _log_density(z: Tensor, mu: Tensor | None, logvar: Tensor | None) -> Tensor:
    if mu is None or logvar is None:
        mu = logvar = z.new_zeros(())
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu).square() * torch.exp(-logvar))


def _log_densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z_il; mu_kl, exp(logvar_kl)), [..., K, L]: all pairs, in memory."""
    return _log_density(z.unsqueeze(-2), mu, logvar)


def mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None = None,
    *,
    factorized: bool = False,
) -> Tensor:
    """logsumexp_k (log_weight_k + sum_l log N(z_l; mu_kl, exp(logvar_kl))), or that for each l by itself."""
    log_prob = _log_densities(z, mu, logvar)
    weight = mu.new_zeros(len(mu)) if log_weight is None else log_weight
    if factorized:
        return torch.logsumexp(log_prob + weight.unsqueeze(-1), -2)
    return torch.logsumexp(log_prob.sum(-1) + weight, -1)


def _log_weights(z: Tensor, mu: Tensor, dataset_size: int, estimator: str) -> Tensor:
    """[B, K]: of the stratified estimator 1/N for the own component, (N - 1) / (N (K - 1)) for each other."""
    n, k = dataset_size, len(mu)
    if estimator == "weighted":
        return z.new_full((len(z), k), -math.log(n * k))
    if estimator != "stratified":
        raise ValueError(f"unknown estimator {estimator!r}")
    other = math.log((n - 1) / (n * (k - 1))) if k > 1 else 0.0
    own = torch.eye(len(z), k, dtype=torch.bool, device=z.device)
    return z.new_full((len(z), k), other).masked_fill(own, -math.log(n))


def aggregate_posterior(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int | None = None,
    estimator: str = "stratified",
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log q(z) and log q(z_l), q the average of the data's posteriors, estimated from a batch of them.

    Chen et al., *Isolating Sources of Disentanglement in Variational Autoencoders* (2018), appendix C.1.
    """
    if log_weight is None:
        assert dataset_size is not None
        log_weight = _log_weights(z, mu, dataset_size, estimator)
    return (
        mixture_log_prob(z, mu, logvar, log_weight),
        mixture_log_prob(z, mu, logvar, log_weight, factorized=True),
    )


def kl_decomposition(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int,
    *,
    estimator: str = "stratified",
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual information, total correlation and dimension-wise KL: Chen et al. (2018), equation 2."""
    log_qz, log_qz_dims = aggregate_posterior(
        z, mu, logvar, dataset_size=dataset_size, estimator=estimator
    )
    log_q = _log_densities(z, mu, logvar).diagonal(0, 0, 1).sum(0)
    log_prod = log_qz_dims.sum(1)
    log_p = -0.5 * (math.log(2 * math.pi) + z.square()).sum(1)
    mutual_information, total_correlation, dimension_wise_kl = (
        _reduce(term, reduction) for term in (log_q - log_qz, log_qz - log_prod, log_prod - log_p)
    )
    return mutual_information, total_correlation, dimension_wise_kl
