"""Images a second of a whole dataset: python -m benchmarks.dataset

    one by one   the loop that people write: PIL -> torch -> vae.encode -> np.save, with diffusers' AutoencoderKL
    batched      the same model behind a torch DataLoader with worker processes, in batches
    ours         encode-dataset, on each of the backends given

All read the same JPEGs, resize and crop alike, and store scaled means in float32; each row runs in a process of its
own, its clock starting when the model is open. Printed are the largest difference from the first row, over the first
64 latents of the first image, and the share of the machine that other processes had: a row that was DISTURBED says
nothing. (Ray's processes count as others.)

    --memory     the peak of memory over 10,000 and 100,000 small images instead
    --ray        one and two workers of one core each on a Ray cluster of this machine instead
    --stages     what each stage costs an image, one after the other in one process, instead
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.memory_model import status
from runtimes import Bundle, children, open_vae
from runtimes.image_files import load_image
from runtimes.latents import LatentDataset
from vae_export.dataset.encode import BatchSize, Storage, encode_batch
from vae_export.dataset.images import Prepared, SizePolicy, prepare
from vae_export.dataset.job import Opening, encode_dataset, make_contract
from vae_export.dataset.plan import Plan
from vae_export.dataset.shards import Entry, LatentDirectory, write_shard
from vae_export.dataset.sources import open_source

STORAGE = Storage(stored="mean", scaled=True, dtype="float32")
PHOTO = (1024, 768)  #: pixels, of the JPEGs that are read
MOST_OF_OTHERS = 0.05  #: of the machine, during a row whose number means something
SMALL = 32  #: pixels a side, of the images of --memory


def ours(folder: str, bundle: str, side: int, directory: Path, **options: Any) -> dict[str, Any]:
    out = directory / f"ours-{time.monotonic_ns()}"
    options = {"policy": "center-crop", "sizes": ((side, side),)} | options
    threads = options.pop("threads", None)
    summary = encode_dataset(
        open_source(folder),
        out,
        Opening(bundle, threads=threads),
        storage=STORAGE,
        images_per_shard=options.pop("images_per_shard", 256),
        **options,
    ).to_dict()
    peak, before = status("VmHWM"), status("VmRSS")  # of the job: the reader holds the index
    latents = LatentDataset(out)
    reader = status("VmRSS") - before
    first = next(iter(latents))
    said = {
        "peak_mb": peak / 1e6,
        "reader_mb": reader / 1e6,
        "seconds": summary["seconds"],
        "busy": summary["backend_busy"],
        "images": summary["encoded"],
    }
    return said | {"first": first.latents.ravel()[:64].tolist()}


def prepared(path: Path, policy: SizePolicy) -> Any:
    """float32 [3, H, W] as a torch tensor, resized and cropped as ours."""
    import torch

    pixels = load_image(path)
    fit = policy.fit(pixels.shape[1], pixels.shape[0])
    image = Image.fromarray(pixels).resize(fit.resized, Image.Resampling.LANCZOS)
    image = image.crop((*fit.crop, fit.crop[0] + fit.size[0], fit.crop[1] + fit.size[1]))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Photographs:
    """A torch dataset of the prepared images."""

    def __init__(self, paths: list[Path], policy: SizePolicy) -> None:
        self.paths, self.policy = paths, policy

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        return prepared(self.paths[number], self.policy)


def theirs(folder: str, checkpoint: str, side: int, batch: int, precision: str, directory: Path) -> dict[str, Any]:
    """diffusers, one by one or (batch > 1) in batches from a DataLoader with two workers."""
    import torch
    from diffusers import AutoencoderKL

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    vae = AutoencoderKL.from_pretrained(checkpoint, torch_dtype=dtype).eval()
    multiply, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    paths, policy = sorted(Path(folder).glob("*.jpg")), SizePolicy("center-crop", ((side, side),), 8)
    loaded: Any = [None]
    if batch > 1:
        loaded = torch.utils.data.DataLoader(Photographs(paths, policy), batch_size=batch, num_workers=2)  # type: ignore[arg-type]
    first: list[float] = []
    busy = 0.0
    start, done = time.perf_counter(), 0
    for images in loaded if batch > 1 else (prepared(path, policy)[None] for path in paths):
        began = time.perf_counter()
        with torch.no_grad():
            latents = ((vae.encode(images.to(dtype)).latent_dist.mode().float() - shift) * multiply).numpy()
        busy += time.perf_counter() - began
        for each in latents:
            np.save(directory / f"{done}.npy", each)
            done += 1
        first = first or latents[0].ravel()[:64].tolist()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "busy": busy / seconds, "images": done, "first": first}


def memory(folder: str, bundle: str, directory: Path) -> dict[str, Any]:
    return ours(folder, bundle, SMALL, directory, policy="none", sizes=(), workers=1, images_per_shard=2048)


def stages(folder: str, bundle: str, side: int, directory: Path) -> dict[str, Any]:
    """Milliseconds and bytes of an image, stage by stage; nothing is done beside anything else."""
    source, policy = open_source(folder), SizePolicy("center-crop", ((side, side),), 8)
    milliseconds: dict[str, float] = {}
    count = 1

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        milliseconds[stage] = (time.perf_counter() - start) * 1e3 / count

    opened = Bundle(bundle)
    contract = make_contract(opened, Opening(bundle), policy, STORAGE, BatchSize(1), 2048)
    with LatentDirectory(directory / f"stages-{time.monotonic_ns()}", contract) as out, Plan(out.path, 2048) as plan:
        count = sum(1 for _ in source.items())
        with timed("listing and plan"):
            plan.update(source)
        items = plan.items(0)
        count = len(items)
        with timed("read, decode, resize (one core)"):
            prepared = [prepare(source, item, None, policy) for item in items]
        images = [image for image in prepared if isinstance(image, Prepared)]
        entries = []
        with open_vae(bundle) as vae:
            encode_batch(vae, images[:1], STORAGE)
            with timed("encode (all cores)"):
                for item, image in zip(items, images, strict=True):
                    [[latents]] = encode_batch(vae, [image], STORAGE)  # type: ignore[misc]
                    about = image.sha256, image.original_size, image.resized, image.crop
                    entries.append(Entry(item.id, False, *about, latents))
        with timed("shard written and flushed"):
            write_shard(out.shard_path(0), entries, [], STORAGE.dtype)
        with timed("index"):
            out.write_index()
        sizes = {name: (out.path / name).stat().st_size / count for name in ("index.parquet", "plan.sqlite")}
        sizes["shard"] = out.shard_path(0).stat().st_size / count
        with timed("opened to read"):
            assert len(LatentDataset(out.path)) == count
    return {"milliseconds": milliseconds, "bytes": sizes, "images": count}


def make_photographs(folder: Path, count: int) -> None:
    """Crops of the embedded photographs, as JPEGs of a camera's kind of detail."""
    from vae_export.photos import photographs

    rng, sources = np.random.default_rng(0), [Image.fromarray(load_image(path)) for path in photographs()]
    folder.mkdir()
    for number in range(count):
        image = sources[number % len(sources)]
        left, top = (int(rng.integers(0, max(1, side // 4))) for side in image.size)
        image.crop((left, top, *image.size)).resize(PHOTO, Image.Resampling.BICUBIC).save(
            folder / f"{number:06d}.jpg", quality=90
        )


def make_small(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(50):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SMALL, SMALL, 3), np.uint8)).save(file, "PNG")
        contents.append(file.getvalue())
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % 50])


