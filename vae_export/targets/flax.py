"""The target `flax`: StableHLO graphs of encoder and decoder, from `runtimes.flax.model`, and one file of parameters.

The graphs take the parameters as an argument, so that the bundle contains them once, in the file format of diffusers'
Flax class. Batch and image size are symbolic, and each graph is written for all platforms.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from runtimes.errors import ConfigError
from runtimes.manifest import GraphSpec, TensorSpec
from runtimes.names import Graph
from vae_export.bundle import BundleWriter
from vae_export.families.base import ReferenceVae
from vae_export.normalised import as_written
from vae_export.options import ExportOptions
from vae_export.rewrites.form import Form
from vae_export.targets.base import Export, FormChoices, Target, Written
from vae_export.targets.onnx_graphs import DTYPES as ONNX_DTYPES
from vae_export.targets.onnx_graphs import traced_graphs

PLATFORMS = ("cpu", "cuda", "tpu")
FORM = Form(upsample="conv")  #: the form of `runtimes.flax.model`, whose attention uses blocks of a fixed size
#: precision -> (dtype of parameters and activations, JAX's precision of products). In fp32 JAX's default is lower on
#: TPUs and GPUs than the precision that the bundle declares.
DTYPES = {"fp32": ("float32", "highest"), "bf16": ("bfloat16", "default")}


def export_stablehlo(
    model: ReferenceVae,
    graph: str,
    path: Path,
    *,
    precision: str = "fp32",
    io_precision: str = "fp32",
    latents: str = "raw",
    form: Form = FORM,
) -> GraphSpec:
    """Write a graph, "encoder" or "decoder", in jax.export's format: (parameters, float32 [B, C, H, W]) -> float32.

    The graph takes only the parameters that it uses. Names and shapes are those of the ONNX graphs.

    Raises `ConfigError` for unsupported options.
    """
    check_available(io_precision)
    if form != FORM:
        raise ConfigError(f"flax bundles are written in one form, {FORM}, not in {form}")
    jax, _ = _import_jax()
    jnp, export = jax.numpy, importlib.import_module("jax.export")
    dtype, products = DTYPES[precision]
    network = NETWORKS[model.family](model, getattr(jnp, dtype), products)
    space, written = model.latent_space, as_written(model, latents)

    def encoder(params: Any, sample: Any) -> Any:
        encoded = network.encode(params, sample).astype(jnp.float32)
        return space.normalise(encoded[:, : space.channels]) if latents == "normalised" else encoded

    def decoder(params: Any, latent_sample: Any) -> Any:
        latent_sample = space.denormalise(latent_sample) if latents == "normalised" else latent_sample
        return network.decode(params, latent_sample).astype(jnp.float32)

    function, own = (encoder, "quant_conv") if graph == "encoder" else (decoder, "post_quant_conv")
    used = {name: tree for name, tree in network.shapes.items() if name in (graph, own)}
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), used)
    traced = traced_graphs(written, ONNX_DTYPES["fp32"], "float")[graph]
    scale = written.latent_space.factor if graph == "encoder" else 1  #: pixels of the input per latent
    # Sizes are multiples of the factor, so that every division inside the graph is exact.
    batch, height, width = export.symbolic_shape("batch, latent_height, latent_width")
    shape = (batch, traced.input_shape[1], height * scale, width * scale)
    with _without_source_locations(jax):
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(
            params, jax.ShapeDtypeStruct(shape, jnp.float32)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(exported.serialize())
    return GraphSpec(
        file=path.name,
        input=TensorSpec(traced.input_name, "float32", traced.input_shape),
        output=TensorSpec(traced.output_name, "float32", traced.output_shape),
    )


class JaxNetwork(NamedTuple):
    """A family's network as functions of parameters and arrays, which are channels-first on both ends."""

    encode: Callable[[Any, Any], Any]  #: images -> moments, or plain latents
    decode: Callable[[Any, Any], Any]  #: raw latents -> images
    shapes: Mapping[str, Any]  #: the tree of parameters, of arrays or of their shapes


def kl_network(model: ReferenceVae, dtype: Any, precision: Any) -> JaxNetwork:
    """Return the network of AutoencoderKL and its relatives."""
    _, flax_model = _import_jax()
    vae = flax_model.FlaxKLNetwork(model.config, dtype, precision)

    def encode(params: Any, sample: Any) -> Any:
        posterior = vae.apply({"params": params}, sample, method=vae.encode).latent_dist
        return posterior.parameters.transpose(0, 3, 1, 2)

    def decode(params: Any, latents: Any) -> Any:
        return vae.apply({"params": params}, latents, method=vae.decode).sample

    return JaxNetwork(encode, decode, vae.shapes())


