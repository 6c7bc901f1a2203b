"""The objectives of well-known projects, as arguments of `fastvae.vae_loss`, and what their beta amounts to.

In what follows SSE, L1, BCE and KL are sums over a batch of B samples: of the squared errors, the absolute errors, the binary
cross-entropies, and the KL divergences from N(0, 1). Every objective of a squared error can be written as a constant times::

    0.5 * SSE / B + beta_eff * KL / B.

`effective_beta` tells beta_eff: the variance sigma^2 of the Gaussian decoder for which the objective is the negative ELBO. A
recipe is named after the project and gives the number that the project's own lines give::

    recipe = recipes.pytorch_vae(kld_weight=0.00025)
    loss = recipe.factor * vae_loss(recon_x, x, mu, logvar, **recipe.options).loss
    recipes.effective_beta(pixels=3 * 64 * 64, latents=128, **recipe.options)  # 1.536
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Normal

from fastvae.likelihoods import Gaussian, Laplace, Likelihood, LogisticMixture, parse
from fastvae.pairwise import kl_decomposition, mixture_log_prob

__all__ = [
    "Options",
    "Recipe",
    "beta_tcvae_terms",
    "diffusers",
    "disentangling_vae",
    "effective_beta",
    "first_column_log_weight",
    "gather_posteriors",
    "latent_diffusion",
    "lerobot_act",
    "lightning_bolts",
    "mmd",
    "nvae",
    "pythae",
    "pytorch_examples",
    "pytorch_vae",
    "scvi",
    "sigma_vae",
    "vdvae",
]


class Options(TypedDict):
    """Keyword arguments of `fastvae.vae_loss`."""

    beta: float
    likelihood: str | Likelihood
    reduction: str
    kl_reduction: str


class Recipe(NamedTuple):
    """The project's objective is ``factor * vae_loss(recon_x, x, mu, logvar, **options).loss``."""

    options: Options
    factor: float = 1.0


# A checkpoint with one, as Lightning's save_hyperparameters makes it, loads under weights_only.
torch.serialization.add_safe_globals([Recipe])


def pytorch_examples() -> Recipe:
    """``vae/main.py`` of pytorch/examples: BCE + KL; recon_x is behind the sigmoid."""
    return Recipe(Options(beta=1.0, likelihood="bce", reduction="sum", kl_reduction="sum"))


def pythae(beta: float = 1.0, reconstruction_loss: str = "mse") -> Recipe:
    """pythae's ``VAE``, and ``BetaVAE`` with its ``beta``: 0.5 SSE / B + beta KL / B, or with "bce" BCE / B + beta KL / B."""
    names = {"mse": "gaussian", "bce": "bce"}
    likelihood = _choice("pythae", "reconstruction_loss", reconstruction_loss, names)
    return Recipe(_batchmean(beta, likelihood))


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


def disentangling_vae(beta: float = 4.0, rec_dist: str = "bernoulli") -> Recipe:
    """disentangling-vae's ``BetaHLoss``, for images in [0, 1]: E / B + beta KL / B.

    E is BCE with ``rec_dist="bernoulli"``, L1 with "laplace" and 255 SSE with "gaussian", which takes the squared error of images
    in [0, 255] and divides it by 255. While its ``linear_annealing`` goes on, beta is ``beta * anneal``.
    """
    names = {"bernoulli": "bce", "laplace": "l1", "gaussian": "mse"}
    likelihood = _choice("disentangling_vae", "rec_dist", rec_dist, names)
    factor = 255.0 if likelihood == "mse" else 1.0
    return Recipe(_batchmean(beta / factor, likelihood), factor)


def diffusers(kl_scale: float = 1e-6) -> Recipe:
    """The autoencoder training script of diffusers without its perceptual and adversarial terms: SSE / B + kl_scale KL / B."""
    return Recipe(_batchmean(kl_scale, "mse"))


def latent_diffusion(logvar: Tensor, kl_weight: float = 1e-6) -> Recipe:
    """latent diffusion's ``LPIPSWithDiscriminator`` without its perceptual and adversarial terms.

    It is the sum of |recon_x - x| / exp(logvar) + logvar over the batch, divided by B, + kl_weight KL / B. ``logvar`` is its
    parameter, a learned scalar that starts at 0: it is a Laplace distribution's log-scale. With the perceptual loss p, [B, 1, 1, 1],
    add ``C * H * W * p.sum() * torch.exp(-logvar) / B`` for images [B, C, H, W].
    """
    return Recipe(_batchmean(kl_weight, Laplace(logvar)))


