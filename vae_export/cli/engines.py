"""The command line of TensorRT: for which shapes and GPUs to build, and what is done with engines afterwards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from runtimes.tensorrt.plan_cache import PlanCache
from runtimes.tensorrt.profiles import DEFAULT, Profile, make_profile, parse_profile
from vae_export.cli.options import AsJson, BundlePath, Overwrite, typed_directory, typed_path
from vae_export.cli.printing import cache_table, print_export, print_result, progress_bar, say
from vae_export.targets.engines import rebuild_bundle
from vae_export.triton import write_repository

engines = typer.Typer()

# Options of the export --------------------------------------------------------------------------------------------

_PANEL = "TensorRT"

Pixels = Annotated[Optional[str], typer.Option(help="Pixels, as 1024 or 512..1024.", rich_help_panel=_PANEL)]
Batch = Annotated[Optional[str], typer.Option(help="Images a call, as 1 or 1..4.", rich_help_panel=_PANEL)]
Preferred = Annotated[
    Optional[str],
    typer.Option(
        help="BATCHxHEIGHTxWIDTH to be the fastest at. (default: smallest batch, largest image)",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Profiles = Annotated[
    Optional[list[str]],
    typer.Option(
        help="All of these in one, and more than once: 1..4x512..1024x512..1024@1x1024x1024.",
        rich_help_panel=_PANEL,
    ),
]
Gpus = Annotated[
    Optional[str],
    typer.Option(
        help="Which GPUs, for TensorRT-RTX, as sm89,sm120. (default: the one here, or all that it takes)",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


def profiles_of(
    factor: int, height: str | None, width: str | None, batch: str | None, opt: str | None, profiles: list[str]
) -> list[Profile]:
    """What an engine is built for, from either way of saying it."""
    if not profiles and not any((height, width, batch, opt)):
        return []
    if not profiles:
        size = height or width or str(DEFAULT.height)
        return [make_profile(batch or "1", height or size, width or size, opt=opt, factor=factor)]
    if any((height, width, batch, opt)):
        raise typer.BadParameter("--profile says all sizes: give it, or --height, --width, --batch and --opt")
    return [parse_profile(text, factor) for text in profiles]


# Commands ---------------------------------------------------------------------------------------------------------


@engines.command()
def rebuild(
    bundle: BundlePath,
    out_dir: Annotated[
        Optional[Path],
        typer.Option("--out", help="The new bundle. (default: in the place of the old)", parser=typed_directory),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Build the plans of a TensorRT bundle again, for this machine, from the graphs in it."""
    with progress_bar() as progress:
        made = rebuild_bundle(bundle, out_dir or bundle, overwrite=overwrite or out_dir is None, progress=progress)
    print_export(made.path, made, False)


@engines.command()
def triton(
    bundle: BundlePath,
    out_dir: Annotated[Path, typer.Option("--out", help="The model repository.", parser=typed_directory)] = Path(
        "model_repository"
    ),
    instances: Annotated[int, typer.Option(help="Of each model, on each GPU.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Serve an ONNX bundle on the CPU.")] = False,
    max_batch: Annotated[
        Optional[int],
        typer.Option(help="Images a batch. (default: 8, or what the plan was built for)", show_default=False),
    ] = None,
    queue_delay: Annotated[int, typer.Option(help="Microseconds to wait for others of the same shape.")] = 2000,
) -> None:
    """Write a model repository for the Triton Inference Server from an ONNX or TensorRT bundle."""
    models = write_repository(
        bundle, out_dir, instances=instances, cpu=cpu, max_batch=max_batch, queue_delay_us=queue_delay
    )
    for name, folder in models.items():
        say(f"{name}: {folder}")
    say(f"tritonserver --model-repository={out_dir}")


cache = typer.Typer(help="The plans that TensorRT built on this machine for ONNX bundles.", no_args_is_help=True)
engines.add_typer(cache, name="cache")

CacheDirectory = Annotated[
    Optional[Path],
    typer.Option(
        "--dir",
        help="Another cache than the default: what was given as cache_dir.",
        show_default=False,
        parser=typed_path,
    ),
]


@cache.command("list")
def cache_list(directory: CacheDirectory = None, as_json: AsJson = False) -> None:
    """Show the plans, the last used first."""
    found = PlanCache(directory)
    entries = found.entries()
    data = {"directory": str(found.directory), "plans": [dataclasses.asdict(entry) for entry in entries]}
    print_result(data, cache_table(found.directory, entries), as_json)


@cache.command("clear")
def cache_clear(directory: CacheDirectory = None) -> None:
    """Remove all plans; they are built again when they are needed."""
    found = PlanCache(directory)
    count, freed = len(found.entries()), found.clear()
    say(f"{count} plans, {freed / 2**20:.0f} MiB, removed from {found.directory}")
