"""Stored latents in the formats that trainers read: sd-scripts' .npz, WebDataset tars, parquet for `datasets`."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.errors import BundleError, ConfigError
from runtimes.latents.dataset import Latent, LatentDataset, import_pyarrow
from runtimes.latents.shards import Array
from runtimes.progress import Progress, no_progress

#: model -> (suffix of the file, whether latents are scaled there, whether keys carry the size of the latents)
SD_SCRIPTS = {
    "sd": ("_sd.npz", False, False),
    "sdxl": ("_sdxl.npz", False, False),
    "sd3": ("_sd3.npz", False, True),
    "flux": ("_flux.npz", True, True),
}
FORMATS = ("sd-scripts", "webdataset", "parquet")
CLASHES = ("refuse", "skip", "suffix")
PER_FILE = 10_000  #: entries of a tar or parquet file


@dataclass(frozen=True)
class Exported:
    """What an export wrote. Without clashes both tuples are empty."""

    entries: int
    skipped: tuple[str, ...] = ()  #: ids that were left out
    renamed: tuple[tuple[str, str], ...] = ()  #: (id, the image's new path without suffix)


@dataclass(frozen=True)
class Names:
    """id -> the path of its image without suffix, for sd-scripts; and what was done about clashes."""

    stems: dict[str, str]
    skipped: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]


def export_latents(
    dataset: LatentDataset,
    out: str | Path,
    to: str,
    *,
    model: str | None = None,
    clashes: str = "refuse",
    progress: Progress = no_progress,
) -> Exported:
    """Write all latents into the new directory `out`, whole or not at all.

    `to` is one of FORMATS; sd-scripts needs the `model`, one of SD_SCRIPTS: it decides the names of the files, and
    whether their latents are scaled; of moments sd-scripts gets the mean.

    sd-scripts names a cache by the path and size of its image, without the image's suffix, so a.jpg and a.png of one
    size clash. `clashes` says what to do: "refuse" raises `ConfigError` that lists them; "skip" writes the first in the
    order of the dataset and leaves the others out; "suffix" adds their suffix to the names of the others: a-png for
    a.png. Images that were left out or renamed here must be removed or renamed where sd-scripts trains, since it would
    take the first image's latents for them.

    Raises `ConfigError` for anything else.
    """
    if to not in FORMATS:
        raise ConfigError(f"no format {to!r} to export to; known are {', '.join(FORMATS)}")
    if (to == "sd-scripts") != (model is not None) or (model is not None and model not in SD_SCRIPTS):
        raise ConfigError(f"--model goes with sd-scripts, and is one of {', '.join(SD_SCRIPTS)}; it is {model}")
    if clashes not in CLASHES:
        raise ConfigError(f"clashes {clashes!r}; known are {', '.join(CLASHES)}")
    if clashes != "refuse" and to != "sd-scripts":
        raise ConfigError(f"clashes of names arise for sd-scripts alone, not for {to}")
    names = Names({}, (), ()) if model is None else _sd_scripts_names(dataset, clashes)
    with _new_directory(Path(out)) as directory:
        if model is not None:
            steps = _to_sd_scripts(dataset, directory, model, names)
        else:
            steps = (_to_webdataset if to == "webdataset" else _to_parquet)(dataset, directory)
        for done in steps:
            progress(f"Exporting to {to}", done, len(dataset))
    left_out = set(names.skipped)
    written = sum(entry.id not in left_out for entry in dataset.described()) if left_out else len(dataset)
    return Exported(written, names.skipped, names.renamed)


def _sd_scripts_names(dataset: LatentDataset, clashes: str) -> Names:
    """Name every image's file, and do as `clashes` says about names that are wanted twice."""
    groups: dict[str, list[str]] = defaultdict(list)  # name of the file, without the model's suffix -> ids
    for entry in dataset.described():
        if not entry.flipped:
            groups[_sd_scripts_name(_stem(entry.id), entry)].append(entry.id)
    clashing = [ids for ids in groups.values() if len(ids) > 1]
    if clashing and clashes == "refuse":
        listed = "; ".join(" and ".join(ids) for ids in clashing)
        raise ConfigError(
            "sd-scripts has one name for images that differ in their suffix alone, here "
            f"{len(clashing)} times: {listed}. --skip-clashes exports the first of each; --suffix-clashes adds their "
            "suffix to the names of the others"
        )
    stems = {ids[0]: _stem(ids[0]) for ids in groups.values()}
    others = {id for ids in clashing for id in ids[1:]}
    if clashes == "skip":
        return Names(stems, tuple(sorted(others)), ())
    renamed = []
    for entry in dataset.described():
        if entry.flipped or entry.id not in others:
            continue
        stem, suffix = os.path.splitext(entry.id)
        new = base = f"{stem}-{suffix.removeprefix('.')}"
        number = 2
        while _sd_scripts_name(new, entry) in groups:
            new, number = f"{base}-{number}", number + 1
        groups[_sd_scripts_name(new, entry)] = [entry.id]
        stems[entry.id] = new
        renamed.append((entry.id, new))
    return Names(stems, (), tuple(renamed))


