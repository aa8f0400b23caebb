"""Loading checkpoints: whatever was published comes out as the model it is, or as an error that says what is wrong.

Tests vae_export/checkpoints/architecture.py, vae_export/checkpoints/keys.py.
"""

import json
import pickle
import shlex
import struct
import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVae
from diffusers import AutoencoderTiny, VQModel
from safetensors.torch import save_file

import vae_export.checkpoints.architecture
import vae_export.checkpoints.load
from runtimes.errors import BundleError, ConfigError, NumericsError
from tests.helpers.checkpoint_samples import (
    GROUPS,
    LAYOUTS,
    TOLERANCE,
    VARIANTS,
    WEIGHTS,
    assert_same_weights,
    factors,
    levels,
    save_exploit,
    source_model,
    to_ldm,
    weights_of,
)
from vae_export import AutoencoderKL, VaeConfig
from vae_export.checkpoints.architecture import PublicVae
from vae_export.checkpoints.load import load_model

# Directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_directory_that_diffusers_saved_gives_the_same_model(variant, tmp_path):
    theirs = source_model(variant)
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    assert_same_weights(ours, theirs.state_dict())
    assert factors(ours) == (0.5, 0.25)
    assert (ours.source.kind, ours.source.given, ours.source.commit) == ("directory", str(tmp_path), None)
    assert not ours.training and ours.dtype == torch.float32
    x = torch.rand(1, ours.config.in_channels, 32, 32) * 2 - 1
    assert (ours(x).sample - theirs(x).sample).abs().max() <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_reads_what_we_save(variant, tmp_path):
    source_model(variant).save_pretrained(tmp_path / "theirs")
    ours = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    ours.fuse_qkv_projections()
    ours.save_pretrained(tmp_path / "ours")
    theirs = DiffusersVae.from_pretrained(tmp_path / "ours")
    assert_same_weights(theirs, source_model(variant).state_dict())
    assert {name: theirs.config[name] for name in VARIANTS[variant]} == VARIANTS[variant]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", WEIGHTS]


def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(tmp_path):
    source_model("tiny").save_pretrained(tmp_path)
    model = AutoencoderKL.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_weights(model, weights_of("tiny"))
    assert_same_weights(AutoencoderKL.from_pretrained(tmp_path), weights_of("tiny"))


def test_saving_where_a_file_is_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="could not save the model"):
        AutoencoderKL.from_config(VARIANTS["tiny"]).save_pretrained(tmp_path / "file")


def test_the_vae_of_a_pipeline_is_in_its_subfolder(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    source_model("tiny").save_pretrained(tmp_path / "vae")
    assert_same_weights(AutoencoderKL.from_pretrained(str(tmp_path), subfolder="vae"), weights_of("tiny"))
    with pytest.raises(ConfigError, match="subfolder='vae'"):
        AutoencoderKL.from_pretrained(tmp_path)


def test_half_precision_variant_files_are_found(tmp_path):
    source_model("tiny").save_pretrained(tmp_path, variant="fp16")
    assert_same_weights(AutoencoderKL.from_pretrained(tmp_path), weights_of("tiny"))


def without_weights(directory):
    (directory / WEIGHTS).unlink()


def without_config(directory):
    (directory / "config.json").unlink()


def broken_config(directory):
    (directory / "config.json").write_text('{"latent_channels": 4,')


def unet_config(directory):
    (directory / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": [16, 32]}')


def fewer_latents(directory):
    changed = json.loads((directory / "config.json").read_text()) | {"latent_channels": 8}
    (directory / "config.json").write_text(json.dumps(changed))


def only_pickle(directory):
    torch.save(weights_of("tiny"), directory / "diffusion_pytorch_model.bin")
    without_weights(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, f"has no {WEIGHTS}"),
        (without_config, "has no config.json"),
        (broken_config, "not a readable JSON file"),
        (unet_config, "UNet2DConditionModel"),
        (fewer_latents, r"encoder.conv_out.weight \[8, 32, 3, 3\], not \[16, 32, 3, 3\]"),
        (only_pickle, "diffusion_pytorch_model.bin is a pickle.*To convert.*python -c"),
    ],
)
def test_a_directory_with_something_wrong_is_refused(damage, message, tmp_path):
    source_model("tiny").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./no/such/directory", "neither a directory or file here nor a Hub id"),
        ("just-a-name", "neither a directory or file here nor a Hub id"),
        ("vae.safetensors", "load it with from_single_file"),
        ("https://huggingface.co/a/b/blob/main/vae.safetensors", "load it with from_single_file"),
    ],
)
def test_a_source_that_is_no_directory_or_hub_id_is_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKL.from_pretrained(source)


