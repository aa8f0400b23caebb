"""Our use of CUDA, without TensorRT: memory, streams and graphs do what they say."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtimes import OutOfMemoryError, VaeError

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(0)


def test_memory_streams_and_graphs_do_what_they_say(cuda):
    cuda.use()
    size = 1 << 20
    x, y = ctypes.create_string_buffer(RNG.bytes(size), size), ctypes.create_string_buffer(size)
    address, stream = cuda.allocate(size, "a test"), cuda.stream()
    assert address % 256 == 0
    cuda.to_device(address, ctypes.addressof(x), size, stream)
    cuda.wait(stream)
    cuda.begin_capture(stream)
    cuda.to_host(ctypes.addressof(y), address, size, stream)
    graph = cuda.end_capture(stream)
    assert y.raw != x.raw, "it was captured, and not done"
    cuda.launch(graph, stream)
    cuda.wait(stream)
    assert y.raw == x.raw
    cuda.destroy_graph(graph)
    cuda.destroy_stream(stream)
    cuda.release(address)


def test_more_memory_than_there_is_is_refused(cuda):
    with pytest.raises(
        OutOfMemoryError, match=r"everything needs [\d,]+ MiB on cuda:0, which has [\d,]+ of [\d,]+ MiB"
    ):
        cuda.allocate(2 * cuda.free_memory()[1], "everything")
    with pytest.raises(VaeError, match="cudaStreamEndCapture failed with"):
        stream = cuda.stream()
        try:
            cuda.end_capture(stream)
        finally:
            cuda.destroy_stream(stream)


def test_another_thread_may_use_the_gpu(cuda):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cuda.free_memory).result()[1] == cuda.free_memory()[1]
