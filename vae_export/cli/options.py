"""Arguments and options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

import typer

import vae_export
from runtimes.cpus import available_cpus
from runtimes.files import STDOUT

if TYPE_CHECKING:
    from vae_export.families.base import ReferenceVae

# Conversion of arguments to paths and names -----------------------------------------------------------------------


def typed_name(text: str) -> str:
    """Return a name or path with a leading `~` expanded, which shells do not do in --model=~/vae.

    Raises `BadParameter` if it is empty.
    """
    if not text.strip():
        raise typer.BadParameter("it is empty")
    return os.path.expanduser(text)  # noqa: PTH111  # Path.expanduser raises an error for an unknown user


def typed_path(text: str | Path) -> Path:
    """Return the path of a file to read, or of a directory. Typer also passes defaults, which are `Path`s."""
    return Path(typed_name(str(text)))


def typed_output(text: str | Path) -> Path:
    """Return the path of a file to write; "-" means standard output."""
    return STDOUT if str(text) == "-" else typed_path(text)


def typed_directory(text: str | Path) -> Path:
    """Return the path of a directory to write. Raises `BadParameter` for "-"."""
    if str(text) == "-":
        raise typer.BadParameter("the output is a directory, not standard output; ./- is a directory named -")
    return typed_path(text)


def alternatives(names: Iterable[str]) -> str:
    """Return the names as "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


# Options ----------------------------------------------------------------------------------------------------------

BundlePath = Annotated[Path, typer.Argument(help="A bundle directory.", show_default=False, parser=typed_path)]
Device = Annotated[
    Optional[str],
    typer.Option(
        help="cpu, cuda or cuda:N; gpu or npu for OpenVINO, gpu or tpu for JAX. (default: cpu; cuda for TensorRT)",
        show_default=False,
    ),
]
Backend = Annotated[Optional[str], typer.Option(help="The backend that runs the bundle. (default: that of its target)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table, also for an error.")]
Calibrate = Annotated[
    Optional[Path],
    typer.Option(
        help="Photographs to measure activations on. (default: the embedded ones)",
        show_default=False,
        parser=typed_path,
    ),
]
IoPrecision = Annotated[
    str, typer.Option(help="Precision of inputs and outputs: fp32, or same for that of --precision.")
]
Io = Annotated[
    str, typer.Option("--io", help="Format of images: float [B, 3, H, W] in [-1, 1], or uint8 [B, H, W, 3].")
]
Latents = Annotated[
    str, typer.Option(help="Latents of the graphs: raw, or normalised as the diffusion model has them.")
]
Crop = Annotated[bool, typer.Option("--crop", help="Crop the sides of an image to multiples of the VAE's factor.")]
Pad = Annotated[
    bool,
    typer.Option("--pad", help="Pad an image with its mirror image to such multiples, and crop the result."),
]
MaxPixels = Annotated[
    Optional[int],
    typer.Option(min=1, help="Maximum number of pixels per image file. (default: 89 million)", show_default=False),
]
Tiling = Annotated[
    Optional[str],
    typer.Option(
        help="Process in tiles: blended as in diffusers, or seamless (--tileable bundles).", show_default=False
    ),
]
Tile = Annotated[Optional[int], typer.Option(help="Side of a tile in pixels. (default: the model's sample_size)")]
MemoryBudget = Annotated[
    Optional[str],
    typer.Option(help="Limit memory, such as 2GiB: larger images are processed in the largest tiles that fit."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle, atomically.")]


# Which model ------------------------------------------------------------------------------------------------------

_MODEL = "A diffusers directory, a Hub id, the URL of a file on the Hub, or a .safetensors file."
_PANEL = "Model"


@dataclasses.dataclass(frozen=True)
class Loading:
    """The model of a command and how to load it: the arguments of `load_model`."""

    model: Annotated[
        Optional[str], typer.Option(help=_MODEL, show_default=False, parser=typed_name, rich_help_panel=_PANEL)
    ] = None
    subfolder: Annotated[
        Optional[str],
        typer.Option(
            help="Folder of the VAE in the directory or repository, such as vae.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    variant: Annotated[
        Optional[str],
        typer.Option(
            help="Variant of the weights, such as fp16: diffusion_pytorch_model.VARIANT.safetensors.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    revision: Annotated[
        Optional[str],
        typer.Option(help="Branch, tag or commit on the Hub.", show_default=False, rich_help_panel=_PANEL),
    ] = None
    config: Annotated[
        Optional[str],
        typer.Option(
            help="For a single file: its config.json, or a Hub id that has one.",
            show_default=False,
            parser=typed_name,
            rich_help_panel=_PANEL,
        ),
    ] = None
    decoder: Annotated[
        Optional[str],
        typer.Option(
            help="For a single file: another file with the decoder, such as FLUX.2's small one.",
            show_default=False,
            parser=typed_name,
            rich_help_panel=_PANEL,
        ),
    ] = None
    scaling_factor: Annotated[
        Optional[float],
        typer.Option(help="Where the checkpoint does not say it.", show_default=False, rich_help_panel=_PANEL),
    ] = None
    shift_factor: Annotated[
        Optional[float],
        typer.Option(help="Where the checkpoint does not say it.", show_default=False, rich_help_panel=_PANEL),
    ] = None

    def load(self) -> ReferenceVae:
        """Load the model, or the embedded one if none is named."""
        self.refuse_without_model("subfolder", "variant", "revision", "config", "decoder")
        limit_torch_threads()
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        revision = given.pop("revision", None)
        return vae_export.load_model(given.pop("model", None), hub=vae_export.Hub(revision=revision), **given)

    def refuse_without_model(self, *names: str) -> None:
        """Raise `BadParameter` if one of these options is given without --model."""
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if self.model is None and given:
            raise typer.BadParameter(f"{' and '.join(given)} without a model: name the model")


def limit_torch_threads() -> None:
    """Limit the threads of PyTorch to the CPUs that this process may use; its default ignores CPU quotas."""
    with suppress(ModuleNotFoundError):  # commands that need PyTorch report that it is missing
        torch = importlib.import_module("torch")
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


def loads_model(*, positional: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces the parameter `loading` of a command by all options of `Loading`.

    With `positional`, MODEL is an argument instead of an option. Typer reads the signature of a function, so the
    decorator builds one, and every command has the same options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(Loading, include_extras=True)
        if positional:
            argument = typer.Argument(help=_MODEL, show_default=False, parser=typed_name)
            hints["model"] = Annotated[Optional[str], argument]
        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
            for field in dataclasses.fields(Loading)
        ]
        parameters: list[inspect.Parameter] = []
        own = get_type_hints(command, include_extras=True)
        for name, parameter in inspect.signature(command).parameters.items():
            replaced = parameter.replace(kind=keyword, annotation=own[name])
            parameters.extend(options if name == "loading" else [replaced])

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            loading = Loading(**{option.name: given.pop(option.name) for option in options})
            command(loading=loading, **given)

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapper.__wrapped__  # get_type_hints would follow it to the original signature
        return wrapper

    return decorate
