"""What is timed: an op on inputs of one shape and dtype, and the bytes it must move at least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
GENES = 4000  # of 128 cells


def _counts(normal: Tensor) -> Tensor:
    return normal.exp().round()


def _away_from_0(normal: Tensor) -> Tensor:
    """Nearer, torch's own gradient of the continuous Bernoulli is off by up to 0.5% in float32, and would not be timed."""
    return normal + normal.sign()


def _levels(normal: Tensor) -> Tensor:
    """Pictures in [-1, 1]."""
    return (normal.sigmoid() * 255).round() / 127.5 - 1


def _same(normal: Tensor) -> Tensor:
    return normal


def _sparse_counts(normal: Tensor) -> Tensor:
    """A tenth is not 0."""
    return (1.1 * (normal - 1.2816)).exp().floor() * (normal > 1.2816)


class Likelihood(NamedTuple):
    """What makes it, and what takes normal values of recon_x, of x and of its parameters into their domains."""

    make: Callable[..., Any]
    recon_x: Callable[[Tensor], Tensor] = _same
    x: Callable[[Tensor], Tensor] = _same
    parameters: tuple[Callable[[Tensor], Tensor], ...] = ()
    genes: bool = False  # the data are GENES counts for each sample, and the first parameter one for each gene


_sparse = Likelihood(
    likelihoods.NegativeBinomial,
    lambda normal: (normal - 2.3).exp(),
    _sparse_counts,
    (torch.exp,),
    genes=True,
)
_dense = _sparse._replace(
    recon_x=lambda normal: 10 * (0.3 * normal).exp(),
    x=lambda normal: (5 * (0.8 * normal).exp()).floor(),
)
LIKELIHOODS: dict[str, Likelihood] = {
    "sigmoid, mse": Likelihood(
        partial(likelihoods.SquaredError, activation="sigmoid"), x=torch.sigmoid
    ),
    "bernoulli": Likelihood(likelihoods.Bernoulli, x=torch.sigmoid),
    "bernoulli of probabilities": Likelihood(
        partial(likelihoods.Bernoulli, logits=False), torch.sigmoid, torch.sigmoid
    ),
    "gaussian, logvar": Likelihood(likelihoods.Gaussian, parameters=(lambda normal: 0.5 * normal,)),
    "continuous bernoulli": Likelihood(
        likelihoods.ContinuousBernoulli, _away_from_0, torch.sigmoid
    ),
    "l1": Likelihood(likelihoods.L1),
    "laplace": Likelihood(partial(likelihoods.Laplace, -1.0, full=True)),
    "student t": Likelihood(partial(likelihoods.StudentT, 4.0, -1.0, full=True)),
    "huber": Likelihood(likelihoods.Huber),
    "poisson": Likelihood(likelihoods.Poisson, x=_counts),
    "negative binomial": _sparse,
    "negative binomial, zero-inflated": _sparse._replace(parameters=(torch.exp, _same)),
    "negative binomial, dense": _dense,
    "negative binomial, zero-inflated, dense": _dense._replace(parameters=(torch.exp, _same)),
    # with the channels and the edges where the project has them
    "logistic mixture, vdvae": Likelihood(
        partial(likelihoods.LogisticMixture, channel_dim=-1), x=_levels
    ),
    "logistic mixture, nvae": Likelihood(
        partial(likelihoods.LogisticMixture, edges=(-0.999, 0.99)), x=_levels
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
    def packed(self) -> tuple[int, ...]:
        """The event of recon_x."""
        if not self.likelihood.startswith("logistic mixture"):
            return self.event
        return (*self.event[:-1], 100) if "vdvae" in self.likelihood else (100, *self.event[1:])

    @property
    def shape(self) -> str:
        if self.components:
            return "x".join(map(str, (self.batch, self.components, *self.latent)))
        shapes = [(self.batch, *s) for s in (self.packed, self.latent) if s]
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
        return self.batch * math.prod(self.packed) if self.event else 0

    @property
    def parameters(self) -> list[tuple[bool, tuple[int, ...]]]:
        """Of the likelihood: whether there is one for each sample, and the shape beside that."""
        form = LIKELIHOODS[self.likelihood]
        return [(not form.genes or i > 0, self.event) for i in range(len(form.parameters))]

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
            self.likelihood
        ):  # two parameters are read, and their gradients written, as mu and logvar
            sizes = [math.prod(s) * (self.batch if b else 1) for b, s in self.parameters]
            m = sum(sizes) // 2
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
            inputs += [normal(self.packed), normal(self.event, wanted=False)]
        if self.likelihood:
            form = LIKELIHOODS[self.likelihood]
            inputs += [normal(s) if b else normal(s)[0] for b, s in self.parameters]
            for i, into in enumerate((form.recon_x, form.x, *form.parameters)):
                inputs[i] = into(inputs[i].detach()).requires_grad_(i != 1)
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
    """Every likelihood with a baseline in torch: of 4,000 genes; of as many pixels as 32 pictures of CIFAR-10 have; or of images."""
    side = 32 if size == PIXELS_64 else 4
    pictures = {"vdvae": (side, side, 3), "nvae": (3, side, side)}
    event: tuple[int, ...]
    found = []
    for name, form in LIKELIHOODS.items():
        batch, event = size[0], (math.prod(size[1]),)
        if form.genes:
            batch, event = 128, (GENES,)
        elif name.startswith("logistic mixture"):
            batch, event = side, pictures[name.split()[-1]]
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
