"""The latent space: raw latents, those of a diffusion model, and what stands in a manifest."""

import numpy as np
import pytest
import torch

from runtimes import ConfigError, ShapeError
from runtimes.latent_space import LatentSpace

PATCHED = LatentSpace(2, 8, tuple(range(1, 9)), tuple(n / 10 for n in range(8)), patch=2, posterior=False)
PLAIN = LatentSpace.scaled(4, 8, 0.18215, 0.1)
RAW = np.random.default_rng(0).standard_normal((2, 2, 4, 6)).astype(np.float32)


def test_normalising_shifts_and_scales_each_channel():
    z = np.ones((1, 4, 2, 2), np.float32)
    np.testing.assert_allclose(PLAIN.normalise(z), (1 - 0.1) * 0.18215, rtol=1e-6)
    assert PLAIN.normalise(z).dtype == np.float32


def test_squares_of_latents_become_channels_in_rows_then_columns():
    normalised = PATCHED.normalise(RAW)
    assert normalised.shape == (2, 8, 2, 3)
    channel, row, column = 1, 1, 0
    at = channel * 4 + row * 2 + column
    # One rounding each for the shift and the scale.
    np.testing.assert_allclose(normalised[:, at], (RAW[:, channel, row::2, column::2] - at / 10) * (at + 1), atol=1e-5)


@pytest.mark.parametrize("space", [PLAIN, PATCHED], ids=["plain", "patched"])
def test_denormalising_is_the_inverse_for_every_kind_of_array(space):
    raw = RAW if space is PATCHED else np.concatenate([RAW, RAW], axis=1)
    for array in (raw, torch.from_numpy(raw), torch.from_numpy(raw).double()):
        back = space.denormalise(space.normalise(array))
        assert type(back) is type(array) and back.dtype == array.dtype
        np.testing.assert_allclose(np.asarray(back), raw, atol=1e-5)  # two roundings


def test_noise_has_unit_variance_for_the_diffusion_model():
    noise = PLAIN.normalise(PLAIN.raw_noise(np.random.default_rng(0), 4, 64, 64))
    assert noise.std() == pytest.approx(1, abs=0.02) and noise.mean() == pytest.approx(0, abs=0.02)


def test_unknown_factors_are_never_guessed():
    unknown = LatentSpace.scaled(4, 8, None, 0.1)
    assert not unknown.is_known and unknown.affine is None
    for use in (unknown.normalise, unknown.denormalise):
        with pytest.raises(ConfigError, match="does not say its scaling_factor"):
            use(np.zeros((1, 4, 2, 2), np.float32))
    assert unknown.raw_noise(np.random.default_rng(0), 1, 2, 2).shape == (1, 4, 2, 2)


def test_sides_that_are_no_multiples_of_the_patch_are_refused():
    with pytest.raises(ShapeError, match=r"height of 3 latents is not a multiple of 2: .* multiples of 16 pixels"):
        PATCHED.normalise(RAW[:, :, :3])


@pytest.mark.parametrize("space", [PLAIN, PATCHED, LatentSpace.scaled(4, 8, None)], ids=["plain", "patched", "unknown"])
def test_a_manifest_holds_all_of_it(space):
    assert LatentSpace.from_dict(space.to_dict()) == space


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 0},
        {"patch": True},
        {"multiply": [0.0] * 4},
        {"multiply": None},
        {"add": [1.0]},
        {"add": ["1"] * 4},
        {"encoder_gives": "images"},
        {"surplus": 1},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError):
        LatentSpace.from_dict(PLAIN.to_dict() | change)
