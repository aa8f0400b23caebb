"""An OpenVINO IR holds OpenVINO's own layers and nothing that expands: seen before OpenVINO parses it."""

import pytest

from runtimes import BundleError, CompatibilityError, IntegrityError, open_vae
from runtimes.ir_scan import check_ir

pytest.importorskip("openvino", reason="pip install 'vae-export[openvino]'")

IR = b'<?xml version="1.0"?><net name="g" version="11"><layers><layer id="0" type="%s" version="%s"/></layers></net>'
LAUGHS = b'<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><net>&b;</net>'
REFUSED = {
    "an extension": (IR % (b"Custom", b"extension"), "'Custom' of 'extension'"),
    "no version": (b"<net><layers><layer type='Relu'/></layers></net>", "'Relu' of ''"),
    "an extension in a body": (
        IR.replace(b"/></layers>", b"><body><layers><layer type='Own' version='x'/></layers></body></layer></layers>")
        % (b"Loop", b"opset5"),
        "'Own' of 'x'",
    ),
    "entities": (LAUGHS, "document type"),
    "a document type elsewhere": (b'<!DOCTYPE net SYSTEM "file:///etc/passwd"><net/>', "document type"),
    "no IR": (b"<html/>", "<html>"),
    "no XML": (b"\x08\x0a\x12\x07", "not a whole"),
    "cut short": (b"<net><layers>", "not a whole"),
    "nothing": (b"", "not a whole"),
    "an undefined entity": (b"<net>&nothing;</net>", "not a whole"),
}

NONE = ("no IR", "no XML", "cut short", "nothing", "an undefined entity")  # of an IR: another class of error


@pytest.fixture
def tiny_bundle(openvino_bundle):
    return openvino_bundle("fp32")


@pytest.mark.parametrize("case", REFUSED)
def test_layers_outside_of_openvinos_opsets_are_refused(case):
    data, says = REFUSED[case]
    with pytest.raises(BundleError, match=says) as error:
        check_ir(data, "model.xml")
    assert isinstance(error.value, CompatibilityError if case in NONE else IntegrityError)


def test_a_refused_ir_never_reaches_openvino(bundle_copy, monkeypatch):
    monkeypatch.setattr("openvino.Core.read_model", pytest.fail)
    for data, says in REFUSED.values():
        path = bundle_copy(files={"vae_decoder/openvino_model.xml": data})
        with pytest.raises(BundleError, match=says):
            open_vae(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_graph_of_ours_passes(openvino_bundle, precision):
    found = sorted(openvino_bundle(precision).rglob("*.xml"))
    assert len(found) == 2
    for path in found:
        check_ir(path.read_bytes(), path.name)
