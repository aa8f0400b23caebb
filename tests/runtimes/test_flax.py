"""Tests runtimes/flax/runtime.py: the promises of every backend, and what is refused before it is compiled."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtimes import BackendUnavailable, CompatibilityError, IntegrityError, NotInstalled, VaeError, open_vae
from tests.helpers.backend_contract import BackendContract
from tests.helpers.inputs import TOLERANCE, images, latents, results
from tests.helpers.without_torch import BANNED

backend = pytest.importorskip("runtimes.flax.runtime", exc_type=NotInstalled)

import jax  # noqa: E402
from jax import export  # noqa: E402

from runtimes.flax import params as flax_params  # noqa: E402

ENCODER, DECODER = "vae_encoder/model.stablehlo", "vae_decoder/model.stablehlo"
MSGPACK = flax_params.FLAX_FILE
FILES = (MSGPACK, ENCODER, DECODER)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_bundle(flax_bundle):
    """Instead of the ONNX bundle: `vae` and `bundle_copy` are made of this one here."""
    return flax_bundle("fp32")


@pytest.fixture
def vae(tiny_bundle):
    """The tiny bundle, opened for this test alone: it may tune and close it."""
    with open_vae(tiny_bundle) as runtime:
        yield runtime


@pytest.fixture
def parsed(monkeypatch):
    """All bytes that reach the parsers of JAX and Flax, in a list."""
    seen, restore, deserialize = [], flax_params.serialization.msgpack_restore, export.deserialize
    spy = lambda parse: lambda data, *rest: (seen.append(bytes(data)), parse(data, *rest))[1]  # noqa: E731
    monkeypatch.setattr(flax_params.serialization, "msgpack_restore", spy(restore))
    monkeypatch.setattr(export, "deserialize", spy(deserialize))
    return seen


USE = """
with runtimes.open_vae(sys.argv[1]) as vae:
    latents = vae.images_to_latents(np.zeros((2, 8, 16, 3), np.uint8), generator=np.random.default_rng(0))
    print(vae.latents_to_images(latents).shape)
