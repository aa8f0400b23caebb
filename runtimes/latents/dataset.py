"""`LatentDataset`: reads the latents that `vae-export encode-dataset` stored, by number, by id, or in order.

    from runtimes.latents.dataset import LatentDataset

    dataset = LatentDataset("latents/", vae="sdxl", scaled=True)  # raises if another VAE made them, or they are raw
    dataset[0].latents                                            # float16 [C, h, w]
    dataset.by_id("cats/001.jpg").crop                            # (top, left)

PyTorch is not needed. With `torch=True` latents are tensors, and a `torch.utils.data.DataLoader` takes the dataset
directly; if latents differ in size, give the loader a batch sampler that groups entries by `sizes`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtimes.base import VaeRuntime
from runtimes.bundle import Bundle
from runtimes.errors import (
    BundleError,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    NotInstalled,
)
from runtimes.latents.shards import SCHEMA_VERSION, Array, Shard, check_hash, from_stored, open_shard
from runtimes.manifest import MANIFEST_FILE

CONTRACT_FILE, INDEX_FILE, SHARDS = "contract.json", "index.parquet", "shards"
ERRORS_FILE, SKIPPED_FILE = "errors.parquet", "skipped.parquet"
STORED = ("moments", "mean", "sample")
#: fields that every contract must have
_FIELDS = ("vae", "stored", "scaled", "dtype", "preprocessing", "affine", "sha256")
_PAIRS = ("original_size", "resized", "crop", "latent_size")


class Latent(NamedTuple):
    """One entry: the latents of an image or of its mirror image."""

    id: str
    latents: Any  #: NumPy array or torch tensor [C, h, w]; for moments [2C, h, w]: mean, then logvar
    original_size: tuple[int, int]  #: height and width of the image
    resized: tuple[int, int]  #: height and width to which it was resized
    crop: tuple[int, int]  #: top and left of the crop in the resized image
    flipped: bool  #: whether the image was mirrored left to right


class LatentDataset:
    """An open directory of latents; `len`, `[number]`, iteration in the order of the files, and `by_id`.

    Arguments that are given are compared with the directory's contract; `CompatibilityError` names the difference.
    `vae` is a bundle (its path, or opened) or the sha256 of a VAE's weights; `stored` is "moments", "mean" or
    "sample"; `scaled` is whether latents have the scale that a diffusion model takes; `policy` is "none",
    "center-crop" or "buckets"; `size` is the (width, height) that all images must have.

    `contract` is the content of contract.json; `sizes`, int32 [N, 2], holds the height and width of every entry's
    latents; `ids` is a pyarrow array of the ids in order.

    Every read compares the latents with their hash. With `verify`, the first read from a shard also compares the whole
    file with its hash. A process that reads in random order then reads the whole dataset once, at the speed of
    SHA-256; `vae-export verify-latents` makes this check beforehand.

    Raises `BundleError` for a directory without finished latents, `IntegrityError` for damaged files.
    Threads and processes may share an instance: it is pickled as its path.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vae: str | Path | Bundle | VaeRuntime | None = None,
        stored: str | None = None,
        scaled: bool | None = None,
        policy: str | None = None,
        size: tuple[int, int] | None = None,
        torch: bool = False,
        verify: bool = False,
    ) -> None:
        self.path = Path(path)
        self._verify = verify
        self.contract = read_contract(self.path)
        self._torch = torch
        if torch and "torch" not in sys.modules:
            raise ConfigError("torch=True, and torch is not imported: import torch before opening the latents")
        self._check_vae(vae)
        for name, wanted in (("stored", stored), ("scaled", scaled)):
            if wanted is not None and self.contract[name] != wanted:
                raise CompatibilityError(f"{self.path}: {name} is {self.contract[name]!r}, not {wanted!r}")
        self._check_sizes(policy, size)
        table = read_index(self.path)
        self.ids = table.column("id").combine_chunks()
        columns = {name: table.column(name).to_numpy() for name in ("shard", "entry", "flipped")}
        self._shard, self._entry, self._flipped = columns["shard"], columns["entry"], columns["flipped"]
        self._pairs = {name: _pair(table, name) for name in _PAIRS}
        self._sha256 = table.column("sha256").combine_chunks()
        self.sizes: Array = self._pairs["latent_size"]
        keys = np.fromiter((_key(name.as_py(), bool(f)) for name, f in zip(self.ids, self._flipped, strict=True)), "u8")
        self._by_key = np.argsort(keys, kind="stable")
        self._keys = keys[self._by_key]
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, number: int) -> Latent:
        """Read entry `number`, from 0; negative numbers count from the end. `IndexError` beyond the last entry."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"entry {number} of {len(self)}")
        number %= len(self)
        stored = self._open(number).latents(int(self._entry[number]))
        return self._described(number)._replace(latents=self._to_output(stored))

    def __iter__(self) -> Iterator[Latent]:
        return (self[number] for number in range(len(self)))

    def described(self) -> Iterator[Latent]:
        """Yield all entries in order from the index alone: with `latents=None`, without reading a shard."""
        return (self._described(number) for number in range(len(self)))

    def _described(self, number: int) -> Latent:
        pairs = {name: tuple(self._pairs[name][number].tolist()) for name in _PAIRS if name != "latent_size"}
        return Latent(id=self.ids[number].as_py(), latents=None, flipped=bool(self._flipped[number]), **pairs)

    def find(self, id: str, *, flipped: bool = False) -> int:
        """Return the number of the entry with this id. Raises `KeyError` if there is none."""
        key = np.uint64(_key(id, flipped))
        first = int(np.searchsorted(self._keys, key))
        while first < len(self) and self._keys[first] == key:
            number = int(self._by_key[first])
            if self.ids[number].as_py() == id and bool(self._flipped[number]) == flipped:
                return number
            first += 1
        raise KeyError(f"no latents of {id!r}{', flipped,' if flipped else ''} in {self.path}")

    def by_id(self, id: str, *, flipped: bool = False) -> Latent:
        """Read the entry with this id. Raises `KeyError` if there is none."""
        return self[self.find(id, flipped=flipped)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self._torch, self._verify)

    def __repr__(self) -> str:
        return f"<LatentDataset {self.path}, {len(self)} x {self.contract['stored']} {self.contract['dtype']}>"

    # Files ----------------------------------------------------------------------------------------------------------

    def _open(self, number: int) -> Shard:
        """Return the shard of an entry; `IntegrityError` if the shard was replaced after the index was written."""
        of_shard = int(self._shard[number])
        shard = self._shards.get(of_shard)
        if shard is None:
            path = self.path / SHARDS / shard_name(of_shard)
            if self._verify:
                check_hash(path)
            shard = self._shards[of_shard] = open_shard(path)
        entry = int(self._entry[number])
        if entry >= len(shard) or shard.sha256[entry].tobytes() != self._sha256[number].as_py():
            raise IntegrityError(f"{shard.path} was rewritten after these latents were opened: open them again")
        return shard

    def _to_output(self, stored: Array) -> Any:
        if not self._torch:
            return from_stored(stored)
        torch = sys.modules["torch"]
        if stored.dtype == np.uint16:
            return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(stored.copy())

    # The contract ---------------------------------------------------------------------------------------------------

    def _check_vae(self, vae: Any) -> None:
        if vae is None:
            return
        recorded = self.contract["vae"]
        field, wanted = _identity(vae)
        if field == "weights_sha256" and recorded[field] is None:
            raise CompatibilityError(f"{self.path} does not say which weights made it; give its bundle instead")
        if recorded[field] != wanted:
            raise CompatibilityError(
                f"{self.path} was made by a VAE of {field} {recorded[field]}, not {wanted}: encode the images with "
                "the right VAE, into another directory"
            )

    def _check_sizes(self, policy: str | None, size: tuple[int, int] | None) -> None:
        recorded = self.contract["preprocessing"]
        if policy is not None and recorded["policy"] != policy:
            raise CompatibilityError(f"{self.path}: policy is {recorded['policy']!r}, not {policy!r}")
        if size is not None and recorded["sizes"] != [list(size)]:
            sizes = ", ".join(f"{width}x{height}" for width, height in recorded["sizes"][:5]) or "any"
            raise CompatibilityError(f"{self.path}: sizes of images are {sizes}, not {size[0]}x{size[1]} alone")


def read_contract(directory: Path) -> dict[str, Any]:
    """Read contract.json of a directory of latents.

    Raises `BundleError` if there is none, `CompatibilityError` for another schema, `IntegrityError` if it is damaged.
    """
    try:
        contract = json.loads((directory / CONTRACT_FILE).read_bytes())
        schema = contract["schema_version"]
        missing = [field for field in _FIELDS if field not in contract]
        if schema == SCHEMA_VERSION and missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{directory} has no {CONTRACT_FILE}: not latents of vae-export") from None
    except OSError as error:
        raise BundleError(f"{directory / CONTRACT_FILE} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{directory / CONTRACT_FILE} is not a contract of latents: {error}") from None
    if schema != SCHEMA_VERSION:
        raise CompatibilityError(
            f"{directory} has schema version {schema!r}, and this vae-export reads {SCHEMA_VERSION}: encode the images "
            "again, into another directory"
        )
    if contract.pop("sha256") != contract_digest(contract):
        raise IntegrityError(
            f"{directory / CONTRACT_FILE} was changed since it was written: restore it from a copy, or encode the "
            "images again, into another directory"
        )
    return dict(contract)


def contract_digest(contract: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a contract without its field `sha256`, which holds this value in the file."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()


def read_index(directory: Path) -> Any:
    """Read index.parquet of a directory of latents as a pyarrow table.

    Raises `BundleError` if the job has not finished, `IntegrityError` for a damaged file.
    """
    path = directory / INDEX_FILE
    if not path.exists():
        raise BundleError(
            f"{directory} has no {INDEX_FILE}: its job has not finished; run encode-dataset again to continue it"
        )
    return read_parquet(path, index_schema())


def index_schema() -> Any:
    """Return the pyarrow schema of index.parquet: one row per entry."""
    pyarrow = import_pyarrow()
    pair = pyarrow.list_(pyarrow.int32(), 2)
    return pyarrow.schema(
        {
            **{"id": pyarrow.string(), "flipped": pyarrow.bool_(), "shard": pyarrow.int32()},
            **{"entry": pyarrow.int32(), "latent_size": pair, "original_size": pair, "resized": pair},
            **{"crop": pair, "sha256": pyarrow.binary(32)},
        }
    )


def errors_schema() -> Any:
    """Return the pyarrow schema of errors.parquet: one row per image that could not be encoded."""
    pyarrow = import_pyarrow()
    return pyarrow.schema({"id": pyarrow.string(), "reason": pyarrow.string(), "sha256": pyarrow.binary(32)})


def read_parquet(path: Path, schema: Any) -> Any:
    """Read a table with this schema and verify the checksums of its pages. Raises `IntegrityError` for damage."""
    pyarrow = import_pyarrow()
    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
        if table.schema != schema:
            raise ValueError("its columns are not those that were written")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is not readable: {error}; run the encode-dataset command again") from None
    return table


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"{number:08d}.safetensors"


def import_pyarrow() -> Any:
    """Import pyarrow with its parquet module. Raises `NotInstalled` if it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise NotInstalled("datasets of latents need pyarrow: pip install 'vae-export[dataset]'") from None
    return pyarrow


