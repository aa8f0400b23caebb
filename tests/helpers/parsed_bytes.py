"""What reaches the parser of a backend."""

import onnxruntime
import pytest


@pytest.fixture(name="parsed")
def parsed_by_onnxruntime(monkeypatch):
    """All bytes that reach ONNX Runtime's parser, in a list."""
    seen, real = [], onnxruntime.InferenceSession

    def open_session(data, *arguments, **options):
        seen.append(data)
        return real(data, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return seen