"""


class TestFlax(BackendContract):
    backend = "flax"
    files = FILES
    options = {"max_shapes": 16}  # noqa: RUF012  (so that no shape is compiled twice)
    count_options = ("max_shapes",)
    unknown_devices = ("cuda", "gpu.1", "cpu:", "")
    known_devices = "'gpu:1'"
    loads = frozenset({"jax"})
    never_loads = frozenset(BANNED | {"onnxruntime"})
    needs = ("jax", "flax", "flatbuffers")
    extra = "flax"
    use = USE  # no tiles: each of their shapes would be compiled
    use_prints = ("(2, 8, 16, 3)",)

    def test_a_size_whose_attention_goes_by_blocks_is_right(self, opened, tiny_model):
        """More positions than are computed at a time, and no multiple of them: 37 x 31 where 1024 is a block."""
        z = latents(1, 37, 31)
        expected = tiny_model.decode_latents(torch.from_numpy(z)).numpy()
        np.testing.assert_allclose(opened.decode(z).sample, expected, rtol=0, atol=TOLERANCE)

    def test_arrays_of_torch_and_jax_are_taken_and_results_are_the_callers_own(self, opened):
        x, z = images(2, 2, 2), latents(2, 2, 2)
        expected = results(opened, x, z)
        for kind, make in ((torch.Tensor, torch.from_numpy), (np.ndarray, jax.numpy.asarray)):
            for answer, right in zip(results(opened, make(x), make(z)), expected, strict=True):
                assert isinstance(answer, kind) and np.array_equal(answer, right)
        half = opened.decode(jax.numpy.asarray(z, jax.numpy.bfloat16)).sample
        assert half.dtype == np.float32 and half.flags.writeable and half.flags.owndata

    def test_tiles_and_slices_are_those_of_the_reference(self, opened, tiny_model):
        z = latents(2, 9, 4)
        try:
            for vae in (opened, tiny_model):
                vae.enable_tiling(), vae.enable_slicing()
            expected = tiny_model.decode(torch.from_numpy(z)).sample.numpy()
            np.testing.assert_allclose(opened.decode(z).sample, expected, rtol=0, atol=TOLERANCE)
        finally:
            for vae in (opened, tiny_model):
                vae.disable_tiling(), vae.disable_slicing()


# Numbers ----------------------------------------------------------------------------------------------------------


def test_bf16_is_computed_in_bf16_and_answered_in_float32(flax_bundle, tiny_model):
    z = latents(1, 3, 2)
    expected = tiny_model.decode_latents(torch.from_numpy(z)).numpy()
    with open_vae(flax_bundle("bf16")) as vae:
        sample = vae.decode(z).sample
    assert sample.dtype == np.float32
    # 8 bits of mantissa, rounded some dozen times, on values of about 1.
    assert 1e-4 < np.abs(sample - expected).max() < 0.1


# Shapes, threads and devices --------------------------------------------------------------------------------------


def test_the_shapes_last_used_are_kept_and_threads_compile_them_once(tiny_bundle, monkeypatch):
    lowered, jit = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda function: (lowered.append(function), jit(function))[1])
    first, second, third = latents(1, 1, 1), latents(1, 1, 2), latents(1, 2, 1)
    with open_vae(tiny_bundle, max_shapes=2) as vae, ThreadPoolExecutor(4) as pool:
        before = len(lowered)
        answers = list(pool.map(lambda _: vae.decode(first).sample, range(8)))
        assert len(lowered) - before == 1 and all(np.array_equal(answer, answers[0]) for answer in answers)
        for z in (second, first, third, first):  # the second is the one to go
            vae.decode(z)
        assert len(lowered) - before == 3
        vae.decode(second)
        assert len(lowered) - before == 4 and len(vae._compiled["decoder"]) == 2
    assert not vae._compiled and not vae._graphs


@pytest.mark.parametrize("device", ["gpu", "tpu", "cpu:7", "CPU:7"])
def test_a_device_that_is_not_here_is_named_and_nothing_falls_back(tiny_bundle, device):
    found = backend.FlaxVae.check_devices()
    assert found["cpu"] == "works"
    if found.get(device) == "works":
        pytest.skip(f"{device} is here")
    with pytest.raises(BackendUnavailable, match=f"finds (no {device} .*pip install 'jax|1 cpu, and no '{device}')"):
        open_vae(tiny_bundle, device=device)


def test_what_jax_refuses_is_an_error_of_ours(vae, monkeypatch):
    with pytest.raises(VaeError, match=r"JAX failed in the decoder of \[1, 4, 1, 1\]"):
        monkeypatch.setattr(vae, "_compile", lambda *_: (_ for _ in ()).throw(RuntimeError("INTERNAL: no luck")))
        vae.decode(latents(1, 1, 1))
    with pytest.raises(VaeError, match=r"does not fit the memory of cpu.*enable_tiling"):
        full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        monkeypatch.setattr(vae, "_compile", lambda *_: (_ for _ in ()).throw(full))
        vae.decode(latents(1, 1, 1))


# Files that are not what they should be ---------------------------------------------------------------------------


def test_the_parsers_get_the_very_bytes_that_were_hashed(tiny_bundle, parsed):
    open_vae(tiny_bundle).close()
    assert parsed == [(tiny_bundle / name).read_bytes() for name in FILES]


def test_parameters_that_the_manifest_does_not_list_are_not_read(bundle_copy, parsed):
    with pytest.raises(IntegrityError, match=f"{MSGPACK} is not listed"):
        open_vae(bundle_copy(lambda manifest: manifest["files"].pop(MSGPACK)))
    assert not parsed


def of_another_size():
    def double(params, x):
        return x * params["decoder"]

    leaf = jax.ShapeDtypeStruct((), np.float32)
    return export.export(jax.jit(double))({"decoder": leaf}, jax.ShapeDtypeStruct((1, 5, 8, 8), np.float32)).serialize()


def without_names():
    x = jax.ShapeDtypeStruct((1, 4, 8, 8), np.float32)
    return export.export(jax.jit(lambda params, x: x[:, :3]))((), x).serialize()


def calling_out():
    """Python called from the graph: what a graph may not do. Any code that is loaded could be called so."""

    def call(params, x):
        return jax.ffi.ffi_call("any_code", x)(x)[:, :3]

    x = jax.ShapeDtypeStruct((1, 4, 8, 8), np.float32)
    unchecked = [export.DisabledSafetyCheck.custom_call("any_code")]
    return export.export(jax.jit(call), disabled_checks=unchecked)({}, x).serialize()


GARBAGE = {
    "nothing": (lambda data: b"", CompatibilityError),
    "text": (lambda data: b"not a graph\n" * 100, CompatibilityError),
    "noise": (lambda data: RNG.bytes(10_000), CompatibilityError),
    "half a graph": (lambda data: data[: len(data) // 2], CompatibilityError),
    "a graph of another size": (lambda data: of_another_size(), CompatibilityError),
    "parameters without names": (lambda data: without_names(), CompatibilityError),
    "a graph that calls out": (lambda data: calling_out(), IntegrityError),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_graph_that_is_none_is_refused_even_with_the_right_hash(bundle_copy, tiny_bundle, garbage):
    change, error = GARBAGE[garbage]
    with pytest.raises(error, match=re.escape(DECODER)):
        open_vae(bundle_copy(files={DECODER: change((tiny_bundle / DECODER).read_bytes())}))


def test_the_other_graph_is_refused(bundle_copy, tiny_bundle):
    with pytest.raises(CompatibilityError, match=re.escape(DECODER)):
        open_vae(bundle_copy(files={DECODER: (tiny_bundle / ENCODER).read_bytes()}))


def test_bytes_changed_at_random_end_in_an_error_of_ours_and_nothing_crashes(bundle_copy, tiny_bundle, alone):
    """Parsers are native code in part: in a process of its own, which would be seen to die."""
    paths, rng = [], np.random.default_rng(0)
    for name in FILES:
        data = (tiny_bundle / name).read_bytes()
        for _ in range(4):
            changed = np.frombuffer(data, np.uint8).copy()
            changed[rng.integers(len(data), size=200)] = rng.integers(256, size=200)
            paths.append(bundle_copy(files={name: changed.tobytes()}))
    program = """
