"""What exporting takes, and that the state of PyTorch in the process changes nothing in what comes out."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVae
from torch import nn

from runtimes.errors import ConfigError
from vae_export import AutoencoderKL, export_bundle, load_model, measure_ranges, tune_bundle, validate_bundle
from vae_export.photos import EMBEDDED as PHOTOS

MODELS = {
    "None": (lambda model: None, "None.*load_model"),
    "path": (lambda model: Path("sdxl"), r"sdxl.*load_model\(path\)"),
    "text": (lambda model: "sdxl", r"sdxl.*load_model\(path\)"),
    "diffusers": (lambda model: DiffusersVae(norm_num_groups=8), "diffusers.*AutoencoderKL.*save_pretrained"),
    "compiled": (lambda model: torch.compile(model, backend="eager"), "OptimizedModule.*load_model"),
    "wrapped": (lambda model: nn.Sequential(model), "Sequential.*load_model"),
    "class": (lambda model: AutoencoderKL, "not a reference model of"),
    "half": (lambda model: copy.deepcopy(model).half(), r"torch\.float16.*fp32"),
    "bfloat16": (lambda model: copy.deepcopy(model).bfloat16(), r"torch\.bfloat16.*fp32"),
    "double": (lambda model: copy.deepcopy(model).double(), r"torch\.float64.*fp32"),
    "meta": (lambda model: copy.deepcopy(model).to("meta"), "meta device"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_not_taken_is_named_with_the_way_out(kind, two_level_model, tmp_path):
    make, message = MODELS[kind]
    model = make(two_level_model)
    for function in (export_bundle, tune_bundle):
        with pytest.raises(ConfigError, match=message):
            function(model, tmp_path / "b")
    with pytest.raises(ConfigError, match=message):
        measure_ranges(model)
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_model_in_half_precision_is_named(two_level_model, tmp_path):
    model = copy.deepcopy(two_level_model)
    model.decoder.conv_out.half()
    with pytest.raises(ConfigError, match=r"decoder\.conv_out\.weight is torch\.float16"):
        export_bundle(model, tmp_path / "b")


@pytest.mark.parametrize("out", [None, 3, b"b", ["b"]])
def test_an_output_that_is_no_path_is_refused(two_level_model, out):
    with pytest.raises(ConfigError, match="out = "):
        export_bundle(two_level_model, out)


def test_photographs_may_be_named_by_a_str(two_level_model, tmp_path):
    export_bundle(two_level_model, tmp_path / "b", precision="fp16", calibrate=str(PHOTOS), run_validation=False)
    with pytest.raises(ConfigError, match="calibrate = 3"):
        export_bundle(two_level_model, tmp_path / "c", precision="fp16", calibrate=3)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def products(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def convolutions(precision):
    settings: Any = torch.backends.mkldnn  # its types lack `conv`
    settings.conv.fp32_precision = precision
    try:
        yield
    finally:
        settings.conv.fp32_precision = "none"


STATES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "inside of a device": lambda: torch.device("meta"),
    "medium products": lambda: products("medium"),
    "bf16 convolutions": lambda: convolutions("bf16"),
}


def contents(bundle):
    return {name: entry.sha256 for name, entry in bundle.manifest.files.items()}


@pytest.fixture(scope="module")
def saved(two_level_model, tmp_path_factory):
    """The model as a directory, and what its fp16 bundle consists of."""
    path = tmp_path_factory.mktemp("saved")
    two_level_model.save_pretrained(path / "m")
    return path / "m", export_bundle(load_model(path / "m"), path / "b", precision="fp16")


@pytest.mark.parametrize("state", STATES)
def test_the_state_of_the_process_changes_nothing(state, saved, tmp_path):
    directory, expected = saved
    with STATES[state]():
        bundle = export_bundle(load_model(directory), tmp_path / "b", precision="fp16")
        measured = validate_bundle(tmp_path / "b")
        dtype, autocast, grad = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    assert contents(bundle) == contents(expected)
    assert bundle.manifest.validation == expected.manifest.validation
    assert all(measurement.passed for measurement in measured)
    with STATES[state]():  # and is left as it was
        now = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        assert now == (dtype, autocast, grad)
