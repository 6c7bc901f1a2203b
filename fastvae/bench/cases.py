"""What is timed: an op on inputs of one shape and dtype, and the bytes it must move at least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvae import likelihoods

OPS = (
    "vae_loss",
    "reconstruction_loss",
    "kl_normal",
    "reparameterize",
    "sample_and_kl",
    "kl_decomposition",
    "mixture_log_prob",
    "noise",
)
PAIRS = ("kl_decomposition", "mixture_log_prob")
SAMPLING = ("reparameterize", "sample_and_kl")
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
PASSES = (FORWARD, BACKWARD, BOTH)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Size = tuple[int, tuple[int, ...], tuple[int, ...]]  # batch, event, latent

# The sizes of real models: a toy, an MLP on MNIST, a convolutional VAE on 64 x 64 pixels, and an
# autoencoder with spatial latents on 256 x 256, as latent diffusion has it. The last leaves the caches.
TOY: Size = (1, (16,), (4,))
MNIST: Size = (128, (784,), (20,))
PIXELS_64: Size = (64, (3, 64, 64), (128,))
PIXELS_256: Size = (32, (3, 256, 256), (4, 32, 32))
VAE_SIZES = (TOY, MNIST, PIXELS_64, PIXELS_256)
LATENT_SIZES: tuple[Size, ...] = ((128, (), (20,)), (64, (), (4096,)), (32, (), (65536,)))
MIDDLE = LATENT_SIZES[1]
# Samples, components and latents: batches of beta-TCVAE, VampPrior's 500 pseudo-inputs, and few components for many samples.
DECOMPOSITIONS = ((64, 64, 10), (128, 128, 32), (1024, 1024, 32), (2048, 2048, 10))
MIXTURES = ((100, 500, 40), (3840, 20, 10))
DATASET_SIZE = 50_000
NOISE_SIZE: Size = (1, (), (1 << 22,))


def _counts(normal: Tensor) -> Tensor:
    return normal.exp().round()


def _away_from_0(normal: Tensor) -> Tensor:
    """Nearer, torch's own gradient of the continuous Bernoulli is off by up to 0.5% in float32, and would not be timed."""
    return normal + normal.sign()


def _levels(normal: Tensor) -> Tensor:
    """Pictures in [-1, 1]."""
    return (normal.sigmoid() * 255).round() / 127.5 - 1


# What makes a row's likelihood (of logvar, where the row is called so), and what takes normal values of recon_x and of x
# into its domain.
LIKELIHOODS: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "sigmoid, mse": (partial(likelihoods.SquaredError, activation="sigmoid"), None, torch.sigmoid),
    "bernoulli": (likelihoods.Bernoulli, None, torch.sigmoid),
    "bernoulli of probabilities": (
        partial(likelihoods.Bernoulli, logits=False),
        torch.sigmoid,
        torch.sigmoid,
    ),
    "gaussian, logvar": (likelihoods.Gaussian, None, None),
    "continuous bernoulli": (likelihoods.ContinuousBernoulli, _away_from_0, torch.sigmoid),
    "l1": (likelihoods.L1, None, None),
    "laplace": (partial(likelihoods.Laplace, -1.0, full=True), None, None),
    "student t": (partial(likelihoods.StudentT, 4.0, -1.0, full=True), None, None),
    "huber": (likelihoods.Huber, None, None),
    "poisson": (likelihoods.Poisson, None, _counts),
    # with the channels and the edges where the project has them
    "logistic mixture, vdvae": (
        partial(likelihoods.LogisticMixture, channel_dim=-1),
        None,
        _levels,
    ),
    "logistic mixture, nvae": (
        partial(likelihoods.LogisticMixture, edges=(-0.999, 0.99)),
        None,
        _levels,
    ),
}


