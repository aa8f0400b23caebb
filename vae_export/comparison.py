"""Graphs against the reference: numbers, thresholds, verdict.

What is compared is what will run: the bundle is opened through `runtimes`, and fed photographs and noise at shapes that
the graphs were not traced with. The reference is our PyTorch model in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from runtimes import Bundle, VaeRuntime, open_vae
from runtimes.errors import NumericsError
from runtimes.images import to_float, to_uint8
from runtimes.progress import Progress, no_progress
from vae_export.families.base import ReferenceVae
from vae_export.photos import middle_of, photographs
from vae_export.rewrites.ranges import SimulatedHalf

Array = npt.NDArray[Any]  #: float32, or uint8 where graphs take and give pixels
Candidate = Callable[[str, Array], Array]  #: (graph, input) -> output, as the reference computes it in fp32

PHOTO_SIZE = (16, 24)  #: in latents; 128 x 192 pixels at f = 8


class Thresholds(NamedTuple):
    """What a graph must keep to. `psnr_db` is over the range of the reference's output, the rest in its units."""

    psnr_db: float
    uint8_steps: int  #: largest difference of a decoded pixel, in steps of 1/255
    noise_psnr_db: float  #: of inputs that are no photographs


# fp32: another order of summation, nothing else: 24 bits of mantissa and some thousand terms leave over 100 dB.
# fp16 and bf16: 11 and 8 bits of mantissa, rounded some hundred times on the way; models of real size lie some 16 dB
# above.
# int8: the bar for photographs is one below which the eye may see it. Ranges are calibrated on photographs: noise may
# go beyond them, and at one latent a single value does.
THRESHOLDS = {
    "fp32": Thresholds(psnr_db=100.0, uint8_steps=1, noise_psnr_db=100.0),
    "fp16": Thresholds(psnr_db=50.0, uint8_steps=8, noise_psnr_db=50.0),
    "bf16": Thresholds(psnr_db=30.0, uint8_steps=64, noise_psnr_db=30.0),
    "int8": Thresholds(psnr_db=40.0, uint8_steps=64, noise_psnr_db=35.0),
}


# Pixels are rounded on either side: where a value lies between two of them, the least difference makes a step, the
# smallest there is. 60 dB are one such pixel of fifteen; a share of 3e-4 is what differences of 1e-6 lead to.
PIXELS_PSNR_DB = 60.0

# What seamless tiling keeps between its steps is rounded to fp16, some 40 times on the way; no difference may be seen:
# not one of a step beside that of rounding.
SEAMLESS_PSNR_DB = 60.0
SEAMLESS_STEPS = 2
SEAMLESS_TILE = 8  #: in latents: photographs are cut into six


@dataclass(frozen=True)
class Measurement:
    """One graph on one input. `psnr_db` is None where the outputs are equal to the last bit."""

    graph: str
    by: str  #: what computed it: a backend, or "simulated fp16"
    input: str
    tiling: str | None  #: None: as a whole; else "seamless"
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    psnr_db: float | None
    uint8_steps: int | None  #: of decoded images; None for latents
    finite: bool
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Case(NamedTuple):
    """An input, and what the reference makes of it."""

    graph: str
    input: str  #: what it is, for people
    array: Array
    expected: Array
    photo: bool = False  #: a photograph, for which thresholds may be higher


class Input(NamedTuple):
    """A `Case` before the reference has seen it."""

    graph: str
    input: str
    array: Array
    photo: bool = False


def reference_cases(
    model: ReferenceVae,
    progress: Progress = no_progress,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    io: str = "float",
) -> list[Case]:
    """Inputs for both graphs with the outputs of the model in fp32; with `io="uint8"`, images are pixels.

    `shapes`, batch, height and width in latents, for graphs that do not take any: see `inputs`.
    """
    given = list(inputs(model, shapes))
    reference: Candidate = partial(_reference, model)
    if io == "uint8":
        given = [x._replace(array=to_uint8(x.array)) if x.graph == "encoder" else x for x in given]
        reference = through_pixels(reference)
    cases = []
    for done, (graph, name, array, photo) in enumerate(given):
        progress(f"Computing the reference of {graph} on {name}", done, len(given))
        cases.append(Case(graph, name, array, reference(graph, array), photo))
    return cases


