"""Training, evaluation, and the comparison of fastvae's objective with the plain one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastvae
from fastvae import VAELossOutput
from fastvae.demo import objectives
from fastvae.demo.data import Dataset
from fastvae.demo.model import Autoencoder
from fastvae.demo.objectives import Objective

__all__ = [
    "Agreement",
    "Config",
    "Evaluation",
    "History",
    "StepTime",
    "agreement",
    "build_model",
    "corrupt",
    "evaluate",
    "mean_image_error",
    "ranks",
    "step_times",
    "train",
]

FIRST_STEPS = 100
FIRST_STEPS_TOLERANCE = 1e-4
EPOCHS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Config:
    """What is trained, and how.

    `noise` and `sigma` are standard deviations, of the input's corruption and of the decoder's
    Gaussian, in units of the images' range.
    """

    model: str = "vae"
    noise: float = 0.0
    sigma: float = 0.1
    latent_dim: int = 16
    hidden: int = 256
    epochs: int = 200
    batch_size: int = 100
    lr: float = 1e-3
    seed: int = 0
    device: str = "cpu"

    @property
    def beta(self) -> float:
        """The KL's weight beside the squared error: 2 sigma^2; an autoencoder has no KL."""
        return 2 * self.sigma**2 if self.model == "vae" else 0.0


@dataclass
class History:
    """The terms (loss, recon, kl) as they went: each step's, and each epoch's mean over images."""

    steps: Tensor  # [steps, 3] float64
    epochs: Tensor  # [epochs, 3] float64


@dataclass(frozen=True)
class Evaluation:
    """Averages per image; `kl` and `elbo` are in nats, and None for a deterministic autoencoder."""

    recon: float  # squared error with z drawn from the posterior
    recon_at_mean: float  # squared error with z = mu
    kl: float | None
    elbo: float | None


@dataclass(frozen=True)
class Agreement:
    """The largest relative differences between two histories, over all terms."""

    first_steps: float
    epochs: float

    @property
    def ok(self) -> bool:
        # NaN compares false, so it is no agreement.
        return self.first_steps <= FIRST_STEPS_TOLERANCE and self.epochs <= EPOCHS_TOLERANCE


@dataclass(frozen=True)
class StepTime:
    """Seconds for one training step: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def build_model(config: Config, shape: torch.Size) -> Autoencoder:
    """The model with the weights that `config.seed` gives, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Autoencoder(
            shape, config.latent_dim, config.hidden, variational=config.model == "vae"
        )
    return model.to(config.device)


def build_optimizer(config: Config, model: Autoencoder) -> torch.optim.Optimizer:
    """Adam, fused: one kernel for all weights, so that it does not drown what is compared."""
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)


