"""Commands that sign bundles and verify signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vae_export.cli.options import BundlePath, typed_path
from vae_export.cli.printing import say
from vae_export.signing import sign_bundle, verify_bundle

signing = typer.Typer()


@signing.command()
def sign(
    bundle: BundlePath,
    key: Annotated[
        Path, typer.Option("--key", help="A private elliptic key, in PEM.", show_default=False, parser=typed_path)
    ],
) -> None:
    """Sign the files and the manifest of a bundle. Writes model.sig into it."""
    say(f"{sign_bundle(bundle, key)} signs {bundle}")


@signing.command()
def verify(
    bundle: BundlePath,
    key: Annotated[
        Path,
        typer.Option("--key", help="The public key of the signer, in PEM.", show_default=False, parser=typed_path),
    ],
) -> None:
    """Verify that a bundle is byte-identical to the one that the owner of a key signed."""
    manifest = verify_bundle(bundle, key).manifest
    say(f"{bundle}: signed by the owner of {key}, and whole ({manifest.target}, {manifest.precision})")
