"""`python -m vae_export` is the command `vae-export`."""

from vae_export.cli.main import main

main()
