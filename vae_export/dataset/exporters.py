"""Stored latents in the formats that trainers read: sd-scripts' .npz, WebDataset tars, parquet for `datasets`."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from runtimes.errors import BundleError, ConfigError
from runtimes.latents.dataset import Latent, LatentDataset, import_pyarrow
from runtimes.latents.shards import Array

Progress = Callable[[str, int, int], None]
#: model -> (suffix of the file, whether latents are scaled there, whether keys carry the size of the latents)
SD_SCRIPTS = {
    "sd": ("_sd.npz", False, False),
    "sdxl": ("_sdxl.npz", False, False),
    "sd3": ("_sd3.npz", False, True),
    "flux": ("_flux.npz", True, True),
}
FORMATS = ("sd-scripts", "webdataset", "parquet")
PER_FILE = 10_000  #: entries of a tar or parquet file


def export_latents(
    dataset: LatentDataset,
    out: str | Path,
    to: str,
    *,
    model: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> int:
    """Write all latents into the new directory `out`, whole or not at all -> how many entries.

    `to` is one of FORMATS; sd-scripts needs the `model`, one of SD_SCRIPTS: that decides the names of the files, and
    whether their latents are scaled; of moments it takes the mean. Raises `ConfigError` for anything else.
    """
    writers = {"sd-scripts": _to_sd_scripts, "webdataset": _to_webdataset, "parquet": _to_parquet}
    if to not in writers:
        raise ConfigError(f"no format {to!r} to export to; known are {', '.join(FORMATS)}")
    if (to == "sd-scripts") != (model is not None) or (model is not None and model not in SD_SCRIPTS):
        raise ConfigError(f"--model goes with sd-scripts, and is one of {', '.join(SD_SCRIPTS)}; it is {model}")
    with _new_directory(Path(out)) as directory:
        for done in writers[to](dataset, directory, model):
            progress(f"Exporting to {to}", done, len(dataset))
    return len(dataset)


def _to_sd_scripts(dataset: LatentDataset, directory: Path, model: str | None) -> Iterator[int]:
    """NAME_WIDTHxHEIGHT_sdxl.npz beside where the image NAME.jpg would be, with what sd-scripts caches itself.

    Two images that differ in their suffix alone would be one file there: `ConfigError`.
    """
    assert model is not None
    suffix, scaled, sized = SD_SCRIPTS[model]
    factor = int(dataset.contract["vae"]["downscale"])
    for number, entry in enumerate(dataset, start=1):
        if entry.flipped:  # goes with the other
            continue
        height, width = entry.original_size
        path = directory / _inside(os.path.splitext(entry.id)[0] + f"_{width:04d}x{height:04d}{suffix}")
        if path.exists():
            raise ConfigError(f"{entry.id!r} and another image of its name and size would both be {path.name}")
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


def _to_webdataset(dataset: LatentDataset, directory: Path, _: str | None) -> Iterator[int]:
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


def _to_parquet(dataset: LatentDataset, directory: Path, _: str | None) -> Iterator[int]:
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
