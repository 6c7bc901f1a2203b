"""What is timed: ops at the sizes of real models, each with the expressions that people use in its place.

``eager`` is `fastvae.reference`, or what projects write where that is another expression. All functions of a case take the same
inputs. In 16 bits the plain losses convert to float32 first, as autocast does: a sum of float16 values overflows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as D
from torch.distributions import Normal

import fastvae
from fastvae import likelihoods as L
from fastvae import reference

Function = Callable[..., Any]
Shape = tuple[int, ...]

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "both")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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

    def __str__(self) -> str:
        threads = f", {self.threads} thread" if self.threads else ""
        return f"{self.label} {self.shape} {self.dtype_name}{threads}"

    def inputs(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The same values in every call."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(7)
        options: Any = {"device": device, "dtype": self.dtype, "generator": generator}
        drawn = [leaf.into(torch.randn(leaf.shape, **options)) for leaf in self.leaves]
        return [t.requires_grad_(leaf.wanted) for t, leaf in zip(drawn, self.leaves, strict=True)]

    @cached_property
    def elements(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    @property
    def shape(self) -> str:
        shapes = dict.fromkeys(leaf.shape for leaf in self.leaves if leaf.wanted)
        return " + ".join("x".join(map(str, shape)) for shape in shapes)

    def upstream(self, inputs: list[Tensor]) -> list[Tensor | None]:
        """What flows into the outputs: 1 into a loss, and random values into a tensor, as in the middle of a network."""
        outputs = as_tuple(self.functions["eager"](*self.inputs("meta")))
        like = [torch.empty_like(o, device=inputs[0].device) if o.dim() else None for o in outputs]
        return [None if t is None else t.normal_() for t in like]

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
        return values[PASSES.index(which)] * self.dtype.itemsize


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _half(normal: Tensor) -> Tensor:
    return 0.5 * normal


def _latent(*shape: int) -> list[Leaf]:
    return [Leaf(shape), Leaf(shape, _half)]


# The objective and its parts ----------------------------------------------------------------------


def _wide(function: Function) -> Function:
    return lambda *inputs: function(*(t.float() if t.dtype.itemsize == 2 else t for t in inputs))


def _posterior(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def _torch_kl(q: D.Distribution, p: D.Distribution) -> Any:
    kl = D.kl_divergence(q, p)
    return kl.sum() / kl.shape[0]


def _sse(recon_x: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(recon_x, x, reduction="sum") / len(x)


def _sse_distributions(recon_x: Tensor, x: Tensor) -> Any:
    """The squared error is -log N(x; recon_x, 1/2), but for a constant."""
    log_p = Normal(recon_x, math.sqrt(0.5)).log_prob(x).sum()
    return -(log_p + 0.5 * math.log(math.pi) * x.numel()) / len(x)


_kl = _wide(reference.kl_normal)
_kl_distributions = _wide(lambda *q: _torch_kl(_posterior(*q), Normal(0.0, 1.0)))


def _sample(ops: Any) -> Function:
    return lambda mu, logvar, eps=None: ops.reparameterize(mu, logvar, eps=eps)


_plain_sample = _sample(reference)
_NAMES = ("fastvae", "eager", "distributions", "functional")
_OF: dict[str, tuple[Function, ...]] = {
    "vae_loss": (
        lambda *inputs: fastvae.vae_loss(*inputs).loss,
        _wide(lambda *inputs: reference.vae_loss(*inputs).loss),
        _wide(lambda y, x, *q: _sse_distributions(y, x) + _kl_distributions(*q)),
        _wide(lambda y, x, *q: _sse(y, x) + reference.kl_normal(*q)),
    ),
    "reconstruction_loss": (
        fastvae.reconstruction_loss,
        *map(_wide, (reference.reconstruction_loss, _sse_distributions, _sse)),
    ),
    "kl_normal": (fastvae.kl_normal, _kl, _kl_distributions),
    "reparameterize": (_sample(fastvae), _plain_sample, lambda *q: _posterior(*q).rsample()),
    "sample_and_kl": (
        lambda mu, logvar, eps=None: fastvae.sample_and_kl(mu, logvar, eps=eps),
        lambda mu, logvar, eps=None: (_plain_sample(mu, logvar, eps), _kl(mu, logvar)),
        lambda *q: (_posterior(*q).rsample(), _kl_distributions(*q)),
    ),
    "noise": (
        lambda mu, _: fastvae.random.philox_normal(mu.shape, seed=1, device=mu.device),
        lambda mu, _: torch.randn_like(mu),
    ),
}
FUNCTIONS = {op: dict(zip(_NAMES, functions, strict=False)) for op, functions in _OF.items()}
MOVED = {"reparameterize": (3, 3, 6), "sample_and_kl": (3, 5, 8), "noise": (1, 0, 0)}


def objective(op: str, size: Any, dtype: torch.dtype = DTYPES[0], **options: Any) -> Case:
    """vae_loss or reconstruction_loss, of "mse"."""
    batch, event, latent = size
    x, latents = (batch, *event), _latent(batch, *latent) if op == "vae_loss" else []
    leaves = [Leaf(x), Leaf(x, wanted=False), *latents]
    given: dict[str, Any] = {"suite": "ops", "functions": FUNCTIONS[op], "passes": PASSES} | options
    return Case(op=op, leaves=leaves, dtype=dtype, jax=True, **given)


def latent(op: str, shape: Shape, dtype: torch.dtype = DTYPES[0], eps: bool = False) -> Case:
    """An op of mu and logvar alone."""
    passes = PASSES[:1] if op == "noise" else PASSES
    case = Case("ops", op, _latent(*shape), FUNCTIONS[op], dtype=dtype, passes=passes, jax=True)
    if op not in MOVED:
        return case
    if not eps:
        of_z: Function = lambda z, mu, logvar: (z - mu) * torch.exp(-0.5 * logvar)  # noqa: E731
        return replace(case, moved=MOVED[op], noise=None if op == "noise" else of_z)
    moved = tuple(n + more for n, more in zip(MOVED[op], (1, 1, 2), strict=True))
    functions = {n: f for n, f in FUNCTIONS[op].items() if n != "distributions"}  # draws its own
    leaves = [*case.leaves, Leaf(shape, wanted=False)]
    return replace(case, leaves=leaves, functions=functions, moved=moved, variant="eps given")


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

    given: Any = {n: behind(f) for n, f in FUNCTIONS["vae_loss"].items()}
    given = {
        "suite": "compiled",
        "variant": "after a sigmoid",
        "functions": given,
        "passes": (BOTH,),
    }
    return (objective("vae_loss", size, **given) for size in SIZES)


def growing(elements: int, **options: Any) -> Case:
    """vae_loss with N elements in 16 samples, and one latent to 16 of them."""
    size = (16, (elements // 16,), (elements // 256,))
    return objective("vae_loss", size, **{"suite": "growth", "passes": (BOTH,)} | options)


def growing_batch(batch: int) -> Case:
    return objective("vae_loss", (batch, *MNIST[1:]), suite="batch", passes=(BOTH,))


# Options of the KL, other divergences, importance weights -----------------------------------------


def _kl_option(shape: Shape, variant: str, **options: Any) -> Case:
    """kl_normal with an option; ``fastvae-plain`` is the fused op without it."""

    def of(ops: Any, options: Function) -> Function:
        return lambda mu, logvar, w=None: ops.kl_normal(mu, logvar, **options(w))

    given = (lambda w: options) if options else (lambda w: {"weight": w})
    functions = {"fastvae": of(fastvae, given), "eager": of(reference, given)}
    functions["fastvae-plain"], truth = (of(ops, lambda w: {}) for ops in (fastvae, reference))
    weight = [Leaf(shape, lambda n: (n > -1).to(n), False)] if variant == "weight" else []
    truths = {"fastvae-plain": truth}
    return Case("terms", "kl_normal", _latent(*shape) + weight, functions, variant, truths=truths)


def _of_normals(shape: Shape) -> Case:
    functions: dict[str, Function] = {
        "fastvae": lambda m, s, n, t: fastvae.kl_divergence(
            Normal(m, s), Normal(n, t), reduction="batchmean"
        ),
        "eager": lambda m, s, n, t: reference.kl_normal(m, 2 * s.log(), n, 2 * t.log()),
        "distributions": lambda m, s, n, t: _torch_kl(Normal(m, s), Normal(n, t)),
    }
    leaves = [Leaf(shape), Leaf(shape, lambda n: (0.3 * n).exp())] * 2
    return Case("terms", "kl_divergence", leaves, functions, "of Normals")


def _closed_form(mu: Tensor, factor: Tensor, eps: Tensor | None = None) -> Any:
    """A sample of a Gaussian with a covariance's Cholesky factor, and its KL from N(0, I)."""
    factor, eps = torch.tril(factor), torch.randn_like(mu) if eps is None else eps
    squares = mu.square().sum() + factor.square().sum() - mu.numel()
    logs = factor.diagonal(0, -2, -1).log().sum()
    return mu + (factor @ eps.unsqueeze(-1)).squeeze(-1), (0.5 * squares - logs) / len(mu)


