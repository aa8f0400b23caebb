"""Engines of every family in the real TensorRT-RTX: built, and their graphs validated in ONNX Runtime."""

from typing import Any

import pytest
import torch

import vae_export
from runtimes.errors import BackendUnavailable, ConfigError
from runtimes.tensorrt.flavours import load_flavour
from runtimes.tensorrt.profiles import parse_profile
from vae_export import export_bundle
from vae_export.targets.engines import plan_engine

try:
    load_flavour("tensorrt-rtx")
except BackendUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

pytestmark = pytest.mark.engines

KL = {"norm_num_groups": 8, "layers_per_block": 1, "block_out_channels": (16, 32, 32, 32), "latent_channels": 4}
TINY = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
WIDTHS = {"down_block_out_channels": (16, 32, 32, 32), "up_block_out_channels": (24, 32, 32, 32)}
CHOICES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FLUX.2": ("AutoencoderKLFlux2", KL, {"precision": "fp16"}),
    "FLUX.2, normalised": ("AutoencoderKLFlux2", KL, {"precision": "fp16", "latents": "normalised"}),
    "Tiny": ("AutoencoderTiny", TINY, {"precision": "fp16"}),
    "Tiny, pixels": ("AutoencoderTiny", TINY, {"precision": "fp32", "io": "uint8"}),
    "TAEF2": ("TAEF2", TINY, {"precision": "bf16"}),
    "Asymmetric": ("AsymmetricAutoencoderKL", LEVELS | WIDTHS | {"norm_num_groups": 8}, {"precision": "fp16"}),
}


def made(name, fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(vae_export, name)(**fields).eval()


@pytest.mark.parametrize("choice", CHOICES)
def test_engines_of_every_family_build(choice, tmp_path):
    name, fields, options = CHOICES[choice]
    engine = plan_engine("tensorrt-rtx", [parse_profile("1..2x64..128x64..128", 16)])
    bundle = export_bundle(made(name, fields), tmp_path / "b", target="tensorrt-rtx", engine=engine, **options)
    assert bundle.manifest.validation["verdict"] == "passed"
    for spec in bundle.manifest.graphs.values():
        assert (tmp_path / "b" / spec.file).stat().st_size > 10_000


def test_profiles_of_normalised_latents_are_multiples_of_16(tmp_path):
    engine = plan_engine("tensorrt-rtx", [parse_profile("1x72x64", 8)])
    model = made("AutoencoderKLFlux2", KL)
    with pytest.raises(ConfigError, match="16"):
        export_bundle(model, tmp_path / "b", target="tensorrt-rtx", engine=engine, latents="normalised")
