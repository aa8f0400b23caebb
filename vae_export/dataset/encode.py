"""Group prepared images into batches of one size, encode them, and convert the posteriors to stored latents.

Batches depend only on the images and their order, never on timing. The same backend therefore writes the same shard on
any machine with any number of workers.
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
from runtimes.manifest import Manifest
from runtimes.posterior import DiagonalGaussianDistribution
from vae_export.dataset.images import Broken, Prepared
from vae_export.dataset.items import Item

MAX_WAITING_PIXELS = 64 << 20  #: maximum total pixels of the images that wait for a full batch of their size
DEFAULT_BATCH_SIZE = 8  #: default maximum of images per batch
CPU_BATCH_PIXELS = (
    256 * 256
)  #: default maximum of pixels per batch on a CPU; larger batches exceed caches and are slower
PreparedItem = tuple[Item, Prepared]
Batch = list[PreparedItem]


@dataclass(frozen=True)
class Storage:
    """Which values of each posterior are stored, and how.

    `stored` is "moments", "mean" or "sample". If `scaled`, latents are stored in the scale that diffusion models use,
    otherwise raw. `dtype` is "float32", "float16" or "bfloat16". If `flips`, the mirror image of every image gets an
    entry as well. `seed` is the non-negative seed of samples.
    """

    stored: str = "mean"
    scaled: bool = True
    dtype: str = "float16"
    flips: bool = False
    seed: int = 0

    def factor(self, latent_space: LatentSpace) -> int:
        """Return the downscaling factor: pixels per stored latent along each side of an image."""
        return latent_space.normalised_factor if self.scaled else latent_space.factor

    def check(self, manifest: Manifest) -> None:
        """Raise `ConfigError` for unknown values, and for values that the graphs of this bundle cannot provide."""
        latent_space = manifest.latent_space
        if self.stored not in STORED:
            raise ConfigError(f"stored {self.stored!r}; known are {', '.join(STORED)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}; known are {', '.join(DTYPES)}")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative")
        if self.stored != "mean" and not manifest.graph_space.posterior:
            way = ", or export with --latents raw" if latent_space.posterior else ""
            raise ConfigError(f"the encoder of this bundle gives latents and no posterior: store mean{way}")
        if self.scaled and self.stored == "moments":
            raise ConfigError("moments are those of raw latents, and are not scaled: give --unscaled")
        if self.scaled and not latent_space.is_known:
            raise ConfigError(
                "the bundle does not know its scaling_factor: give --unscaled, or export the model again with "
                "--scaling-factor"
            )


@dataclass(frozen=True)
class BatchSize:
    """Limits of a batch: at most `images` images with `pixels` pixels in total. One image is always allowed."""

    images: int
    pixels: int | None = None

    def of(self, height: int, width: int) -> int:
        """Return the number of images of this size, in pixels, in a full batch."""
        return self.images if self.pixels is None else max(1, min(self.images, self.pixels // (height * width)))


def batches(found: Iterable[PreparedItem], size: BatchSize) -> Iterator[Batch]:
    """Group images by size into full batches; yield the incomplete batches at the end.

    If more than MAX_WAITING_PIXELS pixels wait, the oldest incomplete batch is yielded early.
    """
    waiting: dict[tuple[int, ...], Batch] = {}
    pixels = 0
    for item, image in found:
        shape = image.pixels.shape
        waiting.setdefault(shape, []).append((item, image))
        pixels += shape[0] * shape[1]
        full = size.of(shape[0], shape[1])
        while waiting and (len(waiting.get(shape, ())) == full or pixels > MAX_WAITING_PIXELS):
            ready = shape if len(waiting.get(shape, ())) == full else next(iter(waiting))
            group = waiting.pop(ready)
            pixels -= len(group) * ready[0] * ready[1]
            yield group
    yield from waiting.values()


def encode_batch(vae: VaeRuntime, images: Sequence[Prepared], storage: Storage) -> list[list[Array] | Broken]:
    """Encode a batch of images of one size.

    Returns, for each image, its latents as stored, [C, h, w], followed with flips by those of its mirror image; or
    `Broken` with the reason why there are none. If memory runs out, the batch is halved until it fits.
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
    """Return for each image its mean and logvar, float32 [2C, h, w], or its latents [C, h, w] if there is no posterior.

    An image that cannot be encoded gives `Broken`.
    """
    takes_pixels = vae.spec["encoder"].input.dtype == "uint8"
    try:
        pixels = np.stack([image.pixels[:, ::-1] if flipped else image.pixels for image in images])
        encoded = vae.encode(pixels if takes_pixels else to_float(pixels))[0]
        return list(on_host(encoded.parameters if vae.graph_space.posterior else encoded).astype(np.float32))
    except (OutOfMemoryError, MemoryError, ShapeError) as error:
        # ShapeError: a batch may exceed the profiles of a TensorRT bundle.
        if len(images) > 1:
            half = len(images) // 2
            return _moments(vae, images[:half], flipped) + _moments(vae, images[half:], flipped)
        if isinstance(error, ShapeError):
            return [Broken(images[0].sha256, str(error))]
        return [Broken(None, f"out of memory ({error}); --memory-budget encodes it in tiles")]


def _stored(vae: VaeRuntime, moments: Array, image: Prepared, flipped: bool, storage: Storage) -> Array | Broken:
    values: Any = moments
    if storage.stored != "moments" and vae.graph_space.posterior:
        posterior = DiagonalGaussianDistribution(moments[None])
        # One generator per image, seeded by its content, so that samples do not depend on batch, shard or order.
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
