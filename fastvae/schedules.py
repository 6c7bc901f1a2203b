"""Weights that change while a model trains::

    beta = fastvae.schedules.Linear(4.0, steps=10_000)
    loss = fastvae.vae_loss(recon_x, x, mu, logvar, beta=beta.value).loss
    ...
    beta.step()  # after the optimizer's

A schedule is a module whose one buffer counts the steps, so that it is saved with the model it is a part of (or by its own
``state_dict``) and moves with it. ``value`` is computed on its device: compiled programs and CUDA graphs see each step's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Capacity", "Cyclical", "Linear"]


class _Schedule(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """Counts one step."""
        self.count += 1

    def _check(self, **above_zero: float) -> None:
        for name, value in above_zero.items():
            if not 0 < value < math.inf:
                raise ValueError(
                    f"fastvae.schedules.{type(self).__name__}: {name} must be above 0 and finite, but got {value!r}"
                )


class Linear(_Schedule):
    """From ``start`` to ``end`` in so many ``steps``, after ``delay`` steps at the start."""

    def __init__(self, end: float = 1.0, *, steps: int, start: float = 0.0, delay: int = 0) -> None:
        super().__init__()
        self._check(steps=steps)
        self.start, self.end, self.steps, self.delay = start, end, steps, delay

    @property
    def value(self) -> Tensor:
        """A 0-dim float32 tensor."""
        share = ((self.count - self.delay) / self.steps).clamp(0, 1)
        return self.start + (self.end - self.start) * share

    def extra_repr(self) -> str:
        return f"{self.end}, steps={self.steps}, start={self.start}, delay={self.delay}"


class Cyclical(_Schedule):
    """In each of the cycles of ``period`` steps from ``start`` to ``end`` in the share ``ramp`` of it, and then ``end``.

    Fu et al., *Cyclical annealing schedule: a simple approach to mitigating KL vanishing* (2019), with R = ``ramp``. After so
    many ``cycles``, if they are given, it stays at the end.
    """

    def __init__(
        self,
        end: float = 1.0,
        *,
        period: int,
        ramp: float = 0.5,
        start: float = 0.0,
        cycles: int | None = None,
    ) -> None:
        super().__init__()
        self._check(period=period, ramp=ramp)
        self.start, self.end, self.period, self.ramp, self.cycles = start, end, period, ramp, cycles

    @property
    def value(self) -> Tensor:
        """A 0-dim float32 tensor."""
        share = ((self.count % self.period) / (self.period * self.ramp)).clamp(max=1)
        if self.cycles is not None:
            share = torch.where(self.count < self.cycles * self.period, share, 1.0)
        return self.start + (self.end - self.start) * share

    def extra_repr(self) -> str:
        return f"{self.end}, period={self.period}, ramp={self.ramp}, start={self.start}, cycles={self.cycles}"


class Capacity(Linear):
    """gamma |KL - C|, C growing from ``start`` to ``end`` nats: ``loss = recon + capacity(kl)``.

    Burgess et al., *Understanding disentangling in beta-VAE* (2018); their C goes from 0 to 25 in 100,000 steps,
    with gamma 1000. ``value`` is C, ``kl`` the KL of a sample, or its mean over the batch ("sample" or "batchmean").
    """

    def __init__(
        self,
        end: float = 25.0,
        *,
        steps: int,
        gamma: float = 1000.0,
        start: float = 0.0,
        delay: int = 0,
    ) -> None:
        super().__init__(end, steps=steps, start=start, delay=delay)
        self.gamma = gamma

    def forward(self, kl: Tensor) -> Tensor:
        return self.gamma * (kl - self.value).abs()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}"
