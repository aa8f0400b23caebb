"""Estimates of the memory of activations, family by family."""

from typing import Any

import pytest

from runtimes import VaeConfig
from vae_export.families import FAMILIES
from vae_export.families.autoencoder_kl import activation_places
from vae_export.rewrites.form import Form

ATTENTION: dict[str, Any] = {
    "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
PLAIN: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_attention_at_the_size_of_the_image_counts(graph):
    """Its scores are the square of the pixels: 64 x 64 of them, and as many again for their softmax."""
    fields: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 8}
    most = {
        name: max(activation_places(VaeConfig(**fields, **types), graph, 1, 64, 64, Form()))
        for name, types in {"plain": PLAIN, "attention": ATTENTION}.items()
    }
    assert most["attention"] == 5 * 16 * 64**2 + 2 * 64**4
    assert most["plain"] < most["attention"] / 10
    blocks = max(activation_places(VaeConfig(**fields, **ATTENTION), graph, 1, 64, 64, Form(attention_blocks=64)))
    assert blocks == 5 * 16 * 64**2 + 2 * 64**4 // 64


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_estimates_grow_with_the_image_and_the_batch(name, graph):
    family = FAMILIES[name]
    config = family.config_class()
    small, large, many = (
        max(family.activation_places(config, graph, batch, side, side, Form())) for batch, side in
        ((1, 64), (1, 128), (3, 64))
    )  # fmt: skip
    assert large >= 3.9 * small and many == 3 * small
