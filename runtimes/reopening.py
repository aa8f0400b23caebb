"""Copying and pickling of an opened bundle: the copy reopens the bundle from its path, options and state.

Sessions, locks and GPU memory can be neither copied nor sent to another process. A copy is independent: closing it does
not affect the original.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from runtimes.bundle import Bundle
from runtimes.errors import IntegrityError, VaeError
from runtimes.manifest import Manifest

#: attributes that a user may have set since the bundle was opened
STATE = (
    *("check_finite", "use_slicing", "use_tiling", "tiling"),
    *("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor", "memory_budget"),
)


def reduced(runtime: Any, bundle: Bundle, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the value of a runtime's `__reduce__`. Callbacks (`progress`, `on_tile`) are not copied.

    Raises `VaeError` if the runtime was closed.
    """
    if runtime.is_closed():
        raise VaeError("this VAE was closed and can be neither copied nor pickled; open the bundle again")
    kept = {name: value for name, value in options.items() if name != "bundle" and not callable(value)}
    state = {name: getattr(runtime, name) for name in STATE}
    where = str(bundle.directory), None if bundle.allow_links is None else str(bundle.allow_links)
    return _reopen, (type(runtime), *where, _fingerprint(bundle.manifest), kept, state)


def _reopen(
    kind: type[Any],
    path: str,
    allow_links: str | None,
    fingerprint: str,
    options: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Any:
    bundle = Bundle(path, allow_links=allow_links)
    if _fingerprint(bundle.manifest) != fingerprint:
        raise IntegrityError(
            f"{path} holds another bundle than the one that was copied or pickled: it was replaced meanwhile; open it "
            "again and copy that"
        )
    runtime = kind(bundle, **options)
    try:
        for name, value in state.items():
            setattr(runtime, name, value)
    except VaeError:  # such as a memory budget for a backend without a measured memory model
        runtime.close()
        raise
    return runtime


def _fingerprint(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()
