"""Which files hold the weights: variants, checkpoints in parts, and what is said where they are not complete.

Tests vae_export/checkpoints/files.py, vae_export/checkpoints/weights.py.
"""

import hashlib
import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save, save_file

from runtimes.errors import ConfigError
from tests.helpers.checkpoint_samples import (
    VARIANTS,
    WEIGHTS,
    assert_same_weights,
    repository,
    source_model,
    weights_of,
)
from vae_export import AutoencoderKL, Hub, export_bundle, validate_bundle
from vae_export.checkpoints.load import load_model

INDEX = WEIGHTS + ".index.json"
REPO = "someone/parts"


def named(variant):
    return WEIGHTS.replace(".safetensors", f".{variant}.safetensors")


def in_parts(directory, variant=None):
    """The tiny model as diffusers writes it in parts; -> the names of the parts."""
    source_model("tiny").save_pretrained(directory, max_shard_size="50KB", variant=variant)
    parts = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(parts) > 2
    return parts


# Variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema", "fp8-e4m3fn"])
def test_the_only_variant_is_taken_and_recorded(tmp_path, variant):
    source_model("tiny").save_pretrained(tmp_path, variant=variant)
    for given in (None, variant):
        model = AutoencoderKL.from_pretrained(tmp_path, variant=given)
        assert_same_weights(model, weights_of("tiny"))
        assert model.source.variant == variant


def test_the_plain_file_is_taken_unless_a_variant_is_named(tmp_path):
    source_model("tiny").save_pretrained(tmp_path)
    changed = {name: tensor + 1 for name, tensor in weights_of("tiny").items()}
    save_file(changed, tmp_path / named("non_ema"))
    plain = AutoencoderKL.from_pretrained(tmp_path)
    assert_same_weights(plain, weights_of("tiny"))
    assert plain.source.variant is None
    assert_same_weights(load_model(tmp_path, variant="non_ema"), changed)


def test_of_several_variants_none_is_taken_silently(tmp_path):
    source_model("tiny").save_pretrained(tmp_path)
    for variant in ("bf16", "fp16"):
        save_file(weights_of("tiny"), tmp_path / named(variant))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=rf"{named('bf16')}, {named('fp16')}; give variant= .*: bf16 or fp16"):
        load_model(tmp_path)


@pytest.mark.parametrize("variant", ["fp32", "FP16"])
def test_a_missing_variant_is_answered_with_the_files_that_are_there(tmp_path, variant):
    source_model("tiny").save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ConfigError, match=rf"no {named(variant)}; it has {named('fp16')}; give variant= .*: fp16"):
        load_model(tmp_path, variant=variant)


@pytest.mark.parametrize("variant", ["", "../x", "a/b", "a.b", "x\n"])
def test_a_variant_that_no_file_can_have_is_refused(tmp_path, variant):
    source_model("tiny").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="variants are like fp16"):
        load_model(tmp_path, variant=variant)


def test_a_variant_of_a_single_file_is_refused(tiny_file):
    with pytest.raises(ConfigError, match="variant='fp16' is for directories"):
        load_model(tiny_file, variant="fp16")


@pytest.mark.parametrize("given", [None, "bf16"])
def test_the_variant_of_a_repository_is_found(hub, given):
    files = repository()
    commit = hub.add(REPO, {"config.json": files["config.json"], named("bf16"): files[WEIGHTS]})
    model = load_model(REPO, variant=given)
    assert_same_weights(model, weights_of("tiny"))
    assert (model.source.variant, model.source.commit) == ("bf16", commit)
    again = load_model(REPO, variant=given, hub=Hub(local_files_only=True))
    assert_same_weights(again, weights_of("tiny"))


def test_a_repository_with_several_variants_names_them(hub):
    files = repository(folder="vae/")
    weights = files.pop("vae/" + WEIGHTS)
    hub.add(REPO, files | {"vae/" + named("bf16"): weights, "vae/" + named("fp16"): weights})
    with pytest.raises(ConfigError, match=f"{named('bf16')}, {named('fp16')}; give variant="):
        load_model(REPO, subfolder="vae")
    assert load_model(REPO, subfolder="vae", variant="bf16").source.variant == "bf16"


def test_a_bundle_of_a_variant_is_validated_with_that_variant(tmp_path, two_level_model):
    two_level_model.save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / WEIGHTS)
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, tmp_path / "m" / named("non_ema"))
    bundle = export_bundle(load_model(tmp_path / "m", variant="non_ema"), tmp_path / "b", run_validation=False)
    assert bundle.manifest.source["variant"] == "non_ema"
    assert all(measurement.passed for measurement in validate_bundle(tmp_path / "b"))


# Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "given"), [(None, None), ("fp16", None), ("fp16", "fp16")])
def test_a_checkpoint_in_parts_is_read_as_one(tmp_path, variant, given):
    in_parts(tmp_path, variant)
    model = load_model(tmp_path, variant=given)
    assert_same_weights(model, weights_of("tiny"))
    assert model.source.variant == variant


