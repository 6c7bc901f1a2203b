"""What is timed: ops at the sizes of real models, each with the expressions that people use in its place.

``eager`` is `fastvae.reference`, or what projects write where that is another expression. All functions of a case take the same
inputs. In 16 bits the plain losses convert to float32 first, as autocast does: a sum of float16 values overflows.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as D
from torch.distributions import MultivariateNormal, Normal

import fastvae
from fastvae import likelihoods as L
from fastvae import reference
from fastvae.bench.timing import BOTH, FORWARD, PASSES, Function, Torch, as_tuple

Shape = tuple[int, ...]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How far from float64 a result may be, of the largest value in a tensor: to find what computes something else, not to rank
# roundings (`fastvae verify` does that), so that there is room for what the plain expressions lose.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7}
STANDARD_ERRORS = 6.0  # of the mean and the variance of noise that an implementation drew itself
DATASET_SIZE = 50_000
# Batch, event and latents of a toy, an MLP on MNIST, a convolutional VAE on 64 x 64 pixels, and an autoencoder with spatial
# latents on 256 x 256. The last leaves the caches.
MNIST, PIXELS_64 = (128, (784,), (20,)), (64, (3, 64, 64), (128,))
SIZES = ((1, (16,), (4,)), MNIST, PIXELS_64, (32, (3, 256, 256), (4, 32, 32)))
MIDDLE = (64, 4096)
LATENTS = ((128, 20), MIDDLE, (32, 65536))


class Leaf(NamedTuple):
    """An input: `into` of normal values, with a gradient if it is `wanted`."""

    shape: Shape
    into: Function = lambda normal: normal
    wanted: bool = True


@dataclass(frozen=True)
class Case:
    """An op on some inputs. `functions` has "fastvae", "eager", and whatever else there is."""

    suite: str
    op: str
    leaves: list[Leaf]
    functions: dict[str, Function]
    variant: str = ""
    dtype: torch.dtype = torch.float32
    truths: dict[str, Function] = field(default_factory=dict)  # "" for all; or "eager" is it
    noise: Function | None = None  # of an op that draws: eps from its first output and its inputs
    moved: Shape | None = None  # values in each pass per element of the first input
    passes: tuple[str, ...] = (BOTH,)
    cold: bool = False  # BOTH once more, with caches emptied before each call
    compiled: bool = True
    jax: bool = False
    threads: int | None = None
    limit: float | None = None  # of the check, where the usual code has fewer digits

    label = property(lambda self: f"{self.op}: {self.variant}" if self.variant else self.op)
    dtype_name = property(lambda self: str(self.dtype).removeprefix("torch."))
    elements = property(lambda self: sum(math.prod(leaf.shape) for leaf in self.leaves))

    def __str__(self) -> str:
        threads = f", {self.threads} thread" if self.threads else ""
        return f"{self.label} {self.shape} {self.dtype_name}{threads}"

    @property
    def shape(self) -> str:
        shapes = dict.fromkeys(leaf.shape for leaf in self.leaves if leaf.wanted)
        return " + ".join("x".join(map(str, shape)) for shape in shapes)

    def inputs(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The same values in every call."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(7)
        options: Any = {"device": device, "dtype": self.dtype, "generator": generator}
        drawn = [leaf.into(torch.randn(leaf.shape, **options)) for leaf in self.leaves]
        return [t.requires_grad_(leaf.wanted) for t, leaf in zip(drawn, self.leaves, strict=True)]

    def upstream(self, inputs: list[Tensor]) -> list[Tensor | None]:
        """What flows into the outputs: 1 into a loss, and random values into a tensor, as in the middle of a network."""
        outputs = as_tuple(self.functions["eager"](*self.inputs("meta")))
        return [torch.randn_like(o, device=inputs[0].device) if o.dim() else None for o in outputs]

    def least_bytes(self, which: str) -> int:
        """What a pass has to read and write, each byte once.

        A scalar loss can write its gradients while it has the inputs in registers: its backward pass then moves nothing. An unscaled
        gradient underflows in float16, and sums over pairs are too long for it: those read their inputs again.
        """
        read, first = self.elements, math.prod(self.leaves[0].shape)
        both = read + sum(math.prod(leaf.shape) for leaf in self.leaves if leaf.wanted)
        again = self.dtype is torch.float16 or self.suite == "pairs"
        of_loss = (read, both, read + both) if again else (read, 0, both)
        values = [first * n for n in self.moved] if self.moved else of_loss
        return int(values[PASSES.index(which)] * self.dtype.itemsize)

    def start(self, device: torch.device) -> Function:
        """What makes an implementation of one of `functions`, changed by `how`, on inputs that all share."""
        inputs = self.inputs(device)
        upstream = self.upstream(inputs)
        return lambda name, how=lambda f: f: Torch(how(self.functions[name]), inputs, upstream)

    def wrong(self, name: str, made: Any) -> str:
        """What is wrong with an implementation's outputs and gradients, held against float64, or "".

        Noise that it drew is found from its z, and has to be N(0, 1) as far as its moments show.
        """
        outputs, gradients = made.both()
        values = [t.detach().double() for t in made.inputs]
        if self.noise:
            values.append(self.noise(outputs[0].detach().double(), *values))
            if (problem := wrong_noise(values[-1], self.dtype)) or self.op == "noise":
                return problem
        pairs = zip(values, made.inputs, strict=False)
        wanted = [value.requires_grad_() for value, t in pairs if t.requires_grad]
        exact = as_tuple(
            (self.truths.get(name) or self.truths.get("", self.functions["eager"]))(*values)
        )
        flowing = [None if u is None else u.double() for u in made.upstream]
        true = torch.autograd.grad(exact, wanted, flowing)
        for kind, got, want in (("gradient", gradients, true), ("output", outputs, exact)):
            for i, pair in enumerate(zip(got, want, strict=True)):
                if not (error := distance(*pair)) <= (self.limit or LIMIT[self.dtype]):
                    return f"{kind} {i} is off by {error:.2g} of its largest value"
        return ""


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest true value; infinite where `got` is not finite."""
    if got.shape != want.shape:
        return math.inf
    want = want.detach()
    error = (got.detach().double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
    return float(error) if error.isfinite() else math.inf


def wrong_noise(eps: Tensor, dtype: torch.dtype) -> str:
    """Whether drawn noise has the mean and the variance of N(0, 1), as far as its dtype can show."""
    for name, off, error in (("mean", eps, 1.0), ("variance", eps.square() - 1, math.sqrt(2))):
        mean = float(off.mean())
        if not abs(mean) <= STANDARD_ERRORS * error / math.sqrt(eps.numel()) + LIMIT[dtype]:
            return f"the {name} of its noise is off by {mean:.2g}"
    return ""


def _half(normal: Tensor) -> Tensor:
    return 0.5 * normal


def _positive(normal: Tensor) -> Tensor:
    return (0.3 * normal).exp()


def _latent(*shape: int) -> list[Leaf]:
    return [Leaf(shape), Leaf(shape, _half)]


def _ours(call: Function) -> dict[str, Function]:
    """``call(ops, *inputs)`` with the fused ops, and with their plain forms."""
    return {"fastvae": partial(call, fastvae), "eager": partial(call, reference)}


# The objective and its parts ----------------------------------------------------------------------


def _wide(function: Function) -> Function:
    return lambda *inputs: function(*(t.float() if t.dtype.itemsize == 2 else t for t in inputs))


def _sample(ops: Any, mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Any:
    return ops.reparameterize(mu, logvar, eps=eps)


def _normal(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def _eps(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (z - mu) * torch.exp(-0.5 * logvar)


def _torch_kl(q: D.Distribution, p: D.Distribution) -> Any:
    kl = D.kl_divergence(q, p)
    return kl.sum() / kl.shape[0]


@_wide
def _sse(recon_x: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(recon_x, x, reduction="sum") / len(x)


@_wide
def _log_p(recon_x: Tensor, x: Tensor) -> Any:
    """The squared error is -log N(x; recon_x, 1/2), but for a constant."""
    log_p = Normal(recon_x, math.sqrt(0.5)).log_prob(x).sum()
    return -(log_p + 0.5 * math.log(math.pi) * x.numel()) / len(x)


_kl = _wide(reference.kl_normal)
_kl_normals = _wide(lambda *q: _torch_kl(_normal(*q), Normal(0.0, 1.0)))

FUNCTIONS: dict[str, dict[str, Function]] = {
    "vae_loss": {
        "fastvae": lambda *inputs: fastvae.vae_loss(*inputs).loss,
        "eager": _wide(lambda *inputs: reference.vae_loss(*inputs).loss),
        "distributions": lambda y, x, *q: _log_p(y, x) + _kl_normals(*q),
        "functional": lambda y, x, *q: _sse(y, x) + _kl(*q),
    },
    "reconstruction_loss": {
        "fastvae": fastvae.reconstruction_loss,
        "eager": _wide(reference.reconstruction_loss),
        "distributions": _log_p,
        "functional": _sse,
    },
    "kl_normal": {"fastvae": fastvae.kl_normal, "eager": _kl, "distributions": _kl_normals},
    "reparameterize": _ours(_sample) | {"distributions": lambda *q: _normal(*q).rsample()},
    "sample_and_kl": {
        "fastvae": lambda mu, logvar, eps=None: fastvae.sample_and_kl(mu, logvar, eps=eps),
        "eager": lambda *inputs: (_sample(reference, *inputs), _kl(*inputs[:2])),
        "distributions": lambda *q: (_normal(*q).rsample(), _kl_normals(*q)),
    },
    "noise": {
        "fastvae": lambda mu, _: fastvae.random.philox_normal(mu.shape, seed=1, device=mu.device),
        "eager": lambda mu, _: torch.randn_like(mu),
    },
}
# Of an op that draws: the values that each pass moves for one of mu, and the noise in what it returned.
DRAWING: dict[str, tuple[Any, Function | None]] = {
    "reparameterize": ((3, 3, 6), _eps),
    "sample_and_kl": ((3, 5, 8), _eps),
    "noise": ((1, 0, 0), lambda z, *_: z),
}


def objective(op: str, size: Any, dtype: torch.dtype = DTYPES[0], **options: Any) -> Case:
    """vae_loss or reconstruction_loss, of "mse"."""
    batch, event, latent = size
    x, latents = (batch, *event), _latent(batch, *latent) if op == "vae_loss" else []
    leaves = [Leaf(x), Leaf(x, wanted=False), *latents]
    given: Any = {"suite": "ops", "functions": FUNCTIONS[op], "passes": PASSES} | options
    return Case(op=op, leaves=leaves, dtype=dtype, jax=True, **given)


def latent(op: str, shape: Shape, dtype: torch.dtype = DTYPES[0], eps: bool = False) -> Case:
    """An op of mu and logvar alone."""
    moved, noise = DRAWING.get(op, (None, None))
    functions, leaves = FUNCTIONS[op], _latent(*shape)
    if eps:  # torch.distributions draws its own
        functions = {n: f for n, f in functions.items() if n != "distributions"}
        moved, noise = (moved[0] + 1, moved[1] + 1, moved[2] + 2), None
        leaves.append(Leaf(shape, wanted=False))
    variant, passes = "eps given" * eps, PASSES[:1] if op == "noise" else PASSES
    return Case("ops", op, leaves, functions, variant, dtype, {}, noise, moved, passes, jax=True)


def op_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Case]:
    """Every op at the sizes of real models in float32, and at the middle ones in 16 bits."""
    for dtype in dtypes:
        full = dtype is torch.float32
        for size in SIZES if full else SIZES[1:3]:
            yield objective("vae_loss", size, dtype)
        yield objective("reconstruction_loss", PIXELS_64, dtype)
        for op in ("kl_normal", "reparameterize", "sample_and_kl"):
            for shape in LATENTS if full else (MIDDLE,):
                yield latent(op, shape, dtype)
        if full:
            yield from (latent(op, MIDDLE, eps=True) for op in ("reparameterize", "sample_and_kl"))
            yield latent("noise", (1, 1 << 22))


def sigmoid_cases() -> Iterator[Case]:
    """vae_loss behind a decoder that ends in a sigmoid, which a compiler can fuse with it."""

    def behind(function: Function) -> Function:
        return lambda hidden, *rest: function(hidden.sigmoid(), *rest)

    functions = {name: behind(f) for name, f in FUNCTIONS["vae_loss"].items()}
    given: Any = {"suite": "compiled", "variant": "after a sigmoid", "functions": functions}
    return (objective("vae_loss", size, passes=(BOTH,), **given) for size in SIZES)


def growing(elements: int, **options: Any) -> Case:
    """vae_loss with N elements in 16 samples, and one latent to 16 of them."""
    size = (16, (elements // 16,), (elements // 256,))
    return objective("vae_loss", size, **{"suite": "growth", "passes": (BOTH,)} | options)


def growing_batch(batch: int) -> Case:
    return objective("vae_loss", (batch, *MNIST[1:]), suite="batch", passes=(BOTH,))


# Options of the KL, other divergences, importance weights -----------------------------------------


def _kl_option(shape: Shape, variant: str, **options: Any) -> Case:
    """kl_normal with an option; ``fastvae-plain`` is the fused op without it."""

    def call(ops: Any, mu: Tensor, logvar: Tensor, *weight: Tensor) -> Any:
        return ops.kl_normal(mu, logvar, **(options or {"weight": weight[0]}))

    plain = _ours(lambda ops, mu, logvar, *_: ops.kl_normal(mu, logvar))
    functions = _ours(call) | {"fastvae-plain": plain["fastvae"]}
    weight = [] if options else [Leaf(shape, lambda n: (n > -1).to(n), False)]
    truths = {"fastvae-plain": plain["eager"]}
    return Case("terms", "kl_normal", _latent(*shape) + weight, functions, variant, truths=truths)


def _of_normals(shape: Shape) -> Case:
    def of(kl: Function, **options: Any) -> Function:
        return lambda m, s, n, t: kl(Normal(m, s), Normal(n, t), **options)

    def plain(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return reference.kl_normal(m, 2 * s.log(), n, 2 * t.log())

    ours = of(fastvae.kl_divergence, reduction="batchmean")
    functions = {"fastvae": ours, "eager": plain, "distributions": of(_torch_kl)}
    leaves = [Leaf(shape), Leaf(shape, _positive)] * 2
    return Case("terms", "kl_divergence", leaves, functions, "of Normals")


def _full_covariance(latents: int, batch: int = 128) -> Case:
    """A sample of a Gaussian with a covariance's Cholesky factor, and its KL from N(0, I)."""

    def closed_form(mu: Tensor, factor: Tensor, eps: Tensor | None = None) -> Any:
        factor, eps = torch.tril(factor), torch.randn_like(mu) if eps is None else eps
        squares = mu.square().sum() + factor.square().sum() - mu.numel()
        logs = factor.diagonal(0, -2, -1).log().sum()
        return mu + (factor @ eps.unsqueeze(-1)).squeeze(-1), (0.5 * squares - logs) / len(mu)

    def of_torch(mu: Tensor, factor: Tensor) -> Any:
        q = MultivariateNormal(mu, scale_tril=torch.tril(factor))
        prior = MultivariateNormal(torch.zeros_like(mu), scale_tril=torch.eye(latents).to(mu))
        return q.rsample(), _torch_kl(q, prior)

    def noise(z: Tensor, mu: Tensor, factor: Tensor) -> Any:
        return torch.linalg.solve_triangular(factor, (z - mu)[..., None], upper=False)[..., 0]

    def factor(n: Tensor) -> Tensor:
        return torch.tril(0.1 * n, -1) + torch.diag_embed(_positive(n).diagonal(0, -2, -1))

    ours, op = fastvae.sample_and_kl_multivariate_normal, "kl_multivariate_normal"
    functions: Any = {"fastvae": ours, "eager": closed_form, "distributions": of_torch}
    leaves = [Leaf((batch, latents)), Leaf((batch, latents, latents), factor)]
    return Case("terms", op, leaves, functions, "with the sample", noise=noise)


def _importance(estimator: str, batch: int = 32, samples: int = 50) -> Case:
    """K samples of each posterior, their weights, the bound; recon_x are logits of 784 pixels."""
    dreg, kinds = estimator == "dreg", {"likelihood": "bce_with_logits", "estimator": estimator}

    def fused(y: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        z: Any = fastvae.reparameterize(*(t[:, None].expand_as(eps) for t in (mu, logvar)), eps=eps)
        log_weight = fastvae.importance_log_weight(y, x, z, mu, logvar, **kinds)
        return fastvae.iwae_loss(log_weight, estimator=estimator, z=z)

    def plain(y: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor) -> Any:
        mu, sigma = mu[:, None], torch.exp(0.5 * logvar)[:, None]
        z = mu + sigma * eps
        q = Normal(mu.detach(), sigma.detach(), False) if dreg else Normal(mu, sigma, False)
        apart = Normal(0.0, 1.0, False).log_prob(z) - q.log_prob(z)
        nll = F.binary_cross_entropy_with_logits(y, x[:, None].expand_as(y), reduction="none")
        log_weight = apart.sum(-1) - nll.sum(-1)
        if dreg:
            share = torch.softmax(log_weight.detach(), 1).unsqueeze(-1)
            z.register_hook(lambda gradient: gradient * share)
        return (math.log(samples) - torch.logsumexp(log_weight, 1)).mean()

    leaves = [Leaf((batch, samples, 784)), Leaf((batch, 784), torch.sigmoid, False)]
    leaves += [*_latent(batch, 20), Leaf((batch, samples, 20), wanted=False)]
    name, functions = f"{estimator}, K = {samples}", {"fastvae": fused, "eager": plain}
    # No compiler takes the hook of dreg.
    return Case("terms", "iwae_loss", leaves, functions, name, compiled=not dreg)


def term_cases() -> Iterator[Case]:
    for shape in LATENTS[:2]:
        for per in ("element", "latent"):
            yield _kl_option(shape, f"free bits per {per}", free_bits=0.5, free_bits_per=per)
        yield _kl_option(shape, "weight")
        yield _of_normals(shape)
    yield from map(_full_covariance, (16, 32, 64))
    yield from map(_importance, ("iwae", "dreg"))


# All pairs of samples and Gaussian components -----------------------------------------------------


def kl_decomposition(z: Tensor, mu: Tensor, logvar: Tensor, n: int) -> Any:
    """As disentangling-vae, with the log-weights where they belong: one [B, B, L], of which `reference` makes three."""
    batch, log_prob = len(z), reference.normal_log_prob
    mat_log_qz = log_prob(z.unsqueeze(1), mu, logvar, reduction="none")
    weight = torch.full((batch, batch), (n - 1) / (n * (batch - 1)), device=z.device)
    log_weight = weight.fill_diagonal_(1 / n).log()
    log_qz = torch.logsumexp(mat_log_qz.sum(2) + log_weight, 1)
    log_prod_qzi = torch.logsumexp(mat_log_qz + log_weight.unsqueeze(2), 1).sum(1)
    mi, tc = log_prob(z, mu, logvar) - log_qz, log_qz - log_prod_qzi
    return mi.mean(), tc.mean(), (log_prod_qzi - log_prob(z)).mean()


def decomposition(batch: int, latents: int) -> Case:
    """beta-TCVAE's sum, beta being 6; its plain form is `kl_decomposition` of this module."""

    def call(ops: Any, *inputs: Tensor) -> Any:
        mi, tc, dim = ops.kl_decomposition(*inputs, DATASET_SIZE)
        return mi + 6 * tc + dim

    functions = _ours(call) | {"eager": partial(call, sys.modules[__name__])}
    leaves = [Leaf((batch, latents), lambda n: 1.5 * n), *_latent(batch, latents)]
    return Case("pairs", "kl_decomposition", leaves, functions, passes=PASSES)


def _mixture_log_prob(batch: int, k: int, latents: int) -> Case:
    """VampPrior's: k components of equal weight."""

    def of_torch(z: Tensor, mu: Tensor, logvar: Tensor) -> Any:
        mixing = D.Categorical(logits=torch.zeros(k).to(mu), validate_args=False)
        each = D.Independent(Normal(mu, torch.exp(0.5 * logvar), False), 1, False)
        return D.MixtureSameFamily(mixing, each, False).log_prob(z)

    def call(ops: Any, z: Tensor, *q: Tensor) -> Any:
        return ops.mixture_log_prob(z, *q, torch.full((k,), -math.log(k)).to(z))

    functions = _ours(call) | {"distributions": of_torch}
    leaves = [Leaf((batch, latents)), *_latent(k, latents)]
    return Case("pairs", "mixture_log_prob", leaves, functions, passes=PASSES)


def pair_cases() -> Iterator[Case]:
    for batch, latents in ((64, 10), (128, 32), (1024, 32), (2048, 10)):
        yield decomposition(batch, latents)
    yield from (_mixture_log_prob(*size) for size in ((100, 500, 40), (3840, 20, 10)))


# Likelihoods --------------------------------------------------------------------------------------


def _likelihood(name: str, make: Function, leaves: Any, theirs: Any, **options: Any) -> Case:
    """reconstruction_loss of `make`'s likelihood beside others' functions: sums over all elements by the baseline's name."""

    def mean(of: Function) -> Function:
        return lambda y, x, *rest: of(y, x, *rest) / len(x)

    ours = _ours(lambda ops, y, x, *q: ops.reconstruction_loss(y, x, likelihood=make(*q)))
    functions, truths = ours | {n: mean(f) for n, f in theirs.items()}, {"": ours["eager"]}
    op = "reconstruction_loss"
    return Case("likelihoods", op, leaves, functions, name, truths=truths, **options)


def _summed(function: Function) -> dict[str, Function]:
    return {"eager": partial(function, reduction="sum")}


def _log_prob(of: Function, name: str = "distributions") -> dict[str, Function]:
    """With torch.distributions' checks of arguments off, as fastvae has none."""
    return {name: lambda y, x, *rest: -of(y, *rest).log_prob(x).sum()}


def mixture(y: Tensor, x: Tensor, channel: int, last: float) -> Tensor:
    """PixelCNN++'s formula for 10 components, as vdvae (channels last) and NVAE evaluate it in float32: between the edges the
    difference of two sigmoids, or where that is small the density times the width of a bin."""
    logits, rest = y.split([10, 90], channel)
    mean, log_scale, raw = rest.unflatten(channel, (3, 3, 10)).unbind(channel + 1)
    x = x.unsqueeze(channel + 1).expand_as(mean)
    m, c, v = mean.unbind(channel), raw.tanh().unbind(channel), x.unbind(channel)
    mean = torch.stack([m[0], m[1] + c[0] * v[0], m[2] + c[1] * v[0] + c[2] * v[1]], channel)
    log_scale = log_scale.clamp(min=-7)
    centered, precision = x - mean, torch.exp(-log_scale)
    upper, lower = precision * (centered + 1 / 255), precision * (centered - 1 / 255)
    middle = precision * centered
    p = torch.sigmoid(upper) - torch.sigmoid(lower)
    density = middle - log_scale - 2 * F.softplus(middle)
    inside = torch.where(p > 1e-5, p.clamp(min=1e-12).log(), density - math.log(127.5))
    log_p = torch.where(x > last, -F.softplus(lower), inside)
    log_p = torch.where(x < -0.999, upper - F.softplus(upper), log_p).sum(channel)
    return -torch.logsumexp(log_p + logits.log_softmax(channel), channel).sum()


def levels(normal: Tensor) -> Tensor:
    """Pictures in [-1, 1]."""
    return (normal.sigmoid() * 255).round() / 127.5 - 1


def sparse_counts(normal: Tensor) -> Tensor:
    """A tenth is not 0."""
    return (1.1 * (normal - 1.2816)).exp().floor() * (normal > 1.2816)


def _of_counts(sparse: bool, inflated: bool) -> Case:
    """128 cells and 4,000 genes, beside scvi-tools' own distributions, and torch's."""
    name, shape = f"{'ZeroInflated' * inflated}NegativeBinomial", (128, 4000)

    def of_scvi(y: Tensor, theta: Tensor, *zi: Tensor) -> Any:
        kind = getattr(importlib.import_module("scvi.distributions"), name)
        return kind(mu=y, theta=theta, **dict(zip(("zi_logits",), zi, strict=False)))

    def of_torch(y: Tensor, theta: Tensor) -> Any:
        return D.NegativeBinomial(theta, logits=torch.log(y / theta), validate_args=False)

    rate: Function = lambda n: (n - 2.3).exp() if sparse else 10 * _positive(n)  # noqa: E731
    x: Function = sparse_counts if sparse else lambda n: (5 * (0.8 * n).exp()).floor()
    leaves = [Leaf(shape, rate), Leaf(shape, x, False), Leaf((4000,), torch.exp)]
    theirs = _log_prob(of_scvi, "scvi-tools") | ({} if inflated else _log_prob(of_torch))
    options: Any = {"theirs": theirs, "passes": (FORWARD, BOTH)}
    variant = f"{name}, {'sparse' if sparse else 'dense'}"
    return _likelihood(variant, L.NegativeBinomial, leaves + [Leaf(shape)] * inflated, **options)


def _of_mixtures(project: str, shape: Shape, channel: int, last: float) -> Case:
    """32,768 pixels, with channels and edges where the project has them. The usual code has no more digits than the limit asks for."""
    make = partial(L.LogisticMixture, channel_dim=channel, edges=(-0.999, last))
    leaves = [Leaf(shape), Leaf(tuple(3 if n == 100 else n for n in shape), levels, False)]
    theirs = {"eager": partial(mixture, channel=channel % 4, last=last)}
    options: Any = {"limit": 5e-3, "passes": (FORWARD, BOTH)}
    return _likelihood(f"LogisticMixture as in {project}", make, leaves, theirs, **options)


FLAT, SCALE = (64, 12288), math.exp(-1)
PLAIN, HALF, PIXEL = Leaf(FLAT), Leaf(FLAT, _half), Leaf(FLAT, torch.sigmoid)
# Near 0 torch's gradient of the continuous Bernoulli is off by 0.5% in float32.
OFF_0, COUNTS = Leaf(FLAT, lambda n: n + n.sign()), Leaf(FLAT, lambda n: n.exp().round())
# Likelihoods, recon_x and x and parameters, and the same without fastvae.
# fmt: off
LIKELIHOODS: list[tuple[str, Function, list[Leaf], dict[str, Function]]] = [
    ("Gaussian, logvar", L.Gaussian, [PLAIN, PLAIN, HALF], {"eager": lambda y, x, v: 0.5 * ((y - x).pow(2) / v.exp() + v).sum()}),
    ("Bernoulli, probabilities", partial(L.Bernoulli, logits=False), [PIXEL, PIXEL], _summed(F.binary_cross_entropy)),
    ("SquaredError, sigmoid", partial(L.SquaredError, activation="sigmoid"), [PLAIN, PIXEL], {"functional": lambda y, x: F.mse_loss(y.sigmoid(), x, reduction="sum")}),
    ("Bernoulli", L.Bernoulli, [PLAIN, PIXEL], _summed(F.binary_cross_entropy_with_logits)),
    ("L1", L.L1, [PLAIN, HALF], _summed(F.l1_loss)),
    ("Huber", L.Huber, [PLAIN, HALF], _summed(F.huber_loss)),
    ("Poisson", L.Poisson, [PLAIN, COUNTS], _summed(F.poisson_nll_loss)),
    ("Laplace", partial(L.Laplace, -1, full=True), [PLAIN, HALF], _log_prob(lambda y: D.Laplace(y, SCALE, False))),
    ("StudentT", partial(L.StudentT, 4, -1, full=True), [PLAIN, HALF], _log_prob(lambda y: D.StudentT(4.0, y, SCALE, False))),
    ("ContinuousBernoulli", L.ContinuousBernoulli, [OFF_0, PIXEL], _log_prob(lambda y: D.ContinuousBernoulli(logits=y, validate_args=False))),
]
# fmt: on


def likelihood_cases() -> Iterator[Case]:
    for sparse in (True, False):
        yield from (_of_counts(sparse, inflated) for inflated in (False, True))
    yield _of_mixtures("vdvae", (32, 32, 32, 100), -1, 0.999)
    yield _of_mixtures("NVAE", (32, 100, 32, 32), 1, 0.99)
    for name, make, (recon_x, x, *parameters), theirs in LIKELIHOODS:
        leaves = [recon_x, x._replace(wanted=False), *parameters]
        yield _likelihood(name, make, leaves, theirs)


def all_cases() -> list[Case]:
    """Without those that grow."""
    return [*op_cases(), *likelihood_cases(), *term_cases(), *pair_cases(), *sigmoid_cases()]
