"""An OpenVINO graph with its large convolutions in int8, calibrated on arrays that it will see.

What is quantized, and why only that (PSNR of the embedded model's decoder on photographs that calibration did not see):

- The spatial convolutions between conv_in and conv_out do nearly all multiplications, and most of them sit behind SiLU,
  where rounding the input costs little: it is one branch of a residual block, and the stream beside it stays exact.
- Statistics of the norms, residual sums, attention and 1x1 shortcuts stay as they are. Left to itself NNCF quantizes in
  front of the reductions too: that rounds the stream itself, for little gain in time, and inserts layout conversions.
- Activations are symmetric. OpenVINO's CPU plugin leaves a transposed convolution with a zero point in bf16, and its
  kernels for convolutions without one are faster. It costs 6 dB of about 58.
- A transposed convolution gets its output quantized as well: its int8 kernel writes int8 or float32, never bf16, and
  float32 costs a conversion of the largest tensors there are. It costs 3 dB of about 48.
- Ranges are the smallest and largest value seen in any calibration array. Means and quantiles over arrays clip what
  other photographs have; correcting biases made no difference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import ConfigError, NotInstalled, NumericsError

if TYPE_CHECKING:
    import openvino as ov

Array = np.ndarray[Any, Any]

# Where more layers than this have to be kept, int8 is hardly faster than bf16, and not worth its error.
MOST_KEPT = 0.75

_NO_TELEMETRY = "NNCF_CI"  # the variable with which NNCF tells its own test machines, which report nothing


def quantize_ir(model: ov.Model, calibration: Sequence[Array], *, keep: Sequence[str] = ()) -> ov.Model:
    """The graph with the convolutions of `quantizable_layers` in int8, but for those named in `keep`.

    `calibration`: inputs of the graph, float32 [B, C, H, W]; sizes may differ as far as the graph's shape is free.
    Weights become int8 with a scale for each output channel, activations with one scale a tensor. Inputs and outputs
    keep their types. The model given is not changed.

    Run the result with `INFERENCE_PRECISION_HINT` bf16 where the CPU has it: that is for the part that is not int8.

    Raises `ConfigError` for a name in `keep` that is no quantizable layer and for an empty calibration,
    `BackendUnavailable` without NNCF.
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
                # Halving the range of weights is for CPUs without VNNI, whose 16-bit sums saturate.
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
    model: ov.Model, calibration: Sequence[Array], measure: Callable[[ov.Model], float], bar: float
) -> tuple[ov.Model, list[str], float]:
    """Quantize as much as the bar allows: (graph, names of the layers kept in higher precision, what it measured).

    `measure` gives the quality of a graph, larger is better (PSNR in dB on photographs that are not in `calibration`).
    Where all layers in int8 miss `bar`, each is measured alone in int8, and the worst are kept, as few as will do. That
    takes one call of `measure` for each layer, and a handful more.

    Raises `NumericsError` with the numbers where even `MOST_KEPT` of the layers do not suffice, and what `quantize_ir`
    raises.
    """
    quantized = quantize_ir(model, calibration)
    reached = measure(quantized)
    if reached >= bar:
        return quantized, [], reached
    layers = quantizable_layers(model)
    alone = {
        name: measure(_restored(quantized, model, [other for other in layers if other != name])) for name in layers
    }
    worst_first = sorted(layers, key=alone.__getitem__)

    def keeping(count: int) -> tuple[ov.Model, list[str], float]:
        candidate = _restored(quantized, model, worst_first[:count])
        return candidate, worst_first[:count], measure(candidate)

    too_few, enough = 0, int(MOST_KEPT * len(layers))
    found = keeping(enough)
    if not found[2] >= bar:
        measurements = [{"kept": [], "measured": reached}, {"kept": found[1], "measured": found[2]}]
        raise NumericsError(
            f"int8 gives {reached:.1f}, and {found[2]:.1f} with {enough} of {len(layers)} layers in higher precision; "
            f"at least {bar:g} is demanded. The worst layer alone, {worst_first[0]}, gives {alone[worst_first[0]]:.1f}",
            measurements + [{"only": name, "measured": alone[name]} for name in worst_first],
        )
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        candidate = keeping(count)
        if candidate[2] >= bar:
            found, enough = candidate, count
        else:
            too_few = count
    return found


def quantizable_layers(model: ov.Model) -> list[str]:
    """Names of the convolutions with a kernel above 1x1, in the order of the computation, without conv_in and conv_out.

    These two are cheap, having few channels on one side, and their error goes straight into everything, or the output.
    """
    spatial = [
        name
        for name, node in _by_name(model).items()
        if (node.get_type_name() == "Convolution" or _folded(node)) and max(node.input_value(1).get_shape()[2:]) > 1
    ]
    return spatial[1:-1]


def _by_name(model: ov.Model) -> dict[str, ov.Node]:
    """The operations by name, each behind its inputs."""
    skipped = ("Parameter", "Constant", "Result")
    return {n.get_friendly_name(): n for n in model.get_ordered_ops() if n.get_type_name() not in skipped}


def _folded(node: ov.Node) -> bool:
    """An upsampling folded into its convolution (`rewrite.DeconvUpsample`)."""
    return bool(node.get_type_name() == "ConvolutionBackpropData")


def _biased(layer: ov.Node) -> ov.Output:
    """The output of a convolution with its bias."""
    readers = [port.get_node() for port in layer.output(0).get_target_inputs()]
    adds = [node for node in readers if node.get_type_name() == "Add"]
    return adds[0].output(0) if len(adds) == 1 else layer.output(0)


def _mark_output(model: ov.Model, name: str) -> str:
    """Put an operation that does nothing, and that NNCF quantizes the input of, behind a layer; gives its name.

    NNCF quantizes inputs alone, and the readers of this output are to stay as they are.
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
    """What `quantize_ir` gives with `keep`, without calibrating again: no range depends on what else is quantized."""
    restored = quantized.clone()
    nodes, originals = _by_name(restored), _by_name(model.clone())  # a copy: its weights are taken out of it
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
    """NNCF, without its reports to Google Analytics: it reads the variable once, when it is imported."""
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
    """NNCF lists every operation that it was told to ignore, and draws progress bars on stdout."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)
