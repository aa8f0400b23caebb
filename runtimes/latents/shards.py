"""A shard of stored latents: one safetensors file, read with NumPy alone.

Entries, one for each image and each of its flips, stand in one order in all of its tensors: by the size of their
latents, and then as in the source.

    latents.HxW     [n, C, H, W], one tensor for each size of latents, smallest first (C twice as many for moments)
    ids, id_ends    UTF-8 of all ids, one after the other, and where each of them ends
    flipped         bool [N]
    sha256          uint8 [N, 32], of the image's file
    original_size   int32 [N, 2], height and width of the image
    resized         int32 [N, 2], height and width to which it was resized
    crop            int32 [N, 2], top and left of what was kept of that; its size is that of the latents times f
    latents_sha256  uint8 [N, 32], of the entry's latents, see `latents_digest`

The metadata has `file_sha256`, the hash of the whole file, see `check_hash`; `schema_version`; and in `failures` a JSON
list of [id, sha256 or null, reason] for the images that are not here.

Damage is found by two checks. `Shard.latents` compares every entry that it reads with its hash, which takes 0.1 ms for
the latents of 1024x1024 pixels in float16; so wrong latents are never returned. `check_hash` reads the whole file, and
also covers ids, sizes and failures: `encode-dataset` calls it for every shard when it resumes, `LatentDataset` on
request.
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
HEADER_LIMIT = 100_000_000  #: bytes, as safetensors has it
#: How messages about damage end.
REPAIR = "is not what was written; run the encode-dataset command again, it makes damaged shards anew"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  #: of latents, as safetensors spells them
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_COLUMNS = ("flipped", "sha256", "original_size", "resized", "crop", "latents_sha256")
#: A shard's header begins with this and 64 hexadecimal digits: the hash stands at a fixed place.
HEADER_START = b'{"__metadata__":{"file_sha256":"'
NO_HASH = "0" * 64  #: stands for the file's hash while that is computed
_CHUNK = 1 << 20  #: bytes that are read and hashed at a time
_LATENTS = re.compile(r"latents\.(\d{1,6})x(\d{1,6})")

Array = npt.NDArray[Any]


class Failure(NamedTuple):
    """An image that has no latents. Without a `sha256` it may have them at the next try."""

    id: str
    sha256: bytes | None
    reason: str


@dataclass(frozen=True)
class Shard:
    """An opened shard; its arrays are views of the file, which is mapped and not read."""

    path: Path
    dtype: str  #: one of DTYPES; bfloat16 stands as uint16 in the arrays, NumPy having none
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
        """[C, H, W] of an entry, as stored. `IntegrityError` where they are not what was written."""
        place = entry
        for group in self.groups:
            if place < len(group):
                stored: Array = group[place]
                if latents_digest(stored, self.dtype) != self.latents_sha256[entry].tobytes():
                    raise IntegrityError(f"{self.path} is damaged: the entry of {self.ids[entry]!r} {REPAIR}")
                return stored
            place -= len(group)
        raise IndexError(entry)

    def latent_sizes(self) -> Array:
        """int32 [N, 2]: height and width of every entry's latents."""
        sizes = [np.tile(np.asarray(group.shape[2:], np.int32), (len(group), 1)) for group in self.groups]
        return np.concatenate([np.zeros((0, 2), np.int32), *sizes])


def open_shard(path: str | Path) -> Shard:
    """Map a shard. `IntegrityError` for a file that is not one, `CompatibilityError` for one of another schema."""
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
    """SHA-256 of an entry's latents, [C, H, W] as stored, and of how they are to be read: dtype and shape."""
    digest = hashlib.sha256(f"{dtype} {'x'.join(map(str, stored.shape))}\n".encode())
    digest.update(np.ascontiguousarray(stored).data.cast("B"))
    return digest.digest()


def check_hash(path: Path) -> None:
    """Read a whole shard and compare it with its `file_sha256`: the SHA-256 of the file with NO_HASH in its place.

    Raises `IntegrityError` for a file that differs or has no hash, and `BundleError` where it cannot be read.
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
    """{name: (array, dtype as safetensors spells it)} and the metadata of a safetensors file, mapped.

    Raises `IntegrityError` unless every tensor lies inside the file, and `BundleError` where it cannot be read.
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
    """float32 -> as it stands in a file: float32, float16, or the bits of bfloat16, rounded to the nearest."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):  # an infinity that comes of it is found by whoever looks
        return values.astype(dtype)


def from_stored(stored: Array) -> Array:
    """As it stands in a file -> float32 or float16, a copy; the bits of bfloat16 become float32, exactly."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.array(stored)
