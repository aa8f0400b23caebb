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
    NumericsError,
    OutOfMemoryError,
    ShapeError,
    VaeError,
    open_vae,
)
from runtimes.images import to_float

ENCODER, DECODER = "vae_encoder/model.onnx", "vae_decoder/model.onnx"
# The same fp32 arithmetic in another order: sums of some hundred terms of order 1, a dozen layers deep.
TOLERANCE = 1e-5
# [B, h, w] in latents
SHAPES = [(1, 1, 1), (1, 8, 8), (3, 5, 7), (2, 1, 9)]
RNG = np.random.default_rng(0)


def images(batch=1, height=4, width=6):
    return RNG.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)


def latents(batch=1, height=4, width=6):
    return RNG.standard_normal((batch, 4, height, width)).astype(np.float32)


def pixels(batch=1, height=4, width=6):
    return RNG.integers(0, 256, (batch, 8 * height, 8 * width, 3), dtype=np.uint8)


def moments(vae, x):
    return vae.encode(x).latent_dist.parameters


def close_to(actual, tensor):
    return actual.shape == tuple(tensor.shape) and np.abs(np.asarray(actual) - tensor.numpy()).max() <= TOLERANCE


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_reference(vae, tiny_model, shape):
    x, z = images(*shape), latents(*shape)
    assert close_to(moments(vae, x), tiny_model.encode(torch.from_numpy(x))[0].parameters)
    assert close_to(vae.decode(z).sample, tiny_model.decode(torch.from_numpy(z))[0])


def test_outputs_are_as_in_diffusers(vae):
    x, z = images(), latents()
    (posterior,), (sample,) = vae.encode(x, return_dict=False), vae.decode(z, return_dict=False)
    assert np.array_equal(posterior.mode(), vae.encode(x).latent_dist.mode())
    assert np.array_equal(sample, vae.decode(z, generator=np.random.default_rng(0)).sample)
    seeds = [np.random.default_rng(7).standard_normal(posterior.mean.shape, dtype=np.float32) for _ in range(2)]
    assert np.array_equal(posterior.sample(np.random.default_rng(7)), posterior.mean + posterior.std * seeds[0])


def test_the_manifest_is_at_hand(vae, tiny_model):
    assert vae.config == tiny_model.config
    assert (vae.backend, vae.precision) == ("onnxruntime", "fp32")
    assert vae.spec["encoder"].input.name == "sample" and vae.spec["decoder"].output.shape[1] == 3
    assert "onnxruntime fp32" in repr(vae)


