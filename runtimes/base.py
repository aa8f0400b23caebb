"""`VaeRuntime`: the one encode/decode API, and all checking of what comes in.

A backend is a subclass with `_run` and `_close`, over arrays that have already been checked.
"""

from __future__ import annotations

import functools
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from runtimes import forks
from runtimes.bundle import Bundle, GraphSpec, Step
from runtimes.config import VaeConfig
from runtimes.errors import ConfigError, NumericsError, OutOfMemoryError, ShapeError, VaeError
from runtimes.images import Images, as_uint8_batch, to_float, to_uint8
from runtimes.layout import as_pixels, channels_first, channels_first_floats, channels_last, padded
from runtimes.memory import Rate, call_bytes, parse_bytes, rate_of
from runtimes.outputs import AutoencoderKLOutput, DecoderOutput
from runtimes.pixels import to_levels, to_samples
from runtimes.posterior import DiagonalGaussianDistribution, array_module
from runtimes.seamless import largest_maps, run_seamless
from runtimes.tiling import TilingAndSlicing

Array = npt.NDArray[Any]
GraphName = Literal["encoder", "decoder"]


class VaeRuntime(TilingAndSlicing, ABC):
    """An opened bundle. Arrays in, arrays out: each is answered by one of its kind, NumPy's, torch's or CuPy's.

    Open one with `open_vae`, use it from any number of threads, and close it (or use it in a `with` statement). Other
    processes open their own: in a fork of the process that opened it, using it is a `VaeError`.

    `config` is the model's config, `spec` the graphs with their inputs and outputs; `backend` and `precision` say what
    runs.
    """

    backend: ClassVar[str]
    runs_steps: ClassVar[bool] = False  #: whether it has what seamless tiling needs
    device: str

    def __init__(self, bundle: Bundle, *, check_finite: bool = False) -> None:
        self.manifest = bundle.manifest
        self.config: VaeConfig = bundle.manifest.config
        self.spec: Mapping[str, GraphSpec] = bundle.manifest.graphs
        self.precision = bundle.manifest.precision
        self.check_finite = check_finite
        if check_finite and self.spec["decoder"].output.dtype == "uint8":
            raise ConfigError(
                "check_finite finds no NaN in pixels, which is what this bundle's decoder gives (--io uint8)"
            )
        self._bundle = bundle
        self._closed = False
        self._set_up_tiling()
        self._budget: tuple[int, Rate] | None = None
        self._opened: set[str] = set()  #: graphs whose steps are
        self._opening = threading.Lock()
        self._calls = 0  #: at work now
        self._released = False
        self._counting = threading.RLock()  # a signal handler may close what it interrupts
        forks.watch(self)

    # What a backend provides ----------------------------------------------------------------------------------------

    @abstractmethod
    def _run(self, graph: GraphName, x: Any) -> Any:
        """Run a graph on an array of its input dtype, of any kind, shape checked; return one of its kind."""

    @abstractmethod
    def _close(self) -> None:
        """Release sessions and memory; called once, when no call is at work."""

    def _open_steps(self, steps: Sequence[Step]) -> None:
        """Load the steps of one graph for seamless tiling, for `_run_step`; called once, before the first of them."""
        raise NotImplementedError  # unless runs_steps

    def _run_step(self, step: Step, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Run one of them on arrays in host memory."""
        raise NotImplementedError  # unless runs_steps

    # Encoding and decoding ------------------------------------------------------------------------------------------

    def encode(
        self, x: Any, return_dict: bool = True, *, pad: bool = False
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images, float [B, in_channels, H, W] in [-1, 1] -> the posterior over latents [B, C, H/f, W/f].

        H and W must be multiples of f (`ShapeError` names the size to pad to); with `pad` the image is continued by its
        mirror image on the right and bottom, and `decode(z, size=(H, W))` cuts that off again. Any float dtype is
        taken; moments come in the graph's output dtype. A bundle exported with `--io uint8` takes uint8 [B, H, W, 3]
        instead.
        """
        if self.spec["encoder"].input.dtype == "uint8":
            x = self._checked_pixels(x, pad=pad)
        else:
            x = self._checked(x, "images", self.config.in_channels, multiple_of=self.config.downscale, pad=pad)
        posterior = DiagonalGaussianDistribution(self._apply("encoder", x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Any, return_dict: bool = True, generator: Any = None, *, size: tuple[int, int] | None = None
    ) -> DecoderOutput | tuple[Any]:
        """Raw (unscaled) latents, float [B, latent_channels, h, w] -> images [B, out_channels, f*h, f*w], not clipped.

        `size`, height and width in pixels, is what is kept of them, from the top left corner. A bundle exported with
        `--io uint8` gives uint8 [B, f*h, f*w, 3] instead. `generator` is accepted, as in diffusers, and not used:
        decoding is deterministic.
        """
        z = self._checked(z, "latents", self.config.latent_channels, multiple_of=1)
        kept = None if size is None else self._kept(size, z.shape)
        sample = self._apply("decoder", z)
        if kept is not None:
            sample = sample[:, *kept] if self.spec["decoder"].output.axes[0] == 3 else sample[:, :, *kept]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    # Images and scaled latents --------------------------------------------------------------------------------------

    def images_to_latents(self, images: Images, generator: Any = None, *, pad: bool = False) -> Array:
        """uint8 [B, H, W, 3] or [H, W, 3], PIL images or paths -> latents as a diffusion model takes them.

        Of images and files orientation is applied and transparency laid over white: see `runtimes.images.load_rgb`.
        The latents are scaled and shifted: the posterior's mode, or a draw from it where a generator is given.
        `pad`: see `encode`. `ConfigError` where the checkpoint did not say its scaling_factor.
        """
        scale = self._latent_scale()
        pixels = as_uint8_batch(images)
        given = pixels if self.spec["encoder"].input.dtype == "uint8" else to_float(pixels)
        posterior = self.encode(given, pad=pad)[0]
        z = posterior.mode() if generator is None else posterior.sample(generator)
        multiply, add = scale
        return np.asarray((z - add) * multiply, dtype=np.float32)

    def latents_to_images(self, latents: Any, *, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
        """Scaled latents [B, latent_channels, h, w] -> uint8 [B, f*h, f*w, 3], or the `size` of it (see `decode`).

        NaN and infinity have no colour: they raise `NumericsError`, with or without `check_finite`.
        """
        multiply, add = self._latent_scale()
        raw = self._checked(latents, "latents", self.config.latent_channels, multiple_of=1)
        raw = on_host(raw)
        if self.spec["decoder"].output.dtype == "uint8" and not np.isfinite(raw).all():
            raise NumericsError("the latents hold NaN or infinity: no image")  # pixels would not show it
        sample = self.decode((raw / multiply + add).astype(np.float32), size=size)[0]
        if sample.dtype == np.uint8:
            pixels: npt.NDArray[np.uint8] = sample
            return pixels
        if not np.isfinite(sample).all():
            raise NumericsError(f"the decoder of this {self.precision} bundle gave NaN or infinity: no image")
        return to_uint8(sample)

    def _latent_scale(self) -> tuple[Array, Array]:
        """(multiply, add), each [1, C, 1, 1]: scaled = (raw - add) * multiply."""
        if self.config.scaling_factor is None:
            raise ConfigError(
                "the checkpoint does not say its scaling_factor, and guessing it would give wrong latents; export it "
                "again with --scaling-factor (and --shift-factor), or use encode and decode on raw latents"
            )
        multiply, add = (np.asarray(v, dtype=np.float32).reshape(1, -1, 1, 1) for v in self.config.latent_affine())
        return multiply, add

    def _apply(self, graph: GraphName, x: Any) -> Any:
        with self._at_work():
            return self._compute(graph, x)

    def _compute(self, graph: GraphName, x: Any) -> Any:
        spec = self.spec[graph]
        run: Callable[[Any], Any] = functools.partial(self._run, graph)
        if spec.input.dtype == "uint8":
            result = self._in_parts(lambda part: run(channels_last(part)), channels_first(x), graph)
        elif spec.output.dtype == "uint8":
            # Blended as floats: each blending of pixels would lose what is below a whole step.
            as_tile = channels_first_floats if self.use_tiling else channels_first
            result = as_pixels(self._in_parts(lambda part: as_tile(run(part)), x, graph))
        else:
            result = self._in_parts(run, x, graph)
        if self.check_finite and not bool(array_module(result).isfinite(result).all()):
            raise NumericsError(f"the {graph} of this {self.precision} bundle gave NaN or infinity")
        return result

    # Tiling ---------------------------------------------------------------------------------------------------------

    @property
    def memory_budget(self) -> int | None:
        """Bytes that a call may use, beyond what the opened bundle holds and the arrays that come and go; or None.

        Set to a number or a text such as "2GiB": what fits is computed untiled, and what does not in the largest tiles
        that do (of the kind that `enable_tiling` chose, blended unless it was called). How much a call needs is a
        model, measured for each backend and precision: see `runtimes.memory`. `ConfigError` where there is none.
        """
        return None if self._budget is None else self._budget[0]

    @memory_budget.setter
    def memory_budget(self, value: int | str | None) -> None:
        self._budget = (
            None if value is None else (parse_bytes(value), rate_of(self.backend, self.device, self.precision))
        )

    def _may_tile(self) -> bool:
        return self.use_tiling or self._budget is not None

    def _tile_sides(self, graph: str, shape: Sequence[int]) -> Iterator[int | None]:
        if self._budget is None:
            yield from super()._tile_sides(graph, shape)
            return
        budget, rate = self._budget
        factor = self.config.downscale
        height, width = shape[-2:] if graph == "encoder" else (shape[-2] * factor, shape[-1] * factor)
        whole = max(height, width) // factor
        needed = call_bytes(rate, self.config, graph, shape[0], height, width)
        if needed <= budget:
            yield None
            yield from self._halves(graph, whole)
            return
        for side in self._possible_sides(graph, whole - 1):
            pixels = side * factor
            if self.tiling == "seamless":
                needed = self._seamless_bytes(rate, graph, shape, height, width, pixels)
            else:
                needed = call_bytes(rate, self.config, graph, shape[0], pixels, pixels)
            if needed <= budget:
                yield side
                yield from self._halves(graph, side)
                return
        raise OutOfMemoryError(
            f"memory_budget of {budget} bytes: the {graph} on {width}x{height} pixels needs about {needed} even in the "
            f"smallest {self.tiling} tiles"
        )

    def _seamless_bytes(
        self, rate: Rate, graph: str, shape: Sequence[int], height: int, width: int, pixels: int
    ) -> int:
        """Of a call in seamless tiles: what lies between the steps, beside what runs on a tile, or on the whole."""
        assert self.manifest.tileable is not None
        positions = (height // self.config.downscale) * (width // self.config.downscale)
        whole = positions * self.config.block_out_channels[-1] * rate.step + rate.whole_score * positions**2
        tile = pixels**2 * self.config.block_out_channels[0] * rate.step
        return int(max(whole, tile)) + largest_maps(
            self.manifest.tileable[graph], shape[-2], shape[-1], self.config.downscale
        )

    def _prepare_seamless(self) -> None:
        if not self.runs_steps:
            raise ConfigError(f'tiling="seamless" does not run in {self.backend} yet; enable_tiling("blended") does')
        if self.manifest.tileable is None:
            raise ConfigError(
                'this bundle is not cut for tiling="seamless": export it again with --tileable, or use '
                'enable_tiling("blended")'
            )

    def _tiled(self, function: Callable[[Any], Any], x: Any, graph: str, side: int) -> Any:
        if self.tiling != "seamless":
            return super()._tiled(function, x, graph, side)
        return answer_in_kind(lambda array: self._seamless(graph, array, side), x)

    def _seamless(self, graph: str, x: Array, side: int) -> Array:
        """As `_in_parts` has it: images have their channels first here, and pixels are floats behind the decoder."""
        assert self.manifest.tileable is not None
        steps = self.manifest.tileable[graph]
        with self._opening:
            if graph not in self._opened:
                self._open_steps(steps)
                self._opened.add(graph)
        if x.dtype == np.uint8:
            x = to_samples(x.astype(np.float32))
        parts = [
            run_seamless(
                steps,
                self._run_step,
                x[i : i + 1].astype(np.float32, copy=False),
                factor=self.config.downscale,
                groups=self.config.norm_num_groups,
                tile_values=(side * self.config.downscale) ** 2 * self.config.block_out_channels[0],
                on_tile=self.on_tile,
            )
            for i in range(len(x))
        ]
        result = np.concatenate(parts)
        if self.spec[graph].output.dtype == "uint8":
            levels: Array = to_levels(result)
            return levels
        return result.astype(self.spec[graph].output.dtype, copy=False)

    def _output_shape(self, graph: GraphName, shape: Sequence[int]) -> tuple[int, ...]:
        """What a graph makes of an input of this shape."""
        source, target, factor = self.spec[graph].input, self.spec[graph].output, self.config.downscale
        _, height, width = (shape[axis] for axis in source.axes)
        sides = [side // factor if graph == "encoder" else side * factor for side in (height, width)]
        sizes = dict(zip(target.axes, (int(target.shape[target.axes[0]]), *sides), strict=True))
        return (shape[0], *(sizes[axis] for axis in (1, 2, 3)))

    # Checking at the edge -------------------------------------------------------------------------------------------

    def _checked(self, x: Any, what: str, channels: int, *, multiple_of: int, pad: bool = False) -> Any:
        """`x` as an array in the graph's input dtype; `ShapeError` names the value and the rule."""
        self._check_open()
        xp = array_module(x)
        if xp is np and not isinstance(x, np.ndarray):
            try:
                x = np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
            except (BufferError, TypeError, ValueError) as error:  # on another device, or ragged
                raise ShapeError(f"{what} cannot be read as an array: {error}") from None
        is_torch = hasattr(x, "is_floating_point")
        if not (x.is_floating_point() if is_torch else x.dtype.kind == "f"):
            raise ShapeError(f"{what} are floating point, not {x.dtype}; uint8 images go to images_to_latents")
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
            raise ShapeError(f"{what} are [B, {channels}, height, width], not {list(x.shape)}")
        x = padded(x, (2, 3), multiple_of) if pad else x
        _check_sides(x.shape[2:], multiple_of)
        dtype = self.spec["encoder" if what == "images" else "decoder"].input.dtype
        return x.detach().to(getattr(xp, dtype)) if is_torch else x.astype(dtype, copy=False)

    def _checked_pixels(self, x: Any, *, pad: bool) -> Any:
        """`x` as uint8 [B, H, W, 3] for a graph that takes that."""
        self._check_open()
        x = x.detach() if hasattr(x, "detach") else np.asarray(x)
        if str(x.dtype).removeprefix("torch.") != "uint8" or x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape:
            raise ShapeError(
                f"this bundle takes uint8 images [B, height, width, 3] (--io uint8), not {x.dtype} {list(x.shape)}"
            )
        x = padded(x, (1, 2), self.config.downscale) if pad else x
        _check_sides(x.shape[1:3], self.config.downscale)
        return x

    def _kept(self, size: tuple[int, int], shape: Sequence[int]) -> tuple[slice, slice]:
        """The rows and columns of an image from latents of this shape that `size` keeps."""
        height, width = (side * self.config.downscale for side in shape[2:])
        if not (0 < size[0] <= height and 0 < size[1] <= width):
            raise ShapeError(f"size {size[1]}x{size[0]} is not a part of the image, {width}x{height}")
        return slice(size[0]), slice(size[1])

    # Life -----------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise VaeError("this VAE was closed; open the bundle again")
        forks.check(self)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """A call: what it uses stays until it has ended, also where another thread closes the runtime meanwhile."""
        self._check_open()
        with self._counting:
            self._calls += 1
        try:
            self._check_open()  # once more: now nothing is released before this call has ended
            yield
        finally:
            with self._counting:
                self._calls -= 1
            if self._take_release():
                try:
                    self._close()
                except Exception as error:  # it is not this call that failed
                    warnings.warn(f"closing {self!r} failed: {error}", RuntimeWarning, stacklevel=4)

    def _take_release(self) -> bool:
        """Whether it is now, and for this one, to release what a closed runtime holds."""
        with self._counting:
            if not self._closed or self._calls or self._released:
                return False
            self._released = True
            return True

    def close(self) -> None:
        """Release everything; using the runtime afterwards raises. Calls that are at work in other threads end well,
        and the last of them releases. In a process forked from the one that opened it, nothing is released."""
        self._closed = True
        if not forks.is_foreign(self) and self._take_release():
            self._close()

    def __enter__(self) -> VaeRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.backend} {self.precision}{' closed' if self._closed else ''}>"


def on_host(x: Any) -> Array:
    """An array of any kind as one of NumPy."""
    if array_module(x) is np:
        return np.asarray(x)
    return np.asarray(x.detach().cpu().numpy() if hasattr(x, "detach") else x.get())


def _check_sides(sides: Sequence[int], multiple_of: int) -> None:
    """`ShapeError` unless height and width are multiples."""
    for name, size in zip(("height", "width"), sides, strict=True):
        if size % multiple_of:
            full = size + -size % multiple_of
            raise ShapeError(f"{name} {size} is not a multiple of {multiple_of}; pad to {full} (pad=True)")


def answer_in_kind(function: Callable[[Array], Array], x: Any) -> Any:
    """Apply a NumPy function to `x`; for a torch tensor or CuPy array, answer with one, a tensor on the same device."""
    xp = array_module(x)
    if xp is np:
        return function(x)
    result = function(on_host(x))
    return xp.from_numpy(result).to(x.device) if hasattr(xp, "from_numpy") else xp.asarray(result)


def check_count(name: str, value: int | None) -> None:
    """`ConfigError` unless `value` is a whole number of 1 or more, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
