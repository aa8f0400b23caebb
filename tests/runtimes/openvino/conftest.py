"""The tiny model's OpenVINO bundle, and what OpenVINO parses and compiles."""

import weakref

import pytest


@pytest.fixture(scope="session")
def tiny_bundle(openvino_bundle):
    """Instead of the ONNX bundle: `vae` and `bundle_copy` are made of this one here."""
    return openvino_bundle("fp32")


@pytest.fixture
def parsed(monkeypatch):
    """All bytes that reach OpenVINO's parsers, in a list."""
    from runtimes.openvino import ov

    seen, read = [], ov.Core.read_model

    def read_model(self, model, weights, *options):
        seen.extend([bytes(model), bytes(weights.data)])
        return read(self, model, weights, *options)

    monkeypatch.setattr(ov.Core, "read_model", read_model)
    return seen


@pytest.fixture
def compiled(monkeypatch):
    """Everything that OpenVINO compiles, as weak references."""
    from runtimes.openvino import ov

    seen, compile_model = [], ov.Core.compile_model

    def spy(self, *arguments):
        result = compile_model(self, *arguments)
        seen.append(weakref.ref(result))
        return result

    monkeypatch.setattr(ov.Core, "compile_model", spy)
    return seen