def _full_covariance(latents: int, batch: int = 128) -> Case:
    def of_torch(mu: Tensor, factor: Tensor) -> Any:
        q = D.MultivariateNormal(mu, scale_tril=torch.tril(factor))
        prior = D.MultivariateNormal(torch.zeros_like(mu), scale_tril=torch.eye(latents).to(mu))
        return q.rsample(), _torch_kl(q, prior)

    def lower(n: Tensor) -> Tensor:
        return torch.tril(0.1 * n, -1) + torch.diag_embed((0.3 * n).exp().diagonal(0, -2, -1))

    def eps_of(z: Tensor, mu: Tensor, factor: Tensor) -> Any:
        return torch.linalg.solve_triangular(factor, (z - mu)[..., None], upper=False)[..., 0]

    functions: dict[str, Function] = {"fastvae": fastvae.sample_and_kl_multivariate_normal}
    functions |= {"eager": _closed_form, "distributions": of_torch}
    leaves = [Leaf((batch, latents)), Leaf((batch, latents, latents), lower)]
    op = "kl_multivariate_normal"
    return Case("terms", op, leaves, functions, "with the sample", noise=eps_of)


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
    functions: dict[str, Function] = {"fastvae": fused, "eager": plain}
    name = f"{estimator}, K = {samples}"  # no compiler takes the hook of dreg
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


