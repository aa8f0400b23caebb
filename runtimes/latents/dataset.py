"""`LatentDataset`: latents that `vae-export encode-dataset` stored, by number, by id, or one after the other.

    from runtimes.latents.dataset import LatentDataset

    dataset = LatentDataset("latents/", vae="sdxl", scaled=True)  # refused if another VAE made them, or they are raw
    dataset[0].latents                                            # float16 [C, h, w]
    dataset.by_id("cats/001.jpg").crop                            # (top, left)

Without PyTorch; with `torch=True` latents are tensors, and the dataset goes into a `torch.utils.data.DataLoader` as it
is: of one size, or with a batch sampler over `sizes`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
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
_FIELDS = (
    "vae",
    "stored",
    "scaled",
    "dtype",
    "preprocessing",
    "affine",
    "sha256",
)  #: of a contract, that are read here
_PAIRS = ("original_size", "resized", "crop", "latent_size")


class Latent(NamedTuple):
    """An entry: what is stored of an image, or of its mirror image."""

    id: str
    latents: Any  #: [C, h, w], NumPy's or torch's; [2C, h, w] for moments: mean, then logvar
    original_size: tuple[int, int]  #: height and width of the image
    resized: tuple[int, int]  #: height and width to which it was resized
    crop: tuple[int, int]  #: top and left of what was kept of that
    flipped: bool


class LatentDataset:
    """A directory of latents, opened; `len`, `[number]`, iteration in the order of the files, and `by_id`.

    What the caller says is held against the contract that the directory came with, and `CompatibilityError` names what
    differs: `vae` is a bundle (its path, or opened) or the sha256 of a VAE's weights; `stored` is "moments", "mean" or
    "sample"; `scaled` whether latents are as a diffusion model takes them; `policy` "none", "center-crop" or "buckets",
    and `size` (width, height) the only size of image. What is not given is not checked.

    `contract` is what the contract says, `sizes` int32 [N, 2] the height and width of every entry's latents, and `ids`
    the ids in order, as a pyarrow array.

    Latents are compared with their hash whenever they are read. With `verify`, each shard is also read as a whole and
    compared with the hash of the file when the first of its entries is asked for. A process that reads in random order
    then reads the whole dataset once, at the speed of SHA-256; `vae-export verify-latents` does that beforehand.

    Raises `BundleError` for a directory without finished latents, `IntegrityError` for files that are damaged.
    Threads may share it, and processes: it is pickled as its path.
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
        self._compare(vae, {"stored": stored, "scaled": scaled})
        self._compare_sizes(policy, size)
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
        """The entry of this number, from 0; negative numbers count from the end. `IndexError` beyond."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"entry {number} of {len(self)}")
        number %= len(self)
        stored = self._open(number).latents(int(self._entry[number]))
        return self._described(number)._replace(latents=self._given(stored))

    def __iter__(self) -> Iterator[Latent]:
        return (self[number] for number in range(len(self)))

    def described(self) -> Iterator[Latent]:
        """All entries in order with `latents=None`: what the index says of them, and no shard is read."""
        return (self._described(number) for number in range(len(self)))

    def _described(self, number: int) -> Latent:
        pairs = {name: tuple(self._pairs[name][number].tolist()) for name in _PAIRS if name != "latent_size"}
        return Latent(id=self.ids[number].as_py(), latents=None, flipped=bool(self._flipped[number]), **pairs)

    def find(self, id: str, *, flipped: bool = False) -> int:
        """The number of the entry with this id. `KeyError` where there is none."""
        key = np.uint64(_key(id, flipped))
        first = int(np.searchsorted(self._keys, key))
        while first < len(self) and self._keys[first] == key:
            number = int(self._by_key[first])
            if self.ids[number].as_py() == id and bool(self._flipped[number]) == flipped:
                return number
            first += 1
        raise KeyError(f"no latents of {id!r}{', flipped,' if flipped else ''} in {self.path}")

    def by_id(self, id: str, *, flipped: bool = False) -> Latent:
        """The entry with this id. `KeyError` where there is none."""
        return self[self.find(id, flipped=flipped)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self._torch, self._verify)

    def __repr__(self) -> str:
        return f"<LatentDataset {self.path}, {len(self)} x {self.contract['stored']} {self.contract['dtype']}>"

    # Files ----------------------------------------------------------------------------------------------------------

    def _open(self, number: int) -> Shard:
        """The shard that holds an entry; `IntegrityError` where it is not the one that the index was made of."""
        of_shard = int(self._shard[number])
        shard = self._shards.get(of_shard)
        if shard is None:
            path = self.path / SHARDS / shard_name(of_shard)
            if self._verify:
                check_hash(path)
            shard = self._shards[of_shard] = open_shard(path)
        entry = int(self._entry[number])
        if entry >= len(shard) or shard.sha256[entry].tobytes() != self._sha256[number].as_py():
            raise IntegrityError(f"{shard.path} was written anew since these latents were opened: open them again")
        return shard

    def _given(self, stored: Array) -> Any:
        if not self._torch:
            return from_stored(stored)
        torch = sys.modules["torch"]
        if stored.dtype == np.uint16:
            return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(stored.copy())

    # The contract ---------------------------------------------------------------------------------------------------

    def _compare(self, vae: Any, said: Mapping[str, Any]) -> None:
        if vae is not None:
            mine = self.contract["vae"]
            field, wanted = _identity(vae)
            if field == "weights_sha256" and mine[field] is None:
                raise CompatibilityError(f"{self.path} does not say which weights made it; give its bundle instead")
            if mine[field] != wanted:
                raise CompatibilityError(
                    f"{self.path} was made by a VAE of {field} {mine[field]}, not {wanted}: encode the images with "
                    "the VAE that is wanted, into another directory"
                )
        for name, wanted in said.items():
            if wanted is not None and self.contract[name] != wanted:
                raise CompatibilityError(f"{self.path}: {name} is {self.contract[name]!r}, not {wanted!r}")

    def _compare_sizes(self, policy: str | None, size: tuple[int, int] | None) -> None:
        made = self.contract["preprocessing"]
        if policy is not None and made["policy"] != policy:
            raise CompatibilityError(f"{self.path}: policy is {made['policy']!r}, not {policy!r}")
        if size is not None and made["sizes"] != [list(size)]:
            sizes = ", ".join(f"{width}x{height}" for width, height in made["sizes"][:5]) or "any"
            raise CompatibilityError(f"{self.path}: sizes of images are {sizes}, not {size[0]}x{size[1]} alone")


def read_contract(directory: Path) -> dict[str, Any]:
    """contract.json of a directory of latents. `BundleError` where there is none, `CompatibilityError` for another
    schema, `IntegrityError` where it is damaged."""
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
    """SHA-256 of a contract, which the file states as `sha256`."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()


