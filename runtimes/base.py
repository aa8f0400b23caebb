"""`VaeRuntime`: the encode/decode API that all backends share.

A backend is a subclass that implements `_run` and `_close`; `_run` receives arrays that `runtimes.edge` has checked.
`runtimes.tiling.tiler` splits calls into tiles; `runtimes.lifetime` counts calls and closes the runtime.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from runtimes import reopening
from runtimes.arrays import array_module, as_type
from runtimes.bundle import Bundle
from runtimes.config import is_size
from runtimes.edge import Notices, checked_floats, checked_pixels, kept_part
from runtimes.errors import ConfigError, NumericsError
from runtimes.images import Images, as_uint8_batch, to_float, to_uint8
from runtimes.layout import as_pixels, channels_first, channels_first_floats, channels_last
from runtimes.lifetime import Lifetime
from runtimes.manifest import GraphSpec
from runtimes.names import Graph
from runtimes.outputs import AutoencoderKLOutput, AutoencoderTinyOutput, DecoderOutput
from runtimes.posterior import DiagonalGaussianDistribution
from runtimes.tiling.budget import Budget
from runtimes.tiling.seamless import SeamlessGraphs
from runtimes.tiling.settings import TilingSettings
from runtimes.tiling.tiler import NO_LIMITS, Limits, Tiler


class VaeRuntime(Lifetime, TilingSettings):
    """An open bundle. Methods accept NumPy, torch and CuPy arrays, and return arrays of the same kind.

    Open one with `open_vae`, use it from any number of threads, and close it (or use it in a `with` statement). Each
    process must open the bundle itself: using a runtime in a fork of the process that opened it raises `VaeError`.

    A copy, or an unpickled runtime, opens the bundle again with the same options and tiling. It is independent of the
    original, and must be closed separately.

    `config` is the model's config, `latent_space` the shape and normalisation of its latents, `graph_space` the shape
    of the latents of the graphs (normalised in a bundle exported with `--latents normalised`), and `spec` maps each
    graph to its file, input and output. `backend` and `precision` are names.
    """

    backend: ClassVar[str]
    default_device: ClassVar[str] = "cpu"
    runs_steps: ClassVar[bool] = False  #: whether it implements `StepBackend`, for seamless tiling
    device: str
    _options: Mapping[str, Any]  #: the keyword arguments that the backend's class received

    def __new__(cls, *_: Any, **options: Any) -> VaeRuntime:
        runtime = super().__new__(cls)
        runtime._options = options
        return runtime

    def __init__(self, bundle: Bundle, *, check_finite: bool = False) -> None:
        manifest = bundle.manifest
        self.manifest, self.config, self.latent_space = manifest, manifest.config, manifest.latent_space
        self.graphs_are_raw = manifest.latents == "raw"  #: whether the graphs give and take raw latents
        self.graph_space = manifest.graph_space
        self.spec: Mapping[Graph, GraphSpec] = manifest.graphs
        self.precision = manifest.precision
        self.check_finite = check_finite
        if check_finite and self.spec["decoder"].output.dtype == "uint8":
            raise ConfigError(
                "check_finite finds no NaN in pixels, which is what this bundle's decoder returns (--io uint8)"
            )
        self._bundle = bundle
        bundle.check_small_files()
        self._notices = Notices(self.backend)
        self._set_up_tiling(_tile_side(self.config), self.graph_space.factor)
        self._budget: Budget | None = None
        self._seamless = SeamlessGraphs(manifest) if manifest.tileable and self.runs_steps else None
        self._begin_life()

    # Implemented by backends ---------------------------------------------------------------------------------------

    @abstractmethod
    def _run(self, graph: Graph, x: Any) -> Any:
        """Run a graph on an array of any kind, with the graph's input dtype and a valid shape; return the same kind."""

    def _taken(self, x: Any) -> Any:
        """Return the caller's array; a backend may convert arrays of its own library to a kind that is supported."""
        return x

    def limits(self, graph: Graph, batch: int) -> Limits:
        """Return the sizes that the backend accepts in one call of a graph at a batch size; by default all sizes."""
        return NO_LIMITS

    # Encoding and decoding ------------------------------------------------------------------------------------------

    def encode(self, x: Any, return_dict: bool = True, *, pad: bool = False) -> Any:
        """Encode images, float [B, in_channels, H, W] in [-1, 1], to the posterior over latents [B, C, H/f, W/f].

        Returns an `AutoencoderKLOutput` with `latent_dist`. Families without a posterior, and bundles exported with
        `--latents normalised` (whose latents are the posterior's mode), return an `AutoencoderTinyOutput` with
        `latents`. With `return_dict=False`, returns a tuple with that one entry.

        H and W must be multiples of f (`ShapeError` names the size to pad to). With `pad`, the image is padded by
        reflection on the right and bottom; `decode(z, size=(H, W))` crops the result again. Any float dtype is
        accepted; the moments have the graph's output dtype. A bundle exported with `--io uint8` takes uint8
        [B, H, W, 3] instead.
        """
        encoded = self._encode(x, pad, self.graph_space.factor)
        if self.graph_space.posterior:
            posterior = DiagonalGaussianDistribution(encoded)
            return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)
        latents = encoded if self.graphs_are_raw else self.latent_space.denormalise(encoded)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self, z: Any, return_dict: bool = True, generator: Any = None, *, size: tuple[int, int] | None = None
    ) -> DecoderOutput | tuple[Any]:
        """Decode raw (unscaled) latents, float [B, latent_channels, h, w], to images [B, out_channels, f*h, f*w].

        Values are nominally in [-1, 1] and not clipped. `size`, (height, width) in pixels, crops the images to their
        top left part. A bundle exported with `--io uint8` returns uint8 [B, f*h, f*w, C] instead. `generator` is
        accepted for compatibility with diffusers and ignored: decoding is deterministic. Raises `ShapeError` for a
        wrong shape, dtype or size.
        """
        self._check_open()
        z, dtype = self._taken(z), self.spec["decoder"].input.dtype
        self._notices.about_gradients(z)
        z = checked_floats(z, "latents", self.latent_space.channels, dtype, multiple_of=1)
        sample = self._decode(z if self.graphs_are_raw else self.latent_space.normalise(z), size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _encode(self, x: Any, pad: bool, multiple_of: int) -> Any:
        """Check images, whose sides must be multiples of `multiple_of` pixels, and run the encoder graph on them."""
        self._check_open()
        channels, dtype = self.channels("encoder"), self.spec["encoder"].input.dtype
        x = self._taken(x)
        if dtype == "uint8":
            x = checked_pixels(x, channels, multiple_of=multiple_of, pad=pad)
        else:
            self._notices.about_gradients(x)
            x = checked_floats(x, "images", channels, dtype, multiple_of=multiple_of, pad=pad)
            self._notices.about_range(x)
        return self._apply("encoder", x)

    def _decode(self, z: Any, size: tuple[int, int] | None) -> Any:
        """Run the decoder graph on checked latents of its own kind, and crop the images to `size`."""
        height, width = (side * self.graph_space.factor for side in z.shape[2:])
        kept = None if size is None else kept_part(size, height, width)
        sample = self._apply("decoder", z)
        if kept is not None:
            sample = sample[:, *kept] if self.spec["decoder"].output.axes[0] == 3 else sample[:, :, *kept]
        return sample

    # Images and normalised latents ----------------------------------------------------------------------------------

    def images_to_latents(
        self, images: Images, generator: Any = None, *, pad: bool = False, max_pixels: int | None = None
    ) -> Any:
        """Encode uint8 [B, H, W, C] or [H, W, C], PIL images, paths or files to latents for a diffusion model.

        C is the model's number of channels: 1 for grey, 3 for RGB, 4 for RGBA. PIL images and files are converted to
        it, upright and in sRGB; `max_pixels` limits their size: see `runtimes.image_files.load_pil`.

        Returns float32 latents, normalised by `latent_space`: the posterior's mode, or a sample of it if a generator or
        seed is given. Torch tensors give a tensor. `pad`: see `encode`. Raises `ConfigError` if the checkpoint has no
        scaling_factor, `ShapeError` for images that cannot be read or have a wrong shape.
        """
        self.latent_space.check_known()
        pixels = as_uint8_batch(self._taken(images), self.channels("encoder"), max_pixels=max_pixels)
        given = pixels if self.spec["encoder"].input.dtype == "uint8" else to_float(pixels)
        if generator is not None and self.latent_space.posterior and not self.graph_space.posterior:
            raise ConfigError(
                "the encoder of this bundle gives the posterior's mode alone (--latents normalised), and a generator "
                "asks for a draw; export with --latents raw"
            )
        z = self._encode(given, pad, self.latent_space.normalised_factor)
        if self.graph_space.posterior:
            posterior = DiagonalGaussianDistribution(z)
            z = posterior.mode() if generator is None else posterior.sample(generator)
        return as_type(self.latent_space.normalise(z) if self.graphs_are_raw else z, "float32")

    def latents_to_images(self, latents: Any, *, size: tuple[int, int] | None = None) -> Any:
        """Decode normalised latents [B, C, h, w] to uint8 [B, f*h, f*w, channels], cropped to `size` as in `decode`.

        The last axis has the decoder's channels: 1 for grey, 3 for RGB, 4 for RGBA. NaN and infinity raise
        `NumericsError`, with or without `check_finite`. Raises `ConfigError` if the checkpoint has no scaling_factor.
        """
        self._check_open()
        self.latent_space.check_known()
        given = self._taken(latents)
        self._notices.about_gradients(given)
        given = checked_floats(given, "latents", self.latent_space.normalised_channels, "float32", multiple_of=1)
        if self.spec["decoder"].output.dtype == "uint8" and not bool(array_module(given).isfinite(given).all()):
            raise NumericsError("the latents hold NaN or infinity: no image")  # the uint8 result would hide them
        given = self.latent_space.denormalise(given) if self.graphs_are_raw else given
        sample = self._decode(as_type(given, self.spec["decoder"].input.dtype), size)
        if self.spec["decoder"].output.dtype == "uint8":
            return sample
        if not bool(array_module(sample).isfinite(sample).all()):
            raise NumericsError(f"the decoder of this {self.precision} bundle gave NaN or infinity: no image")
        return to_uint8(sample)

    # One call of a graph --------------------------------------------------------------------------------------------

    def _apply(self, graph: Graph, x: Any) -> Any:
        """Run a graph on checked input, with tiling or slicing if enabled; images have the graph's layout."""
        spec = self.spec[graph]
        run: Callable[[Any], Any] = functools.partial(self._run, graph)
        with self._at_work():
            if spec.input.dtype == "uint8":
                result = self._tiler().run(lambda part: run(channels_last(part)), channels_first(x), graph)
            elif spec.output.dtype == "uint8":
                # Tiles are blended as floats, because blending uint8 would round each time.
                as_tile = channels_first_floats if self.use_tiling else channels_first
                result = as_pixels(self._tiler().run(lambda part: as_tile(run(part)), x, graph))
            else:
                result = self._tiler().run(run, x, graph)
            if self.check_finite and not bool(array_module(result).isfinite(result).all()):
                raise NumericsError(f"the {graph} of this {self.precision} bundle gave NaN or infinity")
            return result

    def channels(self, graph: Graph) -> int:
        """Return the number of channels of the encoder's input images, or of the decoder's output images."""
        return (self.spec[graph].input if graph == "encoder" else self.spec[graph].output).channels

    def _output_shape(self, graph: Graph, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a graph's output for an input of this shape."""
        source, target, factor = self.spec[graph].input, self.spec[graph].output, self.graph_space.factor
        _, height, width = (shape[axis] for axis in source.axes)
        sides = [side // factor if graph == "encoder" else side * factor for side in (height, width)]
        sizes = dict(zip(target.axes, (target.channels, *sides), strict=True))
        return (shape[0], *(sizes[axis] for axis in (1, 2, 3)))

    # Tiling ---------------------------------------------------------------------------------------------------------

    @property
    def memory_budget(self) -> int | None:
        """Bytes of working memory that a call may use, or None; the bundle, inputs and outputs do not count.

        Set it to a number or a text such as "2GiB". A call that fits runs untiled; others run in the largest tiles that
        fit, of the kind that `enable_tiling` chose (default: blended). The needed memory comes from a model that was
        measured for each backend and precision, see `runtimes.tiling.budget`. Setting it raises `ConfigError` if there
        is no such model.
        """
        return None if self._budget is None else self._budget.bytes

    @memory_budget.setter
    def memory_budget(self, value: int | str | None) -> None:
        self._budget = None if value is None else Budget.of(value, self.manifest, self.backend, self.device)

    def _tiler(self) -> Tiler:
        halo = self.manifest.halo
        return Tiler(self, self.graph_space.factor, self.limits, self._budget, halo, self._seamless, self)

    def _check_seamless(self) -> None:
        if self.manifest.halo is not None:
            return
        if not self.runs_steps:
            raise ConfigError(f'tiling="seamless" does not run in {self.backend} yet; enable_tiling("blended") does')
        if self._seamless is None:
            raise ConfigError(
                'this bundle has no steps for tiling="seamless": export it again with --tileable, or use '
                'enable_tiling("blended")'
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return reopening.reduced(self, self._bundle, self._options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.backend} {self.precision}{' closed' if self.is_closed() else ''}>"


def _tile_side(config: Any) -> int:
    """Return the default side of a tile in pixels: the config's sample_size, or diffusers' 512."""
    side = getattr(config, "sample_size", 512)
    return side if is_size(side) else 512
