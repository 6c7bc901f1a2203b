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
from torch import Tensor

from fastvae.bench.baselines import Timed
from fastvae.bench.cases import BACKWARD, FORWARD, SAMPLING, Case

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: jnp.float32,
    torch.bfloat16: jnp.bfloat16,
    torch.float16: jnp.float16,
}


def why_not(device: torch.device) -> str | None:
    """Why JAX cannot be compared on `device`, or None."""
    found = jax.default_backend()
    wanted = "gpu" if device.type == "cuda" else device.type
    return None if found == wanted else f"this JAX computes on {found}, not on {wanted}"


def _wait(values: Any) -> Any:
    return jax.block_until_ready(values)  # type: ignore[no-untyped-call]


def _kl_normal(mu: Any, logvar: Any) -> Any:
    mu, logvar = mu.astype(jnp.float32), logvar.astype(jnp.float32)
    return -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar)) / mu.shape[0]


def _reconstruction_loss(recon_x: Any, x: Any) -> Any:
    difference = recon_x.astype(jnp.float32) - x.astype(jnp.float32)
    return jnp.sum(difference**2) / x.shape[0]


def _sample(mu: Any, logvar: Any, eps: Any) -> Any:
    return mu + jnp.exp(0.5 * logvar) * eps


def _outputs(op: str, wanted: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
    """The outputs as functions of what wants a gradient; `other` is x, or eps."""
    if op == "vae_loss":
        recon_x, mu, logvar = wanted
        return (_reconstruction_loss(recon_x, *other) + _kl_normal(mu, logvar),)
    if op == "reconstruction_loss":
        return (_reconstruction_loss(*wanted, *other),)
    if op == "kl_normal":
        return (_kl_normal(*wanted),)
    if op == "noise":
        return other
    z = _sample(*wanted, *other)
    return (z,) if op == "reparameterize" else (z, _kl_normal(*wanted))


class Jax:
    """An op in JAX. Noise is drawn inside the jitted function, from a seed that is another in every call."""

    def __init__(self, case: Case, inputs: list[Tensor], upstream: list[Tensor | None]) -> None:
        self.case, self.torch_device = case, inputs[0].device
        dtype = DTYPES[case.dtype]

        def convert(tensor: Tensor) -> Any:
            return jnp.asarray(tensor.detach().float().cpu().numpy(), dtype=dtype)

        self.wanted = tuple(convert(t) for t in inputs if t.requires_grad)
        self.other = tuple(convert(t) for t in inputs if not t.requires_grad)
        self.upstream = tuple(
            jnp.ones((), jnp.float32) if g is None else convert(g) for g in upstream
        )
        self.seed = 0
        draws = case.op == "noise" or (case.op in SAMPLING and not case.eps_given)
        shape = self.wanted[0].shape

        def run(seed: Any, wanted: Any, other: Any) -> Any:
            if draws:
                other = (jax.random.normal(jax.random.key(seed), shape, dtype),)
            if case.after_sigmoid:
                wanted = (jax.nn.sigmoid(wanted[0]), *wanted[1:])
            return _outputs(case.op, wanted, other)

        def pulled(seed: Any, wanted: Any, other: Any) -> Any:
            return jax.vjp(lambda *wanted: run(seed, wanted, other), *wanted)

        def both(seed: Any, wanted: Any, other: Any, upstream: Any) -> Any:
            outputs, pull = pulled(seed, wanted, other)
            return outputs, pull(upstream)

        self.jitted = {
            "forward": jax.jit(run),
            "pulled": jax.jit(pulled),
            "backward": jax.jit(lambda pull, upstream: pull(upstream)),
            "both": jax.jit(both),
        }
        self.compiled: dict[str, Any] = {}

    def executable(self, name: str, *arguments: Any) -> Any:
        if name not in self.compiled:
            self.compiled[name] = self.jitted[name].lower(*arguments).compile()
        return self.compiled[name]

    def call(self, name: str, *arguments: Any) -> Any:
        return _wait(self.executable(name, *arguments)(*arguments))

    def arguments(self) -> tuple[Any, ...]:
        self.seed += 1
        return np.uint32(self.seed), self.wanted, self.other

    def timed(self, which: str) -> Timed | None:
        """Memory is what XLA's compiler plans for results and temporaries."""

        def setup() -> tuple[Any, ...]:
            if which == FORWARD:
                return self.arguments()
            if which == BACKWARD:
                return self.call("pulled", *self.arguments())[1], self.upstream
            return *self.arguments(), self.upstream

        executable = self.executable(which, *setup())
        plan = executable.memory_analysis()
        peak = plan.output_size_in_bytes + plan.temp_size_in_bytes if plan is not None else None
        return Timed(
            lambda state: _wait(executable(*state)), setup, host_clock=True, peak_bytes=peak
        )

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        def convert(values: Any) -> list[Tensor]:
            arrays = [np.array(v.astype(jnp.float32)) for v in values]
            return [torch.from_numpy(a).to(self.torch_device) for a in arrays]

        if self.case.op == "noise":
            return convert(self.call("forward", *self.arguments())), []
        outputs, gradients = self.call("both", *self.arguments(), self.upstream)
        return convert(outputs), convert(gradients)