def compare(
    cases: Sequence[Case],
    by: str,
    candidate: Candidate,
    precision: str,
    progress: Progress = no_progress,
    *,
    tiling: str | None = None,
) -> list[Measurement]:
    """Measure what computes the graphs, named `by`; `NumericsError` where it misses a threshold.

    `tiling` names the tiling that the candidate computes with: "seamless" has thresholds of its own. The error carries
    all measurements, the good ones too.
    """
    measurements = []
    missed = []
    for done, case in enumerate(cases):
        what = f"{by}, {tiling}," if tiling else by
        progress(f"Validating {case.graph} by {what} on {case.input}", done, len(cases))
        thresholds = thresholds_of(precision, pixels=case.expected.dtype == np.uint8, seamless=tiling == "seamless")
        measurement = _measure(by, case, candidate(case.graph, case.array), thresholds, tiling)
        measurements.append(measurement)
        if not measurement.passed:
            missed.append(_described(measurement, case, thresholds))
    progress("Validated", len(cases), len(cases))
    if missed:
        raise NumericsError(
            f"{len(missed)} of {len(measurements)} comparisons with the reference failed at {precision}; the first: "
            f"{missed[0]}",
            [m.to_dict() for m in measurements],
        )
    return measurements


def thresholds_of(precision: str, *, pixels: bool = False, seamless: bool = False) -> Thresholds:
    """What a graph of a precision must keep to, also where its output are pixels, or it was tiled seamlessly."""
    bars = THRESHOLDS[precision]
    for applies, most, steps in ((pixels, PIXELS_PSNR_DB, 0), (seamless, SEAMLESS_PSNR_DB, SEAMLESS_STEPS)):
        if applies:
            bars = Thresholds(min(bars.psnr_db, most), max(bars.uint8_steps, steps), min(bars.noise_psnr_db, most))
    return bars


def check(
    cases: Sequence[Case], validator: Validator, precision: str, progress: Progress = no_progress
) -> list[Measurement]:
    """`compare` what a target names as computing its graphs."""
    return compare(cases, validator.by, validator.run, precision, progress, tiling=validator.tiling)


def through_pixels(candidate: Candidate) -> Candidate:
    """A candidate on floats as one on pixels: uint8 [B, H, W, 3] into the encoder and out of the decoder."""

    def run(graph: str, array: Array) -> Array:
        return candidate(graph, to_float(array)) if graph == "encoder" else to_uint8(candidate(graph, array))

    return run


def worst_photo(cases: Sequence[Case], graph: str, precision: str) -> Callable[[Callable[[Array], Array]], float]:
    """A measure of one graph, given as a function: the lowest PSNR over the photographs; infinite where equal."""
    photos = [case for case in cases if case.graph == graph and case.photo]

    def measure(run: Callable[[Array], Array]) -> float:
        found = [_measure("", case, run(case.array), THRESHOLDS[precision]).psnr_db for case in photos]
        return min(math.inf if psnr is None else psnr for psnr in found)

    return measure


class Validator(NamedTuple):
    """What computes the graphs of a bundle, to be compared with the reference."""

    by: str  #: its name in tables and in the manifest
    run: Candidate
    tiling: str | None = None  #: the tiling that it computes with; "seamless" has thresholds of its own


def bundle_validators(bundle: Bundle, device: str | None = None, backend: str | None = None) -> Iterator[Validator]:
    """The opened bundle; and its steps, on small tiles, where it has them. It is closed when the iteration ends."""
    with open_vae(bundle, device=device, backend=backend) as vae:
        yield Validator(vae.backend, opened_bundle(vae))
        if bundle.manifest.tileable is not None:
            vae.tile_latent_min_size = SEAMLESS_TILE
            vae.tile_sample_min_size = SEAMLESS_TILE * vae.config.downscale
            vae.enable_tiling("seamless")
            yield Validator(vae.backend, opened_bundle(vae), tiling="seamless")


def opened_bundle(runtime: VaeRuntime) -> Candidate:
    """A bundle as a candidate."""

    def run(graph: str, array: Array) -> Array:
        if graph == "decoder":
            return cast(Array, runtime.decode(array)[0])
        encoded = runtime.encode(array)[0]
        return cast(Array, encoded.parameters if runtime.latent_space.posterior else encoded)

    return run


