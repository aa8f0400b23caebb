"""From prepared images to stored latents: form batches of one size, encode, store what is wanted of the posterior.

Batches depend on the images and their order alone, never on timing. So the same backend writes the same shard on any
machine with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.arrays import on_host
from runtimes.base import VaeRuntime
from runtimes.errors import ConfigError, OutOfMemoryError, ShapeError
from runtimes.images import to_float
from runtimes.latent_space import LatentSpace
from runtimes.latents.dataset import STORED
from runtimes.latents.shards import DTYPES, Array, to_stored
from runtimes.posterior import DiagonalGaussianDistribution
from vae_export.dataset.images import Broken, Prepared
from vae_export.dataset.sources import Item

MOST_WAITING = 64 << 20  #: pixels of images that wait until a batch of their size is full
MOST_AT_ONCE = 8  #: images in a batch by default
CACHED = 256 * 256  #: pixels in a batch on a CPU by default: larger batches exceed its caches and are slower
Found = tuple[Item, Prepared]
Batch = list[Found]


@dataclass(frozen=True)
class Storage:
    """What to store of each posterior.

    `stored` is "moments", "mean" or "sample"; `scaled` says whether latents are scaled as a diffusion model takes them.
    `dtype` is float32, float16 or bfloat16. With `flips` the mirror image of every image is an entry too. `seed` is the
    seed of samples.
    """

    stored: str = "mean"
    scaled: bool = True
    dtype: str = "float16"
    flips: bool = False
    seed: int = 0

    def factor(self, latent_space: LatentSpace) -> int:
        """Pixels for each latent that is stored, along each side of an image."""
        return latent_space.normalised_factor if self.scaled else latent_space.factor

    def check(self, latent_space: LatentSpace) -> None:
        """Raise `ConfigError` for unknown values, or for what this VAE cannot give."""
        if self.stored not in STORED:
            raise ConfigError(f"stored {self.stored!r}; known are {', '.join(STORED)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}; known are {', '.join(DTYPES)}")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative")
        if self.stored != "mean" and not latent_space.posterior:
            raise ConfigError(f"this VAE's encoder gives latents and no posterior: store mean, not {self.stored}")
        if self.scaled and self.stored == "moments":
            raise ConfigError("moments are those of raw latents, and are not scaled: give --unscaled")
        if self.scaled and not latent_space.is_known:
            raise ConfigError(
                "the bundle does not know its scaling_factor: give --unscaled, or export the model again with "
                "--scaling-factor"
            )


@dataclass(frozen=True)
class BatchSize:
    """Limits of a batch: `most` images, and `pixels` in all of them together. One image is always allowed."""

    most: int
    pixels: int | None = None

    def of(self, height: int, width: int) -> int:
        """Number of images of this size in a full batch."""
        return self.most if self.pixels is None else max(1, min(self.most, self.pixels // (height * width)))


def batches(found: Iterable[Found], size: BatchSize) -> Iterator[Batch]:
    """Group images by size into full batches, and the rest into smaller ones at the end.

    At most MOST_WAITING pixels wait: beyond that, the batch that was begun first is yielded before it is full.
    """
    waiting: dict[tuple[int, ...], Batch] = {}
    pixels = 0
    for item, image in found:
        shape = image.pixels.shape
        waiting.setdefault(shape, []).append((item, image))
        pixels += shape[0] * shape[1]
        full = size.of(shape[0], shape[1])
        while waiting and (len(waiting.get(shape, ())) == full or pixels > MOST_WAITING):
            ready = shape if len(waiting.get(shape, ())) == full else next(iter(waiting))
            group = waiting.pop(ready)
            pixels -= len(group) * ready[0] * ready[1]
            yield group
    yield from waiting.values()


def encode_batch(vae: VaeRuntime, images: Sequence[Prepared], storage: Storage) -> list[list[Array] | Broken]:
    """Encode a batch. The result for an image is its latents as stored, [C, h, w], and with flips those of its mirror
    image; or the reason why there are none. If memory runs out, the batch is halved until it fits.
    """
    results: list[list[Array] | Broken] = [[] for _ in images]
    for flipped in (False, True) if storage.flips else (False,):
        for index, moments in enumerate(_moments(vae, images, flipped)):
            done = results[index]
            if isinstance(done, Broken):
                continue
            if not isinstance(moments, Broken):
                moments = _stored(vae, moments, images[index], flipped, storage)
            if isinstance(moments, Broken):
                results[index] = moments
            else:
                done.append(moments)
    return results


def _moments(vae: VaeRuntime, images: Sequence[Prepared], flipped: bool) -> list[Array | Broken]:
    """Mean and logvar of each image, float32 [2C, h, w], or plain latents [C, h, w]; or why there are none."""
    takes_pixels = vae.spec["encoder"].input.dtype == "uint8"
    try:
        pixels = np.stack([image.pixels[:, ::-1] if flipped else image.pixels for image in images])
        encoded = vae.encode(pixels if takes_pixels else to_float(pixels))[0]
        return list(on_host(encoded.parameters if vae.latent_space.posterior else encoded).astype(np.float32))
    except (OutOfMemoryError, MemoryError, ShapeError) as error:
        # ShapeError: the batch may be larger than the profiles of a TensorRT bundle allow.
        if len(images) > 1:
            half = len(images) // 2
            return _moments(vae, images[:half], flipped) + _moments(vae, images[half:], flipped)
        if isinstance(error, ShapeError):
            return [Broken(images[0].sha256, str(error))]
        return [Broken(None, f"out of memory ({error}); --memory-budget encodes it in tiles")]


def _stored(vae: VaeRuntime, moments: Array, image: Prepared, flipped: bool, storage: Storage) -> Array | Broken:
    values: Any = moments
    if storage.stored != "moments" and vae.latent_space.posterior:
        posterior = DiagonalGaussianDistribution(moments[None])
        # One generator for each image, seeded by its content: batch, shard and order do not matter.
        key = [storage.seed, int(flipped), int.from_bytes(image.sha256, "big")]
        values = (posterior.mode() if storage.stored == "mean" else posterior.sample([np.random.default_rng(key)]))[0]
    if storage.scaled:
        values = vae.latent_space.normalise(values[None])[0]
    if not np.isfinite(values).all():
        return Broken(image.sha256, f"the encoder of this {vae.precision} bundle gave NaN or infinity")
    stored = to_stored(values, storage.dtype)
    if stored.dtype == np.float16 and not np.isfinite(stored).all():
        return Broken(image.sha256, f"its latents reach {np.abs(values).max():.0f}, more than float16 holds")
    return stored