@dataclass(frozen=True)
class Case:
    """An op on `batch` samples of `event` elements with `latent` latents each."""

    op: str
    batch: int
    event: tuple[int, ...] = ()
    latent: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    eps_given: bool = False
    after_sigmoid: bool = False  # recon_x is what a sigmoid takes, and the pass goes through it
    likelihood: str = ""  # of LIKELIHOODS
    components: int = 0  # of PAIRS: Gaussians

    @property
    def label(self) -> str:
        if self.likelihood:
            return f"{self.op}: {self.likelihood}"
        if self.after_sigmoid:
            return f"sigmoid, {self.op}"
        return f"{self.op} (eps given)" if self.eps_given else self.op

    @property
    def parameters(self) -> tuple[int, ...]:
        """The event of recon_x."""
        if not self.likelihood.startswith("logistic mixture"):
            return self.event
        return (*self.event[:-1], 100) if "vdvae" in self.likelihood else (100, *self.event[1:])

    @property
    def shape(self) -> str:
        if self.components:
            return "x".join(map(str, (self.batch, self.components, *self.latent)))
        shapes = [(self.batch, *s) for s in (self.parameters, self.latent) if s]
        return " + ".join("x".join(map(str, shape)) for shape in shapes)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.label} {self.shape} {self.dtype_name}"

    @property
    def passes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.op == "noise" else PASSES

    @property
    def pairs(self) -> int:
        """Of samples and components, in each dimension: what an expression over all of them has in memory."""
        return self.latents * self.components

    @property
    def pixels(self) -> int:
        """N, the elements of recon_x."""
        return self.batch * math.prod(self.parameters) if self.event else 0

    @property
    def latents(self) -> int:
        """M, the elements of mu."""
        return self.batch * math.prod(self.latent) if self.latent else 0

    def least_bytes(self, which: str) -> int:
        """What the pass has to read and write, each byte once; x gets no gradient.

        A scalar loss can write its gradients while it has its inputs in registers, so that its backward pass
        moves nothing. Not in float16: a gradient that is not yet scaled underflows there, and has to wait.
        """
        n, m = self.pixels, self.latents
        if self.components:  # z and its gradient, the components' two parameters and theirs
            parameters = 2 * self.components * math.prod(self.latent)
            passes = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[which]
            return passes * (m + parameters) * self.dtype.itemsize
        d = self.batch * math.prod(self.event) if self.event else 0  # of x
        if (
            "logvar" in self.likelihood
        ):  # read, and its gradient written, as a half of the latents' pair
            m = n // 2
        if self.op == "noise":
            moved = {FORWARD: m}
        elif self.op == "reparameterize":  # d_mu is the gradient of z itself
            moved = {FORWARD: 3 * m, BACKWARD: 3 * m, BOTH: 6 * m}
        elif self.op == "sample_and_kl":
            moved = {FORWARD: 3 * m, BACKWARD: 5 * m, BOTH: 8 * m}
        elif self.dtype is torch.float16:
            moved = {
                FORWARD: n + d + 2 * m,
                BACKWARD: 2 * n + d + 4 * m,
                BOTH: 3 * n + 2 * d + 6 * m,
            }
        else:
            moved = {FORWARD: n + d + 2 * m, BACKWARD: 0, BOTH: 2 * n + d + 4 * m}
        eps = m * (2 if which == BOTH else 1) if self.eps_given else 0  # read in either pass
        return (moved[which] + eps) * self.dtype.itemsize

    def inputs(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """(recon_x, x), (mu, logvar) and eps, as far as the op takes them; the leaves that want a gradient
        are all but x and eps."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(
            shape: tuple[int, ...], scale: float = 1.0, wanted: bool = True, rows: int | None = None
        ) -> Tensor:
            shape = (self.batch if rows is None else rows, *shape)
            drawn = torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
            return drawn.mul_(scale).requires_grad_(wanted)

        inputs = []
        if self.components:  # z is of its own posterior where the batch is the components
            mu = normal(self.latent, rows=self.components)
            logvar = normal(self.latent, 0.5, rows=self.components)
            z = normal(self.latent)
            if self.op == "kl_decomposition":
                z.data.mul_(torch.exp(0.5 * logvar.data)).add_(mu.data)
            return [z, mu, logvar]
        if self.event:
            inputs += [normal(self.parameters), normal(self.event, wanted=False)]
        if self.likelihood:
            for tensor, into in zip(inputs, LIKELIHOODS[self.likelihood][1:], strict=True):
                if into is not None:
                    tensor.data = into(tensor.data)
        if "logvar" in self.likelihood:
            inputs.append(normal(self.event, 0.5))
        if self.latent:
            inputs += [normal(self.latent), normal(self.latent, 0.5)]
        if self.eps_given:
            inputs.append(normal(self.latent, wanted=False))
        return inputs

    def upstream(self, inputs: list[Tensor]) -> list[Tensor | None]:
        """What flows into the outputs: a random tensor into z, as in the middle of a network, and 1 into a loss."""
        if self.op == "kl_decomposition":
            like = inputs[0]
            return [
                torch.full((), w, dtype=like.dtype, device=like.device) for w in (1.0, 6.0, 1.0)
            ]
        if self.op == "mixture_log_prob":
            return [torch.full((self.batch,), 1 / self.batch, device=inputs[0].device)]
        if self.op not in SAMPLING:
            return [None]
        generator = torch.Generator(inputs[0].device).manual_seed(1)
        like = inputs[0]
        flowing = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return [flowing] if self.op == "reparameterize" else [flowing, None]


def op_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Case]:
    """Every op at the sizes of real models: the objective in all dtypes, its parts so at one middle size."""
    found = [Case("vae_loss", *size, dtype) for size in VAE_SIZES for dtype in dtypes]
    found += [Case("reconstruction_loss", *PIXELS_64[:2], dtype=dtype) for dtype in dtypes]
    for op in ("kl_normal", *SAMPLING):
        for size in LATENT_SIZES:
            for dtype in dtypes:
                if size == MIDDLE or dtype is torch.float32:
                    found.append(Case(op, *size, dtype))
    if torch.float32 in dtypes:
        found += [Case(op, *MIDDLE, eps_given=True) for op in SAMPLING]
        found.append(Case("noise", *NOISE_SIZE))
    return found


def pair_cases() -> list[Case]:
    """Terms over all pairs of samples and Gaussian components."""
    sizes = [("kl_decomposition", s) for s in DECOMPOSITIONS]
    sizes += [("mixture_log_prob", s) for s in MIXTURES]
    return [Case(op, b, latent=(dims,), components=k) for op, (b, k, dims) in sizes]


def likelihood_cases(size: Size = PIXELS_64) -> list[Case]:
    """Every likelihood with a baseline in torch, and mixtures of logistics for as many pixels as 32 pictures of CIFAR-10."""
    shape, side = (math.prod(size[1]),), 32 if size == PIXELS_64 else 4
    events = {"vdvae": (side, side, 3), "nvae": (3, side, side)}
    found = []
    for name in LIKELIHOODS:
        mixture = name.startswith("logistic mixture")
        batch, event = (side, events[name.split()[-1]]) if mixture else (size[0], shape)
        found.append(Case("reconstruction_loss", batch, event, likelihood=name))
    return found


def sigmoid_cases() -> list[Case]:
    """The objective behind a decoder that ends in a sigmoid: what a compiler can fuse, and an opaque op would forbid."""
    found = [Case("vae_loss", *size, after_sigmoid=True) for size in VAE_SIZES]
    return [*found, Case("vae_loss", *PIXELS_64, torch.bfloat16, after_sigmoid=True)]


def growing(elements: int) -> Case:
    """vae_loss with N elements in 16 samples, and one latent to 16 of them."""
    return Case("vae_loss", 16, (elements // 16,), (elements // 256,))


def growing_batch(batch: int) -> Case:
    """vae_loss of `batch` samples of the MNIST size."""
    return Case("vae_loss", batch, *MNIST[1:])
