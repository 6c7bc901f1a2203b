"""The ops: one call for each term of a VAE's objective, or for all of it.

Shapes: B is the first dimension, everything after it is the event. Any strides are read in place. Every result but z
is float32 (float64 for float64 inputs) whatever the inputs' dtype, and the same inputs give the same bits for any number of
threads. Fused backward passes, second derivatives, ``torch.compile`` and any upstream gradient work as for torch's own ops.

Reductions: ``"sum"`` over all elements, ``"batchmean"`` (that divided by B), ``"mean"`` (divided by the number of elements, or by
the sum of the weights), ``"sample"`` (a [B] tensor, summed over the event), ``"none"`` (elementwise), ``"latent"`` (`kl_normal`: the
event's shape, mean over the batch) and ``"channel"`` (`reconstruction_loss`: [C], dimension 1, summed over all else, divided by B).
With ``batch_dims=2`` "sample" keeps two dimensions, [B, K], for K samples of each posterior. An empty batch sums to 0 and means to NaN. With time first, [T, B, L], ``"batchmean"`` divides by T and ``"sample"`` gives [T]:
give ``transpose(0, 1)`` of such tensors, which is read in place.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Generator, Tensor
from torch.compiler import is_compiling, is_exporting
from torch.onnx import is_in_onnx_export

from fastvae import _vmap, likelihoods, reference  # noqa: F401 (_vmap registers its rules)
from fastvae._ops import ops
from fastvae.likelihoods import Likelihood, LogisticMixture
from fastvae.reference import VAELossOutput

__all__ = [
    "VAELossOutput",
    "kl_normal",
    "reconstruction_loss",
    "reparameterize",
    "sample_and_kl",
    "vae_loss",
]

# Bound once, and called with positional arguments: looking an overload up, or its arguments' names, costs more than some calls.
_reparameterize = ops.reparameterize.default
_normal_like = ops._normal_like.default
_elementwise_loss = ops.elementwise_loss.default
_sample_and_kl = ops.sample_and_kl.default
_vae_loss = ops.vae_loss.default
_logistic_mixture = ops.logistic_mixture.default
# Composed of aten's ops. In compiled programs they fuse with the decoder's last layer (docs/development.md says more), and
# torch.onnx.export knows no others, and no generator. (is_exporting comes first: the other takes a microsecond.)
_reparameterize_composed = ops.reparameterize_composed.default
_elementwise_loss_composed = ops.elementwise_loss_composed.default
_sample_and_kl_composed = ops.sample_and_kl_composed.default
_vae_loss_composed = ops.vae_loss_composed.default

# An op takes one integer for all names: the formula's, the activation's and the reduction's added. Each name is read once, here.
_FORMULAS = {name: 32 * i for i, name in enumerate(ops.formulas())}
_NAMED = {
    name: _FORMULAS[one.formula]
    for name, one in likelihoods._NAMED.items()
    if one.formula in _FORMULAS
}
_ACTIVATIONS = {None: 0, "sigmoid": 8, "tanh": 16}
_SCALES = {"logvar": 0, "log_sigma": 8, "sigma": 16}
_UNCLAMPED = (-math.inf, math.inf)
_OF_BOTH = {"sum": 0, "batchmean": 1, "mean": 2, "sample": 3}
_OF_KL = _OF_BOTH | {"none": 4, "latent": 5}
_OF_RECONSTRUCTION = _OF_BOTH | {"none": 4, "channel": 6}
_KL_STANDARD, _KL_BETWEEN = _FORMULAS["kl_standard"], _FORMULAS["kl_between"]


def _choice(op: str, name: str, value: str, of: Mapping[str, int]) -> int:
    if isinstance(value, str) and value in of:
        return of[value]
    *most, last = (f'"{choice}"' for choice in of)
    need = f"{name} must be {', '.join(most)} or {last}"
    if isinstance(value, str):
        raise ValueError(f'fastvae.{op}: {need}, but got "{value}"')
    raise TypeError(f"fastvae.{op}: {need}, but got {type(value).__name__}")


def number(op: str, name: str, value: object, need: str = "a number or a 0-dim tensor") -> float:
    """A Python or NumPy number, or a 0-dim NumPy array."""
    if isinstance(value, numbers.Real) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return float(value)
    raise TypeError(f"fastvae.{op}: {name} must be {need}, but got {type(value).__name__}")


def latents(
    op: str, scale: str, clamp: tuple[float, float] | None, least: float = 0.0
) -> tuple[int, Any]:
    """The scale's part of an op's integer, and the op's numbers: no constant, no x_scale, free bits, the clamp."""
    if scale == "logvar" and clamp is None and least == 0:
        return 0, None
    code = _choice(op, "scale", scale, _SCALES)
    if clamp is not None:
        try:
            low, high = clamp
        except (TypeError, ValueError):
            raise TypeError(
                f"fastvae.{op}: clamp must be a pair (low, high) of logvar, or None, but got {clamp!r}"
            ) from None
        if not all(isinstance(bound, numbers.Real) for bound in (low, high)):
            raise TypeError(
                f"fastvae.{op}: clamp's low and high must be numbers, but got {clamp!r}"
            )
        clamp = (float(low), float(high))
        if not clamp[0] <= clamp[1]:
            raise ValueError(
                f"fastvae.{op}: clamp must be (low, high) with low <= high, but got {clamp}"
            )
    if clamp is None and least == 0:
        return code, None
    # A floor of 0 would be one: a log density is negative.
    return code, (0.0, 1.0, least or -math.inf, *(clamp or _UNCLAMPED))


