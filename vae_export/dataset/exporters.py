"""Export stored latents to the formats that trainers read: sd-scripts .npz, WebDataset tars, parquet for `datasets`."""

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

#: model -> (file suffix, whether sd-scripts expects scaled latents, whether array names contain the latent size)
SD_SCRIPTS = {
    "sd": ("_sd.npz", False, False),
    "sdxl": ("_sdxl.npz", False, False),
    "sd3": ("_sd3.npz", False, True),
    "flux": ("_flux.npz", True, True),
}
FORMATS = ("sd-scripts", "webdataset", "parquet")
CLASHES = ("refuse", "skip", "suffix")
PER_FILE = 10_000  #: entries per tar or parquet file


@dataclass(frozen=True)
class Exported:
    """The outcome of an export. Without name clashes both tuples are empty."""

    entries: int
    skipped: tuple[str, ...] = ()  #: ids that were not exported
    renamed: tuple[tuple[str, str], ...] = ()  #: (id, new path of the image without suffix)


@dataclass(frozen=True)
class Names:
    """The sd-scripts names: {id: path of the image without suffix}, and how clashes were resolved."""

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
    """Write all latents into the new directory `out`, atomically.

    `to` is one of FORMATS. "sd-scripts" requires `model`, one of SD_SCRIPTS, which determines the names of the files
    and whether their latents are scaled. If the dataset stores moments, sd-scripts files contain the mean.

    sd-scripts names a cache file by the path and size of the image, without the suffix of the image, so a.jpg and
    a.png of one size clash. `clashes` decides what happens then:

    - "refuse" raises `ConfigError`, which lists the clashing images;
    - "skip" exports the first image in the order of the dataset and omits the others;
    - "suffix" adds the suffix to the names of the others: a-png for a.png.

    Omitted or renamed images must also be removed or renamed in the training data of sd-scripts, which would otherwise
    use the latents of the first image for them.

    Raises `ConfigError` for invalid arguments, and `BundleError` if `out` exists or cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"no format {to!r} to export to; known are {', '.join(FORMATS)}")
    if (to == "sd-scripts") != (model is not None) or (model is not None and model not in SD_SCRIPTS):
        raise ConfigError(f"--model goes with sd-scripts, and is one of {', '.join(SD_SCRIPTS)}; it is {model}")
    if clashes not in CLASHES:
        raise ConfigError(f"clashes {clashes!r}; known are {', '.join(CLASHES)}")
    if clashes != "refuse" and to != "sd-scripts":
        raise ConfigError(f"names clash only in sd-scripts exports, not in {to}: omit the option")
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
    """Choose the file name of every image; resolve clashes as `clashes` says."""
    groups: dict[str, list[str]] = defaultdict(list)  # file name without the suffix of the model -> ids
    for entry in dataset.described():
        if not entry.flipped:
            groups[_sd_scripts_name(_stem(entry.id), entry)].append(entry.id)
    clashing = [ids for ids in groups.values() if len(ids) > 1]
    if clashing and clashes == "refuse":
        listed = "; ".join(" and ".join(ids) for ids in clashing)
        raise ConfigError(
            "sd-scripts gives the same name to images that differ only in their suffix, here "
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
    """Write NAME_WIDTHxHEIGHT_sdxl.npz at the relative path of NAME.jpg, with the arrays that sd-scripts caches.

    Yields the number of entries that are done.
    """
    suffix, scaled, sized = SD_SCRIPTS[model]
    factor = int(dataset.contract["vae"]["downscale"])
    for number, entry in enumerate(dataset, start=1):
        if entry.flipped or entry.id not in names.stems:  # latents of the mirror image go into the file of the image
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
    """Write 00000.tar, ...: NUMBER.npy with the latents as stored (bfloat16 as float32), NUMBER.json with the rest.

    Yields the number of entries that are done.
    """
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
    """Write 00000.parquet, ...: latents as lists [C][h][w], for `datasets.load_dataset("parquet", data_dir=...)`.

    Yields the number of entries that are done.
    """
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
    """Return the latents of an entry, float32 [C, h, w], scaled or raw; the mean if moments are stored."""
    latents = np.asarray(entry.latents, np.float32)
    if dataset.contract["stored"] == "moments":
        latents = latents[: len(latents) // 2]
    if dataset.contract["scaled"] == scaled:
        return latents
    affine = dataset.contract["affine"]
    if affine is None:
        raise ConfigError(
            "these latents are raw, the model needs scaled ones, and the scaling_factor of their VAE is not known"
        )
    multiply, add = (np.asarray(affine[name], np.float32).reshape(-1, 1, 1) for name in ("multiply", "add"))
    return (latents - add) * multiply if scaled else latents / multiply + add


def _crop_ltrb(bucket: tuple[int, int], image: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the whole image, fitted into the bucket. Sizes are (width, height).

    Same formula as sd-scripts' `BucketManager.get_crop_ltrb`.
    """
    if bucket[0] / bucket[1] > image[0] / image[1]:
        width, height = bucket[1] * image[0] / image[1], float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] * image[1] / image[0]
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def _inside(name: str) -> Path:
    """Return the name as a relative path. Raises `ConfigError` if it would lead out of the directory."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"the id {name!r} leads out of the directory")
    return path


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `out` when the block succeeds and deleted when it fails."""
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
        partial.rename(out)
    except OSError as error:
        raise BundleError(f"writing {out} failed: {error.strerror or error}; nothing was left behind") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
