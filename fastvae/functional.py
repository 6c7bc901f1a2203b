"""The ops: one call for each term of a VAE's objective, or for all of it.

Shapes: B is the first dimension, everything after it is the event. Any strides are read in place. Sums and means are
float32 (float64 for float64 inputs) whatever the inputs' dtype, and the same inputs give the same bits for any number of
threads. Fused backward passes, second derivatives, ``torch.compile`` and any upstream gradient work as for torch's own ops.

Reductions: ``"sum"`` over all elements, ``"batchmean"`` (that divided by B), ``"mean"`` (divided by the number of elements),
``"sample"`` (a [B] tensor, summed over the event) and ``"none"`` (elementwise). An empty batch sums to 0 and means to NaN.
"""

from __future__ import annotations

import numbers
from typing import Literal, overload

import torch
from torch import Generator, Tensor

from fastvae._ops import ops
from fastvae.reference import VAELossOutput

__all__ = [
    "VAELossOutput",
    "kl_normal",
    "reconstruction_loss",
    "reparameterize",
    "sample_and_kl",
    "vae_loss",
]

# Bound once: looking an overload up costs more than some of the calls.
_reparameterize = ops.reparameterize.default
_normal_like = ops._normal_like.default
_kl_normal = ops.kl_normal.default
_sample_and_kl = ops.sample_and_kl.default
_reconstruction_loss = ops.reconstruction_loss.default
_vae_loss = ops.vae_loss.default


def _check_tensors(op: str, **arguments: object) -> None:
    """Raises a TypeError for what torch would not even dispatch to the op; all else is checked by the ops themselves."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"fastvae.{op}: {name} must be a torch.Tensor, but got {type(value).__name__}"
            )
        if value.layout is not torch.strided or value.is_nested:
            raise TypeError(
                f"fastvae.{op}: {name} must be a dense (strided) tensor, but its layout is {value.layout}"
                f"{' (nested)' if value.is_nested else ''}; convert it first (to_dense, to_padded_tensor)"
            )


def _check_option(op: str, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"fastvae.{op}: {name} must be a string, but got {type(value).__name__}")


def _check_prior(op: str, mu_p: object, logvar_p: object) -> None:
    if mu_p is not None:
        _check_tensors(op, mu_p=mu_p)
    if logvar_p is not None:
        _check_tensors(op, logvar_p=logvar_p)


def _check_noise(op: str, eps: object, generator: object) -> None:
    if eps is not None:
        _check_tensors(op, eps=eps)
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            f"fastvae.{op}: generator must be a torch.Generator, but got {type(generator).__name__}"
        )


@overload
def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: Generator | None = None,
    return_eps: Literal[False] = False,
) -> Tensor: ...


@overload
def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: Generator | None = None,
    return_eps: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: Generator | None = None,
    return_eps: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples z ~ N(mu, exp(logvar)) by the reparameterization trick: z = mu + exp(logvar / 2) * eps, eps ~ N(0, 1).

    Kingma and Welling, *Auto-Encoding Variational Bayes* (2014), section 2.4. The noise is made on the fly and never
    stored; the backward pass makes it again.

    Args:
        mu: [B, ...] mean of the posterior.
        logvar: [B, ...] natural logarithm of its variance; shape and dtype of mu.
        eps: [B, ...] the noise to use, of any floating dtype; then nothing is drawn, and its gradient flows if it wants one.
        generator: where the seed is drawn from; torch's default generator otherwise.
        return_eps: also return the noise, rounded to mu's dtype.

    Returns:
        z with mu's shape, dtype and layout; or (z, eps).

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    _check_tensors("reparameterize", mu=mu, logvar=logvar)
    _check_noise("reparameterize", eps, generator)
    if eps is None and return_eps:
        noise = _normal_like(mu, generator)
        return _reparameterize(mu, logvar, eps=noise), noise.to(mu.dtype)
    z: Tensor = _reparameterize(mu, logvar, eps=eps, generator=generator)
    return (z, eps) if return_eps and eps is not None else z


def kl_normal(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    reduction: str = "batchmean",
) -> Tensor:
    """KL divergence in nats of the posterior N(mu, exp(logvar)) from the prior N(mu_p, exp(logvar_p)), or from N(0, 1).

    For each element, with d = logvar - logvar_p: ``0.5 * (exp(d) - 1 - d + (mu - mu_p)^2 * exp(-logvar_p))``; Kingma and
    Welling (2014), appendix B, is the case of N(0, 1). Right to a few units of rounding, near the prior too.

    Args:
        mu, logvar: [B, ...] the posterior, of one shape and dtype.
        mu_p, logvar_p: the prior, with mu's shape and dtype. A prior [L] that the batch shares comes as
            ``.expand_as(mu)``, which is read in place.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"``, ``"sample"`` or ``"none"``.

    Returns:
        A scalar, [B] for ``"sample"``, or mu's shape for ``"none"``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    _check_tensors("kl_normal", mu=mu, logvar=logvar)
    _check_prior("kl_normal", mu_p, logvar_p)
    _check_option("kl_normal", "reduction", reduction)
    kl: Tensor = _kl_normal(mu, logvar, mu_p, logvar_p, reduction=reduction)
    return kl


