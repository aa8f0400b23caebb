"""Tiling: a large image as overlapping tiles, blended where they overlap.

The arithmetic is that of diffusers' AutoencoderKL, so that a tiled result here equals a tiled result there. It needs
nothing of an array but slicing and arithmetic, and therefore serves NumPy arrays and torch tensors alike.
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
    def lines_up(self) -> bool:
        """Whether step and blend were whole numbers before they were truncated.

        Where they were not, the pieces that are kept leave gaps or overlap, and the result has another size.
        """
        return self.step >= 1 and self.kept >= 1 and self.kept * self.tile == self.step * (self.kept + self.blend)

    def count(self, height: int, width: int) -> int:
        """How many tiles an input of this size has."""
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

    A tile is blended with the one above first, then with the one to its left, in place: the neighbours used are the
    blended ones. Tiles at the right and bottom edge are cut off, not shifted. Only two rows of tiles are held.

    Where a function takes nothing below a size, `smallest` is the side that tiles have at least: those at the edges
    begin earlier then, and what they give for the added part is dropped.

    `function` must return an array of its own, which is written to. Raises `ShapeError` where tiles would not meet.
    """
    if not grid.lines_up:
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
