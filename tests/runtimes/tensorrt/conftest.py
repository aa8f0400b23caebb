"""A TensorRT bundle, and one of TensorRT-RTX, opened over the fakes of NVIDIA's packages."""

import importlib

import pytest

from runtimes import (
    open_vae,
)


@pytest.fixture(scope="session")
def tiny_bundle(tensorrt_bundle):
    """Instead of the ONNX bundle: `vae` and `bundle_copy` are made of this one here."""
    return tensorrt_bundle("tensorrt")


@pytest.fixture
def vae(tiny_bundle, fake_gpu):
    """The tiny bundle, opened for this test alone."""
    with open_vae(tiny_bundle) as runtime:
        yield runtime


@pytest.fixture
def rtx(tensorrt_bundle, fake_gpu):
    """rtx(options): the tiny model's bundle for TensorRT-RTX, opened."""
    return lambda **options: open_vae(tensorrt_bundle("tensorrt-rtx"), **options)


@pytest.fixture
def parsed(fake_gpu, monkeypatch):
    """All plans that reach TensorRT's parser, in a list."""
    seen, runtime = [], importlib.import_module("tensorrt").Runtime
    read = runtime.deserialize_cuda_engine
    monkeypatch.setattr(runtime, "deserialize_cuda_engine", lambda self, data: seen.append(data) or read(self, data))
    return seen
