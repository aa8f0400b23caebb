"""Rescale activations by powers of two: the fp32 output stays bit-identical, and half precision does not overflow."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from runtimes.names import FP16_LARGEST, GRAPHS
from runtimes.progress import Progress, no_progress
from vae_export.edge import check_model, check_path, ordinary_torch
from vae_export.families import family_of
from vae_export.families.autoencoder_kl import Attention, ResnetBlock
from vae_export.families.base import ReferenceVae, Stage
from vae_export.rewrites.ranges import Ranges, calibration_inputs, probe

HEADROOM = 2.0**4  #: factor between the largest measured activation and the largest fp16 value, for other inputs
TARGET = FP16_LARGEST / HEADROOM
LOWEST = 2.0**-6  #: places whose largest value is smaller are scaled up, away from the subnormals of fp16 (2**-14)


def rescale_activations(
    model: ReferenceVae, ranges: Ranges, target: float = TARGET
) -> tuple[ReferenceVae, dict[str, int]]:
    """Return a model with the same fp32 output whose activations stay below `target`, and the exponents {place: e}.

    The activations at a place of the new model are those of the original divided by 2**e. Places that do not need it
    are not rescaled: the smallest sufficient scale keeps small values farthest from the subnormals.

    Every activation that grows in this network is either read through GroupNorm, which is invariant to the scale of its
    input (except for eps), or flows on linearly. So the residual stream can be divided by s = 2**e: the layers that
    feed it (conv_in, each conv2, to_out, the resampling convs) are divided by s, and eps of each reading norm by s**2.
    The same holds between conv1 and norm2 inside a block, for the values of the attention, and for its queries against
    its keys. s may differ between resolutions: the resampling conv between them applies the ratio. Powers of two do not
    change the mantissa of any product or sum, so the fp32 result is bit-identical.
    """
    walk = family_of(model).stages
    assert walk is not None, "families without stages do not name the rewrite"
    model = copy.deepcopy(model)
    done: dict[str, int] = {}

    def note(place: str, exponent: int) -> int:
        if exponent:
            done[place] = exponent
        return exponent

    with torch.no_grad():
        for side in GRAPHS:
            before = 0
            for stage in walk(model, side):
                e = note(stage.name, _exponent(_stream_maximum(stage, ranges), target))
                _multiply(stage.entry, weight=before - e, bias=-e)
                for name, resnet in stage.resnets.items():
                    t = note(f"{name}.conv1", _exponent(ranges.at(f"{name}.conv1"), target))
                    _rescale_resnet(cast(ResnetBlock, resnet), stream=e, inner=t)
                for name, attention in stage.attentions.items():
                    u = note(f"{name}.to_v", _exponent(ranges.at(f"{name}.to_v"), target))
                    # Only the product q k^T matters: dividing one and multiplying the other cancels out.
                    a = note(f"{name}.to_q", _balance(ranges.at(f"{name}.to_q"), ranges.at(f"{name}.to_k"), target))
                    _rescale_attention(cast(Attention, attention), stream=e, values=u, queries=a)
                if stage.norm_out is not None:
                    _rescale_eps(stage.norm_out, e)
                before = e
    return model, done


def rescaled(
    model: ReferenceVae, calibrate: str | Path | None = None, progress: Progress = no_progress
) -> tuple[ReferenceVae, Mapping[str, Any]]:
    """Return the model rescaled by activations measured on photographs and noise, and the record for the manifest.

    `calibrate` is the directory of the photographs; the default is the embedded photographs.
    """
    ranges = probe(model, calibration_inputs(model, calibrate, progress))
    exact, exponents = rescale_activations(model, ranges)
    record = {
        "name": "rescale_activations",
        "calibration": "embedded photographs" if calibrate is None else "photographs of the user",
        "largest_activation": max(ranges.largest.values()),
        "headroom": HEADROOM,
        "divided_by_power_of_two": exponents,
    }
    return exact, record


@dataclass(frozen=True)
class MeasuredRanges:
    """The largest activations of a model before and after rescaling, and the exponents {place: e} of the rescaling."""

    before: Ranges
    after: Ranges
    exponents: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return {
            "before": dict(self.before.largest),
            "after": dict(self.after.largest),
            "divided_by_power_of_two": dict(self.exponents),
        }


@ordinary_torch()
def measure_ranges(
    model: ReferenceVae, calibrate: str | Path | None = None, progress: Progress = no_progress
) -> MeasuredRanges:
    """Measure activations on photographs and noise, rescale the model, and measure again.

    `calibrate` is the directory of the photographs; the default is the embedded photographs.
    """
    check_model(model)
    if calibrate is not None:
        check_path(calibrate, "calibrate")
    before = probe(model, calibration_inputs(model, calibrate, progress))
    exact, exponents = rescale_activations(model, before)
    return MeasuredRanges(before, probe(exact, calibration_inputs(model, calibrate, progress)), exponents)


def _stream_maximum(stage: Stage, ranges: Ranges) -> float:
    """Return the largest value on the residual stream of a stage or about to be added to it."""
    seen = [ranges.at(stage.entry_name)]
    for name in stage.resnets:
        seen += [ranges.at(name), ranges.at(f"{name}.conv2"), ranges.at(f"{name}.conv_shortcut")]
    for name in stage.attentions:
        seen += [ranges.largest.get(f"{name} add", 0.0), ranges.at(f"{name}.to_out.0")]
    if stage.exit_name:
        seen.append(ranges.at(stage.exit_name))
    return max(seen)


def _exponent(largest: float, target: float) -> int:
    """Return the smallest e with largest / 2**e <= target; negative if `largest` is below LOWEST, to scale up to 1."""
    if not math.isfinite(largest) or largest == 0.0:
        return 0
    if largest > target:
        return math.ceil(math.log2(largest / target))
    return -math.floor(math.log2(1 / largest)) if largest < LOWEST else 0


def _balance(queries: float, keys: float, target: float) -> int:
    """Return e such that queries / 2**e and keys * 2**e are about equal; 0 if both are within LOWEST and `target`."""
    smaller, larger = sorted((queries, keys))
    if smaller == 0.0 or (larger <= target and smaller >= LOWEST):
        return 0
    return round(math.log2(queries / keys) / 2)


def _rescale_resnet(resnet: ResnetBlock, *, stream: int, inner: int) -> None:
    _rescale_eps(resnet.norm1, stream)
    _multiply(resnet.conv1, weight=-inner, bias=-inner)
    _rescale_eps(resnet.norm2, inner)
    _multiply(resnet.conv2, weight=-stream, bias=-stream)
    if resnet.conv_shortcut is not None:
        _multiply(resnet.conv_shortcut, weight=0, bias=-stream)


def _rescale_attention(attention: Attention, *, stream: int, values: int, queries: int) -> None:
    _rescale_eps(attention.group_norm, stream)
    _multiply(attention.to_q, weight=-queries, bias=-queries)
    _multiply(attention.to_k, weight=queries, bias=queries)
    _multiply(attention.to_v, weight=-values, bias=-values)
    _multiply(attention.to_out[0], weight=values - stream, bias=-stream)


def _rescale_eps(norm: nn.GroupNorm, exponent: int) -> None:
    norm.eps = math.ldexp(norm.eps, -2 * exponent)


def _multiply(layer: Any, *, weight: int, bias: int) -> None:
    """Multiply the weight of a layer by 2**weight and its bias by 2**bias, in place."""
    layer.weight.data = torch.ldexp(layer.weight.data, torch.tensor(weight))
    layer.bias.data = torch.ldexp(layer.bias.data, torch.tensor(bias))
