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


def _stacked(info: Any, in_dims: _Dims, tensors: Sequence[Any]) -> list[Any]:
    """[V, B, ...] each; what is not vmapped is expanded, and read in place all the same."""
    return [
        t
        if t is None
        else t.expand(info.batch_size, *t.shape)
        if dim is None
        else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]


def _reduced(op: Any, tensors: Sequence[Any], reduction: str) -> Tensor:
    """`op`, a function of tensors [V, B, ...] and a reduction, reduced for each of the V by itself."""
    if reduction == "none":
        result: Tensor = op(*tensors, reduction)
        return result
    batch, *event = tensors[0].shape[1:]
    if reduction == "sample":
        rows = [t if t is None else t.flatten(0, 1) for t in tensors]
        return op(*rows, reduction).unflatten(0, (-1, batch))  # type: ignore[no-any-return]
    count = {"sum": 1, "batchmean": batch, "mean": batch * torch.Size(event).numel()}[reduction]
    return op(*tensors, "sample") / count  # type: ignore[no-any-return]


def _kl(tensors: Sequence[Any], reduction: str) -> Tensor:
    return _reduced(ops.kl_normal, tensors, reduction)


def _reconstruction(tensors: Sequence[Any], likelihood: str, reduction: str) -> Tensor:
    def op(recon_x: Tensor, x: Tensor, reduction: str) -> Any:
        return ops.reconstruction_loss(recon_x, x, likelihood, reduction)

    return _reduced(op, tensors, reduction)


def _reparameterize_rule(
    info: Any,
    in_dims: _Dims,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    tensors = (mu, logvar, eps)
    ops.reparameterize(*map(_meta, tensors, (*in_dims, None)))
    return ops.reparameterize(*_stacked(info, in_dims, tensors)), 0


def _kl_normal_rule(
    info: Any,
    in_dims: _Dims,
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    reduction: str = "batchmean",
) -> Any:
    tensors = (mu, logvar, mu_p, logvar_p)
    dims = (*in_dims, None, None)[:4]
    ops.kl_normal(*map(_meta, tensors, dims), reduction)
    return _kl(_stacked(info, dims, tensors), reduction), 0


def _sample_and_kl_rule(
    info: Any,
    in_dims: _Dims,
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    tensors = (mu, logvar, mu_p, logvar_p, eps)
    # in_dims has an entry for the reduction as well, and stops at the last argument given
    dims = (*in_dims[:4], *(None,) * (4 - len(in_dims)), *in_dims[5:6], None)[:5]
    *parameters, noise = map(_meta, tensors, dims)
    ops.sample_and_kl(*parameters, reduction, noise)
    *stacked, noise = _stacked(info, dims, tensors)
    z = ops.reparameterize(stacked[0], stacked[1], noise)
    return (z, _kl(stacked, reduction)), (0, 0)


def _reconstruction_loss_rule(
    info: Any,
    in_dims: _Dims,
    recon_x: Tensor,
    x: Tensor,
    likelihood: str = "mse",
    reduction: str = "batchmean",
) -> Any:
    tensors = (recon_x, x)
    ops.reconstruction_loss(*map(_meta, tensors, in_dims), likelihood, reduction)
    return _reconstruction(_stacked(info, in_dims, tensors), likelihood, reduction), 0


def _vae_loss_rule(
    info: Any,
    in_dims: _Dims,
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    beta: float = 1.0,
    beta_tensor: Tensor | None = None,
    likelihood: str = "mse",
    reduction: str = "batchmean",
    kl_reduction: str | None = None,
) -> Any:
    tensors = (recon_x, x, mu, logvar)
    beta_dim = in_dims[5] if len(in_dims) > 5 else None
    ops.vae_loss(
        *map(_meta, tensors, in_dims),
        beta,
        _meta(beta_tensor, beta_dim),
        likelihood,
        reduction,
        kl_reduction,
    )
    stacked = _stacked(info, in_dims, tensors)
    recon = _reconstruction(stacked[:2], likelihood, reduction)
    kl = _kl([*stacked[2:], None, None], kl_reduction or reduction)
    weight: float | Tensor = beta
    if beta_tensor is not None:  # [] or [V], beside a KL of [V] or [V, B]
        weight = beta_tensor if kl.dim() == 1 or beta_dim is None else beta_tensor.unsqueeze(1)
        weight = weight.double()
    # added in float64 and rounded once, as the kernel does
    loss = (recon.double() + weight * kl.double()).to(torch.promote_types(recon.dtype, kl.dtype))
    return (loss, recon, kl), (0, 0, 0)


_rules: list[tuple[Callable[..., Any], str]] = [
    (_reparameterize_rule, "reparameterize"),
    (_kl_normal_rule, "kl_normal"),
    (_sample_and_kl_rule, "sample_and_kl"),
    (_reconstruction_loss_rule, "reconstruction_loss"),
    (_vae_loss_rule, "vae_loss"),
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
) -> Any:
    if eps is None:
        eps, generator = ops._normal_like(mu, generator), None
    with _below_vmap("FuncTorchVmapMode"):
        return ops.reparameterize(mu, logvar, eps, generator)


def _sample_and_kl_in_vmap(
    mu: Tensor,
    logvar: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    if eps is None:
        eps, generator = ops._normal_like(mu, generator), None
    with _below_vmap("FuncTorchVmapMode"):
        return ops.sample_and_kl(mu, logvar, mu_p, logvar_p, reduction, eps, generator)


_library = torch.library.Library("fastvae", "FRAGMENT")
_library.impl("_normal_like", _normal_like_in_vmap, "FuncTorchVmapMode")
_library.impl("reparameterize", _reparameterize_in_vmap, "FuncTorchVmapMode")
_library.impl("sample_and_kl", _sample_and_kl_in_vmap, "FuncTorchVmapMode")
