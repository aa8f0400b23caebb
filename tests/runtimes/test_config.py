"""How latents are scaled, for every form in which public configs say it."""

import pytest

from runtimes import VaeConfig


@pytest.mark.parametrize(
    ("fields", "multiply", "add"),
    [
        ({"scaling_factor": 0.13025}, (0.13025,) * 2, (0.0,) * 2),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.3611,) * 2, (0.1159,) * 2),
        ({"scaling_factor": 0.5, "latents_mean": (1.0, -2.0), "latents_std": (4.0, 8.0)}, (0.125, 0.0625), (1.0, -2.0)),
        ({"scaling_factor": None}, None, None),
    ],
)
def test_scaling_of_each_channel(fields, multiply, add):
    space = VaeConfig(latent_channels=2, **fields).latent_space
    assert (space.multiply, space.add) == (multiply, add)
    assert (space.channels, space.factor, space.is_known) == (2, 1, multiply is not None)
