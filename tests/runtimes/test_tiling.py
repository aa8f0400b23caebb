"""Tiling and slicing: the results of the reference model, in bounded memory.

Tests runtimes/tiling/blended.py, runtimes/tiling/settings.py, runtimes/tiling/tiler.py.
"""

import copy

import numpy as np
import pytest
import torch

from runtimes import OutOfMemoryError, ShapeError
from runtimes.tiling.blended import TileGrid, run_tiled

# Promised of tiled results. Other kernels round otherwise by some 1e-6; a tile or a weight out of place shows at 1e-2.
TILED = 1e-4
# A batch of one may take other kernels than a batch of three: the order of sums, as above.
SLICED = 1e-5
KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def inputs(height, width, batch=1, kind=np.asarray):
    """Images [B, 3, 8*height, 8*width] and latents [B, 4, height, width]."""
    rng = np.random.default_rng(height)
    x, z = rng.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)), rng.standard_normal((batch, 4, height, width))
    return kind(x.astype(np.float32)), kind(z.astype(np.float32))


def results(vae, x, z):
    return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


def distances(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        yield float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.fixture
def parts(vae, monkeypatch):
    """The shapes of all that the backend is given, in a list."""
    shapes, run = [], vae._run

    def spy(graph, x):
        shapes.append(tuple(x.shape))
        return run(graph, x)

    monkeypatch.setattr(vae, "_run", spy)
    return shapes


# tile_latent, tile_sample, then (step, blend, kept) of decode and of encode:
# int(0.75 * in), int(0.25 * out), out - blend
@pytest.mark.parametrize(
    ("latent", "sample", "decode", "encode"),
    [
        (64, 512, (48, 128, 384), (384, 16, 48)),  # SD 1.5
        (128, 1024, (96, 256, 768), (768, 32, 96)),  # SDXL, SD3, FLUX.1
        (8, 70, (6, 17, 53), (52, 2, 6)),  # all of it truncates
        (31, 250, (23, 62, 188), (187, 7, 24)),
    ],
)
def test_the_grid_is_that_of_diffusers(latent, sample, decode, encode):
    assert TileGrid.of(latent, sample, 0.25) == TileGrid(latent, *decode)
    assert TileGrid.of(sample, latent, 0.25) == TileGrid(sample, *encode)


def test_tiles_at_the_edges_are_as_large_as_they_have_to_be():
    x, seen = np.arange(13 * 21, dtype=np.float32).reshape(1, 1, 13, 21), []

    def doubled(tile):
        seen.append(tile.shape[2:])
        return tile.repeat(2, 2).repeat(2, 3)

    tiled = run_tiled(doubled, x, TileGrid.of(8, 16, 0.25), smallest=7)
    np.testing.assert_allclose(tiled, x.repeat(2, 2).repeat(2, 3), rtol=1e-6)
    assert min(map(min, seen)) == 7 and max(map(max, seen)) == 8


@KINDS
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_tiles_cover_every_size_once(kind, overlap):
    for height, width in ((1, 1), (8, 9), (9, 23), (30, 6), (16, 17)):
        x = kind(np.arange(height * width, dtype=np.float32).reshape(1, 1, height, width))
        tiled = run_tiled(lambda tile: tile * 1.0, x, TileGrid.of(8, 8, overlap))
        # Where all tiles agree, blending them changes nothing but the last bit.
        np.testing.assert_allclose(np.asarray(tiled), np.asarray(x), rtol=1e-6)


def test_a_tile_fades_in_from_the_one_before_in_steps_of_one_in_the_overlap():
    tiles = iter((np.zeros((1, 1, 1, 8)), np.ones((1, 1, 1, 4))))
    blended = run_tiled(lambda tile: next(tiles), np.empty((1, 1, 1, 8)), TileGrid.of(8, 8, 0.5))
    assert blended.ravel().tolist() == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75]


# Over the tile's 8 latents in one direction or both, with edge tiles of 1 to 8 latents.
@pytest.mark.parametrize(("height", "width"), [(8, 9), (9, 8), (17, 5), (13, 20), (25, 7), (14, 14)])
def test_tiled_results_are_those_of_the_tiled_reference(vae, tiny_model, parts, height, width):
    x, z = inputs(height, width)
    vae.enable_tiling()
    ours, (x, z) = results(vae, x, z), inputs(height, width, kind=torch.from_numpy)
    assert len(parts) > 2 and all(max(shape[2:]) <= (64 if shape[1] == 3 else 8) for shape in parts)
    theirs = tiny_model.tiled_encode(x)[0].parameters, tiny_model.tiled_decode(z)[0]
    assert max(distances(ours, theirs)) <= TILED


