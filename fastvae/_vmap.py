"""torch.vmap: each op as one call over the whole of a batch of V, and noise as the ``randomness`` flag asks for it.

A rule gets its tensors with the vmapped dimension where `in_dims` says (None: not vmapped). It first calls the op with Meta
tensors of the shapes that the user sees, so that the op's own checks speak of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae._ops import ops

_Dims = Sequence[int | None]
_functorch: Any = torch._C._functorch


def _meta(t: Any, dim: int | None = None) -> Any:
    if not isinstance(t, Tensor):
        return t
    shape = [n for i, n in enumerate(t.shape) if i != dim]
    return torch.empty(shape, dtype=t.dtype, device="meta")


def _stacked(
    info: Any, in_dims: _Dims, tensors: Sequence[Any], rank: int | None = None
) -> list[Any]:
    """[V, B, ...] each; what is not vmapped is expanded, and read in place all the same. What broadcasts gets ones up to
    the `rank` of the others.
    """

    def stacked(t: Tensor, dim: int | None) -> Tensor:
        t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        missing = 0 if rank is None else rank + 1 - t.dim()
        return t.reshape(t.shape[0], *[1] * missing, *t.shape[1:]) if missing else t

    return [None if t is None else stacked(t, d) for t, d in zip(tensors, in_dims, strict=False)]


_SUM, _BATCHMEAN, _MEAN, _SAMPLE, _NONE, _LATENT, _CHANNEL = range(7)  # fastvae/functional.py


def _reduced(value: Tensor, reduction: int, weight: Tensor | None) -> Tensor:
    """Elements [V, B, ...], reduced for each of the V by itself. "sample" + 8 k keeps k dimensions more."""
    if reduction % 8 == _SAMPLE:
        over = list(range(reduction // 8 + 2, value.dim()))
        return value.sum(over, dtype=torch.float64).to(value.dtype) if over else value
    if reduction == _NONE:
        return value
    kept = {_CHANNEL: (0, 2), _LATENT: (0, *range(2, value.dim()))}.get(reduction, (0,))
    over = [d for d in range(value.dim()) if d not in kept]
    total = value.sum(over, dtype=torch.float64) if over else value.double()
    if reduction == _MEAN and weight is not None:
        total = total / weight.expand(value.shape).sum(over, dtype=torch.float64)
    elif reduction == _MEAN:
        total = total / value[0].numel()
    elif reduction in (_BATCHMEAN, _CHANNEL, _LATENT):
        total = total / value.shape[1]
    return total.to(value.dtype)


def _loss(
    info: Any, in_dims: _Dims, tensors: Sequence[Any], loss: int, numbers: Any, rank: int
) -> Tensor:
    """Of a, b, c, d, the weight and e."""
    a, b, *rest, e = stacked = _stacked(info, in_dims, tensors, rank)
    value = ops.elementwise_loss(a, b, loss % 1024 - loss % 8 + _NONE, *rest, numbers, e)
    return _reduced(value, loss % 8 + loss // 1024 * 8, stacked[4])


def _rank(t: Tensor, dim: int | None) -> int:
    return t.dim() - (dim is not None)


def _elementwise_loss_rule(info: Any, in_dims: _Dims, *arguments: Any) -> Any:
    ops.elementwise_loss(*map(_meta, arguments, in_dims))
    a, b, loss, c, d, weight, numbers, e = (*arguments, *[None] * 5)[:8]
    dims = (*in_dims, *[None] * 5)
    dims = (*dims[:2], *dims[3:6], dims[7])
    return _loss(info, dims, (a, b, c, d, weight, e), loss, numbers, _rank(a, dims[0])), 0


def _reparameterize_rule(
    info: Any,
    in_dims: _Dims,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    *options: Any,
) -> Any:
    tensors = (mu, logvar, eps)
    ops.reparameterize(*map(_meta, tensors, (*in_dims, None)), None, *options)
    return ops.reparameterize(*_stacked(info, in_dims, tensors), None, *options), 0


def _sample_and_kl_rule(
    info: Any,
    in_dims: _Dims,
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None,
    logvar_p: Tensor | None,
    eps: Tensor | None,
    generator: torch.Generator | None,
    loss: int,
    numbers: Any = None,
) -> Any:
    tensors = (mu, logvar, mu_p, logvar_p, eps)
    *parameters, noise = map(_meta, tensors, in_dims)
    ops.sample_and_kl(*parameters, noise, None, loss, numbers)
    stacked = _stacked(info, in_dims, tensors)
    z = ops.reparameterize(stacked[0], stacked[1], stacked[4], None, -1 - loss // 8 % 4, numbers)
    dims = (*in_dims[:4], None, None)
    kl = _loss(info, dims, (*tensors[:4], None, None), loss, numbers, _rank(mu, in_dims[0]))
    return (z, kl), (0, 0)


def _vae_loss_rule(info: Any, in_dims: _Dims, *arguments: Any) -> Any:
    ops.vae_loss(*map(_meta, arguments, in_dims))
    recon_x, x, mu, logvar, loss, kl_loss, beta, *rest = (*arguments, *[None] * 6)[:13]
    (c, d, weight, numbers, kl_numbers, beta_tensor), dims = rest, (*in_dims, *[None] * 6)
    rank, image_dims = _rank(recon_x, dims[0]), (*dims[:2], *dims[7:10], None)
    recon = _loss(info, image_dims, (recon_x, x, c, d, weight, None), loss, numbers, rank)
    rank, latents = _rank(mu, dims[2]), (mu, logvar, *[None] * 4)
    kl = _loss(info, (*dims[2:4], *[None] * 4), latents, kl_loss, kl_numbers, rank)
    scale: float | Tensor = beta
    if beta_tensor is not None:  # [] or [V], beside a KL of [V] or [V, B]
        whole = kl.dim() == 1 or dims[12] is None
        scale = (beta_tensor if whole else beta_tensor.unsqueeze(1)).double()
    # added in float64 and rounded once, as the kernel does
    total = (recon.double() + scale * kl.double()).to(torch.promote_types(recon.dtype, kl.dtype))
    return (total, recon, kl), (0, 0, 0)


def _logistic_mixture_rule(
    info: Any,
    in_dims: _Dims,
    recon_x: Tensor,
    x: Tensor,
    weight: Tensor | None,
    components: int,
    channel_dim: int,
    numbers: Sequence[float],
    reduction: int,
) -> Any:
    tensors = (recon_x, x, weight)
    seen = [_meta(t, dim) for t, dim in zip(tensors, in_dims, strict=False)]
    ops.logistic_mixture(*seen, components, channel_dim, numbers, reduction)
    stacked = _stacked(info, in_dims, tensors, seen[0].dim())
    dim = channel_dim % seen[0].dim() + 1
    value = ops.logistic_mixture(*stacked, components, dim, numbers, _NONE)
    weights = None if weight is None else stacked[2].select(dim, 0)
    loss = _reduced(value, reduction, weights)
    return (loss / stacked[1].shape[dim] if reduction == _MEAN else loss), 0


def _pairwise_rule(info: Any, in_dims: _Dims, *arguments: Any) -> Any:
    """One call after the other: the components differ, or a batch dimension more of z would have done."""
    tensors, options = arguments[:4], arguments[4:]
    if info.batch_size == 0:
        one = ops.pairwise(*map(_meta, tensors, (*in_dims, None)), *options)
        return tuple(tensors[0].new_empty((0, *t.shape), dtype=t.dtype) for t in one), (0, 0, 0)
    results = [
        ops.pairwise(*parts, *options)
        for parts in zip(
            *(
                [t] * info.batch_size if dim is None else t.unbind(dim)
                for t, dim in zip(tensors, in_dims, strict=False)
            ),
            strict=True,
        )
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)


def _multivariate_normal_rule(
    info: Any, in_dims: _Dims, mu: Tensor, scale_tril: Tensor, eps: Tensor | None, reduction: int
) -> Any:
    tensors = (mu, scale_tril, eps)
    ops.multivariate_normal(*map(_meta, tensors, in_dims), reduction)
    stacked = _stacked(info, in_dims, tensors)
    sample, kept = reduction % 8 == _SAMPLE, reduction // 8  # of vmaps inside of this one
    z, kl = ops.multivariate_normal(*stacked, _SAMPLE + 8 * (kept + 1))
    if reduction == _MEAN:
        kl = _reduced(kl, _SUM, None) / stacked[0][0].numel()
    elif not sample:
        kl = _reduced(kl, reduction, None)
    return (z if eps is not None else z.expand(info.batch_size, 0), kl), (0, 0)


_rules: list[tuple[Callable[..., Any], str]] = [
    (_reparameterize_rule, "reparameterize"),
    (_elementwise_loss_rule, "elementwise_loss"),
    (_sample_and_kl_rule, "sample_and_kl"),
    (_logistic_mixture_rule, "logistic_mixture"),
    (_vae_loss_rule, "vae_loss"),
    (_pairwise_rule, "pairwise"),
    (_multivariate_normal_rule, "multivariate_normal"),
]
for _rule, _name in _rules:
    torch.library.register_vmap(f"fastvae::{_name}", _rule)


# Drawing inside of vmap. A rule as above is not even called where no argument is vmapped, but the flag counts there too; these
# kernels are called whenever vmap is the transform at hand.


def _below_vmap(*keys: str) -> Any:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, keys[0]))
    for key in keys[1:]:
        excluded = excluded | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return torch._C._ExcludeDispatchKeyGuard(excluded)


def _normal_like_in_vmap(
    like: Tensor, generator: torch.Generator | None = None, draw: int = 0
) -> Tensor:
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    vmap: Any = retrieve_current_functorch_interpreter()
    randomness, level = vmap.randomness(), vmap.level()
    if randomness == "error":
        raise RuntimeError(
            'vmap: fastvae draws noise here, but randomness="error" (the default) forbids that; give vmap '
            'randomness="different" or "same", or give the op eps'
        )
    value, dim = _functorch._unwrap_batched(like, level)
    with _below_vmap("FuncTorchVmapMode", "FuncTorchBatched"):
        if randomness == "same":
            one = value if dim is None else value.select(dim, 0)
            return ops._normal_like(one, generator)  # type: ignore[no-any-return]
        every = (
            value.expand(vmap.batch_size(), *value.shape) if dim is None else value.movedim(dim, 0)
        )
        return _functorch._add_batch_dim(  # type: ignore[no-any-return]
            ops._normal_like(every, generator), 0, level
        )


def _reparameterize_in_vmap(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    *options: Any,
) -> Any:
    if eps is None:
        eps, generator = ops._normal_like(mu, generator), None
    with _below_vmap("FuncTorchVmapMode"):
        return ops.reparameterize(mu, logvar, eps, generator, *options)


def _sample_and_kl_in_vmap(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None,
    logvar_p: Tensor | None,
    eps: Tensor | None,
    generator: torch.Generator | None,
    loss: int,
    numbers: Any = None,
) -> Any:
    if eps is None:
        eps, generator = ops._normal_like(mu, generator), None
    with _below_vmap("FuncTorchVmapMode"):
        return ops.sample_and_kl(mu, logvar, mu_p, logvar_p, eps, generator, loss, numbers)


_library = torch.library.Library("fastvae", "FRAGMENT")
_library.impl("_normal_like", _normal_like_in_vmap, "FuncTorchVmapMode")
_library.impl("reparameterize", _reparameterize_in_vmap, "FuncTorchVmapMode")
_library.impl("sample_and_kl", _sample_and_kl_in_vmap, "FuncTorchVmapMode")