# Single files: names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["sd", "attention-everywhere"])
def test_every_layout_of_a_single_file_gives_the_same_weights(variant, layout, tmp_path):
    save_file(LAYOUTS[layout](weights_of(variant)), tmp_path / "vae.safetensors")
    model = AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)
    assert_same_weights(model, weights_of(variant))
    assert (model.source.kind, model.source.repo) == ("file", None)


@pytest.mark.parametrize("layout", ["diffusers-legacy-attention", "diffusers-legacy-attention-as-convolutions", "ldm"])
def test_a_directory_may_have_the_old_names_too(layout, tmp_path):
    source_model("sd").save_pretrained(tmp_path)
    save_file(LAYOUTS[layout](weights_of("sd")), tmp_path / WEIGHTS)
    assert_same_weights(AutoencoderKL.from_pretrained(tmp_path), weights_of("sd"))


def test_the_names_in_these_tests_are_those_of_the_original_code():
    """Samples of the keys of the published vae-ft-mse-840000-ema-pruned.safetensors, for 4 levels of 2 layers."""
    names = to_ldm(weights_of("sd"))
    assert len(names) == 248
    assert names.keys() >= {
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.proj_out.weight",
        "encoder.mid.block_2.norm1.bias",
        "encoder.norm_out.weight",
        "decoder.up.0.block.2.conv1.weight",
        "decoder.up.1.block.0.nin_shortcut.weight",
        "decoder.up.3.upsample.conv.bias",
        "decoder.mid.attn_1.norm.weight",
        "quant_conv.weight",
    }
    assert "decoder.up.0.upsample.conv.weight" not in names
    assert names["decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


def test_two_formats_in_one_file_are_refused(tmp_path):
    save_file(to_ldm(weights_of("tiny")) | weights_of("tiny"), tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match="two formats in one file"):
        AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)


# Single files: config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_architecture_is_read_off_the_shapes(variant, layout, tmp_path):
    save_file(LAYOUTS[layout](weights_of(variant)), tmp_path / "vae.safetensors")
    model = AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)
    assert_same_weights(model, weights_of(variant))
    expected = VaeConfig.from_dict(VARIANTS[variant] | {"scaling_factor": None, "shift_factor": None})
    assert model.config == VaeConfig.from_dict(expected.to_dict() | {"sample_size": 512})


def test_norm_groups_that_cannot_be_known_are_asked_for(tiny_file):
    with pytest.raises(ConfigError, match=r"norm_num_groups.*config=\{'norm_num_groups'"):
        AutoencoderKL.from_single_file(tiny_file)


