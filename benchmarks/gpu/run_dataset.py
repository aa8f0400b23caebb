"""Stage dataset: encode-dataset with the card kept busy, and for two minutes.

The images are JPEGs of 1024x768, a hundred of them under many names. `backend_busy` is the share of the time in the
backend; what nvidia-smi says of the card is under "during". The last rows go on for two minutes: rate and memory of
their first and last quarter should not differ.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.dataset import STORAGE, make_photographs
from benchmarks.gpu.made import EMBEDDED
from benchmarks.gpu.run_ort import load_provider
from benchmarks.gpu.stage import Stage, require
from benchmarks.memory_model import status
from vae_export.dataset.job import Opening, encode_dataset
from vae_export.dataset.sources import open_source

PHOTOGRAPHS = 100  #: that differ
ENDURANCE_SECONDS = 120
#: name -> target, precision, device; onnx needs the provider, flax runs with the JAX that is there
BACKENDS = {
    "onnx fp16": ("onnx", "fp16", "cuda"),
    "flax bf16": ("flax", "bf16", "gpu"),
}


def run(stage: Stage) -> None:
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(stage, Path(name))
        sides, images = ((64,), 6) if stage.rehearsal else ((512, 1024), 1000)
        for side in sides:
            for backend in BACKENDS:
                for batch in (8,) if stage.rehearsal else (8, 32):
                    facts = {"side": side, "images": images, "batch": batch}
                    stage.measure(
                        f"{backend} {side} batch {batch}",
                        facts,
                        lambda backend=backend, side=side, batch=batch: bench.encode(backend, side, batch, images),  # type: ignore[misc]
                    )
        for backend in BACKENDS:
            facts = {"side": sides[0], "batch": 8}
            stage.measure(
                f"endurance {backend} {sides[0]}",
                facts,
                lambda backend=backend: bench.endure(backend, sides[0]),  # type: ignore[misc]
            )


class Bench:
    def __init__(self, stage: Stage, directory: Path) -> None:
        self.stage, self.directory = stage, directory
        self.model = EMBEDDED if stage.rehearsal else "sd"

    def photographs(self, count: int) -> Path:
        """`count` names of some JPEGs."""
        originals, folder = self.directory / "originals", self.directory / f"photographs-{count}"
        if not originals.exists():
            make_photographs(originals, min(PHOTOGRAPHS, 3) if self.stage.rehearsal else PHOTOGRAPHS)
        if not folder.exists():
            folder.mkdir()
            files = sorted(originals.iterdir())
            for number in range(count):
                os.link(files[number % len(files)], folder / f"{number:06d}.jpg")
        return folder

    def opening(self, backend: str) -> Opening:
        target, precision, device = BACKENDS[backend]
        if target == "onnx":
            load_provider(require("onnxruntime", "it encodes"), self.stage.rehearsal)
        return Opening(
            str(self.stage.made.bundle(self.model, target, precision)), device="cpu" if self.stage.rehearsal else device
        )

    def encode(self, backend: str, side: int, batch: int, images: int) -> dict[str, Any]:
        out = self.directory / f"latents-{time.monotonic_ns()}"
        folder, opening = self.photographs(images), self.opening(backend)
        summary = encode_dataset(
            open_source(str(folder)),
            out,
            opening,
            storage=STORAGE,
            policy="center-crop",
            sizes=((side, side),),
            batch_size=batch,
            images_per_shard=256,
            workers=1 if self.stage.rehearsal else None,
        ).to_dict()
        found = {name: summary[name] for name in ("seconds", "images_per_second", "backend_busy", "encoded", "failed")}
        return found | {"errors": found.pop("failed")}

    def endure(self, backend: str, side: int) -> dict[str, Any]:
        """The same again and again; the process and its memory stay."""
        seconds = 2 if self.stage.rehearsal else ENDURANCE_SECONDS
        images = 6 if self.stage.rehearsal else 1000
        start = time.monotonic()
        rates: list[float] = []
        memory: list[float] = []
        end, longest = min(start + seconds, self.stage.deadline), 0.0
        while not rates or time.monotonic() + longest < end:
            began = time.monotonic()
            rates.append(self.encode(backend, side, 8, images)["images_per_second"])
            memory.append(status("VmRSS") / 1e6)
            longest = max(longest, time.monotonic() - began)
        quarter = max(1, len(rates) // 4)

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        return {
            "rounds": len(rates),
            "lasted_seconds": time.monotonic() - start,
            "images_per_second_first": mean(rates[:quarter]),
            "images_per_second_last": mean(rates[-quarter:]),
            "resident_mb_first": mean(memory[:quarter]),
            "resident_mb_last": mean(memory[-quarter:]),
        }
