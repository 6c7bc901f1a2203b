"""What is timed: ops at the sizes of real models, each with the expressions that people use in its place.

``eager`` is `fastvae.reference`, or what projects write where that is another expression. All functions of a case take the same
inputs. In 16 bits the plain losses convert to float32 first, as autocast does: a sum of float16 values overflows.
"""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as D
from torch.distributions import Normal

import fastvae
from fastvae import likelihoods as L
from fastvae import reference

Shape = tuple[int, ...]
Function = Callable[..., Any]

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "both")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How far from float64 a result may be, of the largest value in a tensor: to find what computes something else, not to rank
# roundings (`fastvae verify` does that), so that there is room for what the plain expressions lose.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7}
STANDARD_ERRORS = 6.0  # of the mean and the variance of noise that an implementation drew itself
DATASET_SIZE = 50_000
# Batch, event and latents of a toy, an MLP on MNIST, a convolutional VAE on 64 x 64 pixels, and an autoencoder with spatial
# latents on 256 x 256. The last leaves the caches.
PIXELS_64 = (64, (3, 64, 64), (128,))
SIZES = ((1, (16,), (4,)), (128, (784,), (20,)), PIXELS_64, (32, (3, 256, 256), (4, 32, 32)))
MIDDLE = (64, 4096)
LATENTS = ((128, 20), MIDDLE, (32, 65536))


@dataclass(frozen=True)
class Timed:
    """``call(setup())``: neither the set-up is timed, nor freeing what the call returns."""

    call: Function
    setup: Function = lambda: None
    foreign: bool = False  # another library's: on no stream and in no allocator of torch


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Torch:
    """A function of tensors, differentiated by autograd: ``backward()`` would add to the leaves' own gradients, with a copy."""

    def __init__(self, function: Function, inputs: list[Tensor], upstream: list[Any]) -> None:
        self.function, self.inputs, self.upstream = function, inputs, upstream
        self.wanted = [t for t in inputs if t.requires_grad]

    def forward(self, _: Any = None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(self.function(*self.inputs))

    def backward(self, outputs: tuple[Tensor, ...]) -> Any:
        return torch.autograd.grad(outputs, self.wanted, self.upstream)

    def both(self, _: Any = None) -> tuple[Any, Any]:
        outputs = as_tuple(self.function(*self.inputs))
        return outputs, self.backward(outputs)

    def timed(self, which: str) -> Timed:
        def outputs() -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # or a graph would write over them
            return as_tuple(self.function(*self.inputs)) if which == BACKWARD else None

        return Timed(getattr(self, which), outputs)


def compiled(function: Any, mode: str | None = None) -> Function:
    """`function` compiled for the shapes it meets first, as in a program of its own; reset Dynamo between cases.

    A copy of it: Dynamo keeps what it compiled with the code, where two closures of one code would look through each other's
    programs in every call.
    """

    def call(*inputs: Any) -> Any:
        return function(*inputs)

    own = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    made: Function = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)
    return made


class Leaf(NamedTuple):
    """An input: `into` of normal values, with a gradient if it is `wanted`."""

    shape: Shape
    into: Function = lambda normal: normal
    wanted: bool = True


