"""The KL divergence of any two distributions of `torch.distributions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.distributions import kl as torch_kl

from fastvae.functional import _OF_KL, _choice, kl_normal
from fastvae.multivariate import kl_of_factors

__all__ = ["kl_divergence", "register", "unregister"]

_REDUCTIONS = {name: i for name, i in _OF_KL.items() if name != "latent"}


def kl_divergence(
    q: Distribution, p: Distribution, *, reduction: str = "sample", num_samples: int | None = None
) -> Tensor:
    """KL(q || p) in nats: in closed form where there is one, by Monte-Carlo only if ``num_samples`` is given.

    KL(q || p) = E_q[log q(z) - log p(z)] is no distance. The two directions differ: KL(N(1, 2^2) || N(0, 1)) is 1.306853, and
    KL(N(0, 1) || N(1, 2^2)) is 0.443147. It is infinite where q has mass and p has none: KL(U(0, 1) || N(0, 1)) =
    log(2 pi)/2 + 1/6 = 1.085605, but KL(N(0, 1) || U(0, 1)) is infinite.

    * Normal and Independent(Normal), with parameters of any broadcasting shapes: `fastvae.kl_normal`, which keeps its
      digits near the prior. A Normal beside an Independent, or beside a MultivariateNormal, stands for its components.
    * MultivariateNormal, also beside an Independent(Normal): as `fastvae.kl_multivariate_normal`.
    * Otherwise what is registered for `torch.distributions.kl_divergence`.
    * Otherwise, with ``num_samples``, the mean of log q(z) - log p(z) over so many samples of q. Its gradient is unbiased: it
      goes through the samples if q has ``rsample``, and through log q otherwise (the score function).

    Args:
        q, p: the posterior and the prior.
        reduction: of the result that `torch.distributions.kl_divergence` would have, an element for each distribution of the
            batch shape. ``"sample"``: [B], summed over all but the first dimension; ``"sum"``; ``"batchmean"``, divided by
            B; ``"mean"`` over the elements; ``"none"``. Without a batch dimension B is 1 and ``"sample"`` is 0-dim.
        num_samples: how many samples to draw where there is no closed form.

    Returns:
        A tensor; float32 for 16-bit Gaussians.

    Raises:
        NotImplementedError: no closed form is known, and num_samples was not given.
        TypeError, ValueError: naming the argument that does not fit, and what would.
    """
    _choice("kl_divergence", "reduction", reduction, _REDUCTIONS)
    for name, value in (("q", q), ("p", p)):
        if not isinstance(value, Distribution):
            raise TypeError(
                f"fastvae.kl_divergence: {name} must be a torch.distributions.Distribution, but got {type(value).__name__}"
            )
    if num_samples is not None and not (isinstance(num_samples, int) and num_samples > 0):
        raise ValueError(
            f"fastvae.kl_divergence: num_samples must be an integer above 0, or None, but got {num_samples!r}"
        )
    kl = _of_gaussians(q, p, reduction)
    return _reduced(_of_others(q, p, num_samples), reduction) if kl is None else kl


def _of_others(q: Distribution, p: Distribution, num_samples: int | None) -> Tensor:
    try:
        known: Tensor = torch_kl.kl_divergence(q, p)
        return known
    except NotImplementedError:
        if num_samples is None:
            raise NotImplementedError(
                f"fastvae.kl_divergence: no closed form is known for {type(q).__name__} and {type(p).__name__}; give "
                "num_samples= for a Monte-Carlo estimate"
            ) from None
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"fastvae.kl_divergence: q and p must have one event shape, but got {list(q.event_shape)} and "
            f"{list(p.event_shape)}; torch.distributions.Independent makes dimensions of the batch part of the event"
        )
    z = q.rsample((num_samples,)) if q.has_rsample else q.sample((num_samples,))
    log_q: Tensor = q.log_prob(z)
    ratio: Tensor = log_q - p.log_prob(z)
    if not q.has_rsample and log_q.requires_grad:
        # 0, whose gradient is the score function's
        ratio = ratio + torch.nan_to_num(ratio.detach()) * (log_q - log_q.detach())
    return ratio.mean(0)


def _reduced(kl: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return kl
    if reduction == "sample":
        return kl.flatten(1).sum(1) if kl.dim() > 1 else kl
    if reduction == "mean":
        return kl.mean()
    return kl.sum() / (len(kl) if reduction == "batchmean" and kl.dim() else 1)


def _of_gaussians(q: Distribution, p: Distribution, reduction: str) -> Tensor | None:
    """None where these are not two Gaussians."""
    (one, event_q), (other, event_p) = _base(q), _base(p)
    if not {type(one), type(other)} <= {Normal, MultivariateNormal}:
        return None
    event = max(event_q, event_p)
    try:
        shape: torch.Size | None = torch.broadcast_shapes(one.loc.shape, other.loc.shape)
    except RuntimeError:
        shape = None
    # A Normal without an event stands for its components.
    if shape is None or (event_q and event_p and q.event_shape != p.event_shape):
        raise ValueError(
            "fastvae.kl_divergence: q and p must have one event shape and batch shapes that broadcast, but got the events "
            f"{list(q.event_shape)} and {list(p.event_shape)}, and the batches {list(q.batch_shape)} and {list(p.batch_shape)}"
        )
    if type(one) is type(other) is Normal:
        return _of_normals(one, other, event, reduction)
    dtype = _widest([one.loc, other.loc])
    parameters = [t.to(dtype).unsqueeze(0) for d in (one, other) for t in _with_factor(d, shape)]
    dims = parameters[0].dim() - 1
    kl = kl_of_factors(*parameters, reduction="sample", batch_dims=dims).squeeze(0)
    return _reduced(kl.flatten(1 - event).sum(-1) if event > 1 else kl, reduction)


def _of_normals(q: Any, p: Any, event: int, reduction: str) -> Tensor:
    parameters = [q.loc, q.scale, p.loc, p.scale]
    dtype = _widest(parameters)
    given: tuple[Tensor, ...] = torch.broadcast_tensors(*(t.to(dtype) for t in parameters))
    batch = given[0].shape[: given[0].dim() - event]
    if not batch:
        given = tuple(t.unsqueeze(0) for t in given)
    if event and reduction == "none":
        given = tuple(t.flatten(0, -1 - event) for t in given)
        return kl_normal(*given, scale="sigma", reduction="sample").reshape(batch)
    if event and reduction == "mean":
        return kl_normal(*given, scale="sigma", reduction="sum") / batch.numel()
    kl = kl_normal(*given, scale="sigma", reduction=reduction)
    return kl if batch else kl.reshape(())


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def _with_factor(d: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    if type(d) is Normal:
        return d.loc.expand(shape), torch.diag_embed(d.scale.expand(shape))
    return d.loc.expand(shape), d.scale_tril.expand(*shape, shape[-1])


def _base(d: Any) -> tuple[Any, int]:
    """What is inside of Independents, and how many dimensions its event has."""
    event = 0
    while type(d) is Independent:
        event += d.reinterpreted_batch_ndims
        d = d.base_dist
    return d, event + (type(d) is MultivariateNormal)


_FUSED = [(Normal, Normal), (MultivariateNormal, MultivariateNormal)]
_FUSED += [(Independent, Independent), (Independent, MultivariateNormal), (MultivariateNormal, Independent)]  # fmt: skip
_replaced: dict[Any, Callable[[Any, Any], Tensor] | None] = {}


def register() -> None:
    """Makes `torch.distributions.kl_divergence` use `fastvae.kl_divergence`'s way for Gaussians, until `unregister`.

    That is for Normal, Independent(Normal) and MultivariateNormal, and for the last two beside each other, which torch does
    not know. Other Independents go on as before. Results are float32 for 16-bit parameters.
    """
    for pair in _FUSED:
        if pair not in _replaced:
            _replaced[pair] = original = torch_kl._KL_REGISTRY.get(pair)
            torch_kl.register_kl(*pair)(_with(original))


def unregister() -> None:
    """Gives torch's own functions back to `torch.distributions.kl_divergence`."""
    for pair, original in _replaced.items():
        if original is None:
            torch_kl._KL_REGISTRY.pop(pair, None)
        else:
            torch_kl._KL_REGISTRY[pair] = original
    torch_kl._KL_MEMOIZE.clear()
    _replaced.clear()


def _with(original: Callable[[Any, Any], Tensor] | None) -> Callable[[Any, Any], Tensor]:
    def kl(q: Distribution, p: Distribution) -> Tensor:
        fused = _of_gaussians(q, p, "none")
        if fused is not None:
            return fused
        if original is None:
            raise NotImplementedError(f"no KL of {q} and {p}")
        return original(q, p)

    return kl
