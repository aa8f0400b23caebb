"""Graphs of tileable bundles: encoder and decoder cut into steps at their norms, for `runtimes.tiling.seamless`.

The part with the attention is traced like the graphs of other bundles. The other steps are small and many, so they are
written node by node. A step takes the statistics of its norms as input, and returns those of its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from runtimes.manifest import Step
from vae_export.families.autoencoder_kl import Block, KLNetwork, ResnetBlock, Upsample
from vae_export.rewrites.apply import rewrite
from vae_export.rewrites.form import Form
from vae_export.rewrites.upsample import DeconvUpsample, FourConvUpsample
from vae_export.targets.onnx_graphs import DTYPES, OPSET, TracedGraph, trace_graph, write_graph

#: Attention computes the scores of one block at a time: at 2048x2048 these are 1024 x 65536, 268 MB in fp32.
ATTENTION_BLOCKS = 64

_LAST = 2**31 - 1  #: end of a slice that runs to the end of the axis
_ONNX_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


class HeadGraph(nn.Module):
    """The decoder up to and including the last attention: latent_sample [1, C, h, w] -> stream, fp16."""

    def __init__(self, model: KLNetwork, blocks: int) -> None:
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(self, latent_sample: Tensor) -> Tensor:
        decoder, z = self.model.decoder, latent_sample.to(self.model.dtype)
        x = decoder.mid_block(
            decoder.conv_in(z if self.model.post_quant_conv is None else self.model.post_quant_conv(z))
        )
        *whole, last = cast("list[Block]", list(decoder.up_blocks)[: self.blocks])
        for block in whole:
            x = block(x)
        return last.before_resampling(x).to(torch.float16)


class TailGraph(nn.Module):
    """The encoder from its first attention block on: stream, fp16 -> latent_parameters [1, 2 * C, h, w], fp32."""

    def __init__(self, model: KLNetwork, first: int) -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(self, stream: Tensor) -> Tensor:
        encoder, x = self.model.encoder, stream.to(self.model.dtype)
        for block in list(encoder.down_blocks)[self.first :]:
            x = block(x)
        x = encoder.conv_out(nn.functional.silu(encoder.conv_norm_out(encoder.mid_block(x))))
        return cast(Tensor, (x if self.model.quant_conv is None else self.model.quant_conv(x)).to(torch.float32))


class StepGraph:
    """A builder of an ONNX graph for batches of 1. Each method adds nodes and returns the name of the result."""

    def __init__(self, precision: str, act_fn: str) -> None:
        self.type, self.act_fn = _ONNX_TYPES[precision], act_fn
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: int, *shape: int | str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def constant(self, values: Tensor | list[int], dtype: int = TensorProto.INT64) -> str:
        name = f"weight_{len(self.weights)}"
        array = np.array(values, np.int64) if isinstance(values, list) else values.detach().float().numpy()
        if dtype in (TensorProto.FLOAT, TensorProto.INT64):
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        else:
            tensor = helper.make_tensor(name, dtype, array.shape, array.ravel())
        self.weights.append(tensor)
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def cast(self, x: str, dtype: int) -> str:
        return self.add("Cast", x, to=dtype)

    def conv(self, x: str, conv: nn.Conv2d | nn.ConvTranspose2d, **attributes: Any) -> str:
        """Add a convolution of values of this graph's type, without padding unless `attributes` set it."""
        kind = "ConvTranspose" if isinstance(conv, nn.ConvTranspose2d) else "Conv"
        weights = [self.constant(cast(Tensor, part), self.type) for part in (conv.weight, conv.bias)]
        return self.add(kind, x, *weights, kernel_shape=list(conv.kernel_size), strides=list(conv.stride), **attributes)

    def normed(self, x: str, norm: nn.GroupNorm, statistics: str, inside: str) -> str:
        """Add norm, activation and a mask of the positions inside the image: fp16 [1, C, H, W] -> this graph's type.

        As in `operators.row_norm`, scale and shift are applied to x in fp32, and the result is rounded once.
        """
        groups, channels = norm.num_groups, norm.num_channels
        shape = self.constant([1, channels, 1, 1])

        def of_channels(row: int) -> str:  # row of the statistics [2, groups] -> [1, C, 1, 1]
            part = self.add("Gather", statistics, self.constant([row]), axis=0)
            part = self.add("Reshape", part, self.constant([groups, 1]))
            part = self.add("Expand", part, self.constant([groups, channels // groups]))
            return self.add("Reshape", part, shape)

        weight, bias = (
            self.constant(part.reshape(1, -1, 1, 1), TensorProto.FLOAT) for part in (norm.weight, norm.bias)
        )
        eps = self.constant(torch.tensor(norm.eps), TensorProto.FLOAT)
        scale = self.add("Div", weight, self.add("Sqrt", self.add("Add", of_channels(1), eps)))
        shift = self.add("Sub", bias, self.add("Mul", of_channels(0), scale))
        x = self.add("Add", self.add("Mul", self.cast(x, TensorProto.FLOAT), scale), shift)
        x = self.activation(self.cast(x, self.type))
        return self.add("Mul", x, self.cast(inside, self.type))

    def activation(self, x: str) -> str:
        if self.act_fn == "relu":
            return self.add("Relu", x)
        if self.act_fn == "gelu":
            return self.add("Gelu", x)
        if self.act_fn == "mish":
            return self.add("Mul", x, self.add("Tanh", self.add("Softplus", x)))
        return self.add("Mul", x, self.add("Sigmoid", x))

    def give_map(self, value: str, channels: int) -> None:
        """Add the outputs of a step: `y`, the map in fp16, and `moments`, mean and variance of each channel, [2, C].

        The moments are those of the rounded values, which the next step reads, so that an overflow shows in them. They
        are summed by rows, as in `operators.row_norm`.
        """
        y = self.cast(value, TensorProto.FLOAT16)
        exact = self.cast(y, TensorProto.FLOAT)
        rows, columns = self.constant([2]), self.constant([3])

        def mean(of_rows: str) -> str:
            return self.add("ReduceMean", of_rows, rows, keepdims=1)

        means = mean(self.add("ReduceMean", exact, columns, keepdims=1))
        norms = self.add("ReduceL2", self.add("Sub", exact, means), columns, keepdims=1)
        width = self.add("Cast", self.add("Shape", y, start=3, end=4), to=TensorProto.FLOAT)
        variances = mean(self.add("Div", self.add("Mul", norms, norms), width))
        both = self.add("Reshape", self.add("Concat", means, variances, axis=0), self.constant([2, channels]))
        self.output(y, "y", TensorProto.FLOAT16, 1, channels, "out_height", "out_width")
        self.output(both, "moments", TensorProto.FLOAT, 2, channels)

    def finished(self, name: str) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="vae-export")
        model.ir_version = 10
        return model


# The steps --------------------------------------------------------------------------------------------------------


class TileableExport:
    """Writer of the steps of a model. The model must be rescaled, because maps between steps are stored in fp16."""

    def __init__(self, model: KLNetwork, directory: Path, precision: str, form: Form) -> None:
        # Not the lean last block: its two convolutions share an input, and here each of them is a separate step.
        form = form._replace(last_block="plain", convolutions="direct", attention_blocks=ATTENTION_BLOCKS)
        self.model = rewrite(model, form).to(DTYPES[precision])
        self.directory, self.precision = directory, precision

    def steps(self, graph: str) -> tuple[Step, ...]:
        """Write the steps of one graph and return them, in execution order."""
        return tuple(self._encoder() if graph == "encoder" else self._decoder())

    def _encoder(self) -> Iterator[Step]:
        encoder, config = self.model.encoder, self.model.config
        blocks = cast("list[Block]", list(encoder.down_blocks))
        first = next((n for n, block in enumerate(blocks) if block.has_attention), len(blocks) - 1)
        yield self._write("encoder", "in", encoder.conv_in.out_channels, self._conv(encoder.conv_in, TensorProto.FLOAT))
        for block in blocks[:first]:
            yield from self._resnets("encoder", block)
            for downsample in cast(Any, block).downsamplers:
                yield self._write("encoder", "down", downsample.conv.out_channels, self._conv(downsample.conv))
        moments = 2 * config.latent_channels
        width = encoder.conv_in.out_channels if first == 0 else config.block_out_channels[first - 1]
        traced = TracedGraph(
            *(TailGraph(self.model, first), "stream", torch.float16, (1, width, "height", "width")),
            *("latent_parameters", torch.float32, (1, moments, "latent_height", "latent_width")),
        )
        yield self._write("encoder", "whole", moments, trace_graph(traced, "vae_encoder_tail", config.downscale))

    def _decoder(self) -> Iterator[Step]:
        decoder, config = self.model.decoder, self.model.config
        blocks = cast("list[Block]", list(decoder.up_blocks))
        whole = 1 + max((n for n, block in enumerate(blocks) if block.has_attention), default=0)
        width = config.decoder_widths[::-1][whole - 1]
        traced = TracedGraph(
            *(HeadGraph(self.model, whole), "latent_sample", torch.float32),
            *((1, config.latent_channels, "latent_height", "latent_width"), "stream", torch.float16),
            (1, width, "height", "width"),
        )
        yield self._write("decoder", "whole", width, trace_graph(traced, "vae_decoder_head", config.downscale))
        for number, block in enumerate(blocks):
            if number >= whole:
                yield from self._resnets("decoder", block)
            if number >= whole - 1:
                for upsample in getattr(block, "upsamplers", ()):
                    yield self._write("decoder", "up", *self._upsample(upsample))
        graph = self._graph("silu")  # SiLU for every model, whatever its `act_fn`: see `Decoder`
        y = self._normed_conv(graph, decoder.conv_norm_out, decoder.conv_out)
        y = graph.cast(y, TensorProto.FLOAT)
        graph.output(y, "y", TensorProto.FLOAT, 1, config.out_channels, "out_height", "out_width")
        yield self._write("decoder", "out", config.out_channels, graph.finished("out"))

    def _resnets(self, side: str, block: Block) -> Iterator[Step]:
        for resnet in cast("Iterator[ResnetBlock]", block.resnets):
            graph, channels = self._graph(), resnet.conv1.out_channels
            graph.give_map(self._normed_conv(graph, resnet.norm1, resnet.conv1), channels)
            yield self._write(side, "conv1", channels, graph.finished("conv1"))
            graph, shortcut = self._graph(), resnet.conv_shortcut
            y = self._normed_conv(graph, resnet.norm2, resnet.conv2)
            width = channels if shortcut is None else shortcut.in_channels
            skip = graph.input("skip", TensorProto.FLOAT16, 1, width, "out_height", "out_width")
            skip = graph.cast(skip, graph.type)
            graph.give_map(graph.add("Add", skip if shortcut is None else graph.conv(skip, shortcut), y), channels)
            yield self._write(side, "conv2", channels, graph.finished("conv2"))

    def _normed_conv(self, graph: StepGraph, norm: nn.GroupNorm, conv: nn.Conv2d) -> str:
        x = graph.input("x", TensorProto.FLOAT16, 1, norm.num_channels, "height", "width")
        inside = graph.input("inside", TensorProto.FLOAT, 1, 1, "height", "width")
        statistics = graph.input("statistics", TensorProto.FLOAT, 2, norm.num_groups)
        return graph.conv(graph.normed(x, norm, statistics, inside), conv)

    def _conv(self, conv: nn.Conv2d, dtype: int = TensorProto.FLOAT16) -> onnx.ModelProto:
        graph = self._graph()
        x = graph.input("x", dtype, 1, conv.in_channels, "height", "width")
        graph.give_map(graph.conv(graph.cast(x, graph.type), conv), conv.out_channels)
        return graph.finished("conv")

    def _upsample(self, upsample: nn.Module) -> tuple[int, onnx.ModelProto]:
        if isinstance(upsample, Upsample):
            upsample = FourConvUpsample(upsample.conv)
        graph = self._graph()
        convs = [upsample.conv] if isinstance(upsample, DeconvUpsample) else list(cast(Any, upsample).convs)
        channels = cast(int, convs[0].out_channels)
        x = graph.input("x", TensorProto.FLOAT16, 1, convs[0].in_channels, "height", "width")
        x = graph.cast(x, graph.type)
        if isinstance(upsample, DeconvUpsample):
            y = graph.conv(
                x, convs[0], pads=[3, 3, 3, 3]
            )  # 1 of the convolution, 2 for the border pixel around the tile
        else:
            parts, axes = [], graph.constant([2, 3])
            for conv, (row, column) in zip(convs, np.ndindex(2, 2), strict=True):
                # Along an axis, even outputs read the previous pixel and odd outputs the next.
                ends = graph.constant([_LAST if odd else -1 for odd in (row, column)])
                parts.append(graph.conv(graph.add("Slice", x, graph.constant([row, column]), ends, axes), conv))
            y = graph.add("DepthToSpace", graph.add("Concat", *parts, axis=1), blocksize=2, mode="DCR")
        graph.give_map(y, channels)
        return channels, graph.finished("up")

    def _graph(self, act_fn: str = "") -> StepGraph:
        return StepGraph(self.precision, act_fn or self.model.config.act_fn)

    def _write(self, side: str, kind: str, channels: int, proto: onnx.ModelProto) -> Step:
        """Write one step to a file numbered in execution order."""
        folder = self.directory / f"vae_{side}_tiles"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{len(list(folder.iterdir())):02}_{kind}.onnx"
        write_graph(proto, path)
        return Step(kind, f"{folder.name}/{path.name}", channels)