def simulated(model: ReferenceVae, precision: str) -> Candidate:
    """The model in simulated half precision; overflow raises `NumericsError` naming the place."""
    half = SimulatedHalf(model, precision)

    def run(graph: str, array: Array) -> Array:
        result: Array = half.run(graph, torch.from_numpy(array)).numpy()
        if half.first_not_finite is not None:
            place, shape = half.first_not_finite, list(array.shape)
            raise NumericsError(
                f"{place} overflows in {precision} on an input of {shape}, and no rescaling by powers of two prevented "
                "it; export in bf16 or fp32"
            )
        return result

    return run


def _described(missed: Measurement, case: Case, thresholds: Thresholds) -> str:
    tiling = f", {missed.tiling}," if missed.tiling else ""
    where = f"{missed.graph} by {missed.by}{tiling} on {missed.input} {list(missed.shape)}"
    if not missed.finite:
        return f"{where}: NaN or infinity"
    return (
        f"{where}: PSNR {missed.psnr_db:.1f} dB (at least {_psnr_bar(case, thresholds):g}), "
        f"{missed.uint8_steps or 0} uint8 steps (at most {thresholds.uint8_steps})"
    )


def inputs(model: ReferenceVae, shapes: Sequence[tuple[int, int, int]] | None = None) -> Iterator[Input]:
    """Photographs, noise and one colour for both graphs.

    Without `shapes`, noise of batch 1 and 3, non-square, and the smallest legal size; else noise of these, and
    photographs and one colour of the first.
    """
    config, factor = model.config, model.config.downscale
    rng = np.random.default_rng(0)
    if shapes is None:
        photo_shape, flat_shape = (1, *PHOTO_SIZE), (1, 8, 12)
        smallest = model.smallest_side
        shapes = ((1, smallest, smallest), (1, 8, 12), (3, 5, 7))
    else:
        photo_shape = flat_shape = shapes[0]
    batch, height, width = photo_shape[0], photo_shape[1] * factor, photo_shape[2] * factor
    photos = {
        p.stem: np.repeat(middle_of(p, height, width, config.in_channels).numpy(), batch, axis=0)
        for p in photographs()[:3]
    }
    for name, photo in photos.items():
        yield Input("encoder", f"photo {name}", photo, photo=True)
    for b, h, w in shapes:
        noise = rng.uniform(-1, 1, (b, config.in_channels, h * factor, w * factor))
        yield Input("encoder", "noise", noise.astype(np.float32))
    # A picture of one colour has next to no variance in its first maps: norms that subtract squares end there.
    b, h, w = flat_shape
    yield Input("encoder", "black", np.full((b, config.in_channels, h * factor, w * factor), -1, np.float32))
    for name, photo in photos.items():
        latents = _reference(model, "encoder", photo)[:, : config.latent_channels]
        yield Input("decoder", f"photo {name}", latents, photo=True)
    for b, h, w in shapes:
        # Diffusion models work on latents of unit variance: unscaled, this is how they look.
        yield Input("decoder", "noise", model.latent_space.raw_noise(rng, b, h, w).astype(np.float32))


def _psnr_bar(case: Case, thresholds: Thresholds) -> float:
    return thresholds.psnr_db if case.photo else thresholds.noise_psnr_db


@torch.no_grad()
def _reference(model: ReferenceVae, graph: str, array: Array) -> Array:
    function = model.encode_moments if graph == "encoder" else model.decode_latents
    result: Array = function(torch.from_numpy(np.ascontiguousarray(array))).numpy()
    return result


def _measure(by: str, case: Case, actual: Array, thresholds: Thresholds, tiling: str | None = None) -> Measurement:
    expected = case.expected
    if expected.dtype == np.uint8:
        actual, expected = to_float(actual), to_float(expected)
    finite = bool(np.isfinite(actual).all())
    difference = np.abs(actual.astype(np.float64) - expected) if finite else np.zeros(1)
    mean_square = float(np.mean(difference**2))
    span = float(expected.max() - expected.min()) or 1.0
    psnr = 0.0 if not finite else None if mean_square == 0 else round(10 * math.log10(span**2 / mean_square), 2)
    steps = None
    if case.graph == "decoder":
        steps = int(np.abs(to_uint8(actual).astype(int) - to_uint8(expected)).max()) if finite else 255
    near = (psnr is None or psnr >= _psnr_bar(case, thresholds)) and (steps is None or steps <= thresholds.uint8_steps)
    return Measurement(
        graph=case.graph,
        by=by,
        input=case.input,
        tiling=tiling,
        shape=case.array.shape,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        psnr_db=psnr,
        uint8_steps=steps,
        finite=finite,
        passed=finite and near,
    )
