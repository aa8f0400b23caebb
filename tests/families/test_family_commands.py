"""Every family through the commands: export, inspect, validate, encode, decode, roundtrip, doctor, triton."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vae_export
from runtimes import Bundle
from vae_export.cli.app import app
from vae_export.cli.printing import latents_of

KL = {"norm_num_groups": 8, "layers_per_block": 1, "block_out_channels": (16, 32, 32, 32), "latent_channels": 4}
TINY = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "AutoencoderKLFlux2": (KL, "4 latent channels, 1/8 of the image's size; normalised 16 channels, 1/16"),
    "AutoencoderTiny": (TINY, "4 latent channels, 1/8 of the image's size, scaling 1.0, shift 0.0"),
    "TAEF2": (TINY, "32 latent channels, 1/8 of the image's size; normalised 128 channels, 1/16"),
    "AsymmetricAutoencoderKL": (
        LEVELS
        | {
            "norm_num_groups": 8,
            "down_block_out_channels": (16, 32, 32, 32),
            "up_block_out_channels": (24, 32, 32, 32),
        },
        "4 latent channels, 1/8 of the image's size, scaling 0.18215, shift None",
    ),
}


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (56, 72, 3), np.uint8)  # no multiple of 16 on either side
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "latents"),
    [*((name, "raw") for name in FAMILIES), ("TAEF2", "normalised")],
)
def test_every_command_takes_every_family(name, latents, photo, tmp_path):
    fields, described = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(vae_export, name)(**fields).eval().save_pretrained(tmp_path / "model")
    bundle = tmp_path / "b"
    options = ["--no-validate", "--latents", latents]
    invoke("--to", "onnx", "--model", tmp_path / "model", "--out", bundle, *options)
    assert latents_of(Bundle(bundle).manifest) == described
    told = invoke("inspect", bundle)
    assert name in told and ("latents of the graphs" in told) == (latents == "normalised")
    for way in ("--crop", "--pad"):
        assert "PSNR" in invoke("roundtrip", bundle, photo, way, "--out", tmp_path / "r.png")
    invoke("encode", bundle, photo, "--pad", "--out", tmp_path / "z.safetensors")
    invoke("decode", bundle, tmp_path / "z.safetensors", "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size in ((72, 56), (80, 64))  # padded to multiples of 8, or of 16
    if name == "AutoencoderKLFlux2":
        invoke("validate", bundle)
    if latents == "raw":
        invoke("triton", bundle, "--out", tmp_path / "repository")
        assert Path(tmp_path / "repository" / "vae_decoder" / "config.pbtxt").exists()


def test_doctor_names_the_families():
    assert set(FAMILIES) < set(json.loads(invoke("doctor", "--json"))["families"])
