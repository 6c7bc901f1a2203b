"""Importance weighted bounds: several samples of each posterior, and the logarithm of the mean of their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.densities import kl_one_sample
from fastvae.functional import reconstruction_loss
from fastvae.likelihoods import Likelihood, parse

__all__ = ["importance_log_weight", "iwae_loss"]


def importance_log_weight(
    recon_x: Tensor,
    x: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    likelihood: str | Likelihood = "mse",
    estimator: str = "iwae",
) -> Tensor:
    """log w = log p(x | z) + log p(z) - log q(z | x) in nats, for K samples z of each posterior; the prior is N(0, 1).

    x, mu and logvar are read in place, not repeated::

        z = reparameterize(mu.unsqueeze(1).expand(-1, K, -1), logvar.unsqueeze(1).expand(-1, K, -1))
        log_weight = importance_log_weight(decoder(z), x, z, mu, logvar, likelihood="bce_with_logits")
        iwae_loss(log_weight)

    Args:
        recon_x: [B, K, ...] the decoder's output for each sample.
        x: [B, ...] its target.
        z: [B, K, ...] the samples.
        mu, logvar: [B, ...] the posterior.
        likelihood: as for `fastvae.reconstruction_loss`; the bound is on log p(x) itself if it has ``full=True``, or no constant.
        estimator: ``"iwae"``, or ``"dreg"``: then log q(z | x) gives mu and logvar no gradient, as `iwae_loss` needs it.

    Returns:
        [B, K]; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    op = "fastvae.importance_log_weight"
    _check_estimator(op, estimator)
    parameters = parse(likelihood, op).parameters
    for name, value in (("recon_x", recon_x), ("x", x), ("z", z), ("mu", mu), ("logvar", logvar)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, but got {type(value).__name__}")
    for name, value, one_name, one in (
        ("recon_x", recon_x, "x", x),
        ("z", z, "mu", mu),
        ("z", z, "logvar", logvar),
    ):
        fits = value.dim() == one.dim() + 1 > 1 and value.shape[0] == one.shape[0]
        # recon_x may be the parameters of a likelihood with other channels than x: reconstruction_loss knows.
        if not fits or (name == "z" and value.shape[2:] != one.shape[1:]):
            raise ValueError(
                f"{op}: {name} must be [B, K, ...] beside {one_name} [B, ...], but got {list(value.shape)} and "
                f"{list(one.shape)}"
            )
    samples = recon_x.shape[1]
    if samples != z.shape[1]:
        raise ValueError(
            f"{op}: recon_x and z must have one number of samples, but got {samples} and {z.shape[1]}"
        )
    for parameter in parameters:
        if parameter.dim() == x.dim() and parameter.shape[0] != 1:
            raise ValueError(
                f"{op}: a parameter of the likelihood must broadcast to recon_x {list(recon_x.shape)}, but got "
                f"{list(parameter.shape)}; if its first dimension is the batch, give .unsqueeze(1)"
            )
    if estimator == "dreg":
        mu, logvar = mu.detach(), logvar.detach()
    repeated = x.unsqueeze(1).expand(-1, samples, *x.shape[1:])
    nll = reconstruction_loss(
        recon_x, repeated, likelihood=likelihood, reduction="sample", batch_dims=2
    )
    kl = kl_one_sample(z, mu.unsqueeze(1), logvar.unsqueeze(1), reduction="sample", batch_dims=2)
    return -(nll + kl)


def iwae_loss(log_weight: Tensor, *, estimator: str = "iwae", z: Tensor | None = None) -> Tensor:
    """The negative importance weighted bound -log(mean of K weights) in nats, a mean over the batch.

    ``"iwae"``: Burda, Grosse and Salakhutdinov, *Importance weighted autoencoders* (2016); with K = 1 the negative
    ELBO. ``"dreg"``: the same value, with the doubly reparameterized gradient of Tucker et al., *Doubly reparameterized
    gradient estimators for Monte Carlo objectives* (2019): the posterior gets the gradient through z alone, weighted
    by the squares of the normalized weights, and does not drown in its noise as K grows. It needs log weights made with
    ``estimator="dreg"``, and z, whose gradient it scales (all that goes through z in that backward pass: use z for nothing else).

    Args:
        log_weight: [B, K], from `importance_log_weight`.
        estimator: ``"iwae"`` or ``"dreg"``.
        z: [B, K, ...] the samples, for ``"dreg"``.

    Returns:
        A scalar of log_weight's dtype.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, and what would.
    """
    op = "fastvae.iwae_loss"
    _check_estimator(op, estimator)
    if not isinstance(log_weight, Tensor) or log_weight.dim() != 2 or log_weight.shape[1] == 0:
        got: object = (
            list(log_weight.shape) if isinstance(log_weight, Tensor) else type(log_weight).__name__
        )
        raise (ValueError if isinstance(log_weight, Tensor) else TypeError)(
            f"{op}: log_weight must be a tensor [B, K], K of at least 1, but got {got}"
        )
    if estimator == "dreg":
        if not isinstance(z, Tensor) or z.shape[:2] != log_weight.shape:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f'{op}: "dreg" needs z, the samples [B, K, ...] beside log_weight {list(log_weight.shape)}, but got {got}'
            )
        if z.requires_grad:
            share = torch.softmax(log_weight.detach(), 1).reshape(
                *log_weight.shape, *[1] * (z.dim() - 2)
            )
            z.register_hook(lambda gradient: gradient * share.to(gradient.dtype))
    return (math.log(log_weight.shape[1]) - torch.logsumexp(log_weight, 1)).mean()


def _check_estimator(op: str, estimator: str) -> None:
    if estimator not in ("iwae", "dreg"):
        raise ValueError(f'{op}: estimator must be "iwae" or "dreg", but got {estimator!r}')
