"""The posterior over latents, for NumPy arrays, torch tensors and CuPy arrays.

The reference model and every backend use this implementation, so the same seed gives the same latents on all of them.
Torch and CuPy are not imported here: a caller that passes their arrays has imported them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.arrays import array_module
from runtimes.errors import ShapeError

LOGVAR_RANGE = (-30.0, 20.0)  #: the limits to which logvar is clamped, as in diffusers


class DiagonalGaussianDistribution:
    """An independent Gaussian per element of the latents.

    `parameters` [B, 2*C, h, w] holds the mean, then the logvar (clamped to [-30, 20]). With `deterministic` the
    variance is 0. `mean`, `logvar`, `std` and `var` are [B, C, h, w].
    """

    def __init__(self, parameters: Any, deterministic: bool = False) -> None:
        xp = array_module(parameters)
        channels = parameters.shape[1] // 2
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean = parameters[:, :channels]
        self.logvar = parameters[:, channels:].clip(*LOGVAR_RANGE)
        self.std = xp.zeros_like(self.mean) if deterministic else xp.exp(0.5 * self.logvar)
        self.var = xp.zeros_like(self.mean) if deterministic else xp.exp(self.logvar)

    def sample(self, generator: Any = None) -> Any:
        """Draw latents [B, C, h, w] in the parameters' dtype and on their device.

        `generator` is a `numpy.random.Generator`, a `numpy.random.RandomState` or a `torch.Generator`, for any kind of
        parameters. A `torch.Generator` draws on its own device, in the dtype of torch parameters, exactly as diffusers
        does. A whole number is a seed for `numpy.random.default_rng`. A list with one of these per sample makes each
        sample independent of its batch. None draws from fresh entropy (NumPy, CuPy) or the global generator (torch).
        Raises `ShapeError` for anything else.
        """
        if isinstance(generator, (list, tuple)):
            if len(generator) != self.mean.shape[0]:
                raise ShapeError(
                    f"{len(generator)} generators for a batch of {self.mean.shape[0]}; give one per sample"
                )
            xp, one = array_module(self.mean), (1, *self.mean.shape[1:])
            noise = xp.concatenate([self._noise(_checked(each), one) for each in generator])
        else:
            noise = self._noise(_checked(generator), self.mean.shape)
        return self.mean + self.std * noise

    def _noise(self, generator: Any, shape: Sequence[int]) -> Any:
        like, xp = self.mean, array_module(self.mean)
        torch = sys.modules.get("torch")
        if torch is None or xp is not torch:
            if torch is not None and isinstance(generator, torch.Generator):
                draw = torch.randn(tuple(shape), generator=generator, device=generator.device)
                return xp.asarray(draw.cpu().numpy().astype(like.dtype))
            rng = np.random.default_rng() if generator is None else generator
            return xp.asarray(_normal(rng, shape).astype(like.dtype))
        if isinstance(generator, (np.random.Generator, np.random.RandomState)):
            draw = torch.from_numpy(_normal(generator, shape))
            return draw.to(device=like.device, dtype=like.dtype)
        device = like.device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)

    def mode(self) -> Any:
        """Return the most likely latents [B, C, h, w]: the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Any:
        """Return the Kullback-Leibler divergence [B] from `other`, or from the standard normal distribution."""
        if self.deterministic:
            return array_module(self.mean).zeros(1)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(axis=(1, 2, 3))

    def nll(self, sample: Any, dims: Sequence[int] = (1, 2, 3)) -> Any:
        """Return the negative log-likelihood of `sample` [B, C, h, w], summed over `dims`."""
        if self.deterministic:
            return array_module(self.mean).zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(axis=tuple(dims))


def _checked(generator: Any) -> Any:
    """Return the generator or None; convert a seed to a NumPy generator. Raises `ShapeError` for anything else."""
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        if generator < 0:
            raise ShapeError(f"a seed is 0 or more, not {generator}")
        return np.random.default_rng(int(generator))
    torch = sys.modules.get("torch")
    known = (np.random.Generator, np.random.RandomState, *(() if torch is None else (torch.Generator,)))
    if generator is not None and not isinstance(generator, known):
        raise ShapeError(
            "generator is a seed, a numpy.random.Generator or RandomState, a torch.Generator, or a list with one of "
            f"these per sample, not {type(generator).__name__}"
        )
    return generator


def _normal(rng: np.random.Generator | np.random.RandomState, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Draw float32 noise. A RandomState can only draw float64, which is then converted."""
    if isinstance(rng, np.random.RandomState):
        return np.asarray(rng.standard_normal(tuple(shape)), np.float32)
    return rng.standard_normal(tuple(shape), dtype=np.float32)
