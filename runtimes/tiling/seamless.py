"""Seamless tiling: process an image of any size in bounded memory; the result equals the untiled one up to rounding.

Only two operations of the network depend on the whole image: the attention, and the statistics of the norms. A tileable
bundle therefore also contains each graph cut into steps at the norms. The step with the attention, at the size of the
latents, runs on the whole image. All convolutions after it (in the encoder, before it) run on tiles that overlap by one
pixel, as far as a convolution reads. Each norm uses the statistics of the whole image, merged from the tiles of the
previous step. The activations between two steps are kept in host memory in fp16; the weights are rescaled so that they
fit its range (`vae_export.rewrites.rescale`).
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from runtimes.arrays import Array, answer_in_kind
from runtimes.config import level_widths, norm_groups
from runtimes.errors import NumericsError
from runtimes.manifest import Manifest, Step
from runtimes.names import FP16_LARGEST, GRAPHS, Graph
from runtimes.pixels import to_levels, to_samples
from runtimes.tiling.budget import Budget
from runtimes.tiling.settings import OnTile

RunStep = Callable[[Step, Mapping[str, Array]], Sequence[Array]]  #: inputs by name -> outputs


class Reach(NamedTuple):
    """The input pixels that output pixel i needs along an axis: step*i/out - before to step*(i+1)/out + after."""

    before: int
    after: int
    step: int = 1  #: step/out is the ratio of input pixels to output pixels
    out: int = 1


#: kind of a tiled step -> its reach
REACH = {
    "in": Reach(1, 1),
    "conv1": Reach(1, 1),
    "conv2": Reach(1, 1),
    "up": Reach(1, 1, out=2),
    "down": Reach(0, 1, step=2),  # it pads with zeros on the right and bottom only
    "out": Reach(1, 1),
}
NORMED = ("conv1", "conv2", "out")


class _Map(NamedTuple):
    """An activation between two steps: its values [C, H, W] in fp16, and mean and variance of each channel [2, C]."""

    values: Array
    moments: Array


class Tile(NamedTuple):
    """The rows and columns of a step's output that one call computes."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def pixels(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