def kept(op: str, reduction: str, batch_dims: int) -> int:
    """The part of an op's integer that says how many dimensions "sample" keeps."""
    if batch_dims == 1 and type(batch_dims) is int:
        return 0
    if not isinstance(batch_dims, numbers.Integral) or not 1 <= batch_dims <= 64:
        raise ValueError(
            f"fastvae.{op}: batch_dims must be an integer from 1 on, but got {batch_dims!r}"
        )
    if reduction != "sample":
        raise ValueError(
            f'fastvae.{op}: batch_dims goes with reduction="sample", but got reduction="{reduction}"'
        )
    return 1024 * (int(batch_dims) - 1)


def _likelihood(
    op: str, likelihood: str | Likelihood, recon_x: Tensor
) -> tuple[Tensor | None, Tensor | None, int, Any]:
    """The likelihood's parameters, its formula with its activation, and its numbers: constant, x_scale, no floor, no clamp, its own."""
    if type(likelihood) is str and likelihood in _NAMED:
        return None, None, _NAMED[likelihood], None
    one = likelihoods.parse(likelihood, f"fastvae.{op}")
    parameters: list[Tensor | None] = []
    for parameter in one.parameters:
        if parameter.dim() == 0:  # perhaps of a Python number
            wide = torch.float64 if recon_x.dtype == torch.float64 else torch.float32
            dtype = wide if parameter.dtype == torch.float64 else None
            parameter = parameter.to(recon_x.device, dtype)
        parameters.append(parameter)
    first, second = (*parameters, None, None)[:2]
    own = (one.constant, one.x_scale, 0.0, *_UNCLAMPED, *one.numbers)
    formula = _FORMULAS[one.formula] + _ACTIVATIONS[one.activation]
    return first, second, formula, None if own == (0.0, 1.0, 0.0, *_UNCLAMPED) else own


def _of_mixture(
    recon_x: Tensor, x: Tensor, mixture: Any, reduction: str, batch_dims: int, weight: Tensor | None
) -> Tensor:
    if is_exporting() and is_in_onnx_export():
        how: Any = {"reduction": reduction, "batch_dims": batch_dims, "weight": weight}
        return reference.reconstruction_loss(recon_x, x, likelihood=mixture, **how)
    reduced = _OF_RECONSTRUCTION[reduction] + 8 * (batch_dims - 1)
    options = (mixture.components, mixture.channel_dim, mixture.numbers, reduced)
    nll: Tensor = _logistic_mixture(recon_x, x, weight, *options)
    return nll


def _is_composed(likelihood: str | Likelihood) -> bool:
    """Whether it is handed to the compiler that is at work in aten ops; what is opaque only for ONNX."""
    opaque = isinstance(likelihood, Likelihood) and likelihood.opaque
    return is_compiling() and (not opaque or is_in_onnx_export())