# Kinds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_a_tensor_of_any_float_type_is_answered_by_a_tensor(vae, dtype):
    x, z = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (images(2), latents(2)))
    for given, answer in ((x.requires_grad_(), moments(vae, x)), (z, vae.decode(z).sample)):
        assert isinstance(answer, torch.Tensor) and answer.dtype == torch.float32
        array = given.detach().float().numpy()
        expected = moments(vae, array) if given is x else vae.decode(array).sample
        assert np.array_equal(answer.numpy(), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_an_array_of_any_float_type_is_answered_by_an_array(vae, dtype):
    x = images(2).astype(dtype)
    answer = moments(vae, x)
    assert isinstance(answer, np.ndarray) and answer.dtype == np.float32
    assert np.array_equal(answer, moments(vae, x.astype(np.float32)))


class Exchanged:
    """An array of a library unknown to us: all it has is DLPack."""

    def __init__(self, array):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


@pytest.mark.parametrize(
    "make", [Exchanged, np.ndarray.tolist, np.asfortranarray, lambda x: np.flip(np.flip(x).copy())]
)
def test_whatever_holds_the_numbers_is_taken(vae, make):
    x = images(2)
    answer = moments(vae, make(x))
    assert isinstance(answer, np.ndarray) and np.array_equal(answer, moments(vae, x))


def test_inputs_are_left_as_they_are(vae):
    x, u = images(2, 9, 9), pixels()
    kept = x.copy(), u.copy()
    vae.enable_tiling(), vae.enable_slicing()
    moments(vae, x), moments(vae, torch.from_numpy(x)), vae.images_to_latents(u)
    assert np.array_equal(x, kept[0]) and np.array_equal(u, kept[1])


def test_io_binding_gives_the_results_of_the_host_path(vae):
    for shape in SHAPES:
        for graph, array in (("encoder", images(*shape)), ("decoder", latents(*shape))):
            for tensor in (torch.from_numpy(array), torch.from_numpy(array).mT):  # the second is not contiguous
                on_device = vae._run_on_device(graph, tensor)
                assert np.array_equal(on_device.numpy(), vae._run_on_host(graph, tensor.numpy()))


def test_eight_threads_get_what_one_gets(tiny_bundle):
    inputs = [images(b, h, w) for b, h, w in SHAPES] + [latents(b, h, w) for b, h, w in SHAPES]
    with open_vae(tiny_bundle) as vae:

        def call(i):
            x = inputs[i % len(inputs)]
            return moments(vae, x) if x.shape[1] == 3 else vae.decode(x).sample

        serial = [call(i) for i in range(len(inputs))]
        with ThreadPoolExecutor(8) as pool:
            rounds = list(pool.map(lambda thread: [(i, call(i)) for i in range(thread, thread + 20)], range(8)))
    assert all(np.array_equal(answer, serial[i % len(inputs)]) for answers in rounds for i, answer in answers)


# Images and scaled latents ------------------------------------------------------------------------------------------


PER_CHANNEL = {"latents_mean": [-1.5, 2.0, -1.0, 2.5], "latents_std": [8.5, 6.0, 6.5, 0.25]}  # as Playground 2.5
# config -> raw latents to scaled ones and back, as AutoencoderKL's pipelines do it
CONVENTIONS = {
    "scale and shift": ({}, lambda z: (z - 0.1) * 0.5, lambda z: z / 0.5 + 0.1),
    "scale": ({"shift_factor": None}, lambda z: z * 0.5, lambda z: z / 0.5),
    "mean and std": (
        PER_CHANNEL,
        lambda z: (z - columns("latents_mean")) * 0.5 / columns("latents_std"),
        lambda z: z * columns("latents_std") / 0.5 + columns("latents_mean"),
    ),
}


def columns(name):
    return np.float32(PER_CHANNEL[name]).reshape(1, 4, 1, 1)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_latents_are_scaled_as_the_config_says(bundle_copy, convention):
    config, scaled, raw = CONVENTIONS[convention]
    u, z = pixels(2), latents(2)
    with open_vae(bundle_copy(lambda manifest: manifest["config"].update(config))) as vae:
        posterior = vae.encode(to_float(u)).latent_dist
        # The order of three roundings of numbers up to 20.
        close = {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(vae.images_to_latents(u), scaled(posterior.mode()), **close)
        drawn = vae.images_to_latents(u, generator=np.random.default_rng(7))
        np.testing.assert_allclose(drawn, scaled(posterior.sample(np.random.default_rng(7))), **close)
        back = np.clip(vae.decode(raw(z)).sample.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255
        for given in (z, torch.from_numpy(z)):
            restored = vae.latents_to_images(given)
            assert restored.dtype == np.uint8 and restored.shape == (2, 32, 48, 3)
            assert np.abs(restored - back).max() <= 0.51  # rounding, and the order of roundings before it


def test_images_of_any_kind_become_latents(vae, tmp_path):
    u = pixels()[0]
    Image.fromarray(u).save(tmp_path / "a.png")
    expected = vae.images_to_latents(u)
    assert expected.dtype == np.float32 and expected.shape == (1, 4, 4, 6)
    for given in (
        u[None],
        [u],
        Image.fromarray(u),
        [Image.fromarray(u)],
        tmp_path / "a.png",
        [str(tmp_path / "a.png")],
    ):
        assert np.array_equal(vae.images_to_latents(given), expected)


def test_one_generator_per_sample_frees_a_draw_from_its_batch(vae):
    u = pixels(3)
    together = vae.images_to_latents(u, generator=[np.random.default_rng(seed) for seed in range(3)])
    alone = vae.images_to_latents(u[1:2], generator=[np.random.default_rng(1)])
    assert np.abs(together[1] - alone[0]).max() <= TOLERANCE


def test_an_unknown_scaling_factor_is_never_guessed(bundle_copy):
    with open_vae(bundle_copy(lambda manifest: manifest["config"].update(scaling_factor=None))) as vae:
        for use in (lambda: vae.images_to_latents(pixels()), lambda: vae.latents_to_images(latents())):
            with pytest.raises(ConfigError, match="scaling_factor"):
                use()
        assert vae.decode(vae.encode(images()).latent_dist.mode()).sample.shape == (1, 3, 32, 48)


# Misuse -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("encode", np.zeros((1, 3, 1001, 64), np.float32), "height 1001 is not a multiple of 8; pad to 1008"),
        ("encode", np.zeros((1, 3, 64, 7), np.float32), "width 7 is not a multiple of 8; pad to 8"),
        ("encode", torch.zeros(1, 3, 9, 8), "height 9 is not a multiple of 8; pad to 16"),
        ("encode", np.zeros((1, 4, 64, 64), np.float32), "[B, 3, height, width], not [1, 4, 64, 64]"),
        ("encode", np.zeros((1, 64, 64, 3), np.float32), "not [1, 64, 64, 3]"),
        ("encode", np.zeros((3, 64, 64), np.float32), "not [3, 64, 64]"),
        ("encode", np.zeros((0, 3, 64, 64), np.float32), "not [0, 3, 64, 64]"),
        ("encode", torch.zeros(0, 3, 64, 64), "not [0, 3, 64, 64]"),
        ("encode", np.zeros((1, 3, 0, 64), np.float32), "not [1, 3, 0, 64]"),
        ("encode", np.zeros((1, 3, 64, 64), np.uint8), "not uint8; uint8 images go to images_to_latents"),
        ("encode", torch.zeros(1, 3, 64, 64, dtype=torch.int32), "not torch.int32"),
        ("encode", np.zeros((1, 3, 64, 64), np.complex64), "not complex64"),
        ("encode", [[1.0, 2.0], [3.0]], "cannot be read as an array"),
        ("encode", None, "not object"),
        ("decode", np.zeros((1, 3, 8, 8), np.float32), "[B, 4, height, width], not [1, 3, 8, 8]"),
        ("decode", np.zeros((4, 8, 8), np.float32), "not [4, 8, 8]"),
        ("decode", np.zeros((1, 4, 8, 8), np.int64), "not int64"),
        ("latents_to_images", torch.zeros(1, 16, 8, 8), "not [1, 16, 8, 8]"),
        ("images_to_latents", np.zeros((1, 60, 64, 3), np.uint8), "height 60 is not a multiple of 8; pad to 64"),
        ("images_to_latents", np.zeros((1, 64, 64, 3), np.float32), "not float32"),
    ],
)
def test_a_wrong_input_is_answered_with_the_value_and_the_rule(vae, method, given, says):
    with pytest.raises(ShapeError, match=re.escape(says)):
        getattr(vae, method)(given)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_nan_is_reported_where_it_is_asked_for(vae, tiny_bundle, kind):
    x, z = images(), latents()
    x[0, 0, 0, 0], z[0, 0, 0, 0] = np.nan, np.nan
    assert np.isnan(np.asarray(moments(vae, kind(x)))).any()
    with open_vae(tiny_bundle, check_finite=True) as strict:
        with pytest.raises(NumericsError, match="encoder of this fp32 bundle gave NaN"):
            strict.encode(kind(x))
        with pytest.raises(NumericsError, match="decoder"):
            strict.decode(kind(z))
        strict.decode(kind(latents()))


def test_a_closed_vae_says_so(tiny_bundle):
    with open_vae(tiny_bundle) as vae:
        pass
    vae.close()
    assert "closed" in repr(vae)
    for method, given in (
        ("encode", images()),
        ("decode", latents()),
        ("images_to_latents", pixels()),
        ("latents_to_images", latents()),
    ):
        with pytest.raises(VaeError, match="closed"):
            getattr(vae, method)(given)


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
def test_too_little_memory_is_named_and_survived(vae):
    small, soft_hard = latents(), resource.getrlimit(resource.RLIMIT_AS)
    expected = vae.decode(small).sample
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), soft_hard[1]))
    try:
        with pytest.raises(OutOfMemoryError, match=r"decoder of \[1, 4, 128, 128\].*enable_tiling"):
            vae.decode(latents(1, 128, 128))  # its attention takes 1 GiB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, soft_hard)
    assert np.array_equal(vae.decode(small).sample, expected)