def test_a_whole_config_may_be_given_in_any_form(tiny_file, tmp_path):
    whole = VaeConfig.from_dict(VARIANTS["tiny"])
    source_model("tiny").save_config(tmp_path / "directory")
    path = tmp_path / "directory" / "config.json"
    for config in (whole, whole.to_dict(), VARIANTS["tiny"], path, str(path), path.parent):
        model = AutoencoderKL.from_single_file(tiny_file, config=config)
        assert model.config == whole
        assert_same_weights(model, weights_of("tiny"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VARIANTS["tiny"] | {"latent_channels": 8}, r"decoder.conv_in.weight \[32, 4, 3, 3\], not \[32, 8, 3, 3\]"),
        (VARIANTS["tiny"] | {"use_quant_conv": False}, "2 unexpected: quant_conv"),
        (VARIANTS["tiny"] | {"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
        (VARIANTS["tiny"] | {"block_out_channels": [2**40, 2**40]}, "from 1 to 65536"),
        (VARIANTS["tiny"] | {"latent_channels": 2**70}, "from 1 to 65536"),
        (GROUPS | {"norm_groups": 8}, "norm_groups"),
        ({"norm_num_groups": 3}, "multiple of norm_num_groups = 3"),
        ({"_class_name": "AutoencoderTiny", "block_out_channels": [64]}, "AutoencoderTiny"),
        ("no/such/config.json", "neither a directory or file here nor a Hub id"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message, tiny_file):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKL.from_single_file(tiny_file, config=config)


def test_a_file_of_a_public_architecture_loads_without_a_config(tmp_path):
    """In the real size and fp16, but all zeros: the file is sparse and takes no room."""
    with torch.device("meta"):
        shapes = DiffusersVae(**levels(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32)).state_dict()
    header, end = {}, 0
    for name, tensor in to_ldm(shapes).items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    write_safetensors(tmp_path / "vae.safetensors", json.dumps(header).encode(), size=end)
    model = AutoencoderKL.from_single_file(tmp_path / "vae.safetensors")
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863
    assert model.config.norm_num_groups == 32
    assert model.config.scaling_factor is None, "the weights of SD 1.5, SDXL and Playground have the same shapes"


# Scaling and shift ------------------------------------------------------------------------------------------------


def test_factors_that_nobody_states_stay_unknown(tiny_file, tmp_path):
    model = AutoencoderKL.from_single_file(tiny_file, config=GROUPS)
    assert factors(model) == (None, None)
    model.save_pretrained(tmp_path / "saved")
    assert factors(AutoencoderKL.from_pretrained(tmp_path / "saved")) == (None, None)
    assert DiffusersVae.from_pretrained(tmp_path / "saved").config.scaling_factor is None


def test_the_callers_factors_win(tiny_file):
    given: dict[str, Any] = {"scaling_factor": 1.5, "shift_factor": -0.5}
    assert factors(AutoencoderKL.from_single_file(tiny_file, config=GROUPS, **given)) == (1.5, -0.5)
    assert factors(AutoencoderKL.from_single_file(tiny_file, config=GROUPS | given)) == (1.5, -0.5)
    assert factors(AutoencoderKL.from_single_file(tiny_file, config=VARIANTS["tiny"], **given)) == (1.5, -0.5)
    assert factors(load_model(tiny_file, config=VARIANTS["tiny"], shift_factor=2.0)) == (0.5, 2.0)


def test_factors_of_a_directory_may_be_overridden(tmp_path):
    source_model("tiny").save_pretrained(tmp_path)
    assert factors(load_model(tmp_path)) == (0.5, 0.25)
    assert factors(load_model(tmp_path, scaling_factor=3.0)) == (3.0, 0.25)
    with pytest.raises(ConfigError, match="config= is for single files"):
        load_model(tmp_path, config=GROUPS)


def test_factors_of_a_public_file_are_known_by_its_hash(tiny_file, monkeypatch):
    sha256 = AutoencoderKL.from_single_file(tiny_file, config=GROUPS).source.weights_sha256
    assert sha256 is not None
    public = PublicVae("Test", scaling_factor=0.7, shift_factor=0.1, sample_size=64, files_sha256=(sha256,))
    monkeypatch.setattr(
        vae_export.checkpoints.architecture, "PUBLIC_VAES", (*vae_export.checkpoints.architecture.PUBLIC_VAES, public)
    )
    model = AutoencoderKL.from_single_file(tiny_file, config=GROUPS)
    assert (*factors(model), model.config.sample_size) == (0.7, 0.1, 64)
    assert factors(AutoencoderKL.from_single_file(tiny_file, config=GROUPS, shift_factor=0.3)) == (0.7, 0.3)


@pytest.mark.parametrize(("argument", "value"), [("scaling_factor", 0), ("shift_factor", float("inf"))])
def test_factors_that_make_no_sense_are_refused(argument, value, tiny_file):
    with pytest.raises(ConfigError, match=argument):
        AutoencoderKL.from_single_file(tiny_file, config=GROUPS, **{argument: value})


# Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_float_type_are_held_in_fp32(dtype, tmp_path):
    stored = {name: tensor.to(dtype) for name, tensor in weights_of("tiny").items()}
    save_file(stored, tmp_path / "vae.safetensors")
    model = AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert_same_weights(model, {name: tensor.float() for name, tensor in stored.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_that_are_not_finite_are_named(value, dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in weights_of("tiny").items()}
    tensors["decoder.mid_block.resnets.1.conv2.weight"][-1, -1, -1, -1] = value
    save_file(to_ldm(tensors), tmp_path / "vae.safetensors")
    with pytest.raises(NumericsError, match=r"1 of \d+ weights: decoder\.mid_block\.resnets\.1\.conv2\.weight$"):
        AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_not_real_numbers_are_refused(dtype, tmp_path):
    tensors = weights_of("tiny") | {"encoder.conv_in.weight": torch.zeros(16, 3, 3, 3, dtype=dtype)}
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match=f"encoder.conv_in.weight is {dtype}"):
        AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)


# Wrong weights ----------------------------------------------------------------------------------------------------


def load_with(tensors, directory):
    """Load these tensors with the config of the tiny variant."""
    save_file(tensors, directory / "vae.safetensors")
    return AutoencoderKL.from_single_file(directory / "vae.safetensors", config=VARIANTS["tiny"])


def test_one_missing_key_is_named(tmp_path):
    tensors = weights_of("tiny")
    del tensors["decoder.up_blocks.0.upsamplers.0.conv.bias"]
    with pytest.raises(ConfigError, match=r"1 missing: decoder\.up_blocks\.0\.upsamplers\.0\.conv\.bias$"):
        load_with(tensors, tmp_path)


def test_of_many_keys_five_are_named_and_the_rest_counted(tmp_path):
    tensors = weights_of("tiny")
    gone = [name for name in tensors if name.startswith("encoder.mid_block.resnets.")]
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    extra = {f"decoder.adapter.{i}": torch.zeros(1) for i in range(7)}
    misshaped = {
        n: torch.zeros(*t.shape[:-1], 5) for n, t in kept.items() if n.startswith("decoder.mid_block.resnets.")
    }
    with pytest.raises(ConfigError) as error:
        load_with(kept | extra | misshaped, tmp_path)
    message = str(error.value)
    listed = ", ".join(gone[:5])
    assert f"{len(gone)} missing: {listed} and {len(gone) - 5} more;" in message
    assert "7 unexpected: " + ", ".join(list(extra)[:5]) + " and 2 more;" in message
    assert f"{len(misshaped)} of another shape: " in message
    assert "decoder.mid_block.resnets.0.norm1.weight [5], not [32]" in message
    assert message.endswith(f"and {len(misshaped) - 5} more")


@pytest.mark.parametrize("name", ["quantize.weight", "decoder.extra.weight", "first_block.weight", "vae_ema.a"])
def test_keys_without_a_known_prefix_are_not_dropped(name, tmp_path):
    with pytest.raises(ConfigError, match=f"1 unexpected: {name}$"):
        load_with(weights_of("tiny") | {name: torch.zeros(4)}, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("encoder.conv_in.weight", (16,)), ("decoder.conv_out.weight", ()), ("encoder.conv_out.weight", (8, 32, 1, 3, 3))],
)
def test_a_convolution_without_four_dimensions_is_refused(name, shape, tmp_path):
    save_file(weights_of("tiny") | {name: torch.zeros(shape)}, tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match=f"not an AutoencoderKL.*{name}"):
        AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)


def test_shapes_that_no_memory_could_hold_are_refused(tmp_path):
    """A file can claim them of a tensor without elements."""
    claimed = {"encoder.conv_out.weight": torch.zeros(2**40, 0, 3, 3)}
    save_file(weights_of("tiny") | claimed, tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match="from 1 to 65536"):
        AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=GROUPS)


