"""Write a model repository for the Triton Inference Server from a bundle.

    OUT/vae_encoder/config.pbtxt    OUT/vae_encoder/1/model.onnx (or model.plan)
    OUT/vae_decoder/config.pbtxt    OUT/vae_decoder/1/model.onnx

Clients send and receive the tensors of the graphs: images in [-1, 1], moments, unscaled latents. The parameters of
each model contain the other properties that clients need: scaling_factor, shift_factor, downscaling factor.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from runtimes import Bundle
from runtimes.errors import BundleError, CompatibilityError, ConfigError
from runtimes.manifest import GraphSpec, Manifest, TensorSpec
from runtimes.names import GRAPHS, Graph

BACKENDS = {"onnx": "onnxruntime", "tensorrt": "tensorrt"}  #: target of a bundle -> Triton's backend
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
WARM_UP_SIDE = 512  #: side in pixels of the warm-up image, for graphs that take any shape
MAX_BATCH = 8  #: default maximum batch, for graphs that take any batch


def write_repository(
    path: str | Path,
    out: str | Path,
    *,
    instances: int = 1,
    cpu: bool = False,
    max_batch: int | None = None,
    queue_delay_us: int = 2000,
) -> dict[str, Path]:
    """Write the model repository `out` and return {model name: its directory}.

    Each GPU runs `instances` of each model; with `cpu` the CPU does (ONNX only). Triton batches requests of equal shape
    that arrive within `queue_delay_us` microseconds, up to `max_batch` (default: the maximum of the plan, or 8).

    Raises `CompatibilityError` for a bundle without a Triton backend, `ConfigError` for numbers out of range, and
    `BundleError` if `out` exists or cannot be written.
    """
    bundle = Bundle(path)
    manifest = bundle.manifest
    if manifest.target not in BACKENDS:
        raise CompatibilityError(
            f"Triton serves bundles of {' and '.join(BACKENDS)} here, not of {manifest.target}; export with --to onnx"
        )
    if cpu and manifest.target == "tensorrt":
        raise ConfigError("TensorRT plans run on a GPU; serve an ONNX bundle on the CPU")
    limit = MAX_BATCH if manifest.engine is None else max(p.batch.max for p in manifest.engine.profiles)
    chosen = limit if max_batch is None else max_batch
    for name, value in (("instances", instances), ("max_batch", chosen)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if manifest.engine is not None and chosen > limit:
        raise ConfigError(f"max_batch {chosen} is more than the plans were built for: {limit}")
    if queue_delay_us < 0:
        raise ConfigError(f"queue_delay_us must not be negative, and is {queue_delay_us}")
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise BundleError(f"{out} exists; remove it, or choose another --out")
    models = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        try:
            for graph in GRAPHS:
                file = manifest.graphs[graph].file
                folder = partial / f"vae_{graph}"
                (folder / "1").mkdir(parents=True)
                (folder / "1" / Path(file).name).write_bytes(bundle.read(file))
                text = model_config(manifest, graph, instances, cpu, chosen, queue_delay_us)
                (folder / "config.pbtxt").write_text(text, encoding="utf-8")
                models[folder.name] = out / folder.name
            partial.chmod(0o755)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"cannot write {out}: {error.strerror or error}; nothing was left behind") from None
    return models


def model_config(
    manifest: Manifest, graph: Graph, instances: int, cpu: bool, max_batch: int, queue_delay_us: int
) -> str:
    """Return the text of the config.pbtxt of one graph."""
    spec = manifest.graphs[graph]
    kind = "KIND_CPU" if cpu else "KIND_GPU"
    profiles = range(len(manifest.engine.profiles)) if manifest.engine is not None else ()
    chosen = f"\n    profile: [ {', '.join(_text(index) for index in profiles)} ]" if profiles else ""
    lines = [
        f"name: {_text(f'vae_{graph}')}",
        f"backend: {_text(BACKENDS[manifest.target])}",
        f"default_model_filename: {_text(Path(spec.file).name)}",
        f"max_batch_size: {max_batch}",
        f"input [{_tensor(spec.input)}]",
        f"output [{_tensor(spec.output)}]",
        # Triton batches only requests of equal shape.
        f"dynamic_batching {{\n  max_queue_delay_microseconds: {queue_delay_us}\n}}" if max_batch > 1 else "",
        f"instance_group [\n  {{\n    kind: {kind}\n    count: {instances}{chosen}\n  }}\n]",
        _warm_up(manifest, graph, spec),
        *(
            f"parameters {{\n  key: {_text(key)}\n  value {{ string_value: {_text(value)} }}\n}}"
            for key, value in _parameters(manifest).items()
        ),
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _parameters(manifest: Manifest) -> Mapping[str, object]:
    config = manifest.config
    parameters: dict[str, object] = {
        "precision": manifest.precision,
        "downscale": manifest.graph_space.factor,
        "scaling_factor": getattr(config, "scaling_factor", None),
        "shift_factor": getattr(config, "shift_factor", None),
    }
    if manifest.target == "tensorrt":
        # Allocate memory for the shapes of the requests, not for the largest shape of all profiles from the start.
        parameters["execution_context_allocation_strategy"] = "ON_PROFILE_CHANGE"
    return {key: value for key, value in parameters.items() if value is not None}


def _tensor(spec: TensorSpec) -> str:
    dims = ", ".join(
        str(size) if isinstance(size, int) else "-1" for size in spec.shape[1:]
    )  # Triton adds the batch dimension
    return f"\n  {{\n    name: {_text(spec.name)}\n    data_type: {TYPES[spec.dtype]}\n    dims: [ {dims} ]\n  }}\n"


def _warm_up(manifest: Manifest, graph: str, spec: GraphSpec) -> str:
    """Return the warm-up entry: one call before the server is ready, because the first call is the slowest."""
    if manifest.engine is not None:
        best = manifest.engine.profiles[0]
        height, width = best.height.opt, best.width.opt
    else:
        height = width = WARM_UP_SIDE - WARM_UP_SIDE % manifest.graph_space.factor
    divide = manifest.graph_space.factor if graph == "decoder" else 1
    channels_last = isinstance(spec.input.shape[-1], int)
    sides = (height // divide, width // divide)
    dims = (*sides, spec.input.shape[-1]) if channels_last else (spec.input.shape[1], *sides)
    return (
        f"model_warmup [\n  {{\n    name: {_text(f'{height}x{width}')}\n    batch_size: 1\n    inputs {{\n"
        f"      key: {_text(spec.input.name)}\n      value {{\n        data_type: {TYPES[spec.input.dtype]}\n"
        f"        dims: [ {', '.join(map(str, dims))} ]\n        zero_data: true\n      }}\n    }}\n  }}\n]"
    )


def _text(value: object) -> str:
    """Return the value as a string literal of the protobuf text format."""
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
