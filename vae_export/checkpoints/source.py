"""Where a model's weights came from."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """Where a model's weights came from; recorded in the manifest of every bundle made from it."""

    given: str  #: what the caller named: a path, a Hub id, a URL, or "memory"
    kind: str  #: directory | file | hub | memory | embedded
    weights_sha256: str | None = None  #: of the weights file; of its parts as `WeightsFiles.sha256` says
    repo: str | None = None
    commit: str | None = None  #: 40 hex digits
    subfolder: str | None = None
    variant: str | None = None  #: of the weights file, as in diffusion_pytorch_model.fp16.safetensors
    absolute: str | None = None  #: of a local path, which another working directory would change
