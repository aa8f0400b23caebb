"""Flax bundles on disk: what is in them, and what is refused before anything is written.

Tests vae_export/targets/flax.py.
"""

import os
import re

import numpy as np
import pytest
import torch

from runtimes import Bundle, ConfigError, NotInstalled, NumericsError
from runtimes.manifest import GraphSpec, TensorSpec
from runtimes.names import GRAPHS
from tests.helpers.files import tree
from tests.helpers.graph_table import TABLE
from vae_export import AutoencoderKL, export_bundle, validate_bundle
from vae_export.comparison import THRESHOLDS
from vae_export.rewrites.form import PLAIN
from vae_export.targets import flax as flax_export
from vae_export.tune import tune_bundle

flax_params = pytest.importorskip("runtimes.flax.params", exc_type=NotInstalled)

import jax  # noqa: E402
from jax import export  # noqa: E402

PRECISIONS = ("fp32", "bf16")


def file_of(graph):
    return f"vae_{graph}/model.stablehlo"


@pytest.fixture(params=GRAPHS)
def graph(request):
    return request.param


@pytest.fixture(params=PRECISIONS)
def bundle(request, flax_bundle):
    return flax_bundle(request.param)


# What is in a bundle ----------------------------------------------------------------------------------------------


def test_layout_is_parameters_once_and_a_graph_for_each_direction(bundle, tiny_model):
    files = tree(bundle)
    assert sorted(files) == sorted(
        ["manifest.json", "config.json", flax_params.FLAX_FILE]
        + [f"vae_{graph}/{name}" for graph in GRAPHS for name in ("config.json", "model.stablehlo")]
    )
    assert all(data == tiny_model.config.to_json().encode() for n, data in files.items() if n.endswith("config.json"))
    opened = Bundle(bundle)
    opened.verify()
    assert set(opened.manifest.files) == set(files) - {"manifest.json"}


def test_manifest_says_what_was_made_of_what_and_with_what(bundle, tiny_model):
    manifest = Bundle(bundle).manifest
    assert (manifest.target, manifest.precision, manifest.config) == ("flax", bundle.name, tiny_model.config)
    assert list(manifest.rewrites) == [{"name": "fold_upsample", "form": "conv"}]
    assert manifest.tools["jax"] == jax.__version__ and {"jaxlib", "flax", "torch"} <= set(manifest.tools)


def test_inputs_and_outputs_are_those_of_the_table_with_free_batch_and_sizes(bundle, graph):
    exported = export.deserialize(bytearray((bundle / file_of(graph)).read_bytes()))
    (params, x), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    (_, channels_in, *_), (_, channels_out, *_) = TABLE[graph]
    assert (x.dtype, x.shape[1], exported.out_avals[0].shape[1]) == (np.float32, channels_in, channels_out)
    free = [size for aval in (x, *exported.out_avals) for size in (aval.shape[0], *aval.shape[2:])]
    assert not any(isinstance(size, int) for size in free)
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    stored = {"fp32": "float32", "bf16": "bfloat16"}[bundle.name]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {stored}
    sides = [TensorSpec(name, "float32", ("batch", *sizes)) for name, *sizes in TABLE[graph]]
    assert Bundle(bundle).manifest.graphs[graph] == GraphSpec(file_of(graph), *sides)


def test_products_in_fp32_are_fp32_on_every_platform(flax_bundle, graph):
    """JAX's own choice is bf16 on TPUs, and TF32 on GPUs."""
    text = export.deserialize(bytearray((flax_bundle("fp32") / file_of(graph)).read_bytes())).mlir_module()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert len(products) > 20 and all("HIGHEST" in line and "DEFAULT" not in line for line in products)


def test_parameters_are_those_of_the_checkpoint(bundle, tiny_model):
    """Not rescaled: bf16 has the range of fp32, and who trains on wants the checkpoint's."""
    tensors = flax_params.to_torch(flax_params.read_msgpack((bundle / flax_params.FLAX_FILE).read_bytes(), "bundle"))
    kept = torch.bfloat16 if bundle.name == "bf16" else torch.float32
    for name, tensor in tiny_model.state_dict().items():
        assert np.array_equal(tensors[name].astype(np.float32), tensor.to(kept).float().numpy())
    assert tensors.keys() == tiny_model.state_dict().keys()


def test_graphs_are_the_same_each_time_and_tell_nothing_of_the_machine(flax_bundle, tiny_model, graph, tmp_path):
    flax_export.export_stablehlo(tiny_model, graph, tmp_path / "again.stablehlo")
    data = (flax_bundle("fp32") / file_of(graph)).read_bytes()
    same = (tmp_path / "again.stablehlo").read_bytes() == data  # beforehand: pytest would spell out how they differ
    assert same
    traces = (rb"site-packages", rb"\.py\b", rb"/home/", rb"/root/", rb"/tmp/", os.getcwd().encode())
    assert not [trace for trace in traces if re.search(trace, data)]
    assert jax.config.values["jax_hlo_source_file_canonicalization_regex"] is None, "JAX is left as it was"


# Validation -------------------------------------------------------------------------------------------------------


def test_a_bundle_is_validated_like_every_other(tiny_model, tmp_path, few_cases):
    manifest = export_bundle(tiny_model, tmp_path / "b", target="flax").manifest
    assert manifest.validation["verdict"] == "passed" and "not_run" not in manifest.validation
    assert manifest.validation["thresholds"] == THRESHOLDS["fp32"]._asdict()
    assert {(m["graph"], m["by"]) for m in manifest.validation["measurements"]} == {(g, "flax") for g in GRAPHS}
    assert [(m.graph, m.passed) for m in validate_bundle(tmp_path / "b", tiny_model)] == [(g, True) for g in GRAPHS]


def test_wrong_parameters_are_found_and_nothing_is_written(tiny_model, tmp_path, monkeypatch, few_cases):
    other = AutoencoderKL(tiny_model.config)
    write = flax_export.write_params
    monkeypatch.setattr(flax_export, "write_params", lambda model, *rest: write(other, *rest))
    with pytest.raises(NumericsError, match="comparisons with the reference failed at fp32"):
        export_bundle(tiny_model, tmp_path / "b", target="flax")
    assert os.listdir(tmp_path) == []


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"io_precision": "same"}, "--io-precision fp32"),
        ({"precision": "fp16"}, "flax bundles are made in fp32, bf16, not in fp16"),
        ({"forms": dict.fromkeys(GRAPHS, PLAIN)}, "written in one form"),
    ],
)
def test_what_no_flax_bundle_is_made_of_is_refused_and_nothing_left(tiny_model, tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        export_bundle(tiny_model, tmp_path / "b", target="flax", run_validation=False, **options)
    assert os.listdir(tmp_path) == []


def test_there_is_nothing_to_tune(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="nothing to tune"):
        tune_bundle(tiny_model, tmp_path / "b", target="flax")


def test_where_flax_is_missing_the_error_says_what_to_install_before_the_work_begins(alone):
    program = """
import os, sys
sys.modules["flax"] = None
from vae_export import AutoencoderKL, export_bundle

AutoencoderKL.encode_moments = lambda *_: print("began to work")
try: export_bundle(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), "b", target="flax")
except Exception as error: print(type(error).__name__, error)
print(os.path.exists("b"))
"""
    said, written = alone(program)
    assert said.startswith("NotInstalled") and "pip install 'vae-export[flax]'" in said and written == "False"
