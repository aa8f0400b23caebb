"""Memory that TensorRT needs for the shape at hand, and the profiles of a plan, which bound the shapes.

Tests runtimes/tensorrt/execution.py.
"""

import numpy as np
import pytest
import torch

from runtimes import (
    ConfigError,
    OutOfMemoryError,
    ShapeError,
    open_vae,
)
from tests.helpers.inputs import TOLERANCE, images, latents, results

pytestmark = pytest.mark.usefixtures("fake_gpu")

NARROW, WIDE = "1x8..64x8..64@1x64x64", "1..4x64..512x64..512@1x512x512"


def test_memory_is_that_of_the_shape_at_hand_and_given_back(tiny_bundle, fake_gpu):
    with open_vae(tiny_bundle) as vae:
        assert fake_gpu.used == 0, "the engines are loaded, and nothing was asked of them"
        for use, make in ((vae.decode, latents), (vae.encode, images)):
            before = fake_gpu.used
            use(make(1, 32, 32))
            large = fake_gpu.used - before
            use(make(1, 2, 2))
            assert 0 < fake_gpu.used - before <= large / 64  # the shape has a 256th of the elements
    assert fake_gpu.used == 0


def test_what_fits_alone_fits_after_others_too(tiny_bundle, fake_gpu):
    """Old memory goes before the new is asked for."""
    with open_vae(tiny_bundle) as vae:
        vae.decode(latents(1, 32, 32))
        alone = fake_gpu.used
    fake_gpu.total = alone
    with open_vae(tiny_bundle) as vae:
        for side in (4, 8, 16, 32, 4, 32):
            vae.decode(latents(1, side, side))


def test_too_little_memory_is_named_and_survived(vae, fake_gpu):
    z = latents(1, 8, 8)
    expected = vae.decode(z).sample
    fake_gpu.total = 2 * fake_gpu.used
    with pytest.raises(
        OutOfMemoryError,
        match=r"the decoder of \[1, 4, 128, 128\] needs 4 MiB on cuda:0, which has \d+ of \d+ MiB free; enable_tiling",
    ):
        vae.decode(latents(1, 128, 128))
    assert np.array_equal(vae.decode(z).sample, expected)
    vae.enable_tiling()
    assert vae.decode(latents(1, 32, 32)).sample.shape == (1, 3, 256, 256)


def test_what_lies_idle_makes_room_for_what_is_asked_for(tiny_bundle, fake_gpu):
    """Memory of the other graph, and of calls that ran beside one another, is kept for what may come again."""
    with open_vae(tiny_bundle) as vae:
        vae.encode(images(1, 32, 32))
        encoding = fake_gpu.used
    with open_vae(tiny_bundle) as vae:
        vae.decode(latents(1, 32, 32))
        decoding = fake_gpu.used
    fake_gpu.total = max(encoding, decoding)
    with open_vae(tiny_bundle) as vae:
        for _ in range(2):
            vae.encode(images(1, 32, 32)), vae.decode(latents(1, 32, 32))
        assert fake_gpu.used <= fake_gpu.total
    assert fake_gpu.used == 0


def test_where_tensorrt_runs_out_of_memory_that_is_what_it_is(vae, monkeypatch):
    vae.decode(latents())
    engine = vae._engines["encoder"]
    severity = engine.flavour.trt.ILogger.Severity.ERROR

    def refuse(how):
        engine.flavour.logger.log(severity, "[device.cpp::alloc::1] Error Code 1: Cuda Runtime (out of memory)")

    monkeypatch.setattr(engine.engine, "create_execution_context", refuse)
    with pytest.raises(OutOfMemoryError, match=r"create_execution_context failed in the encoder of .*out of memory"):
        vae.encode(images())


# Profiles ---------------------------------------------------------------------------------------------------------


def test_the_nearest_profile_runs_in_a_context_of_its_own(tensorrt_bundle, tiny_model, fake_gpu):
    with open_vae(tensorrt_bundle("tensorrt", NARROW, WIDE)) as vae:
        for shape, contexts in (
            ((1, 2, 2), [0]),
            ((1, 8, 8), [0]),  # both hold it, and it is what the first does best
            ((2, 8, 8), [0, 1]),
            ((1, 9, 8), [0, 1]),
            ((1, 8, 8), [0, 1]),  # what is there is used again
        ):
            z = latents(*shape)
            expected = tiny_model.decode_latents(torch.from_numpy(z)).numpy()
            np.testing.assert_allclose(vae.decode(z).sample, expected, rtol=0, atol=TOLERANCE)
            assert fake_gpu.contexts == contexts


@pytest.mark.parametrize(("use", "given"), [("encode", images(5, 8, 8)), ("decode", latents(5, 8, 8))])
def test_a_shape_outside_of_all_profiles_is_answered_with_their_list(tensorrt_bundle, use, given):
    with open_vae(tensorrt_bundle("tensorrt", NARROW, WIDE)) as vae:
        with pytest.raises(ShapeError) as error:
            getattr(vae, use)(given)
        said = str(error.value)
        assert said.startswith("5 x 64 x 64 (batch, height, width in pixels) is outside")
        assert "; ".join(map(str, vae.profiles)) in said and "enable_tiling(), enable_slicing()" in said


def test_tiling_and_slicing_bring_shapes_inside(tensorrt_bundle, tiny_bundle):
    x, z = images(3, 20, 11), latents(3, 20, 11)
    with open_vae(tensorrt_bundle("tensorrt", NARROW)) as vae, open_vae(tiny_bundle) as wide:
        for runtime in (vae, wide):
            runtime.enable_tiling(), runtime.enable_slicing()
        assert all(map(np.array_equal, results(vae, x, z), results(wide, x, z)))
        vae.disable_slicing()
        with pytest.raises(ShapeError, match="3 x 64 x 64"):
            vae.decode(z)


@pytest.mark.parametrize("tile", [8, 64])  # latents: as large as the profile takes, and far larger
def test_tiles_are_cut_as_profiles_take_them(tensorrt_bundle, tile):
    """Nothing is below 48 pixels nor above 64, at the edges neither."""
    x, z = images(1, 20, 11), latents(1, 20, 11)
    with open_vae(tensorrt_bundle("tensorrt", "1x48..64x48..64")) as vae:
        vae.tile_sample_min_size, vae.tile_latent_min_size = 8 * tile, tile
        vae.enable_tiling()
        parameters, sample = results(vae, x, z)
    assert parameters.shape == (1, 8, 20, 11) and sample.shape == (1, 3, 160, 88)


def test_profiles_of_plans_are_not_chosen_any_more(tiny_bundle):
    with pytest.raises(ConfigError, match="are built: their profiles cannot be chosen"):
        open_vae(tiny_bundle, profiles=[NARROW])
