"""Commands for whole datasets: encode-dataset, verify-latents, export-latents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from runtimes.errors import ConfigError
from runtimes.latents import LatentDataset
from vae_export.cli.options import (
    AsJson,
    Backend,
    Device,
    MaxPixels,
    MemoryBudget,
    Tiling,
    typed_directory,
    typed_name,
    typed_path,
)
from vae_export.cli.printing import err, print_result, progress_bar, say
from vae_export.dataset.encode import Storage
from vae_export.dataset.exporters import export_latents
from vae_export.dataset.images import parse_sizes
from vae_export.dataset.job import Opening, encode_dataset
from vae_export.dataset.sources import open_source
from vae_export.dataset.verify import verify_latents

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
    bundle: Annotated[
        Path, typer.Option("--bundle", help="The bundle of the VAE.", show_default=False, parser=typed_path)
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", help="A new directory, or the directory of the same job.", parser=typed_directory)
    ],
    format: Annotated[
        Optional[str],
        typer.Option("--format", help="folder, webdataset, parquet or datasets. (default: detected)"),
    ] = None,
    policy: Annotated[str, typer.Option(help="How to unify image sizes: none, center-crop or buckets.")] = "none",
    size: Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT for center-crop.", show_default=False)] = None,
    buckets: Annotated[str, typer.Option(help="sdxl, or WIDTHxHEIGHT,WIDTHxHEIGHT,...")] = "sdxl",
    stored: Annotated[
        str, typer.Option("--store", help="What to store of the posterior: moments, mean or sample.")
    ] = "mean",
    unscaled: Annotated[
        bool, typer.Option("--unscaled", help="Store raw latents instead of latents scaled for diffusion models.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    flips: Annotated[bool, typer.Option("--flips", help="Encode the mirror image of every image as well.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of samples, combined with the hash of each image.")] = 0,
    batch: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Images of one size per encoder call. (default: 8, on a CPU at most 256x256 pixels in total)",
        ),
    ] = None,
    shard_images: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 2048,
    workers: Annotated[
        Optional[int], typer.Option(min=0, help="Number of decoder processes. (default: one per available CPU)")
    ] = None,
    image_column: Annotated[
        Optional[str], typer.Option(help="Column of a table with the images, if several are possible.")
    ] = None,
    id_column: Annotated[
        Optional[str], typer.Option(help="Column of a table with the ids. (default: FILE:ROW)")
    ] = None,
    ray: Annotated[
        Optional[str], typer.Option(help="Run on this Ray cluster: its address, auto, or local.", show_default=False)
    ] = None,
    ray_workers: Annotated[int, typer.Option(min=1, help="Number of runtimes on the Ray cluster.")] = 1,
    ray_gpus: Annotated[float, typer.Option(min=0, help="GPUs for each runtime on the Ray cluster.")] = 0,
    threads: Annotated[
        Optional[int], typer.Option(min=1, help="Threads per call on the CPU.", show_default=False)
    ] = None,
    max_pixels: MaxPixels = None,
    tiling: Tiling = None,
    memory_budget: MemoryBudget = None,
    device: Device = None,
    backend: Backend = None,
    as_json: AsJson = False,
) -> None:
    """Encode all images of a dataset. A second run encodes only missing, changed or damaged ones."""
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
            max_pixels=max_pixels,
            progress=progress,
        )
    found = summary.to_dict()
    print_result(
        {"latents": str(out_dir), **found},
        f"{out_dir}: {summary.images:,} images, {summary.encoded:,} encoded at {found['images_per_second']:.1f} "
        f"images/s, {summary.unchanged:,} unchanged, {summary.removed:,} removed, "
        f"{summary.failed:,} in errors.parquet, {summary.skipped:,} other files in skipped.parquet"
        + (f"; {summary.shards_damaged:,} damaged shards rewritten" if summary.shards_damaged else ""),
        as_json,
    )


@dataset.command("verify-latents")
def verify_latents_command(
    latents: Annotated[Path, typer.Argument(help="A directory of encode-dataset.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Read every file of a directory of latents and compare it with its hash."""
    with progress_bar() as progress:
        found = verify_latents(latents, progress)
    print_result(
        {"latents": str(latents), **found.to_dict()},
        f"{latents}: sound, {found.shards:,} shards with {found.entries:,} latents, {found.bytes / 1e6:,.1f} MB",
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
        Optional[str], typer.Option(help="Model that sd-scripts trains: sd, sdxl, sd3 or flux.", show_default=False)
    ] = None,
    skip_clashes: Annotated[
        bool,
        typer.Option(
            "--skip-clashes", help="Export only the first of the images whose files would have the same name."
        ),
    ] = False,
    suffix_clashes: Annotated[
        bool,
        typer.Option("--suffix-clashes", help="Export the others as NAME-SUFFIX; rename their images accordingly."),
    ] = False,
) -> None:
    """Export stored latents to a format that trainers read."""
    if skip_clashes and suffix_clashes:
        raise ConfigError("give --skip-clashes or --suffix-clashes, not both")
    clashes = "skip" if skip_clashes else "suffix" if suffix_clashes else "refuse"
    with progress_bar() as progress:
        done = export_latents(LatentDataset(latents), out_dir, to, model=model, clashes=clashes, progress=progress)
    for id in done.skipped:
        say(f"skipped {id}: sd-scripts would take the latents of another image for it; keep it out of training", err)
    for id, new in done.renamed:
        say(f"rename {id} to {new}{os.path.splitext(id)[1]}: sd-scripts looks for that name", err)
    say(f"{out_dir}: {done.entries:,} latents for {to}")
