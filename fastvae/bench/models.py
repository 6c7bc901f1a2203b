"""Whole training steps: real small models, and two where an objective's speed cannot matter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae.bench.baselines import FUNCTIONS, Timed, compile_alone, functions
from fastvae.bench.cases import LIKELIHOODS, Case
from fastvae.bench.check import distance

LIMIT = 2e-3  # of the largest value in a gradient: float32 through all the layers, whose order a compiler changes


class Vae(nn.Module):
    """An encoder whose first dimension after the batch holds mu and logvar, and a decoder."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def mlp(pixels: int, hidden: int, latents: int) -> Vae:
    return Vae(
        nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents)),
        nn.Sequential(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, pixels)),
    )


def convolutional(width: int, latents: int) -> Vae:
    """3 x 64 x 64 pixels, four halvings."""
    channels = [width, 2 * width, 4 * width, 8 * width]
    down: list[nn.Module] = []
    up: list[nn.Module] = [nn.Linear(latents, 16 * channels[-1]), nn.Unflatten(1, (-1, 4, 4))]
    for before, after in zip([3, *channels], channels, strict=False):
        down += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
    for before, after in zip(channels[::-1], [*channels[-2::-1], 3], strict=True):
        up += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    down += [nn.Flatten(), nn.Linear(16 * channels[-1], 2 * latents)]
    return Vae(nn.Sequential(*down), nn.Sequential(*up))


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice, as in latent diffusion's autoencoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            # Four channels in a group: alone in one, the convolution before it would have a bias without a gradient.
            layers += [nn.GroupNorm(channels // 4, channels), nn.SiLU()]
            layers.append(nn.Conv2d(channels, channels, 3, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def kl_autoencoder(width: int) -> Vae:
    """3 x 256 x 256 pixels to latents of 4 x 32 x 32, as in latent diffusion, with few channels."""
    channels = [width, 2 * width, 4 * width]
    down: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1)]
    up: list[nn.Module] = [nn.Conv2d(4, channels[-1], 3, 1, 1)]
    for before, after in zip([width, *channels], channels, strict=False):
        down += [Residual(before), nn.Conv2d(before, after, 3, 2, 1)]
    for before, after in zip(channels[::-1], [*channels[-2::-1], width], strict=True):
        up += [Residual(before), nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, 1, 1)]
    down += [nn.SiLU(), nn.Conv2d(channels[-1], 8, 3, 1, 1)]
    up += [nn.SiLU(), nn.Conv2d(width, 3, 3, 1, 1)]
    return Vae(nn.Sequential(*down), nn.Sequential(*up))


def of_mixtures(width: int) -> Vae:
    """3 x 32 x 32 pixels to latents of 16 x 8 x 8 and to mixtures of 10 logistics, as in vdvae, with few blocks."""
    wide = 2 * width
    down = [nn.Conv2d(3, width, 3, 1, 1), Residual(width), nn.Conv2d(width, wide, 3, 2, 1)]
    down += [
        Residual(wide),
        nn.Conv2d(wide, wide, 3, 2, 1),
        nn.SiLU(),
        nn.Conv2d(wide, 32, 3, 1, 1),
    ]
    up: list[nn.Module] = [
        nn.Conv2d(16, wide, 3, 1, 1),
        Residual(wide),
        nn.Upsample(scale_factor=2),
    ]
    up += [nn.Conv2d(wide, width, 3, 1, 1), Residual(width), nn.Upsample(scale_factor=2)]
    up += [Residual(width), nn.SiLU(), nn.Conv2d(width, 100, 1)]
    return Vae(nn.Sequential(*down), nn.Sequential(*up))


@dataclass(frozen=True)
class Model:
    """A model and the case that its objective is; `wide` is on a GPU, which has room for more channels."""

    name: str
    build: Callable[[bool], Vae]
    batch: int
    event: tuple[int, ...]
    latent: tuple[int, ...]
    worth: bool = True  # whether there is something to be won
    likelihood: str = ""  # of cases.LIKELIHOODS

    @property
    def case(self) -> Case:
        return Case("vae_loss", self.batch, self.event, self.latent, likelihood=self.likelihood)

    def data(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        x = torch.rand(batch, *self.event, device=device)
        return LIKELIHOODS[self.likelihood].x(torch.logit(x)) if self.likelihood else x


MODELS = (
    Model("MLP, MNIST", lambda wide: mlp(784, 400, 20), 128, (784,), (20,)),
    Model(
        "convolutional, 64 px",
        lambda wide: convolutional(32 if wide else 8, 128),
        64,
        (3, 64, 64),
        (128,),
    ),
    Model(
        "KL autoencoder, 256 px",
        lambda wide: kl_autoencoder(64 if wide else 8),
        4,
        (3, 256, 256),
        (4, 32, 32),
    ),
    Model(
        "mixture of logistics, 32 px",
        lambda wide: of_mixtures(128 if wide else 32),
        32,
        (3, 32, 32),
        (16, 8, 8),
        likelihood="logistic mixture, nvae",
    ),
    Model("tiny MLP", lambda wide: mlp(16, 16, 4), 8, (16,), (4,), worth=False),
    Model(
        "wide convolutional, 64 px",
        lambda wide: convolutional(128 if wide else 48, 128),
        32,
        (3, 64, 64),
        (128,),
        worth=False,
    ),
)


class Step:
    """A training step with Adam: the networks, the sample, the objective, its gradients, the update."""

    def __init__(
        self, model: Vae, x: Tensor, objective: str, compiled: bool, likelihood: str = ""
    ) -> None:
        self.model, self.x, self.likelihood = model, x, likelihood
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-5)
        sample = FUNCTIONS["reparameterize"][objective]
        vae_loss = functions(Case("vae_loss", len(x), likelihood=likelihood))[objective]

        def terms(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            mu, logvar = model.encoder(x).chunk(2, dim=1)
            z = sample(mu, logvar)
            return vae_loss(model.decoder(z), x, mu, logvar), z, mu, logvar

        self.terms = compile_alone(terms) if compiled else terms

    def __call__(self, _: Any = None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.terms(self.x)[0]
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timed(self) -> Timed:
        return Timed(self)

    def wrong(self) -> str:
        """What is wrong, or "": loss and gradients against the same networks and noise in float64, with `reference` as the objective."""
        self.optimizer.zero_grad(set_to_none=True)
        # Convolutions are TF32 on a GPU unless told otherwise: fine for training, too coarse for this.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            loss, z, mu, logvar = self.terms(self.x)
            loss.backward()
        got = [loss.detach(), *(p.grad for p in self.parameters)]
        with torch.no_grad():
            eps = (z.double() - mu.double()) * torch.exp(-0.5 * logvar.double())
        exact = copy.deepcopy(self.model).double()
        exact.zero_grad(set_to_none=True)
        x = self.x.double()
        mu, logvar = exact.encoder(x).chunk(2, dim=1)
        recon_x = exact.decoder(reference.reparameterize(mu, logvar, eps=eps))
        form = LIKELIHOODS[self.likelihood].make() if self.likelihood else "mse"
        truth = reference.vae_loss(recon_x, x, mu, logvar, likelihood=form).loss
        truth.backward()
        want = [truth.detach(), *(p.grad for p in exact.parameters())]
        for i, (value, right) in enumerate(zip(got, want, strict=True)):
            if value is None or right is None:
                return f"parameter {i} has no gradient"
            if not (error := distance(value, right)) <= LIMIT:
                return f"{f'gradient {i}' if i else 'the loss'} is off by {error:.2g}"
        return ""


def objective_alone(case: Case, name: str, device: torch.device) -> Timed:
    """The sample and the objective of a model's size, forward and backward, without the networks."""
    recon_x, x, mu, logvar = case.inputs(device)
    sample, vae_loss = FUNCTIONS["reparameterize"][name], functions(case)[name]
    flowing = torch.randn_like(mu)

    def call(_: Any) -> Any:
        z = sample(mu, logvar)
        loss = vae_loss(recon_x, x, mu, logvar)
        return torch.autograd.grad([z, loss], [recon_x, mu, logvar], [flowing, None])

    return Timed(call)
