"""A shard of stored latents: one safetensors file, read with NumPy alone.

There is one entry for each image and for each flip of it. All tensors have the entries in the same order: by the size
of the latents, then as in the source.

    latents.HxW     [n, C, H, W], one tensor for each size of latents, smallest first (C twice as many for moments)
    ids, id_ends    all ids in UTF-8 without separators, and the offset at which each id ends
    flipped         bool [N]
    sha256          uint8 [N, 32], of the image file
    original_size   int32 [N, 2], height and width of the image
    resized         int32 [N, 2], height and width to which it was resized
    crop            int32 [N, 2], top and left of the crop in the resized image; its size is f times that of the latents
    latents_sha256  uint8 [N, 32], of the entry's latents, see `latents_digest`

The metadata has `file_sha256`, the hash of the whole file (see `check_hash`); `schema_version`; and `failures`, a JSON
list of [id, sha256 or null, reason] for the images without latents.

Two checks find damage. `Shard.latents` compares every entry that it reads with its hash, so it never returns wrong
latents; this takes 0.1 ms for the latents of 1024x1024 pixels in float16. `check_hash` reads the whole file, and also
covers ids, sizes and failures: `encode-dataset` calls it for every shard when it resumes, `LatentDataset` on request.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtimes.errors import BundleError, CompatibilityError, IntegrityError

SCHEMA_VERSION = 2
HEADER_LIMIT = 100_000_000  #: bytes; the limit of the safetensors library
#: the end of every message about damage
REPAIR = "is not what was written; run the encode-dataset command again, which rewrites damaged shards"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  #: dtype of latents -> its name in safetensors
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_COLUMNS = ("flipped", "sha256", "original_size", "resized", "crop", "latents_sha256")
#: A shard's header begins with this text and the 64 hexadecimal digits of the file's hash.
HEADER_START = b'{"__metadata__":{"file_sha256":"'
NO_HASH = "0" * 64  #: replaces the file's hash while the hash is computed
_CHUNK = 1 << 20  #: bytes read and hashed at a time
_LATENTS = re.compile(r"latents\.(\d{1,6})x(\d{1,6})")

Array = npt.NDArray[Any]


class Failure(NamedTuple):
    """An image that could not be encoded. Without a `sha256` (its file could not be read) it is tried again."""

    id: str
    sha256: bytes | None
    reason: str


@dataclass(frozen=True)
class Shard:
    """An open shard; its arrays are views of the memory-mapped file."""

    path: Path
    dtype: str  #: one of DTYPES; NumPy has no bfloat16, so the arrays hold its bits as uint16
    ids: list[str]
    flipped: Array
    sha256: Array
    original_size: Array
    resized: Array
    crop: Array
    latents_sha256: Array
    groups: tuple[Array, ...]  #: [n, C, H, W] each
    failures: list[Failure]

    def __len__(self) -> int:
        return len(self.ids)

    def latents(self, entry: int) -> Array:
        """Return the stored latents [C, H, W] of an entry. Raises `IntegrityError` if they do not match their hash."""
        index = entry
        for group in self.groups:
            if index < len(group):
                stored: Array = group[index]
                if latents_digest(stored, self.dtype) != self.latents_sha256[entry].tobytes():
                    raise IntegrityError(f"{self.path} is damaged: the entry of {self.ids[entry]!r} {REPAIR}")
                return stored
            index -= len(group)
        raise IndexError(entry)

    def latent_sizes(self) -> Array:
        """Return int32 [N, 2]: height and width of every entry's latents."""
        sizes = [np.tile(np.asarray(group.shape[2:], np.int32), (len(group), 1)) for group in self.groups]
        return np.concatenate([np.zeros((0, 2), np.int32), *sizes])


def open_shard(path: str | Path) -> Shard:
    """Map a shard into memory. Raises `IntegrityError` for other files, `CompatibilityError` for another schema."""
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if metadata.get("schema_version") != str(SCHEMA_VERSION):
        raise CompatibilityError(
            f"{path} has schema version {metadata.get('schema_version')}, and this vae-export reads {SCHEMA_VERSION}: "
            "encode the images again, into another directory"
        )
    try:
        names = sorted(
            (int(match[1]), int(match[2]), name) for name in tensors if (match := _LATENTS.fullmatch(name)) is not None
        )
        groups = tuple(tensors[name][0] for *_, name in names)
        dtypes = {tensors[name][1] for *_, name in names} or {metadata["dtype"]}
        (dtype,) = (name for name, spelt in DTYPES.items() if {spelt} == dtypes or {name} == dtypes)
        text, ends = tensors["ids"][0].tobytes(), tensors["id_ends"][0].tolist()
        ids = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
        columns = {name: tensors[name][0] for name in _COLUMNS}
        failures = [
            Failure(str(name), None if digest is None else bytes.fromhex(digest), str(reason))
            for name, digest, reason in json.loads(metadata["failures"])
        ]
        counts = {len(ids), sum(map(len, groups)), *map(len, columns.values())}
        if len(counts) != 1 or any(group.ndim != 4 for group in groups):
            raise ValueError(f"its tensors have {sorted(counts)} entries")
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is not a shard of latents: {error}") from None
    return Shard(path, dtype, ids, groups=groups, failures=failures, **columns)


def latents_digest(stored: Array, dtype: str) -> bytes:
    """Return the SHA-256 of an entry's dtype, shape and stored latents [C, H, W]."""
    digest = hashlib.sha256(f"{dtype} {'x'.join(map(str, stored.shape))}\n".encode())
    digest.update(np.ascontiguousarray(stored).data.cast("B"))
    return digest.digest()


def check_hash(path: Path) -> None:
    """Read a whole shard and compare it with its `file_sha256`: the SHA-256 of the file with NO_HASH in its place.

    Raises `IntegrityError` for a file that differs or has no hash, `BundleError` for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8 + len(HEADER_START))
            stated = file.read(len(NO_HASH))
            if not start.endswith(HEADER_START):
                raise IntegrityError(f"{path} is damaged: its header {REPAIR}")
            digest = hashlib.sha256(start + NO_HASH.encode())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    if digest.hexdigest().encode() != stated:
        raise IntegrityError(f"{path} is damaged: its content {REPAIR}")


def read_tensors(path: Path) -> tuple[dict[str, tuple[Array, str]], dict[str, str]]:
    """Map a safetensors file -> ({name: (array, dtype's name in safetensors)}, metadata).

    Raises `IntegrityError` unless every tensor lies inside the file, `BundleError` for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > HEADER_LIMIT:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=0)[8 + length :]
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            dtype, shape = np.dtype(_STORED[entry["dtype"]]), tuple(entry["shape"])
            if not 0 <= first <= last <= len(data):
                raise ValueError(f"{name} ends at {last}, the file at {len(data)}: cut short")
            tensors[name] = data[first:last].view(dtype).reshape(shape), str(entry["dtype"])
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path} is not a safetensors file: {error}") from None
    return tensors, dict(metadata)


def to_stored(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Convert float32 to the stored form: float32, float16, or the bits of bfloat16 as uint16; rounds to nearest."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):  # overflow gives infinity; the caller checks for it
        return values.astype(dtype)


def from_stored(stored: Array) -> Array:
    """Copy stored latents to float32 or float16; the bits of bfloat16 become float32, exactly."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.array(stored)
