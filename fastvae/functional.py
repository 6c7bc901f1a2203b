"""The ops: one call for each term of a VAE's objective, or for all of it.

Shapes: B is the first dimension, everything after it is the event. Any strides are read in place. Every result but z
is float32 (float64 for float64 inputs) whatever the inputs' dtype, and the same inputs give the same bits for any number of
threads. Fused backward passes, second derivatives, ``torch.compile`` and any upstream gradient work as for torch's own ops.

Reductions: ``"sum"`` over all elements, ``"batchmean"`` (that divided by B), ``"mean"`` (divided by the number of elements),
``"sample"`` (a [B] tensor, summed over the event) and ``"none"`` (elementwise; `kl_normal` and
`reconstruction_loss` only). An empty batch sums to 0 and means to NaN. With time first, [T, B, L], ``"batchmean"`` divides by
T and ``"sample"`` gives [T]: give ``transpose(0, 1)`` of such tensors, which is read in place.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Generator, Tensor
from torch.compiler import is_compiling, is_exporting
from torch.onnx import is_in_onnx_export

from fastvae import _vmap  # noqa: F401 (registers its rules)
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

# Bound once, and called with positional arguments: looking an overload up, or its arguments' names, costs more than some calls.
_reparameterize = ops.reparameterize.default
_normal_like = ops._normal_like.default
_kl_normal = ops.kl_normal.default
_sample_and_kl = ops.sample_and_kl.default
_reconstruction_loss = ops.reconstruction_loss.default
_vae_loss = ops.vae_loss.default
# In compiled programs the objective is aten's ops, which fuse with the decoder's last layer (CONTRIBUTING.md says more).
_reconstruction_loss_for_compiler = ops.reconstruction_loss_for_compiler.default
_vae_loss_for_compiler = ops.vae_loss_for_compiler.default
# torch.onnx.export knows aten's ops alone, and no generator. (is_exporting comes first: the other takes a microsecond.)
_reparameterize_for_onnx = ops.reparameterize_for_compiler.default
_kl_normal_for_onnx = ops.kl_normal_for_compiler.default
_sample_and_kl_for_onnx = ops.sample_and_kl_for_compiler.default


def _explain(
    op: str, error: Exception, tensors: Mapping[str, object], options: Mapping[str, object]
) -> None:
    """Names the argument that torch refused before the op saw it; the op's own checks have named theirs.

    It runs after a failure only, so that a call that succeeds pays nothing for it.
    """
    for name, value in tensors.items():
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
    for name, value in options.items():
        expected = Generator if name == "generator" else str
        if not isinstance(value, expected):
            raise TypeError(
                f"fastvae.{op}: {name} must be a {expected.__name__}, but got {type(value).__name__}"
            ) from error


def _given(**arguments: object) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if value is not None}


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
        logvar: [B, ...] natural logarithm of its variance, of mu's shape. float32, bfloat16 and float16 may be mixed; float64
            goes with float64.
        eps: [B, ...] the noise to use, of any floating dtype; then nothing is drawn, and its gradient flows if it wants one.
        generator: where the seed is drawn from; torch's default generator otherwise.
        return_eps: also return the noise, rounded to z's dtype (so that for a 16-bit z it gives z again only up to
            rounding).

    Returns:
        z with mu's shape and layout, in the wider of mu's and logvar's dtypes (`torch.promote_types`); or (z, eps).

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    try:
        op = _reparameterize
        if is_exporting() and is_in_onnx_export():
            op, generator = _reparameterize_for_onnx, None
            eps = torch.randn_like(mu) if eps is None else eps
        if return_eps and eps is None:
            noise = _normal_like(mu, generator)
            z: Tensor = op(mu, logvar, noise)
            return z, noise.to(z.dtype)
        z = op(mu, logvar, eps, generator)
    except Exception as error:
        tensors = {"mu": mu, "logvar": logvar, **_given(eps=eps)}
        _explain("reparameterize", error, tensors, _given(generator=generator))
        raise
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
        mu, logvar: [B, ...] the posterior, of one shape; their dtypes may be mixed as in `reparameterize`, the prior's too.
        mu_p, logvar_p: the prior, with mu's shape. A prior [L] that the batch shares comes as
            ``.expand_as(mu)``, which is read in place.
        reduction: ``"sum"``, ``"batchmean"``, ``"mean"``, ``"sample"`` or ``"none"``.

    Returns:
        A scalar, [B] for ``"sample"``, or mu's shape for ``"none"``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    try:
        for_onnx = is_exporting() and is_in_onnx_export()
        op = _kl_normal_for_onnx if for_onnx else _kl_normal
        kl: Tensor = op(mu, logvar, mu_p, logvar_p, reduction)
    except Exception as error:
        tensors = {"mu": mu, "logvar": logvar, **_given(mu_p=mu_p, logvar_p=logvar_p)}
        _explain("kl_normal", error, tensors, {"reduction": reduction})
        raise
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
        (z, kl): z as `reparameterize` returns it, [B, ...]; kl as `kl_normal` does, a scalar or [B]. The noise is that of
        `reparameterize` for the same seed.
    """
    try:
        op = _sample_and_kl
        if is_exporting() and is_in_onnx_export():
            op, generator = _sample_and_kl_for_onnx, None
        z, kl = op(mu, logvar, mu_p, logvar_p, reduction, eps, generator)
    except Exception as error:
        tensors = {"mu": mu, "logvar": logvar, **_given(mu_p=mu_p, logvar_p=logvar_p, eps=eps)}
        options = {"reduction": reduction, **_given(generator=generator)}
        _explain("sample_and_kl", error, tensors, options)
        raise
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
    try:
        compiling = is_compiling() and (reduction != "none" or is_in_onnx_export())
        op = _reconstruction_loss_for_compiler if compiling else _reconstruction_loss
        nll: Tensor = op(recon_x, x, likelihood, reduction)
    except Exception as error:
        options = {"likelihood": likelihood, "reduction": reduction}
        _explain("reconstruction_loss", error, {"recon_x": recon_x, "x": x}, options)
        raise
    return nll