def sigma_vae(log_sigma: Tensor) -> Recipe:
    """sigma-VAE: the sum of -log N(x; recon_x, sigma^2) + KL, where log sigma = softclip(log_sigma, -6).

    For its "sigma_vae" ``log_sigma`` is a parameter; for its "optimal_sigma_vae" it is half of the logarithm of the batch's mean
    squared error, with its gradient. The latter without the soft limit, as in the paper, is
    ``likelihoods.optimal_gaussian(recon_x, x) + kl_normal(mu, logvar, reduction="sum")``. Make the recipe anew in each step.
    """
    likelihood = Gaussian(2 * (F.softplus(log_sigma + 6) - 6), full=True)
    return Recipe(Options(beta=1.0, likelihood=likelihood, reduction="sum", kl_reduction="sum"))


@contextmanager
def scvi() -> Iterator[None]:
    """Inside it scvi-tools' models make their likelihoods and KL divergences with fastvae: train a model in it as before.

    ::

        with recipes.scvi():
            model = scvi.model.SCVI(adata)
            model.train()

    scvi.distributions' NegativeBinomial and ZeroInflatedNegativeBinomial are `fastvae.distributions`' there, and
    torch.distributions.kl_divergence of two Normals is `fastvae.kl_normal`. Both are looked up in each step; nothing of a model
    is changed, so one that was trained inside is used, saved and trained on outside as any other.
    """
    try:
        import scvi.distributions as theirs
    except ModuleNotFoundError as error:
        what = f"fastvae.recipes.scvi: cannot import {error.name!r}"
        raise ModuleNotFoundError(f"{what}; pip install scvi-tools") from error

    from fastvae import distributions as ours
    from fastvae.functional import kl_normal

    plain_kl = torch.distributions.kl_divergence

    def kl_divergence(q: Distribution, p: Distribution) -> Tensor:
        if isinstance(q, Normal) and isinstance(p, Normal) and q.loc.dim() > 0:
            loc, scale = torch.broadcast_tensors(p.loc, p.scale)
            if loc.shape == q.loc.shape:
                logvar = 2 * torch.log(q.scale)
                return kl_normal(q.loc, logvar, loc, 2 * torch.log(scale), reduction="none")
        return plain_kl(q, p)

    replaced = [(torch.distributions, "kl_divergence", kl_divergence)]
    names = ("NegativeBinomial", "ZeroInflatedNegativeBinomial")
    replaced += [(theirs, name, getattr(ours, name)) for name in names]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def lerobot_act(kl_weight: float = 10.0) -> Recipe:
    """LeRobot's ``ACTPolicy``: the mean of |error| over actions that are not padding, + kl_weight KL / B.

    The mask comes with the batch: give ``vae_loss`` the ``weight=(~action_is_pad).unsqueeze(-1).float()``. A batch of nothing but
    padding has no mean: that is NaN here and 0 there.
    """
    return Recipe(
        Options(beta=kl_weight, likelihood="l1", reduction="mean", kl_reduction="batchmean")
    )


def vdvae(pixels: int, components: int = 10, low_bit: bool = False) -> Recipe:
    """openai/vdvae: (the mixture of logistics' negative log-likelihood + KL) / (B D), in nats a dimension.

    recon_x is what its ``DmolNet`` makes, [B, H, W, 10 K], and x its target, [B, H, W, 3] in [-1, 1]; ``pixels`` is D = 3 H W.
    With ``low_bit`` a pixel has 32 values. Its KL is a sum over many layers: add their `kl_normal` up.
    """
    likelihood = LogisticMixture(components, channel_dim=-1, bins=32 if low_bit else 256)
    return Recipe(_batchmean(1.0, likelihood), 1 / pixels)


def nvae(kl_coeff: float = 1.0, components: int = 10, bits: int = 8) -> Recipe:
    """NVLabs/NVAE with ``DiscMixLogistic``: (the mixture's negative log-likelihood + kl_coeff KL) / B.

    recon_x is [B, 10 K, H, W] and x in [0, 1]. Its last bin begins at 0.99. ``kl_coeff`` is its annealed weight; while that is
    below 1 NVAE weighs the KLs of its groups as well.
    """
    likelihood = LogisticMixture(components, bins=2**bits, x_range=(0.0, 1.0), edges=(-0.999, 0.99))
    return Recipe(_batchmean(kl_coeff, likelihood))


def _batchmean(beta: float, likelihood: str | Likelihood) -> Options:
    return Options(
        beta=beta, likelihood=likelihood, reduction="batchmean", kl_reduction="batchmean"
    )


