"""Estimate the device memory of an engine from the config, before it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from runtimes.errors import OutOfMemoryError
from runtimes.manifest import Engine
from runtimes.names import GRAPHS, Graph
from runtimes.tensorrt.cuda import Cuda
from runtimes.tensorrt.profiles import Profile

if TYPE_CHECKING:
    from vae_export.rewrites.form import Form

#: (config, graph, batch, height, width, form) -> number of live tensor elements at each place of the computation
Places = Callable[..., Iterator[int]]
ITEM_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Estimate(NamedTuple):
    """Estimated bytes of device memory for the activations of one graph at the largest shape of a profile."""

    graph: str
    profile: Profile
    bytes: int


def estimate_memory(engine: Engine, config: Any, places: Places, form: Form, precision: str) -> list[Estimate]:
    """Estimate the device memory of every graph and profile, at the largest shape of the profile.

    `places` is the `activation_places` of the family.
    """
    estimates = []
    for profile in engine.profiles:
        sizes = profile.batch.max, profile.height.max, profile.width.max
        for graph in GRAPHS:
            needed = activation_bytes(config, places, graph, *sizes, form=form, precision=precision)
            estimates.append(Estimate(graph, profile, needed))
    return estimates


def check_memory(
    estimates: Sequence[Estimate], largest_fitting: Callable[[Profile, int], Profile | None], gpu: Cuda | None
) -> None:
    """Raise `OutOfMemoryError` for a profile that does not fit the memory of `gpu`.

    The message gives the largest profile of the same proportions that fits. Without a GPU nothing is checked.
    """
    if gpu is None:
        return
    _, total = gpu.free_memory()
    for estimate in estimates:
        if estimate.bytes > total:
            fitting = largest_fitting(estimate.profile, total)
            advice = f"the largest profile that fits: {fitting}" if fitting else "not even its smallest shape fits"
            raise OutOfMemoryError(
                f"the {estimate.graph} at the largest shape of the profile {estimate.profile} needs about "
                f"{estimate.bytes / 2**30:.1f} GiB, and cuda:{gpu.index} has {total / 2**30:.1f}; {advice}"
            )


def largest_fitting(
    config: Any, factor: int, places: Places, form: Form, precision: str
) -> Callable[[Profile, int], Profile | None]:
    """Return a function (profile, bytes) -> the profile with the largest height and width that fit, or None.

    Sizes are multiples of `factor` pixels. The function scales the maxima of height and width by the same ratio.
    """

    def search(profile: Profile, available: int) -> Profile | None:
        def shrunk(part: float) -> Profile:
            ranges = {}
            for name in ("height", "width"):
                size = getattr(profile, name)
                largest = max(size.min, int(size.max * part) // factor * factor)
                ranges[name] = replace(size, opt=min(size.opt, largest), max=largest)
            return replace(profile, **ranges)

        def fits(candidate: Profile) -> bool:
            sizes = candidate.batch.max, candidate.height.max, candidate.width.max
            return all(
                activation_bytes(config, places, graph, *sizes, form=form, precision=precision) <= available
                for graph in GRAPHS
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
    config: Any,
    places: Places,
    graph: Graph,
    batch: int,
    height: int,
    width: int,
    *,
    form: Form,
    precision: str,
) -> int:
    """Estimate the bytes of device memory for the activations of a graph on images of height x width pixels.

    The estimate is the maximum of the tensors that are alive at once in the graph as written: a runtime that fuses
    operations needs less, and none needs much more. `places` is the `activation_places` of the family.
    """
    item = ITEM_SIZES[precision]
    inner = max(places(config, graph, batch, height, width, form))
    pixels = batch * height * width
    images = pixels * 4 * (config.in_channels if graph == "encoder" else config.out_channels)
    return int(inner * item + images)


def memory_lines(estimates: Sequence[Estimate]) -> list[str]:
    """Return one line of text per estimate, for users."""
    return [
        f"{estimate.graph} at {estimate.profile.batch.max} x {estimate.profile.height.max} x "
        f"{estimate.profile.width.max}: about {estimate.bytes / 2**30:.2f} GiB of device memory for activations"
        for estimate in estimates
    ]
