"""Commands that run a bundle on images: roundtrip, encode, decode."""

from __future__ import annotations

import math
import re
import tokenize
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer

from runtimes import VaeRuntime, open_vae
from runtimes.errors import BundleError, ShapeError
from runtimes.files import is_stream, written_whole
from runtimes.image_files import load_image
from runtimes.images import compare_side_by_side, crop_to_multiple, picture_format, psnr, save_image
from runtimes.names import GRAPHS
from vae_export.cli.options import (
    AsJson,
    Backend,
    BundlePath,
    Crop,
    Device,
    MaxPixels,
    MemoryBudget,
    Pad,
    Tile,
    Tiling,
    typed_output,
    typed_path,
)
from vae_export.cli.printing import console_beside, print_result, progress_bar, say

images = typer.Typer()


@contextmanager
def _opened(
    bundle: Path, device: str | None, backend: str | None, tiling: str | None, tile: int | None, budget: str | None
) -> Iterator[tuple[VaeRuntime, Any]]:
    """Open a bundle with these options; yield it and a function that starts a progress bar with a description."""
    tiling = tiling or (None if tile is None else "blended")
    with (
        open_vae(bundle, device=device, backend=backend, tiling=tiling, memory_budget=budget) as vae,
        progress_bar() as progress,
    ):
        if tile is not None:
            if tile % vae.graph_space.factor or tile <= 0:
                raise ShapeError(f"--tile {tile} is not a multiple of {vae.graph_space.factor}")
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // vae.graph_space.factor

        def begin(what: str) -> None:
            progress(what, 0, 1)
            vae.on_tile = lambda done, total: progress(f"{what}, tile {done} of {total}", done, total)

        yield vae, begin


@images.command()
def roundtrip(
    bundle: BundlePath,
    image: Annotated[Path, typer.Argument(help="A photograph.", show_default=False, parser=typed_path)],
    out_file: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The picture: original, reconstruction, difference x 8; - is standard output.",
            parser=typed_output,
        ),
    ] = Path("roundtrip.png"),
    crop: Crop = False,
    pad: Pad = False,
    max_pixels: MaxPixels = None,
    tiling: Tiling = None,
    tile: Tile = None,
    memory_budget: MemoryBudget = None,
    device: Device = None,
    backend: Backend = None,
    as_json: AsJson = False,
) -> None:
    """Encode and decode an image, and write a picture of original, reconstruction and difference."""
    console = console_beside(out_file, as_json)
    picture_format(out_file)
    with _opened(bundle, device, backend, tiling, tile, memory_budget) as (vae, begin):
        picture_format(out_file, vae.channels("decoder"))
        # Load the input and the expected output: encoder and decoder may have different channels.
        given, original = (load_image(image, vae.channels(graph), max_pixels=max_pixels) for graph in GRAPHS)
        if crop:
            given, original = (
                crop_to_multiple(pixels, vae.latent_space.normalised_factor) for pixels in (given, original)
            )
        begin("Encoding")
        latents = vae.images_to_latents(given, pad=pad)
        begin("Decoding")
        restored = vae.latents_to_images(latents, size=(original.shape[0], original.shape[1]))[0]
    save_image(compare_side_by_side(original, restored), out_file)
    decibels, shape = psnr(original, restored), list(latents.shape)
    print_result(
        {
            "image": str(image),
            "picture": str(out_file),
            "latents": shape,
            "psnr_db": round(decibels, 2) if math.isfinite(decibels) else None,  # None: equal; JSON has no infinity
        },
        f"{image}: PSNR {decibels:.2f} dB through latents {shape}; picture in {out_file}",
        as_json,
        console,
    )


@images.command()
def encode(
    bundle: BundlePath,
    images: Annotated[
        list[Path], typer.Argument(help="Images, all of one size.", show_default=False, parser=typed_path)
    ],
    out_file: Annotated[
        Path,
        typer.Option("--out", help="Scaled latents, float32 [B, C, h, w]; - is standard output.", parser=typed_output),
    ] = Path("latents.npy"),
    seed: Annotated[
        Optional[int], typer.Option(min=0, help="Draw from the posterior with this seed instead of taking its mode.")
    ] = None,
    crop: Crop = False,
    pad: Pad = False,
    max_pixels: MaxPixels = None,
    tiling: Tiling = None,
    tile: Tile = None,
    memory_budget: MemoryBudget = None,
    device: Device = None,
    backend: Backend = None,
) -> None:
    """Turn images into latents, scaled as a diffusion model takes them."""
    console = console_beside(out_file)
    with _opened(bundle, device, backend, tiling, tile, memory_budget) as (vae, begin):
        pixels = [load_image(image, vae.channels("encoder"), max_pixels=max_pixels) for image in images]
        if crop:
            pixels = [crop_to_multiple(image, vae.latent_space.normalised_factor) for image in pixels]
        begin("Encoding")
        latents = vae.images_to_latents(pixels, None if seed is None else np.random.default_rng(seed), pad=pad)
    _save_latents(latents, out_file)
    say(f"{len(images)} images -> latents {list(latents.shape)} in {out_file}", console)


@images.command()
def decode(
    bundle: BundlePath,
    latents: Annotated[
        Path, typer.Argument(help="Scaled latents, .npy [B, C, h, w].", show_default=False, parser=typed_path)
    ],
    out_file: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The image; for several, NAME-1.png, NAME-2.png, ... One image can go to -, standard output.",
            parser=typed_output,
        ),
    ] = Path("image.png"),
    size: Annotated[
        Optional[str], typer.Option(help="WIDTHxHEIGHT to keep, of an image that was encoded with --pad.")
    ] = None,
    tiling: Tiling = None,
    tile: Tile = None,
    memory_budget: MemoryBudget = None,
    device: Device = None,
    backend: Backend = None,
) -> None:
    """Turn scaled latents back into images."""
    console = console_beside(out_file)
    picture_format(out_file)
    array, kept = _load_latents(latents), None
    if array.ndim and len(array) > 1 and is_stream(out_file):
        raise BundleError(f"cannot write {out_file}: it takes one image, and these are {len(array)}; give a file name")
    if size is not None:
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
        if match is None:
            raise ShapeError(f"--size {size!r} is not WIDTHxHEIGHT, such as 1000x750")
        kept = (int(match[2]), int(match[1]))
    with _opened(bundle, device, backend, tiling, tile, memory_budget) as (vae, begin):
        picture_format(out_file, vae.channels("decoder"))
        begin("Decoding")
        decoded = vae.latents_to_images(array, size=kept)
    for number, pixels in enumerate(decoded, start=1):
        path = out_file if len(decoded) == 1 else out_file.with_stem(f"{out_file.stem}-{number}")
        save_image(pixels, path)
        say(f"{path} {pixels.shape[1]}x{pixels.shape[0]}", console)


def _load_latents(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise ShapeError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, SyntaxError, MemoryError, tokenize.TokenError, zipfile.BadZipFile) as error:
        # NumPy raises these for malformed files: MemoryError for a header with a huge shape.
        raise ShapeError(f"{path} is not a .npy file of latents: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ShapeError(f"{path} holds several arrays; latents are one array in a .npy file")
    return array


def _save_latents(latents: Any, path: Path) -> None:
    with written_whole(path) as partial, partial.open("wb") as file:
        np.save(file, latents)
