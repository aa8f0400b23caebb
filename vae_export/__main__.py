"""Entry point of `python -m vae_export`, the same as the command `vae-export`."""

from vae_export.cli.main import main

main()
