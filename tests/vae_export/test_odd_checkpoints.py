"""Weights files and configs as users have them: wrapped names, other files under their name, configs beside them.

Tests vae_export/checkpoints/load.py.
"""

import json
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVae
from safetensors.torch import load_file, save_file

from runtimes.config import VaeConfig
from runtimes.errors import ConfigError
from tests.helpers.checkpoint_samples import GROUPS, VARIANTS, assert_same_weights, source_model, weights_of
from vae_export.checkpoints.files import WEIGHTS_FILE
from vae_export.checkpoints.load import EMBEDDED, load_model
from vae_export.checkpoints.weights import read_weights
from vae_export.families.autoencoder_kl import FAMILY

WEIGHTS = EMBEDDED / WEIGHTS_FILE


def renamed(path, rename):
    save_file({rename(name): tensor.clone() for name, tensor in load_file(WEIGHTS).items()}, path)
    return path


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "state_dict.", "vae.model.", "state_dict.module.vae.",
               "_orig_mod.first_stage_model.", "first_stage_model._orig_mod."],
)  # fmt: skip
def test_wrapper_prefixes_are_stripped(tmp_path, prefix):
    path = renamed(tmp_path / "x.safetensors", lambda name: prefix + name)
    assert read_weights(path, FAMILY).tensors.keys() == read_weights(WEIGHTS, FAMILY).tensors.keys()


def test_a_decoder_that_was_compiled_alone_is_read(tmp_path):
    path = renamed(tmp_path / "x.safetensors", lambda name: name.replace("decoder.", "decoder._orig_mod."))
    assert read_weights(path, FAMILY).tensors.keys() == read_weights(WEIGHTS, FAMILY).tensors.keys()


@pytest.mark.parametrize("other", ["vae.", "first_stage_model.", "module.", "vae.model."])
def test_of_two_vaes_in_one_file_none_is_taken(tmp_path, other):
    tensors = load_file(WEIGHTS)
    path = tmp_path / "two.safetensors"
    save_file(tensors | {other + name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(ConfigError, match=r"two\.safetensors.*more than one VAE"):
        read_weights(path, FAMILY)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"<html><body>Log in</body></html>", "web page"),
        (b'{"error": "Repository not found"}', "is JSON"),
    ],
)
def test_another_file_under_the_name_of_weights_is_named(tmp_path, content, says):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_weights(path, FAMILY)


def test_a_config_given_as_the_model_is_named():
    with pytest.raises(ConfigError, match="is JSON"):
        load_model(EMBEDDED / "config.json")


@pytest.mark.parametrize("folder", [".", "vae"])
def test_the_config_beside_a_local_file_is_read(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    config = json.loads((EMBEDDED / "config.json").read_text()) | {"scaling_factor": 0.75}
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    path = renamed(tmp_path / "x.safetensors", lambda name: name)
    assert load_model(path).config.scaling_factor == 0.75


def test_a_subfolder_of_a_single_file_is_refused():
    with pytest.raises(ConfigError, match="subfolder='vae'"):
        load_model(WEIGHTS, subfolder="vae")


def test_fields_of_an_ema_config_are_ignored_with_a_warning():
    data = json.loads((EMBEDDED / "config.json").read_text())
    with pytest.warns(UserWarning, match="'decay', 'optimization_step'"):
        config = VaeConfig.from_dict(data | {"decay": 0.999, "optimization_step": 5})
    assert config == VaeConfig.from_dict(data)


@pytest.mark.parametrize("name", ["SiLU", "SILU", "Mish", "GELU"])
def test_activations_in_any_case(name):
    assert VaeConfig(act_fn=name).act_fn == name.lower()


# Fused projections ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(tmp_path):
    """A directory that diffusers saved after fuse_qkv_projections()."""
    model = DiffusersVae(**VARIANTS["tiny"])
    model.load_state_dict(weights_of("tiny"))
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    assert any("to_qkv" in name for name in load_file(tmp_path / WEIGHTS_FILE))
    return tmp_path


def test_fused_projections_are_left_out_with_a_warning(fused):
    with pytest.warns(UserWarning, match=r"fuse_qkv_projections\(\): 4 fused tensors are left out"):
        model = load_model(fused)
    assert_same_weights(model, weights_of("tiny"))


@pytest.mark.parametrize("name", ["to_qkv.weight", "to_qkv.bias", "to_q.weight", "to_k.weight", "to_v.bias"])
def test_fused_projections_that_contradict_their_parts_are_refused(fused, name):
    tensors = load_file(fused / WEIGHTS_FILE)
    tensors[f"encoder.mid_block.attentions.0.{name}"].view(-1)[3] += 1
    save_file(tensors, fused / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match=r"encoder\..*to_qkv.* is not its to_q, to_k and to_v put together"):
        load_model(fused)


def test_fused_projections_without_their_parts_are_refused(fused):
    tensors = {n: t for n, t in load_file(fused / WEIGHTS_FILE).items() if ".to_q." not in n}
    save_file(tensors, fused / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match="to_qkv"):
        load_model(fused)


# Other VAEs -----------------------------------------------------------------------------------------------------------


OTHERS: dict[str, dict[str, Any]] = {
    "AutoencoderKLTemporalDecoder": {"block_out_channels": (32,), "layers_per_block": 1},
    "AutoencoderKLQwenImage": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
                               "temperal_downsample": [False]},
    "AutoencoderKLWan": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
                         "temperal_downsample": [False]},
    "VQModel": {"block_out_channels": (8,), "norm_num_groups": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_vaes_of_diffusers_are_named_without_advice_that_is_wrong(name, tmp_path):
    getattr(diffusers, name)(**OTHERS[name]).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / WEIGHTS_FILE):
        with pytest.raises(ConfigError, match=name) as caught:
            load_model(source, config=None if source == tmp_path else GROUPS)
        assert "subfolder" not in str(caught.value)
        assert "not supported" in str(caught.value)
        assert "AutoencoderKL, AutoencoderKLFlux2, AsymmetricAutoencoderKL, AutoencoderTiny, TAEF2" in str(caught.value)


