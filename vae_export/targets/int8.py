"""Quantize the large convolutions of an OpenVINO graph to int8, calibrated on representative arrays.

These are the quantized operations and the reasons. Decibels are the PSNR of the decoder of the embedded model on
photographs outside of the calibration set.

- The spatial convolutions between conv_in and conv_out are quantized. They do nearly all multiplications, and most of
  them follow SiLU in a branch of a residual block, where rounding the input costs little: the stream stays exact.
- Norm statistics, residual sums, attention and 1x1 shortcuts are not quantized. By default NNCF also quantizes before
  the reductions, which rounds the stream itself, saves little time, and inserts layout conversions.
- Activations are quantized symmetrically. OpenVINO's CPU plugin computes a transposed convolution with a zero point in
  bf16, and its kernels for convolutions without a zero point are faster. This costs 6 dB of about 58.
- The output of a transposed convolution is quantized as well: its int8 kernel writes int8 or float32, never bf16, and
  float32 requires a conversion of the largest tensors. This costs 3 dB of about 48.
- Ranges are the smallest and largest values in any calibration array. Means and quantiles over arrays clip values of
  other photographs. Bias correction made no difference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import ConfigError, NotInstalled, NumericsError

if TYPE_CHECKING:
    import openvino as ov

Array = np.ndarray[Any, Any]

#: Maximum fraction of layers kept in higher precision. Beyond it int8 is hardly faster than bf16, not worth its error.
MAX_KEPT_FRACTION = 0.75

_NO_TELEMETRY = "NNCF_CI"  # NNCF sends no telemetry if this variable, which marks its own test machines, is set


def quantize_ir(model: ov.Model, calibration: Sequence[Array], *, keep: Sequence[str] = ()) -> ov.Model:
    """Return a copy of the graph with the convolutions of `quantizable_layers` in int8, except those in `keep`.

    `calibration` are inputs of the graph, float32 [B, C, H, W]; sizes may differ in dynamic dimensions. Weights become
    int8 with one scale per output channel, activations with one scale per tensor. Inputs and outputs keep their types.

    Run the result with `INFERENCE_PRECISION_HINT` bf16 if the CPU supports it; the hint applies to the operations that
    are not int8.

    Raises `ConfigError` if `keep` contains anything but quantizable layers or the calibration is empty, and
    `BackendUnavailable` if NNCF is missing.
    """
    layers = quantizable_layers(model)
    unknown = sorted(set(keep) - set(layers))
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} cannot be kept: the quantizable layers are {', '.join(layers)}")
    if not calibration:
        raise ConfigError("int8 needs at least one calibration array, and there is none")
    chosen = set(layers) - set(keep)
    if not chosen:
        return model.clone()
    nncf = import_nncf()
    marked = model.clone()
    markers = [
        _mark_output(marked, name) for name, layer in _by_name(marked).items() if name in chosen and _folded(layer)
    ]
    others = [name for name, node in _by_name(marked).items() if name not in chosen and name not in markers]
    seen = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    with _quiet():
        quantized: ov.Model = nncf.quantize(
            marked,
            nncf.Dataset(list(calibration)),
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # Only CPUs without VNNI, whose 16-bit sums saturate, need weights of half the range.
                overflow_fix=nncf.OverflowFix.DISABLE,
                disable_bias_correction=True,
                activations_range_estimator_params=seen,
            ),
        )
    for marker in markers:
        node = _by_name(quantized)[marker]
        node.output(0).replace(node.input_value(0))
    quantized.validate_nodes_and_infer_types()
    return quantized


def quantize_until(
    model: ov.Model, calibration: Sequence[Array], measure: Callable[[ov.Model], float], minimum: float
) -> tuple[ov.Model, list[str], float]:
    """Quantize as many layers as possible with a quality of at least `minimum`.

    Returns the graph, the names of the layers kept in higher precision, and the measured quality. `measure` returns the
    quality of a graph; larger is better (PSNR in dB on photographs that are not in `calibration`). If the graph with
    all layers in int8 misses `minimum`, each layer is measured alone in int8, and as few as possible of the worst
    layers are kept in higher precision. That takes one call of `measure` per layer, and a handful more.

    Raises `NumericsError`, with the measurements, if keeping MAX_KEPT_FRACTION of the layers does not suffice, and the
    errors of `quantize_ir`.
    """
    quantized = quantize_ir(model, calibration)
    reached = measure(quantized)
    if reached >= minimum:
        return quantized, [], reached
    layers = quantizable_layers(model)
    alone = {
        name: measure(_restored(quantized, model, [other for other in layers if other != name])) for name in layers
    }
    worst_first = sorted(layers, key=alone.__getitem__)

    def keeping(count: int) -> tuple[ov.Model, list[str], float]:
        candidate = _restored(quantized, model, worst_first[:count])
        return candidate, worst_first[:count], measure(candidate)

    too_few, enough = 0, int(MAX_KEPT_FRACTION * len(layers))
    found = keeping(enough)
    if not found[2] >= minimum:
        measurements = [{"kept": [], "measured": reached}, {"kept": found[1], "measured": found[2]}]
        raise NumericsError(
            f"int8 gives {reached:.1f}, and {found[2]:.1f} with {enough} of {len(layers)} layers in higher precision; "
            f"at least {minimum:g} is demanded. The worst layer alone, {worst_first[0]}, gives "
            f"{alone[worst_first[0]]:.1f}",
            measurements + [{"only": name, "measured": alone[name]} for name in worst_first],
        )
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        candidate = keeping(count)
        if candidate[2] >= minimum:
            found, enough = candidate, count
        else:
            too_few = count
    return found


def quantizable_layers(model: ov.Model) -> list[str]:
    """Return the names of the convolutions with kernels larger than 1x1, except conv_in and conv_out, in graph order.

    conv_in and conv_out are cheap, since one side has few channels, and their errors reach all layers or the output.
    """
    spatial = [
        name
        for name, node in _by_name(model).items()
        if (node.get_type_name() == "Convolution" or _folded(node)) and max(node.input_value(1).get_shape()[2:]) > 1
    ]
    return spatial[1:-1]


def _by_name(model: ov.Model) -> dict[str, ov.Node]:
    """Return {name: operation} in topological order, without parameters, constants and results."""
    skipped = ("Parameter", "Constant", "Result")
    return {n.get_friendly_name(): n for n in model.get_ordered_ops() if n.get_type_name() not in skipped}


def _folded(node: ov.Node) -> bool:
    """Return whether the node is an upsampling folded into its convolution (`DeconvUpsample`)."""
    return bool(node.get_type_name() == "ConvolutionBackpropData")


def _biased(layer: ov.Node) -> ov.Output:
    """Return the output of a convolution after its bias, if it has one."""
    readers = [port.get_node() for port in layer.output(0).get_target_inputs()]
    adds = [node for node in readers if node.get_type_name() == "Add"]
    return adds[0].output(0) if len(adds) == 1 else layer.output(0)


def _mark_output(model: ov.Model, name: str) -> str:
    """Insert an identity operation, whose input NNCF quantizes, after a layer. Returns its name.

    NNCF quantizes only inputs, and the readers of the layer's output must stay unquantized.
    """
    from openvino import opset13

    output = _biased(_by_name(model)[name])
    readers = output.get_target_inputs()
    marker = opset13.avg_pool(output, [1, 1], [0, 0], [0, 0], [1, 1], False)
    marker.set_friendly_name(f"{name}/output")
    for port in readers:
        port.replace_source_output(marker.output(0))
    return str(marker.get_friendly_name())


def _restored(quantized: ov.Model, model: ov.Model, keep: Sequence[str]) -> ov.Model:
    """Return the result of `quantize_ir` with `keep`, without a new calibration.

    This is equivalent, because no range depends on which other layers are quantized.
    """
    restored = quantized.clone()
    nodes, originals = _by_name(restored), _by_name(model.clone())  # a clone, because its weights are moved out of it
    for name in keep:
        layer = nodes[name]
        quantizers = [layer.input_value(0).get_node()]
        if _folded(layer):
            quantizers += [port.get_node() for port in _biased(layer).get_target_inputs()]
        for node in quantizers:
            if node.get_type_name() == "FakeQuantize":
                node.output(0).replace(node.input_value(0))
        layer.input(1).replace_source_output(originals[name].input_value(1))
    restored.validate_nodes_and_infer_types()
    return restored


def import_nncf() -> Any:
    """Return the `nncf` module, imported without telemetry. Raises `NotInstalled` if it is missing.

    NNCF reads the variable that disables its reports to Google Analytics once, at import.
    """
    before = os.environ.get(_NO_TELEMETRY)
    os.environ[_NO_TELEMETRY] = "1"
    try:
        import nncf
        import nncf.quantization.range_estimator
    except ModuleNotFoundError as error:
        raise NotInstalled(f"int8 needs NNCF: pip install 'vae-export[int8]' ({error})") from error
    finally:
        if before is None:
            del os.environ[_NO_TELEMETRY]
        else:
            os.environ[_NO_TELEMETRY] = before
    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """Return a context without the output of NNCF, which lists every ignored operation and draws progress bars."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)
