"""How a call is cut into parts: which tiles are tried, the largest first, until one fits the memory.

A tiler is made for one call. It is composed of the user's switches, the limits of the backend, the memory budget, and
the steps of seamless tiling where there are any; it knows nothing else of the backend.
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
    """What a backend runs in one call of a graph at a batch size. Sizes are in pixels of the image."""

    holds: Callable[[int, int], bool]  #: whether it takes an image of this height and width
    smallest: Callable[[int], int]  #: the least side of a tile where the largest tiles have this side


NO_LIMITS = Limits(holds=lambda height, width: True, smallest=lambda side: 1)


@dataclass(frozen=True)
class Tiler:
    """The parts of one call. Sides of tiles are in latents; a side of None is the whole."""

    settings: TilingSettings
    factor: int  #: pixels for each latent
    limits: Callable[[Graph, int], Limits] = lambda graph, batch: NO_LIMITS  #: of a graph at a batch size
    budget: Budget | None = None
    halo: Mapping[Graph, int] | None = None  #: of a network without norms and attention: latents around a tile
    seamless: SeamlessGraphs | None = None  #: the steps of a tileable bundle ...
    backend: Any = None  #: ... and what runs them

    def run(self, function: Callable[[Any], Any], x: Any, graph: Graph) -> Any:
        """`function` on `x` [B, C, H, W], by samples and by tiles as far as these are switched on and needed."""
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
        """The ways to compute the call, the one that needs the most memory first."""
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
        """The tiles with this side, or those that the settings say. `ShapeError` where the settings contradict."""
        if side is None:
            side, sample = self.settings.tile_latent_min_size, self.settings.tile_sample_min_size
            if sample != side * self.factor:
                raise ShapeError(
                    f"tile_sample_min_size {sample} is not {self.factor} times tile_latent_min_size {side}"
                )
        sides = (side * self.factor, side)
        return TileGrid.of(*(sides if graph == "encoder" else sides[::-1]), self.settings.tile_overlap_factor)

    # Which sides are tried ------------------------------------------------------------------------------------------

    def sides(self, graph: Graph, shape: Sequence[int]) -> Iterator[int | None]:
        """The sides to try for an input of this shape, as far as the limits hold them.

        What is too large for the limits is cut into the largest tiles that they hold.
        """
        limits = self.limits(graph, shape[0])
        height, width = self._pixels(graph, shape)

        def holds(side: int) -> bool:
            return limits.holds(side * self.factor, side * self.factor)

        for side in self._wanted(graph, shape):
            if limits.holds(height, width) if side is None else holds(side):
                yield side
                continue
            most = max(height, width) // self.factor
            largest = next(filter(holds, self._possible(graph, min(side or most, most))), side)
            yield largest  # as wanted where none is held: the backend says what it takes
            if largest is not None:
                yield from filter(holds, self._halves(graph, largest))
            return

    def _wanted(self, graph: Graph, shape: Sequence[int]) -> Iterator[int | None]:
        height, width = self._pixels(graph, shape)
        whole = -(-max(height, width) // self.factor)
        if self.budget is not None:
            first = self._first_within(self.budget, graph, shape, whole)
        else:
            side = self.settings.tile_latent_min_size
            self.grid(graph)  # refuses settings that contradict each other
            first = side if max(height, width) > side * self.factor else None
        yield first
        yield from self._halves(graph, whole if first is None else first)

    def _first_within(self, budget: Budget, graph: Graph, shape: Sequence[int], whole: int) -> int | None:
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
        """Half a side, half of that, ..., each the largest that lines up."""
        while (found := next(self._possible(graph, side // 2), None)) is not None:
            side = found
            yield side

    def _possible(self, graph: Graph, most: int) -> Iterator[int]:
        """Sides of tiles from the largest to the smallest. Blended ones must advance by whole latents."""
        for side in range(most, SMALLEST_TILE - 1, -1):
            if self.settings.tiling != "blended" or self.grid(graph, side).lines_up:
                yield side

    def _pixels(self, graph: Graph, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the image, for an input of this shape."""
        unit = 1 if graph == "encoder" else self.factor
        return shape[-2] * unit, shape[-1] * unit
