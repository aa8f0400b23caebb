"""Export the reference model to two ONNX graphs, encoder and decoder, with dynamic batch, height and width.

The graphs are deterministic: they neither sample nor apply the scaling factor. Inputs and outputs have the names that
Optimum and OpenVINO GenAI use.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import onnx
import torch
from torch import Tensor, nn

from runtimes.errors import ConfigError
from runtimes.manifest import GraphSpec, TensorSpec
from runtimes.names import Graph
from runtimes.pixels import to_levels, to_samples
from vae_export.families.base import ReferenceVae
from vae_export.normalised import as_written
from vae_export.rewrites.apply import rewrite
from vae_export.rewrites.form import PLAIN, Form
from vae_export.rewrites.operators import TRANSLATIONS

if TYPE_CHECKING:
    from vae_export.targets.base import Export

# The first opset with GroupNormalization as the exporter writes it. ONNX Runtime, OpenVINO and TensorRT support it.
OPSET = 22
LARGEST = 2**31 - (64 << 20)  #: maximum bytes of weights in one protobuf file, with a margin for the graph itself

# No shape of the validation, so that validation detects a graph frozen to it. Batch 2: tracing specialises on 1.
TRACE_BATCH, TRACE_HEIGHT, TRACE_WIDTH = 2, 6, 10  #: in latents

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.uint8: "uint8"}


NOISY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._guards")


class EncoderGraph(nn.Module):
    """The encoder graph: sample [B, 3, H, W] -> latent_parameters [B, 2*C, H/f, W/f], or latent_sample [B, C, ...]."""

    def __init__(self, model: ReferenceVae, io_dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.io_dtype = model, io_dtype

    def forward(self, sample: Tensor) -> Tensor:
        return self.model.encode_moments(sample.to(self.model.dtype)).to(self.io_dtype)


class DecoderGraph(nn.Module):
    """The decoder graph: latent_sample [B, C, h, w] -> sample [B, 3, f*h, f*w]."""

    def __init__(self, model: ReferenceVae, io_dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.io_dtype = model, io_dtype

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model.decode_latents(latent_sample.to(self.model.dtype)).to(self.io_dtype)


# Pixels are converted in fp32. TensorRT supports uint8 only for inputs and outputs, and only if a cast follows or
# precedes directly: a transposition of uint8 does not build.


class PixelEncoderGraph(EncoderGraph):
    """The encoder graph on pixels: sample uint8 [B, H, W, C] -> latent_parameters [B, 2*C, H/f, W/f]."""

    def forward(self, sample: Tensor) -> Tensor:
        return super().forward(to_samples(sample.to(torch.float32).permute(0, 3, 1, 2)))


class PixelDecoderGraph(DecoderGraph):
    """The decoder graph to pixels: latent_sample [B, C, h, w] -> sample uint8 [B, f*h, f*w, C]."""

    def forward(self, latent_sample: Tensor) -> Tensor:
        levels = to_levels(super().forward(latent_sample).to(torch.float32))
        return cast(Tensor, levels.round().permute(0, 2, 3, 1).to(torch.uint8))


class TracedGraph(NamedTuple):
    """A graph to trace: module, and name, dtype and shape of its input and output (a string is a dynamic dimension)."""

    module: nn.Module
    input_name: str
    input_dtype: torch.dtype
    input_shape: tuple[int | str, ...]
    output_name: str
    output_dtype: torch.dtype
    output_shape: tuple[int | str, ...]


def traced_graphs(model: ReferenceVae, io_dtype: torch.dtype, io: str) -> dict[str, TracedGraph]:
    """Return {"encoder": ..., "decoder": ...} to trace. Images are `io_dtype`, or pixels if `io` is "uint8"."""
    config, space = model.config, model.latent_space
    latent = ("batch", space.channels, "latent_height", "latent_width")
    encoded = ("batch", space.encoder_channels, "latent_height", "latent_width")
    images_in, images_out = (
        ("batch", "height", "width", channels) if io == "uint8" else ("batch", channels, "height", "width")
        for channels in (config.in_channels, config.out_channels)
    )
    images = torch.uint8 if io == "uint8" else io_dtype
    encoder = (PixelEncoderGraph if io == "uint8" else EncoderGraph)(model, io_dtype)
    decoder = (PixelDecoderGraph if io == "uint8" else DecoderGraph)(model, io_dtype)
    encoded_name = "latent_parameters" if space.posterior else "latent_sample"
    return {
        "encoder": TracedGraph(encoder, "sample", images, images_in, encoded_name, io_dtype, encoded),
        "decoder": TracedGraph(decoder, "latent_sample", io_dtype, latent, "sample", images, images_out),
    }


def write_onnx(export: Export, graph: Graph, path: Path) -> GraphSpec:
    """Write one graph of a running export as ONNX, as its options say; see `export_onnx`."""
    return export_onnx(
        export.exact,
        graph,
        path,
        precision=export.precision,
        io_precision=export.options.io_precision,
        io=export.options.io,
        latents=export.options.latents,
        form=export.form(graph),
    )


def export_onnx(
    model: ReferenceVae,
    graph: str,
    path: Path,
    *,
    precision: str = "fp32",
    io_precision: str = "fp32",
    io: str = "float",
    latents: str = "raw",
    form: Form = PLAIN,
) -> GraphSpec:
    """Write one graph of the model, "encoder" or "decoder", as a single ONNX file, checked by onnx.checker.

    `form` selects among the equivalent forms of the graph. Weights and activations have the dtype of `precision`. Input
    and output are float32, or, with `io_precision="same"`, have the dtype of `precision` as well. With `io="uint8"`
    images are pixels, uint8 [B, H, W, 3], and the graph contains the conversion. With `latents="normalised"` latents
    are those of the diffusion model: see `NormalisedVae`.

    Raises `ConfigError` if the weights exceed the limit of a protobuf file, 2 GiB.
    """
    rewritten = rewrite(model, form).to(DTYPES[precision])
    io_dtype = DTYPES[precision if io_precision == "same" else "fp32"]
    written = as_written(rewritten, latents)
    traced = traced_graphs(written, io_dtype, io)[graph]
    part = cast(nn.Module, getattr(rewritten, graph, rewritten))
    size = sum(parameter.numel() * parameter.element_size() for parameter in part.parameters())
    if size > LARGEST:
        raise ConfigError(
            f"the {graph} has {size / 2**30:.1f} GiB of weights, and one ONNX file holds 2 GiB; export it in fp16"
        )
    write_graph(trace_graph(traced, f"vae_{graph}", written.latent_space.factor), path)
    return GraphSpec(
        file=path.name,
        input=TensorSpec(traced.input_name, _NAMES[traced.input_dtype], traced.input_shape),
        output=TensorSpec(traced.output_name, _NAMES[traced.output_dtype], traced.output_shape),
    )


def trace_graph(traced: TracedGraph, name: str, factor: int) -> onnx.ModelProto:
    """Return the graph as ONNX, with its dynamic dimensions named. `factor` is the downscaling factor of the model."""
    proto = _trace(traced, factor)
    _tidy(proto, name, traced)
    return proto


def write_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Check a graph with onnx.checker and write it, deterministically; create the folder if needed."""
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _trace(traced: TracedGraph, factor: int) -> onnx.ModelProto:
    sizes = {"batch": TRACE_BATCH, "latent_height": TRACE_HEIGHT, "latent_width": TRACE_WIDTH}
    sizes |= {"height": TRACE_HEIGHT * factor, "width": TRACE_WIDTH * factor}
    shape = [sizes[size] if isinstance(size, str) else size for size in traced.input_shape]
    example = torch.zeros(shape, dtype=traced.input_dtype)
    free = {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(traced.input_shape) if isinstance(size, str)}
    with _quiet():
        program = torch.onnx.export(
            traced.module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(free,),
            input_names=[traced.input_name],
            output_names=[traced.output_name],
            external_data=False,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _tidy(proto: onnx.ModelProto, name: str, traced: TracedGraph) -> None:
    """Name the graph and its dynamic dimensions; drop source paths and stack traces, which reveal this machine."""
    proto.graph.name = name
    proto.producer_name = "vae-export"
    proto.producer_version = ""
    proto.doc_string = proto.graph.doc_string = ""
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    for holder in (proto, proto.graph, *proto.graph.node, *values):
        del holder.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    del proto.graph.value_info[:]  # shapes in symbols of the trace; runtimes infer shapes themselves
    sides = ((proto.graph.input[0], traced.input_shape), (proto.graph.output[0], traced.output_shape))
    for value, shape in sides:
        for dimension, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if isinstance(size, str):
                dimension.dim_param = size
            else:
                dimension.dim_value = size


@contextmanager
def _quiet() -> Iterator[None]:
    """Return a context without the output of the exporter.

    It reports every step and warns about torchvision and its own deprecations, which does not help a user.
    """
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def tool_versions() -> dict[str, str]:
    """Return {name: version} of PyTorch, onnx and the opset."""
    return {"torch": torch.__version__, "onnx": onnx.__version__, "opset": str(OPSET)}