def tiny_network(model: ReferenceVae, dtype: Any, precision: Any) -> JaxNetwork:
    """Return the network of AutoencoderTiny and TAEF2."""
    tiny = importlib.import_module("runtimes.flax.tiny").TinyNetwork(model.config, dtype, precision)

    def encode(params: Any, sample: Any) -> Any:
        return tiny.encode(params, sample.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    def decode(params: Any, latents: Any) -> Any:
        return tiny.decode(params, latents.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    return JaxNetwork(encode, decode, params_of(model, np.dtype(np.float32)))


#: family -> its network in JAX
NETWORKS: dict[str, Callable[[ReferenceVae, Any, Any], JaxNetwork]] = {
    "AutoencoderKL": kl_network,
    "AutoencoderKLFlux2": kl_network,
    "AsymmetricAutoencoderKL": kl_network,
    "AutoencoderTiny": tiny_network,
    "TAEF2": tiny_network,
}


def params_of(model: ReferenceVae, dtype: Any) -> Any:
    """Return the weights that the graphs use as a tree of Flax parameters, rounded to `dtype`."""
    flax_params = importlib.import_module("runtimes.flax.params")
    tensors = {name: tensor.detach().cpu().numpy().astype(dtype) for name, tensor in graph_weights(model)}
    return flax_params.from_torch(tensors, "the model")


def write_params(model: ReferenceVae, directory: Path, precision: str) -> None:
    """Write the parameters of both graphs, rounded to the precision, to one file in the directory."""
    _import_jax()
    flax_params = importlib.import_module("runtimes.flax.params")
    data = flax_params.write_msgpack(params_of(model, getattr(flax_params.jnp, DTYPES[precision][0])))
    (directory / flax_params.FLAX_FILE).write_bytes(data)


def graph_weights(model: ReferenceVae) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the weights that the graphs use: no statistics of latents, nothing for masks."""
    for name, tensor in model.state_dict().items():
        graphs = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        if name.startswith(graphs) and ".condition_encoder." not in name:
            yield name, tensor


def check_available(io_precision: str) -> None:
    """Raise `ConfigError` for an unsupported `io_precision`, `BackendUnavailable` if JAX or Flax is missing."""
    if io_precision != "fp32":
        raise ConfigError(f"flax bundles take and give float32 (--io-precision fp32), not {io_precision!r}")
    _import_jax()


@contextmanager
def _without_source_locations(jax: Any) -> Iterator[None]:
    """Return a context in which JAX does not record source locations, which are paths of this machine."""
    settings = {"jax_hlo_source_file_canonicalization_regex": ".*", "jax_traceback_in_locations_limit": 0}
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _import_jax() -> tuple[Any, Any]:
    """Return the modules `jax` and `runtimes.flax.model`. Raises `NotInstalled` if a package is missing."""
    importlib.import_module("runtimes.flax.runtime")
    flax_model = importlib.import_module("runtimes.flax.model")
    return importlib.import_module("jax"), flax_model


class FlaxTarget(Target):
    """StableHLO graphs and one file of parameters, for JAX on CPU, GPU and TPU."""

    name = "flax"
    graph_file = "model.stablehlo"
    forms: ClassVar = {"fp32": FORM, "bf16": FORM}
    ios = ("float",)
    families = tuple(NETWORKS)  # the families whose networks are implemented in JAX
    rescales = False  # bf16 has the range of fp32; unchanged parameters can be trained further in JAX

    def check(self, model: ReferenceVae, options: ExportOptions) -> None:
        check_available(options.io_precision)

    def write(self, export: Export, graph: Graph, path: Path) -> Written:
        spec = export_stablehlo(
            export.exact,
            graph,
            path,
            precision=export.precision,
            latents=export.options.latents,
            form=export.form(graph),
        )
        return Written(spec)

    def finish(self, export: Export, writer: BundleWriter) -> None:
        write_params(export.model, writer.directory, export.precision)

    def choices(self, graph: Graph, precision: str) -> FormChoices:
        raise ConfigError("flax bundles are written in one form, the fastest on the CPU: there is nothing to tune")

    def tool_versions(self, options: ExportOptions) -> dict[str, str]:
        _import_jax()
        return {name: importlib.import_module(name).__version__ for name in ("jax", "jaxlib", "flax")}