def number(op: str, name: str, value: object) -> float:
    """A Python or NumPy number, or a 0-dim NumPy array."""
    if isinstance(value, numbers.Real) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return float(value)
    raise TypeError(
        f"fastvae.{op}: {name} must be a number or a 0-dim tensor, but got {type(value).__name__}"
    )


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
        beta: weight of the KL: a number (Python's or NumPy's), or a 0-dim tensor on the inputs' device, which can be
            annealed in place under a CUDA graph. No gradient is computed for it.
        likelihood: ``"mse"`` or ``"gaussian"``.
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
    try:
        if is_compiling():
            # beta stays out of the op, which would be compiled again for each new number, or go on with an old one.
            recon, kl = _vae_loss_for_compiler(
                recon_x, x, mu, logvar, beta_tensor, likelihood, reduction, kl_reduction
            )
            weight = beta if beta_tensor is None else beta_tensor
            # In float64, as in the kernel: beta is not rounded by itself.
            loss = recon.double() + weight * kl.double()
            loss = loss.to(torch.promote_types(recon.dtype, kl.dtype))
        else:
            loss, recon, kl = _vae_loss(
                recon_x,
                x,
                mu,
                logvar,
                beta,
                beta_tensor,
                likelihood,
                reduction,
                kl_reduction,
            )
    except Exception as error:
        tensors = {
            "recon_x": recon_x,
            "x": x,
            "mu": mu,
            "logvar": logvar,
            **_given(beta=beta_tensor),
        }
        options = {
            "likelihood": likelihood,
            "reduction": reduction,
            **_given(kl_reduction=kl_reduction),
        }
        _explain("vae_loss", error, tensors, options)
        raise
    return VAELossOutput(loss, recon, kl)


def refuse_torchscript(op: str) -> None:
    raise RuntimeError(
        f"fastvae.{op}: torch.jit.script cannot compile it; use torch.jit.trace, torch.export or torch.compile"
    )


_ops: list[Any] = [reparameterize, kl_normal, sample_and_kl, reconstruction_loss, vae_loss]
for _op in _ops:
    # torch.jit.script calls this before it reads a function.
    _op.__prepare_scriptable__ = partial(refuse_torchscript, _op.__name__)
