"""Densities under many Gaussians at once: mixtures, VampPrior, the aggregate posterior and beta-TCVAE's decomposition of the KL.

Each works on all pairs of a sample and a component, B x K x L numbers of which none is stored: memory grows as (B + K) L, forward
and backward. Results are in nats, float32 (float64 for float64 inputs); float32, bfloat16 and float16 may be mixed. All tensors
get gradients, of any order (second ones are composed of torch's ops, with all pairs in memory). In compiled programs the ops
stay what they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_exporting
from torch.onnx import is_in_onnx_export

from fastvae import _vmap  # noqa: F401 (it registers its rules)
from fastvae._ops import ops
from fastvae.functional import _choice, _explain, number

__all__ = ["aggregate_posterior", "kl_decomposition", "mixture_log_prob"]

_pairwise = ops.pairwise.default
_pairwise_composed = ops.pairwise_composed.default
# csrc/ops/pairwise.cpp
_MIXTURE, _MARGINALS, _POSTERIOR, _DECOMPOSITION = range(4)
_ESTIMATORS = {"stratified": 0, "weighted": 1}
_REDUCTIONS = {"sum": 0, "batchmean": 1, "sample": 3}


def _call(op: str, log_weight: Tensor | None, *options: Any, **tensors: Tensor) -> Any:
    function = _pairwise_composed if is_exporting() and is_in_onnx_export() else _pairwise
    try:
        return function(*tensors.values(), log_weight, *options)
    except Exception as error:
        _explain(op, error, **tensors, log_weight=log_weight)
        raise


def mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None = None,
    *,
    factorized: bool = False,
) -> Tensor:
    """The log-density of z under a mixture of K Gaussians: ``logsumexp_k(log_weight_k + sum_l log N(z_l; mu_kl, exp(logvar_kl)))``.

    With the posteriors of K pseudo-inputs as components and ``log_weight=torch.full((K,), -math.log(K))`` it is VampPrior's
    log p(z) (Tomczak and Welling, *VAE with a VampPrior*, 2018).

    Args:
        z: [..., L] where it is evaluated.
        mu, logvar: [K, L] means and logarithms of the variances of the components.
        log_weight: [K], or [..., K] for weights that differ from sample to sample. Without it each component counts 1: for a
            mixture give logarithms of weights that sum to 1 (``torch.log_softmax(logits, -1)``).
        factorized: a mixture in each dimension by itself, ``logsumexp_k(log_weight_k + log N(z_l; mu_kl, exp(logvar_kl)))``.

    Returns:
        [...], or [..., L] if factorized, in nats.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    of = _MARGINALS if factorized else _MIXTURE
    out = _call("mixture_log_prob", log_weight, 1.0, 0, of, 0, z=z, mu=mu, logvar=logvar)
    return out[1] if factorized else out[0]  # type: ignore[no-any-return]


def aggregate_posterior(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    dataset_size: int | None = None,
    estimator: str = "stratified",
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimates log q(z), q(z) the average of the posteriors q(z|x) over a data set, and its marginals log q(z_l), from a batch.

    Chen et al., *Isolating Sources of Disentanglement in Variational Autoencoders* (2018), appendix C.1. With N the data set's size:

    * ``"stratified"``: z_i's own posterior weighs 1/N, each other one (N - 1) / (N (B - 1)), so that the others stand for the rest
      of the data. It is what the paper derives as MSS. (The matrix of weights in its authors' code, and in projects
      that took it over, has the own weight in the first column instead of on the diagonal:
      `fastvae.recipes.first_column_log_weight`.)
    * ``"weighted"``: each weighs 1 / (N B) (MWS): log q(z) is low by up to log B.

    Args:
        z: [B, L] samples; z_i ~ N(mu_i, exp(logvar_i)).
        mu, logvar: [B, L] the batch's posteriors; or [K, L] with more behind them, K in place of B in the weights, as gathered from
            other ranks (`fastvae.recipes.gather_posteriors`).
        dataset_size: N, at least B.
        estimator: ``"stratified"`` or ``"weighted"``.
        log_weight: [K] or [B, K], to be used instead; then mu's rows may be anything.

    Returns:
        (log_qz, log_qz_dims): [B] and [B, L], in nats.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    which = _choice("aggregate_posterior", "estimator", estimator, _ESTIMATORS)
    if (dataset_size is None) == (log_weight is None):
        given = "neither" if dataset_size is None else "both"
        raise ValueError(
            f"fastvae.aggregate_posterior: needs dataset_size or log_weight, but got {given}"
        )
    size = _size("aggregate_posterior", 1 if dataset_size is None else dataset_size)
    log_qz, log_qz_dims, _ = _call(
        "aggregate_posterior", log_weight, size, which, _POSTERIOR, 0, z=z, mu=mu, logvar=logvar
    )
    return log_qz, log_qz_dims


def kl_decomposition(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int,
    *,
    estimator: str = "stratified",
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor, Tensor]:
    """The KL divergence from N(0, 1), averaged over the data, in the three terms that beta-TCVAE weighs, in one pass.

    Chen et al. (2018), equation 2, with log q(z) and its marginals as `aggregate_posterior` estimates them:

    * mutual information of x and z: ``log q(z|x) - log q(z)``
    * total correlation: ``log q(z) - sum_l log q(z_l)``
    * dimension-wise KL: ``sum_l (log q(z_l) - log N(z_l; 0, 1))``

    Their sum is the single-sample estimate of the KL whatever the estimator's weights. beta-TCVAE's loss is
    ``recon + mutual_information + beta * total_correlation + dimension_wise_kl``.

    Args:
        z: [B, L] samples of the batch's posteriors, with their gradient, as `fastvae.reparameterize` gives them.
        mu, logvar, dataset_size, estimator: as for `aggregate_posterior`.
        reduction: ``"batchmean"``, ``"sum"`` or ``"sample"``.

    Returns:
        (mutual_information, total_correlation, dimension_wise_kl): scalars, or [B] for ``"sample"``, in nats. Estimates may be
        negative.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """
    which = _choice("kl_decomposition", "estimator", estimator, _ESTIMATORS)
    reduced = _choice("kl_decomposition", "reduction", reduction, _REDUCTIONS)
    size = _size("kl_decomposition", dataset_size)
    terms: tuple[Tensor, Tensor, Tensor] = _call(
        "kl_decomposition", None, size, which, _DECOMPOSITION, reduced, z=z, mu=mu, logvar=logvar
    )
    return terms


def _size(op: str, value: object) -> float:
    size = number(op, "dataset_size", value, "a number")
    if not 1 <= size < float("inf"):
        raise ValueError(f"fastvae.{op}: dataset_size must be at least 1, but got {value}")
    return size