def _stem(id: str) -> str:
    return os.path.splitext(id)[0]


def _sd_scripts_name(stem: str, entry: Latent) -> str:
    height, width = entry.original_size
    return f"{stem}_{width:04d}x{height:04d}"


def _to_sd_scripts(dataset: LatentDataset, directory: Path, model: str, names: Names) -> Iterator[int]:
    """Write NAME_WIDTHxHEIGHT_sdxl.npz where the image NAME.jpg would be, with what sd-scripts itself caches."""
    suffix, scaled, sized = SD_SCRIPTS[model]
    factor = int(dataset.contract["vae"]["downscale"])
    for number, entry in enumerate(dataset, start=1):
        if entry.flipped or entry.id not in names.stems:  # the mirror image is in the file of its image
            continue
        height, width = entry.original_size
        path = directory / _inside(_sd_scripts_name(names.stems[entry.id], entry) + suffix)
        latents = _latents(dataset, entry, scaled)
        size = latents.shape[1:]
        key = f"_{size[0]}x{size[1]}" if sized else ""
        arrays = {
            f"latents{key}": latents,
            f"original_size{key}": np.array([width, height]),
            f"crop_ltrb{key}": np.array(_crop_ltrb((size[1] * factor, size[0] * factor), (width, height))),
        }
        if dataset.contract["preprocessing"]["flips"]:
            arrays[f"latents_flipped{key}"] = _latents(dataset, dataset.by_id(entry.id, flipped=True), scaled)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)  # type: ignore[arg-type]
        yield number


def _to_webdataset(dataset: LatentDataset, directory: Path) -> Iterator[int]:
    """00000.tar, ...: NUMBER.npy with the latents as stored (bfloat16 as float32), NUMBER.json with the rest."""
    for first in range(0, len(dataset), PER_FILE):
        with tarfile.open(directory / f"{first // PER_FILE:05d}.tar", "w") as tar:
            for number in range(first, min(first + PER_FILE, len(dataset))):
                entry = dataset[number]
                file = io.BytesIO()
                np.save(file, entry.latents)
                about = {name: value for name, value in entry._asdict().items() if name != "latents"}
                for suffix, data in (("npy", file.getvalue()), ("json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                yield number + 1


def _to_parquet(dataset: LatentDataset, directory: Path) -> Iterator[int]:
    """00000.parquet, ...: latents as lists [C][h][w], for `datasets.load_dataset("parquet", data_dir=...)`."""
    pyarrow = import_pyarrow()
    number = pyarrow.float16() if dataset.contract["dtype"] == "float16" else pyarrow.float32()
    pair = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema(
        {
            **{"id": pyarrow.string(), "latents": pyarrow.list_(pyarrow.list_(pyarrow.list_(number)))},
            **{"original_size": pair, "resized": pair, "crop": pair, "flipped": pyarrow.bool_()},
        }
    )
    for first in range(0, len(dataset), PER_FILE):
        with pyarrow.parquet.ParquetWriter(directory / f"{first // PER_FILE:05d}.parquet", schema) as writer:
            last = min(first + PER_FILE, len(dataset))
            for start in range(first, last, 100):
                entries = [dataset[row]._asdict() for row in range(start, min(start + 100, last))]
                for entry in entries:
                    entry["latents"] = [[list(row) for row in channel] for channel in entry["latents"]]
                writer.write_table(pyarrow.Table.from_pylist(entries, schema=schema))
                yield start + len(entries)


def _latents(dataset: LatentDataset, entry: Latent, scaled: bool) -> Array:
    """float32 [C, h, w], the mean of moments, scaled or raw as it is wanted."""
    latents = np.asarray(entry.latents, np.float32)
    if dataset.contract["stored"] == "moments":
        latents = latents[: len(latents) // 2]
    if dataset.contract["scaled"] == scaled:
        return latents
    affine = dataset.contract["affine"]
    if affine is None:
        raise ConfigError("these latents are raw, and their VAE's scaling_factor is not known: not for this model")
    multiply, add = (np.asarray(affine[name], np.float32).reshape(-1, 1, 1) for name in ("multiply", "add"))
    return (latents - add) * multiply if scaled else latents / multiply + add


def _crop_ltrb(bucket: tuple[int, int], image: tuple[int, int]) -> tuple[float, float, float, float]:
    """As sd-scripts' BucketManager.get_crop_ltrb has it, of (width, height): where the whole image would lie in the
    bucket, fitted into it."""
    if bucket[0] / bucket[1] > image[0] / image[1]:
        width, height = bucket[1] * image[0] / image[1], float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] * image[1] / image[0]
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def _inside(name: str) -> Path:
    """A path below the directory: what would lead out of it is `ConfigError`."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"the id {name!r} leads out of the directory")
    return path


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory that takes the name `out` when the block ends well; otherwise nothing stays behind."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {out.parent}: {error.strerror}; choose another --out") from None
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, out)
    except OSError as error:
        raise BundleError(f"writing {out} failed: {error.strerror or error}; nothing was left behind") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