OTHER_MODELS = {
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3)}, "no VAE among the 1 tensors"),
    "whole-checkpoint-without-vae": (
        {"model.diffusion_model.out.2.bias": torch.zeros(4)},
        "no VAE among the 1 tensors",
    ),
    "text-encoder": ({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(8, 8)}, "not an AutoencoderKL"),
    "only-the-encoder": ({n: t for n, t in weights_of("tiny").items() if n[:3] == "enc"}, "decoder.conv_out.weight"),
    "only-the-decoder": ({n: t for n, t in weights_of("tiny").items() if n[:3] == "dec"}, "encoder.conv_in.weight"),
    "nothing": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_files_of_other_models_are_refused(name, tmp_path):
    tensors, message = OTHER_MODELS[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        AutoencoderKL.from_single_file(tmp_path / "model.safetensors", config=GROUPS)


@pytest.mark.parametrize(
    ("other", "single_file_message"),
    [
        (
            AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
            "fields that no AutoencoderTiny has: 'norm_num_groups'",
        ),
        (VQModel(block_out_channels=(16,), norm_num_groups=8), "vector-quantised autoencoder .VQModel"),
    ],
    ids=["AutoencoderTiny", "VQModel"],
)
def test_other_autoencoders_are_refused(other, single_file_message, tmp_path):
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=type(other).__name__):
        AutoencoderKL.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=single_file_message):
        AutoencoderKL.from_single_file(tmp_path / WEIGHTS, config=GROUPS)


# Broken files -----------------------------------------------------------------------------------------------------


