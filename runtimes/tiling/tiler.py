"""Choose the tiles of a call: try the largest first, then smaller ones until one fits into memory.

A tiler is made for one call, from the user's settings, the backend's limits, the memory budget, and the steps of
seamless tiling if the bundle has them. It depends on nothing else of the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from runtimes.arrays import array_module
from runtimes.errors import OutOfMemoryError, ShapeError
from runtimes.names import Graph
from runtimes.tiling.blended import TileGrid, run_tiled
from runtimes.tiling.budget import Budget
from runtimes.tiling.halo import run_with_halo
from runtimes.tiling.seamless import SeamlessGraphs
from runtimes.tiling.settings import SMALLEST_TILE, TilingSettings


class Limits(NamedTuple):
    """The sizes that a backend accepts in one call of a graph at a given batch size, in pixels of the image."""

    holds: Callable[[int, int], bool]  #: (height, width) -> whether the backend accepts an image of this size
    smallest: Callable[[int], int]  #: side of the largest tiles -> the least side that other tiles may have


NO_LIMITS = Limits(holds=lambda height, width: True, smallest=lambda side: 1)


@dataclass(frozen=True)
class Tiler:
    """Runs one call whole or in tiles. Sides of tiles are in latents; a side of None means the whole image."""

    settings: TilingSettings
    factor: int  #: pixels per latent, along one axis
    limits: Callable[[Graph, int], Limits] = lambda graph, batch: NO_LIMITS  #: (graph, batch size) -> limits
    budget: Budget | None = None
    halo: Mapping[Graph, int] | None = None  #: of a network without norms and attention: latents around a tile
    seamless: SeamlessGraphs | None = None  #: the steps of a tileable bundle ...
    backend: Any = None  #: ... and what runs them

    def run(self, function: Callable[[Any], Any], x: Any, graph: Graph) -> Any:
        """Apply `function` to `x` [B, C, H, W], by samples and by tiles if these are switched on and needed.

        Raises `OutOfMemoryError` if even the smallest tiles do not fit into memory.
        """
        if self.settings.use_slicing and x.shape[0] > 1:
            parts = [self.run(function, x[i : i + 1], graph) for i in range(x.shape[0])]
            return array_module(x).concatenate(parts)
        failed: OutOfMemoryError | None = None
        for attempt in self.attempts(function, x, graph):
            try:
                return attempt()
            except OutOfMemoryError as error:
                failed = error
        assert failed is not None
        raise failed

    def attempts(self, function: Callable[[Any], Any], x: Any, graph: Graph) -> Iterator[Callable[[], Any]]:
        """Yield functions that compute the call, in the order of decreasing memory."""
        if not self.settings.use_tiling and self.budget is None:
            yield partial(function, x)
            return
        for side in self.sides(graph, x.shape):
            yield partial(function, x) if side is None else partial(self._tiled, function, x, graph, side)

    def _tiled(self, function: Callable[[Any], Any], x: Any, graph: Graph, side: int) -> Any:
        smallest = self.limits(graph, x.shape[0]).smallest(side * self.factor)
        if self.settings.tiling == "seamless" and self.halo is not None:
            units = (self.factor, 1) if graph == "encoder" else (1, self.factor)
            return run_with_halo(
                function,
                x,
                side=max(side - 2 * self.halo[graph], SMALLEST_TILE),
                halo=self.halo[graph],
                unit=units[0],
                unit_out=units[1],
                smallest=-(-smallest // self.factor),
                on_tile=self.settings.on_tile,
            )
        if self.settings.tiling == "seamless":
            assert self.seamless is not None
            return self.seamless.run(self.backend, graph, x, side, self.settings.on_tile)
        smallest = smallest if graph == "encoder" else -(-smallest // self.factor)
        return run_tiled(function, x, self.grid(graph, side), smallest=smallest, on_tile=self.settings.on_tile)

    def grid(self, graph: Graph, side: int | None = None) -> TileGrid:
        """Return the grid for tiles of this side, by default that of the settings.

        Raises `ShapeError` if the settings for pixels and latents contradict each other.
        """
        if side is None:
            side, sample = self.settings.tile_latent_min_size, self.settings.tile_sample_min_size
            if sample != side * self.factor:
                raise ShapeError(
                    f"tile_sample_min_size {sample} is not {self.factor} times tile_latent_min_size {side}"
                )
        sides = (side * self.factor, side)
        return TileGrid.of(*(sides if graph == "encoder" else sides[::-1]), self.settings.tile_overlap_factor)

    # The sides to try -----------------------------------------------------------------------------------------------

    def sides(self, graph: Graph, shape: Sequence[int]) -> Iterator[int | None]:
        """Yield the sides to try for an input of this shape, in decreasing order and within the backend's limits.

        If the first side exceeds the limits, the largest side within them replaces it.
        """
        limits = self.limits(graph, shape[0])
        height, width = self._pixels(graph, shape)

        def holds(side: int) -> bool:
            return limits.holds(side * self.factor, side * self.factor)

        for side in self._wanted(graph, shape):
            if limits.holds(height, width) if side is None else holds(side):
                yield side
                continue
            whole = max(height, width) // self.factor
            largest = next(filter(holds, self._possible(graph, min(side or whole, whole))), side)
            yield largest  # if no side is within the limits, the backend raises an error that lists its sizes
            if largest is not None:
                yield from filter(holds, self._halves(graph, largest))
            return

    def _wanted(self, graph: Graph, shape: Sequence[int]) -> Iterator[int | None]:
        """Yield the sides that settings and budget ask for, then smaller ones, without regard to the limits."""
        height, width = self._pixels(graph, shape)
        whole = -(-max(height, width) // self.factor)
        if self.budget is not None:
            first = self._first_within(self.budget, graph, shape, whole)
        else:
            side = self.settings.tile_latent_min_size
            self.grid(graph)  # raises if the settings contradict each other
            first = side if max(height, width) > side * self.factor else None
        yield first
        yield from self._halves(graph, whole if first is None else first)

    def _first_within(self, budget: Budget, graph: Graph, shape: Sequence[int], whole: int) -> int | None:
        """Return the largest side whose tiles fit the budget; None if the whole image does."""
        height, width = self._pixels(graph, shape)
        needed = budget.call_bytes(graph, shape[0], height, width)
        if needed <= budget.bytes:
            return None
        for side in self._possible(graph, whole - 1):
            if self.settings.tiling == "seamless":
                assert self.seamless is not None
                needed = self.seamless.bytes_needed(budget, graph, shape, side)
            else:
                needed = budget.call_bytes(graph, shape[0], side * self.factor, side * self.factor)
            if needed <= budget.bytes:
                return side
        raise OutOfMemoryError(
            f"memory_budget of {budget.bytes} bytes: the {graph} on {width}x{height} pixels needs about {needed} even "
            f"in the smallest {self.settings.tiling} tiles"
        )

    def _halves(self, graph: Graph, side: int) -> Iterator[int]:
        """Halve a side repeatedly: yield each time the largest possible side of at most half the previous one."""
        while (smaller := next(self._possible(graph, side // 2), None)) is not None:
            side = smaller
            yield side

    def _possible(self, graph: Graph, largest: int) -> Iterator[int]:
        """Yield the sides of tiles from `largest` down to SMALLEST_TILE. Blended tiles must line up (`TileGrid`)."""
        for side in range(largest, SMALLEST_TILE - 1, -1):
            if self.settings.tiling != "blended" or self.grid(graph, side).lines_up:
                yield side

    def _pixels(self, graph: Graph, shape: Sequence[int]) -> tuple[int, int]:
        """Return height and width of the image in pixels, for a graph's input of this shape."""
        unit = 1 if graph == "encoder" else self.factor
        return shape[-2] * unit, shape[-1] * unit
