"""Tests runtimes/openvino.py: the promises of every backend, and what is OpenVINO's own."""

import gc
import re
import resource
import shutil
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from runtimes import (
    BackendUnavailable,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    NotInstalled,
    OutOfMemoryError,
    VaeError,
    open_vae,
)
from tests.helpers.backend_contract import BackendContract
from tests.helpers.forms import FORMS
from tests.helpers.inputs import TOLERANCE, images, latents, results
from tests.helpers.without_torch import BANNED
from vae_export.comparison import THRESHOLDS, Case, compare, opened_bundle
from vae_export.rewrites.apply import rewrite

backend = pytest.importorskip("runtimes.openvino", exc_type=NotInstalled)
ov = backend.ov

XML, BIN = "vae_decoder/openvino_model.xml", "vae_decoder/openvino_model.bin"
FILES = [f"vae_{graph}/openvino_model.{suffix}" for graph in ("encoder", "decoder") for suffix in ("xml", "bin")]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_bundle(openvino_bundle):
    """Instead of the ONNX bundle: `vae` and `bundle_copy` are made of this one here."""
    return openvino_bundle("fp32")


@pytest.fixture
def parsed(monkeypatch):
    """All bytes that reach OpenVINO's parsers, in a list."""
    seen, read = [], ov.Core.read_model

    def read_model(self, model, weights, *options):
        seen.extend([bytes(model), bytes(weights.data)])
        return read(self, model, weights, *options)

    monkeypatch.setattr(ov.Core, "read_model", read_model)
    return seen


@pytest.fixture
def compiled(monkeypatch):
    """Everything that OpenVINO compiles, as weak references."""
    seen, compile_model = [], ov.Core.compile_model

    def spy(self, *arguments):
        result = compile_model(self, *arguments)
        seen.append(weakref.ref(result))
        return result

    monkeypatch.setattr(ov.Core, "compile_model", spy)
    return seen


def alive(references):
    gc.collect()
    return [reference() for reference in references if reference() is not None]


def cases(model, arrays):
    """Arrays, images and latents, with what the reference makes of them."""
    for x in arrays:
        graph, function = ("encoder", model.encode_moments) if x.shape[1] == 3 else ("decoder", model.decode_latents)
        yield Case(graph, "array", x, function(torch.from_numpy(x)).numpy())


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


# Shapes, threads and the cache ------------------------------------------------------------------------------------


def test_more_shapes_than_are_kept_are_compiled_anew_and_right(tiny_bundle, tiny_model, compiled):
    arrays = [latents(*shape) for shape in ((1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2, 3))]
    with open_vae(tiny_bundle, max_shapes=2) as vae:
        for done, case in enumerate(cases(tiny_model, arrays), 1):
            np.testing.assert_allclose(vae.decode(case.array).sample, case.expected, rtol=0, atol=TOLERANCE)
            assert len(compiled) == done  # two are kept, and a third had come between
            assert len(alive(compiled)) == min(done, 2)
        vae.decode(arrays[2]), vae.decode(arrays[3])
        assert len(compiled) == len(arrays), "the two last ones were at hand"
    assert not alive(compiled), "closing frees them"


def test_the_shape_that_was_not_used_for_longest_goes_first(tiny_bundle, compiled):
    first, second, third = latents(1, 2, 3), latents(1, 3, 2), latents(1, 2, 2)
    with open_vae(tiny_bundle, max_shapes=2) as vae:
        for z in (first, second, first, third, first):
            vae.decode(z)
        assert len(compiled) == 3


def test_eight_threads_may_fight_for_one_place(tiny_bundle, compiled):
    arrays = [images(1, 1, 1), latents(1, 1, 1), latents(2, 1, 2)]
    with open_vae(tiny_bundle, max_shapes=1, threads=1) as vae, ThreadPoolExecutor(8) as pool:

        def call(i):
            x = arrays[i % len(arrays)]
            return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]

        serial = [call(i) for i in range(len(arrays))]
        answers = list(pool.map(call, range(12)))
        assert all(np.array_equal(answer, serial[i % len(arrays)]) for i, answer in enumerate(answers))
        assert len(alive(compiled)) <= 2  # one of each graph


def test_threads_that_meet_a_new_shape_compile_it_once(tiny_bundle, compiled):
    z = latents(1, 7, 4)
    with open_vae(tiny_bundle) as vae, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: vae.decode(z).sample, range(16)))
    assert len(compiled) == 1
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_weights_are_held_of_those_graphs_only_that_are_called(vae):
    assert [graph._loaded for graph in vae._graphs.values()] == [None, None]
    vae.decode(latents())
    assert vae._graphs["encoder"]._loaded is None and vae._graphs["decoder"]._loaded is not None


