"""The switches of tiling and slicing, with the names that diffusers' AutoencoderKL has for them."""

from __future__ import annotations

from collections.abc import Callable

from runtimes.errors import ConfigError

OnTile = Callable[[int, int], None]  #: (tiles done, tiles in all)

TILINGS = ("blended", "seamless")
SMALLEST_TILE = 8  #: side in latents, below which no tile is made smaller where memory runs out


class TilingSettings:
    """The switches, for the reference model and every runtime alike.

    Tiling may be tuned by plain attributes, as in diffusers: `tile_sample_min_size` and `tile_latent_min_size` (the
    side of a tile in pixels and in latents; tiling is active only beyond it) and `tile_overlap_factor`.

    Where a tile does not fit the memory (`OutOfMemoryError`), smaller ones are tried, down to 8 latents a side.
    `on_tile` is called after each tile with the number of tiles that are done and of all.
    """

    on_tile: OnTile | None
    use_slicing: bool
    use_tiling: bool
    tiling: str
    tile_sample_min_size: int
    tile_latent_min_size: int
    tile_overlap_factor: float

    def _set_up_tiling(self, sample_size: int, factor: int) -> None:
        """Tiles of `sample_size` pixels, which are `sample_size / factor` latents; everything is switched off."""
        self.on_tile = None
        self.use_slicing = self.use_tiling = False
        self.tiling = TILINGS[0]
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = int(sample_size / factor)
        self.tile_overlap_factor = 0.25

    def enable_tiling(self, tiling: str = "blended") -> None:
        """Work on large images tile by tile, in bounded memory.

        "blended" is the tiling of diffusers: each tile for itself, with visible differences between them. "seamless"
        gives the untiled result but for rounding, and needs a bundle that was exported with --tileable (`ConfigError`).
        """
        if tiling not in TILINGS:
            raise ConfigError(f"tiling is one of {', '.join(TILINGS)}, not {tiling!r}")
        if tiling == "seamless":
            self._check_seamless()
        self.use_tiling, self.tiling = True, tiling

    def _check_seamless(self) -> None:
        """Raise `ConfigError` where seamless tiling cannot be had."""
        raise ConfigError("the reference model is not cut for seamless tiling: a bundle exported with --tileable is")

    def disable_tiling(self) -> None:
        """Work on each image as a whole."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Work on the samples of a batch one by one, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Work on a whole batch at once."""
        self.use_slicing = False