import sys, runtimes
for path in sys.argv[1:]:
    try: runtimes.open_vae(path).close(); print("opened")
    except runtimes.VaeError as error: print(type(error).__name__)
"""
    said = alone(program, *paths)
    assert len(said) == len(paths) and set(said) <= {"opened", "CompatibilityError"} and "CompatibilityError" in said


BAD_PARAMETERS = {
    "truncated": (lambda data, tree: data[:-10], "not complete msgpack"),
    "of another model": (lambda data, tree: packed({"encoder": {"a": np.zeros(3)}}), "missing: .*1 unexpected: enc"),
    "one missing": (lambda data, tree: packed(without(tree, "bias")), "1 missing: encoder/conv_out/bias$"),
    "infinite": (lambda data, tree: packed(without(tree, "bias", np.full(8, np.inf))), "NaN or infinity.*out/bias"),
}  # fmt: skip


def packed(tree):
    return flax_params.write_msgpack(tree)


def without(tree, leaf, instead=None):
    node = tree["encoder"]["conv_out"]
    node.pop(leaf) if instead is None else node.update({leaf: instead})
    return tree


@pytest.mark.parametrize("bad", BAD_PARAMETERS)
def test_parameters_that_do_not_fit_are_named(bundle_copy, tiny_bundle, bad):
    change, says = BAD_PARAMETERS[bad]
    data = (tiny_bundle / MSGPACK).read_bytes()
    with pytest.raises(CompatibilityError, match=says):
        open_vae(bundle_copy(files={MSGPACK: change(data, flax_params.read_msgpack(data, "bundle"))}))


# What is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["jax", "flax", "flatbuffers"])
def test_where_jax_is_missing_the_error_says_what_to_install(alone, tiny_bundle, missing):
    program = f"""
import sys, runtimes
sys.modules["{missing}"] = None
try: runtimes.open_vae(sys.argv[1])
except runtimes.BackendUnavailable as error: print(error)
try: import runtimes.flax.runtime
except runtimes.BackendUnavailable as error: print(error)
"""
    assert all("pip install 'vae-export[flax]'" in line for line in alone(program, tiny_bundle))


def test_no_code_of_the_model_is_loaded(alone, tiny_bundle):
    (loaded,) = alone(f"import sys, numpy as np, runtimes\n{USE}\nprint(*sys.modules)", tiny_bundle)[1:]
    assert "runtimes.flax.runtime" in loaded.split()
    assert not {"runtimes.flax.model", "runtimes.flax.layers"} & set(loaded.split())
