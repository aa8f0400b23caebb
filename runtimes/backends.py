"""The registry of backends, and the targets that each backend opens."""

from __future__ import annotations

from typing import Any

from runtimes.errors import BackendUnavailable, CompatibilityError
from runtimes.registry import Registry

#: backend -> its class, a `VaeRuntime`, imported at first use
BACKENDS = Registry(
    "backend",
    BackendUnavailable,
    {
        "onnxruntime": "runtimes.onnxruntime:OnnxRuntimeVae",
        "openvino": "runtimes.openvino:OpenVinoVae",
        "flax": "runtimes.flax.runtime:FlaxVae",
        "tensorrt": "runtimes.tensorrt.runtime:TensorRtVae",
        "tensorrt-rtx": "runtimes.tensorrt.runtime:TensorRtRtxVae",
    },
)
#: target of a bundle -> the backends that open it; the first one is the default
BACKENDS_OF_TARGET: dict[str, tuple[str, ...]] = {
    "onnx": ("onnxruntime", "tensorrt", "tensorrt-rtx"),
    "openvino": ("openvino",),
    "flax": ("flax",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}


def register_backend(name: str, place: Any, targets: tuple[str, ...]) -> None:
    """Register a backend that opens bundles of `targets`.

    `place` is "module:class" of a `VaeRuntime`, or the class itself. The backend becomes the default for each target
    that no other backend opens.
    """
    BACKENDS.register(name, place)
    for target in targets:
        others = tuple(other for other in BACKENDS_OF_TARGET.get(target, ()) if other != name)
        BACKENDS_OF_TARGET[target] = (*others, name)


def unregister_backend(name: str) -> None:
    """Undo `register_backend`; used by tests."""
    BACKENDS.unregister(name)
    for target, backends in list(BACKENDS_OF_TARGET.items()):
        left = tuple(other for other in backends if other != name)
        if left:
            BACKENDS_OF_TARGET[target] = left
        else:
            del BACKENDS_OF_TARGET[target]


def backend_for(target: str, chosen: str | None = None) -> str:
    """Return the name of the backend that opens bundles of `target`: `chosen`, or the default if that is None.

    Raises `CompatibilityError` if no backend opens the target or the chosen one does not, and `BackendUnavailable` if
    the chosen name is unknown.
    """
    known = BACKENDS_OF_TARGET.get(target, ())
    if not known:
        raise CompatibilityError(f"this version opens no {target} bundles")
    if chosen is None:
        return known[0]
    if chosen not in BACKENDS:
        raise BackendUnavailable(f"no backend {chosen!r}; known are {', '.join(BACKENDS)}")
    if chosen not in known:
        raise CompatibilityError(f"backend {chosen} does not open {target} bundles; {', '.join(known)} does")
    return chosen
