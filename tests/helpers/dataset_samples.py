"""Small datasets, jobs over them, and what they wrote; also a program: a job that is killed at a chosen moment.

    python -m tests.helpers.dataset_samples SOURCE BUNDLE OUT MOMENT

kills itself, as kill -9 does, before the MOMENT-th time that it is about to encode, flush, rename or remove something;
it prints how many such moments there were if it gets to the end.
"""

import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vae_export.dataset import job as dataset
from vae_export.dataset.encode import Storage, encode_batch
from vae_export.dataset.job import Opening, encode_dataset
from vae_export.dataset.sources import Folder, open_source

SIZES = [(48, 40), (64, 40), (40, 64)]  # width, height
BUCKETS = ((48, 40), (40, 48))


def image_bytes(number, size=None, format="PNG"):
    width, height = size or SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def make_folder(directory, count=10):
    """`count` images, some of them in folders of their own; SIZES take turns."""
    for number in range(count):
        path = directory / (f"deep/er/{number:03d}.png" if number % 4 == 3 else f"{number:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    return directory


def encode(source, bundle, out, *, storage=None, **options):
    """A job of small shards and batches, in this process alone unless `workers` are given."""
    small = {"policy": "buckets", "sizes": BUCKETS, "batch_size": 2, "images_per_shard": 4, "workers": 0}
    source = open_source(source) if isinstance(source, (str, Path)) else source
    storage = Storage(**{"dtype": "float32"} | (storage or {}))
    return encode_dataset(source, out, Opening(str(bundle), threads=1), storage=storage, **{**small, **options})


def written(out):
    """{name: bytes} of all that a job leaves, but for what only it reads."""
    files = (path for path in Path(out).rglob("*") if path.is_file())
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in files
        if path.name not in ("plan.sqlite", "plan.sqlite-journal", ".lock")
    }


@dataclass(frozen=True)
class Deadly(Folder):
    """A folder in which reading one image ends the process that reads it."""

    victim: str = ""

    def read(self, item):
        if item.id == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item)


def main():
    source, bundle, out, moment = sys.argv[1:]
    count = 0

    def killed_before(function):
        def wrapper(*arguments, **options):
            nonlocal count
            count += 1
            if count == int(moment):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, killed_before(getattr(os, name)))
    setattr(dataset, "encode_batch", killed_before(encode_batch))  # noqa: B010  (mypy: the module imports it)
    encode(source, bundle, out)
    print(count)


if __name__ == "__main__":
    main()