def _as_tensor(values: Any, like: Tensor) -> Tensor | None:
    """For a compiler, which makes constants of an op's numbers, and inputs of those in tensor arithmetic."""
    zero = like.new_zeros((), dtype=torch.float64)
    return torch.stack([zero + value for value in values]) if values else None


def _free_bits(op: str, free_bits: float, per: str, reduction: str) -> tuple[float, bool]:
    """The least value of an element, and whether the latents have one."""
    free_bits = number(op, "free_bits", free_bits)
    if not 0 <= free_bits < math.inf:
        raise ValueError(
            f"fastvae.{op}: free_bits must be at least 0 and finite, but got {free_bits}"
        )
    if _choice(op, "free_bits_per", per, {"latent": 0, "element": 1}):
        return free_bits, False
    if free_bits > 0 and reduction not in ("batchmean", "sum"):
        raise ValueError(
            f'fastvae.{op}: free_bits for each latent need the reduction "batchmean" or "sum", but got {reduction!r}; '
            'free_bits_per="element" goes with all'
        )
    return 0.0, free_bits > 0


def _at_least(kl: Tensor, free_bits: float, batch: int, reduction: str) -> Tensor:
    """The sum over the latents, each of which counts at least `free_bits`."""
    total = torch.threshold(
        kl, free_bits, free_bits
    ).sum()  # keeps a NaN and its gradient, unlike clamp
    if reduction == "batchmean":
        return total
    return total * batch if batch else torch.zeros_like(total)


def _fields(likelihood: str | Likelihood) -> dict[str, object]:
    """The tensors of a likelihood, for `_explain`."""
    if not isinstance(likelihood, Likelihood):
        return {}
    return {f"likelihood's {name}": getattr(likelihood, name) for name in likelihood._parameters}


def _explain(op: str, error: Exception, generator: object = None, **tensors: object) -> None:
    """Names the argument that torch refused before the op saw it; the op's own checks have named theirs.

    It runs after a failure only, so that a call that succeeds pays nothing for it.
    """
    for name, value in tensors.items():
        if value is None and name not in ("recon_x", "x", "z", "mu", "logvar"):
            continue
        if not isinstance(value, Tensor):
            problem = f"must be a torch.Tensor, but got {type(value).__name__}"
        elif value.is_nested:
            problem = (
                "must be a dense tensor, but it is nested; convert it with .to_padded_tensor(0.0)"
            )
        elif value.is_quantized:
            problem = "must not be quantized; convert it with .dequantize()"
        elif type(value).__name__ == "DTensor":  # by name: importing it starts torch.distributed
            problem = (
                'must be a plain tensor, but it is a DTensor; give each rank\'s part, to_local(), with reduction="sum" '
                "and add the parts' results up"
            )
        elif value.layout is not torch.strided:
            problem = f"must be a dense (strided) tensor, but its layout is {value.layout}; convert it with .to_dense()"
        else:
            continue
        raise TypeError(f"fastvae.{op}: {name} {problem}") from error
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            f"fastvae.{op}: generator must be a torch.Generator, but got {type(generator).__name__}"
        ) from error


@overload
def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    eps: Tensor | None = None,
    generator: Generator | None = None,
    return_eps: Literal[False] = False,
) -> Tensor: ...