@dataclass(frozen=True)
class Case:
    """An op on some inputs. `functions` has "fastvae", "eager", and whatever else there is."""

    suite: str
    name: str  # the op, and what is special
    leaves: list[Leaf]
    functions: dict[str, Function]
    dtype: torch.dtype = torch.float32
    passes: tuple[str, ...] = (BOTH,)
    noise: Function | None = None  # of an op that draws: eps from its first output and its inputs
    moved: Shape | None = None  # values in each pass per element of the first input
    compiled: bool = True
    limit: float | None = None  # of the check, where the usual code has fewer digits

    op = property(lambda self: self.name.partition(":")[0])
    dtype_name = property(lambda self: str(self.dtype).removeprefix("torch."))
    elements = property(lambda self: sum(math.prod(leaf.shape) for leaf in self.leaves))

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype_name}"

    @property
    def shape(self) -> str:
        shapes = dict.fromkeys(leaf.shape for leaf in self.leaves if leaf.wanted)
        return " + ".join("x".join(map(str, shape)) for shape in shapes)

    def inputs(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The same values in every call."""
        generator = torch.Generator(device).manual_seed(7)
        options: Any = {"device": device, "dtype": self.dtype, "generator": generator}
        drawn = [leaf.into(torch.randn(leaf.shape, **options)) for leaf in self.leaves]
        return [t.requires_grad_(leaf.wanted) for t, leaf in zip(drawn, self.leaves, strict=True)]

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

    def start(self, device: torch.device | str = "cpu") -> Function:
        """What makes an implementation of one of `functions`, changed by `how`, on inputs that all share.

        Into a loss flows 1, and into a tensor random values, as in the middle of a network.
        """
        inputs = self.inputs(device)
        outputs = as_tuple(self.functions["eager"](*inputs))
        upstream = [torch.randn_like(o) if o.dim() else None for o in outputs]
        return lambda name, how=lambda f: f: Torch(how(self.functions[name]), inputs, upstream)

    def wrong(self, made: Any) -> str:
        """What is wrong with an implementation's outputs and gradients, held against "eager" in float64, or "".

        Noise that it drew is found from its z, and has to be N(0, 1) as far as its moments show.
        """
        outputs, gradients = made.both()
        values = [t.detach().double() for t in made.inputs]
        eps = [self.noise(outputs[0].detach().double(), *values)] if self.noise else []
        if eps and (problem := wrong_noise(eps[0], self.dtype)):
            return problem
        for value, t in zip(values, made.inputs, strict=True):
            value.requires_grad_(t.requires_grad)
        flowing = [None if u is None else u.double() for u in made.upstream]
        exact, true = Torch(self.functions["eager"], values + eps, flowing).both()
        pairs = [(f"gradient {i}", *p) for i, p in enumerate(zip(gradients, true, strict=True))]
        pairs += [(f"output {i}", *p) for i, p in enumerate(zip(outputs, exact, strict=True))]
        return off(pairs, self.limit or LIMIT[self.dtype])


def off(pairs: Iterable[tuple[str, Any, Any]], limit: float) -> str:
    """What is further from its true value than the limit, relative to the largest, or ""."""
    for name, got, want in pairs:
        if got is None or got.shape != want.shape:
            return f"{name} is missing, or of another shape"
        error = (got.detach().double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
        if not error <= limit:
            return f"{name} is off by {error.item():.2g} of its largest value"
    return ""


def wrong_noise(eps: Tensor, dtype: torch.dtype) -> str:
    """Whether drawn noise has the mean and the variance of N(0, 1), as far as its dtype can show."""
    for name, off, error in (("mean", eps, 1.0), ("variance", eps.square() - 1, math.sqrt(2))):
        mean = float(off.mean())
        if not abs(mean) <= STANDARD_ERRORS * error / math.sqrt(eps.numel()) + LIMIT[dtype]:
            return f"the {name} of its noise is off by {mean:.2g}"
    return ""


def _latent(*shape: int) -> list[Leaf]:
    return [Leaf(shape), Leaf(shape, lambda n: 0.5 * n)]


def _ours(call: Function) -> dict[str, Function]:
    """``call(ops, *inputs)`` with the fused ops, and with their plain forms."""
    return {"fastvae": partial(call, fastvae), "eager": partial(call, reference)}


# The objective and its parts ----------------------------------------------------------------------


def _wide(function: Function) -> Function:
    return lambda *inputs: function(*(t.float() if t.dtype.itemsize == 2 else t for t in inputs))


def _sampled(op: Function) -> Function:
    return lambda mu, logvar, eps=None: op(mu, logvar, eps=eps)


def _normal(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def _eps(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (z - mu) * torch.exp(-0.5 * logvar)


def _torch_kl(q: D.Distribution, p: D.Distribution) -> Any:
    kl = D.kl_divergence(q, p)
    return kl.sum() / kl.shape[0]


@_wide
def _log_p(recon_x: Tensor, x: Tensor) -> Any:
    """The squared error is -log N(x; recon_x, 1/2), but for a constant."""
    log_p = Normal(recon_x, math.sqrt(0.5)).log_prob(x).sum()
    return -(log_p + 0.5 * math.log(math.pi) * x.numel()) / len(x)


def composed(recon: Function, kl: Function, sample: Function) -> dict[str, Function]:
    """The ops, of a baseline's parts."""
    return {
        "vae_loss": lambda y, x, *q: recon(y, x) + kl(*q),
        "reconstruction_loss": recon,
        "kl_normal": kl,
        "reparameterize": sample,
        "sample_and_kl": lambda *inputs: (sample(*inputs), kl(*inputs[:2])),
    }


FUSED: dict[str, Function] = {
    "vae_loss": lambda *inputs: fastvae.vae_loss(*inputs).loss,
    "reconstruction_loss": fastvae.reconstruction_loss,
    "kl_normal": fastvae.kl_normal,
    "reparameterize": _sampled(fastvae.reparameterize),
    "sample_and_kl": _sampled(fastvae.sample_and_kl),
}
_sse, _kl = _wide(partial(F.mse_loss, reduction="sum")), _wide(reference.kl_normal)
_kl_normals = _wide(lambda *q: _torch_kl(_normal(*q), Normal(0.0, 1.0)))
_plain = composed(_wide(reference.reconstruction_loss), _kl, _sampled(reference.reparameterize))
_torch = composed(_log_p, _kl_normals, lambda *q: _normal(*q).rsample())
FUNCTIONS = {
    op: {"fastvae": fused, "eager": _plain[op], "distributions": _torch[op]}
    for op, fused in FUSED.items()
}
FUNCTIONS["vae_loss"]["functional"] = lambda y, x, *q: _sse(y, x) / len(x) + _kl(*q)
FUNCTIONS["reconstruction_loss"]["functional"] = lambda y, x: _sse(y, x) / len(x)
# The values that a pass moves for one of mu, with noise that is drawn, and with eps given.
MOVED = {"reparameterize": ((3, 3, 6), (4, 4, 8)), "sample_and_kl": ((3, 5, 8), (4, 6, 10))}


def objective(op: str, size: Any, dtype: torch.dtype = DTYPES[0], **options: Any) -> Case:
    """vae_loss or reconstruction_loss, of "mse"."""
    batch, event, latent = size
    x, latents = (batch, *event), _latent(batch, *latent) if op == "vae_loss" else []
    leaves = [Leaf(x), Leaf(x, wanted=False), *latents]
    given: Any = {"suite": "ops", "name": op, "functions": FUNCTIONS[op], "passes": PASSES}
    return Case(leaves=leaves, dtype=dtype, **given | options)


def latent(op: str, shape: Shape, dtype: torch.dtype = DTYPES[0], eps: bool = False) -> Case:
    """An op of mu and logvar alone."""
    leaves, functions = _latent(*shape), FUNCTIONS[op]
    if op not in MOVED:
        return Case("ops", op, leaves, functions, dtype, PASSES)
    if not eps:
        return Case("ops", op, leaves, functions, dtype, PASSES, _eps, MOVED[op][0])
    # torch.distributions draws its own.
    functions = {n: f for n, f in functions.items() if n != "distributions"}
    leaves, name = [*leaves, Leaf(shape, wanted=False)], f"{op}: eps given"
    return Case("ops", name, leaves, functions, dtype, PASSES, moved=MOVED[op][1])


def op_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Case]:
    """Every op at the sizes of real models in float32, and at the middle ones in 16 bits."""
    for dtype in dtypes:
        full = dtype is torch.float32
        sizes, shapes = (SIZES, LATENTS) if full else (SIZES[1:3], (MIDDLE,))
        yield from (objective("vae_loss", size, dtype) for size in sizes)
        yield objective("reconstruction_loss", PIXELS_64, dtype)
        for op in ("kl_normal", *MOVED):
            yield from (latent(op, shape, dtype) for shape in shapes)
        yield from (latent(op, MIDDLE, eps=True) for op in MOVED if full)