def write_safetensors(path, header, data=b"", size=None):
    """A file of this JSON header and data, or `size` zeros that take no room on the disk."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)
        if size is not None:
            file.truncate(8 + len(header) + size)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 1000, 0.1, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(kept, tiny_file):
    data = tiny_file.read_bytes()
    tiny_file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ConfigError, match=r"vae.safetensors is not a complete safetensors file"):
        AutoencoderKL.from_single_file(tiny_file, config=GROUPS)


ONE_TENSOR = {"encoder.a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
BROKEN = {
    "random": bytes(range(1, 255)),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:63aeecb90ff7bc1c\nsize 334643268\n",
    "html": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    "huge-header": struct.pack("<Q", 2**63) + b"{}",
    "all-ones-header": b"\xff" * 8 + b"{}",
    "header-beyond-the-end": struct.pack("<Q", 1000) + b"{}",
    "no-json": struct.pack("<Q", 8) + b"{'a': 1}",
    "json-of-something-else": struct.pack("<Q", 8) + b"[1,2,3] ",
    "no-utf-8": struct.pack("<Q", 8) + b'{"\xff": 1}',
    "offsets-beyond-the-end": json.dumps(ONE_TENSOR | {"b": ONE_TENSOR["encoder.a"] | {"data_offsets": [8, 10**12]}}),
    "offsets-backwards": json.dumps({"encoder.a": ONE_TENSOR["encoder.a"] | {"data_offsets": [8, 0]}}),
    "shape-of-another-size": json.dumps({"encoder.a": ONE_TENSOR["encoder.a"] | {"shape": [2**62, 4]}}),
    "unknown-dtype": json.dumps({"encoder.a": ONE_TENSOR["encoder.a"] | {"dtype": "Q4"}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_safetensors_is_refused(name, tmp_path):
    content, path = BROKEN[name], tmp_path / "vae.safetensors"
    if isinstance(content, str):
        write_safetensors(path, content.encode(), b"\0" * 8)
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"vae.safetensors is not a complete safetensors file"):
        AutoencoderKL.from_single_file(path, config=GROUPS)


def test_paths_that_are_no_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.safetensors does not exist"):
        AutoencoderKL.from_single_file(tmp_path / "nothing.safetensors")
    with pytest.raises(ConfigError, match="is not a file"):
        AutoencoderKL.from_single_file(tmp_path)


# Pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "torch-legacy", "2", "4", "5"])
@pytest.mark.parametrize("name", ["vae.ckpt", "vae.pt", "vae.pth", "vae.bin", "vae.CKPT", "vae.safetensors"])
def test_a_pickle_is_never_loaded_whatever_its_name(name, form, tmp_path):
    save_exploit(tmp_path / name, form)
    with pytest.raises(ConfigError, match=r"is a pickle.*To convert one that you trust: python -c"):
        AutoencoderKL.from_single_file(tmp_path / name, config=GROUPS)


@pytest.mark.parametrize("name", ["a model.ckpt", "disguised.safetensors"])
def test_the_conversion_command_in_the_message_works(name, tmp_path):
    tensors = to_ldm(weights_of("tiny"))
    tensors["loss.a"] = tensors["encoder.conv_in.weight"][:1]  # shares memory, which safetensors does not store
    tensors["encoder.conv_out.weight"] = tensors["encoder.conv_out.weight"].to(memory_format=torch.channels_last)
    torch.save({"state_dict": tensors | {"loss.b": None}, "global_step": 840000}, tmp_path / name)
    with pytest.raises(ConfigError) as error:
        AutoencoderKL.from_single_file(tmp_path / name)
    command = str(error.value).split("that you trust: ")[1]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, timeout=60)
    (converted,) = set(tmp_path.glob("*.safetensors")) - {tmp_path / name}
    assert_same_weights(AutoencoderKL.from_single_file(converted, config=GROUPS), weights_of("tiny"))


def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(tiny_file):
    """The first bytes of a safetensors file are the length of its header, here those of a pickle of protocol 2."""
    data = tiny_file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    padded = data[8 : 8 + length].ljust(0x10280)
    assert len(padded) == 0x10280
    write_safetensors(tiny_file, padded, data[8 + length :])
    assert tiny_file.read_bytes()[:2] == pickle.dumps(None, protocol=2)[:2]
    assert_same_weights(AutoencoderKL.from_single_file(tiny_file, config=GROUPS), weights_of("tiny"))
