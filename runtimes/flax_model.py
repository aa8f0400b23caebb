"""Alias of `runtimes.flax.model`: the documented import is `from runtimes.flax_model import FlaxAutoencoderKL`."""

from runtimes.flax.model import FlaxAutoencoderKL

__all__ = ["FlaxAutoencoderKL"]
