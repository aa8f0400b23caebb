"""Files of an OpenVINO bundle that are not what they should be are refused before OpenVINO parses them."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtimes import (
    CompatibilityError,
    IntegrityError,
    NotInstalled,
    open_vae,
)

pytest.importorskip("runtimes.openvino", exc_type=NotInstalled)

XML, BIN = "vae_decoder/openvino_model.xml", "vae_decoder/openvino_model.bin"
FILES = [f"vae_{graph}/openvino_model.{suffix}" for graph in ("encoder", "decoder") for suffix in ("xml", "bin")]
RNG = np.random.default_rng(0)


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
