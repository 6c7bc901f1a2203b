"""Every likelihood once: how to make it, inputs from its domain, and the torch function that it must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributions as D

from fastvae import likelihoods
from fastvae.verify.inputs import tensor

Images = Callable[[np.random.Generator, tuple[int, ...]], tuple[Any, Any]]


def means(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.normal(0, 1, (2, *shape))


def logits(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.normal(0, 3, shape), rng.uniform(0, 1, shape)


def probabilities(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.uniform(0.02, 0.98, shape), rng.uniform(0, 1, shape)


def counts(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.normal(0, 1, shape), rng.poisson(2.5, shape)


def genes(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    mu = np.exp(rng.normal(-0.5, 1.2, shape))
    return mu, rng.poisson(mu * rng.gamma(1, 1, shape))


def gene_logits(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    mu, x = genes(rng, shape)
    return np.log(mu) + rng.normal(0, 0.5, shape), x


EXTREMES = {
    "bernoulli": ([-1e4, -700.0, -40.0, 0.0, 40.0, 700.0, 1e4], [0.0, 0.3, 1.0]),
    "bernoulli_probabilities": ([0.0, 1e-300, 1e-13, 0.5, 1 - 1e-13, 1.0], [0.0, 0.3, 1.0]),
    "continuous_bernoulli": (
        [-1e4, -700.0, -1.0, -0.25, -1e-5, 0.0, 1e-300, 1e-9, 0.249, 0.251, 40.0, 1e4],
        [0.0, 0.3, 1.0],
    ),
    "poisson": ([-1e4, -700.0, 0.0, 40.0, 700.0], [0.0, 1.0, 1e9]),
    "poisson_full": ([-700.0, -9.0, 0.0, 9.0, 700.0], [0.0, 1.0, 1e6]),
    "negative_binomial": ([0.3, 40.0, 1e5], [0.0, 1.0, 30.0, 1e6]),
    "zero_inflated_negative_binomial": ([0.3, 40.0], [0.0, 1.0, 30.0, 1e6]),
    "negative_binomial_logits": ([-700.0, -9.0, 0.0, 9.0, 700.0], [0.0, 1.0, 30.0, 1e6]),
}
OF_A_MEAN = ([-1e20, -1.5, 0.0, 0.7, 1e20], [-1e20, 0.0, 0.7, 1e20])


class Row(NamedTuple):
    kind: type[likelihoods.Likelihood]
    images: Images
    # torch's (recon_x, x, **parameters) -> nll, with every constant if there is `full`
    same: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()
    fields: Mapping[str, Any] = MappingProxyType({})
    positive: tuple[str, ...] = ()  # parameters that are: the numbers for them here are logarithms
    counts: bool = False  # x gets no gradient, so it comes as integers

    def parameter(self, name: str, value: Any) -> Any:
        return np.exp(value) if name in self.positive else value

    def every_parameter(self, value: float) -> dict[str, float]:
        return {name: float(self.parameter(name, value)) for name in self.parameters}

    def make(self, **more: Any) -> likelihoods.Likelihood:
        return self.kind(**{**self.fields, **more})

    def likelihood(self, **options: Any) -> Any:
        """As `accuracy.check` takes it: the function from its parameters to the object."""
        return lambda **parameters: self.make(**parameters, **options)

    def tensors(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        x_dtype: torch.dtype | None = None,
        device: Any = None,
        *,
        parameters: str = "element",
    ) -> dict[str, Tensor]:
        """recon_x, x and the parameters: one for each element, for each channel, or one for all."""
        rng = np.random.default_rng([2000, *shape])
        recon_x, x = self.images(rng, shape)
        channel = (1, *shape[1:2], *[1] * len(shape[2:]))
        size = {"element": shape, "channel": channel, "scalar": ()}[parameters]
        of_parameters = {
            f"likelihood.{name}": self.parameter(name, rng.uniform(-2, 0.5, size))
            for name in self.parameters
        }
        return {
            "recon_x": tensor(recon_x, dtype, device),
            "x": tensor(x, x_dtype or (torch.int32 if self.counts else dtype), device),
            **{name: tensor(values, dtype, device) for name, values in of_parameters.items()},
        }

    def extremes(
        self, parameter: float, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> dict[str, Tensor]:
        """Each hard recon_x beside each hard x, [B, 3 or 4]."""
        hard = EXTREMES.get(self.make(**self.every_parameter(0.0)).formula, OF_A_MEAN)
        recon_x, x = np.broadcast_arrays(np.array(hard[0])[:, None], np.array(hard[1]))
        parameters = {
            f"likelihood.{n}": np.full(
                x.shape, self.parameter(n, parameter / 5 if n in self.positive else parameter)
            )
            for n in self.parameters
        }
        arrays = {"recon_x": recon_x, "x": x, **parameters}
        dtypes = {"x": torch.int32} if self.counts else {}
        return {n: tensor(values, dtypes.get(n, dtype), device) for n, values in arrays.items()}

    @property
    def activations(self) -> list[str | None]:
        return [None, "sigmoid", "tanh"] if issubclass(self.kind, likelihoods._OfAMean) else [None]


def nll_of(distribution: Callable[..., D.Distribution]) -> Callable[..., Tensor]:
    return lambda recon_x, x, **parameters: (
        -distribution(recon_x, **parameters).log_prob(x.to(recon_x.dtype))
    )


def poisson(recon_x: Tensor, x: Tensor) -> Any:
    return -D.Poisson(recon_x.exp()).log_prob(x.to(recon_x.dtype))


def negative_binomial(recon_x: Tensor, x: Tensor, theta: Tensor, zero_logits: Any = None) -> Any:
    """By its mean, of torch's, and inflated as a mixture."""
    log_p = D.NegativeBinomial(theta, logits=torch.log(recon_x / theta)).log_prob(x.to(theta.dtype))
    if zero_logits is None:
        return -log_p
    pi = torch.sigmoid(zero_logits)
    return -torch.log(pi * (x == 0) + (1 - pi) * log_p.exp())