def sigmoid_cases() -> Iterator[Case]:
    """vae_loss behind a decoder that ends in a sigmoid, which a compiler can fuse with it."""

    def behind(function: Function) -> Function:
        return lambda hidden, *rest: function(hidden.sigmoid(), *rest)

    functions = {name: behind(f) for name, f in FUNCTIONS["vae_loss"].items()}
    given: Any = {"suite": "compiled", "name": "vae_loss: after a sigmoid", "functions": functions}
    return (objective("vae_loss", size, passes=(BOTH,), **given) for size in SIZES)


def growing(elements: int) -> Case:
    """vae_loss with N elements in 16 samples, and one latent to 16 of them."""
    size = (16, (elements // 16,), (elements // 256,))
    return objective("vae_loss", size, suite="growth", passes=(BOTH,))


# Options of the KL, other divergences, importance weights, all pairs --------------------------------


def _positive(normal: Tensor) -> Tensor:
    return (0.3 * normal).exp()


def _full_covariance(latents: int, sample: bool = True, batch: int = 128) -> Case:
    """A sample of a Gaussian with a covariance's Cholesky factor, and its KL from N(0, I); or the KL alone."""

    def plain(mu: Tensor, factor: Tensor, eps: Tensor | None = None) -> Any:
        factor = torch.tril(factor)
        squares = mu.square().sum() + factor.square().sum() - mu.numel()
        kl = (0.5 * squares - factor.diagonal(0, -2, -1).log().sum()) / len(mu)
        if not sample:
            return kl
        eps = torch.randn_like(mu) if eps is None else eps
        return mu + (factor @ eps.unsqueeze(-1)).squeeze(-1), kl

    def of_torch(mu: Tensor, factor: Tensor) -> Any:
        q = D.MultivariateNormal(mu, scale_tril=torch.tril(factor))
        prior = D.MultivariateNormal(torch.zeros_like(mu), scale_tril=torch.eye(latents).to(mu))
        return (q.rsample(), _torch_kl(q, prior)) if sample else _torch_kl(q, prior)

    def noise(z: Tensor, mu: Tensor, factor: Tensor) -> Any:
        return torch.linalg.solve_triangular(factor, (z - mu)[..., None], upper=False)[..., 0]

    def factor(n: Tensor) -> Tensor:
        return torch.tril(0.1 * n, -1) + torch.diag_embed(_positive(n).diagonal(0, -2, -1))

    alone = fastvae.kl_multivariate_normal
    ours: Any = fastvae.sample_and_kl_multivariate_normal if sample else alone
    functions: Any = {"fastvae": ours, "eager": plain, "distributions": of_torch}
    leaves = [Leaf((batch, latents)), Leaf((batch, latents, latents), factor)]
    name = "kl_multivariate_normal" + ": with the sample" * sample
    return Case("terms", name, leaves, functions, noise=noise if sample else None)


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
    name, functions = f"iwae_loss: {estimator}, K = {samples}", {"fastvae": fused, "eager": plain}
    # No compiler takes the hook of dreg.
    return Case("terms", name, leaves, functions, compiled=not dreg)


_fused_kl = partial(fastvae.kl_divergence, reduction="batchmean")
NORMALS: dict[str, Function] = {
    "fastvae": lambda m, s, n, t: _fused_kl(Normal(m, s), Normal(n, t)),
    "eager": lambda m, s, n, t: reference.kl_normal(m, 2 * s.log(), n, 2 * t.log()),
    "distributions": lambda m, s, n, t: _torch_kl(Normal(m, s), Normal(n, t)),
}


def term_cases() -> Iterator[Case]:
    for shape in LATENTS[:2]:
        q, weight = _latent(*shape), Leaf(shape, lambda n: (n > -1).to(n), False)
        for per in ("element", "latent"):
            bits: Any = {"free_bits": 0.5, "free_bits_per": per}
            functions = _ours(lambda ops, *q, bits=bits: ops.kl_normal(*q, **bits))
            yield Case("terms", f"kl_normal: free bits per {per}", q, functions)
        functions = _ours(lambda ops, *q: ops.kl_normal(*q[:2], weight=q[2]))
        yield Case("terms", "kl_normal: weight", [*q, weight], functions)
        leaves = [Leaf(shape), Leaf(shape, _positive)] * 2
        yield Case("terms", "kl_divergence: of Normals", leaves, NORMALS)
    yield from map(_full_covariance, (16, 32, 64))
    yield from (_full_covariance(latents, sample=False) for latents in (16, 32, 64))
    yield from map(_importance, ("iwae", "dreg"))


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


def tcvae_terms(kl_decomposition: Function, *inputs: Tensor) -> Any:
    """beta-TCVAE's sum, beta being 6."""
    mi, tc, dim = kl_decomposition(*inputs, DATASET_SIZE)
    return mi + 6 * tc + dim


DECOMPOSITIONS: dict[str, Function] = {
    "fastvae": fastvae.kl_decomposition,
    "eager": kl_decomposition,
}


def decomposition(batch: int, latents: int) -> Case:
    functions: Any = {name: partial(tcvae_terms, f) for name, f in DECOMPOSITIONS.items()}
    leaves = [Leaf((batch, latents), lambda n: 1.5 * n), *_latent(batch, latents)]
    return Case("pairs", "kl_decomposition", leaves, functions, passes=PASSES)


def mixture_of_torch(z: Tensor, mu: Tensor, logvar: Tensor) -> Any:
    mixing = D.Categorical(logits=torch.zeros(len(mu)).to(mu), validate_args=False)
    each = D.Independent(Normal(mu, torch.exp(0.5 * logvar), False), 1, False)
    return D.MixtureSameFamily(mixing, each, False).log_prob(z)


def pair_cases() -> Iterator[Case]:
    for batch, latents in ((64, 10), (128, 32), (1024, 32), (2048, 10)):
        yield decomposition(batch, latents)
    for batch, k, latents in ((100, 500, 40), (3840, 20, 10)):  # as VampPrior's
        weight = torch.full((k,), -math.log(k))
        functions = _ours(lambda ops, *q, w=weight: ops.mixture_log_prob(*q, w.to(q[0])))
        leaves = [Leaf((batch, latents)), *_latent(k, latents)]
        given = functions | {"distributions": mixture_of_torch}
        yield Case("pairs", "mixture_log_prob", leaves, given, passes=PASSES)


# Likelihoods --------------------------------------------------------------------------------------


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


def _scvi(name: str) -> dict[str, Function]:
    """scvi-tools' own distribution."""

    def of(y: Tensor, theta: Tensor, *zi: Tensor) -> Any:
        kind = getattr(importlib.import_module("scvi.distributions"), name)
        return kind(mu=y, theta=theta, **dict(zip(("zi_logits",), zi, strict=False)))

    return _log_prob(of, "scvi-tools")


def _of_mixtures(channel: int, last: float) -> tuple[Any, list[Leaf], Any]:
    """32,768 pixels, with channels and edges where a project has them."""
    make = partial(L.LogisticMixture, channel_dim=channel, edges=(-0.999, last))
    y, x = ((32, 32, 32, n) if channel == -1 else (32, n, 32, 32) for n in (100, 3))
    theirs = {"eager": partial(mixture, channel=channel % 4, last=last)}
    return make, [Leaf(y), Leaf(x, levels)], theirs


FLAT, CELLS, SCALE = (64, 12288), (128, 4000), math.exp(-1)
PLAIN, HALF, PIXEL = Leaf(FLAT), Leaf(FLAT, lambda n: 0.5 * n), Leaf(FLAT, torch.sigmoid)
# Near 0 torch's gradient of the continuous Bernoulli is off by 0.5% in float32.
OFF_0, COUNTS = Leaf(FLAT, lambda n: n + n.sign()), Leaf(FLAT, lambda n: n.exp().round())
THETA, ZEROS = Leaf((4000,), torch.exp), Leaf(CELLS)
SPARSE = [Leaf(CELLS, lambda n: (n - 2.3).exp()), Leaf(CELLS, sparse_counts), THETA]
DENSE = [
    Leaf(CELLS, lambda n: 10 * _positive(n)),
    Leaf(CELLS, lambda n: (5 * (0.8 * n).exp()).floor()),
    THETA,
]
NB = _scvi("NegativeBinomial") | _log_prob(
    lambda y, theta: D.NegativeBinomial(theta, logits=torch.log(y / theta), validate_args=False)
)
ZINB = _scvi("ZeroInflatedNegativeBinomial")
# Likelihoods; recon_x, x and parameters; the same without fastvae, summed over all elements.
# fmt: off
LIKELIHOODS: list[tuple[str, Function, list[Leaf], dict[str, Function]]] = [
    ("NegativeBinomial, sparse", L.NegativeBinomial, SPARSE, NB),
    ("ZeroInflatedNegativeBinomial, sparse", L.NegativeBinomial, [*SPARSE, ZEROS], ZINB),
    ("NegativeBinomial, dense", L.NegativeBinomial, DENSE, NB),
    ("ZeroInflatedNegativeBinomial, dense", L.NegativeBinomial, [*DENSE, ZEROS], ZINB),
    ("LogisticMixture as in vdvae", *_of_mixtures(-1, 0.999)),
    ("LogisticMixture as in NVAE", *_of_mixtures(1, 0.99)),
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
    """reconstruction_loss beside others' functions."""

    def mean(of: Function) -> Function:
        return lambda y, x, *rest: of(y, x, *rest) / len(x)

    def loss(ops: Any, y: Tensor, x: Tensor, *q: Tensor, make: Function) -> Any:
        return ops.reconstruction_loss(y, x, likelihood=make(*q))

    for name, make, (y, x, *q), theirs in LIKELIHOODS:
        functions = _ours(partial(loss, make=make)) | {n: mean(f) for n, f in theirs.items()}
        leaves = [y, x._replace(wanted=False), *q]
        # The usual code of mixtures has no more digits.
        given: Any = {"limit": 5e-3 if "Mixture" in name else None, "passes": (FORWARD, BOTH)}
        yield Case("likelihoods", f"reconstruction_loss: {name}", leaves, functions, **given)


def all_cases() -> list[Case]:
    """Without those that grow."""
    return [*op_cases(), *likelihood_cases(), *term_cases(), *pair_cases(), *sigmoid_cases()]
