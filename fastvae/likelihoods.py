"""What ``likelihood`` may be beside a name: frozen dataclasses, with each likelihood's formula in plain PyTorch::

    loss = reconstruction_loss(recon_x, x, likelihood=Laplace(log_scale))  # log_scale may want a gradient
    picture = Laplace(log_scale).sample(recon_x)

Values are in nats; additive constants are left out, as in torch's own functions, unless ``full=True``. Parameters such as
``logvar`` are numbers, or tensors that broadcast to x. As pytrees, objects have these tensors for leaves.

* ``x_scale``: x is multiplied by it first (1/255 for images in uint8). `mean` and `sample` are in units of ``x_scale * x``.
* ``activation``, where recon_x is a mean: "sigmoid" or "tanh", if recon_x is the decoder's output before it.
* In the formulas delta is the mean less x.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils import _pytree

from fastvae._ops import ops

__all__ = [
    "L1",
    "Bernoulli",
    "Charbonnier",
    "ContinuousBernoulli",
    "Gaussian",
    "Huber",
    "Laplace",
    "Likelihood",
    "LogisticMixture",
    "NegativeBinomial",
    "Poisson",
    "SquaredError",
    "StudentT",
    "optimal_gaussian",
]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What all likelihoods have in common."""

    activation: str | None = field(default=None, init=False, repr=False)
    x_scale: float = 1.0

    formula: ClassVar[Any]  # the kernel's name
    constant: ClassVar[Any] = 0.0  # what is added to each element
    opaque: ClassVar[Any] = False  # so much arithmetic that compiled programs take the kernels
    _parameters: ClassVar[tuple[str, ...]] = ()  # fields that are tensors, in the kernel's order
    _numbers: ClassVar[tuple[str, ...]] = ()  # fields that are the kernel's numbers
    _nll: ClassVar[Any]
    _sample: ClassVar[Any]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple([t for n in self._parameters if (t := getattr(self, n)) is not None])

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple([float(getattr(self, name)) for name in self._numbers])

    def nll(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """-log p(x | recon_x), element by element."""
        if not x.is_floating_point():
            x = x.to(torch.promote_types(recon_x.dtype, torch.float32))
        value: Tensor = self._nll(recon_x, x * self.x_scale) + self.constant
        return value

    def mean(self, recon_x: Tensor) -> Tensor:
        """The mean of x."""
        return recon_x if self.activation is None else getattr(torch, self.activation)(recon_x)

    @torch.no_grad()
    def sample(self, recon_x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draws an x for each element; of an error without a scale, from the density proportional to exp(-error)."""
        wide = recon_x.to(torch.promote_types(recon_x.dtype, torch.float32))
        drawn: Tensor = self._sample(wide, generator)
        return drawn.to(recon_x.dtype)

    def __post_init__(self) -> None:
        def refuse(name: str, need: str) -> None:
            what = f"fastvae.likelihoods.{type(self).__name__}: {name}"
            raise ValueError(f"{what} must be {need}, but got {getattr(self, name)!r:.80}")

        if self.activation not in (None, "sigmoid", "tanh"):
            refuse("activation", '"sigmoid", "tanh" or None')
        for name in ("x_scale", *self._numbers):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < float(value) < math.inf:
                refuse(name, "a number above 0 and below infinity")
        for name in self._parameters:
            value = getattr(self, name)
            if isinstance(value, Real):
                # Like a number in torch's arithmetic, a 0-dim tensor on the CPU goes with every dtype and device.
                value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
                object.__setattr__(self, name, value)
            elif value is not None and not isinstance(value, Tensor):
                refuse(name, "a tensor or a number")

    def __init_subclass__(cls) -> None:
        def flatten(likelihood: Likelihood) -> tuple[list[Any], Any]:
            rest = dict(vars(likelihood))
            names = tuple(name for name in cls._parameters if rest[name] is not None)
            return [rest.pop(name) for name in names], (names, tuple(rest.items()))

        def unflatten(leaves: Any, context: Any) -> Likelihood:
            likelihood = object.__new__(cls)  # without checks: a leaf may be anything here
            vars(likelihood).update(context[1], **dict(zip(context[0], leaves, strict=True)))
            return likelihood

        # Not register_dataclass: numbers and strings would be leaves, and torch.func takes tensors alone.
        _pytree.register_pytree_node(cls, flatten, unflatten)
        torch.serialization.add_safe_globals([cls])  # checkpoints may hold one


def _draw(kind: str, like: Tensor, g: Generator | None) -> Any:
    return getattr(torch.empty_like(like), f"{kind}_")(generator=g)


def _poisson(rate: Tensor, g: Generator | None) -> Tensor:
    return torch.poisson(
        rate.clamp(max=1e8), generator=g
    )  # of larger rates torch makes negative counts


def _laplace(like: Tensor, g: Generator | None) -> Any:
    return _draw("exponential", like, g) - _draw("exponential", like, g)


@dataclass(frozen=True, kw_only=True)
class _OfAMean(Likelihood):
    """A function of delta = mean - x; where there is a scale, of z = delta / scale, and log(scale) is added."""

    activation: str | None = None

    _of: ClassVar[Any]
    _line: ClassVar[tuple[float, float]]

    def _log_scale(self) -> Tensor | None:
        return self.parameters[0] if self.parameters else None

    def _nll(self, recon_x: Tensor, x: Tensor) -> Any:
        delta, log_scale = self.mean(recon_x) - x, self._log_scale()
        if log_scale is None:
            return self._of(delta)
        # Scaled before it is squared, which might overflow.
        return log_scale + self._of(delta * torch.exp(-log_scale))

    def _sample(self, recon_x: Tensor, g: Generator | None) -> Any:
        mean, log_scale = self.mean(recon_x), self._log_scale()
        noise = self._noise(mean, g)
        return mean + (noise if log_scale is None else torch.exp(log_scale) * noise)

    def _noise(self, like: Tensor, g: Generator | None) -> Any:
        # By rejection. With `_line` = (a, b), a |delta| + b is nowhere above the error, and its density is Laplace's.
        slope, offset = self._line
        noise = torch.full_like(like, math.nan)
        while (missing := noise.isnan()).any():
            delta = _laplace(like, g) / slope
            kept = _draw("exponential", like, g) >= self._of(delta) - slope * delta.abs() - offset
            noise = torch.where(missing & kept, delta, noise)
        return noise


@dataclass(frozen=True)
class SquaredError(_OfAMean):
    """``"mse"``: delta^2, without a half, as in `torch.nn.functional.mse_loss`: up to constants, a Gaussian of variance 1/2."""

    formula = "mse"
    _of = staticmethod(torch.square)

    def _noise(self, like: Tensor, g: Generator | None) -> Any:
        return math.sqrt(0.5) * _draw("normal", like, g)


@dataclass(frozen=True)
class Gaussian(_OfAMean):
    """``"gaussian"``: N(mean, exp(logvar)): (delta^2 / exp(logvar) + logvar) / 2 [+ log(2 pi) / 2]; logvar is 0 if not given."""

    logvar: Tensor | float | None = None
    _: KW_ONLY
    full: bool = False
    _parameters = ("logvar",)
    formula = property(lambda self: "gaussian" if self.logvar is None else "gaussian_logvar")
    constant = property(lambda self: 0.5 * math.log(2 * math.pi) if self.full else 0.0)

    def _log_scale(self) -> Tensor | None:
        return 0.5 * self.parameters[0] if self.parameters else None

    def _of(self, z: Tensor) -> Tensor:
        return 0.5 * z.square()

    def _noise(self, like: Tensor, g: Generator | None) -> Any:
        return _draw("normal", like, g)


@dataclass(frozen=True)
class L1(_OfAMean):
    """``"l1"``: |delta|, as in `torch.nn.functional.l1_loss`; its gradient at 0 is 0."""

    formula = "l1"
    _of = staticmethod(torch.abs)
    _noise = staticmethod(_laplace)


@dataclass(frozen=True)
class Laplace(_OfAMean):
    """Laplace(mean, exp(log_scale)): |delta| / exp(log_scale) + log_scale [+ log 2]."""

    log_scale: Tensor | float
    _: KW_ONLY
    full: bool = False
    _parameters = ("log_scale",)
    formula = "laplace"
    constant = property(lambda self: math.log(2) if self.full else 0.0)
    _of = staticmethod(torch.abs)
    _noise = staticmethod(_laplace)


@dataclass(frozen=True)
class Huber(_OfAMean):
    """delta^2 / 2 up to |delta| = ``delta``, a straight line beyond, as in `torch.nn.functional.huber_loss`."""

    delta: float = 1.0
    _numbers = ("delta",)
    formula = "huber"
    _line = property(lambda self: (min(self.delta, 1.0), -0.5 * min(self.delta, 1.0) ** 2))

    def _of(self, z: Tensor) -> Tensor:
        c = z.clamp(-self.delta, self.delta)
        return c * (z - 0.5 * c)


@dataclass(frozen=True)
class Charbonnier(_OfAMean):
    """sqrt(delta^2 + eps^2): |delta| without its corner (Charbonnier et al., 1994)."""

    eps: float = 1e-3
    _numbers = ("eps",)
    formula = "charbonnier"
    _line = property(lambda self: ((1 + self.eps) ** -0.5, self.eps * (1 + 1 / self.eps) ** -0.5))

    def _of(self, z: Tensor) -> Tensor:
        return torch.hypot(z, z.new_full((), self.eps))


@dataclass(frozen=True)
class StudentT(_OfAMean):
    """t of ``df`` degrees of freedom: (df + 1) / 2 log(1 + z^2 / df) + log_scale [+ c(df)], z being delta / exp(log_scale)."""

    df: float
    log_scale: Tensor | float
    _: KW_ONLY
    full: bool = False
    _parameters = ("log_scale",)
    _numbers = ("df",)
    formula = "student_t"

    @property
    def constant(self) -> float:
        gammas = math.lgamma(0.5 * self.df) - math.lgamma(0.5 * (self.df + 1))
        return gammas + 0.5 * math.log(math.pi * self.df) if self.full else 0.0

    def _of(self, z: Tensor) -> Tensor:
        return 0.5 * (self.df + 1) * torch.log1p(z.square() / self.df)

    def _noise(self, like: Tensor, g: Generator | None) -> Any:
        # Bailey, Polar generation of random variates with the t-distribution (1994)
        square = self.df * torch.expm1(2 / self.df * _draw("exponential", like, g))
        return square.sqrt() * torch.cos(2 * math.pi * _draw("uniform", like, g))


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Binary cross-entropy; recon_x is a logit, ``"bce_with_logits"``, or with ``logits=False`` a probability, ``"bce"``.

    x may be anything from 0 to 1. From probabilities all is as in `torch.nn.functional.binary_cross_entropy`: logarithms
    end at -100, the gradient is (p - x) / max(p (1 - p), 1e-12). A p outside [0, 1] gives NaN.
    """

    logits: bool = True
    formula = property(lambda self: "bernoulli" if self.logits else "bernoulli_probabilities")

    def _nll(self, recon_x: Tensor, x: Tensor) -> Tensor:
        if self.logits:  # two terms that are never negative, so that nothing cancels
            return -x * F.logsigmoid(recon_x) - (1 - x) * F.logsigmoid(-recon_x)
        possible = (recon_x >= 0) & (recon_x <= 1)  # torch raises an error otherwise, for NaN too
        p = torch.where(possible, recon_x, 0.5)
        no = F.binary_cross_entropy(p, torch.zeros_like(p), reduction="none")
        yes = F.binary_cross_entropy(p, torch.ones_like(p), reduction="none")
        impossible = math.nan * torch.where(possible, 0, recon_x + x)
        return torch.where(possible, x * yes + (1 - x) * no, impossible)

    def mean(self, recon_x: Tensor) -> Tensor:
        return torch.sigmoid(recon_x) if self.logits else recon_x

    def _sample(self, recon_x: Tensor, g: Generator | None) -> Tensor:
        return torch.bernoulli(self.mean(recon_x), generator=g)


@dataclass(frozen=True)
class ContinuousBernoulli(Likelihood):
    """``"continuous_bernoulli"``: density proportional to exp(l x) on [0, 1], recon_x being l: log((e^l - 1) / l) - l x.

    Loaiza-Ganem and Cunningham, *The continuous Bernoulli: fixing a pervasive error in variational autoencoders* (2019).
    """

    formula = "continuous_bernoulli"

    def _nll(self, recon_x: Tensor, x: Tensor) -> Tensor:
        near, l2, size = self._near_zero(recon_x)
        series = sum(c * l2**n for n, c in enumerate(self._LOG_SINHC, 1))
        far = recon_x.clamp(min=0) + torch.log(-torch.expm1(-size) / size)
        return torch.where(near, 0.5 * recon_x + series, far) - recon_x * x

    def mean(self, recon_x: Tensor) -> Tensor:
        near, l2, size = self._near_zero(recon_x)
        series = recon_x * sum(2 * n * c * l2 ** (n - 1) for n, c in enumerate(self._LOG_SINHC, 1))
        far = -1 / torch.expm1(-size) - 1 / size
        return torch.where(near, 0.5 + series, torch.where(recon_x < 0, 1 - far, far))

    def _sample(self, recon_x: Tensor, g: Generator | None) -> Tensor:
        size = recon_x.abs().clamp(min=torch.finfo(recon_x.dtype).tiny)
        u = torch.log1p(_draw("uniform", recon_x, g) * torch.expm1(-size)) / -size
        return torch.where(recon_x < 0, u, 1 - u)

    # Of l^2n in log(sinh(l / 2) / (l / 2)): B_2n / (2n (2n)!)
    _LOG_SINHC: ClassVar = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600)

    @staticmethod
    def _near_zero(logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = logit.abs() < 0.25  # there the series in l^2, elsewhere the formula in |l|
        return near, torch.where(near, logit, 0).square(), torch.where(near, 1, logit).abs()


@dataclass(frozen=True)
class Poisson(Likelihood):
    """``"poisson"``: counts x of the rate exp(recon_x): exp(l) - x l [+ log x!], as in `F.poisson_nll_loss`.

    With ``full=True`` x gets no gradient.
    """

    _: KW_ONLY
    full: bool = False
    formula = property(lambda self: "poisson_full" if self.full else "poisson")
    opaque = property(lambda self: self.full)

    def _nll(self, recon_x: Tensor, x: Tensor) -> Tensor:
        nll = torch.exp(recon_x) - x * recon_x
        return nll + torch.lgamma(x + 1) if self.full else nll

    def mean(self, recon_x: Tensor) -> Tensor:
        return torch.exp(recon_x)

    def _sample(self, recon_x: Tensor, g: Generator | None) -> Tensor:
        return _poisson(self.mean(recon_x), g)


@dataclass(frozen=True)
class LogisticMixture(Likelihood):
    """A mixture of logistics cut into bins: Salimans, Karpathy, Chen and Kingma, *PixelCNN++* (2017).

    recon_x has 10 K channels for pictures of 3, [B, 10 K, H, W], and 3 K for pictures of 1, K being ``components``: K logits,
    then for each channel K means, K log-scales and, of 3 channels, K coefficients, by whose tanh the means of the second and
    third channel depend on the channels before them. A pixel has one value for all its channels: ``reduction="none"`` gives
    x's shape without them, [B, H, W], there is no "channel", and a ``weight`` has size 1 there. "mean" is over the elements
    of x: nats a dimension.

    Args:
        components: the number K of logistics.
        channel_dim: where the channels are, in recon_x and in x: 1, or -1 for [B, H, W, 10 K].
        bins: how many values a pixel has, 2^bits.
        x_range: the least and the largest of them, as x has them: (0, 1), or (0, 255) for images in uint8. In the formula, and so
            for the means, they are -1 and 1.
        edges: below and above them, in [-1, 1], x is in the first or the last bin, which reach to infinity.
        least_log_scale: smaller ones count as it, without a gradient; -40 is as good as none.

    `mean` is that of the logistics, before they are cut; `sample` draws one of the ``bins`` values, from fastvae's own noise.
    """

    components: int = 10
    channel_dim: int = 1
    bins: int = 256
    _: KW_ONLY
    x_range: tuple[float, float] = (-1.0, 1.0)
    edges: tuple[float, float] = (-0.999, 0.999)
    least_log_scale: float = -7.0
    x_scale: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        needs: dict[str, tuple[bool, str]] = {
            "components": (_is_count(self.components, 1), "an integer of at least 1"),
            "channel_dim": (isinstance(self.channel_dim, int), "an integer"),
            "bins": (_is_count(self.bins, 2), "an integer of at least 2"),
            "x_range": (_is_interval(self.x_range), "two numbers, the least first"),
            "edges": (_is_interval(self.edges), "two numbers, the least first"),
            "least_log_scale": (
                isinstance(self.least_log_scale, Real) and -40 <= self.least_log_scale <= 40,
                "a number from -40 to 40",
            ),
        }
        for name, (right, need) in needs.items():
            if not right:
                what = f"fastvae.likelihoods.LogisticMixture: {name}"
                raise ValueError(f"{what} must be {need}, but got {getattr(self, name)!r:.80}")

    @property
    def numbers(self) -> tuple[float, ...]:
        """Half the width of a bin, the edges, the least log-scale, and what takes x to [-1, 1]."""
        low, high = map(float, self.x_range)
        scale = 2 / (high - low)
        edges = map(float, self.edges)
        return (1 / (self.bins - 1), *edges, float(self.least_log_scale), scale, -1 - low * scale)

    def _parts(self, recon_x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, [K, ...], and [C, 3 or 2, K, ...]: means, log-scales and coefficients."""
        p, k = recon_x.movedim(self.channel_dim, 0), self.components
        return p[:k], p[k:].unflatten(0, (3, 3, k) if len(p) == 10 * k else (1, 2, k))

    def _means(self, of_channel: Tensor, x: Tensor | None) -> list[Tensor]:
        """Of each channel [K, ...], given the channels before; without x these are at their means."""
        means = [of_channel[0, 0]]
        if len(of_channel) == 3:
            by = torch.tanh(of_channel[:, 2])
            means.append(of_channel[1, 0] + by[0] * (means[0] if x is None else x[0]))
            first, second = means if x is None else x[:2]
            means.append(of_channel[2, 0] + by[1] * first + by[2] * second)
        return means

    def _nll(self, recon_x: Tensor, x: Tensor) -> Tensor:
        half_width, low, high, least, scale, shift = self.numbers
        logits, of_channel = self._parts(recon_x)
        x = scale * x.movedim(self.channel_dim, 0) + shift
        log_p = torch.log_softmax(logits, 0)
        for c, mean in enumerate(self._means(of_channel, x)):
            precision = torch.exp(-of_channel[c, 1].clamp(min=least))
            above, below = (precision * (x[c] - mean + side) for side in (half_width, -half_width))
            # log(sigmoid(above) - sigmoid(below)), where nothing cancels
            inside = torch.log(-torch.expm1(-2 * half_width * precision))
            inside = inside + F.logsigmoid(above) + F.logsigmoid(-below)
            last = torch.where(x[c] > high, F.logsigmoid(-below), inside)
            log_p = log_p + torch.where(x[c] < low, F.logsigmoid(above), last)
        return -torch.logsumexp(log_p, 0)

    def mean(self, recon_x: Tensor) -> Tensor:
        logits, of_channel = self._parts(recon_x)
        weight, (*_, scale, shift) = torch.softmax(logits, 0), self.numbers
        means = torch.stack([(weight * m).sum(0) for m in self._means(of_channel, None)])
        return ((means.clamp(-1, 1) - shift) / scale).movedim(0, self.channel_dim)

    @torch.no_grad()
    def sample(self, recon_x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draws a picture for each of recon_x, in ``x_range``."""
        op = ops.logistic_mixture_sample.default
        drawn: Tensor = op(recon_x, generator, self.components, self.channel_dim, self.numbers)
        return drawn


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _is_interval(value: Any) -> bool:
    of_two = isinstance(value, (tuple, list)) and len(value) == 2
    return (
        of_two
        and all(isinstance(end, Real) for end in value)
        and -math.inf < value[0] < value[1] < math.inf
    )


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """Counts x of the mean recon_x, mu, and the inverse dispersion ``theta``: variance mu + mu^2 / theta; infinity is Poisson's.

    -log of Gamma(theta + x) / (Gamma(theta) x!) (theta / (theta + mu))^theta (mu / (theta + mu))^x. With ``zero_logits`` x is 0 with
    the probability sigmoid(zero_logits) besides (Lopez et al., *Deep generative modeling for single-cell transcriptomics*, 2018).
    Given ``total_count`` instead, which is theta, recon_x is log(mu / theta): the logits of `torch.distributions.NegativeBinomial`.
    Theta of shape [G] is one for each gene of x [B, G]. In the kernels nothing cancels, whatever theta; sums over x are right where
    differences of lgamma are noise. A mu, theta or x below 0 and an infinite x give NaN; x gets no gradient.
    """

    theta: Tensor | float | None = None
    zero_logits: Tensor | float | None = None
    _: KW_ONLY
    total_count: Tensor | float | None = None
    _parameters = ("theta", "total_count", "zero_logits")
    opaque = True

    def __post_init__(self) -> None:
        super().__post_init__()
        what = "fastvae.likelihoods.NegativeBinomial"
        if (self.theta is None) == (self.total_count is None):
            raise ValueError(f"{what}: give theta or total_count, and not both")
        if self.total_count is not None and self.zero_logits is not None:
            raise ValueError(f"{what}: zero_logits go with theta, not with total_count")

    @property
    def formula(self) -> str:
        if self.total_count is not None:
            return "negative_binomial_logits"
        zero = "" if self.zero_logits is None else "zero_inflated_"
        return f"{zero}negative_binomial"

    def _mean_and_theta(self, recon_x: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.parameters[0]
        return (recon_x if self.total_count is None else torch.exp(recon_x) * theta), theta

    def _nll(self, recon_x: Tensor, x: Tensor) -> Tensor:
        theta = self.parameters[0]
        if self.total_count is None:
            failures, log_q = (
                torch.xlogy(x, recon_x / (theta + recon_x)),
                -torch.log1p(recon_x / theta),
            )
        else:
            failures, log_q = x * F.logsigmoid(recon_x), F.logsigmoid(-recon_x)
        gammas = torch.lgamma(theta) + torch.lgamma(x + 1) - torch.lgamma(theta + x)
        nll: Tensor = gammas - theta * log_q - failures
        if self.zero_logits is None:
            return nll
        zero_logits = self.parameters[1]
        return F.softplus(zero_logits) + torch.where(
            x == 0, -torch.logaddexp(zero_logits, -nll), nll
        )

    def mean(self, recon_x: Tensor) -> Tensor:
        mu, _ = self._mean_and_theta(recon_x)
        return mu if self.zero_logits is None else mu * torch.sigmoid(-self.parameters[1])

    def _sample(self, recon_x: Tensor, g: Generator | None) -> Tensor:
        mu, theta = self._mean_and_theta(recon_x)
        # Within the kernel's limits: so 0 and infinity can be drawn too.
        theta = theta.to(mu.dtype).clamp(1e-18, 1e15)
        mu, theta = torch.broadcast_tensors(mu, theta)
        rate = torch._standard_gamma(theta.contiguous(), generator=g) * (mu / theta)
        drawn = _poisson(rate, g)
        if self.zero_logits is None:
            return drawn
        return torch.where(_draw("uniform", drawn, g) < torch.sigmoid(self.parameters[1]), 0, drawn)


_NAMED: dict[str, Likelihood] = {
    "mse": SquaredError(),
    "gaussian": Gaussian(),
    "l1": L1(),
    "bce_with_logits": Bernoulli(),
    "bce": Bernoulli(logits=False),
    "continuous_bernoulli": ContinuousBernoulli(),
    "poisson": Poisson(),
}


def parse(likelihood: str | Likelihood, op: str) -> Likelihood:
    """The object that a name stands for. `op` is who asks, for messages."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in _NAMED:
        return _NAMED[likelihood]
    names = ", ".join(f'"{name}"' for name in _NAMED)
    raise (ValueError if isinstance(likelihood, str) else TypeError)(
        f"{op}: likelihood must be {names} or an object of fastvae.likelihoods, but got {likelihood!r:.80}"
    )


def optimal_gaussian(recon_x: Tensor, x: Tensor, *, reduction: str = "sum") -> Tensor:
    """-log N(x; recon_x, sigma^2) at its least, where sigma^2 is the mean squared error: N / 2 (log MSE + 1 + log 2 pi).

    Rybkin, Daniilidis and Levine, *Simple and effective VAE training with calibrated decoders* (2021). An MSE of 0 gives -inf.
    reduction: "sum", "batchmean" or "mean", with one sigma for the batch, as in the paper; "sample" with one for each sample.
    """
    from fastvae.functional import reconstruction_loss  # which imports this module

    if reduction not in ("sum", "batchmean", "mean", "sample"):
        need = '"sum", "batchmean", "mean" or "sample"'
        op = "fastvae.likelihoods.optimal_gaussian"
        raise ValueError(f"{op}: reduction must be {need}, but got {reduction!r}")
    error = reconstruction_loss(recon_x, x, reduction="sample" if reduction == "sample" else "sum")
    count = recon_x.numel() // max(error.numel(), 1)
    if count == 0:
        nll = 0 * error  # the sum of nothing
    else:
        nll = 0.5 * count * (torch.log(error / count) + 1 + math.log(2 * math.pi))
    return nll / {"batchmean": len(recon_x), "mean": count}.get(reduction, 1)