class StepBackend(Protocol):
    """A backend that runs the steps of tileable bundles."""

    def open_steps(self, steps: Sequence[Step]) -> None:
        """Load the steps of one graph; called once per graph, before its first step runs."""

    def run_step(self, step: Step, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Run one step on arrays in host memory, given by input name; returns its outputs in order."""


class SeamlessGraphs:
    """Runs both graphs of a tileable bundle step by step."""

    def __init__(self, manifest: Manifest) -> None:
        assert manifest.tileable is not None
        self._steps, self._spec = manifest.tileable, manifest.graphs
        self._space = manifest.latent_space
        self._patch = self._space.patch if manifest.latents == "normalised" else 1  #: raw latents a latent of a graph
        self._normalised = manifest.latents == "normalised"
        self._factor = self._space.factor
        self._groups = norm_groups(manifest.config)
        self._widths = {graph: level_widths(manifest.config, graph) for graph in GRAPHS}
        self._opened: set[str] = set()
        self._opening = threading.Lock()

    def run(self, backend: StepBackend, graph: Graph, x: Any, side: int, on_tile: OnTile | None = None) -> Any:
        """Run a graph on `x` [B, C, H, W], an array of any kind, in tiles with this side in latents.

        A uint8 input is taken as pixels. If the graph's output is uint8, returns floats in 0..255.
        """
        return answer_in_kind(lambda array: self._run(backend, graph, array, side * self._patch, on_tile), x)

    def _run(self, backend: StepBackend, graph: Graph, x: Array, side: int, on_tile: OnTile | None) -> Array:
        steps = self._steps[graph]
        with self._opening:
            if graph not in self._opened:
                backend.open_steps(steps)
                self._opened.add(graph)
        if x.dtype == np.uint8:
            x = to_samples(x.astype(np.float32))
        if self._normalised and graph == "decoder":  # the steps are those of raw latents
            x = self._space.denormalise(x.astype(np.float32, copy=False))
        parts = [
            run_seamless(
                steps,
                backend.run_step,
                x[i : i + 1].astype(np.float32, copy=False),
                factor=self._factor,
                groups=self._groups,
                tile_values=(side * self._factor) ** 2 * self._widths[graph][0],
                on_tile=on_tile,
            )
            for i in range(len(x))
        ]
        result = np.concatenate(parts)
        if self._normalised and graph == "encoder":
            result = self._space.normalise(result[:, : self._space.channels])
        if self._spec[graph].output.dtype == "uint8":
            return np.asarray(to_levels(result))
        return result.astype(self._spec[graph].output.dtype, copy=False)

    def bytes_needed(self, budget: Budget, graph: Graph, shape: Sequence[int], side: int) -> int:
        """Return the peak working memory of a call in bytes: the maps between steps plus the largest call of a step."""
        height, width = (length if graph == "encoder" else length * self._patch for length in shape[-2:])
        pixels_per_unit = 1 if graph == "encoder" else self._factor
        positions = (height * pixels_per_unit // self._factor) * (width * pixels_per_unit // self._factor)
        rate, widths = budget.rate, self._widths[graph]
        whole = positions * widths[-1] * rate.step + rate.whole_score * positions**2
        tile = (side * self._patch * self._factor) ** 2 * widths[0] * rate.step
        return int(max(whole, tile)) + largest_maps(self._steps[graph], height, width, self._factor)


def run_seamless(
    steps: Sequence[Step],
    run: RunStep,
    x: Array,
    *,
    factor: int,
    groups: int,
    tile_values: int,
    on_tile: OnTile | None = None,
) -> Array:
    """Run the steps of the encoder or decoder on `x`, float32 [1, C, H, W]; the result equals that of the whole graph.

    `factor` is the model's spatial ratio, `groups` its number of norm groups. A tile's feature map has at most about
    `tile_values` values.

    Raises `NumericsError` if a value between two steps exceeds fp16.
    """
    plan = _plan(steps, _sizes(steps, x.shape[2], x.shape[3], factor), tile_values)
    total, done = sum(len(tiles) for tiles in plan), itertools.count(1)

    def report() -> None:
        if on_tile is not None:
            on_tile(next(done), total)

    # `stream` is the residual stream; `inner` is the output of conv1, which the next conv2 reads.
    stream, inner = _Map(x[0], np.empty(0)), None
    for step, tiles in zip(steps, plan, strict=True):
        if step.kind == "whole":
            name = "stream" if step is steps[-1] else "latent_sample"
            result = run(step, {name: stream.values[None]})[0]
            stream = _Map(result[0], _moments(result[0]))
            report()
            continue
        source = inner if step.kind == "conv2" else stream
        assert source is not None
        target = _target(step, tiles, stream)
        moments = _run_tiles(step, tiles, run, source, stream, target, groups, report)
        if step.kind == "out":
            return target[None]
        if not np.isfinite(moments).all():
            raise NumericsError(
                f"activations after {step.file} exceed {FP16_LARGEST:.0f}, the largest value that is kept between "
                'tiles, or are not finite; enable_tiling("blended") keeps none'
            )
        output = _Map(target, _merged(moments, tiles))
        if step.kind == "conv1":
            inner = output
        else:
            stream, inner = output, None
    return stream.values[None]


def _target(step: Step, tiles: Sequence[Tile], stream: _Map) -> Array:
    """Return the array [C, H, W] for a tiled step's output: for conv2 the stream itself, if it has enough channels."""
    if step.kind == "conv2" and step.channels <= len(stream.values):
        # Safe: each tile reads of the stream exactly the region that it writes.
        return stream.values[: step.channels]
    shape = (step.channels, tiles[-1].bottom, tiles[-1].right)
    return np.empty(shape, np.float32 if step.kind == "out" else np.float16)


def _run_tiles(
    step: Step,
    tiles: Sequence[Tile],
    run: RunStep,
    source: _Map,
    stream: _Map,
    target: Array,
    groups: int,
    report: Callable[[], None],
) -> list[Array]:
    """Run a step on each tile of `source`, write the results into `target`, and return each tile's moments [2, C].

    conv2 also reads its tile of `stream`, for the skip connection.
    """
    inputs: dict[str, Array] = {}
    if step.kind in NORMED:
        inputs["statistics"] = _of_groups(source.moments, groups)
    moments: list[Array] = []
    for tile in tiles:
        inputs["x"], inside = _read(source.values, tile, REACH[step.kind])
        if step.kind in NORMED:
            inputs["inside"] = inside
        if step.kind == "conv2":
            skip = stream.values[None, :, tile.top : tile.bottom, tile.left : tile.right]
            inputs["skip"] = np.ascontiguousarray(skip)
        result, *tile_moments = run(step, inputs)
        target[:, tile.top : tile.bottom, tile.left : tile.right] = result[0]
        moments += tile_moments
        report()
    return moments


def largest_maps(steps: Sequence[Step], height: int, width: int, factor: int) -> int:
    """Return the peak bytes of host memory for the maps between steps; height and width are those of the input."""
    peak, stream, channels = 0, 0, 0
    for step, (rows, columns) in zip(steps, _sizes(steps, height, width, factor), strict=True):
        size = step.channels * rows * columns * (4 if step.kind == "out" else 2)
        in_place = step.kind == "conv2" and step.channels <= channels
        peak = max(peak, stream + (0 if in_place else size) + (size if step.kind == "conv2" else 0))
        if step.kind != "conv1":
            stream, channels = size, step.channels
    return peak


# Tiles ------------------------------------------------------------------------------------------------------------


def _sizes(steps: Sequence[Step], height: int, width: int, factor: int) -> Iterator[tuple[int, int]]:
    """Yield height and width of each step's output, for a graph's input of this size."""
    for step in steps:
        if step.kind == "whole":
            # In the decoder it includes the levels with attention, and so all upsampling that no other step does.
            grown = factor // 2 ** sum(other.kind == "up" for other in steps) if step is not steps[-1] else 1
            height, width = height * grown, width * grown
        else:
            reach = REACH[step.kind]
            height, width = height * reach.out // reach.step, width * reach.out // reach.step
        yield height, width


def _plan(steps: Sequence[Step], sizes: Iterable[tuple[int, int]], tile_values: int) -> list[list[Tile]]:
    """Return the tiles of each step: one tile for a step that runs on the whole image."""
    plan, channels = [], 1
    for step, (height, width) in zip(steps, sizes, strict=True):
        if step.kind == "whole":
            plan.append([Tile(0, height, 0, width)])
        else:
            side = max(8, math.isqrt(tile_values // max(channels, step.channels)))
            rows, columns = (list(cut(length, side, REACH[step.kind].out)) for length in (height, width))
            plan.append([Tile(*row, *column) for row in rows for column in columns])
        channels = step.channels
    return plan


def cut(length: int, longest: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut a length into the fewest parts of at most `longest`, in multiples of `unit`; yield start and end of each.

    The parts have at most two sizes, because backends compile the graphs for each size.
    """
    length, longest = length // unit, max(longest // unit, 1)
    count = -(-length // longest)
    yield from itertools.pairwise(length * n // count * unit for n in range(count + 1))


def _read(values: Array, tile: Tile, reach: Reach) -> tuple[Array, Array]:
    """Return a tile's input [1, C, h, w], zero outside of the image, and a mask [1, 1, h, w], 1 inside of the image."""
    (top, bottom), (left, right) = (
        (start * reach.step // reach.out - reach.before, end * reach.step // reach.out + reach.after)
        for start, end in (tile[:2], tile[2:])
    )
    height, width = values.shape[1:]
    inner = (slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width)))
    at = (slice(inner[0].start - top, inner[0].stop - top), slice(inner[1].start - left, inner[1].stop - left))
    region = np.zeros((1, len(values), bottom - top, right - left), values.dtype)
    region[0, :, at[0], at[1]] = values[:, inner[0], inner[1]]
    inside = np.zeros((1, 1, bottom - top, right - left), np.float32)
    inside[0, 0, at[0], at[1]] = 1
    return region, inside


# Statistics -------------------------------------------------------------------------------------------------------


def _moments(values: Array) -> Array:
    """Return mean and variance of each channel of [C, H, W]: float64 [2, C]."""
    flat = (channel.astype(np.float64) for channel in values)
    return np.array([(channel.mean(), channel.var()) for channel in flat]).T


def _merged(moments: Sequence[Array], tiles: Sequence[Tile]) -> Array:
    """Merge mean and variance [2, C] of each tile into those of all tiles: float64 [2, C].

    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    means, variances = np.stack(moments, axis=1).astype(np.float64)  # each [tiles, C]
    share = np.array([tile.pixels for tile in tiles], np.float64)[:, None]
    share /= share.sum()
    mean = (share * means).sum(0)
    return np.stack([mean, (share * (variances + (means - mean) ** 2)).sum(0)])


def _of_groups(moments: Array, groups: int) -> Array:
    """Convert mean and variance of each channel [2, C] to those of each norm group: float32 [2, groups]."""
    means, variances = moments.reshape(2, groups, -1)
    mean = means.mean(1, keepdims=True)
    variance = (variances + (means - mean) ** 2).mean(1)
    return np.stack([mean[:, 0], variance]).astype(np.float32)
