"""The origin of a model's weights, and a hash that tells whether they were changed since loading."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """The origin of a model's weights; `exported_source` makes the manifest's record from it."""

    given: str  #: what the caller named: a path, a Hub id, a URL, or "memory"
    kind: str  #: directory | file | hub | memory | embedded
    weights_sha256: str | None = None  #: of the weights file; of its parts as `WeightsFiles.sha256` says
    repo: str | None = None
    commit: str | None = None  #: 40 hex digits
    subfolder: str | None = None
    variant: str | None = None  #: of the weights file, as in diffusion_pytorch_model.fp16.safetensors
    absolute: str | None = None  #: of a local path, which another working directory would change
    decoder: str | None = None  #: the file that the decoder is from, where it is another one: an absolute path or a URL
    tensors_sha256: str | None = None  #: `tensors_sha256` of the model as it was loaded


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    r"""Return the SHA-256 of a state dict: of "name [shape]\n" and the little-endian fp32 values, sorted by name.

    It is the same for every file format, and changes with every bit of every weight. Hashing takes 0.25 s for 84
    million parameters. PyTorch's version counters are no substitute: they miss writes through `parameter.data`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def exported_source(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the manifest's record of the origin of exported weights.

    `tensors_sha256` is the hash of the exported weights. If they differ from the loaded ones, `changed_in_memory` is
    true and `weights_sha256` is None, since no file holds these weights.
    """
    now = tensors_sha256(tensors)
    changed = source.tensors_sha256 not in (None, now)
    record = source._asdict() | {"tensors_sha256": now, "changed_in_memory": changed}
    return record | {"weights_sha256": None} if changed else record