def test_the_index_of_a_variant_may_be_named_after_its_weights(tmp_path):
    in_parts(tmp_path, "fp16")
    (tmp_path / f"{WEIGHTS}.index.fp16.json").rename(tmp_path / f"{named('fp16')}.index.json")
    assert_same_weights(load_model(tmp_path), weights_of("tiny"))


def test_an_index_may_be_given_as_the_model(tmp_path):
    in_parts(tmp_path)
    assert_same_weights(load_model(tmp_path / INDEX), weights_of("tiny"))


def test_the_hash_of_parts_is_that_of_what_sha256sum_prints(tmp_path):
    parts = in_parts(tmp_path)
    lines = "".join(f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in parts)
    assert load_model(tmp_path).source.weights_sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_a_missing_part_is_named(tmp_path):
    parts = in_parts(tmp_path)
    (tmp_path / parts[1]).unlink()
    with pytest.raises(ConfigError, match=f"not beside it: {parts[1]}"):
        load_model(tmp_path)


def test_a_surplus_part_is_named(tmp_path):
    parts = in_parts(tmp_path)
    surplus = parts[0].replace("-00001-", "-00099-")
    (tmp_path / surplus).write_bytes((tmp_path / parts[0]).read_bytes())
    with pytest.raises(ConfigError, match=f"does not list these parts.*: {surplus}"):
        load_model(tmp_path)


def test_parts_of_a_variant_are_no_surplus_of_the_plain_ones(tmp_path):
    in_parts(tmp_path)
    for path in list(tmp_path.glob("*-of-*")):
        other = path.name.replace("model-", "model.fp16-")
        (tmp_path / other).write_bytes(path.read_bytes())
    assert_same_weights(load_model(tmp_path), weights_of("tiny"))


def test_parts_of_different_checkpoints_are_refused(tmp_path):
    parts = in_parts(tmp_path)
    first = load_file(tmp_path / parts[0])
    name, tensor = first.popitem()
    save_file(first, tmp_path / parts[0])
    with pytest.raises(ConfigError, match=f"tensors are missing: {name} in {parts[0]}"):
        load_model(tmp_path)
    save_file(first | {name: tensor, "encoder.extra": tensor.clone()}, tmp_path / parts[0])
    with pytest.raises(ConfigError, match=f"not listed: encoder.extra in {parts[0]}"):
        load_model(tmp_path)


def test_a_tensor_that_two_parts_hold_is_refused(tmp_path):
    parts = in_parts(tmp_path)
    first, second = (load_file(tmp_path / name) for name in parts[:2])
    name = next(iter(first))
    save_file(second | {name: first[name]}, tmp_path / parts[1])
    with pytest.raises(ConfigError, match=f"not listed: {name} in {parts[1]}"):
        load_model(tmp_path)


def test_a_damaged_part_is_named(tmp_path):
    parts = in_parts(tmp_path)
    (tmp_path / parts[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=f"{parts[1]} is not a complete safetensors file.*git lfs pull"):
        load_model(tmp_path)


def test_one_part_alone_is_refused(tmp_path):
    parts = in_parts(tmp_path)
    with pytest.raises(ConfigError, match="is one part of a checkpoint"):
        load_model(tmp_path / parts[0], config=VARIANTS["tiny"])


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"<html>", b"\xff\xfe", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}',
     b'{"weight_map": {"a": "../a.safetensors"}}', b'{"weight_map": {"a": "/etc/x.safetensors"}}',
     b'{"weight_map": ["a"]}'],
)  # fmt: skip
def test_a_file_that_is_no_index_is_refused(tmp_path, content):
    in_parts(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ConfigError, match=r"index\.json.*weight_map"):
        load_model(tmp_path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_parts_on_the_hub_are_downloaded(hub, tmp_path, variant):
    parts = in_parts(tmp_path, variant)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.add(REPO, files)
    assert_same_weights(load_model(REPO), weights_of("tiny"))
    assert_same_weights(load_model(REPO, hub=Hub(local_files_only=True)), weights_of("tiny"))
    del files[parts[1]]
    hub.add(REPO, files)
    with pytest.raises(ConfigError, match=f"has no file {parts[1]}"):
        load_model(REPO)


def test_a_bundle_of_parts_is_validated_again(tmp_path, two_level_model):
    (tmp_path / "m").mkdir()
    two_level_model.save_pretrained(tmp_path / "m")
    weights = sorted(load_file(tmp_path / "m" / WEIGHTS).items())
    (tmp_path / "m" / WEIGHTS).unlink()
    listed: dict[str, str] = {}
    for number, part in enumerate((weights[:9], weights[9:])):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-00002.safetensors"
        (tmp_path / "m" / name).write_bytes(save(dict(part)))
        listed |= {key: name for key, _ in part}
    (tmp_path / "m" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    export_bundle(load_model(tmp_path / "m"), tmp_path / "b", run_validation=False)
    assert all(measurement.passed for measurement in validate_bundle(tmp_path / "b"))


# Imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["vae_export.checkpoints.load", "vae_export.families.autoencoder_kl"])
def test_either_module_can_be_imported_first(first):
    subprocess.run([sys.executable, "-P", "-c", f"import {first}"], check=True)
