"""Negative binomials as torch.distributions, with the names and arguments of scvi.distributions' and the fused log_prob; and
`register`, which makes torch.distributions.kl_divergence use fastvae's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all, logits_to_probs, probs_to_logits

from fastvae.divergences import register, unregister
from fastvae.functional import reconstruction_loss
from fastvae.likelihoods import NegativeBinomial as _Likelihood

__all__ = ["NegativeBinomial", "ZeroInflatedNegativeBinomial", "register", "unregister"]


class NegativeBinomial(Distribution):
    """Counts of the mean ``mu`` and the inverse dispersion ``theta``: the variance is mu + mu^2 / theta.

    scvi.distributions.NegativeBinomial's arguments: mu and theta, or total_count (which is theta) and probs or logits, where the mean
    is theta exp(logits). ``scale`` is kept for `get_normalized` and used in nothing. All broadcast; a theta of [G] beside a mu of
    [B, G] stays [G], and so does its gradient. Values outside the support have a log_prob of NaN, or raise a ValueError with
    ``validate_args=True``. Where scvi adds 1e-8 to keep logarithms finite, mu is mu + 1e-8 in log_prob.
    """

    arg_constraints: ClassVar = {"mu": constraints.nonnegative, "theta": constraints.nonnegative}
    support = constraints.nonnegative_integer
    _EPS = 1e-8

    def __init__(
        self,
        total_count: Tensor | None = None,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        mu: Tensor | None = None,
        theta: Tensor | None = None,
        scale: Tensor | None = None,
        validate_args: bool | None = False,
    ) -> None:
        if total_count is not None and mu is None and theta is None:
            if logits is None and probs is not None:
                logits, probs = probs_to_logits(probs, is_binary=True), None
            if logits is not None:
                theta = torch.as_tensor(total_count).to(logits)
                mu, logits, total_count = logits.exp() * theta, None, None
                scale = mu / mu.sum(-1, keepdim=True) if scale is None else scale
        if mu is None or theta is None or any(t is not None for t in (total_count, probs, logits)):
            what = f"fastvae.distributions.{type(self).__name__}"
            raise ValueError(
                f"{what}: give mu and theta, or total_count and one of probs and logits"
            )
        self.mu, self.theta = broadcast_all(mu, theta)
        self._theta = torch.as_tensor(theta).to(self.mu)  # as it came: so is its gradient
        self.scale = scale
        super().__init__(self.mu.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def variance(self) -> Tensor:
        return self.mean + self.mean**2 / self.theta

    def get_normalized(self, key: str) -> Any:
        """mu for "mu", scale for "scale"."""
        if key not in ("mu", "scale"):
            raise ValueError(
                f'fastvae.distributions: the key must be "mu" or "scale", but got {key!r}'
            )
        return getattr(self, key)

    @property
    def _likelihood(self) -> _Likelihood:
        return _Likelihood(self._theta)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if value.dtype == torch.float64:
            value = value.to(self.mu.dtype)
        mu, value = torch.broadcast_tensors(self.mu + self._EPS, value)
        if mu.dim() == 0:
            return self.log_prob(value.unsqueeze(0)).squeeze(0)
        minus = mu.new_full((), -1.0)  # as a weight, in the pass: `-` would be two passes more
        return reconstruction_loss(
            mu, value, likelihood=self._likelihood, weight=minus, reduction="none"
        )

    @torch.no_grad()
    def sample(self, sample_shape: Any = None) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape or ()))
        return self._likelihood.sample(self.mu.expand(shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> NegativeBinomial:
        parameters = {n: getattr(self, n).expand(batch_shape) for n in self.arg_constraints}
        scale = None if self.scale is None else self.scale.expand(batch_shape)
        return type(self)(**parameters, scale=scale, validate_args=self._validate_args)

    def __repr__(self) -> str:
        names = [n for n in self.arg_constraints if n in self.__dict__]
        return f"{type(self).__name__}({', '.join(f'{n}: {tuple(getattr(self, n).shape)}' for n in names)})"


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """`NegativeBinomial`, but 0 with the probability sigmoid(``zi_logits``) besides; scvi.distributions' arguments."""

    arg_constraints: ClassVar = NegativeBinomial.arg_constraints | {"zi_logits": constraints.real}

    def __init__(
        self,
        total_count: Tensor | None = None,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        mu: Tensor | None = None,
        theta: Tensor | None = None,
        zi_logits: Tensor | None = None,
        scale: Tensor | None = None,
        validate_args: bool | None = False,
    ) -> None:
        if zi_logits is None:
            raise ValueError("fastvae.distributions.ZeroInflatedNegativeBinomial: give zi_logits")
        self.zi_logits = torch.as_tensor(zi_logits)
        super().__init__(total_count, probs, logits, mu, theta, scale, validate_args)
        self._zi_logits = self.zi_logits.to(self.mu)
        self.zi_logits, self.mu, self.theta = broadcast_all(self._zi_logits, self.mu, self.theta)
        self._batch_shape = self.mu.shape

    @property
    def zi_probs(self) -> Tensor:
        return logits_to_probs(self.zi_logits, is_binary=True)

    @property
    def mean(self) -> Tensor:
        return (1 - self.zi_probs) * self.mu

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + self.mu / self.theta + self.zi_probs * self.mu)

    @property
    def _likelihood(self) -> _Likelihood:
        return _Likelihood(self._theta, self._zi_logits)