def _pair_log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """As disentangling-vae writes it: [B, K, L]."""
    normalization = -0.5 * (math.log(2 * math.pi) + logvar)
    return normalization - 0.5 * ((z.unsqueeze(1) - mu) ** 2 * torch.exp(-logvar))


def kl_decomposition(z: Tensor, mu: Tensor, logvar: Tensor, n: int) -> Any:
    """disentangling-vae's decomposition, with the log-weights where they belong; `reference` makes [B, B, L] three times."""
    mat_log_qz, batch = _pair_log_density(z, mu, logvar), len(z)
    own = -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 * torch.exp(-logvar)).sum(1)
    log_pz = (-0.5 * (math.log(2 * math.pi) + z**2)).sum(1)
    weight = torch.full((batch, batch), (n - 1) / (n * (batch - 1)), device=z.device)
    log_weight = weight.fill_diagonal_(1 / n).log()
    log_qz = torch.logsumexp(mat_log_qz.sum(2) + log_weight, dim=1)
    log_prod_qzi = torch.logsumexp(mat_log_qz + log_weight.unsqueeze(2), dim=1).sum(1)
    return (own - log_qz).mean(), (log_qz - log_prod_qzi).mean(), (log_prod_qzi - log_pz).mean()


def _beta_tc(ops: Any) -> Function:
    """beta-TCVAE's sum, beta being 6."""

    def weighted(*inputs: Tensor) -> Any:
        mi, tc, dim = ops.kl_decomposition(*inputs, DATASET_SIZE)
        return mi + 6 * tc + dim

    return weighted


