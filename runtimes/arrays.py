"""Functions on arrays of any kind: NumPy arrays, torch tensors and CuPy arrays.

Torch and CuPy are not imported here: a caller that passes their arrays has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def array_module(array: Any) -> ModuleType:
    """Return the library of an array: torch for a tensor, cupy for its arrays, numpy for everything else."""
    for name, kind in (("torch", "Tensor"), ("cupy", "ndarray")):
        module = sys.modules.get(name)
        if module is not None and isinstance(array, getattr(module, kind)):
            return module
    return np


def is_tensor(x: Any) -> bool:
    """Return whether `x` is a torch tensor."""
    return array_module(x).__name__ == "torch"


def as_type(x: Any, dtype: str) -> Any:
    """Convert an array of any kind to a dtype such as "float32"; copies it only if needed."""
    return x.to(getattr(array_module(x), dtype)) if is_tensor(x) else x.astype(dtype, copy=False)


def on_host(x: Any) -> Array:
    """Convert an array of any kind to a NumPy array."""
    if array_module(x) is np:
        return np.asarray(x)
    return np.asarray(x.detach().cpu().numpy() if is_tensor(x) else x.get())


def answer_in_kind(function: Callable[[Array], Array], x: Any) -> Any:
    """Apply a NumPy function to an array of any kind; returns the same kind, a tensor on the same device."""
    xp = array_module(x)
    if xp is np:
        return function(x)
    result = function(on_host(x))
    return xp.from_numpy(result).to(x.device) if hasattr(xp, "from_numpy") else xp.asarray(result)