def run(*arguments: Any) -> dict[str, Any]:
    """A row, in a process of its own, and in `others` the share of the machine that other processes had meanwhile."""
    command = children.command("benchmarks.dataset", "--one", *map(str, arguments))
    before, start = _cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=children.environment())
    everybody, mine = (now - then for now, then in zip(_cpu_seconds(), before, strict=True))
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    others = (everybody - mine) / (time.perf_counter() - start) / (os.cpu_count() or 1)
    return {**json.loads(done.stdout.splitlines()[-1]), "others": max(0.0, others)}


def _cpu_seconds() -> tuple[float, float]:
    """Of all processes of this machine, and of those that this one started and that have ended."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK"), children.ru_utime + children.ru_stime


def one(kind: str, folder: str, model: str, side: str, batch: str, precision: str, directory: str) -> dict[str, Any]:
    place = Path(directory)
    if kind == "memory":
        return memory(folder, model, place)
    if kind == "stages":
        return stages(folder, model, int(side), place)
    if kind == "theirs":
        return theirs(folder, model, int(side), int(batch), precision, place)
    if kind.startswith("ray"):
        options = {"ray": "local", "ray_workers": int(kind[3:]), "threads": 1, "images_per_shard": 16}
        return ours(folder, model, int(side), place, **options)
    return ours(folder, model, int(side), place)


def exported(model: str, target: str, precision: str, directory: Path) -> tuple[str, str]:
    """(a diffusers checkpoint, its bundle) of "embedded" or "sd"."""
    from safetensors.torch import save_file

    from benchmarks.models import stable_diffusion_sized
    from vae_export import export_bundle, load_model

    loaded = load_model() if model == "embedded" else stable_diffusion_sized()
    checkpoint, bundle = directory / "checkpoint", directory / f"bundle-{target}"
    if not bundle.exists():
        export_bundle(loaded, bundle, target=target, precision=precision, run_validation=False)
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(loaded.config.to_json())
    save_file(loaded.state_dict(), checkpoint / "diffusion_pytorch_model.safetensors")
    return str(checkpoint), str(bundle)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("embedded", "sd"), default="embedded")
    parser.add_argument("--targets", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=256, help="of the images that are encoded, pixels")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="of the batched row; ours has its default")
    parser.add_argument("--rounds", type=int, default=2, help="the least disturbed of which counts")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000], help="of --memory")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--one", nargs=7, help="a row in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        made = {
            target: exported(arguments.model, target, arguments.precision, directory) for target in arguments.targets
        }
        checkpoint = next(iter(made.values()))[0]
        if arguments.memory:
            for count in arguments.counts:
                make_small(directory / f"small-{count}", count)
                found = run("memory", directory / f"small-{count}", made["onnx"][1], SMALL, 1, "fp32", name)
                print(
                    f"{count:7,} images: peak {found['peak_mb']:.0f} MB, {count / found['seconds']:.0f} images/s, "
                    f"opened to read {found['reader_mb']:.0f} MB"
                )
            return
        make_photographs(directory / "photos", arguments.images)
        common = arguments.side, arguments.batch, arguments.precision, name
        if arguments.stages:
            for target, (_, bundle) in made.items():
                found = run("stages", directory / "photos", bundle, *common)
                print(
                    f"{arguments.model} {arguments.precision}, {target}, {found['images']} images of {arguments.side}"
                )
                for stage, cost in found["milliseconds"].items():
                    print(f"  {stage:34} {cost:9.3f} ms")
                for file, size in found["bytes"].items():
                    print(f"  {file:34} {size:9,.0f} bytes")
            return
        rows: dict[str, tuple[Any, ...]] = {}
        if arguments.ray:
            rows = {f"ray, {n} workers": (f"ray{n}", directory / "photos", made["onnx"][1], *common) for n in (1, 2)}
        else:
            rows["one by one"] = (
                "theirs",
                directory / "photos",
                checkpoint,
                arguments.side,
                1,
                arguments.precision,
                name,
            )
            rows["batched"] = "theirs", directory / "photos", checkpoint, *common
            for target, (_, bundle) in made.items():
                rows[f"ours, {target}"] = "ours", directory / "photos", bundle, *common
        print(
            f"{arguments.model}, {arguments.precision}: {arguments.images} JPEGs of {PHOTO[0]}x{PHOTO[1]} -> "
            f"{arguments.side}x{arguments.side}"
        )
        base: dict[str, Any] | None = None
        taken: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
        for _ in range(arguments.rounds):  # in turns: what disturbs the machine for a while disturbs all rows
            for row, command in rows.items():
                taken[row].append(run(*command))
        for row in rows:
            found = min(taken[row], key=lambda each: float(each["others"]))
            base = base or found
            rate, of_base = found["images"] / found["seconds"], base["images"] / base["seconds"]
            error = np.abs(np.subtract(found["first"], base["first"])).max()
            print(
                f"{row:16} {rate:7.2f} images/s, {rate / of_base:5.2f}x, backend busy {found['busy']:4.0%}, "
                f"difference {error:.1e}, others {found['others']:3.0%}"
                f"{' DISTURBED' if found['others'] > MOST_OF_OTHERS and not arguments.ray else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
