"""Arguments and options that more than one command of the command line has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

BundlePath = Annotated[Path, typer.Argument(help="A bundle directory.", show_default=False)]
Device = Annotated[
    Optional[str],
    typer.Option(
        help="cpu, cuda or cuda:N; gpu or npu for OpenVINO, gpu or tpu for JAX. (default: cpu; cuda for TensorRT)",
        show_default=False,
    ),
]
Backend = Annotated[Optional[str], typer.Option(help="Another backend than the bundle's default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Model = Annotated[
    Optional[str],
    typer.Option(
        help="A diffusers directory, a Hub id, the URL of a file on the Hub, or a .safetensors file.",
        show_default=False,
    ),
]
Subfolder = Annotated[
    Optional[str], typer.Option(help="Where in the directory or repository the VAE is: vae.", show_default=False)
]
Calibrate = Annotated[
    Optional[Path],
    typer.Option(help="Photographs to measure activations on. (default: the embedded ones)", show_default=False),
]
Crop = Annotated[bool, typer.Option("--crop", help="Cut an image's sides to multiples of the VAE's factor.")]
Pad = Annotated[
    bool,
    typer.Option("--pad", help="Continue an image by its mirror image up to such a multiple, and cut that off again."),
]
Tiling = Annotated[
    Optional[str],
    typer.Option(help="Work in tiles: blended as in diffusers, or seamless (--tileable bundles).", show_default=False),
]
Tile = Annotated[Optional[int], typer.Option(help="Side of a tile in pixels. (default: the model's sample_size)")]
MemoryBudget = Annotated[
    Optional[str], typer.Option(help="Tile what does not fit this, as in 2GiB, in the largest tiles that do.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle, in one step.")]
