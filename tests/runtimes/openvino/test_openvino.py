"""Tests runtimes/openvino.py: the promises of every backend, and what is OpenVINO's own."""

import sys

import numpy as np
import pytest
import torch

from runtimes import (
    BackendUnavailable,
    NotInstalled,
    OutOfMemoryError,
    open_vae,
)
from tests.helpers.backend_contract import BackendContract
from tests.helpers.forms import FORMS
from tests.helpers.inputs import TOLERANCE, images, latents, results
from tests.helpers.little_memory import little_memory
from tests.helpers.references import alive, cases
from tests.helpers.without_torch import BANNED
from vae_export.comparison import THRESHOLDS, compare, opened_bundle
from vae_export.rewrites.apply import rewrite

backend = pytest.importorskip("runtimes.openvino", exc_type=NotInstalled)
ov = backend.ov

FILES = [f"vae_{graph}/openvino_model.{suffix}" for graph in ("encoder", "decoder") for suffix in ("xml", "bin")]


class TestOpenVino(BackendContract):
    backend = "openvino"
    files = tuple(FILES)
    options = {"threads": 1, "max_shapes": 16}  # noqa: RUF012
    count_options = ("threads", "max_shapes")
    unknown_devices = ("cuda", "gpu:0", "AUTO:GPU,CPU", "")
    known_devices = "'cpu', 'gpu', 'gpu.N' or 'npu'"
    loads = frozenset({"openvino"})
    never_loads = frozenset(BANNED | {"onnxruntime"})
    needs = ("openvino",)
    extra = "openvino"


# Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_bundles_keep_to_the_thresholds_of_validation(openvino_bundle, tiny_model, precision):
    arrays = [make(*shape) for shape in ((1, 1, 1), (3, 5, 7), (1, 9, 4)) for make in (images, latents)]
    with open_vae(openvino_bundle(precision)) as vae:
        assert vae.encode(arrays[0])[0].parameters.dtype == vae.decode(arrays[1])[0].dtype == np.float32
        assert compare(list(cases(tiny_model, arrays)), "openvino", opened_bundle(vae), precision)


def test_fp16_is_how_weights_are_stored_and_fp32_how_it_computes_on_a_cpu(openvino_bundle, tiny_model):
    rounded = rewrite(tiny_model, FORMS["openvino", "fp16"])
    for parameter in rounded.parameters():
        parameter.copy_(parameter.half())
    x, z = images(2, 5, 3), latents(2, 5, 3)
    with open_vae(openvino_bundle("fp16")) as vae:
        for ours, theirs in zip(
            results(vae, x, z), results(rounded, torch.from_numpy(x), torch.from_numpy(z)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)


def test_fp32_is_computed_in_fp32_even_where_the_plugin_prefers_bf16(vae, tiny_model, compiled):
    z = latents(1, 8, 8)
    expected = tiny_model.decode_latents(torch.from_numpy(z)).numpy()
    assert np.abs(vae.decode(z).sample - expected).max() < TOLERANCE
    assert alive(compiled)[0].get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("the rest needs a CPU with bf16")
    by_itself = ov.Core().compile_model(vae._graphs["decoder"].model().clone(), "CPU")
    assert np.abs(by_itself([z])[0] - expected).max() > 100 * TOLERANCE  # else this test could not fail


@pytest.mark.parametrize(("precision", "least"), [("fp32", 75), ("bf16", THRESHOLDS["bf16"].psnr_db)])
def test_a_picture_of_one_colour_is_encoded_as_by_the_reference(openvino_bundle, tiny_model, precision, least):
    """Grey is 0, and its first map flat but for its borders: the mean of a group is 186 times its deviation.

    That costs 45 dB of the 120 or more that fp32 has otherwise; a difference of squares would lose them twice.
    """
    arrays = [np.full((1, 3, 128, 128), colour, np.float32) for colour in (-1, 0, 1)]
    with open_vae(openvino_bundle(precision)) as vae:
        for case in cases(tiny_model, arrays):
            off = vae.encode(case.array)[0].parameters.astype(np.float64) - case.expected
            assert 20 * np.log10(np.ptp(case.expected) / np.sqrt(np.mean(off**2))) >= least


# Devices and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "gpu.0", "npu", "gpu.7"])
def test_a_device_that_is_not_here_is_named_and_nothing_falls_back(tiny_bundle, device):
    found = backend.OpenVinoVae.check_devices()
    assert found["cpu"] == "works"
    if found[device.partition(".")[0]] == "works" and device != "gpu.7":
        pytest.skip(f"{device} is here")
    with pytest.raises(BackendUnavailable, match=f"finds no device '{device}' with its drivers, only .*CPU"):
        open_vae(tiny_bundle, device=device)


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
def test_too_little_memory_is_named_and_survived(vae, capfd):
    z = latents()
    expected = vae.decode(z).sample
    with pytest.raises(OutOfMemoryError, match=r"\[1, 4, 128, 128\].* memory of cpu.*enable_tiling"), little_memory():
        vae.decode(latents(1, 128, 128))  # the largest of its maps alone take 128 MiB each
    assert np.array_equal(vae.decode(z).sample, expected)
    assert capfd.readouterr().err == ""  # the exception says it, and nothing else does


# What is loaded, and what leaves the machine ----------------------------------------------------------------------


def test_opening_a_bundle_reports_to_nobody(alone, tiny_bundle, tmp_path):
    """OpenVINO's package tells Google Analytics of every import, unless it is kept from it."""
    program = "import sys, runtimes\nruntimes.open_vae(sys.argv[1]).close()\nprint(*sys.modules)"
    (loaded,) = alone(program, tiny_bundle)
    assert "openvino_telemetry.main" not in loaded.split()
    assert not (tmp_path / "home" / "intel").exists(), "an identity for Google Analytics was left in the home directory"


def test_a_program_can_import_openvinos_telemetry_afterwards(alone, tiny_bundle):
    """It is hidden while OpenVINO is imported, not taken from the program."""
    pytest.importorskip("openvino_telemetry")
    program = """
import sys, runtimes
runtimes.open_vae(sys.argv[1]).close()
assert "openvino_telemetry" not in sys.modules
import openvino_telemetry
print(openvino_telemetry.__name__)
"""
    assert alone(program, tiny_bundle) == ["openvino_telemetry"]


@pytest.mark.parametrize("device", ["CPU", "Cpu"])
def test_a_device_may_be_written_as_openvino_does(tiny_bundle, device):
    with open_vae(tiny_bundle, device=device) as vae:
        assert vae.device == "cpu"