def test_tile_size_and_overlap_may_be_tuned_and_tensors_are_tiled_too(vae, tiny_model, parts):
    x, z = inputs(11, 13, batch=2, kind=torch.from_numpy)
    model = copy.copy(tiny_model)  # its weights stay shared; the attributes are its own
    for each in (vae, model):
        each.tile_sample_min_size, each.tile_latent_min_size, each.tile_overlap_factor = 48, 6, 0.5
        each.enable_tiling()
    ours = results(vae, x, z)
    assert max(distances(ours, results(model, x, z))) <= TILED
    assert all(isinstance(result, torch.Tensor) for result in ours)
    assert max(max(shape[2:]) for shape in parts) == 48


def test_tiling_is_active_only_beyond_the_tile_and_disabling_restores(vae, parts):
    at_the_tile, beyond = inputs(8, 6), inputs(9, 12, batch=2)
    before = [*results(vae, *at_the_tile), *results(vae, *beyond)]
    parts.clear()
    vae.enable_tiling(), vae.enable_slicing()
    assert max(distances(results(vae, *at_the_tile), before[:2])) == 0
    assert parts == [array.shape for array in at_the_tile]
    assert min(distances(results(vae, *beyond), before[2:])) > TILED
    vae.disable_tiling(), vae.disable_slicing()
    assert max(distances(results(vae, *beyond), before[2:])) == 0


@KINDS
def test_slicing_gives_the_unsliced_result_one_sample_at_a_time(vae, parts, kind):
    x, z = inputs(5, 6, batch=3, kind=kind)
    whole = results(vae, x, z)
    vae.enable_slicing()
    parts.clear()
    sliced = results(vae, x, z)
    assert max(distances(sliced, whole)) <= SLICED
    assert parts == [(1, 3, 40, 48)] * 3 + [(1, 4, 5, 6)] * 3
    assert all(isinstance(result, type(x)) for result in sliced)


def test_tiles_are_counted(vae):
    x, z = inputs(14, 20)
    vae.enable_tiling()
    for use, array in ((vae.encode, x), (vae.decode, z)):
        seen: list[tuple[int, int]] = []
        vae.on_tile = lambda done, total, seen=seen: seen.append((done, total))
        use(array)
        assert seen == [(n, 3 * 4) for n in range(1, 13)]  # every 6 latents begins one


# Memory that runs out ---------------------------------------------------------------------------------------------


@pytest.fixture
def short_of_memory(vae, parts, monkeypatch):
    """short_of_memory(side): from now on the backend has no memory for images with a longer side."""

    def limit(side):
        run = vae._run

        def fail_or_run(graph, x):
            result = run(graph, x)
            if max(*x.shape[2:]) > (side if graph == "encoder" else side // 8):
                raise OutOfMemoryError(f"{list(x.shape)} does not fit")
            return result

        monkeypatch.setattr(vae, "_run", fail_or_run)

    return limit


def test_what_does_not_fit_is_tried_again_in_smaller_tiles(vae, tiny_model, parts, short_of_memory):
    x, z = inputs(40, 33)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 256, 32
    vae.enable_tiling()
    short_of_memory(128)
    ours = results(vae, x, z)
    assert [shape for shape in parts if shape[1] == 3][:2] == [(1, 3, 256, 256), (1, 3, 128, 128)]
    model = copy.copy(tiny_model)
    model.tile_sample_min_size, model.tile_latent_min_size = 128, 16
    x, z = inputs(40, 33, kind=torch.from_numpy)
    assert max(distances(ours, (model.tiled_encode(x)[0].parameters, model.tiled_decode(z)[0]))) <= TILED


def test_a_whole_that_does_not_fit_is_tiled_where_tiling_is_on(vae, parts, short_of_memory):
    x, _ = inputs(30, 20)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
    short_of_memory(128)
    with pytest.raises(OutOfMemoryError):  # nothing is tiled that was not asked for
        vae.encode(x)
    parts.clear()
    vae.enable_tiling()
    vae.encode(x)
    assert parts[0] == (1, 3, 240, 160) and max(max(shape[2:]) for shape in parts[1:]) <= 128


def test_where_not_even_the_smallest_tile_fits_it_is_an_error(vae, parts, short_of_memory):
    vae.tile_sample_min_size, vae.tile_latent_min_size = 256, 32
    vae.enable_tiling()
    short_of_memory(32)
    with pytest.raises(OutOfMemoryError, match=r"\[1, 3, 64, 64\]"):
        vae.encode(inputs(40, 40)[0])
    assert [shape[2] for shape in parts] == [256, 128, 64]


# sample, latent, overlap: diffusers takes them, and gives images of another size or a bare ValueError.
@pytest.mark.parametrize(
    "tuned", [(64, 8, 0.3), (72, 9, 0.25), (64, 8, 1.0), (8, 1, 0.25), (64, 4, 0.25), (60, 8, 0.25)]
)
def test_tiles_that_would_not_meet_are_refused(vae, tuned):
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = tuned
    x, z = inputs(10, 10)
    for use in (lambda: vae.encode(x), lambda: vae.decode(z)):
        with pytest.raises(ShapeError, match="tile_"):
            use()
