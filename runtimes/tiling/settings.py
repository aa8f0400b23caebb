"""The settings of tiling and slicing, with the names of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Callable

from runtimes.errors import ConfigError

OnTile = Callable[[int, int], None]  #: (tiles done, tiles in all)

TILINGS = ("blended", "seamless")
SMALLEST_TILE = 8  #: least side of a tile, in latents, that is tried when memory runs out


class TilingSettings:
    """The settings of tiling and slicing, the same for the reference model and every runtime.

    As in diffusers, tiles are set by attributes: `tile_sample_min_size` and `tile_latent_min_size` are the side of a
    tile in pixels and in latents (only larger images are tiled), and `tile_overlap_factor` is in [0, 1).

    If a tile does not fit into memory (`OutOfMemoryError`), smaller tiles are tried, down to 8 latents a side.
    `on_tile` is called after each tile with the number of finished tiles and of all tiles.
    """

    on_tile: OnTile | None
    use_slicing: bool
    use_tiling: bool
    tiling: str
    tile_sample_min_size: int
    tile_latent_min_size: int
    tile_overlap_factor: float

    def _set_up_tiling(self, sample_size: int, factor: int) -> None:
        """Set tiles of `sample_size` pixels (`sample_size / factor` latents), with tiling and slicing switched off."""
        self.on_tile = None
        self.use_slicing = self.use_tiling = False
        self.tiling = TILINGS[0]
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = int(sample_size / factor)
        self.tile_overlap_factor = 0.25

    def enable_tiling(self, tiling: str = "blended") -> None:
        """Process large images tile by tile, in bounded memory.

        "blended" is the tiling of diffusers: it computes each tile on its own, so tiles may differ visibly. "seamless"
        gives the untiled result up to rounding; it needs a bundle that was exported with --tileable. Raises
        `ConfigError` for another name or another bundle.
        """
        if tiling not in TILINGS:
            raise ConfigError(f"tiling is one of {', '.join(TILINGS)}, not {tiling!r}")
        if tiling == "seamless":
            self._check_seamless()
        self.use_tiling, self.tiling = True, tiling

    def _check_seamless(self) -> None:
        """Raise `ConfigError` if seamless tiling is not supported."""
        raise ConfigError("the reference model has no seamless tiling; export a bundle with --tileable")

    def disable_tiling(self) -> None:
        """Process each image as a whole."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Process the samples of a batch one by one, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Process a whole batch at once."""
        self.use_slicing = False
