"""Torch tensors and CuPy arrays on the GPU: their device and address, new arrays of the same kind, synchronization."""

from __future__ import annotations

from typing import Any

from runtimes.arrays import array_module


def on_device(x: Any) -> bool:
    """Return whether a torch tensor or CuPy array is on a GPU; CuPy arrays always are."""
    return bool(getattr(x, "is_cuda", True))


def device_index(x: Any) -> int:
    """Return N of the device cuda:N that holds the array."""
    return int(x.device.index if _is_tensor(x) else x.device.id)


def address_of(x: Any) -> int:
    """Return the address of the array's data on the device."""
    return int(x.data_ptr() if _is_tensor(x) else x.data.ptr)


def empty_like(x: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return an uninitialized array of the kind and on the device of `x`."""
    xp = array_module(x)
    if _is_tensor(x):
        return xp.empty(shape, dtype=getattr(xp, dtype), device=x.device)
    return xp.empty(shape, dtype=dtype)


def wait_for_producer(x: Any) -> None:
    """Wait until the work on the current stream of the array's library is done, so that `x` holds its values."""
    xp = array_module(x)
    stream = xp.cuda.current_stream(x.device) if _is_tensor(x) else xp.cuda.get_current_stream()
    stream.synchronize()


def _is_tensor(x: Any) -> bool:
    """Return whether `x` is a torch tensor; otherwise it is a CuPy array."""
    return hasattr(x, "data_ptr")
