"""The calls of cuda-python's runtime API that `runtimes.tensorrt.cuda` makes, over `fake_gpu`."""

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
    return (_OK, gpu.count) if gpu.count else (cudaError_t.cudaErrorInsufficientDriver, None)


def cudaSetDevice(device):
    gpu.use(device)
    return (_OK if device < gpu.count else cudaError_t.cudaErrorInvalidValue,)


def cudaDeviceGetAttribute(attr, device):
    return _OK, gpu.capability[attr - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]


def cudaMemGetInfo():
    return _OK, gpu.total - gpu.used, gpu.total


def cudaMalloc(size):
    gpu.check_device("cudaMalloc")
    address = gpu.allocate(size)
    return (cudaError_t.cudaErrorMemoryAllocation, None) if address is None else (_OK, address)


def cudaFree(devPtr):
    gpu.free(devPtr)
    return (_OK,)


def cudaStreamCreateWithFlags(flags):
    gpu.check_device("cudaStreamCreateWithFlags")
    gpu.check(flags == cudaStreamNonBlocking, "a stream that waits for the default one")
    stream = gpu.new()
    gpu.streams[stream] = []
    return _OK, stream


def cudaStreamDestroy(stream):
    gpu.check(stream in gpu.streams, f"stream {stream} is destroyed twice, or never was")
    gpu.check(not gpu.streams.pop(stream), "a stream was destroyed with work left")
    return (_OK,)


def cudaStreamSynchronize(stream):
    gpu.wait(stream)
    return (_OK,)


def cudaMemcpyAsync(dst, src, count, kind, stream):
    up = kind == cudaMemcpyKind.cudaMemcpyHostToDevice

    def copy():
        gpu.require(dst if up else src, count, "a copy")
        ctypes.memmove(dst, src, count)
        gpu.copied["to device" if up else "to host"] += count

    gpu.put(stream, copy)
    return (_OK,)


def cudaStreamBeginCapture(stream, mode):
    gpu.check(mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal, "a capture of what other threads do")
    gpu.check(not gpu.streams[stream], "a capture begins while work waits on the stream")
    gpu.captures[stream] = []
    return (_OK,)


def cudaStreamEndCapture(stream):
    graph, work = gpu.new(), gpu.captures.pop(stream, None)
    if work is None or gpu.refused_graphs:
        return cudaError_t.cudaErrorInvalidValue, None
    gpu.graphs[graph] = work
    return _OK, graph


def cudaGraphInstantiate(graph, flags):
    executable = gpu.new()
    gpu.graphs[executable] = gpu.graphs[graph]
    return _OK, executable


def cudaGraphDestroy(graph):
    del gpu.graphs[graph]
    return (_OK,)


def cudaGraphExecDestroy(graphExec):
    del gpu.graphs[graphExec]
    return (_OK,)


def cudaGraphLaunch(graphExec, stream):
    gpu.check_device("cudaGraphLaunch")
    gpu.check(graphExec in gpu.graphs, "a graph was launched that is destroyed")
    for work in gpu.graphs[graphExec]:
        gpu.put(stream, work)
    gpu.launched += 1
    return (_OK,)
