"""Commands and options for TensorRT: shapes and GPUs of engines, rebuilding plans, Triton, the plan cache."""

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

Pixels = Annotated[Optional[str], typer.Option(help="Pixels, such as 1024 or 512..1024.", rich_help_panel=_PANEL)]
Batch = Annotated[Optional[str], typer.Option(help="Images per call, such as 1 or 1..4.", rich_help_panel=_PANEL)]
Preferred = Annotated[
    Optional[str],
    typer.Option(
        help="BATCHxHEIGHTxWIDTH to optimise for. (default: smallest batch, largest image)",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Profiles = Annotated[
    Optional[list[str]],
    typer.Option(
        help="All of these options in one; repeatable: 1..4x512..1024x512..1024@1x1024x1024.",
        rich_help_panel=_PANEL,
    ),
]
Gpus = Annotated[
    Optional[str],
    typer.Option(
        help="GPUs for TensorRT-RTX, such as sm89,sm120. (default: that of this machine, or all supported ones)",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


def profiles_of(
    factor: int, height: str | None, width: str | None, batch: str | None, opt: str | None, profiles: list[str]
) -> list[Profile]:
    """Return the profiles of --profile, or of --height, --width, --batch and --opt. `BadParameter` if both exist."""
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
        typer.Option("--out", help="The new bundle. (default: replace the old one)", parser=typed_directory),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Rebuild the plans of a TensorRT bundle for this machine, from the graphs in the bundle."""
    with progress_bar() as progress:
        made = rebuild_bundle(bundle, out_dir or bundle, overwrite=overwrite or out_dir is None, progress=progress)
    print_export(made.path, made, False)


@engines.command()
def triton(
    bundle: BundlePath,
    out_dir: Annotated[Path, typer.Option("--out", help="The model repository.", parser=typed_directory)] = Path(
        "model_repository"
    ),
    instances: Annotated[int, typer.Option(help="Instances of each model on each GPU.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Serve an ONNX bundle on the CPU.")] = False,
    max_batch: Annotated[
        Optional[int],
        typer.Option(help="Images per batch. (default: 8, or the maximum of the plan)", show_default=False),
    ] = None,
    queue_delay: Annotated[int, typer.Option(help="Microseconds to wait for other requests of the same shape.")] = 2000,
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
        help="Directory of the cache, as passed to cache_dir. (default: the user cache)",
        show_default=False,
        parser=typed_path,
    ),
]


@cache.command("list")
def cache_list(directory: CacheDirectory = None, as_json: AsJson = False) -> None:
    """List the plans, most recently used first."""
    found = PlanCache(directory)
    entries = found.entries()
    data = {"directory": str(found.directory), "plans": [dataclasses.asdict(entry) for entry in entries]}
    print_result(data, cache_table(found.directory, entries), as_json)


@cache.command("clear")
def cache_clear(directory: CacheDirectory = None) -> None:
    """Remove all plans. They are rebuilt when needed."""
    found = PlanCache(directory)
    count, freed = len(found.entries()), found.clear()
    say(f"{count} plans, {freed / 2**20:.0f} MiB, removed from {found.directory}")
