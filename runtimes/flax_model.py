"""Documented name of `runtimes.flax.model`, kept for `from runtimes.flax_model import FlaxAutoencoderKL`."""

from runtimes.flax.model import FlaxAutoencoderKL

__all__ = ["FlaxAutoencoderKL"]