@overload
def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    eps: Tensor | None = None,
    generator: Generator | None = None,
    return_eps: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    eps: Tensor | None = None,
    generator: Generator | None = None,
    return_eps: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples z ~ N(mu, exp(logvar)) by the reparameterization trick: z = mu + exp(logvar / 2) * eps, eps ~ N(0, 1).

    Kingma and Welling, *Auto-Encoding Variational Bayes* (2014), section 2.4. The noise is made on the fly and never
    stored; the backward pass makes it again.

    Args:
        mu: [B, ...] mean of the posterior.
        logvar: [B, ...] natural logarithm of its variance, of mu's shape. float32, bfloat16 and float16 may be mixed; float64
            goes with float64.
        scale: what logvar is: ``"logvar"``, ``"log_sigma"`` (log of the standard deviation) or ``"sigma"``. The gradient is that
            of what was given; sigma = 0 samples mu, with finite gradients.
        clamp: (low, high): the logvar is clamped, as by `torch.clamp`, without a gradient outside.
        eps: [B, ...] the noise to use, of any floating dtype; then nothing is drawn, and its gradient flows if it wants one.
        generator: where the seed is drawn from; torch's default generator otherwise.
        return_eps: also return the noise, rounded to z's dtype (so that for a 16-bit z it gives z again only up to
            rounding).

    Returns:
        z with mu's shape and layout, in the wider of mu's and logvar's dtypes (`torch.promote_types`); or (z, eps).

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    code, own = latents("reparameterize", scale, clamp)
    # Without a formula the scale is counted down from -1.
    rare: tuple[Any, ...] = (-1 - code // 8, own) if code or own else ()
    try:
        op = _reparameterize
        if is_exporting() and is_in_onnx_export():
            op, generator = _reparameterize_composed, None
            eps = torch.randn_like(mu) if eps is None else eps
        if return_eps and eps is None:
            noise = _normal_like(mu, generator)
            z: Tensor = op(mu, logvar, noise, None, *rare)
            return z, noise.to(z.dtype)
        z = op(mu, logvar, eps, generator, *rare)
    except Exception as error:
        _explain("reparameterize", error, generator, mu=mu, logvar=logvar, eps=eps)
        raise
    return (z, eps) if return_eps and eps is not None else z


def kl_normal(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    reduction: str = "batchmean",
    batch_dims: int = 1,
    free_bits: float = 0.0,
    free_bits_per: str = "latent",
    weight: Tensor | None = None,
) -> Tensor:
    """KL divergence in nats of the posterior N(mu, exp(logvar)) from the prior N(mu_p, exp(logvar_p)), or from N(0, 1).

    For each element, with d = logvar - logvar_p: ``0.5 * (exp(d) - 1 - d + (mu - mu_p)^2 * exp(-logvar_p))``; Kingma and
    Welling (2014), appendix B, is the case of N(0, 1). Right to a few units of rounding, near the prior too.

    Args:
        mu, logvar: [B, ...] the posterior, of one shape; their dtypes may be mixed as in `reparameterize`, the prior's too.
        mu_p, logvar_p: the prior, with mu's shape. A prior [L] that the batch shares comes as
            ``.expand_as(mu)``, which is read in place.
        scale, clamp: what logvar and logvar_p are, and the bounds of the posterior's logvar, as in `reparameterize`.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"``, ``"sample"``, ``"none"`` or ``"latent"``.
        batch_dims: how many leading dimensions ``"sample"`` keeps.
        free_bits: in nats. With ``free_bits_per="latent"`` each latent's KL, mean over the batch, counts at least this much and
            has no gradient below it (Kingma et al., *Improved variational inference with inverse autoregressive flow*, 2016):
            ``max(free_bits, kl.mean(0)).sum()``; "batchmean" and "sum" only. With ``"element"`` each element does.
        weight: multiplies each element; broadcasts to mu, as in `reconstruction_loss`.

    Returns:
        A scalar, [B] (or [B, K], ...) for ``"sample"``, mu's shape for ``"none"``, its event for ``"latent"``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    least, per_latent = 0.0, False
    if type(free_bits) is not float or free_bits != 0 or free_bits_per != "latent":
        least, per_latent = _free_bits("kl_normal", free_bits, free_bits_per, reduction)
    reduced = _choice("kl_normal", "reduction", "latent" if per_latent else reduction, _OF_KL)
    formula = _KL_STANDARD if mu_p is None and logvar_p is None else _KL_BETWEEN
    code, own = latents("kl_normal", scale, clamp, least)
    loss = formula + reduced + code + kept("kl_normal", reduction, batch_dims)
    try:
        if (is_exporting() and is_in_onnx_export()) or (least and is_compiling()):
            op, own = _elementwise_loss_composed, _as_tensor(own, mu)
        else:
            op = _elementwise_loss
        kl: Tensor
        if mu_p is weight is own is None and logvar_p is None:  # each argument costs time
            kl = op(mu, logvar, loss)
        else:
            kl = op(mu, logvar, loss, mu_p, logvar_p, weight, own)
    except Exception as error:
        _explain(
            "kl_normal", error, mu=mu, logvar=logvar, mu_p=mu_p, logvar_p=logvar_p, weight=weight
        )
        raise
    return _at_least(kl, free_bits, len(mu), reduction) if per_latent else kl


def sample_and_kl(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize` and `kl_normal` of the same posterior, in one pass over the latents forward and one backward.

    Args, errors and the units of each term: theirs; reduction is ``"sum"``, ``"batchmean"``, ``"mean"`` or ``"sample"``.

    Returns:
        (z, kl): z as `reparameterize` returns it, [B, ...]; kl as `kl_normal` does, a scalar or [B]. The noise is that of
        `reparameterize` for the same seed.
    """
    reduced = _choice("sample_and_kl", "reduction", reduction, _OF_BOTH)
    formula = _KL_STANDARD if mu_p is None and logvar_p is None else _KL_BETWEEN
    code, own = latents("sample_and_kl", scale, clamp)
    rare = () if own is None else (own,)
    try:
        op = _sample_and_kl
        if is_exporting() and is_in_onnx_export():
            op, generator = _sample_and_kl_composed, None
        z, kl = op(mu, logvar, mu_p, logvar_p, eps, generator, formula + reduced + code, *rare)
    except Exception as error:
        tensors = {"mu": mu, "logvar": logvar, "mu_p": mu_p, "logvar_p": logvar_p, "eps": eps}
        _explain("sample_and_kl", error, generator, **tensors)
        raise
    return z, kl


def reconstruction_loss(
    recon_x: Tensor,
    x: Tensor,
    *,
    likelihood: str | Likelihood = "mse",
    reduction: str = "batchmean",
    batch_dims: int = 1,
    weight: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of x under the decoder's output, in nats, up to an additive constant.

    Args:
        recon_x, x: [B, ...], of one shape. float32, bfloat16 and float16 may be mixed; float64 goes with float64; x may also be
            integers (images, counts, bits). Both may want a gradient.
        likelihood: a name, ``"mse"`` (the squared error without a half, as `torch.nn.functional.mse_loss`), ``"gaussian"`` (half of
            it), ``"l1"``, ``"bce_with_logits"``, ``"bce"`` (of probabilities), ``"continuous_bernoulli"`` or ``"poisson"``; or an object
            of `fastvae.likelihoods`, whose parameters may want gradients. With a `likelihoods.LogisticMixture` recon_x has more
            channels than x, and a pixel one value: "none", "mean" and ``weight`` go by x, as it says.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"``, ``"sample"``, ``"none"`` or ``"channel"``.
        batch_dims: how many leading dimensions ``"sample"`` keeps: 2 gives [B, K], for x expanded to K samples a posterior.
        weight: a float tensor that broadcasts to x, read in place: a mask, or weights of samples ([B, 1, ...]) or channels. Each
            element's value is multiplied by it; an element of weight 0 contributes 0 and gets gradient 0 whatever its
            value, NaN included. It gets no gradient.

    Returns:
        A scalar, [B] for ``"sample"``, x's shape for ``"none"``, [C] for ``"channel"``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    reduced = _choice("reconstruction_loss", "reduction", reduction, _OF_RECONSTRUCTION)
    reduced += kept("reconstruction_loss", reduction, batch_dims)
    mixture = isinstance(likelihood, LogisticMixture)
    if not mixture:
        first, second, formula, own = _likelihood("reconstruction_loss", likelihood, recon_x)
    try:
        if mixture:
            return _of_mixture(recon_x, x, likelihood, reduction, batch_dims, weight)
        if _is_composed(likelihood) and (reduction != "none" or own or is_in_onnx_export()):
            op, own = _elementwise_loss_composed, _as_tensor(own, recon_x)
        else:
            op = _elementwise_loss
        nll: Tensor = op(recon_x, x, formula + reduced, first, second, weight, own)
    except Exception as error:
        tensors = {"recon_x": recon_x, "x": x, "weight": weight}
        _explain("reconstruction_loss", error, **tensors, **_fields(likelihood))
        raise
    return nll


def vae_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    beta: float | Tensor = 1.0,
    likelihood: str | Likelihood = "mse",
    scale: str = "logvar",
    clamp: tuple[float, float] | None = None,
    reduction: str = "batchmean",
    kl_reduction: str | None = None,
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "latent",
) -> VAELossOutput:
    """The objective of a VAE with prior N(0, 1): loss = recon + beta * kl, the negative ELBO where the scales agree.

    For a decoder N(recon_x, sigma^2) the ELBO's weights are ``likelihood="mse"`` with ``beta = 2 * sigma**2`` (then loss is
    2 sigma^2 times the negative ELBO, up to its constant), both terms with one reduction over the same batch. beta other
    than that is a beta-VAE (Higgins et al., 2017); a "mean" on one side hides such a factor.

    Args:
        recon_x, x, likelihood, weight: the decoder's output and its target, as in `reconstruction_loss`.
        mu, logvar, scale, clamp, free_bits, free_bits_per: the posterior, as in `kl_normal`; the event's shape is its own.
        beta: weight of the KL: a number (Python's or NumPy's), or a 0-dim tensor on the inputs' device, which can be
            annealed in place under a CUDA graph. No gradient is computed for it.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"`` or ``"sample"``. B is the first dimension, so for tensors with time
            first give their ``transpose(0, 1)``.
        kl_reduction: the KL's, if it is another one; "sample" goes with "sample" only.

    Returns:
        VAELossOutput(loss, recon, kl), all three differentiable: scalars, or [B] for ``"sample"``; float32, or float64 where
        the images or the latents are (loss: where either is).

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    beta_tensor = None
    if isinstance(beta, Tensor):
        beta, beta_tensor = 1.0, beta
    elif type(beta) is not float:
        beta = number("vae_loss", "beta", beta)
    reduced = _choice("vae_loss", "reduction", reduction, _OF_BOTH)
    kl_reduction = reduction if kl_reduction is None else kl_reduction
    kl_reduced = _choice("vae_loss", "kl_reduction", kl_reduction, _OF_BOTH)
    if (reduced == 3) != (kl_reduced == 3):
        raise ValueError(
            f'fastvae.vae_loss: "sample" goes with "sample" only, but got reduction="{reduction}" and '
            f'kl_reduction="{kl_reduction}"'
        )
    least, per_latent = 0.0, False
    if type(free_bits) is not float or free_bits != 0 or free_bits_per != "latent":
        least, per_latent = _free_bits("vae_loss", free_bits, free_bits_per, kl_reduction)
    code, of_kl = latents("vae_loss", scale, clamp, least)
    kl_loss = _KL_STANDARD + kl_reduced + code
    mixture = isinstance(likelihood, LogisticMixture)
    if not mixture:
        first, second, formula, own = _likelihood("vae_loss", likelihood, recon_x)
    try:
        if per_latent or mixture or (is_compiling() and not _is_composed(likelihood)):
            recon = reconstruction_loss(
                recon_x, x, likelihood=likelihood, reduction=reduction, weight=weight
            )
            bits: Any = {"free_bits": free_bits, "free_bits_per": free_bits_per}
            kl = kl_normal(mu, logvar, scale=scale, clamp=clamp, reduction=kl_reduction, **bits)
        elif is_compiling():
            given = (recon_x, x, mu, logvar, formula + reduced, kl_loss, 1.0, first, second)
            own_numbers = (_as_tensor(own, recon_x), _as_tensor(of_kl, mu))
            recon, kl = _vae_loss_composed(*given, weight, *own_numbers, beta_tensor)
        else:
            rare: tuple[Any, ...] = ()  # each argument costs time
            if not first is weight is own is of_kl is beta_tensor is None:
                rare = (first, second, weight, own, of_kl, beta_tensor)
            return VAELossOutput(
                *_vae_loss(recon_x, x, mu, logvar, formula + reduced, kl_loss, beta, *rare)
            )
        # beta stays out of the op, which would be compiled again for each new number, or go on with an old one. In float64,
        # as in the kernel: beta is not rounded by itself.
        loss = recon.double() + (beta if beta_tensor is None else beta_tensor) * kl.double()
        return VAELossOutput(loss.to(torch.promote_types(recon.dtype, kl.dtype)), recon, kl)
    except Exception as error:
        tensors = {"recon_x": recon_x, "x": x, "mu": mu, "logvar": logvar}
        more = {"beta": beta_tensor, "weight": weight}
        _explain("vae_loss", error, **tensors, **more, **_fields(likelihood))
        raise


def refuse_torchscript(op: str) -> None:
    raise RuntimeError(
        f"fastvae.{op}: torch.jit.script cannot compile it; use torch.jit.trace, torch.export or torch.compile"
    )
