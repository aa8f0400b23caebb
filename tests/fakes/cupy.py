"""The little of CuPy that a runtime and a posterior use, over `fake_gpu`.

Writing an array is put off until its stream is waited for, as on a GPU: who reads it too early finds no numbers.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_gpu import gpu

_waiting: list[Any] = []  # writes on the current stream


class _Stream:
    def synchronize(self) -> None:
        while _waiting:
            _waiting.pop(0)()


cuda = SimpleNamespace(get_current_stream=_Stream)


class ndarray:
    device = SimpleNamespace(id=0)

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.ndim, self.nbytes = len(shape), int(np.prod(shape)) * self.dtype.itemsize
        self.data = SimpleNamespace(ptr=gpu.allocate(self.nbytes))

    def __del__(self) -> None:
        if gpu is not None:
            gpu.free(self.data.ptr)

    def get(self) -> np.ndarray:
        _Stream().synchronize()
        host = np.empty(self.shape, self.dtype)
        ctypes.memmove(host.ctypes.data, self.data.ptr, self.nbytes)
        return host

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return self if not copy and self.dtype == dtype else asarray(self.get().astype(dtype))

    def __getitem__(self, key: Any) -> ndarray:
        return asarray(self.get()[key])

    def __setitem__(self, key: Any, value: ndarray) -> None:
        changed = self.get()
        changed[key] = value.get()
        ctypes.memmove(self.data.ptr, np.ascontiguousarray(changed).ctypes.data, self.nbytes)

    def clip(self, low: float, high: float) -> ndarray:
        return asarray(self.get().clip(low, high))

    def all(self) -> bool:
        return bool(self.get().all())

    def __add__(self, other: Any) -> ndarray:
        return asarray(self.get() + _host(other))

    def __mul__(self, other: Any) -> ndarray:
        return asarray(self.get() * _host(other))

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> ndarray:
        return asarray(self.get() - _host(other))

    def __truediv__(self, other: Any) -> ndarray:
        return asarray(self.get() / _host(other))


def _host(x: Any) -> Any:
    return x.get() if isinstance(x, ndarray) else x


def asarray(host: Any, dtype: Any = None) -> ndarray:
    host = np.ascontiguousarray(_host(host), dtype)
    made = ndarray(host.shape, host.dtype)
    # The address, not the array: a write that waits does not keep it alive.
    address, size = made.data.ptr, made.nbytes
    _waiting.append(lambda: address in gpu.blocks and ctypes.memmove(address, host.ctypes.data, size))
    return made


def ascontiguousarray(x: ndarray) -> ndarray:
    return x


def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
    return ndarray(shape, dtype)


def exp(x: ndarray) -> ndarray:
    return asarray(np.exp(x.get()))


def round(x: ndarray) -> ndarray:
    return asarray(np.round(x.get()))


def moveaxis(x: ndarray, source: int, destination: int) -> ndarray:
    return asarray(np.moveaxis(x.get(), source, destination))


def stack(arrays: list[ndarray]) -> ndarray:
    return asarray(np.stack([x.get() for x in arrays]))


uint8 = np.uint8


def isfinite(x: ndarray) -> ndarray:
    return asarray(np.isfinite(x.get()))


def concatenate(arrays: list[ndarray], axis: int = 0) -> ndarray:
    return asarray(np.concatenate([x.get() for x in arrays], axis))
