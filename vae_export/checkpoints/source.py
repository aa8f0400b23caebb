"""Where a model's weights came from, and whether they are still those."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """Where a model's weights came from; `exported_source` is the record of it in a manifest."""

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
    """The hash of a state dict: of "name [shape]\\n" and the fp32 values, little-endian, in the order of the names.

    It is the same for every file format, and changes with every bit of every weight. Hashing, 0.25 s for 84 million
    parameters, is the only exact way: PyTorch's version counters miss what is written through `parameter.data`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def exported_source(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The manifest's record of where these weights, which are exported, came from.

    `tensors_sha256` is theirs. Where they are not what was loaded, the record has `changed_in_memory` and no
    `weights_sha256`, since no file has them.
    """
    now = tensors_sha256(tensors)
    changed = source.tensors_sha256 not in (None, now)
    record = source._asdict() | {"tensors_sha256": now, "changed_in_memory": changed}
    return record | {"weights_sha256": None} if changed else record
