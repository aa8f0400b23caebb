"""A family is one file and one call: two convolutions, plain latents, squares of 2x2 latents as channels.

Tests vae_export/families/base.py.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from runtimes import Bundle, ConfigError, ShapeError, open_vae
from runtimes.config import OtherConfig
from runtimes.latent_space import LatentSpace
from vae_export import export_bundle, load_model, tune_bundle, validate_bundle
from vae_export.cli.app import app
from vae_export.families import FAMILIES
from vae_export.families.base import Family, ReferenceVae
from vae_export.photos import EMBEDDED


@dataclass(frozen=True)
class ToyConfig:
    """The config of an AutoencoderToy."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 2
    width: int = 8
    sample_size: int = 32
    downscale = 4

    @property
    def latent_space(self):
        channels = range(4 * self.latent_channels)
        return LatentSpace(
            2, 4, tuple(1 + n / 8 for n in channels), tuple(n / 10 for n in channels), 2, posterior=False
        )

    @classmethod
    def from_dict(cls, data, *, origin="config"):
        return cls(**{name: value for name, value in data.items() if not name.startswith("_")})

    def to_dict(self):
        return {"_class_name": "AutoencoderToy", **asdict(self)}

    def to_json(self):
        return json.dumps(self.to_dict())


class AutoencoderToy(ReferenceVae):
    """[B, 3, H, W] -> latents [B, 2, H/4, W/4], and back."""

    family = "AutoencoderToy"
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.down = nn.Conv2d(config.in_channels, config.width, 4, stride=4)
        self.into = nn.Conv2d(config.width, config.latent_channels, 1)
        self.up = nn.ConvTranspose2d(config.latent_channels, config.out_channels, 4, stride=4)

    def encode_moments(self, x):
        return self.into(torch.relu(self.down(x)))

    def decode_latents(self, z):
        return torch.tanh(self.up(z))


@pytest.fixture(autouse=True)
def toy():
    FAMILIES.register("AutoencoderToy", Family(network=AutoencoderToy))
    yield
    FAMILIES.unregister("AutoencoderToy")


@pytest.fixture
def checkpoint(tmp_path):
    """A directory as diffusers would write it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderToy(ToyConfig()).save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.mark.parametrize(
    ("target", "precision"), [("onnx", "fp32"), ("onnx", "fp16"), ("openvino", "fp32"), ("openvino", "bf16")]
)
def test_every_target_takes_it(checkpoint, tmp_path, target, precision):
    model = load_model(checkpoint)
    assert isinstance(model, AutoencoderToy)
    path = tmp_path / "bundle"
    manifest = export_bundle(model, path, target=target, precision=precision).manifest
    assert manifest.family == "AutoencoderToy" and manifest.latent_space == ToyConfig().latent_space
    assert manifest.validation["verdict"] == "passed"
    assert all(m.passed for m in validate_bundle(path))  # loaded from where the manifest says


def test_the_api_has_its_latent_space(checkpoint, tmp_path):
    export_bundle(load_model(checkpoint), tmp_path / "b")
    images = np.random.default_rng(0).integers(0, 256, (1, 24, 16, 3), np.uint8)
    with open_vae(tmp_path / "b") as vae:
        assert vae.encode(np.zeros((1, 3, 24, 16), np.float32)).latents.shape == (1, 2, 6, 4)
        latents = vae.images_to_latents(images)
        assert latents.shape == (1, 8, 3, 2)  # squares of 2x2 are channels
        assert vae.latents_to_images(latents).shape == (1, 24, 16, 3)
        with pytest.raises(ShapeError, match=r"height 20 is not a multiple of 8; pad to 24"):
            vae.images_to_latents(images[:, :20])
        vae.enable_tiling()
        assert vae.decode(np.zeros((1, 2, 40, 40), np.float32))[0].shape == (1, 3, 160, 160)
        with pytest.raises(ConfigError, match="none for AutoencoderToy"):
            vae.memory_budget = "1GiB"


def test_what_does_not_apply_is_refused(checkpoint, tmp_path):
    model = load_model(checkpoint)
    with pytest.raises(ConfigError, match=r"flax bundles are of AutoencoderKL.* not of AutoencoderToy"):
        export_bundle(model, tmp_path / "b", target="flax")
    with pytest.raises(ConfigError, match="AutoencoderToy cannot be cut into steps"):
        export_bundle(model, tmp_path / "b", tileable=True)


def test_tune_knows_it(checkpoint, tmp_path):
    tuned = tune_bundle(load_model(checkpoint), tmp_path / "b", height=16, width=16, rounds=1)
    assert tuned.bundle.manifest.family == "AutoencoderToy"


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_knows_it(checkpoint, tmp_path):
    bundle, latents, folder = tmp_path / "b", tmp_path / "latents", tmp_path / "photos"
    invoke("--to", "onnx", "--model", checkpoint, "--out", bundle)
    assert "AutoencoderToy: 2 latent channels" in " ".join(invoke("inspect", bundle).split())
    assert "AutoencoderToy" in json.loads(invoke("doctor", "--json"))["families"]
    folder.mkdir()
    Path(folder / "rocket.jpg").write_bytes((EMBEDDED / "rocket.jpg").read_bytes())
    options = ["--bundle", bundle, "--out", latents, "--workers", 1, "--policy", "center-crop", "--size", "64x64"]
    invoke("encode-dataset", folder, *options)
    contract = json.loads((latents / "contract.json").read_text())
    assert (contract["vae"]["latent_channels"], contract["vae"]["downscale"]) == (8, 8)
    config = Bundle(bundle).manifest.config
    assert isinstance(config, OtherConfig) and config.width == 8