def effective_beta(
    pixels: int,
    latents: int,
    *,
    beta: float = 1.0,
    likelihood: str | Likelihood = "mse",
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
        ValueError: a likelihood that is no squared error, an unknown reduction, "sample" beside another reduction, or batch
            missing where it matters.
    """
    op = "fastvae.recipes.effective_beta"
    if pixels < 1 or latents < 1:
        raise ValueError(
            f"{op}: pixels and latents must be at least 1, but got {pixels} and {latents}"
        )
    form = parse(likelihood, op)
    if form.formula not in _SQUARED_ERRORS:
        why = "has a scale of its own" if form.parameters else "belongs to no Gaussian decoder"
        raise ValueError(
            f'{op}: likelihood must be a squared error ("mse" or "gaussian"), but got {likelihood!r:.80}, which {why}; '
            'there beta = 1 gives the negative ELBO, if both terms have one reduction other than "mean"'
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
    return kl_weight / (_SQUARED_ERRORS[form.formula] * _weight(reduction, pixels, batch))


# beta-TCVAE ------------------------------------------------------------------------------------------


def first_column_log_weight(
    batch: int, dataset_size: int, device: torch.device | str | None = None
) -> Tensor:
    """The [B, B] log-weights of the stratified estimate as beta-tcvae's code has them, and what took them over.

    The own sample's weight 1/N belongs on the diagonal, as `fastvae.kl_decomposition` has it. There it is in the first column
    (the code steps through the flattened matrix by B where the diagonal lies B + 1 apart), and in the second column is what
    the paper's matrix has beside the diagonal, (N - B + 1) / (N (B - 1)): the first sample of a batch stands for all.
    """
    n, m = dataset_size, batch - 1
    if m < 2 or n < batch:
        raise ValueError(
            "fastvae.recipes.first_column_log_weight: needs a batch of at least 3 samples, and a dataset_size of at least the "
            f"batch's, but got {batch} and {dataset_size}"
        )
    weight = torch.full((batch, batch), 1 / m, device=device)
    weight[:, 0] = 1 / n
    weight[:, 1] = weight[m - 1, 0] = (n - m) / (n * m)
    return weight.log()


def beta_tcvae_terms(
    project: str, z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, *, mss: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(mutual information, total correlation, dimension-wise KL), means over the batch, with a project's own weights.

    Use them to go on with what such a code has trained. `fastvae.kl_decomposition` has the estimates as the paper means them.

    Args:
        project:
            * ``"beta_tcvae"``, the paper's code. Loss: -log p(x|z) + mi + beta tc + (1 - lamb) dim. With ``mss`` its weights
              are `first_column_log_weight`; without (its default) the weighted estimate, which is right as it stands.
            * ``"pythae"``, ``BetaTCVAE``: recon + alpha mi + beta tc + gamma dim. The same weights; ``use_mss`` is its default.
            * ``"disentangling_vae"``, ``BtcvaeLoss``: recon + alpha mi + beta tc + anneal gamma dim. It adds the same
              log-weights before it sums over the latents, so that they count L times in log q(z). Without ``mss`` it has none at
              all, not 1 / (N B).
            * ``"pytorch_vae"``, ``BetaTCVAE``: recon / B + alpha mi + beta tc + anneal gamma dim: as disentangling_vae. N is its
              ``batch / M_N``.
        z, mu, logvar: [B, L], B of at least 3.
        mss: the stratified estimate; otherwise the weighted one.
    """
    once = {"beta_tcvae": True, "pythae": True, "disentangling_vae": False, "pytorch_vae": False}
    added_once = _choice("beta_tcvae_terms", "project", project, once)
    if added_once and not mss:
        return kl_decomposition(z, mu, logvar, dataset_size, estimator="weighted")
    batch, latents = z.shape
    dtype = torch.promote_types(z.dtype, torch.float32)
    log_weight = first_column_log_weight(batch, dataset_size, z.device).to(dtype)
    log_weight = log_weight if mss else torch.zeros_like(log_weight)
    log_qz = mixture_log_prob(z, mu, logvar, log_weight * (1 if added_once else latents))
    log_prod = mixture_log_prob(z, mu, logvar, log_weight, factorized=True).sum(1)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    log_q = -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 * torch.exp(-logvar)).sum(1)
    log_p = -0.5 * (math.log(2 * math.pi) + z**2).sum(1)
    return (log_q - log_qz).mean(), (log_qz - log_prod).mean(), (log_prod - log_p).mean()