def decomposition(batch: int, latents: int) -> Case:
    functions = {"fastvae": _beta_tc(fastvae), "eager": _beta_tc(sys.modules[__name__])}
    leaves = [Leaf((batch, latents), lambda n: 1.5 * n), *_latent(batch, latents)]
    return Case("pairs", "kl_decomposition", leaves, functions, passes=PASSES)


def _mixture_log_prob(batch: int, k: int, latents: int) -> Case:
    """VampPrior's: k components of equal weight."""

    def of_torch(z: Tensor, mu: Tensor, logvar: Tensor) -> Any:
        mixing = D.Categorical(logits=torch.zeros(k).to(mu), validate_args=False)
        each = D.Independent(Normal(mu, torch.exp(0.5 * logvar), False), 1, False)
        return D.MixtureSameFamily(mixing, each, False).log_prob(z)

    def of(ops: Any) -> Function:
        return lambda z, *q: ops.mixture_log_prob(z, *q, torch.full((k,), -math.log(k)).to(z))

    functions = {"fastvae": of(fastvae), "eager": of(reference), "distributions": of_torch}
    leaves = [Leaf((batch, latents)), *_latent(k, latents)]
    return Case("pairs", "mixture_log_prob", leaves, functions, passes=PASSES)


def pair_cases() -> Iterator[Case]:
    for batch, latents in ((64, 10), (128, 32), (1024, 32), (2048, 10)):
        yield decomposition(batch, latents)
    yield from (_mixture_log_prob(*size) for size in ((100, 500, 40), (3840, 20, 10)))


# Likelihoods --------------------------------------------------------------------------------------


def likelihood(name: str, make: Function, leaves: list[Leaf], **given: Any) -> Case:
    """reconstruction_loss of `make`'s likelihood. Functions among `given` are baselines by name: sums over all elements."""

    def of(ops: Any) -> Function:
        return lambda y, x, *rest: ops.reconstruction_loss(y, x, likelihood=make(*rest))

    def per_sample(sum_of: Function) -> Function:
        return lambda y, x, *rest: sum_of(y, x, *rest) / len(x)

    functions = {"fastvae": of(fastvae), "eager": of(reference)}
    functions |= {n: per_sample(given.pop(n)) for n in [*given] if callable(given[n])}
    case = Case("likelihoods", "reconstruction_loss", leaves, functions, name)
    return replace(case, truths={"": of(reference)}, **given)


def _log_prob(of: Function) -> Function:
    """With torch.distributions' checks of arguments off, as fastvae has none."""
    return lambda y, x, *rest: -of(y, *rest).log_prob(x).sum()


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


def _of_counts(sparse: bool, inflated: bool, cells: int = 128, genes: int = 4000) -> Case:
    """Beside scvi-tools' own distributions, and torch's."""
    rate: Function = lambda n: (n - 2.3).exp() if sparse else 10 * (0.3 * n).exp()  # noqa: E731
    x: Function = sparse_counts if sparse else lambda n: (5 * (0.8 * n).exp()).floor()
    name = f"{'ZeroInflated' * inflated}NegativeBinomial"

    def of_scvi(y: Tensor, theta: Tensor, *zi: Tensor) -> Any:
        import scvi.distributions

        kind = getattr(scvi.distributions, name)
        return kind(mu=y, theta=theta, **dict(zip(("zi_logits",), zi, strict=False)))

    def of_torch(y: Tensor, theta: Tensor) -> Any:
        return D.NegativeBinomial(theta, logits=torch.log(y / theta), validate_args=False)

    shape = (cells, genes)
    leaves = [Leaf(shape, rate), Leaf(shape, x, False), Leaf((genes,), torch.exp)]
    theirs = {"scvi-tools": of_scvi} | ({} if inflated else {"distributions": of_torch})
    baselines: Any = {n: _log_prob(f) for n, f in theirs.items()} | {"passes": (FORWARD, BOTH)}
    variant = f"{name}, {'sparse' if sparse else 'dense'}"
    return likelihood(variant, L.NegativeBinomial, leaves + [Leaf(shape)] * inflated, **baselines)