# Opening ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here")
def test_a_missing_gpu_package_is_named_and_nothing_falls_back(tiny_bundle, device):
    with pytest.raises(BackendUnavailable, match=re.escape("pip install 'vae-export[gpu]'")):
        open_vae(tiny_bundle, device=device)


@pytest.mark.parametrize("device", ["tpu", "cpu:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_named_with_the_known(tiny_bundle, device):
    with pytest.raises(BackendUnavailable, match=f"'cuda:N', not {device!r}"):
        open_vae(tiny_bundle, device=device)


def test_a_backend_must_be_known_and_open_the_target(tiny_bundle, monkeypatch):
    with pytest.raises(BackendUnavailable, match="'paper'; known are .*onnxruntime"):
        open_vae(tiny_bundle, backend="paper")
    monkeypatch.setitem(runtimes.BACKENDS, "paper", "paper:Paper")
    with pytest.raises(CompatibilityError, match="paper does not open onnx bundles"):
        open_vae(tiny_bundle, backend="paper")
    monkeypatch.setattr(runtimes, "BACKENDS_OF_TARGET", {})
    with pytest.raises(CompatibilityError, match="onnx"):
        open_vae(tiny_bundle)
    open_bundle = runtimes.BACKENDS["onnxruntime"]
    assert open_bundle.startswith("runtimes.onnxruntime:")


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
    assert capfd.readouterr().err == ""  # the exception says it, and nothing else does


def test_a_graph_cannot_bring_weights_from_outside(bundle_copy, tiny_bundle, tmp_path, monkeypatch):
    graph = onnx.load(tiny_bundle / ENCODER)
    onnx.save(graph, tmp_path / "a.onnx", save_as_external_data=True, location="weights.bin", size_threshold=4096)
    path = bundle_copy(files={ENCODER: (tmp_path / "a.onnx").read_bytes()})
    for folder in (tmp_path, path / "vae_encoder"):  # where the weights are, and where they might be
        monkeypatch.chdir(folder)
        with pytest.raises(CompatibilityError, match="[Ee]xternal data"):
            open_vae(path)
