"""An ONNX bundle in ONNX Runtime: the reference's numbers, and every misuse answered in words."""

import re
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import runtimes
from runtimes import (
    BackendUnavailable,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    NumericsError,
    OutOfMemoryError,
    ShapeError,
    VaeError,
    open_vae,
)
from runtimes.backends import BACKENDS, BACKENDS_OF_TARGET
from runtimes.images import to_float

ENCODER, DECODER = "vae_encoder/model.onnx", "vae_decoder/model.onnx"
# The same fp32 arithmetic in another order: sums of some hundred terms of order 1, a dozen layers deep; and weights
# of the upsampling added before they are multiplied.
TOLERANCE = 2e-5
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SHAPES = [(1, 1, 1), (1, 8, 8), (3, 5, 7), (2, 1, 9)]  # [B, h, w] in latents
RNG = np.random.default_rng(0)
KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def images(batch=1, height=4, width=6):
    return RNG.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)


def latents(batch=1, height=4, width=6):
    return RNG.standard_normal((batch, 4, height, width)).astype(np.float32)


def pixels(batch=1, height=4, width=6):
    return RNG.integers(0, 256, (batch, 8 * height, 8 * width, 3), dtype=np.uint8)


def results(vae, x, z):
    return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_reference(vae, tiny_model, shape):
    x, z = images(*shape), latents(*shape)
    for ours, theirs in zip(
        results(vae, x, z), results(tiny_model, torch.from_numpy(x), torch.from_numpy(z)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)


def test_the_api_is_that_of_diffusers_and_the_manifest_is_at_hand(vae, tiny_model):
    x, z = images(), latents()
    (posterior,), (sample,) = vae.encode(x, return_dict=False), vae.decode(z, return_dict=False)
    assert np.array_equal(posterior.parameters, vae.encode(x)[0].parameters)
    assert np.array_equal(sample, vae.decode(z, generator=np.random.default_rng(0)).sample)
    assert (vae.config, vae.backend, vae.precision) == (tiny_model.config, "onnxruntime", "fp32")
    assert vae.spec["encoder"].input.name == "sample" and vae.spec["decoder"].output.shape[1] == 3


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in (np.asarray, torch.from_numpy) for dtype in ("float16", "float32", "float64")]
    + [(torch.from_numpy, "bfloat16")],
)
def test_every_float_type_is_taken_and_answered_in_kind(vae, kind, dtype):
    x, z = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (images(2), latents(2)))
    expected = results(vae, x.float().numpy(), z.float().numpy())
    given = (x.numpy(), z.numpy()) if kind is np.asarray else (x, z)
    for answer, right in zip(results(vae, *given), expected, strict=True):
        assert type(answer) is type(kind(right)) and "float32" in str(answer.dtype)
        assert np.array_equal(answer, right)


class Exchanged:
    """An array of a library unknown to us: all it has is DLPack."""

    def __init__(self, array):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def reversed_view(x):
    return np.flip(np.flip(x).copy())


