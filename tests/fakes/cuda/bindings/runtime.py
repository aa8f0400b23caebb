"""The calls of cuda-python's runtime API that `runtimes.cuda` makes, over `fake_gpu`."""

from __future__ import annotations

import ctypes
from enum import IntEnum

from fake_gpu import gpu


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


cudaStreamNonBlocking = 1
_OK = cudaError_t.cudaSuccess


def cudaGetErrorString(error):
    return _OK, {35: b"CUDA driver version is insufficient for CUDA runtime version"}.get(
        int(error), b"invalid argument"
    )


def cudaGetDeviceCount():
    return (_OK, gpu.count) if gpu.count else (cudaError_t.cudaErrorInsufficientDriver, 0)


def cudaSetDevice(index):
    return (_OK if index < gpu.count else cudaError_t.cudaErrorInvalidValue,)


def cudaDeviceGetAttribute(attribute, index):
    return _OK, gpu.capability[attribute - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]


def cudaMemGetInfo():
    return _OK, gpu.total - gpu.used, gpu.total


def cudaMalloc(size):
    address = gpu.allocate(size)
    return (cudaError_t.cudaErrorMemoryAllocation, None) if address is None else (_OK, address)


def cudaFree(address):
    gpu.free(address)
    return (_OK,)


def cudaStreamCreateWithFlags(flags):
    gpu.check(flags == cudaStreamNonBlocking, "a stream that waits for the default one")
    stream = gpu.new()
    gpu.streams[stream] = []
    return _OK, stream


def cudaStreamDestroy(stream):
    gpu.check(not gpu.streams.pop(stream), "a stream was destroyed with work left")
    return (_OK,)


def cudaStreamSynchronize(stream):
    gpu.wait(stream)
    return (_OK,)


def cudaMemcpyAsync(target, source, size, kind, stream):
    def copy():
        gpu.require(target if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source, size, "a copy")
        ctypes.memmove(target, source, size)

    gpu.put(stream, copy)
    return (_OK,)


def cudaStreamBeginCapture(stream, mode):
    gpu.check(not gpu.streams[stream], "a capture begins while work waits on the stream")
    gpu.captures[stream] = []
    return (_OK,)


def cudaStreamEndCapture(stream):
    graph = gpu.new()
    gpu.graphs[graph] = gpu.captures.pop(stream)
    return _OK, graph


def cudaGraphInstantiate(graph, flags):
    executable = gpu.new()
    gpu.graphs[executable] = gpu.graphs[graph]
    return _OK, executable


def cudaGraphDestroy(graph):
    del gpu.graphs[graph]
    return (_OK,)


def cudaGraphExecDestroy(graph):
    del gpu.graphs[graph]
    return (_OK,)


def cudaGraphLaunch(graph, stream):
    gpu.check(graph in gpu.graphs, "a graph was launched that is destroyed")
    for work in gpu.graphs[graph]:
        gpu.put(stream, work)
    gpu.launched += 1
    return (_OK,)
