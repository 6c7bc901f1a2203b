"""What stands beside fastvae: the expressions as people write them, and how an implementation is called.

Everything takes a case's inputs and returns what is differentiated. In 16 bits the losses convert with ``.float()``
first, as autocast does and as diffusers writes it: otherwise a sum overflows in float16, and nothing wrong is timed.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as D
from torch.distributions import Normal, kl_divergence

import fastvae
from fastvae.bench import cases
from fastvae.bench.cases import BACKWARD, FORWARD, Case

Function = Callable[..., Any]

# As people write them -----------------------------------------------------------------------------


def kl_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    mu, logvar = mu.float(), logvar.float()
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / mu.shape[0]


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Tensor:
    std = torch.exp(0.5 * logvar)
    if eps is None:
        eps = torch.randn_like(std)
    return mu + eps * std


def sample_and_kl(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return reparameterize(mu, logvar, eps), kl_normal(mu, logvar)


def reconstruction_loss(recon_x: Tensor, x: Tensor) -> Tensor:
    return ((recon_x.float() - x.float()) ** 2).sum() / x.shape[0]


def vae_loss(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return reconstruction_loss(recon_x, x) + kl_normal(mu, logvar)


def noise(mu: Tensor, logvar: Tensor) -> Tensor:
    return torch.randn_like(mu)


# With torch.nn.functional, where that has the op --------------------------------------------------


def reconstruction_loss_functional(recon_x: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(recon_x.float(), x.float(), reduction="sum") / x.shape[0]


def vae_loss_functional(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return reconstruction_loss_functional(recon_x, x) + kl_normal(mu, logvar)


# With torch.distributions -------------------------------------------------------------------------


def _posterior(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def kl_normal_distributions(mu: Tensor, logvar: Tensor) -> Tensor:
    posterior = _posterior(mu.float(), logvar.float())
    kl: Tensor = kl_divergence(posterior, Normal(0.0, 1.0)).sum() / mu.shape[0]
    return kl


def reparameterize_distributions(mu: Tensor, logvar: Tensor) -> Tensor:
    return _posterior(mu, logvar).rsample()


def sample_and_kl_distributions(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    if mu.dtype is not torch.float32:
        return reparameterize_distributions(mu, logvar), kl_normal_distributions(mu, logvar)
    posterior = _posterior(mu, logvar)
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum() / mu.shape[0]
    return posterior.rsample(), kl


def reconstruction_loss_distributions(recon_x: Tensor, x: Tensor) -> Tensor:
    """The squared error is -log N(x; recon_x, 1/2), but for a constant."""
    likelihood = Normal(recon_x.float(), math.sqrt(0.5))
    constant = 0.5 * math.log(math.pi) * x.numel()
    log_density: Tensor = likelihood.log_prob(x.float()).sum()
    return -(log_density + constant) / x.shape[0]


def vae_loss_distributions(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return reconstruction_loss_distributions(recon_x, x) + kl_normal_distributions(mu, logvar)


# Terms over pairs ---------------------------------------------------------------------------------


def _pair_log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """As disentangling-vae writes it: [B, K, L]."""
    z, mu, logvar = z.unsqueeze(1), mu.unsqueeze(0), logvar.unsqueeze(0)
    normalization = -0.5 * (math.log(2 * math.pi) + logvar)
    return normalization - 0.5 * ((z - mu) ** 2 * torch.exp(-logvar))


def kl_decomposition(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """disentangling-vae's, with the log-weights where they belong."""
    batch, n = z.shape[0], cases.DATASET_SIZE
    log_q_zCx = (-0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 * torch.exp(-logvar))).sum(
        1
    )
    log_pz = (-0.5 * (math.log(2 * math.pi) + z**2)).sum(1)
    mat_log_qz = _pair_log_density(z, mu, logvar)
    weight = torch.full((batch, batch), (n - 1) / (n * (batch - 1)), device=z.device)
    log_weight = weight.fill_diagonal_(1 / n).log()
    log_qz = torch.logsumexp(mat_log_qz.sum(2) + log_weight, dim=1)
    log_prod_qzi = torch.logsumexp(mat_log_qz + log_weight.unsqueeze(2), dim=1).sum(1)
    mi, tc = (log_q_zCx - log_qz).mean(), (log_qz - log_prod_qzi).mean()
    return mi, tc, (log_prod_qzi - log_pz).mean()


