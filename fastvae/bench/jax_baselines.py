"""The same objectives in JAX, jitted; imported only where JAX is wanted."""

from __future__ import annotations

import os
from typing import Any

# Or it takes three quarters of a GPU's memory at the first call. Before the import, or it has no effect.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fastvae.bench.cases import BOTH, FORWARD, Case, Timed, as_tuple, composed


def _kl(mu: Any, logvar: Any) -> Any:
    mu, logvar = mu.astype(jnp.float32), logvar.astype(jnp.float32)
    return -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar)) / mu.shape[0]


def _recon(recon_x: Any, x: Any) -> Any:
    return jnp.sum((recon_x.astype(jnp.float32) - x.astype(jnp.float32)) ** 2) / x.shape[0]


FUNCTIONS = composed(_recon, _kl, lambda mu, logvar, eps: mu + jnp.exp(0.5 * logvar) * eps)
FUNCTIONS["vae_loss: after a sigmoid"] = lambda y, x, *q: _recon(jax.nn.sigmoid(y), x) + _kl(*q)


class Jax:
    """An op in JAX. Noise is drawn inside the jitted function, from a seed that is another in every call."""

    def __init__(self, case: Case, inputs: list[torch.Tensor], upstream: list[Any]) -> None:
        self.inputs, self.upstream, self.seed = inputs, upstream, 0
        leaves = [jnp.from_dlpack(t.detach()) for t in inputs]
        flowing = tuple(jnp.ones(()) if u is None else jnp.from_dlpack(u) for u in upstream)
        self.given, wanted = (leaves, flowing), [t.requires_grad for t in inputs]
        function, mu = FUNCTIONS[case.name.removesuffix(": eps given")], leaves[0]

        def forward(seed: Any, leaves: Any, _: Any) -> Any:
            eps = jax.random.normal(jax.random.key(seed), mu.shape, mu.dtype)
            return as_tuple(function(*leaves, *([eps] if case.noise else [])))

        def both(seed: Any, leaves: Any, flowing: Any) -> Any:
            outputs, pull = jax.vjp(lambda *leaves: forward(seed, leaves, None), *leaves)
            # XLA computes the gradients that are returned.
            return outputs, [g for g, w in zip(pull(flowing), wanted, strict=True) if w]

        self.jitted = {FORWARD: jax.jit(forward), BOTH: jax.jit(both)}

    def timed(self, which: str) -> Timed | None:
        """There is no backward pass by itself."""

        def seed() -> Any:
            self.seed += 1
            return np.uint32(self.seed)

        def call(seed: Any) -> Any:
            return jax.block_until_ready(self.jitted[which](seed, *self.given))  # type: ignore[no-untyped-call]

        return Timed(call, seed, foreign=True) if which in self.jitted else None

    def both(self) -> Any:
        made: Any = self.timed(BOTH)
        return jax.tree.map(torch.utils.dlpack.from_dlpack, made.call(made.setup()))