@pytest.mark.parametrize("make", [Exchanged, np.ndarray.tolist, np.asfortranarray, reversed_view])
def test_whatever_holds_the_numbers_is_taken_and_left_as_it_is(vae, make):
    x, z = images(2, 9, 9), latents(2, 9, 9)
    kept = x.copy(), z.copy()
    vae.enable_tiling(), vae.enable_slicing()
    for answer, right in zip(results(vae, make(x), make(z)), results(vae, x, z), strict=True):
        assert isinstance(answer, np.ndarray) and np.array_equal(answer, right)
    assert np.array_equal(x, kept[0]) and np.array_equal(z, kept[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_io_binding_gives_the_results_of_the_host_path(vae, shape):
    for graph, array in (("encoder", images(*shape)), ("decoder", latents(*shape))):
        for tensor in (torch.from_numpy(array), torch.from_numpy(array).mT):  # the second is not contiguous
            assert np.array_equal(vae._run_on_device(graph, tensor), vae._run_on_host(graph, tensor.numpy()))


@pytest.mark.parametrize("threads", [0, -1, "two", 1.5, True])
def test_a_number_of_threads_that_is_none_is_refused(tiny_bundle, threads):
    with pytest.raises(ConfigError, match=f"threads must be a whole number of at least 1, not {threads!r}"):
        open_vae(tiny_bundle, threads=threads)


def test_eight_threads_get_what_one_gets(tiny_bundle):
    inputs = [make(*shape) for make in (images, latents) for shape in SHAPES]
    with open_vae(tiny_bundle) as vae, ThreadPoolExecutor(8) as pool:

        def call(i):
            x = inputs[i % len(inputs)]
            return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]

        serial = [call(i) for i in range(len(inputs))]
        rounds = pool.map(lambda thread: [(i, call(i)) for i in range(thread, thread + 20)], range(8))
        assert all(np.array_equal(answer, serial[i % len(inputs)]) for answers in rounds for i, answer in answers)


MEAN, STD = [-1.5, 2.0, -1.0, 2.5], [8.5, 6.0, 6.5, 0.25]
M, S = (np.float32(values).reshape(1, 4, 1, 1) for values in (MEAN, STD))
# What the config says, and how pipelines then scale raw latents and go back.
CONVENTIONS = {
    "scale and shift": ({}, lambda z: (z - 0.1) * 0.5, lambda z: z / 0.5 + 0.1),
    "scale": ({"shift_factor": None}, lambda z: z * 0.5, lambda z: z / 0.5),
    "Playground": ({"latents_mean": MEAN, "latents_std": STD}, lambda z: (z - M) * 0.5 / S, lambda z: z * S / 0.5 + M),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_latents_are_scaled_as_the_config_says(bundle_copy, convention):
    config, scaled, raw = CONVENTIONS[convention]
    u, z = pixels(2), latents(2)
    close = {"rtol": 1e-5, "atol": 1e-5}  # the order of three roundings of numbers up to 20
    with open_vae(bundle_copy(lambda manifest: manifest["config"].update(config))) as vae:
        posterior = vae.encode(to_float(u)).latent_dist
        np.testing.assert_allclose(vae.images_to_latents(u), scaled(posterior.mode()), **close)
        drawn = vae.images_to_latents(u, generator=np.random.default_rng(7))
        np.testing.assert_allclose(drawn, scaled(posterior.sample(np.random.default_rng(7))), **close)
        back = np.clip(vae.decode(raw(z)).sample.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255
        for given in (z, torch.from_numpy(z)):
            restored = vae.latents_to_images(given)
            assert type(restored) is type(given) and str(restored.dtype).endswith("uint8")
            assert np.abs(np.asarray(restored) - back).max() <= 0.51  # rounded to the nearest


def test_images_of_any_kind_become_latents(vae, tmp_path):
    u, path = pixels()[0], tmp_path / "a.png"
    Image.fromarray(u).save(path)
    expected = vae.images_to_latents(u)
    assert expected.dtype == np.float32 and expected.shape == (1, 4, 4, 6)
    for given in (u[None], [u], Image.fromarray(u), [Image.fromarray(u)], path, [str(path)]):
        assert np.array_equal(vae.images_to_latents(given), expected)


def test_an_unknown_scaling_factor_is_never_guessed(bundle_copy):
    with open_vae(bundle_copy(lambda manifest: manifest["config"].update(scaling_factor=None))) as vae:
        for use, given in ((vae.images_to_latents, pixels()), (vae.latents_to_images, latents())):
            with pytest.raises(ConfigError, match="scaling_factor"):
                use(given)
        results(vae, images(), latents())  # raw latents need none


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("encode", zeros(1, 3, 1001, 64), "height 1001 is not a multiple of 8; pad to 1008"),
        ("encode", torch.zeros(1, 3, 64, 7), "width 7 is not a multiple of 8; pad to 8"),
        ("encode", zeros(1, 4, 64, 64), "[B, 3, height, width], not [1, 4, 64, 64]"),
        ("encode", zeros(1, 64, 64, 3), "not [1, 64, 64, 3]"),
        ("encode", zeros(3, 64, 64), "not [3, 64, 64]"),
        ("encode", zeros(0, 3, 64, 64), "not [0, 3, 64, 64]"),
        ("encode", torch.zeros(1, 3, 0, 64), "not [1, 3, 0, 64]"),
        ("encode", zeros(1, 3, 64, 64, dtype=np.uint8), "not uint8; uint8 images go to images_to_latents"),
        ("encode", torch.zeros(1, 3, 64, 64, dtype=torch.int32), "not torch.int32"),
        ("encode", zeros(1, 3, 64, 64, dtype=np.complex64), "not complex64"),
        ("encode", [[1.0, 2.0], [3.0]], "cannot be read as an array"),
        ("encode", None, "not object"),
        ("decode", zeros(1, 3, 8, 8), "[B, 4, height, width], not [1, 3, 8, 8]"),
        ("decode", zeros(4, 8, 8), "not [4, 8, 8]"),
        ("decode", zeros(1, 4, 8, 8, dtype=np.int64), "not int64"),
        ("latents_to_images", torch.zeros(1, 16, 8, 8), "not [1, 16, 8, 8]"),
        ("images_to_latents", zeros(1, 60, 64, 3, dtype=np.uint8), "height 60 is not a multiple of 8; pad to 64"),
        ("images_to_latents", zeros(1, 64, 64, 3), "not float32"),
    ],
)
def test_a_wrong_input_is_answered_with_the_value_and_the_rule(vae, method, given, says):
    with pytest.raises(ShapeError, match=re.escape(says)):
        getattr(vae, method)(given)


@KINDS
def test_nan_is_reported_where_it_is_asked_for(vae, tiny_bundle, kind):
    x, z = kind(images()), kind(latents())
    x[0, 0, 0, 0] = z[0, 0, 0, 0] = np.nan
    assert all(np.isnan(np.asarray(result)).any() for result in results(vae, x, z))
    with open_vae(tiny_bundle, check_finite=True) as strict:
        results(strict, images(), latents())
        for graph, use, given in (("encoder", strict.encode, x), ("decoder", strict.decode, z)):
            with pytest.raises(NumericsError, match=f"{graph} of this fp32 bundle gave NaN"):
                use(given)


def test_a_closed_vae_says_so(vae):
    vae.close()
    vae.close()
    for use, given in (
        (vae.encode, images()),
        (vae.decode, latents()),
        (vae.images_to_latents, pixels()),
        (vae.latents_to_images, latents()),
    ):  # fmt: skip
        with pytest.raises(VaeError, match="closed"):
            use(given)


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
def test_too_little_memory_is_named_and_survived(vae, capfd):
    z, (soft, hard) = latents(), resource.getrlimit(resource.RLIMIT_AS)
    expected = vae.decode(z).sample
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        with pytest.raises(OutOfMemoryError, match=r"decoder of \[1, 4, 128, 128\].*enable_tiling"):
            vae.decode(latents(1, 128, 128))  # its attention takes 1 GiB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
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

    class Session(onnxruntime.InferenceSession):
        def __init__(self, data, options, providers):
            asked.extend(providers)
            super().__init__(data, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [asked[-1][0]]

    preloaded = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(runtimes.onnxruntime, "_preload_cuda", lambda: preloaded.append(True))
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


@pytest.mark.parametrize("device", ["tpu", "cpu:", "cuda:x", ""])
def test_an_unknown_device_is_named_with_the_known(tiny_bundle, device):
    with pytest.raises(BackendUnavailable, match=f"'cuda:N', not {device!r}"):
        open_vae(tiny_bundle, device=device)


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
