"""Whole training steps: models of people's sizes, and scvi-tools' own."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import fastvae
from fastvae import likelihoods, recipes, reference
from fastvae.bench import cases
from fastvae.bench.cases import BOTH, Function, Timed

STEP = "step"
# Of the largest value in a gradient. Roundings are 2e-5, but where one takes a ReLU's input across 0 a sample's part comes
# or goes: 6e-3 was seen, of the plain objective too.
LIMIT = 2e-2
OPS: dict[str, Any] = {"fastvae": fastvae, "eager": reference, "truth": reference}


def elbo(kind: str, y: Tensor, x: Tensor, z: Tensor, *q: Tensor) -> Any:
    return OPS[kind].vae_loss(y, x, *q).loss


def of_mixtures(kind: str, y: Tensor, x: Tensor, z: Tensor, *q: Tensor) -> Any:
    if kind == "eager":
        return cases.mixture(y, x, 1, 0.99) / len(x) + reference.kl_normal(*q)
    likelihood = likelihoods.LogisticMixture(edges=(-0.999, 0.99))
    return OPS[kind].vae_loss(y, x, *q, likelihood=likelihood).loss


def beta_tcvae(kind: str, y: Tensor, x: Tensor, z: Tensor, *q: Tensor) -> Any:
    recon = OPS[kind].reconstruction_loss(y, x, likelihood="bce_with_logits")
    terms = cases.DECOMPOSITIONS.get(kind, reference.kl_decomposition)
    return recon + cases.tcvae_terms(terms, z, *q)


class Vae(nn.Module):
    """An encoder whose first dimension after the batch holds mu and logvar, a decoder, an objective."""

    def __init__(self, encoder: Any, decoder: Any, objective: Function = elbo) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.objective = objective

    def forward(self, kind: str, x: Tensor, eps: Tensor | None = None) -> Any:
        """The loss; z, and its mean and standard deviation."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = OPS[kind].reparameterize(mu, logvar, eps=eps)
        loss = self.objective(kind, self.decoder(z), x, z, mu, logvar)
        return loss, z, mu, torch.exp(0.5 * logvar)

    def alone(self, kind: str, x: Tensor) -> tuple[list[Tensor], Function]:
        """What the networks make, and the objective and the sample of it."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)

        def objective(y: Tensor, *q: Tensor) -> Any:
            z = OPS[kind].reparameterize(*q)
            return self.objective(kind, y, x, z, *q), z

        return [self.decoder(mu), mu, logvar], objective


class Scvi(nn.Module):
    """scvi-tools' own model, with `recipes.scvi` or as it is."""

    def __init__(self, genes: int, likelihood: str) -> None:
        super().__init__()
        module: Any = importlib.import_module("scvi.module").VAE
        self.module = module(n_input=genes, gene_likelihood=likelihood)

    def patched(self, kind: str) -> contextlib.AbstractContextManager[None]:
        return recipes.scvi() if kind == "fastvae" else contextlib.nullcontext()

    def batch(self, x: Tensor) -> dict[str, Tensor]:
        return {"X": x, "batch": x.new_zeros(len(x), 1), "labels": x.new_zeros(len(x), 1)}

    def forward(self, kind: str, x: Tensor, eps: Tensor | None = None) -> Any:
        fixed: Any = contextlib.nullcontext()
        if eps is not None:
            fixed = mock.patch.object(Normal, "rsample", lambda q, *_: q.loc + q.scale * eps)
        with self.patched(kind), fixed:
            inference, _, losses = self.module(self.batch(x))
        return losses.loss, inference["z"], inference["qz"].loc, inference["qz"].scale

    def alone(self, kind: str, x: Tensor) -> tuple[list[Tensor], Function]:
        inference, generative, _ = self.module(self.batch(x))
        px, qz = generative["px"], inference["qz"]
        given = {n: getattr(px, n) for n in ("mu", "theta", "zi_logits") if hasattr(px, n)}
        given["theta"] = given["theta"][0]  # one for each gene, which px has expanded

        def objective(loc: Tensor, scale: Tensor, *of_counts: Tensor) -> Any:
            with self.patched(kind):
                counts = getattr(importlib.import_module("scvi.distributions"), type(px).__name__)
                made, q = counts(**dict(zip(given, of_counts, strict=True))), Normal(loc, scale)
                arguments = inference | {"qz": q}, generative | {"px": made}
                return self.module.loss(self.batch(x), *arguments).loss, q.rsample()

        return [qz.loc, qz.scale, *given.values()], objective


def mlp(pixels: int, hidden: int, latents: int) -> Vae:
    encoder = nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents)
    return Vae(encoder, (nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, pixels)))


def convolutional(width: int, latents: int, inputs: int = 3, objective: Function = elbo) -> Vae:
    """64 x 64 pixels, four halvings."""
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for a, b in itertools.pairwise([inputs, width, 2 * width, 4 * width, 8 * width]):
        down += [nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()]
        up = [nn.ReLU(), nn.ConvTranspose2d(b, a, 4, 2, 1), *up]
    down += [nn.Flatten(), nn.Linear(16 * 8 * width, 2 * latents)]
    return Vae(
        down, [nn.Linear(latents, 16 * 8 * width), nn.Unflatten(1, (-1, 4, 4)), *up], objective
    )


