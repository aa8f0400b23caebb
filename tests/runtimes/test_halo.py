"""Tiles with a halo (runtimes/tiling/halo.py), on a network of three averages."""

import numpy as np
import pytest

from runtimes.tiling.halo import run_with_halo

REACH = 3  #: pixels on each side that three averages over 3x3 pixels read


def averaged(x):
    """Three averages over 3x3 pixels, zeros outside of the image."""
    for _ in range(REACH):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        h, w = x.shape[2:]
        x = sum(padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9
    return x


def doubled(x):
    """The averages, and each pixel four times."""
    return averaged(x).repeat(2, axis=2).repeat(2, axis=3)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 40), (40, 5), (33, 47), (64, 64)])
@pytest.mark.parametrize("side", [1, 8, 13, 100])
def test_tiles_join_to_the_whole(height, width, side):
    x = RNG.standard_normal((2, 3, height, width))
    sizes = set()

    def function(part):
        sizes.add(part.shape[2:])
        return doubled(part)

    result = run_with_halo(function, x, side=side, halo=REACH, unit=1, unit_out=2)
    np.testing.assert_allclose(result, doubled(x), rtol=0, atol=1e-14)
    assert len(sizes) == 1  # runtimes compile for each size


def test_latents_of_more_than_a_pixel_are_not_cut():
    x = RNG.standard_normal((1, 1, 48, 80))
    result = run_with_halo(
        lambda part: averaged(part)[:, :, ::4, ::4], x, side=5, halo=1, unit=4, unit_out=1, smallest=6
    )
    np.testing.assert_allclose(result, averaged(x)[:, :, ::4, ::4], rtol=0, atol=1e-14)


def test_a_halo_that_is_too_small_shows():
    x = RNG.standard_normal((1, 1, 32, 32))
    result = run_with_halo(averaged, x, side=8, halo=REACH - 1, unit=1, unit_out=1)
    assert np.abs(result - averaged(x)).max() > 1e-3


def test_tiles_are_as_large_as_a_backend_needs_and_each_is_told():
    x, told = RNG.standard_normal((1, 1, 40, 24)), []

    def function(part):
        assert min(part.shape[2:]) >= 20
        return averaged(part)

    run_with_halo(
        function, x, side=8, halo=REACH, unit=1, unit_out=1, smallest=20, on_tile=lambda *counts: told.append(counts)
    )
    assert told == [(n, 15) for n in range(1, 16)]
