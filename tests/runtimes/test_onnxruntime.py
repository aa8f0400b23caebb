"""Tests runtimes/onnxruntime.py: the promises of every backend, and what is ONNX Runtime's own."""

import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from runtimes import (
    BackendUnavailable,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    OutOfMemoryError,
    open_vae,
)
from runtimes.backends import BACKENDS, BACKENDS_OF_TARGET
from tests.helpers.backend_contract import BackendContract
from tests.helpers.inputs import RNG, SHAPES, images, latents
from tests.helpers.little_memory import little_memory
from tests.helpers.parsed_bytes import parsed_by_onnxruntime  # noqa: F401  (a fixture)

ENCODER, DECODER = "vae_encoder/model.onnx", "vae_decoder/model.onnx"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class TestOnnxRuntime(BackendContract):
    backend = "onnxruntime"
    files = (ENCODER, DECODER)
    options = {"threads": 1}  # noqa: RUF012
    count_options = ("threads",)
    unknown_devices = ("tpu", "cpu:", "cuda:x", "")
    known_devices = "'cuda:N'"
    loads = frozenset({"onnxruntime"})
    needs = ("onnxruntime",)
    extra = "cpu"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_io_binding_gives_the_results_of_the_host_path(vae, shape):
    for graph, array in (("encoder", images(*shape)), ("decoder", latents(*shape))):
        for tensor in (torch.from_numpy(array), torch.from_numpy(array).mT):  # the second is not contiguous
            assert np.array_equal(vae._run_on_device(graph, tensor), vae._run_on_host(graph, tensor.numpy()))


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
def test_too_little_memory_is_named_and_survived(vae, capfd):
    z = latents()
    expected = vae.decode(z).sample
    with pytest.raises(OutOfMemoryError, match=r"decoder of \[1, 4, 128, 128\].*enable_tiling"), little_memory():
        vae.decode(latents(1, 128, 128))  # its attention takes 1 GiB
    assert np.array_equal(vae.decode(z).sample, expected)
    assert capfd.readouterr().err == ""  # the exception says it, and nothing else does


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here")
def test_a_missing_gpu_package_is_named_and_nothing_falls_back(tiny_bundle):
    with pytest.raises(BackendUnavailable, match=re.escape("pip install 'vae-export[gpu]'")):
        open_vae(tiny_bundle, device="cuda")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "cuda:1"}, {"device_id": 1, "use_tf32": 0}),
        ({"device": "cuda", "allow_tf32": True}, {"device_id": 0, "use_tf32": 1}),
        ({"device": "cpu"}, {}),
    ],
    ids=str,
)
def test_fp32_is_fp32_on_a_gpu_unless_tf32_is_asked_for(tiny_bundle, monkeypatch, options, expected):
    """What ONNX Runtime is asked for; `tests/gpu` shows what a GPU makes of it."""
    asked = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]  # it has no types
        def __init__(self, data, options, providers):
            asked.extend(providers)
            super().__init__(data, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [asked[-1][0]]

    preloaded = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr("runtimes.onnxruntime._preload_cuda", lambda: preloaded.append(True))
    with open_vae(tiny_bundle, **options) as vae:
        kind = vae.device.partition(":")[0]
        assert asked == 2 * [(PROVIDERS[kind], expected)]
        assert bool(preloaded) == (kind == "cuda")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tf32_is_of_fp32_on_a_gpu_alone(tiny_bundle, bundle_copy, precision):
    bundle, device = (tiny_bundle, "cpu") if precision == "fp32" else (bundle_copy(says_fp16), "cuda")
    with pytest.raises(ConfigError, match=f"allow_tf32 is for fp32 bundles on cuda, not for {precision} on {device}"):
        open_vae(bundle, device=device, allow_tf32=True)


def says_fp16(manifest):
    manifest["precision"] = "fp16"


@pytest.mark.parametrize("device", ["CPU", " Cpu", torch.device("cpu")])
def test_a_device_may_be_written_in_any_case(tiny_bundle, device):
    with open_vae(tiny_bundle, device=device) as vae:
        assert vae.device == "cpu"


def test_a_backend_must_be_known_and_open_the_target(tiny_bundle, monkeypatch):
    with pytest.raises(BackendUnavailable, match=r"'paper'; known are .*onnxruntime"):
        open_vae(tiny_bundle, backend="paper")
    monkeypatch.setitem(BACKENDS._places, "paper", "paper:Paper")
    with pytest.raises(CompatibilityError, match="paper does not open onnx bundles"):
        open_vae(tiny_bundle, backend="paper")
    monkeypatch.delitem(BACKENDS_OF_TARGET, "onnx")
    with pytest.raises(CompatibilityError, match="opens no onnx bundles"):
        open_vae(tiny_bundle)


GARBAGE = {
    "nothing": lambda encoder, decoder: b"",
    "text": lambda encoder, decoder: b"not a graph\n" * 100,
    "noise": lambda encoder, decoder: RNG.bytes(10_000),
    "half a graph": lambda encoder, decoder: encoder[: len(encoder) // 2],
    "the other graph": lambda encoder, decoder: decoder,
    "other names": lambda encoder, decoder: encoder.replace(b"latent_parameters", b"latent_parametric"),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_graph_that_is_none_is_refused_even_with_the_right_hash(bundle_copy, tiny_bundle, capfd, garbage):
    data = GARBAGE[garbage]((tiny_bundle / ENCODER).read_bytes(), (tiny_bundle / DECODER).read_bytes())
    with pytest.raises(CompatibilityError, match=re.escape(ENCODER)):
        open_vae(bundle_copy(files={ENCODER: data}))
    assert capfd.readouterr().err == ""


def test_a_graph_cannot_bring_weights_from_outside(bundle_copy, tiny_bundle, tmp_path, monkeypatch):
    graph, file = onnx.load(tiny_bundle / ENCODER), tmp_path / "a.onnx"
    onnx.save(graph, file, save_as_external_data=True, location="weights.bin", size_threshold=4096)
    path = bundle_copy(files={ENCODER: file.read_bytes()})
    monkeypatch.chdir(tmp_path)  # where ONNX Runtime would find them
    with pytest.raises(IntegrityError, match="external data"):
        open_vae(path)
