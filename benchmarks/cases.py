"""What is timed, and what stands beside fastvae: defined once, for the suite and the ratios.

A case is an op on inputs of one shape and dtype. Its implementations take those inputs and return
what is differentiated: "eager" is the expression as people write it, "functional" the same through
torch.nn.functional where that has the op, "compile" is torch.compile of "eager".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae

Function = Callable[..., Any]

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)


@dataclass(frozen=True)
class Case:
    """One op on one size of input: B samples of `event` elements with `latent` latents each."""

    op: str
    batch: int
    event: tuple[int, ...] = ()
    latent: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        sizes = " + ".join(
            f"{self.batch}x{math.prod(shape)}" for shape in (self.event, self.latent) if shape
        )
        return f"{self.op} {sizes} {str(self.dtype).removeprefix('torch.')}"

    @property
    def elements(self) -> int:
        """N, the elements of recon_x."""
        return self.batch * math.prod(self.event) if self.event else 0

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        """(recon_x, x) and (mu, logvar), as far as the op takes them; leaves that want gradients,
        x excepted."""
        generator = torch.Generator().manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float = 1.0, wanted: bool = True) -> Tensor:
            values = torch.randn(self.batch, *shape, generator=generator) * scale
            return values.to(device, self.dtype).requires_grad_(wanted)

        inputs = []
        if self.event:
            inputs += [normal(self.event), normal(self.event, wanted=False)]
        if self.latent:
            inputs += [normal(self.latent), normal(self.latent, 0.5)]
        return inputs


# The sizes of real models: a toy, an MLP on MNIST, a convolutional VAE on 64 x 64 pixels, and an
# autoencoder with spatial latents on 256 x 256, as latent diffusion has it.
VAE_SIZES: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = (
    (1, (16,), (4,)),
    (128, (784,), (20,)),
    (64, (3, 64, 64), (128,)),
    (32, (3, 256, 256), (4, 32, 32)),
)
# The last one leaves the caches.
LATENT_SIZES = ((128, (20,)), (64, (4096,)), (32, (65536,)))
NOISE_SIZE = (1, (1 << 22,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases() -> list[Case]:
    """All of them: every dtype for the whole objective, and for its parts at one middle size."""
    found = [Case("vae_loss", *size, dtype) for size in VAE_SIZES for dtype in DTYPES]
    found += [Case("reconstruction_loss", 64, (3, 64, 64), dtype=dtype) for dtype in DTYPES]
    for op in ("kl_normal", "reparameterize", "sample_and_kl"):
        for batch, latent in LATENT_SIZES:
            dtypes = DTYPES if batch == 64 else DTYPES[:1]
            found += [Case(op, batch, latent=latent, dtype=dtype) for dtype in dtypes]
    batch, latent = NOISE_SIZE
    return [*found, Case("noise", batch, latent=latent)]


# The expressions as people write them ------------------------------------------------------------


def kl_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / mu.shape[0]


def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    std = torch.exp(0.5 * logvar)
    eps = torch.randn_like(std)
    return mu + eps * std


def sample_and_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return reparameterize(mu, logvar), kl_normal(mu, logvar)


def reconstruction_loss(recon_x: Tensor, x: Tensor) -> Tensor:
    return ((recon_x - x) ** 2).sum() / x.shape[0]


def reconstruction_loss_functional(recon_x: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(recon_x, x, reduction="sum") / x.shape[0]


def vae_loss(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return reconstruction_loss(recon_x, x) + kl_normal(mu, logvar)


def vae_loss_functional(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return reconstruction_loss_functional(recon_x, x) + kl_normal(mu, logvar)


def noise(mu: Tensor, logvar: Tensor) -> Tensor:
    """Only the drawing, where fastvae draws and makes z of it."""
    return torch.empty_like(mu).normal_()


def _fastvae_vae_loss(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return fastvae.vae_loss(recon_x, x, mu, logvar).loss


IMPLEMENTATIONS: dict[str, dict[str, Function]] = {
    "vae_loss": {
        "fastvae": _fastvae_vae_loss,
        "eager": vae_loss,
        "functional": vae_loss_functional,
    },
    "reconstruction_loss": {
        "fastvae": fastvae.reconstruction_loss,
        "eager": reconstruction_loss,
        "functional": reconstruction_loss_functional,
    },
    "kl_normal": {"fastvae": fastvae.kl_normal, "eager": kl_normal},
    "reparameterize": {"fastvae": fastvae.reparameterize, "eager": reparameterize},
    "sample_and_kl": {"fastvae": fastvae.sample_and_kl, "eager": sample_and_kl},
    "noise": {"fastvae": fastvae.reparameterize, "eager": noise},
}


def implementations(op: str) -> list[str]:
    names = list(IMPLEMENTATIONS[op])
    return names if op == "noise" else [*names, "compile"]


def function(op: str, implementation: str) -> Function:
    """The implementation to call; a compiled one knows no other shapes, as in a program of its own.

    Resetting Dynamo forgets what was compiled for an earlier case, or the second shape would get
    code for dynamic shapes: use one case's functions before asking for the next one's.
    """
    if implementation != "compile":
        return IMPLEMENTATIONS[op][implementation]
    torch._dynamo.reset()
    return torch.compile(IMPLEMENTATIONS[op]["eager"], fullgraph=True)


# One timed step ----------------------------------------------------------------------------------


class Step:
    """A call without gradients (`FORWARD`), or one with its backward (`BOTH`).

    `clear` frees the gradients and belongs before each call, outside what is timed: else the second
    call would add to them.
    """

    def __init__(self, case: Case, implementation: str, which: str, device: str = "cpu") -> None:
        self.inputs = case.inputs(device)
        self.function = function(case.op, implementation)
        self.call = self._forward if which == FORWARD else self._both
        self.synchronize = torch.cuda.synchronize if device.startswith("cuda") else None
        # What flows into z in the middle of a network; a loss starts with 1, which None stands for.
        self.upstream: list[Tensor | None] = [None]
        if case.op in ("reparameterize", "sample_and_kl"):
            self.upstream = [torch.randn_like(self.inputs[0]), None]

    def __call__(self) -> None:
        self.call()
        if self.synchronize is not None:
            self.synchronize()

    def _forward(self) -> None:
        with torch.no_grad():
            self.function(*self.inputs)

    def _both(self) -> None:
        outputs = self.function(*self.inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, self.upstream[: len(outputs)])

    def clear(self) -> None:
        for tensor in self.inputs:
            tensor.grad = None


class Copy:
    """The floor: `copy_` between two buffers, moving as many bytes as `floats` float32 have."""

    def __init__(self, floats: int, device: str = "cpu") -> None:
        self.source = torch.ones(floats // 2, device=device)  # read once and written once
        self.target = torch.empty_like(self.source)
        self.synchronize = torch.cuda.synchronize if device.startswith("cuda") else None

    def __call__(self) -> None:
        self.target.copy_(self.source)
        if self.synchronize is not None:
            self.synchronize()

    def clear(self) -> None:
        """Nothing to free."""
