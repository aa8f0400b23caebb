"""Blended tiling: process a large image as overlapping tiles, and blend their results where they overlap.

The arithmetic is that of diffusers' AutoencoderKL, so both give the same tiled result. It uses only slicing and
arithmetic, and so works on NumPy arrays and torch tensors alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from runtimes.arrays import array_module
from runtimes.errors import ShapeError
from runtimes.tiling.settings import OnTile

Array = TypeVar("Array")


@dataclass(frozen=True)
class TileGrid:
    """The sizes of the tiles for one graph. Lengths count positions of the graph's input or output, on one axis."""

    tile: int  #: side of a tile, in the input
    step: int  #: distance between the starts of two tiles, in the input
    blend: int  #: width of the blended border, in the output
    kept: int  #: side of the part of each tile that goes into the result, in the output

    @classmethod
    def of(cls, tile_in: int, tile_out: int, overlap_factor: float) -> TileGrid:
        """Make a grid from a tile's sides in input and output; truncates as diffusers: `int(side * (1 - overlap))`."""
        blend = int(tile_out * overlap_factor)
        return cls(tile=tile_in, step=int(tile_in * (1 - overlap_factor)), blend=blend, kept=tile_out - blend)

    @property
    def lines_up(self) -> bool:
        """Whether step and blend were whole numbers before truncation.

        If not, the kept parts leave gaps or overlap, and the result has the wrong size.
        """
        return self.step >= 1 and self.kept >= 1 and self.kept * self.tile == self.step * (self.kept + self.blend)

    def count(self, height: int, width: int) -> int:
        """Return the number of tiles for an input of this size."""
        return -(-height // self.step) * -(-width // self.step)


def run_tiled(
    function: Callable[[Array], Array],
    x: Array,
    grid: TileGrid,
    *,
    smallest: int = 1,
    on_tile: OnTile | None = None,
) -> Array:
    """Apply `function` to the tiles of `x` [B, C, H, W] and blend the results into one array.

    Each tile is blended in place, first with the tile above, then with the tile to its left, which are blended already.
    Tiles at the right and bottom edges are smaller, not shifted. At most two rows of tiles are in memory.

    `smallest` is the least side of an input that `function` takes. Edge tiles below it start earlier, and the results
    for the added part are dropped.

    `function` must return a new array, since the blending writes to it. Raises `ShapeError` if `grid` does not line up.
    """
    if not grid.lines_up:
        raise ShapeError(
            f"tiles of {grid.tile} cannot advance by {grid.step} and give {grid.kept} of {grid.kept + grid.blend}; "
            "tile_overlap_factor must be below 1, and its product with tile_latent_min_size a whole number"
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
    """Blend the first `extent` lines of `after`, in place, linearly with the last lines of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    start = before.shape[axis] - extent
    for t in range(extent):
        at = (slice(None),) * axis
        weight = t / extent
        after[(*at, t)] = before[(*at, start + t)] * (1 - weight) + after[(*at, t)] * weight
