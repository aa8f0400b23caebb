"""Tiling and slicing: the results of the reference model, in bounded memory."""

import copy

import numpy as np
import pytest
import torch

from runtimes import ShapeError
from runtimes.tiling import TileGrid, run_tiled

# Promised of tiled results. Other kernels round otherwise by some 1e-6; a tile or a weight out of place shows at 1e-2.
TILED = 1e-4
# A batch of one may take other kernels than a batch of three: the order of sums, as above.
SLICED = 1e-5
# [height, width] in latents: over the tile's 8 in one direction or both, with edge tiles of 1 to 8 latents.
SIZES = [(8, 9), (9, 8), (17, 5), (13, 20), (25, 7), (14, 14)]


def images(height, width, batch=1):
    return np.random.default_rng(height).uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)


def latents(height, width, batch=1):
    return np.random.default_rng(height).standard_normal((batch, 4, height, width)).astype(np.float32)


@pytest.fixture
def parts(vae, monkeypatch):
    """The shapes of all that the backend is given, in a list."""
    shapes, run = [], vae._run

    def spy(graph, x):
        shapes.append(tuple(x.shape))
        return run(graph, x)

    monkeypatch.setattr(vae, "_run", spy)
    return shapes


def moments(vae, x):
    return vae.encode(x).latent_dist.parameters


def distance(a, b):
    assert a.shape == b.shape
    return np.abs(np.asarray(a) - np.asarray(b)).max()


# Arithmetic ---------------------------------------------------------------------------------------------------------


# tile_latent, tile_sample -> (step, blend, kept) of decode and of encode: int(0.75 * in), int(0.25 * out), out - blend
@pytest.mark.parametrize(
    ("latent", "sample", "decode", "encode"),
    [
        (64, 512, (48, 128, 384), (384, 16, 48)),  # SD 1.5
        (128, 1024, (96, 256, 768), (768, 32, 96)),  # SDXL, SD3, FLUX.1
        (8, 64, (6, 16, 48), (48, 2, 6)),
        (8, 70, (6, 17, 53), (52, 2, 6)),  # all of it truncates
        (31, 250, (23, 62, 188), (187, 7, 24)),
    ],
)
def test_the_grid_is_that_of_diffusers(latent, sample, decode, encode):
    assert TileGrid.of(latent, sample, 0.25) == TileGrid(latent, *decode)
    assert TileGrid.of(sample, latent, 0.25) == TileGrid(sample, *encode)


@pytest.mark.parametrize("module", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_tiles_cover_every_size_once(module, overlap):
    grid = TileGrid.of(8, 8, overlap)
    for height, width in ((1, 1), (8, 9), (9, 23), (30, 6), (16, 17)):
        x = module.arange(height * width).reshape(1, 1, height, width) / 1.0
        tiled = run_tiled(lambda tile: tile * 1.0, x, grid)
        # Where all tiles agree, blending them changes nothing but the last bit.
        np.testing.assert_allclose(np.asarray(tiled), np.asarray(x), rtol=1e-6)


# The runtime --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiled_results_are_those_of_the_tiled_reference(vae, tiny_model, parts, height, width):
    x, z = images(height, width), latents(height, width)
    vae.enable_tiling()
    ours = moments(vae, x), vae.decode(z).sample
    assert len(parts) > 2 and all(max(shape[2:]) <= (64 if shape[1] == 3 else 8) for shape in parts)
    theirs = tiny_model.tiled_encode(torch.from_numpy(x))[0].parameters, tiny_model.tiled_decode(torch.from_numpy(z))[0]
    assert distance(ours[0], theirs[0]) <= TILED and distance(ours[1], theirs[1]) <= TILED


def test_tile_size_and_overlap_may_be_tuned(vae, tiny_model, parts):
    x, z = images(11, 13), latents(11, 13)
    model = copy.copy(tiny_model)  # its weights stay shared; the attributes are its own
    for each in (vae, model):
        each.tile_sample_min_size, each.tile_latent_min_size, each.tile_overlap_factor = 48, 6, 0.5
        each.enable_tiling()
    assert distance(moments(vae, x), model.encode(torch.from_numpy(x))[0].parameters) <= TILED
    assert distance(vae.decode(z).sample, model.decode(torch.from_numpy(z))[0]) <= TILED
    assert max(max(shape[2:]) for shape in parts) == 48


def test_tensors_and_batches_are_tiled_too(vae, tiny_model):
    x = torch.from_numpy(images(9, 12, batch=3))
    vae.enable_tiling()
    ours = moments(vae, x)
    assert isinstance(ours, torch.Tensor)
    assert distance(ours, tiny_model.tiled_encode(x)[0].parameters) <= TILED


def test_tiling_is_active_only_beyond_the_tile(vae, parts):
    x, z = images(8, 6), latents(6, 8)
    whole = moments(vae, x), vae.decode(z).sample
    vae.enable_tiling()
    assert np.array_equal(moments(vae, x), whole[0]) and np.array_equal(vae.decode(z).sample, whole[1])
    assert parts == [x.shape, z.shape] * 2


def test_disabling_restores_the_whole_result(vae):
    x, z = images(9, 12, batch=2), latents(9, 12, batch=2)
    before = moments(vae, x), vae.decode(z).sample
    vae.enable_tiling(), vae.enable_slicing()
    assert distance(moments(vae, x), before[0]) > TILED and distance(vae.decode(z).sample, before[1]) > TILED
    vae.disable_tiling(), vae.disable_slicing()
    assert np.array_equal(moments(vae, x), before[0]) and np.array_equal(vae.decode(z).sample, before[1])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_slicing_gives_the_unsliced_result_one_sample_at_a_time(vae, parts, kind):
    x, z = kind(images(5, 6, batch=3)), kind(latents(5, 6, batch=3))
    whole = moments(vae, x), vae.decode(z).sample
    vae.enable_slicing()
    parts.clear()
    sliced = moments(vae, x), vae.decode(z).sample
    assert distance(sliced[0], whole[0]) <= SLICED and distance(sliced[1], whole[1]) <= SLICED
    assert parts == [(1, 3, 40, 48)] * 3 + [(1, 4, 5, 6)] * 3
    assert isinstance(sliced[1], type(x))


# sample, latent, overlap: diffusers takes them, and gives pictures of another size or does not come to an end
@pytest.mark.parametrize(
    "tuned", [(64, 8, 0.3), (72, 9, 0.25), (64, 8, 1.0), (8, 1, 0.25), (64, 4, 0.25), (60, 8, 0.25)]
)
def test_tiles_that_would_not_meet_are_refused(vae, tuned):
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = tuned
    for use in (lambda: vae.decode(latents(10, 10)), lambda: vae.encode(images(10, 10))):
        with pytest.raises(ShapeError, match="tile_"):
            use()
