"""Compare the graphs of a bundle with the reference model: measurements, thresholds, verdict.

The comparison uses the code that users will run: it opens the bundle through `runtimes`. Inputs are photographs and
noise, at shapes that the graphs were not traced with. The reference is the PyTorch model in fp32.
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

Array = npt.NDArray[Any]  #: float32; uint8 for images of graphs on pixels
Candidate = Callable[[str, Array], Array]  #: (graph, input) -> output

PHOTO_SIZE = (16, 24)  #: (height, width) in latents; 128 x 192 pixels at f = 8


class Thresholds(NamedTuple):
    """Limits of the deviation from the reference. PSNR is relative to the range of the reference output."""

    psnr_db: float  #: minimum for photographs
    uint8_steps: int  #: maximum difference of a decoded pixel, in steps of 1/255
    noise_psnr_db: float  #: minimum for all other inputs


# fp32: only the order of summation differs; 24 bits of mantissa and some thousand terms leave more than 100 dB.
# fp16 and bf16: 11 and 8 bits of mantissa, rounded some hundred times; models of real size are some 16 dB better.
# int8: below the threshold for photographs, errors may become visible. Ranges are calibrated on photographs, so noise
# may exceed them; at the size of one latent a single value does.
THRESHOLDS = {
    "fp32": Thresholds(psnr_db=100.0, uint8_steps=1, noise_psnr_db=100.0),
    "fp16": Thresholds(psnr_db=50.0, uint8_steps=8, noise_psnr_db=50.0),
    "bf16": Thresholds(psnr_db=30.0, uint8_steps=64, noise_psnr_db=30.0),
    "int8": Thresholds(psnr_db=40.0, uint8_steps=64, noise_psnr_db=35.0),
}


# Both sides round to pixels, so a tiny difference of a value halfway between two pixels becomes a full step of 1/255.
# At 60 dB one pixel of fifteen differs by a step; differences of 1e-6 cause such a step in 3e-4 of the pixels.
PIXELS_PSNR_DB = 60.0

# Seamless tiling rounds the maps between its steps to fp16, some 40 times in total. The difference must be invisible:
# at most one step of 1/255 in addition to the one from rounding.
SEAMLESS_PSNR_DB = 60.0
SEAMLESS_STEPS = 2
SEAMLESS_TILE = 8  #: in latents: divides photographs into six tiles


@dataclass(frozen=True)
class Measurement:
    """The deviation of one graph on one input. `psnr_db` is None if the outputs are bit-identical."""

    graph: str
    by: str  #: name of the backend, or "simulated fp16"
    input: str
    tiling: str | None  #: "seamless", or None without tiling
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    psnr_db: float | None
    uint8_steps: int | None  #: maximum difference of decoded pixels; None for latents
    finite: bool
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Case(NamedTuple):
    """An input and the output of the reference."""

    graph: str
    input: str  #: description for users
    array: Array
    expected: Array
    photo: bool = False  #: whether the input is a photograph; `Thresholds` may be stricter for photographs


class Input(NamedTuple):
    """A `Case` without the output of the reference."""

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
    """Return inputs for both graphs and the outputs of the model in fp32. With `io="uint8"` images are pixels.

    `shapes` are (batch, height, width) in latents, for graphs that do not take every shape: see `inputs`.
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
    """Compare a candidate with the reference on all cases and return the measurements.

    `by` names the candidate. `tiling` is the tiling it uses; "seamless" has separate thresholds. Raises
    `NumericsError`, with all measurements, if a threshold is missed.
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
    """Return the thresholds of a precision, relaxed for pixel outputs and for seamless tiling."""
    thresholds = THRESHOLDS[precision]
    for applies, psnr, steps in ((pixels, PIXELS_PSNR_DB, 0), (seamless, SEAMLESS_PSNR_DB, SEAMLESS_STEPS)):
        if applies:
            thresholds = Thresholds(
                min(thresholds.psnr_db, psnr),
                max(thresholds.uint8_steps, steps),
                min(thresholds.noise_psnr_db, psnr),
            )
    return thresholds


def check(
    cases: Sequence[Case], validator: Validator, precision: str, progress: Progress = no_progress
) -> list[Measurement]:
    """Compare a validator with the reference: see `compare`."""
    return compare(cases, validator.by, validator.run, precision, progress, tiling=validator.tiling)


def through_pixels(candidate: Candidate) -> Candidate:
    """Convert a candidate on floats to one whose images are pixels, uint8 [B, H, W, 3]."""

    def run(graph: str, array: Array) -> Array:
        return candidate(graph, to_float(array)) if graph == "encoder" else to_uint8(candidate(graph, array))

    return run


def worst_photo(cases: Sequence[Case], graph: str, precision: str) -> Callable[[Callable[[Array], Array]], float]:
    """Return a function that measures one graph, given as a function: the lowest PSNR in dB over the photographs.

    The PSNR is infinite if all outputs equal the reference.
    """
    photos = [case for case in cases if case.graph == graph and case.photo]

    def measure(run: Callable[[Array], Array]) -> float:
        found = [_measure("", case, run(case.array), THRESHOLDS[precision]).psnr_db for case in photos]
        return min(math.inf if psnr is None else psnr for psnr in found)

    return measure


class Validator(NamedTuple):
    """A way to compute the graphs of a bundle, to be compared with the reference."""

    by: str  #: name in tables and in the manifest
    run: Candidate
    tiling: str | None = None  #: the tiling it uses; "seamless" has separate thresholds


def bundle_validators(bundle: Bundle, device: str | None = None, backend: str | None = None) -> Iterator[Validator]:
    """Yield validators of the opened bundle and, if it is tileable, of its steps on small tiles.

    The bundle is closed when the iteration ends.
    """
    with open_vae(bundle, device=device, backend=backend) as vae:
        yield Validator(vae.backend, opened_bundle(vae))
        if bundle.manifest.tileable is not None:
            vae.tile_latent_min_size = SEAMLESS_TILE
            vae.tile_sample_min_size = SEAMLESS_TILE * vae.graph_space.factor
            vae.enable_tiling("seamless")
            yield Validator(vae.backend, opened_bundle(vae), tiling="seamless")


def opened_bundle(runtime: VaeRuntime) -> Candidate:
    """Return an opened bundle as a candidate."""

    def run(graph: str, array: Array) -> Array:
        space, converted = runtime.latent_space, not runtime.graphs_are_raw
        if graph == "decoder":
            return cast(Array, runtime.decode(space.denormalise(array) if converted else array)[0])
        encoded = runtime.encode(array)[0]
        if converted:
            return cast(Array, space.normalise(encoded))
        return cast(Array, encoded.parameters if space.posterior else encoded)

    return run


def simulated(model: ReferenceVae, precision: str) -> Candidate:
    """Return the model in simulated half precision as a candidate.

    The candidate raises `NumericsError`, which names the place, on overflow.
    """
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
        f"{where}: PSNR {missed.psnr_db:.1f} dB (at least {_minimum_psnr(case, thresholds):g}), "
        f"{missed.uint8_steps or 0} uint8 steps (at most {thresholds.uint8_steps})"
    )


def inputs(model: ReferenceVae, shapes: Sequence[tuple[int, int, int]] | None = None) -> Iterator[Input]:
    """Yield photographs, noise and a single-colour image for both graphs.

    `shapes` are (batch, height, width) in latents: noise has all of them, photographs and the single colour the first.
    Without `shapes`, noise has batches of 1 and 3, non-square sizes, and the smallest legal size.
    """
    config, space = model.config, model.latent_space
    factor = space.factor
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
    # An image of a single colour has almost no variance in its first maps, where norms that subtract squares fail.
    b, h, w = flat_shape
    yield Input("encoder", "black", np.full((b, config.in_channels, h * factor, w * factor), -1, np.float32))
    for name, photo in photos.items():
        latents = _reference(model, "encoder", photo)[:, : space.channels]
        yield Input("decoder", f"photo {name}", latents, photo=True)
    for b, h, w in shapes:
        # Diffusion models produce latents of unit variance, which are unscaled before decoding.
        yield Input("decoder", "noise", space.raw_noise(rng, b, h, w).astype(np.float32))


def _minimum_psnr(case: Case, thresholds: Thresholds) -> float:
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
    close = psnr is None or psnr >= _minimum_psnr(case, thresholds)
    close = close and (steps is None or steps <= thresholds.uint8_steps)
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
        passed=finite and close,
    )