def mixture_log_prob(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return torch.logsumexp(_pair_log_density(z, mu, logvar).sum(2) - math.log(len(mu)), dim=1)


def mixture_log_prob_distributions(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    mixing = D.Categorical(logits=torch.zeros(len(mu), device=z.device), validate_args=False)
    components = D.Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    mixture = D.MixtureSameFamily(
        mixing, D.Independent(components, 1, validate_args=False), validate_args=False
    )
    log_prob: Tensor = mixture.log_prob(z)
    return log_prob


# fastvae ------------------------------------------------------------------------------------------


def _vae_loss(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return fastvae.vae_loss(recon_x, x, mu, logvar).loss


def _reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Tensor:
    return fastvae.reparameterize(mu, logvar, eps=eps)


def _sample_and_kl(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return fastvae.sample_and_kl(mu, logvar, eps=eps)


def _noise(mu: Tensor, logvar: Tensor) -> Tensor:
    return fastvae.random.philox_normal(mu.shape, seed=1, dtype=mu.dtype, device=mu.device)


def _kl_decomposition(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fastvae.kl_decomposition(z, mu, logvar, cases.DATASET_SIZE)


def _mixture_log_prob(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    log_weight = torch.full((len(mu),), -math.log(len(mu)), device=z.device)
    return fastvae.mixture_log_prob(z, mu, logvar, log_weight)


FUNCTIONS: dict[str, dict[str, Function]] = {
    "vae_loss": {
        "fastvae": _vae_loss,
        "eager": vae_loss,
        "functional": vae_loss_functional,
        "distributions": vae_loss_distributions,
    },
    "reconstruction_loss": {
        "fastvae": fastvae.reconstruction_loss,
        "eager": reconstruction_loss,
        "functional": reconstruction_loss_functional,
        "distributions": reconstruction_loss_distributions,
    },
    "kl_normal": {
        "fastvae": fastvae.kl_normal,
        "eager": kl_normal,
        "distributions": kl_normal_distributions,
    },
    "reparameterize": {
        "fastvae": _reparameterize,
        "eager": reparameterize,
        "distributions": reparameterize_distributions,
    },
    "sample_and_kl": {
        "fastvae": _sample_and_kl,
        "eager": sample_and_kl,
        "distributions": sample_and_kl_distributions,
    },
    "kl_decomposition": {"fastvae": _kl_decomposition, "eager": kl_decomposition},
    "mixture_log_prob": {
        "fastvae": _mixture_log_prob,
        "eager": mixture_log_prob,
        "distributions": mixture_log_prob_distributions,
    },
    "noise": {"fastvae": _noise, "eager": noise},
}


def _mixture(y: Tensor, x: Tensor, channel: int, last: float) -> Tensor:
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


def negative_binomial(mu: Tensor, x: Tensor, theta: Tensor) -> Tensor:
    """-log of the negative binomial as scvi-tools writes it, element by element."""
    eps, theta = 1e-8, theta.expand_as(mu)
    log_sum = torch.log(theta + mu + eps)
    log_q, log_p = torch.log(theta + eps) - log_sum, torch.log(mu + eps) - log_sum
    gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return -(theta * log_q + x * log_p + gammas)


def zero_inflated(mu: Tensor, x: Tensor, theta: Tensor, zero_logits: Tensor) -> Tensor:
    """As scvi-tools writes it: both cases of all elements, each times a mask."""
    eps, theta = 1e-8, theta.expand_as(mu)
    log_q = torch.log(theta + eps) - torch.log(theta + mu + eps)
    at_zero = F.softplus(theta * log_q - zero_logits) - F.softplus(-zero_logits)
    above = -F.softplus(-zero_logits) - zero_logits - negative_binomial(mu, x, theta)
    return -(at_zero * (x < eps).float() + above * (x > eps).float())


def _of_counts(mu: Tensor, x: Tensor, theta: Tensor, *zero_logits: Tensor) -> Tensor:
    nll = zero_inflated if zero_logits else negative_binomial
    return nll(mu, x, theta, *zero_logits).sum()


def _of_counts_distributions(mu: Tensor, x: Tensor, theta: Tensor) -> Tensor:
    logits = torch.log(mu / theta)
    log_p: Tensor = D.NegativeBinomial(theta, logits=logits, validate_args=False).log_prob(x)
    return -log_p.sum()


# Likelihoods: the expression as people write it, and torch's function where that is another. Sums over all elements;
# distributions do not check their arguments, as fastvae does not.
LIKELIHOODS: dict[str, dict[str, Function]] = {
    "sigmoid, mse": {
        "eager": lambda y, x: (y.sigmoid() - x).pow(2).sum(),
        "functional": lambda y, x: F.mse_loss(y.sigmoid(), x, reduction="sum"),
    },
    "bernoulli": {
        "eager": lambda y, x: F.binary_cross_entropy_with_logits(y, x, reduction="sum"),
    },
    "bernoulli of probabilities": {
        "eager": lambda y, x: F.binary_cross_entropy(y, x, reduction="sum"),
    },
    "gaussian, logvar": {
        "eager": lambda y, x, logvar: 0.5 * ((y - x).pow(2) / logvar.exp() + logvar).sum(),
        "functional": lambda y, x, logvar: F.gaussian_nll_loss(y, x, logvar.exp(), reduction="sum"),
    },
    "continuous bernoulli": {
        "eager": lambda y, x: (
            -D.ContinuousBernoulli(logits=y, validate_args=False).log_prob(x).sum()
        ),
    },
    "l1": {
        "eager": lambda y, x: (y - x).abs().sum(),
        "functional": lambda y, x: F.l1_loss(y, x, reduction="sum"),
    },
    "laplace": {
        "eager": lambda y, x: -D.Laplace(y, math.exp(-1), validate_args=False).log_prob(x).sum(),
    },
    "student t": {
        "eager": lambda y, x: (
            -D.StudentT(4.0, y, math.exp(-1), validate_args=False).log_prob(x).sum()
        ),
    },
    "huber": {"eager": lambda y, x: F.huber_loss(y, x, reduction="sum")},
    "poisson": {"eager": lambda y, x: F.poisson_nll_loss(y, x, reduction="sum")},
    "logistic mixture, vdvae": {"eager": lambda y, x: _mixture(y, x, 3, 0.999)},
    "logistic mixture, nvae": {"eager": lambda y, x: _mixture(y, x, 1, 0.99)},
    "negative binomial": {"eager": _of_counts, "distributions": _of_counts_distributions},
    "negative binomial, zero-inflated": {"eager": _of_counts},
    "negative binomial, dense": {"eager": _of_counts, "distributions": _of_counts_distributions},
    "negative binomial, zero-inflated, dense": {"eager": _of_counts},
}


def _of_likelihood(case: Case) -> dict[str, Function]:
    make = cases.LIKELIHOODS[case.likelihood].make

    def per_sample(sum_of: Function) -> Function:
        return lambda y, x, *parameters: sum_of(y, x, *parameters) / x.shape[0]

    def fused(recon_x: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        return fastvae.reconstruction_loss(recon_x, x, likelihood=make(*parameters))

    plain = {name: per_sample(f) for name, f in LIKELIHOODS[case.likelihood].items()}
    if case.op == "vae_loss":
        return {
            "fastvae": lambda *t: fastvae.vae_loss(*t, likelihood=make()).loss,
            "eager": lambda y, x, *latents: plain["eager"](y, x) + kl_normal(*latents),
        }
    return {"fastvae": fused, **plain}


def _after_sigmoid(function: Function) -> Function:
    def composed(hidden: Tensor, *rest: Tensor) -> Any:
        return function(hidden.sigmoid(), *rest)

    return composed


def functions(case: Case) -> dict[str, Function]:
    """fastvae and what can be called without compiling, for the inputs of `case`."""
    found = _of_likelihood(case) if case.likelihood else dict(FUNCTIONS[case.op])
    if case.eps_given:
        found.pop("distributions", None)  # it only draws its own
    if case.after_sigmoid:
        found = {name: _after_sigmoid(function) for name, function in found.items()}
    return found


# How they are called ------------------------------------------------------------------------------


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Timed:
    """``call(setup())``: the set-up is not timed, and what the call returns is freed outside of what is timed.

    `host_clock`: not on torch's CUDA stream, so that its events would not see it.
    `peak_bytes`: known otherwise than from a call of torch's allocator.
    """

    call: Callable[[Any], Any]
    setup: Callable[[], Any] = _nothing
    host_clock: bool = False
    peak_bytes: int | None = None


class Implementation(Protocol):
    """An op on given inputs, in one implementation."""

    def timed(self, which: str) -> Timed | None:
        """The pass to time; None where there is no such thing."""

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients, to be checked."""


class Torch:
    """A function of tensors, differentiated by autograd.

    Gradients are taken with ``autograd.grad``: ``backward()`` would add to the leaves' own, with a copy where the
    gradient is the upstream tensor itself, which in a network is not so.
    """

    def __init__(
        self, function: Function, inputs: list[Tensor], upstream: list[Tensor | None]
    ) -> None:
        self.function, self.inputs, self.upstream = function, inputs, upstream
        self.wanted = [t for t in inputs if t.requires_grad]

    def outputs(self) -> tuple[Tensor, ...]:
        outputs = self.function(*self.inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def forward(self, _: Any = None) -> Any:
        with torch.no_grad():
            return self.outputs()

    def backward(self, outputs: tuple[Tensor, ...]) -> Any:
        return torch.autograd.grad(outputs, self.wanted, self.upstream)

    def both(self, _: Any = None) -> Any:
        outputs = self.outputs()
        return outputs, self.backward(outputs)

    def timed(self, which: str) -> Timed | None:
        if which == FORWARD:
            return Timed(self.forward)
        return Timed(self.backward, self.outputs) if which == BACKWARD else Timed(self.both)

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        outputs = self.outputs()
        gradients = self.backward(outputs) if outputs[0].requires_grad else ()
        return [t.detach() for t in outputs], list(gradients)


def compile_alone(function: Any, mode: str | None = None) -> Function:
    """`function` compiled for the shapes it meets first.

    A copy of it: Dynamo keeps what it compiled with the code, where two closures of one code would look through each
    other's programs in every call.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made: Function = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)
    return made


class Compiled(Torch):
    """torch.compile of a function, for these shapes alone, as in a program of its own.

    Dynamo is reset first: it would compile the second shape it meets for sizes that vary. So use one case's compiled
    implementations before making the next one's.
    """

    def __init__(
        self,
        function: Function,
        inputs: list[Tensor],
        upstream: list[Tensor | None],
        mode: str | None = None,
    ) -> None:
        super().__init__(compile_alone(function, mode), inputs, upstream)

    def timed(self, which: str) -> Timed | None:
        plain = super().timed(which)
        assert plain is not None

        def setup() -> Any:  # with CUDA graphs: the outputs of the call before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
            return plain.setup()

        return Timed(plain.call, setup)


class CudaGraph(Torch):
    """The forward pass, or it and the backward, captured in a CUDA graph and replayed: no host work but one launch."""

    def timed(self, which: str) -> Timed | None:
        if which == BACKWARD:
            return None  # a graph of its own would need the forward's buffers to stay
        graph, static, peak = self.capture(self.forward if which == FORWARD else self.both)

        def replay(_: Any) -> Any:
            graph.replay()
            return static  # which has to stay: the graph writes there

        return Timed(replay, peak_bytes=peak)

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        graph, (outputs, gradients), _ = self.capture(self.both)
        graph.replay()
        torch.cuda.synchronize()
        return [t.detach().clone() for t in outputs], [t.clone() for t in gradients]

    def capture(self, call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any, int]:
        """The graph, what it writes, and the bytes that it holds at most, all taken while capturing."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a capture has to be warmed up away from the default stream
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = call()
        return graph, static, torch.cuda.max_memory_allocated() - before
