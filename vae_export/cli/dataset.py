"""Commands for whole datasets: encode-dataset, export-latents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from runtimes.errors import ConfigError
from runtimes.latents import LatentDataset
from vae_export.cli.options import (
    AsJson,
    Backend,
    Device,
    MemoryBudget,
    Tiling,
    typed_directory,
    typed_name,
    typed_path,
)
from vae_export.cli.printing import print_result, progress_bar, say
from vae_export.dataset.encode import Storage
from vae_export.dataset.exporters import export_latents
from vae_export.dataset.images import parse_sizes
from vae_export.dataset.job import Opening, encode_dataset
from vae_export.dataset.sources import open_source

dataset = typer.Typer()

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataset.command("encode-dataset")
def encode_dataset_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, .tar or .parquet files, or a datasets directory.",
            show_default=False,
            parser=typed_name,
        ),
    ],
    bundle: Annotated[Path, typer.Option("--bundle", help="The VAE.", show_default=False, parser=typed_path)],
    out_dir: Annotated[
        Path, typer.Option("--out", help="A new directory, or that of the same job.", parser=typed_directory)
    ],
    format: Annotated[
        Optional[str],
        typer.Option("--format", help="folder, webdataset, parquet or datasets. (default: what is there)"),
    ] = None,
    policy: Annotated[str, typer.Option(help="Of sizes: none, center-crop or buckets.")] = "none",
    size: Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT of center-crop.", show_default=False)] = None,
    buckets: Annotated[str, typer.Option(help="sdxl, or WIDTHxHEIGHT,WIDTHxHEIGHT,...")] = "sdxl",
    stored: Annotated[str, typer.Option("--store", help="Of the posterior: moments, mean or sample.")] = "mean",
    unscaled: Annotated[
        bool, typer.Option("--unscaled", help="Raw latents, not as a diffusion model takes them.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    flips: Annotated[bool, typer.Option("--flips", help="The mirror image of every image as well.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of samples; each image draws by its content.")] = 0,
    batch: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Images of one size that are encoded at once. (default: 8, on a CPU as many as have 256x256 pixels)",
        ),
    ] = None,
    shard_images: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 2048,
    workers: Annotated[
        Optional[int], typer.Option(min=0, help="Processes that decode. (default: one for each core)")
    ] = None,
    image_column: Annotated[Optional[str], typer.Option(help="Of tables, where several could be meant.")] = None,
    id_column: Annotated[Optional[str], typer.Option(help="Of tables, in place of FILE:ROW.")] = None,
    ray: Annotated[
        Optional[str], typer.Option(help="Work on this Ray cluster: its address, auto, or local.", show_default=False)
    ] = None,
    ray_workers: Annotated[int, typer.Option(min=1, help="Runtimes on the cluster.")] = 1,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each.")] = 0,
    threads: Annotated[Optional[int], typer.Option(min=1, help="Of a call on the CPU.", show_default=False)] = None,
    tiling: Tiling = None,
    memory_budget: MemoryBudget = None,
    device: Device = None,
    backend: Backend = None,
    as_json: AsJson = False,
) -> None:
    """Turn all images of a dataset into latents. Run again, it does what is left, or what has changed."""
    if (policy == "center-crop") != (size is not None):
        raise ConfigError("--size WIDTHxHEIGHT goes with --policy center-crop")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}; known are {', '.join(DTYPES)}")
    sizes = parse_sizes(size) if size is not None else parse_sizes(buckets) if policy == "buckets" else ()
    with progress_bar() as progress:
        summary = encode_dataset(
            open_source(source, format, image_column=image_column, id_column=id_column),
            out_dir,
            Opening(str(bundle), backend, device, tiling, memory_budget, threads),
            policy=policy,
            sizes=sizes,
            storage=Storage(stored, not unscaled, DTYPES[dtype], flips, seed),
            batch_size=batch,
            images_per_shard=shard_images,
            workers=workers,
            ray=ray,
            ray_workers=ray_workers,
            ray_gpus=ray_gpus,
            progress=progress,
        )
    found = summary.to_dict()
    print_result(
        {"latents": str(out_dir), **found},
        f"{out_dir}: {summary.images:,} images, {summary.encoded:,} encoded at {found['images_per_second']:.1f} "
        f"images/s, {summary.unchanged:,} unchanged, {summary.removed:,} removed, {summary.failed:,} in errors.parquet",
        as_json,
    )


@dataset.command("export-latents")
def export_latents_command(
    latents: Annotated[
        Path, typer.Argument(help="A directory of encode-dataset.", show_default=False, parser=typed_path)
    ],
    to: Annotated[str, typer.Option("--to", help="sd-scripts, webdataset or parquet.", show_default=False)],
    out_dir: Annotated[
        Path, typer.Option("--out", help="A new directory.", show_default=False, parser=typed_directory)
    ],
    model: Annotated[
        Optional[str], typer.Option(help="Of sd-scripts: sd, sdxl, sd3 or flux.", show_default=False)
    ] = None,
) -> None:
    """Write stored latents in a format that trainers read."""
    with progress_bar() as progress:
        count = export_latents(LatentDataset(latents), out_dir, to, model=model, progress=progress)
    say(f"{out_dir}: {count:,} latents for {to}")
