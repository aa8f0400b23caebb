"""What the tests on a real GPU share. `make gpu-check` runs them; elsewhere they skip, with the reason."""

import contextlib

import pytest

from runtimes import BackendUnavailable, OutOfMemoryError
from runtimes.tensorrt.cuda import Cuda
from vae_export.checkpoints.load import load_model


@pytest.fixture(scope="session")
def cuda():
    try:
        return Cuda(0)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def model():
    """The embedded one. Do not change it."""
    return load_model()


@pytest.fixture
def hogged(cuda):
    """`with hogged():` next to nothing of the GPU's memory is left."""

    @contextlib.contextmanager
    def hold():
        hog, size = [], cuda.free_memory()[0]
        cuda.use()
        try:
            while size > 1 << 20:
                try:
                    hog.append(cuda.allocate(size, "the hog"))
                except OutOfMemoryError:
                    size //= 2
            yield
        finally:
            for address in hog:
                cuda.release(address)

    return hold
