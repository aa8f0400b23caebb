"""Sizes that are no multiples of the VAE's factor: padded by reflection, and cropped back.

Tests runtimes/layout.py.
"""

import numpy as np
import pytest
import torch

from runtimes import ShapeError, open_vae
from runtimes.layout import padded


@pytest.fixture(scope="module")
def vae(tiny_bundle):
    with open_vae(tiny_bundle) as runtime:
        yield runtime


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 8), (17, 31), (40, 48)])
def test_padding_is_the_mirror_image(vae, kind, size):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, *size)).astype(np.float32)
    by_hand = np.pad(x, ((0, 0), (0, 0), *((0, -side % 8) for side in size)), mode="reflect")
    ours = vae.encode(kind(x), pad=True)[0].parameters
    assert isinstance(ours, type(kind(x)))
    assert np.array_equal(np.asarray(ours), vae.encode(by_hand)[0].parameters)
    z = ours[:, :4]
    back = vae.decode(z, size=size)[0]
    assert tuple(back.shape) == x.shape
    assert np.array_equal(np.asarray(back), np.asarray(vae.decode(z)[0])[:, :, : size[0], : size[1]])


def test_without_being_asked_for_it_is_an_error_that_tells(vae):
    with pytest.raises(ShapeError, match=r"height 17 is not a multiple of 8; pad to 24 \(pad=True\)"):
        vae.encode(np.zeros((1, 3, 17, 32), np.float32))


def test_images_of_any_size_come_back_in_theirs(vae):
    image = np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)
    latents = vae.images_to_latents(image, pad=True)
    assert latents.shape == (1, 4, 6, 8)
    assert vae.latents_to_images(latents, size=(45, 61)).shape == (1, 45, 61, 3)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-1, 8), (49, 8), (8, 65)])
def test_what_is_no_part_of_the_image_cannot_be_kept(vae, size):
    with pytest.raises(ShapeError, match="is not a part of the image, 64x48"):
        vae.decode(np.zeros((1, 4, 6, 8), np.float32), size=size)


def test_what_is_already_a_multiple_is_left_alone():
    x = np.zeros((1, 3, 8, 16))
    assert padded(x, (2, 3), 8) is x
