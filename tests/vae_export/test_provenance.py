"""The record of where exported weights came from: true also where the model was changed after it was loaded.

Tests vae_export/checkpoints/source.py.
"""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from runtimes.errors import ConfigError
from tests.helpers.checkpoint_samples import GROUPS, LAYOUTS, weights_of
from vae_export import export_bundle, load_model, validate_bundle
from vae_export.checkpoints.files import WEIGHTS_FILE
from vae_export.checkpoints.source import tensors_sha256


@pytest.fixture
def directory(two_level_model, tmp_path):
    two_level_model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def exported(model, path):
    return export_bundle(model, path, run_validation=False).manifest.source


def in_place(model):
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3


def through_data(model):
    """No version counter of PyTorch sees it."""
    model.decoder.conv_out.bias.data.mul_(1.5)


def replaced(model):
    model.quant_conv.weight = torch.nn.Parameter(model.quant_conv.weight * 2)


def last_bit(model):
    weight = model.encoder.conv_in.weight.data.view(torch.int32)
    weight[0, 0, 0, 0] ^= 1


def swapped(model):
    first, second = model.decoder.mid_block.resnets
    first.conv1.weight, second.conv1.weight = second.conv1.weight, first.conv1.weight


@pytest.mark.parametrize("change", [in_place, through_data, replaced, last_bit, swapped])
def test_a_model_that_was_changed_in_memory_is_recorded_as_such(change, directory, tmp_path):
    model = load_model(directory)
    change(model)
    source = exported(model, tmp_path / "b")
    assert source["changed_in_memory"] is True
    assert source["weights_sha256"] is None, "no file has these weights"
    assert source["tensors_sha256"] == tensors_sha256(model.state_dict()) != load_model(directory).source.tensors_sha256
    assert source["given"] == str(directory)


def test_a_bundle_of_a_changed_model_is_validated_with_that_model_alone(directory, tmp_path):
    model = load_model(directory)
    in_place(model)
    exported(model, tmp_path / "b")
    assert all(measurement.passed for measurement in validate_bundle(tmp_path / "b", model))
    with pytest.raises(ConfigError, match="changed in memory; give the model itself"):
        validate_bundle(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"has weights .*, and the bundle was made from"):
        validate_bundle(tmp_path / "b", load_model(directory))


def test_an_unchanged_model_keeps_the_hash_of_its_file(directory, tmp_path):
    source = exported(load_model(directory), tmp_path / "b")
    assert source["changed_in_memory"] is False
    assert source["weights_sha256"] == hashlib.sha256((directory / WEIGHTS_FILE).read_bytes()).hexdigest()


def test_a_change_that_was_undone_is_none(directory, tmp_path):
    model = load_model(directory)
    bias = model.get_parameter("decoder.conv_out.bias")
    before = bias.clone()
    in_place(model)
    bias.data.copy_(before)
    assert exported(model, tmp_path / "b")["changed_in_memory"] is False


def test_a_model_made_in_memory_has_the_hash_of_its_tensors(two_level_model, tmp_path):
    source = exported(two_level_model, tmp_path / "b")
    assert (source["kind"], source["weights_sha256"], source["changed_in_memory"]) == ("memory", None, False)
    assert source["tensors_sha256"] == tensors_sha256(two_level_model.state_dict())


@pytest.mark.parametrize("layout", ["diffusers", "ldm", "diffusers-legacy-attention-as-convolutions"])
def test_the_hash_of_tensors_does_not_depend_on_the_format(layout, tmp_path):
    save_file(LAYOUTS[layout](weights_of("tiny")), tmp_path / "vae.safetensors")
    model = load_model(tmp_path / "vae.safetensors", config=GROUPS)
    assert model.source.tensors_sha256 == tensors_sha256(weights_of("tiny"))


def test_the_hash_of_tensors_is_what_its_docstring_says():
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3.0)}
    expected = hashlib.sha256(b"a []\n\x00\x00\x40\x40b [2]\n\x00\x00\x80\x3f\x00\x00\x00\x40").hexdigest()
    assert tensors_sha256(tensors) == expected