def loss(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda recon_x, x: function(recon_x, x, reduction="none", **options)


# fmt: off
ROWS = {
    "mse": Row(likelihoods.SquaredError, means, loss(F.mse_loss)),
    "gaussian": Row(likelihoods.Gaussian, means, nll_of(lambda r: D.Normal(r, torch.ones_like(r)))),
    "gaussian_logvar": Row(likelihoods.Gaussian, means, nll_of(lambda r, logvar: D.Normal(r, torch.exp(logvar / 2))), ("logvar",)),
    "l1": Row(likelihoods.L1, means, loss(F.l1_loss)),
    "laplace": Row(likelihoods.Laplace, means, nll_of(lambda r, log_scale: D.Laplace(r, log_scale.exp())), ("log_scale",)),
    "huber": Row(likelihoods.Huber, means, loss(F.huber_loss, delta=0.7), (), {"delta": 0.7}),
    "charbonnier": Row(likelihoods.Charbonnier, means, lambda r, x: torch.sqrt((r - x) ** 2 + 0.3**2), (), {"eps": 0.3}),
    "student_t": Row(likelihoods.StudentT, means, nll_of(lambda r, log_scale: D.StudentT(3.5, r, log_scale.exp())), ("log_scale",), {"df": 3.5}),
    "bernoulli": Row(likelihoods.Bernoulli, logits, loss(F.binary_cross_entropy_with_logits)),
    "bernoulli_probabilities": Row(likelihoods.Bernoulli, probabilities, loss(F.binary_cross_entropy), (), {"logits": False}),
    "continuous_bernoulli": Row(likelihoods.ContinuousBernoulli, logits, nll_of(lambda r: D.ContinuousBernoulli(logits=r, validate_args=False))),
    "poisson": Row(likelihoods.Poisson, counts, loss(F.poisson_nll_loss)),
    "poisson_full": Row(likelihoods.Poisson, counts, poisson, (), {"full": True}, (), True),
    "negative_binomial": Row(likelihoods.NegativeBinomial, genes, negative_binomial, ("theta",), {}, ("theta",), True),
    "zero_inflated_negative_binomial": Row(likelihoods.NegativeBinomial, genes, negative_binomial, ("theta", "zero_logits"), {}, ("theta",), True),
    "negative_binomial_logits": Row(likelihoods.NegativeBinomial, gene_logits, nll_of(lambda r, total_count: D.NegativeBinomial(total_count, logits=r)), ("total_count",), {}, ("total_count",), True),
}
# fmt: on