def test_a_bundle_that_is_replaced_after_it_was_opened_is_read_as_it_was(bundle_copy, tiny_model):
    path, z = bundle_copy(), latents()
    with open_vae(path) as vae:
        shutil.rmtree(path)
        case = next(iter(cases(tiny_model, [z])))
        assert compare([case], "openvino", opened_bundle(vae), "fp32")


@pytest.mark.parametrize("file", [XML, BIN])
def test_a_file_that_is_changed_after_the_bundle_was_opened_is_not_parsed(bundle_copy, parsed, file):
    path = bundle_copy()
    with open_vae(path) as vae:
        before = len(parsed)
        data = bytearray((path / file).read_bytes())
        data[len(data) // 2] ^= 1
        with open(path / file, "r+b") as opened:  # in place: the file that is open
            opened.write(data)
        with pytest.raises(IntegrityError, match=f"{file} was changed"):
            vae.decode(latents())
        assert len(parsed) == before
        vae.encode(images())  # the rest works


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_bounds_the_threads_of_a_call(tiny_bundle, tiny_model, compiled, threads):
    (case,) = cases(tiny_model, [latents()])
    with open_vae(tiny_bundle, threads=threads) as vae:
        np.testing.assert_allclose(vae.decode(case.array).sample, case.expected, rtol=0, atol=TOLERANCE)
        assert alive(compiled)[0].get_property("INFERENCE_NUM_THREADS") == threads


def test_a_cache_that_cannot_be_used_is_said_at_once(tiny_bundle, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=re.escape(f"cache_dir {path} cannot be used")):
            open_vae(tiny_bundle, cache_dir=path)


def test_a_shape_that_fails_takes_no_place_from_those_that_work(tiny_bundle, compiled, monkeypatch):
    with open_vae(tiny_bundle, max_shapes=2, threads=1) as vae:
        vae.decode(latents(1, 2, 3))
        monkeypatch.setattr(vae._graphs["decoder"], "_compile", lambda *_: (_ for _ in ()).throw(VaeError("failed")))
        for side in (4, 5, 6):
            with pytest.raises(VaeError, match="failed"):
                vae.decode(latents(1, side, side))
        vae.decode(latents(1, 2, 3))
        assert len(compiled) == 1


def test_compiled_graphs_are_kept_in_the_cache_and_give_the_same(tiny_bundle, vae, tmp_path):
    z, directory = latents(), tmp_path / "new" / "cache"
    expected = vae.decode(z).sample
    with open_vae(tiny_bundle, threads=1, cache_dir=directory) as first:
        assert np.array_equal(first.decode(z).sample, expected)
    kept = sorted(directory.iterdir())
    assert kept and all(file.stat().st_size for file in kept)
    with open_vae(tiny_bundle, threads=1, cache_dir=str(directory)) as second:
        assert np.array_equal(second.decode(z).sample, expected)
    assert sorted(directory.iterdir()) == kept
    for file in kept:
        file.write_bytes(file.read_bytes()[:1000])
    with open_vae(tiny_bundle, threads=1, cache_dir=directory) as third:
        assert np.array_equal(third.decode(z).sample, expected), "a broken cache is only slower"


def test_a_cache_tells_bundles_with_other_weights_apart(tiny_bundle, bundle_copy, tmp_path):
    weights = np.frombuffer((tiny_bundle / BIN).read_bytes(), np.uint8).copy()
    middle = len(weights) // 2 // 4 * 4
    weights[middle : middle + 4] = np.frombuffer(np.float32(5), np.uint8)  # one weight in a hundred thousand
    other, z = bundle_copy(files={BIN: weights.tobytes()}), latents()
    with open_vae(other, threads=1) as plain:
        expected = plain.decode(z).sample
    for path in (tiny_bundle, other):
        with open_vae(path, threads=1, cache_dir=tmp_path / "cache") as vae:
            assert np.array_equal(vae.decode(z).sample, expected) == (path is other)


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
    z, (soft, hard) = latents(), resource.getrlimit(resource.RLIMIT_AS)
    expected = vae.decode(z).sample
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        with pytest.raises(OutOfMemoryError, match=r"\[1, 4, 128, 128\].* memory of cpu.*enable_tiling"):
            vae.decode(latents(1, 128, 128))  # the largest of its maps alone take 128 MiB each
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert np.array_equal(vae.decode(z).sample, expected)
    assert capfd.readouterr().err == ""  # the exception says it, and nothing else does


# Files that are not what they should be ---------------------------------------------------------------------------


def test_the_parser_gets_the_very_bytes_that_were_hashed(tiny_bundle, parsed):
    open_vae(tiny_bundle).close()
    assert parsed == [(tiny_bundle / name).read_bytes() for name in FILES]


def test_weights_that_the_manifest_does_not_list_are_not_read(bundle_copy, parsed):
    with pytest.raises(IntegrityError, match=re.escape(f"{BIN} is not listed")):
        open_vae(bundle_copy(lambda manifest: manifest["files"].pop(BIN)))
    path = bundle_copy()
    (path / BIN).unlink()
    with pytest.raises(IntegrityError, match=re.escape(f"{BIN} is missing")):
        open_vae(path)
    assert not parsed, "the encoder's neither, which is whole"


GARBAGE = {
    "nothing": lambda xml: b"",
    "text": lambda xml: b"not a graph\n" * 100,
    "noise": lambda xml: RNG.bytes(10_000),
    "half a graph": lambda xml: xml[: len(xml) // 2],
    "no layers": lambda xml: b'<?xml version="1.0"?><net name="vae" version="11"><layers/><edges/></net>',
    "other names": lambda xml: xml.replace(b'"latent_sample"', b'"latent_simple"'),
    "another type": lambda xml: xml.replace(
        b'shape="?,4,?,?" element_type="f32"', b'shape="?,4,?,?" element_type="f64"'
    ),
    "other channels": lambda xml: xml.replace(b'shape="?,4,?,?"', b'shape="?,5,?,?"'),
    "the path of a graph": lambda xml: b"openvino_model.xml",
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_graph_that_is_none_is_refused_even_with_the_right_hash(
    bundle_copy, tiny_bundle, capfd, monkeypatch, garbage
):
    monkeypatch.chdir(tiny_bundle / "vae_decoder")
    data = GARBAGE[garbage]((tiny_bundle / XML).read_bytes())
    with pytest.raises(CompatibilityError, match=re.escape(XML)):
        open_vae(bundle_copy(files={XML: data}))
    assert capfd.readouterr().err == ""


def test_the_other_graph_is_refused(bundle_copy, tiny_bundle):
    files = {XML: (tiny_bundle / FILES[0]).read_bytes(), BIN: (tiny_bundle / FILES[1]).read_bytes()}
    with pytest.raises(CompatibilityError, match="latent_sample"):
        open_vae(bundle_copy(files=files))


def test_weights_beyond_the_end_of_their_file_are_refused_and_nothing_crashes(bundle_copy, tiny_bundle, alone):
    xml, weights = (tiny_bundle / XML).read_bytes(), (tiny_bundle / BIN).read_bytes()
    offset = b'offset="64"'
    assert xml.count(offset) == 1
    paths = [bundle_copy(files={BIN: weights[:size]}) for size in (0, 1, 1000, len(weights) // 2, len(weights) - 1)]
    others = (b"-64", b"%d" % len(weights), b"%d" % 2**40, b"%d" % (2**63 - 1), b"%d" % (2**64 - 16))
    paths += [bundle_copy(files={XML: xml.replace(offset, b'offset="%s"' % other)}) for other in others]
    paths.append(bundle_copy(files={XML: xml.replace(b'size="64"', b'size="%d"' % 2**40, 1)}))
    program = """
import sys, runtimes
for path in sys.argv[1:]:
    try: runtimes.open_vae(path)
    except runtimes.VaeError as error: print(type(error).__name__)
"""
    assert alone(program, *paths) == ["CompatibilityError"] * len(paths)


@pytest.fixture
def onnx_with_weights_outside(tmp_path):
    """A decoder as ONNX whose weight lies in a file outside the bundle."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 4, 1, 1], np.full(12, 0.5, np.float32).tobytes(), raw=True)
    ends = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, "height", "width"])
        for name, channels in (("latent_sample", 4), ("sample", 3))
    )
    node = helper.make_node("Conv", ["latent_sample", "w"], ["sample"])
    graph = helper.make_graph([node], "decoder", *([end] for end in ends), [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    (tmp_path / "outside").mkdir()
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, tmp_path / "outside" / "a.onnx")
    return tmp_path / "outside"


@pytest.mark.parametrize("absolute", [False, True], ids=["working directory", "absolute path"])
def test_nothing_but_ir_is_parsed_so_no_graph_brings_weights_from_outside(
    bundle_copy, onnx_with_weights_outside, monkeypatch, absolute
):
    """OpenVINO guesses the format from the bytes: an .xml may hold ONNX, which may name any file of this machine."""
    outside = onnx_with_weights_outside
    model = onnx.load(outside / "a.onnx", load_external_data=False)
    if absolute:
        (entry,) = (entry for entry in model.graph.initializer[0].external_data if entry.key == "location")
        entry.value = str(outside / "weights.bin")
    monkeypatch.chdir(outside)
    path = bundle_copy(files={XML: model.SerializeToString()})
    with pytest.raises(CompatibilityError, match=re.escape(XML)):
        open_vae(path)


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
