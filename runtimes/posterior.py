"""The posterior over latents, on arrays of any kind: NumPy's, and those of torch or CuPy where the caller uses them.

One implementation serves the reference model and every backend, so that the same seed gives the same latents wherever
the moments were computed. Neither is imported here: whoever gives an array has its library loaded.
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

LOGVAR_RANGE = (-30.0, 20.0)  #: as diffusers clamps it


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
        """A draw [B, C, h, w] in the parameters' dtype and on their device.

        `generator` is a `numpy.random.Generator`, a `numpy.random.RandomState` or a `torch.Generator`, whichever kind
        the parameters are; a `torch.Generator` draws on its own device, in the parameters' dtype, exactly as diffusers
        does. A whole number is the seed of `numpy.random.default_rng`. A list with one of these per sample makes each
        sample independent of the batch that it is in. None draws from fresh entropy (NumPy) or the global generator
        (torch). Anything else is a `ShapeError`.
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
        """The most likely latents [B, C, h, w]: the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Any:
        """Kullback-Leibler divergence [B] from `other`, or from the standard normal distribution."""
        if self.deterministic:
            return array_module(self.mean).zeros(1)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(axis=(1, 2, 3))

    def nll(self, sample: Any, dims: Sequence[int] = (1, 2, 3)) -> Any:
        """Negative log-likelihood of `sample` [B, C, h, w], summed over `dims`."""
        if self.deterministic:
            return array_module(self.mean).zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(axis=tuple(dims))


def _checked(generator: Any) -> Any:
    """A generator, or None; a seed becomes one of NumPy's."""
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
    """float32 noise. A RandomState knows no float32: it draws in float64."""
    if isinstance(rng, np.random.RandomState):
        return np.asarray(rng.standard_normal(tuple(shape)), np.float32)
    return rng.standard_normal(tuple(shape), dtype=np.float32)