def corrupt(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add N(0, noise^2) to every pixel and clip to [0, 1]; without noise, the images themselves."""
    if noise == 0:
        return images
    draw = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise * draw).clamp_(0, 1)


class Generators:
    """A random stream for each purpose, so that two runs can share one and not the others."""

    def __init__(self, config: Config) -> None:
        seeds = [int(seed) for seed in np.random.SeedSequence(config.seed).generate_state(3)]
        self.order = torch.Generator().manual_seed(seeds[0])
        self.corruption = torch.Generator(config.device).manual_seed(seeds[1])
        self.latent = torch.Generator(config.device).manual_seed(seeds[2])


def epoch_batches(
    config: Config, images: Tensor, generators: Generators
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `images` in random order: (inputs, target), [B, C, H, W] each."""
    order = torch.randperm(len(images), generator=generators.order)
    for index in torch.split(order, config.batch_size):
        target = images[index.to(images.device)]
        yield corrupt(target, config.noise, generators.corruption), target


def ranks() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 where none were started together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(batch: int) -> slice:
    """The part of a batch of that many images that this process takes; all of it where there are too few to share."""
    rank, count = ranks()
    if batch < count:
        return slice(0, batch)
    return slice(batch * rank // count, batch * (rank + 1) // count)


class Trained(nn.Module):
    """A model and its objective as one module, for DistributedDataParallel to see its forward pass."""

    def __init__(self, model: Autoencoder, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        inputs: Tensor,
        target: Tensor,
        beta: float,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VAELossOutput:
        return self.objective(self.model, inputs, target, beta=beta, eps=eps, generator=generator)


def step(
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    target: Tensor,
    *,
    beta: float,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    weight: float = 1.0,
) -> VAELossOutput:
    """One training step: gradients cleared, forward, backward, Adam's update. `weight` is the loss's in backward."""
    optimizer.zero_grad()
    terms: VAELossOutput = trained(inputs, target, beta, eps, generator)
    (terms.loss if weight == 1 else weight * terms.loss).backward()
    optimizer.step()
    return terms


def noise_of_step(
    config: Config, batch: int, part: slice, generator: torch.Generator, like: Tensor
) -> Tensor:
    """The noise that fastvae's op would draw for a batch of that many images: of it, the images of `part`."""
    if ranks()[1] == 1:
        zeros = like.new_zeros(batch, config.latent_dim)
        return fastvae.reparameterize(zeros, zeros, generator=generator, return_eps=True)[1]
    # What the op does on the CPU; each process makes its own part alone.
    seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator))
    return fastvae.random.philox_normal(
        part.stop - part.start,
        config.latent_dim,
        seed=seed,
        start=part.start * config.latent_dim,
        device=like.device,
    )


def train(
    config: Config,
    model: Autoencoder,
    images: Tensor,
    objective: Objective,
    *,
    given_noise: bool = False,
    on_epoch: Callable[[VAELossOutput], None] | None = None,
) -> History:
    """Train `model` on `images` [N, C, H, W] and return how the terms went.

    The objective draws the latent noise itself; with `given_noise` it is handed the very numbers
    that fastvae's op would draw at that step, so that another objective sees the same ones.
    `on_epoch` is called with each epoch's means.

    Where several processes were started together, each takes its part of every batch and of the noise that
    one process would draw for it, so that together they train as one would.
    """
    optimizer = build_optimizer(config, model)
    generators = Generators(config)
    _, count = ranks()
    trained: nn.Module = Trained(model, objective)
    latent = generators.latent
    if count > 1:
        trained = DistributedDataParallel(trained)
        given_noise = True
        latent = torch.Generator().manual_seed(latent.initial_seed())
    steps, epochs = [], []
    for _ in range(config.epochs):
        terms, sizes = [], []
        for inputs, target in epoch_batches(config, images, generators):
            batch, part = len(target), shard(len(target))
            eps = noise_of_step(config, batch, part, latent, target) if given_noise else None
            # The parts' means, weighed by how many images each is of, are the batch's; their gradients are averaged.
            share = (part.stop - part.start) / batch if batch >= count else 1 / count
            output = step(
                trained,
                optimizer,
                inputs[part],
                target[part],
                beta=config.beta,
                eps=eps,
                generator=None if given_noise else latent,
                weight=share * count,
            )
            terms.append(share * torch.stack([term.detach() for term in output]))
            sizes.append(batch)
        # Copied to the host once an epoch, not once a step: the loop must not wait for the device.
        values = torch.stack(terms).double()
        if count > 1:
            dist.all_reduce(values)
        values = values.cpu()
        weights = torch.tensor(sizes, dtype=torch.float64)
        steps.append(values)
        epochs.append(weights @ values / weights.sum())
        if on_epoch is not None:
            on_epoch(VAELossOutput(*epochs[-1]))
    return History(torch.cat(steps), torch.stack(epochs))


@torch.no_grad()
def evaluate(config: Config, model: Autoencoder, images: Tensor) -> Evaluation:
    """Reconstruction error, KL and ELBO of `images` [N, C, H, W], with one sample of z for each.

    ELBO = E[log N(x; decode(z), sigma^2)] - KL, the Gaussian's constant included. It bounds the log
    of a density, so it may be positive; it is a bound for z inferred from a corrupted x as well.
    The noise is the same in every call.
    """
    generators = Generators(config)
    recon = recon_at_mean = kl = 0.0
    for target in torch.split(images, 1024):
        mu, logvar = model.encode(corrupt(target, config.noise, generators.corruption))
        at_mean = fastvae.reconstruction_loss(model.decode(mu), target, reduction="sum").item()
        recon_at_mean += at_mean
        if logvar is None:
            recon += at_mean
            continue
        z, divergence = fastvae.sample_and_kl(
            mu, logvar, reduction="sum", generator=generators.latent
        )
        decoded = model.decode(z)
        recon += fastvae.reconstruction_loss(decoded, target, reduction="sum").item()
        kl += divergence.item()
    count = len(images)
    recon, recon_at_mean, kl = recon / count, recon_at_mean / count, kl / count
    if config.model != "vae":
        return Evaluation(recon, recon_at_mean, None, None)
    variance = config.sigma**2
    constant = 0.5 * images[0].numel() * math.log(2 * math.pi * variance)
    return Evaluation(recon, recon_at_mean, kl, -(recon / (2 * variance) + constant + kl))


def mean_image_error(data: Dataset) -> float:
    """Squared error per test image of predicting the training images' mean, whatever the input."""
    mean = data.train.mean(0, keepdim=True)
    return (data.test - mean).square().flatten(1).sum(1).mean().item()


def agreement(ours: History, theirs: History) -> Agreement:
    """How far two trainings from the same start lie apart, relative to `theirs`."""

    def largest(a: Tensor, b: Tensor) -> float:
        # A term that is 0 in both (an autoencoder's KL) agrees; NaN anywhere stays NaN.
        return torch.where(a == b, 0.0, (a - b).abs() / b.abs()).max().item()

    return Agreement(
        largest(ours.steps[:FIRST_STEPS], theirs.steps[:FIRST_STEPS]),
        largest(ours.epochs, theirs.epochs),
    )


def step_times(
    config: Config, data: Dataset, *, rounds: int = 200, warmup: int = 20, limit: float = 10.0
) -> dict[str, StepTime]:
    """Time training steps of both objectives on one batch, each drawing its own noise.

    A step clears the gradients, encodes, samples, decodes, forms the loss, goes backward and
    updates the weights. The two take turns, step by step, so that whatever else the machine does
    falls on both. The first `warmup` rounds do not count; once 5 did, none starts after `limit`
    seconds.
    """
    target = data.train[: config.batch_size]
    inputs = corrupt(target, config.noise, Generators(config).corruption)

    def stepper(objective: Objective) -> Callable[[], object]:
        model = build_model(config, data.shape)
        optimizer = build_optimizer(config, model)
        generator = Generators(config).latent
        trained = Trained(model, objective)
        return lambda: step(
            trained, optimizer, inputs, target, beta=config.beta, generator=generator
        )

    def synchronize() -> None:
        if target.is_cuda:
            torch.cuda.synchronize(target.device)

    steppers = {"fastvae": stepper(objectives.fused), "plain": stepper(objectives.plain)}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    start = time.perf_counter()
    for number in range(warmup + rounds):
        if number >= warmup + 5 and time.perf_counter() - start > limit:
            break
        for name, run_step in steppers.items():
            synchronize()
            begin = time.perf_counter()
            run_step()
            synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: _summary(seconds[warmup:]) for name, seconds in times.items()}


def _summary(seconds: list[float]) -> StepTime:
    fifths = statistics.quantiles(seconds, n=5)
    return StepTime(statistics.median(seconds), fifths[0], fifths[3])
