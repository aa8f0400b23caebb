"""Photographs become inputs of the encoder: of the size that was asked for, in [-1, 1], continued where too small."""

import numpy as np
import pytest
import torch
from PIL import Image

from runtimes.errors import ConfigError
from vae_export.photos import EMBEDDED, crops, middle_of, photographs


@pytest.fixture
def gradient(tmp_path):
    """A photograph of 6 x 4 pixels whose red says the column, and whose green the row."""
    rows, columns = np.mgrid[:4, :6].astype(np.uint8)
    Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def as_bytes(x):
    return torch.round((x + 1) * 127.5)


def test_the_embedded_photographs_are_the_default():
    assert photographs() == sorted(EMBEDDED.glob("*.jpg")) and len(photographs()) > 3


def test_a_directory_without_photographs_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none is not a directory of photographs"):
        photographs(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="holds no photographs"):
        photographs(tmp_path)


def test_the_middle_is_cut_out_and_a_small_photograph_is_mirrored(gradient):
    middle = as_bytes(middle_of(gradient, 2, 4))
    assert middle.shape == (1, 3, 2, 4)
    assert middle[0, 0, 0].tolist() == [1, 2, 3, 4] and middle[0, 1, :, 0].tolist() == [1, 2]
    assert as_bytes(middle_of(gradient, 6, 6))[0, 1, :, 0].tolist() == [0, 1, 2, 3, 3, 2]


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_crops_have_the_channels_that_the_model_takes(gradient, channels):
    found = list(crops([gradient], 4, 3, channels))
    assert [crop.shape for crop in found] == [(1, channels, 4, 4)] * 3
    assert all(crop.min() >= -1 and crop.max() <= 1 for crop in found)
