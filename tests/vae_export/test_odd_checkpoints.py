"""Weights files and configs as users have them: wrapped names, other files under their name, configs beside them."""

import json

import pytest
from safetensors.torch import load_file, save_file

from runtimes.config import VaeConfig
from runtimes.errors import ConfigError
from vae_export.checkpoints.load import EMBEDDED, WEIGHTS_FILE, load_model, read_weights

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
    assert read_weights(path).tensors.keys() == read_weights(WEIGHTS).tensors.keys()


def test_a_decoder_that_was_compiled_alone_is_read(tmp_path):
    path = renamed(tmp_path / "x.safetensors", lambda name: name.replace("decoder.", "decoder._orig_mod."))
    assert read_weights(path).tensors.keys() == read_weights(WEIGHTS).tensors.keys()


@pytest.mark.parametrize("other", ["vae.", "first_stage_model.", "module.", "vae.model."])
def test_of_two_vaes_in_one_file_none_is_taken(tmp_path, other):
    tensors = load_file(WEIGHTS)
    path = tmp_path / "two.safetensors"
    save_file(tensors | {other + name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(ConfigError, match=r"two\.safetensors.*more than one VAE"):
        read_weights(path)


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
        read_weights(path)


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
    with pytest.warns(UserWarning, match="decay, optimization_step"):
        config = VaeConfig.from_dict(data | {"decay": 0.999, "optimization_step": 5})
    assert config == VaeConfig.from_dict(data)


@pytest.mark.parametrize("name", ["SiLU", "SILU", "Mish", "GELU"])
def test_activations_in_any_case(name):
    assert VaeConfig(act_fn=name).act_fn == name.lower()
