"""Graphs against the reference: numbers, thresholds, verdict.

What is compared is what will run: the bundle is opened through `runtimes`, and fed photographs and noise at shapes that
the graphs were not traced with. The reference is our PyTorch model in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from runtimes import VaeRuntime
from runtimes.errors import NumericsError
from runtimes.images import to_float, to_uint8
from runtimes.progress import Progress
from vae_export.model import AutoencoderKL
from vae_export.photos import middle_of, photographs
from vae_export.ranges import SimulatedHalf

Array = npt.NDArray[Any]  #: float32, or uint8 where graphs take and give pixels
Candidate = Callable[[str, Array], Array]  #: (graph, input) -> output, as the reference computes it in fp32

PHOTO = "photo"  #: how names of inputs begin that are photographs
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
SEAMLESS = "seamless"
SEAMLESS_PSNR_DB = 60.0
SEAMLESS_STEPS = 2
SEAMLESS_TILE = 8  #: in latents: photographs are cut into six


@dataclass(frozen=True)
class Measurement:
    """One graph on one input. `psnr_db` is None where the outputs are equal to the last bit."""

    graph: str
    by: str  #: what computed it: a backend, or "simulated fp16"
    input: str
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
    input: str
    array: Array
    expected: Array


def reference_cases(
    model: AutoencoderKL,
    progress: Progress = lambda *_: None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    io: str = "float",
) -> list[Case]:
    """Inputs for both graphs with the outputs of the model in fp32; with `io="uint8"`, images are pixels.

    `shapes`, batch, height and width in latents, for graphs that do not take any: see `inputs`.
    """
    given = list(inputs(model, shapes))
    reference: Candidate = partial(_reference, model)
    if io == "uint8":
        given = [(graph, name, to_uint8(x) if graph == "encoder" else x) for graph, name, x in given]
        reference = through_pixels(reference)
    cases = []
    for done, (graph, name, array) in enumerate(given):
        progress(f"Computing the reference of {graph} on {name}", done, len(given))
        cases.append(Case(graph, name, array, reference(graph, array)))
    return cases


def compare(
    cases: Sequence[Case], by: str, candidate: Candidate, precision: str, progress: Progress = lambda *_: None
) -> list[Measurement]:
    """Measure a candidate, such as an opened bundle; `NumericsError` where it misses a threshold.

    The error carries all measurements, the good ones too.
    """
    measurements = []
    missed = []
    for done, case in enumerate(cases):
        progress(f"Validating {case.graph} by {by} on {case.input}", done, len(cases))
        pixels, in_fp16 = case.expected.dtype == np.uint8, by.endswith(SEAMLESS)
        thresholds = thresholds_of(precision, pixels=pixels, seamless=in_fp16)
        measurement = _measure(by, case, candidate(case.graph, case.array), thresholds)
        measurements.append(measurement)
        if not measurement.passed:
            missed.append(_described(measurement, thresholds))
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


def through_pixels(candidate: Candidate) -> Candidate:
    """A candidate on floats as one on pixels: uint8 [B, H, W, 3] into the encoder and out of the decoder."""

    def run(graph: str, array: Array) -> Array:
        return candidate(graph, to_float(array)) if graph == "encoder" else to_uint8(candidate(graph, array))

    return run


def worst_photo(cases: Sequence[Case], graph: str, precision: str) -> Callable[[Callable[[Array], Array]], float]:
    """A measure of one graph, given as a function: the lowest PSNR over the photographs; infinite where equal."""
    photos = [case for case in cases if case.graph == graph and case.input.startswith(PHOTO)]

    def measure(run: Callable[[Array], Array]) -> float:
        found = [_measure("", case, run(case.array), THRESHOLDS[precision]).psnr_db for case in photos]
        return min(math.inf if psnr is None else psnr for psnr in found)

    return measure


def opened_bundle(runtime: VaeRuntime) -> Candidate:
    """A bundle as a candidate."""

    def run(graph: str, array: Array) -> Array:
        result: Array = runtime.encode(array)[0].parameters if graph == "encoder" else runtime.decode(array)[0]
        return result

    return run


def seamless_bundle(runtime: VaeRuntime) -> tuple[str, Candidate]:
    """A tileable bundle as a candidate, in small tiles, and what to call it."""
    runtime.tile_latent_min_size = SEAMLESS_TILE
    runtime.tile_sample_min_size = SEAMLESS_TILE * runtime.config.downscale
    runtime.enable_tiling(SEAMLESS)
    return f"{runtime.backend} {SEAMLESS}", opened_bundle(runtime)


def simulated(model: AutoencoderKL, precision: str) -> Candidate:
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


def _described(missed: Measurement, thresholds: Thresholds) -> str:
    where = f"{missed.graph} by {missed.by} on {missed.input} {list(missed.shape)}"
    if not missed.finite:
        return f"{where}: NaN or infinity"
    return (
        f"{where}: PSNR {missed.psnr_db:.1f} dB (at least {_psnr_bar(missed.input, thresholds):g}), "
        f"{missed.uint8_steps or 0} uint8 steps (at most {thresholds.uint8_steps})"
    )


def inputs(
    model: AutoencoderKL, shapes: Sequence[tuple[int, int, int]] | None = None
) -> Iterator[tuple[str, str, Array]]:
    """(graph, name, array): photographs, noise and one colour.

    Without `shapes`, noise of batch 1 and 3, non-square, and the smallest legal size; else noise of these, and
    photographs of the first.
    """
    config, factor = model.config, model.config.downscale
    rng = np.random.default_rng(0)
    if shapes is None:
        photo_shape, flat_shape = (1, *PHOTO_SIZE), (1, 8, 12)
        # At one latent a norm with one channel a group has no variance (PyTorch refuses it), and with two a noisy one.
        smallest = 1 if min(config.block_out_channels[-2:]) > 2 * config.norm_num_groups else 2
        shapes = ((1, smallest, smallest), (1, 8, 12), (3, 5, 7))
    else:
        photo_shape = flat_shape = shapes[0]
    batch, height, width = photo_shape[0], photo_shape[1] * factor, photo_shape[2] * factor
    photos = {
        p.stem: np.repeat(middle_of(p, height, width, config.in_channels).numpy(), batch, axis=0)
        for p in photographs()[:3]
    }
    for name, photo in photos.items():
        yield "encoder", f"{PHOTO} {name}", photo
    for b, h, w in shapes:
        noise = rng.uniform(-1, 1, (b, config.in_channels, h * factor, w * factor))
        yield "encoder", "noise", noise.astype(np.float32)
    # A picture of one colour has next to no variance in its first maps: norms that subtract squares end there.
    b, h, w = flat_shape
    yield "encoder", "black", np.full((b, config.in_channels, h * factor, w * factor), -1, np.float32)
    multiply, add = (np.reshape(values, (1, -1, 1, 1)) for values in config.latent_affine())
    for name, photo in photos.items():
        yield "decoder", f"{PHOTO} {name}", _reference(model, "encoder", photo)[:, : config.latent_channels]
    for b, h, w in shapes:
        # Diffusion models work on latents of unit variance: unscaled, this is how they look.
        noise = rng.standard_normal((b, config.latent_channels, h, w)) / multiply + add
        yield "decoder", "noise", noise.astype(np.float32)


def _psnr_bar(name: str, thresholds: Thresholds) -> float:
    return thresholds.psnr_db if name.startswith(PHOTO) else thresholds.noise_psnr_db


@torch.no_grad()
def _reference(model: AutoencoderKL, graph: str, array: Array) -> Array:
    function = model.encode_moments if graph == "encoder" else model.decode_latents
    result: Array = function(torch.from_numpy(np.ascontiguousarray(array))).numpy()
    return result


def _measure(by: str, case: Case, actual: Array, thresholds: Thresholds) -> Measurement:
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
    near = (psnr is None or psnr >= _psnr_bar(case.input, thresholds)) and (
        steps is None or steps <= thresholds.uint8_steps
    )
    return Measurement(
        graph=case.graph,
        by=by,
        input=case.input,
        shape=case.array.shape,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        psnr_db=psnr,
        uint8_steps=steps,
        finite=finite,
        passed=finite and near,
    )
