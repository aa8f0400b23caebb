"""Seamless tiling of networks whose results depend on a neighbourhood only: tiles with a halo around them.

AutoencoderTiny is such a network: it has convolutions, but neither norms nor attention. A tile is computed with as much
of its surroundings as can reach it, and what the surroundings give is dropped. The result is that of the whole image,
except for rounding: at the edges of the image, tiles end where the image does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from runtimes.arrays import array_module
from runtimes.tiling.seamless import cut
from runtimes.tiling.settings import OnTile

Array = TypeVar("Array")


def run_with_halo(
    function: Callable[[Array], Array],
    x: Array,
    *,
    side: int,
    halo: int,
    unit: int,
    unit_out: int,
    smallest: int = 1,
    on_tile: OnTile | None = None,
) -> Array:
    """Apply `function` to tiles of `x` [B, C, H, W] and join the results.

    A latent is `unit` elements of `x` and `unit_out` elements of the result, along each side. `side` is the most that a
    tile has in latents without its halo, `halo` what it reads around it, and `smallest` the least side in latents,
    halo included, that the function takes. All tiles have one size, halo included: runtimes compile for each size.
    """
    concatenate = array_module(x).concatenate
    height, width = (length // unit for length in x.shape[-2:])  # type: ignore[attr-defined]
    rows, columns = list(cut(height, side, 1)), list(cut(width, side, 1))
    most_rows, most_columns = (max(end - start for start, end in parts) for parts in (rows, columns))
    done = itertools.count(1)

    def tile_at(row: tuple[int, int], column: tuple[int, int]) -> Any:
        (top, bottom), (left, right) = (
            _with_halo(*part, halo, max(smallest, largest + 2 * halo), length)
            for part, largest, length in ((row, most_rows, height), (column, most_columns, width))
        )
        result: Any = function(x[:, :, top * unit : bottom * unit, left * unit : right * unit])  # type: ignore[index]
        if on_tile is not None:
            on_tile(next(done), len(rows) * len(columns))
        inner = [
            slice((part[0] - start) * unit_out, (part[1] - start) * unit_out)
            for part, start in ((row, top), (column, left))
        ]
        return result[:, :, inner[0], inner[1]]

    joined: Array = concatenate([concatenate([tile_at(row, column) for column in columns], 3) for row in rows], 2)
    return joined


def _with_halo(start: int, end: int, halo: int, smallest: int, length: int) -> tuple[int, int]:
    """The part of an axis that a tile reads: with its halo, at least `smallest` long, inside of the image."""
    start, end = max(0, start - halo), min(length, end + halo)
    end = min(length, max(end, start + smallest))
    return max(0, min(start, end - smallest)), end
