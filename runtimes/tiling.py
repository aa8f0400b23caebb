"""Tiling: a large image as overlapping tiles, blended where they overlap.

The arithmetic is that of diffusers' AutoencoderKL, so that a tiled result here equals a tiled result there. It needs
nothing of an array but slicing and arithmetic, and therefore serves NumPy arrays and torch tensors alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from runtimes.config import VaeConfig
from runtimes.errors import ShapeError
from runtimes.posterior import array_module

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


class TilingAndSlicing:
    """The switches of diffusers' AutoencoderKL, for the reference model and every runtime alike.

    Tiling may be tuned by plain attributes, as in diffusers: `tile_sample_min_size` and `tile_latent_min_size` (the
    side of a tile in pixels and in latents; tiling is active only beyond it) and `tile_overlap_factor`.
    """

    config: VaeConfig

    def _set_up_tiling(self) -> None:
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = self.config.sample_size
        self.tile_latent_min_size = int(self.config.sample_size / self.config.downscale)
        self.tile_overlap_factor = 0.25

    def enable_tiling(self) -> None:
        """Work on large images tile by tile: bounded memory, small differences where tiles meet."""
        self.use_tiling = True

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
        return TileGrid.of(*((sample, latent) if graph == "encoder" else (latent, sample)), self.tile_overlap_factor)

    def _in_parts(self, function: Callable[[Any], Any], x: Any, graph: str) -> Any:
        """`function` on `x` [B, C, H, W], by samples and by tiles as far as these are switched on and needed."""
        if self.use_slicing and x.shape[0] > 1:
            parts = [self._in_parts(function, x[i : i + 1], graph) for i in range(x.shape[0])]
            return array_module(x).concatenate(parts)
        largest = self.tile_sample_min_size if graph == "encoder" else self.tile_latent_min_size
        if self.use_tiling and max(x.shape[-2:]) > largest:
            return run_tiled(function, x, self._tile_grid(graph))
        return function(x)


def run_tiled(
    function: Callable[[Array], Array],
    x: Array,
    grid: TileGrid,
) -> Array:
    """Apply `function` to the tiles of `x` [B, C, H, W] and blend the results into one array.

    A tile is blended with the one above first, then with the one to its left, in place: the neighbours used are the
    blended ones. Tiles at the right and bottom edge are cut off, not shifted. Only two rows of tiles are held.

    `function` must return an array of its own, which is written to. Raises `ShapeError` where tiles would not meet.
    """
    # Step and blend were truncated: where they were not whole, the pieces do not meet, and the result has another size.
    if grid.step < 1 or grid.kept < 1 or grid.kept * grid.tile != grid.step * (grid.kept + grid.blend):
        raise ShapeError(
            f"tiles of {grid.tile} cannot advance by {grid.step} and give {grid.kept} of {grid.kept + grid.blend}; "
            "tile_overlap_factor must be below 1, and that part of tile_latent_min_size a whole number"
        )
    concatenate = array_module(x).concatenate
    height, width = x.shape[-2:]  # type: ignore[attr-defined]
    above: list[Any] = []
    finished_rows: list[Any] = []
    for top in range(0, height, grid.step):
        row: list[Any] = []
        for column, left in enumerate(range(0, width, grid.step)):
            tile: Any = function(x[:, :, top : top + grid.tile, left : left + grid.tile])  # type: ignore[index]
            if above:
                _blend(above[column], tile, grid.blend, axis=2)
            if row:
                _blend(row[-1], tile, grid.blend, axis=3)
            row.append(tile)
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
