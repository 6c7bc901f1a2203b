"""Training, evaluation, and the comparison of fastvae's objective with the plain one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastvae.demo.model import Autoencoder, Objective, fused
from fastvae.random import philox_normal

FIRST_STEPS = 100
FIRST_STEPS_TOLERANCE = 1e-4
EPOCHS_TOLERANCE = 1e-3


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """What is trained, and how: the options of ``fastvae demo``."""

    sigma: float = _option(0.1, "standard deviation of the decoder's Gaussian; beta = 2 sigma^2")
    latent_dim: int = _option(16, "latent dimensions")
    epochs: int = _option(200, "passes over the images")
    batch_size: int = _option(100, "images in a step")
    lr: float = _option(1e-3, "Adam's learning rate")
    seed: int = _option(0, "of the weights, the order of the images and the noise")
    device: str = _option("cpu", "cpu, cuda, cuda:1, ...")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("seed", "device") and not 0 < value < math.inf:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be a finite number above 0, but got {value}")

    @property
    def beta(self) -> float:
        """The KL's weight beside the squared error."""
        return 2 * self.sigma**2


class History(NamedTuple):
    """The terms (loss, recon, kl) as they went: each step's, and each epoch's mean over images."""

    steps: Tensor  # [steps, 3] float64
    epochs: Tensor  # [epochs, 3] float64
    seconds: Tensor  # [steps]


def build_model(config: Config, shape: torch.Size, objective: Objective = fused) -> Autoencoder:
    """The model with the weights that `config.seed` gives, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Autoencoder(shape, config.latent_dim, objective).to(config.device)


def normals(config: Config, device: torch.device, count: int, draw: int, start: int = 0) -> Tensor:
    """[count, L] of the noise of that number, from image `start` on. The CPU makes it for devices without kernels."""
    where, first = device if device.type == "cuda" else "cpu", start * config.latent_dim
    size = (count, config.latent_dim)
    return philox_normal(size, seed=config.seed, offset=draw, start=first, device=where).to(device)


def ranks() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 where none were started together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def train(config: Config, models: dict[str, Autoencoder], images: Tensor) -> dict[str, History]:
    """Train `models` on `images` [N, C, H, W] and return how the terms of each went.

    They take turns, step by step, on the same batches with the same noise: their losses can be
    compared, and so can their times, as what else the machine does falls on all.

    Where several processes were started together, each takes its part of every batch and of that
    batch's noise: together they train as one process would.
    """
    from tqdm import tqdm

    rank, count = ranks()
    trained = {n: DistributedDataParallel(m) if count > 1 else m for n, m in models.items()}
    # Fused: one kernel for all weights, so that Adam does not drown what is compared.
    adam = partial(torch.optim.Adam, lr=config.lr, fused=True)
    optimizers = {name: adam(model.parameters()) for name, model in models.items()}
    generator = torch.Generator().manual_seed(config.seed)
    step, steps, epochs, seconds = 0, [], [], []
    hidden = True if rank > 0 else None  # None hides the bar where stderr is no terminal
    bar = tqdm(range(config.epochs), unit="epoch", disable=hidden)
    for _ in bar:
        rows, sizes = [], []
        for index in torch.randperm(len(images), generator=generator).split(config.batch_size):
            target = images[index.to(images.device)]
            batch = len(target)
            part = slice(batch * rank // count, batch * (rank + 1) // count)
            if batch < count:  # too few to share: each process takes all of them
                part = slice(0, batch)
            mine = part.stop - part.start
            eps = normals(config, target.device, mine, step, part.start)
            # The parts' means are weighted by their sizes. DistributedDataParallel averages the gradients.
            share = mine / batch if batch >= count else 1 / count
            for name, model in trained.items():
                begin = time.perf_counter()
                optimizers[name].zero_grad()
                terms = model(target[part], config.beta, eps)
                (terms.loss if count == 1 else share * count * terms.loss).backward()
                optimizers[name].step()
                if target.is_cuda:
                    torch.cuda.synchronize(target.device)
                seconds.append(time.perf_counter() - begin)
                rows.append(share * torch.stack([term.detach() for term in terms]))
            sizes.append(batch)
            step += 1
        values = torch.stack(rows).double().unflatten(0, (-1, len(models)))  # [steps, models, 3]
        if count > 1:
            dist.all_reduce(values)
        steps.append(values.cpu())
        weights = torch.tensor(sizes, dtype=torch.float64)
        epochs.append(torch.einsum("s,smt->mt", weights / weights.sum(), steps[-1]))
        bar.set_postfix(
            {f"loss, {n}": f"{m[0]:.4f}" for n, m in zip(models, epochs[-1], strict=True)}
        )
    times = torch.tensor(seconds).view(-1, len(models))
    of_models = torch.cat(steps).unbind(1), torch.stack(epochs).unbind(1), times.unbind(1)
    return dict(zip(models, map(History, *of_models), strict=True))


@torch.no_grad()
def evaluate(config: Config, model: Autoencoder, images: Tensor) -> dict[str, float]:
    """Averages per image, with one sample of z for each: squared error, KL and ELBO (nats).

    ELBO = E[log N(x; decode(z), sigma^2)] - KL, the Gaussian's constant included. It bounds the log
    of a density, so it may be positive.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for number, x in enumerate(images.split(1024)):
        terms = model(x, config.beta, normals(config, x.device, len(x), -1 - number))
        totals += len(x) / len(images) * torch.stack(terms).double().cpu()
    _, recon, kl = totals.tolist()
    variance = config.sigma**2
    constant = 0.5 * images[0].numel() * math.log(2 * math.pi * variance)
    return {"recon": recon, "kl": kl, "elbo": -(recon / (2 * variance) + constant + kl)}


def agreement(ours: History, theirs: History) -> dict[str, float | bool]:
    """The largest relative differences between two trainings, over all terms."""
    apart = [((a - b).abs() / b.abs()) for a, b in zip(ours[:2], theirs[:2], strict=True)]
    steps, epochs = apart[0][:FIRST_STEPS].max().item(), apart[1].max().item()
    # NaN compares false, so it is no agreement.
    ok = steps <= FIRST_STEPS_TOLERANCE and epochs <= EPOCHS_TOLERANCE
    return {"first_steps": steps, "epochs": epochs, "ok": ok}