class Residual(nn.Sequential):
    """Norm, SiLU, convolution, twice, as in latent diffusion's autoencoder."""

    def __init__(self, channels: int) -> None:
        # Four channels in a group: alone in one, the convolution before it would have a bias without a gradient.
        norm, conv = partial(nn.GroupNorm, channels // 4), partial(nn.Conv2d, channels)
        layers = ((norm(channels), nn.SiLU(), conv(channels, 3, 1, 1)) for _ in range(2))
        super().__init__(*itertools.chain(*layers))

    def forward(self, x: Tensor) -> Any:
        return x + super().forward(x)  # type: ignore[no-untyped-call]


def residual(channels: list[int], latents: int, outputs: int, objective: Function) -> Vae:
    """Residual blocks, one halving less than `channels` has, and spatial latents."""
    down: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, 1, 1)]
    up: list[nn.Module] = [nn.SiLU(), nn.Conv2d(channels[0], outputs, 3, 1, 1)]
    for a, b in itertools.pairwise(channels):
        down += [Residual(a), nn.Conv2d(a, b, 3, 2, 1)]
        up = [Residual(b), nn.Upsample(scale_factor=2), nn.Conv2d(b, a, 3, 1, 1), *up]
    down += [nn.SiLU(), nn.Conv2d(channels[-1], 2 * latents, 3, 1, 1)]
    up = [nn.Conv2d(latents, channels[-1], 3, 1, 1), *up]
    return Vae(down, up, objective)


class Step:
    """A training step with Adam: the networks, the sample, the objective, its gradients, the update."""

    def __init__(self, model: Any, x: Tensor, kind: str, how: Function | None = None) -> None:
        self.model, self.x, self.kind, self.how = model, x, kind, how
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        self.terms: Function = how(partial(model, kind)) if how else partial(model, kind)

    def __call__(self, _: Any = None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.terms(self.x)[0]
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timed(self, which: str) -> Timed | None:
        """The step; or the objective without the networks, forward and backward, where it is not compiled."""
        if which == STEP or self.how:
            return Timed(self) if which == STEP else None
        with torch.no_grad():
            made, objective = self.model.alone(self.kind, self.x)
        leaves = [t.detach().clone().requires_grad_() for t in made]
        flowing = torch.randn_like(objective(*leaves)[1])
        return Timed(lambda _: torch.autograd.grad(objective(*leaves), leaves, [None, flowing]))

    def wrong(self) -> str:
        """What is wrong, or "": loss and gradients against the same networks and noise in float64."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()  # without dropout
        # Convolutions are TF32 on a GPU unless told otherwise: fine for training, too coarse for this.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            loss, z, mean, std = self.terms(self.x)
            loss.backward()
        exact = copy.deepcopy(self.model).double()
        exact.zero_grad()
        truth = exact("truth", self.x.double(), ((z.double() - mean) / std).detach())[0]
        truth.backward()
        self.model.train()
        pairs = [("the loss", loss, truth)]
        for name, p in exact.named_parameters():
            if p.grad is not None:
                got = self.model.get_parameter(name).grad
                pairs.append((f"the gradient of {name}", got, p.grad))
        return cases.off(pairs, LIMIT)


@dataclass(frozen=True)
class Model:
    """What makes a model for a width, the width on the CPU and on a GPU, and its batch as a function of normal values."""

    name: str
    build: Function
    widths: tuple[int, int]
    batch: cases.Shape
    x: Function = torch.sigmoid
    compiled: bool = True

    suite = op = "steps"
    functions, passes, dtype_name = ("fastvae", "eager"), (STEP, BOTH), "float32"
    wrong, least_bytes = staticmethod(Step.wrong), staticmethod(lambda which: None)
    shape = property(lambda self: "x".join(map(str, self.batch)))
    elements = property(lambda self: math.prod(self.batch))

    def __str__(self) -> str:
        return self.name

    def start(self, device: torch.device) -> Function:
        """What makes a training step, with one of `functions`, of a copy of one model."""
        torch.manual_seed(0)
        model = self.build(self.widths[device.type == "cuda"]).to(device)
        x = self.x(torch.randn(self.batch, device=device))
        return lambda kind, how=None: Step(copy.deepcopy(model), x, kind, how)


def _scvi(genes: int, likelihood: str) -> Model:
    name, shape = f"step: SCVI, {likelihood}, {genes} genes", (128, genes)
    return Model(name, lambda _: Scvi(genes, likelihood), (0, 0), shape, cases.sparse_counts, False)


# fmt: off
MODELS = (
    *(_scvi(genes, likelihood) for genes in (4000, 20000) for likelihood in ("nb", "zinb")),
    Model("step: vdvae-like, 10 logistics, 32 px", lambda w: residual([w, 2 * w, 2 * w], 16, 100, of_mixtures), (32, 128), (32, 3, 32, 32), cases.levels),
    Model("step: beta-TCVAE, 64 px, 10 latents", lambda w: convolutional(w, 10, 1, beta_tcvae), (4, 32), (1024, 1, 64, 64)),
    Model("step: MLP, MNIST", lambda w: mlp(784, w, 20), (400, 400), (128, 784)),
    Model("step: convolutional, 64 px", lambda w: convolutional(w, 128), (8, 32), (64, 3, 64, 64)),
)
# fmt: on
