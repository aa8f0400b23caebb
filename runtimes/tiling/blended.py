"""Tiling: a large image as overlapping tiles, blended where they overlap.

The arithmetic is that of diffusers' AutoencoderKL, so that a tiled result here equals a tiled result there. It needs
nothing of an array but slicing and arithmetic, and therefore serves NumPy arrays and torch tensors alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from runtimes.config import VaeConfig
from runtimes.errors import ConfigError, OutOfMemoryError, ShapeError
from runtimes.posterior import array_module

Array = TypeVar("Array")
OnTile = Callable[[int, int], None]  #: (tiles done, tiles in all)

TILINGS = ("blended", "seamless")
SMALLEST_TILE = 8  #: side in latents, below which no tile is made smaller where memory runs out


@dataclass(frozen=True)
class TileGrid:
    """How one direction (encode or decode) is tiled. Lengths are in pixels of the input or of the output."""

    tile: int  #: side of a tile, input pixels
    step: int  #: distance between the starts of two tiles, input pixels
    blend: int  #: width of the blended border, output pixels
    kept: int  #: side of what is kept of each tile, output pixels

    @classmethod
    def of(cls, tile_in: int, tile_out: int, overlap_factor: float) -> TileGrid:
        """From the tile's side on either end; truncates exactly as diffusers does, `int(side * (1 - overlap))`."""
        blend = int(tile_out * overlap_factor)
        return cls(tile=tile_in, step=int(tile_in * (1 - overlap_factor)), blend=blend, kept=tile_out - blend)

    @property
    def meets(self) -> bool:
        """Step and blend were truncated: where they were not whole, the pieces do not meet, and the size is another."""
        return self.step >= 1 and self.kept >= 1 and self.kept * self.tile == self.step * (self.kept + self.blend)

    def count(self, height: int, width: int) -> int:
        """How many tiles an input of this size has."""
        return -(-height // self.step) * -(-width // self.step)


class TilingAndSlicing:
    """The switches of diffusers' AutoencoderKL, for the reference model and every runtime alike.

    Tiling may be tuned by plain attributes, as in diffusers: `tile_sample_min_size` and `tile_latent_min_size` (the
    side of a tile in pixels and in latents; tiling is active only beyond it) and `tile_overlap_factor`.

    Where a tile does not fit the memory (`OutOfMemoryError`), smaller ones are tried, down to 8 latents a side.
    `on_tile` is called behind each tile with the number of those that are done and of all.
    """

    config: VaeConfig
    on_tile: OnTile | None

    def _set_up_tiling(self) -> None:
        self.on_tile = None
        self.use_slicing = False
        self.use_tiling = False
        self.tiling = TILINGS[0]
        self.tile_sample_min_size = self.config.sample_size
        self.tile_latent_min_size = int(self.config.sample_size / self.config.downscale)
        self.tile_overlap_factor = 0.25

    def enable_tiling(self, tiling: str = "blended") -> None:
        """Work on large images tile by tile, in bounded memory.

        "blended" is the tiling of diffusers: each tile for itself, with visible differences between them. "seamless"
        gives the untiled result but for rounding, and needs a bundle that was exported with --tileable (`ConfigError`).
        """
        if tiling not in TILINGS:
            raise ConfigError(f"tiling is one of {', '.join(TILINGS)}, not {tiling!r}")
        if tiling == "seamless":
            self._prepare_seamless()
        self.use_tiling, self.tiling = True, tiling

    def _prepare_seamless(self) -> None:
        raise ConfigError("the reference model is not cut for seamless tiling: a bundle exported with --tileable is")

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Work on the samples of a batch one by one, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def _tile_grid(self, graph: str) -> TileGrid:
        sample, latent = self.tile_sample_min_size, self.tile_latent_min_size
        if sample != latent * self.config.downscale:
            raise ShapeError(
                f"tile_sample_min_size {sample} is not {self.config.downscale} times tile_latent_min_size {latent}"
            )
        return self._grid(graph, latent)

    def _grid(self, graph: str, side: int) -> TileGrid:
        """Of tiles with this side in latents."""
        sides = (side * self.config.downscale, side)
        return TileGrid.of(*(sides if graph == "encoder" else sides[::-1]), self.tile_overlap_factor)

    def _in_parts(self, function: Callable[[Any], Any], x: Any, graph: str) -> Any:
        """`function` on `x` [B, C, H, W], by samples and by tiles as far as these are switched on and needed."""
        if self.use_slicing and x.shape[0] > 1:
            parts = [self._in_parts(function, x[i : i + 1], graph) for i in range(x.shape[0])]
            return array_module(x).concatenate(parts)
        if not self._may_tile():
            return function(x)
        failed: OutOfMemoryError | None = None
        for side in self._tile_sides(graph, x.shape):
            try:
                return function(x) if side is None else self._tiled(function, x, graph, side)
            except OutOfMemoryError as error:
                failed = error
        assert failed is not None
        raise failed

    def _may_tile(self) -> bool:
        return self.use_tiling

    def _tile_sides(self, graph: str, shape: Sequence[int]) -> Iterator[int | None]:
        """What to try, the largest first: sides of tiles in latents; None is the whole."""
        unit = self.config.downscale if graph == "encoder" else 1  # pixels or latents
        side = self._tile_grid(graph).tile // unit
        if max(shape[-2:]) > side * unit:
            yield side
        else:
            yield None
            side = -(-max(shape[-2:]) // unit)
        yield from self._halves(graph, side)

    def _halves(self, graph: str, side: int) -> Iterator[int]:
        """Half a side, half of that, ..., each the largest that lines up."""
        while (found := next(self._possible_sides(graph, side // 2), None)) is not None:
            side = found
            yield side

    def _possible_sides(self, graph: str, most: int) -> Iterator[int]:
        """Sides of tiles in latents, from the largest to the smallest."""
        for side in range(most, SMALLEST_TILE - 1, -1):
            if self.tiling != "blended" or self._grid(graph, side).meets:
                yield side

    def _tiled(self, function: Callable[[Any], Any], x: Any, graph: str, side: int) -> Any:
        smallest = self._smallest_tile(graph, side)
        return run_tiled(function, x, self._grid(graph, side), smallest=smallest, on_tile=self.on_tile)

    def _smallest_tile(self, graph: str, side: int) -> int:
        """The side that tiles have at least, in pixels or latents, where the largest have `side` (latents)."""
        return 1


def run_tiled(
    function: Callable[[Array], Array],
    x: Array,
    grid: TileGrid,
    *,
    smallest: int = 1,
    on_tile: OnTile | None = None,
) -> Array:
    """Apply `function` to the tiles of `x` [B, C, H, W] and blend the results into one array.

    A tile is blended with the one above first, then with the one to its left, in place: the neighbours used are the
    blended ones. Tiles at the right and bottom edge are cut off, not shifted. Only two rows of tiles are held.

    Where a function takes nothing below a size, `smallest` is the side that tiles have at least: those at the edges
    begin earlier then, and what they give for the added part is dropped.

    `function` must return an array of its own, which is written to. Raises `ShapeError` where tiles would not meet.
    """
    if not grid.meets:
        raise ShapeError(
            f"tiles of {grid.tile} cannot advance by {grid.step} and give {grid.kept} of {grid.kept + grid.blend}; "
            "tile_overlap_factor must be below 1, and that part of tile_latent_min_size a whole number"
        )
    concatenate = array_module(x).concatenate
    height, width = x.shape[-2:]  # type: ignore[attr-defined]
    done = itertools.count(1)

    def tile_at(top: int, left: int) -> Any:
        first = [max(0, min(at, side - smallest)) for at, side in ((top, height), (left, width))]
        part = x[:, :, first[0] : top + grid.tile, first[1] : left + grid.tile]  # type: ignore[index]
        added = [
            (at - start) * (grid.kept + grid.blend) // grid.tile for at, start in zip((top, left), first, strict=True)
        ]
        return function(part)[:, :, added[0] :, added[1] :]  # type: ignore[index]

    above: list[Any] = []
    finished_rows: list[Any] = []
    for top in range(0, height, grid.step):
        row: list[Any] = []
        for column, left in enumerate(range(0, width, grid.step)):
            tile: Any = tile_at(top, left)
            if above:
                _blend(above[column], tile, grid.blend, axis=2)
            if row:
                _blend(row[-1], tile, grid.blend, axis=3)
            row.append(tile)
            if on_tile is not None:
                on_tile(next(done), grid.count(height, width))
        finished_rows.append(concatenate([tile[:, :, : grid.kept, : grid.kept] for tile in row], 3))
        above = row
    result: Array = concatenate(finished_rows, 2)
    return result


def _blend(before: Any, after: Any, extent: int, axis: int) -> None:
    """Fade the first `extent` lines of `after`, in place, from the last lines of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    start = before.shape[axis] - extent
    for t in range(extent):
        at = (slice(None),) * axis
        weight = t / extent
        after[(*at, t)] = before[(*at, start + t)] * (1 - weight) + after[(*at, t)] * weight