def gather_posteriors(mu: Tensor, logvar: Tensor, group: Any = None) -> tuple[Tensor, Tensor]:
    """All ranks' mu and logvar, [B, L] each on a rank, with gradients: [world B, L], this rank's own first.

    With DistributedDataParallel each rank then estimates q(z) from the batch of all of them::

        z = reparameterize(mu, logvar)
        terms = kl_decomposition(z, *recipes.gather_posteriors(mu, logvar), dataset_size)

    DDP's mean over the ranks of such a loss has the gradients of one process with the whole batch. All ranks need the same B. The
    backward pass sums what all ranks' losses say of a rank's posteriors.
    """
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as collectives

    group = dist.group.WORLD if group is None else group
    own = dist.get_rank(group)

    def gathered(t: Tensor) -> Tensor:
        every = collectives.all_gather_tensor_autograd(t.contiguous(), 0, group)
        return torch.roll(every, -own * len(t), 0)

    return gathered(mu), gathered(logvar)


# MMD -------------------------------------------------------------------------------------------------


def mmd(
    z: Tensor,
    prior_z: Tensor,
    *,
    kernel: str = "imq",
    bandwidth: float = 1.0,
    scales: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
) -> Tensor:
    """The squared maximum mean discrepancy of samples from the posterior and from the prior, as pythae's ``WAE_MMD`` and ``INFOVAE_MMD``
    have it.

    ``k(z, z') off the diagonal / (B (B - 1)) + the same of prior_z - 2 k(z, prior_z) / B^2``, each summed over its pairs (Tolstikhin
    et al., *Wasserstein Auto-Encoders*, 2018). Distances come from one matrix product, [B, B], where pythae makes
    [B, B, L] differences: 3 to 265 times faster on a CPU. They cancel where samples are much closer to each other than
    to 0: there the error is some 1e-7 |z|^2.

    Args:
        z, prior_z: [B, L] each, B of at least 2; float32 or float64.
        kernel: ``"imq"``, the sum over the scales s of s C / (s C + |z - z'|^2), or ``"rbf"``, exp(-|z - z'|^2 / C); with
            C = 2 L bandwidth^2.

    Returns:
        A scalar. It may be negative: the estimate has no bias.
    """
    if kernel not in ("imq", "rbf"):
        raise ValueError(f'fastvae.recipes.mmd: kernel must be "imq" or "rbf", but got {kernel!r}')
    if z.shape != prior_z.shape or z.dim() != 2 or len(z) < 2:
        raise ValueError(
            "fastvae.recipes.mmd: z and prior_z must be of one shape [B, L] with B of at least 2, but got "
            f"{list(z.shape)} and {list(prior_z.shape)}"
        )
    batch, latents = z.shape
    base = 2.0 * latents * bandwidth**2

    def total(x: Tensor, y: Tensor, own: bool) -> Tensor:
        """k over all pairs; of x with itself, without the diagonal."""
        norms = x.square().sum(1, keepdim=True) + y.square().sum(1)
        squares = torch.addmm(norms, x, y.T, alpha=-2).clamp(min=0)
        if own:
            squares = squares.masked_fill(
                torch.eye(batch, dtype=torch.bool, device=x.device), math.inf
            )
        if kernel == "rbf":
            return torch.exp(-squares / base).sum()
        return sum((s * base / (s * base + squares)).sum() for s in scales)  # type: ignore[return-value]

    wide = torch.promote_types(torch.promote_types(z.dtype, prior_z.dtype), torch.float32)
    z, prior_z = z.to(wide), prior_z.to(wide)
    with torch.autocast(z.device.type, enabled=False):  # the products need their digits
        own = total(z, z, True) + total(prior_z, prior_z, True)
        return own / (batch * (batch - 1)) - 2 * total(z, prior_z, False) / batch**2


# How many halves of a squared error a formula counts. ("gaussian" has unit variance.)
_SQUARED_ERRORS = {"mse": 2, "gaussian": 1}


def _weight(reduction: str, elements: int, batch: int) -> float:
    """Of a term that is summed over a sample and averaged over the batch."""
    return {"sum": batch, "mean": 1 / elements}.get(reduction, 1.0)


def _choice(recipe: str, name: str, value: str, of: Mapping[str, Any]) -> Any:
    if value not in of:
        need = " or ".join(f'"{choice}"' for choice in of)
        raise ValueError(f"fastvae.recipes.{recipe}: {name} must be {need}, but got {value!r}")
    return of[value]