def read_index(directory: Path) -> Any:
    """Read index.parquet of a directory of latents. `BundleError` where the job has not finished, `IntegrityError` for
    a damaged file."""
    path = directory / INDEX_FILE
    if not path.exists():
        raise BundleError(
            f"{directory} has no {INDEX_FILE}: its job has not finished; run encode-dataset again, it goes on"
        )
    return read_parquet(path, index_schema())


def index_schema() -> Any:
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
    pyarrow = import_pyarrow()
    return pyarrow.schema({"id": pyarrow.string(), "reason": pyarrow.string(), "sha256": pyarrow.binary(32)})


def read_parquet(path: Path, schema: Any) -> Any:
    """Read a table, and compare its pages with their checksums. `IntegrityError` where it is damaged."""
    pyarrow = import_pyarrow()
    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
        if table.schema != schema:
            raise ValueError("its columns are not those that were written")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is not readable: {error}; run the encode-dataset command again") from None
    return table


def shard_name(number: int) -> str:
    return f"{number:08d}.safetensors"


def import_pyarrow() -> Any:
    """pyarrow, with its parquet module. `BackendUnavailable` where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise NotInstalled("datasets of latents need pyarrow: pip install 'vae-export[dataset]'") from None
    return pyarrow


def manifest_sha256(bundle: Bundle) -> str:
    """What tells a bundle from all others, its files being hashed in its manifest."""
    return hashlib.sha256((bundle.directory / MANIFEST_FILE).read_bytes()).hexdigest()


def _identity(vae: Any) -> tuple[str, str]:
    """The field of the contract that tells whether this VAE made the latents, and what stands there if it did."""
    if isinstance(vae, str) and len(vae) == 64 and not os.path.exists(vae):
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
    """int32 [N, 2] of a column of lists of two."""
    flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.int32).reshape(-1, 2)


def _reopen(path: str, torch: bool, verify: bool) -> LatentDataset:
    if torch:
        importlib.import_module("torch")  # in a worker process of a DataLoader
    return LatentDataset(path, torch=torch, verify=verify)
