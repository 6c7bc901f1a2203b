"""The same objectives in JAX, jitted; imported only where JAX is wanted."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

# Or it takes three quarters of a GPU's memory at the first call. Before the import, or it has no effect.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from fastvae.bench.cases import Case
from fastvae.bench.timing import BOTH, FORWARD, Timed


def why_not(device: torch.device) -> str | None:
    """Why JAX cannot be compared on `device`, or None."""
    found, wanted = jax.default_backend(), {"cuda": "gpu"}.get(device.type, device.type)
    return None if found == wanted else f"this JAX computes on {found}, not on {wanted}"


def _kl(mu: Any, logvar: Any) -> Any:
    mu, logvar = mu.astype(jnp.float32), logvar.astype(jnp.float32)
    return -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar)) / mu.shape[0]


def _recon(recon_x: Any, x: Any) -> Any:
    return jnp.sum((recon_x.astype(jnp.float32) - x.astype(jnp.float32)) ** 2) / x.shape[0]


def _sample(mu: Any, logvar: Any, eps: Any) -> Any:
    return mu + jnp.exp(0.5 * logvar) * eps


FUNCTIONS: dict[str, Any] = {
    "vae_loss": lambda y, x, *q: (_recon(y, x) + _kl(*q),),
    "vae_loss: after a sigmoid": lambda y, x, *q: (_recon(jax.nn.sigmoid(y), x) + _kl(*q),),
    "reconstruction_loss": lambda y, x: (_recon(y, x),),
    "kl_normal": lambda mu, logvar: (_kl(mu, logvar),),
    "reparameterize": lambda mu, logvar, eps: (_sample(mu, logvar, eps),),
    "sample_and_kl": lambda mu, logvar, eps: (_sample(mu, logvar, eps), _kl(mu, logvar)),
    "noise": lambda mu, logvar, eps: (eps,),
}


class Jax:
    """An op in JAX. Noise is drawn inside the jitted function, from a seed that is another in every call."""

    def __init__(self, case: Case, inputs: list[Tensor], upstream: list[Tensor | None]) -> None:
        self.inputs, self.upstream, self.seed, dtype = inputs, upstream, 0, case.dtype_name

        def convert(tensor: Tensor | None) -> Any:
            if tensor is None:
                return jnp.ones((), jnp.float32)
            return jnp.asarray(tensor.detach().float().cpu().numpy(), dtype=dtype)

        self.given, self.flowing = (tuple(map(convert, tensors)) for tensors in (inputs, upstream))
        function, shape = FUNCTIONS[case.label.removesuffix(": eps given")], inputs[0].shape
        wanted = [i for i, t in enumerate(inputs) if t.requires_grad]

        def forward(seed: Any, inputs: Any, _: Any) -> Any:
            eps = [jax.random.normal(jax.random.key(seed), shape, dtype)] if case.noise else []
            return function(*inputs, *eps)

        def both(seed: Any, inputs: Any, flowing: Any) -> Any:
            outputs, pull = jax.vjp(lambda *leaves: forward(seed, leaves, None), *inputs)
            gradients = pull(flowing)  # of which XLA computes those that are returned
            return outputs, [gradients[i] for i in wanted]

        jitted = {FORWARD: jax.jit(forward), BOTH: jax.jit(both)}
        self.compiled = {n: f.lower(*self.arguments()).compile() for n, f in jitted.items()}

    def arguments(self) -> tuple[Any, ...]:
        self.seed += 1
        return np.uint32(self.seed), self.given, self.flowing

    def call(self, which: str, arguments: Any) -> Any:
        return jax.block_until_ready(self.compiled[which](*arguments))  # type: ignore[no-untyped-call]

    def timed(self, which: str) -> Timed | None:
        """There is no backward pass by itself. Memory is what XLA's compiler plans for results and temporaries."""
        if which not in self.compiled:
            return None
        plan = self.compiled[which].memory_analysis()
        peak = plan and plan.output_size_in_bytes + plan.temp_size_in_bytes
        return Timed(partial(self.call, which), self.arguments, host_clock=True, peak_bytes=peak)

    def both(self) -> Any:
        arrays = jax.tree.map(np.array, self.call(BOTH, self.arguments()))
        device = self.inputs[0].device
        return jax.tree.map(lambda a: torch.tensor(a.astype("float32"), device=device), arrays)
