"""A model of the memory that a call needs, measured per backend and precision, for `memory_budget`.

The model gives the peak working memory of one call, without the memory of the opened bundle and of the input and output
arrays. The working memory grows with the feature maps of full size, that is with pixels times channels. If a backend
stores attention scores, it also grows with the square of the number of positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtimes.config import level_widths
from runtimes.errors import ConfigError
from runtimes.manifest import Manifest
from runtimes.names import Graph


class Rate(NamedTuple):
    """Bytes for each value of a map of full size: image pixels times the channels of the first level."""

    encoder: float
    decoder: float
    encoder_fixed: float = 0.0  #: bytes for 128 channels, for any size of image; grows with the channels squared
    decoder_fixed: float = 0.0  #: the same for the decoder
    score: float = 0.0  #: bytes for each of the positions**2 attention scores; only a part is in memory at once
    step: float = 0.0  #: in seamless tiling, bytes for each value of a tile's feature map
    whole_score: float = 0.0  #: the same as `score`, in seamless tiling


#: Rates by (backend, precision), measured by `python -m benchmarks.memory_model` on a CPU, with random weights of
#: Stable Diffusion's size, on images of 512 and 1024 pixels a side: a line through both points, plus 10 %.
RATES: dict[tuple[str, str], Rate] = {
    # The attention holds two blocks of scores at once, in fp32 even in fp16 graphs: a block is 1/16 of all scores
    # untiled, 1/64 in seamless tiling.
    ("onnxruntime", "fp32"): Rate(encoder=13.8, decoder=35.0, score=0.5, step=21.0, whole_score=0.125),
    ("onnxruntime", "fp16"): Rate(encoder=13.8, decoder=36.0, score=0.5, step=25.0, whole_score=0.125),
    # The first call of a graph reads its weights; compiling the graph for a size copies them.
    ("openvino", "fp32"): Rate(encoder=13.9, decoder=16.1, encoder_fixed=432e6, decoder_fixed=700e6),
    ("openvino", "fp16"): Rate(encoder=13.9, decoder=27.1, encoder_fixed=264e6, decoder_fixed=404e6),
    ("openvino", "bf16"): Rate(encoder=7.0, decoder=8.9, encoder_fixed=225e6, decoder_fixed=386e6),
}

#: families with the network that was measured
MEASURED = ("AutoencoderKL", "AutoencoderKLFlux2", "AsymmetricAutoencoderKL")

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(value: int | str) -> int:
    """Convert a number of bytes, or a text such as "2GiB" or "500 MB", to bytes. `ConfigError` for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", value.lower()) if isinstance(value, str) else None
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"memory_budget {value!r} is not an amount of memory such as '2GiB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def rate_of(family: str, backend: str, device: str, precision: str) -> Rate:
    """The measured rates; `ConfigError` where nothing was measured."""
    measured = device == "cpu" and family in MEASURED
    rate = RATES.get((backend, precision)) if measured else None
    if rate is None:
        known = ", ".join(f"{name} in {measured}" for name, measured in RATES)
        raise ConfigError(
            f"memory_budget needs a measured model of memory: there is one for {' and '.join(MEASURED)} in {known}, on "
            f"the CPU, and none for {family} in {backend} in {precision} on {device}. tile_sample_min_size and "
            "tile_latent_min_size set tiles by hand"
        )
    return rate


@dataclass(frozen=True)
class Budget:
    """The bytes that a call may use, and the measured rates that give the bytes that it needs."""

    bytes: int
    rate: Rate
    config: Any
    factor: int  #: pixels for each raw latent

    @classmethod
    def of(cls, value: int | str, manifest: Manifest, backend: str, device: str) -> Budget:
        """From a number of bytes or a text such as "2GiB". `ConfigError` where nothing was measured."""
        return cls(
            parse_bytes(value),
            rate_of(manifest.family, backend, device, manifest.precision),
            manifest.config,
            manifest.latent_space.factor,
        )

    def call_bytes(self, graph: Graph, batch: int, height: int, width: int) -> int:
        """Working memory of one call of the whole graph on images of this size in pixels."""
        return call_bytes(self.rate, self.config, self.factor, graph, batch, height, width)


def call_bytes(rate: Rate, config: Any, factor: int, graph: Graph, batch: int, height: int, width: int) -> int:
    """Peak memory of one call of the whole graph on images of this size in pixels, in bytes.

    `factor` is the number of pixels for each raw latent, along each side.
    """
    channels = level_widths(config, graph)[0]
    values = batch * height * width * channels
    positions = (height // factor) * (width // factor)
    per_value, fixed = (rate.encoder, rate.encoder_fixed) if graph == "encoder" else (rate.decoder, rate.decoder_fixed)
    scores = rate.score * batch * positions**2 if getattr(config, "mid_block_add_attention", True) else 0.0
    return int(fixed * (channels / 128) ** 2 + per_value * values + scores)