@pytest.mark.parametrize("name", ["AutoencoderKLOfTomorrow", "ConsistencyDecoderVAE", "AutoencoderDC"])
def test_an_unknown_autoencoder_is_no_pipeline(name):
    with pytest.raises(ConfigError, match=f"{name}.*another network, which is not supported"):
        VaeConfig.from_dict({"_class_name": name})


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "StableDiffusionPipeline", None, 3, [], {}])
def test_the_config_of_another_model_is_answered_with_where_the_vae_is(name):
    with pytest.raises(ConfigError, match="subfolder='vae'"):
        VaeConfig.from_dict({"_class_name": name})


# Unknown fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["note", "trained_by", "torch_dtype", "license", "decay", "revision"])
def test_unknown_fields_that_cannot_change_the_network_are_named_in_a_warning(field):
    data = json.loads((EMBEDDED / "config.json").read_text())
    with pytest.warns(UserWarning, match=f"ignored: '{field}'"):
        assert VaeConfig.from_dict(data | {field: 1}) == VaeConfig.from_dict(data)


@pytest.mark.parametrize(
    "field", ["mid_block_type", "norm_type", "attention_head_dim", "resnet_eps", "patch_size", "upsample_fn", "padding"]
)
def test_unknown_fields_that_may_change_the_network_are_refused(field):
    data = json.loads((EMBEDDED / "config.json").read_text())
    with pytest.raises(ConfigError, match=f"'{field}'"):
        VaeConfig.from_dict(data | {field: 1})


# Configs that are none ------------------------------------------------------------------------------------------------

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "says"), [(LFS, "git lfs pull"), ("<!DOCTYPE html>", "web page"), ("{", "not a readable JSON")]
)
def test_another_file_under_the_name_of_a_config_is_named(content, says, tmp_path):
    source_model("tiny").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"config.json.*{says}"):
        load_model(tmp_path)
    with pytest.warns(UserWarning, match=f"is left out: .*config.json.*{says}"):
        load_model(tmp_path / WEIGHTS_FILE, config=GROUPS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latent_channels": 8}, "latent_channels = 8, not 4"),
        ({"use_quant_conv": False}, "use_quant_conv = False, not True"),
        ({"scaling_factor": "x"}, "scaling_factor = 'x'"),
        ({"norm_type": "rms"}, "norm_type"),
    ],
)
def test_a_config_beside_a_file_that_does_not_fit_is_left_out_with_a_warning(change, says, tmp_path):
    source_model("tiny").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.warns(UserWarning, match=f"left out: .*{says}"):
        model = load_model(tmp_path / WEIGHTS_FILE, config=GROUPS)
    assert model.config.scaling_factor is None


# Keys of other models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["model.diffusion_model.out.weight", "lora_unet.up", "unet.conv_in.weight"])
def test_doubled_keys_of_other_models_do_not_matter(other, tmp_path):
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in weights_of("tiny").items()}
    doubled = {other: torch.zeros(1), f"module.{other}": torch.zeros(1), f"state_dict.{other}": torch.zeros(1)}
    save_file(tensors | doubled, tmp_path / "x.safetensors")
    assert_same_weights(load_model(tmp_path / "x.safetensors", config=GROUPS), weights_of("tiny"))
