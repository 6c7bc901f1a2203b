"""A posterior as an object, in the place of diffusers' and latent diffusion's ``DiagonalGaussianDistribution``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from fastvae._ops import ops
from fastvae.densities import normal_log_prob
from fastvae.functional import kl_normal, reparameterize, sample_and_kl

__all__ = ["DiagonalGaussian"]

Generators = Generator | Sequence[Generator] | None


class DiagonalGaussian:
    """N(mean, exp(logvar)) with independent components, of any rank. One changed import puts it into a project::

        from fastvae import DiagonalGaussian as DiagonalGaussianDistribution

    It reads the parameters in place; ``std`` and ``var`` are computed when they are first asked for. Results are summed in
    float32 (float64 for float64), so that they are finite for 16-bit parameters too.

    Args:
        parameters: mean and logvar, one behind the other in the dimension ``dim`` (``[B, 2 C, ...]`` with ``dim=1``); or the
            mean alone, ``[B, ...]``, if ``logvar`` is given.
        logvar: ``[B, ...]`` natural logarithm of the variance, of the mean's shape.
        clamp: logvar is clamped to this range, as by `torch.clamp`: outside it has no gradient. None leaves it alone.
        dim: which dimension of ``parameters`` is packed.
        deterministic: the point ``mean``: ``std`` and ``var`` are 0, ``sample`` is ``mode``, and ``kl`` and ``nll`` are 0.

    Attributes:
        mean: ``[B, ...]``, in the parameters' dtype, as are the others.
        logvar: natural logarithm of the variance, clamped.
        std: exp(logvar / 2).
        var: exp(logvar).
        parameters: mean and logvar, packed; as they were given, if they were.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument that does not fit, and what would.
    """

    def __init__(
        self,
        parameters: Tensor,
        logvar: Tensor | None = None,
        *,
        clamp: tuple[float, float] | None = (-30.0, 20.0),
        dim: int = 1,
        deterministic: bool = False,
    ) -> None:
        for name, value in (("parameters", parameters), ("logvar", logvar)):
            if not isinstance(value, Tensor) and (value is not None or name == "parameters"):
                hint = "; give deterministic by its name" if isinstance(value, bool) else ""
                got = type(value).__name__
                raise TypeError(
                    f"fastvae.DiagonalGaussian: {name} must be a torch.Tensor, but got {got}{hint}"
                )
        if logvar is None:
            rank = parameters.dim()
            if not -rank <= dim < rank or parameters.shape[dim] % 2:
                raise ValueError(
                    "fastvae.DiagonalGaussian: parameters must have mean and logvar one behind the other in dimension "
                    f"{dim}, but got the shape {list(parameters.shape)}; dim chooses another dimension, and logvar= gives "
                    "the two apart"
                )
            self.mean, self._raw = parameters.chunk(2, dim)
            self._packed: Tensor | None = parameters
        else:
            if parameters.shape != logvar.shape:
                raise ValueError(
                    f"fastvae.DiagonalGaussian: logvar must have the mean's shape {list(parameters.shape)}, but got "
                    f"{list(logvar.shape)}"
                )
            self.mean, self._raw, self._packed = parameters, logvar, None
        self._clamp, self._dim, self.deterministic = clamp, dim, deterministic
        self._logvar: Tensor | None = None
        self._std: Tensor | None = None
        self._var: Tensor | None = None

    @property
    def parameters(self) -> Tensor:
        if self._packed is None:
            self._packed = torch.cat([self.mean, self._raw], self._dim)
        return self._packed

    @property
    def logvar(self) -> Tensor:
        if self._logvar is None:
            self._logvar = self._raw if self._clamp is None else self._raw.clamp(*self._clamp)
        return self._logvar

    @property
    def std(self) -> Tensor:
        if self._std is None:
            zero = self.deterministic
            self._std = torch.zeros_like(self.mean) if zero else torch.exp(0.5 * self.logvar)
        return self._std

    @property
    def var(self) -> Tensor:
        if self._var is None:
            zero = self.deterministic
            self._var = torch.zeros_like(self.mean) if zero else torch.exp(self.logvar)
        return self._var

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def sample(self, generator: Generators = None) -> Tensor:
        """Draws as `fastvae.reparameterize`.

        generator: one; or a list of them, one for each sample, whose sample then does not depend on the others. One on the
        CPU draws there for parameters on any device: the same noise everywhere.
        """
        if self.deterministic:
            return self.mean
        eps, generator = self._noise(generator)
        return reparameterize(self.mean, self._raw, clamp=self._clamp, eps=eps, generator=generator)

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """[B] KL divergence in nats from ``other`` (or anything with a ``mean`` and a ``logvar``), or from N(0, 1), summed
        over all dimensions but the first: `fastvae.kl_normal`.
        """
        if self.deterministic:
            return _sum(self._zeros(), self._event)
        return kl_normal(
            self.mean, self._raw, *self._prior(other), clamp=self._clamp, reduction="sample"
        )

    def nll(self, sample: Tensor, dims: int | Sequence[int] | None = None) -> Tensor:
        """-log N(sample; mean, var) in nats, summed over ``dims``: all but the first, if it is not given."""
        dims = self._event if dims is None else [dims] if isinstance(dims, int) else list(dims)
        if self.deterministic:
            return _sum(self._zeros(), dims)
        if sample.shape != self.mean.shape:
            raise ValueError(
                f"fastvae.DiagonalGaussian: sample must have the mean's shape {list(self.mean.shape)}, but got "
                f"{list(sample.shape)}"
            )
        by_sample = dims == self._event
        reduction = "sample" if by_sample else "none"
        nll = -normal_log_prob(sample, self.mean, self._raw, clamp=self._clamp, reduction=reduction)
        return nll if by_sample else _sum(nll, dims)

    def sample_and_kl(
        self, other: DiagonalGaussian | None = None, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """(`sample`, `kl`) in one pass."""
        if self.deterministic:
            return self.mean, self.kl()
        eps, generator = self._noise(generator)
        return sample_and_kl(
            self.mean,
            self._raw,
            *self._prior(other),
            clamp=self._clamp,
            reduction="sample",
            eps=eps,
            generator=generator,
        )

    @property
    def _event(self) -> list[int]:
        return list(range(1, self.mean.dim()))

    def _zeros(self) -> Tensor:
        return torch.zeros_like(
            self.mean, dtype=torch.promote_types(self.mean.dtype, torch.float32)
        )

    @staticmethod
    def _prior(other: DiagonalGaussian | None) -> tuple[Tensor, ...]:
        return () if other is None else (other.mean, other.logvar)

    def _noise(self, generator: Generators) -> tuple[Tensor | None, Generator | None]:
        """The noise, or the generator that the op itself can draw from."""
        if generator is None:
            return None, None
        several = [generator] if isinstance(generator, Generator) else generator
        if not isinstance(several, Sequence) or not all(isinstance(g, Generator) for g in several):
            raise TypeError(
                "fastvae.DiagonalGaussian: generator must be a torch.Generator or a list of them, but got "
                f"{generator!r:.80}"
            )
        if len(several) == 1:
            if several[0].device.type == self.mean.device.type:
                return None, several[0]
            return _draw(self.mean, several[0]), None
        if len(several) != len(self.mean):
            raise ValueError(
                f"fastvae.DiagonalGaussian: generator must be one, or one for each of the {len(self.mean)} samples, "
                f"but got {len(several)}"
            )
        return torch.cat(list(map(_draw, self.mean.split(1), several))), None


def _draw(like: Tensor, generator: Generator) -> Tensor:
    where = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    noise: Tensor = ops._normal_like(where, generator)
    return noise.to(like.device)


def _sum(t: Tensor, dims: list[int]) -> Tensor:
    return t.sum(dims) if dims else t  # to torch no dimensions are all of them
