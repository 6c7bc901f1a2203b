"""The objectives of well-known projects, as arguments of `fastvae.vae_loss`, and what their beta amounts to.

Every objective of a squared error and a KL divergence from N(0, 1) can be written as a constant times

    0.5 * SSE / B + beta_eff * KL / B,

SSE being the sum of squared errors over a batch of B samples and KL the sum over all its latents. `effective_beta` tells
beta_eff: the variance sigma^2 of the Gaussian decoder for which the objective is the negative ELBO. A recipe is named after the
project and gives the number that the project's own lines give::

    recipe = recipes.pytorch_vae(kld_weight=0.00025)
    loss = recipe.factor * vae_loss(recon_x, x, mu, logvar, **recipe.options).loss
    recipes.effective_beta(pixels=3 * 64 * 64, latents=128, **recipe.options)  # 1.536

Projects with another reconstruction term (cross-entropy, L1) have no recipe until that likelihood is there.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch

__all__ = [
    "Options",
    "Recipe",
    "diffusers",
    "disentangling_vae",
    "effective_beta",
    "lightning_bolts",
    "pythae",
    "pytorch_vae",
]


class Options(TypedDict):
    """Keyword arguments of `fastvae.vae_loss`."""

    beta: float
    likelihood: str
    reduction: str
    kl_reduction: str


class Recipe(NamedTuple):
    """The project's objective is ``factor * vae_loss(recon_x, x, mu, logvar, **options).loss``."""

    options: Options
    factor: float = 1.0


# A checkpoint with one, as Lightning's save_hyperparameters makes it, loads under weights_only.
torch.serialization.add_safe_globals([Recipe])


def pythae(beta: float = 1.0) -> Recipe:
    """pythae's ``VAE``, and ``BetaVAE`` with its ``beta``: 0.5 SSE / B + beta KL / B."""
    return Recipe(
        Options(beta=beta, likelihood="gaussian", reduction="batchmean", kl_reduction="batchmean")
    )


def pytorch_vae(kld_weight: float = 0.00025) -> Recipe:
    """AntixK/PyTorch-VAE's ``VanillaVAE``: SSE / (B D) + kld_weight KL / B, with D pixels in a sample.

    ``kld_weight`` is its argument ``M_N``, 0.00025 in its configuration files.
    """
    return Recipe(
        Options(beta=kld_weight, likelihood="mse", reduction="mean", kl_reduction="batchmean")
    )


def lightning_bolts(kl_coeff: float = 0.1) -> Recipe:
    """lightning-bolts' ``VAE``: SSE / (B D) + kl_coeff KL / (B L), with D pixels and L latents in a sample.

    Its own KL is the single-sample estimate log q(z) - log p(z); this is what that estimates.
    """
    return Recipe(Options(beta=kl_coeff, likelihood="mse", reduction="mean", kl_reduction="mean"))


def disentangling_vae(beta: float = 4.0) -> Recipe:
    """disentangling-vae's ``BetaHLoss`` with ``rec_dist="gaussian"``: 255 SSE / B + beta KL / B, for images in [0, 1].

    It takes the squared error of images in [0, 255] and divides it by 255.
    """
    return Recipe(
        Options(beta=beta / 255, likelihood="mse", reduction="batchmean", kl_reduction="batchmean"),
        factor=255.0,
    )


def diffusers(kl_scale: float = 1e-6) -> Recipe:
    """The autoencoder training script of diffusers without its perceptual and adversarial terms: SSE / B + kl_scale KL / B."""
    return Recipe(
        Options(beta=kl_scale, likelihood="mse", reduction="batchmean", kl_reduction="batchmean")
    )


def effective_beta(
    pixels: int,
    latents: int,
    *,
    beta: float = 1.0,
    likelihood: str = "mse",
    reduction: str = "batchmean",
    kl_reduction: str | None = None,
    batch: int | None = None,
) -> float:
    """The weight that the KL has beside 0.5 SSE, each summed over a sample: the decoder's variance sigma^2.

    Args:
        pixels: D, the elements of one sample of ``recon_x`` (channels included).
        latents: L, the elements of one sample of ``mu``.
        beta, likelihood, reduction, kl_reduction: as `fastvae.vae_loss` takes them, with the same defaults.
        batch: B, which matters only where one of the two is summed over the batch and the other is averaged.

    Raises:
        ValueError: an unknown likelihood or reduction, "sample" beside another reduction, or batch missing where it matters.
    """
    op = "fastvae.recipes.effective_beta"
    if pixels < 1 or latents < 1:
        raise ValueError(
            f"{op}: pixels and latents must be at least 1, but got {pixels} and {latents}"
        )
    if likelihood not in _SQUARED_ERRORS:
        raise ValueError(
            f'{op}: likelihood must be "mse" or "gaussian", but got {likelihood!r}; the others have no squared error'
        )
    kl_reduction = reduction if kl_reduction is None else kl_reduction
    for name, value in (("reduction", reduction), ("kl_reduction", kl_reduction)):
        if value not in ("sum", "batchmean", "mean", "sample"):
            raise ValueError(
                f'{op}: {name} must be "sum", "batchmean", "mean" or "sample", but got {value!r}'
            )
    if (reduction == "sample") != (kl_reduction == "sample"):
        raise ValueError(
            f'{op}: "sample" goes with "sample" only, but got reduction={reduction!r} and kl_reduction={kl_reduction!r}'
        )
    if (reduction == "sum") == (kl_reduction == "sum"):
        batch = 1  # it cancels
    elif batch is None:
        raise ValueError(
            f"{op}: reduction={reduction!r} with kl_reduction={kl_reduction!r} weighs one term by the batch size; "
            "give batch"
        )
    kl_weight = beta * _weight(kl_reduction, latents, batch)
    return kl_weight / (_SQUARED_ERRORS[likelihood] * _weight(reduction, pixels, batch))


# How many halves of a squared error a likelihood counts.
_SQUARED_ERRORS = {"mse": 2, "gaussian": 1}


def _weight(reduction: str, elements: int, batch: int) -> float:
    """Of a term that is summed over a sample and averaged over the batch."""
    return {"sum": batch, "mean": 1 / elements}.get(reduction, 1.0)
