"""ONNX graphs -> TensorRT plans: for which GPU and shapes, in how much memory, and written into a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtimes import Bundle
from runtimes.bundle import GRAPHS, Engine, GraphSpec
from runtimes.config import VaeConfig
from runtimes.cuda import Cuda
from runtimes.errors import BackendUnavailable, CompatibilityError, ConfigError, OutOfMemoryError
from runtimes.profiles import DEFAULT, Profile
from runtimes.progress import Progress
from runtimes.tensorrt import job_of
from runtimes.tensorrt_builder import build_plan, check_gpus
from runtimes.tensorrt_flavours import load_flavour, system
from vae_export.bundle import check_output, write_bundle

if TYPE_CHECKING:  # plans can be rebuilt where torch is not
    from vae_export.rewrite import Form

PLAN_FILE = "model.plan"
ONNX_FILE = "model.onnx"  #: the typed graph beside it, from which it can be built again elsewhere
ITEM_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
NO_GPU = "no NVIDIA GPU is here to run the plan; run `vae-export validate` where there is one"


class Estimate(NamedTuple):
    """Device memory for the activations of one graph at the largest shape of a profile."""

    graph: str
    profile: Profile
    bytes: int


def present_gpu() -> Cuda | None:
    """The GPU here, or None."""
    with suppress(BackendUnavailable):
        return Cuda(0)
    return None


def plan_engine(target: str, profiles: Sequence[Profile] = (), gpus: Sequence[str] = ()) -> Engine:
    """What will be built: with which TensorRT, for which GPUs and shapes.

    Without `gpus` it is the GPU that is here; with TensorRT-RTX where there is none, all that it takes. Raises
    `BackendUnavailable` where TensorRT, or the GPU that it needs, is missing.
    """
    flavour = load_flavour(target)
    present = present_gpu()
    if target == "tensorrt":
        if gpus:
            raise ConfigError("tensorrt builds for the GPU that is present; --gpu is for --to tensorrt-rtx")
        if present is None:
            raise BackendUnavailable(
                "--to tensorrt builds and times kernels on the GPU that will run them, and none can be used here; "
                "--to tensorrt-rtx builds for GeForce and RTX cards without one"
            )
    elif gpus:
        check_gpus(flavour, gpus)
    chosen = tuple(gpus) or (() if present is None else (present.compute_capability(),))
    return Engine(target, flavour.version, chosen, system(), tuple(profiles) or (DEFAULT,))


def build_graph(
    engine: Engine, graph: str, spec: GraphSpec, onnx: Path, factor: int, progress: Progress = lambda *_: None
) -> GraphSpec:
    """Build the plan of a graph beside its ONNX file -> the spec with the plan in its place."""
    plan = build_plan(onnx.read_bytes(), job_of(engine, graph, spec, factor), graph, progress)
    (onnx.parent / PLAN_FILE).write_bytes(plan)
    return replace(spec, file=PLAN_FILE)


def rebuild_bundle(
    path: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = lambda *_: None
) -> Bundle:
    """Build the plans of a TensorRT bundle anew, for this machine, from the ONNX graphs in it.

    `out` may be the bundle itself, with `overwrite`. Profiles stay; the record of the validation does not, since it is
    of other plans. Raises `CompatibilityError` for a bundle without plans, and as `export_bundle` does.
    """
    source = Bundle(path)
    manifest = source.manifest
    if manifest.engine is None:
        raise CompatibilityError(f"{path} is a bundle of {manifest.target}, which has no plans to build again")
    check_output(out, overwrite)
    engine = plan_engine(manifest.target, manifest.engine.profiles)
    with write_bundle(out, overwrite=overwrite) as writer:
        graphs = {}
        for name in manifest.files:
            if not name.endswith(PLAN_FILE):
                (writer.directory / name).parent.mkdir(parents=True, exist_ok=True)
                (writer.directory / name).write_bytes(source.read(name))
        for graph in GRAPHS:
            onnx = writer.directory / f"vae_{graph}" / ONNX_FILE
            if not onnx.exists():
                raise CompatibilityError(f"{path} does not hold {onnx.relative_to(writer.directory)} to build from")
            spec = build_graph(engine, graph, manifest.graphs[graph], onnx, manifest.config.downscale, progress)
            graphs[graph] = replace(spec, file=f"vae_{graph}/{PLAN_FILE}")
        writer.write_manifest(
            replace(
                manifest,
                files=writer.entries(),
                graphs=graphs,
                engine=engine,
                tools={**manifest.tools, **tool_versions(engine)},
                validation={"verdict": "skipped", "reason": "the plans were built again; run `vae-export validate`"},
            )
        )
        return writer.finish()


def tool_versions(engine: Engine) -> dict[str, str]:
    return {engine.flavour: engine.version}


# Memory -----------------------------------------------------------------------------------------------------------


def estimate_memory(engine: Engine, config: VaeConfig, form: Form, precision: str) -> list[Estimate]:
    """Of every graph and profile, at the largest shape."""
    estimates = []
    for profile in engine.profiles:
        sizes = profile.batch.max, profile.height.max, profile.width.max
        for graph in GRAPHS:
            needed = activation_bytes(config, graph, *sizes, form=form, precision=precision)
            estimates.append(Estimate(graph, profile, needed))
    return estimates


def check_memory(
    estimates: Sequence[Estimate], largest_fitting: Callable[[Profile, int], Profile | None], gpu: Cuda | None
) -> None:
    """`OutOfMemoryError` for a profile that cannot fit the GPU present, with the largest that would."""
    if gpu is None:
        return
    _, total = gpu.free_memory()
    for estimate in estimates:
        if estimate.bytes > total:
            fitting = largest_fitting(estimate.profile, total)
            advice = (
                f"the largest of its kind that would: {fitting}" if fitting else "not even its smallest shape would"
            )
            raise OutOfMemoryError(
                f"the {estimate.graph} at the largest shape of the profile {estimate.profile} needs about "
                f"{estimate.bytes / 2**30:.1f} GiB, and cuda:{gpu.index} has {total / 2**30:.1f}; {advice}"
            )


def largest_fitting(config: VaeConfig, form: Form, precision: str) -> Callable[[Profile, int], Profile | None]:
    """(profile, bytes) -> the same with the largest height and width, in its proportions, whose work fits."""

    def search(profile: Profile, available: int) -> Profile | None:
        factor = config.downscale

        def shrunk(part: float) -> Profile:
            ranges = {}
            for name in ("height", "width"):
                size = getattr(profile, name)
                most = max(size.min, int(size.max * part) // factor * factor)
                ranges[name] = replace(size, opt=min(size.opt, most), max=most)
            return replace(profile, **ranges)

        def fits(candidate: Profile) -> bool:
            sizes = candidate.batch.max, candidate.height.max, candidate.width.max
            return all(
                activation_bytes(config, graph, *sizes, form=form, precision=precision) <= available for graph in GRAPHS
            )

        low, high = 0.0, 1.0
        if not fits(shrunk(low)):
            return None
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(shrunk(middle)) else (low, middle)
        return shrunk(low)

    return search


def activation_bytes(
    config: VaeConfig, graph: str, batch: int, height: int, width: int, *, form: Form, precision: str
) -> int:
    """Device memory for the activations of a graph on images of height x width pixels, about.

    The most that is alive at once, as the graph is written: a runtime that fuses operations needs less, never much
    more. What is alive: in a residual block its input, and two maps of the side that it computes; around a change of
    resolution both sides of it; in attention queries, keys, values and a block of scores.
    """
    item = ITEM_SIZES[precision]
    walk = _encoder_places if graph == "encoder" else _decoder_places
    inner = max(walk(config, batch, height, width, form))
    pixels = batch * height * width
    images = pixels * 4 * (config.in_channels if graph == "encoder" else config.out_channels)
    return inner * item + images


def _resnet(inside: int, outside: int, pixels: int) -> int:
    return max(2 * inside + outside, inside + 2 * outside) * pixels


def _middle(config: VaeConfig, batch: int, tokens: int, form: Form) -> Iterator[int]:
    channels = config.block_out_channels[-1]
    yield _resnet(channels, channels, batch * tokens)
    if config.mid_block_add_attention:
        scores = 2 * batch * tokens * -(-tokens // form.attention_blocks)  # and their softmax
        yield 5 * channels * batch * tokens + scores


def _decoder_places(config: VaeConfig, batch: int, height: int, width: int, form: Form) -> Iterator[int]:
    """Elements that are alive, place by place."""
    tokens = (height // config.downscale) * (width // config.downscale)
    yield from _middle(config, batch, tokens, form)
    pixels, inside = batch * tokens, config.block_out_channels[-1]
    for index, outside in enumerate(reversed(config.block_out_channels)):
        yield _resnet(inside, outside, pixels)
        yield _resnet(outside, outside, pixels)
        if index < len(config.block_out_channels) - 1:
            # Repeated, or computed as four maps, and then the result; a transposed convolution has the result alone.
            maps = 4 if form.upsample == "deconv" else 8
            yield outside * pixels * (1 + maps)
            pixels *= 4
        inside = outside


def _encoder_places(config: VaeConfig, batch: int, height: int, width: int, form: Form) -> Iterator[int]:
    pixels, inside = batch * height * width, config.block_out_channels[0]
    for index, outside in enumerate(config.block_out_channels):
        yield _resnet(inside, outside, pixels)
        yield _resnet(outside, outside, pixels)
        if index < len(config.block_out_channels) - 1:
            yield outside * (2 * pixels + pixels // 4)  # padded, and a quarter of it
            pixels //= 4
        inside = outside
    yield from _middle(config, batch, pixels // batch, form)


def memory_lines(estimates: Sequence[Estimate]) -> list[str]:
    """For people: what each engine will need when it runs."""
    return [
        f"{estimate.graph} at {estimate.profile.batch.max} x {estimate.profile.height.max} x "
        f"{estimate.profile.width.max}: about {estimate.bytes / 2**30:.2f} GiB of device memory for activations"
        for estimate in estimates
    ]
