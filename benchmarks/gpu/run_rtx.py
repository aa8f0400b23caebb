"""Stage rtx: does TensorRT-RTX run on this card, and how fast? The library's own words are a part of the result.

Whether it takes a card that has no ComputeCapability of its own (an H100 is SM90, and there is none) is not known.
Plans are built with no compute capability set, on the card and with the card hidden, and with CURRENT. A portable
bundle of the embedded model is opened, which was built beforehand on a machine without a GPU:

    python -m benchmarks.gpu.run_rtx out/gpu/portable      # 37 MB, for OUT/portable there
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.engines import Engines, run_vae
from benchmarks.gpu.made import EMBEDDED
from benchmarks.gpu.stage import Stage, one_line
from benchmarks.peers import Case, random_input
from runtimes import Bundle, VaeConfig, open_vae
from runtimes.errors import BackendUnavailable, CompatibilityError
from runtimes.tensorrt.cuda import Cuda
from runtimes.tensorrt.profiles import parse_profile

UNSET, HIDDEN = "no capability set", "built with the card hidden"
PORTABLE = "portable"  #: folder beside the results
PORTABLE_PROFILES = ("1x64..512x64..512@1x512x512",)


def run(stage: Stage) -> None:
    engines = Engines(stage, "tensorrt-rtx")
    stage.measure("library", {}, lambda: library(engines))
    precisions = ("fp32",) if stage.rehearsal else ("fp16", "fp32", "bf16")
    engines.measure_build("decode", precisions[0], UNSET)
    engines.measure_build("decode", precisions[0], HIDDEN, hidden=True)
    stage.measure("build decode fp32 for CURRENT", {}, lambda: current(engines))
    engines.measure_run("decode", precisions[0], UNSET, "launches")
    engines.measure_run("decode", precisions[0], HIDDEN, "launches")
    stage.measure("portable bundle of the embedded model", {}, lambda: portable(stage, engines))
    engines.measure_run("decode", precisions[0], UNSET, "CUDA graph", cuda_graphs=True)
    for specialization in ("eager", "none"):
        engines.measure_run(
            "decode", precisions[0], UNSET, f"kernels {specialization}", kernel_specialization=specialization
        )
    engines.measure_build("encode", precisions[0], UNSET)
    engines.measure_run("encode", precisions[0], UNSET, "launches")
    engines.measure_as_users_have_it(precisions[0])
    for precision in precisions[1:]:
        for graph in ("decode", "encode"):
            engines.measure_build(graph, precision, UNSET)
            engines.measure_run(graph, precision, UNSET, "launches")


def library(engines: Engines) -> dict[str, Any]:
    """What it is built for, and the card."""
    trt = engines.flavour.trt
    found = {"version": engines.flavour.version}
    if hasattr(trt.ComputeCapability, "__members__"):
        found["compute_capabilities"] = " ".join(trt.ComputeCapability.__members__)
    try:
        found["card"] = Cuda(0).compute_capability()
    except BackendUnavailable as error:
        found["card"] = one_line(error)
    return found


def current(engines: Engines) -> dict[str, Any]:
    """A plan for the card at hand and no other: whether the library takes the card, in its words."""
    trt, logger = engines.flavour.trt, engines.flavour.logger
    Cuda(0)
    job, onnx, _ = engines.job("decode", "fp32")
    engines.words.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(onnx)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(job.input, *job.profiles[0])
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    taken = config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    plan = builder.build_serialized_network(network, config)
    found: dict[str, Any] = {"parsed": bool(parsed), "taken": bool(taken), "built": plan is not None}
    if plan is not None:
        found["validity"] = engines.validity(bytes(plan))
    return found | {"said": engines.words.take()}


def portable(stage: Stage, engines: Engines) -> dict[str, Any]:
    """The bundle that was built on a machine without a GPU."""
    path = stage.out / PORTABLE
    if not path.exists():
        return {"said": f"not here: `python -m benchmarks.gpu.run_rtx {path.name}` makes it on a machine without a GPU"}
    plan = Bundle(path).read("vae_decoder/model.plan")
    found: dict[str, Any] = {"plan_validity": engines.validity(plan), "portable": True}
    engines.words.clear()
    case = Case("decode", 512, 1)
    try:
        with open_vae(path) as vae:
            assert isinstance(vae.config, VaeConfig)
            x = random_input(vae.config, case)
            found |= run_vae(stage, vae, x, case)
    except CompatibilityError as error:
        found["refused"] = one_line(error)
    else:
        found |= {"graph": case.graph, "size": case.size, "model": EMBEDDED, "precision": "fp16", "how": "portable"}
        from benchmarks.compare import distance

        found |= distance(found.pop("output"), stage.made.embedded_reference(case))
    return found | {"said": engines.words.take()}


def make_portable(path: Path) -> None:
    from vae_export import export_bundle
    from vae_export.checkpoints.load import load_model
    from vae_export.targets.engines import plan_engine

    model = load_model()
    engine = plan_engine("tensorrt-rtx", [parse_profile(text, model.config.downscale) for text in PORTABLE_PROFILES])
    export_bundle(
        model, path, target="tensorrt-rtx", precision="fp16", engine=engine, run_validation=False, overwrite=True
    )


if __name__ == "__main__":
    make_portable(Path(sys.argv[1]))