def _of_mixtures(project: str, shape: Shape, channel: int, last: float) -> Case:
    """32,768 pixels, with channels and edges where the project has them. The usual code has no more digits than the limit asks for."""
    make = partial(L.LogisticMixture, channel_dim=channel, edges=(-0.999, last))
    leaves = [Leaf(shape), Leaf(tuple(3 if n == 100 else n for n in shape), levels, False)]
    theirs: Function = partial(mixture, channel=channel % 4, last=last)
    options: Any = {"eager": theirs, "limit": 5e-3, "passes": (FORWARD, BOTH)}
    return likelihood(f"LogisticMixture as in {project}", make, leaves, **options)


FLAT = (64, 12288)
SCALE = math.exp(-1)
# Likelihoods, their x of normal values, and what torch has: a function of (recon_x, x), or a distribution.
OF_TORCH: dict[str, tuple[Any, Any, Any]] = {
    "Bernoulli": (L.Bernoulli, torch.sigmoid, F.binary_cross_entropy_with_logits),
    "L1": (L.L1, _half, F.l1_loss),
    "Huber": (L.Huber, _half, F.huber_loss),
    "Poisson": (L.Poisson, lambda n: n.exp().round(), F.poisson_nll_loss),
    "Laplace": (partial(L.Laplace, -1, full=True), _half, lambda y: D.Laplace(y, SCALE, False)),
    "StudentT": (
        partial(L.StudentT, 4, -1, full=True),
        _half,
        lambda y: D.StudentT(4.0, y, SCALE, False),
    ),
    "ContinuousBernoulli": (
        L.ContinuousBernoulli,
        torch.sigmoid,
        lambda y: D.ContinuousBernoulli(logits=y, validate_args=False),
    ),
}


def likelihood_cases() -> Iterator[Case]:
    for sparse in (True, False):
        yield from (_of_counts(sparse, inflated) for inflated in (False, True))
    yield _of_mixtures("vdvae", (32, 32, 32, 100), -1, 0.999)
    yield _of_mixtures("NVAE", (32, 100, 32, 32), 1, 0.99)
    gaussian: Any = lambda y, x, v: 0.5 * ((y - x).pow(2) / v.exp() + v).sum()  # noqa: E731
    leaves = [Leaf(FLAT), Leaf(FLAT, wanted=False), Leaf(FLAT, _half)]
    yield likelihood("Gaussian, logvar", L.Gaussian, leaves, eager=gaussian)
    leaves = [Leaf(FLAT, torch.sigmoid), Leaf(FLAT, torch.sigmoid, False)]
    theirs: Any = {"eager": partial(F.binary_cross_entropy, reduction="sum")}
    make: Function = partial(L.Bernoulli, logits=False)
    yield likelihood("Bernoulli, probabilities", make, leaves, **theirs)
    theirs = {"functional": lambda y, x: F.mse_loss(y.sigmoid(), x, reduction="sum")}
    make = partial(L.SquaredError, activation="sigmoid")
    leaves = [Leaf(FLAT), leaves[1]]
    yield likelihood("SquaredError, sigmoid", make, leaves, **theirs)
    for name, (make, x, of) in OF_TORCH.items():
        # Near 0 torch's gradient of the continuous Bernoulli is off by 0.5% in float32.
        away = (lambda n: n + n.sign()) if name == "ContinuousBernoulli" else (lambda n: n)
        plain = hasattr(F, getattr(of, "__name__", ""))
        theirs = (
            {"eager": partial(of, reduction="sum")} if plain else {"distributions": _log_prob(of)}
        )
        yield likelihood(name, make, [Leaf(FLAT, away), Leaf(FLAT, x, False)], **theirs)


def all_cases() -> list[Case]:
    """Without those that grow."""
    return [*op_cases(), *likelihood_cases(), *term_cases(), *pair_cases(), *sigmoid_cases()]