def sample_and_kl(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize` and `kl_normal` of the same posterior, in one pass over the latents forward and one backward.

    Args, errors and the units of each term: theirs, but that reduction cannot be ``"none"``.

    Returns:
        (z, kl).
    """
    _check_tensors("sample_and_kl", mu=mu, logvar=logvar)
    _check_prior("sample_and_kl", mu_p, logvar_p)
    _check_noise("sample_and_kl", eps, generator)
    _check_option("sample_and_kl", "reduction", reduction)
    z, kl = _sample_and_kl(
        mu, logvar, mu_p, logvar_p, reduction=reduction, eps=eps, generator=generator
    )
    return z, kl


def reconstruction_loss(
    recon_x: Tensor, x: Tensor, *, likelihood: str = "mse", reduction: str = "batchmean"
) -> Tensor:
    """Negative log-likelihood of x under the decoder's output, up to scale and constant.

    ``"mse"`` is the squared error (recon_x - x)^2, without a half, as in ``torch.nn.functional.mse_loss``;
    ``"gaussian"`` is half of it, the negative logarithm of N(x; recon_x, 1) in nats without its log(2 pi) / 2.

    Args:
        recon_x, x: [B, ...], of one shape. float32, bfloat16 and float16 may be mixed; float64 goes with float64. Both may
            want a gradient.
        likelihood: ``"mse"`` or ``"gaussian"``.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"``, ``"sample"`` or ``"none"``.

    Returns:
        A scalar, [B] for ``"sample"``, or x's shape for ``"none"``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    _check_tensors("reconstruction_loss", recon_x=recon_x, x=x)
    _check_option("reconstruction_loss", "likelihood", likelihood)
    _check_option("reconstruction_loss", "reduction", reduction)
    nll: Tensor = _reconstruction_loss(recon_x, x, likelihood=likelihood, reduction=reduction)
    return nll


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
    """The objective of a VAE with prior N(0, 1): loss = recon + beta * kl, the negative ELBO where the scales agree.

    For a decoder N(recon_x, sigma^2) the ELBO's weights are ``likelihood="mse"`` with ``beta = 2 * sigma**2`` (then loss is
    2 sigma^2 times the negative ELBO, up to its constant), both terms with one reduction over the same batch. beta other
    than that is a beta-VAE (Higgins et al., 2017); a "mean" on one side hides such a factor.

    Args:
        recon_x, x: [B, ...] the decoder's output and its target, as in `reconstruction_loss`.
        mu, logvar: [B, ...] the posterior, as in `kl_normal`; the event's shape is its own.
        beta: weight of the KL, a float or a 0-dim tensor on the inputs' device (so that it can be annealed in place under a
            CUDA graph); no gradient is computed for it.
        likelihood: ``"mse"`` or ``"gaussian"``.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"`` or ``"sample"``.
        kl_reduction: the KL's, if it is another one; "sample" goes with "sample" only.

    Returns:
        VAELossOutput(loss, recon, kl), all three differentiable: scalars, or [B] for ``"sample"``.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    _check_tensors("vae_loss", recon_x=recon_x, x=x, mu=mu, logvar=logvar)
    _check_option("vae_loss", "likelihood", likelihood)
    _check_option("vae_loss", "reduction", reduction)
    if kl_reduction is not None:
        _check_option("vae_loss", "kl_reduction", kl_reduction)
    if isinstance(beta, Tensor):
        weight, beta_tensor = 1.0, beta
    elif isinstance(beta, numbers.Real):
        weight, beta_tensor = float(beta), None
    else:
        raise TypeError(
            f"fastvae.vae_loss: beta must be a float or a 0-dim tensor, but got {type(beta).__name__}"
        )
    loss, recon, kl = _vae_loss(
        recon_x,
        x,
        mu,
        logvar,
        beta=weight,
        beta_tensor=beta_tensor,
        likelihood=likelihood,
        reduction=reduction,
        kl_reduction=kl_reduction,
    )
    return VAELossOutput(loss, recon, kl)