def manifest_sha256(bundle: Bundle) -> str:
    """Return the SHA-256 of a bundle's manifest; it identifies the bundle, as the manifest hashes all other files."""
    return hashlib.sha256((bundle.directory / MANIFEST_FILE).read_bytes()).hexdigest()


def _identity(vae: Any) -> tuple[str, str]:
    """Return the field of the contract's `vae` that identifies the VAE, and its value for this VAE."""
    if isinstance(vae, str) and len(vae) == 64 and not Path(vae).exists():
        return "weights_sha256", vae.lower()
    if isinstance(vae, VaeRuntime):
        vae = vae._bundle
    bundle = vae if isinstance(vae, Bundle) else Bundle(vae)
    weights = bundle.manifest.source.get("weights_sha256")
    return ("manifest_sha256", manifest_sha256(bundle)) if weights is None else ("weights_sha256", str(weights))


def _key(id: str, flipped: bool) -> int:
    digest = hashlib.blake2b(id.encode(), digest_size=8, person=b"flipped" if flipped else b"")
    return int.from_bytes(digest.digest(), "little")


def _pair(table: Any, name: str) -> Array:
    """Convert a column of lists of two numbers to int32 [N, 2]."""
    flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.int32).reshape(-1, 2)


def _reopen(path: str, torch: bool, verify: bool) -> LatentDataset:
    if torch:
        importlib.import_module("torch")  # a worker process of a DataLoader may not have imported it yet
    return LatentDataset(path, torch=torch, verify=verify)
