"""Build a TensorRT plan from ONNX in a separate process, since TensorRT's builder may crash and does not free memory.

    build_plan(onnx, job, "decoder") -> plan  starts `python -P -m runtimes.tensorrt.builder`, which runs `build`

The plan has the precision of the ONNX graph: all networks are built strongly typed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runtimes import children
from runtimes.errors import (
    BackendUnavailable,
    BundleError,
    CompatibilityError,
    ConfigError,
    NotInstalled,
    OutOfMemoryError,
    VaeError,
)
from runtimes.files import written_whole
from runtimes.onnx_scan import check_onnx
from runtimes.progress import Progress, no_progress
from runtimes.tensorrt.flavours import Flavour, load_flavour

Shape = tuple[int, int, int, int]

_FAILURES = {
    kind.__name__: kind
    for kind in (BackendUnavailable, CompatibilityError, ConfigError, NotInstalled, OutOfMemoryError)
}


@dataclass(frozen=True)
class BuildJob:
    """How to build a plan from an ONNX graph."""

    flavour: str
    input: str  #: name of the graph's input
    profiles: tuple[tuple[Shape, Shape, Shape], ...]  #: smallest, preferred and largest shape of the input
    gpus: tuple[str, ...] = ()  #: such as "sm89"; TensorRT-RTX only, empty for its portable default
    timing_cache: str = ""  #: file in which `tensorrt` keeps the measured times of kernels; empty for none

    def with_timing_cache(self, path: Path) -> BuildJob:
        """Return the same job with this timing cache."""
        return replace(self, timing_cache=str(path))


def build_plan(onnx: bytes, job: BuildJob, what: str, progress: Progress = no_progress) -> bytes:
    """Build a plan in a separate process. `what` names the graph in messages, such as "decoder".

    Raises `IntegrityError` for a graph with external data (see `runtimes.onnx_scan`), `BackendUnavailable` if TensorRT
    is not installed, `CompatibilityError` with TensorRT's messages if it refuses the graph or crashes, `ConfigError`
    for a profile or GPU that it does not support, `OutOfMemoryError` if the system killed the build for memory.
    """
    check_onnx(onnx, f"the graph of the {what}")
    load_flavour(job.flavour)  # raises before a process is started if TensorRT is missing
    with tempfile.TemporaryDirectory(prefix="vae-export-build-") as directory:
        source, plan = Path(directory) / "model.onnx", Path(directory) / "model.plan"
        try:
            source.write_bytes(onnx)
            (Path(directory) / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        except OSError as error:
            raise VaeError(f"the {what}: {_not_written(error)}") from None
        with _Builder(directory) as process:
            try:
                failure = _follow(process, what, progress)
            except BaseException:  # Ctrl-C included: without this the builder would run on for minutes
                process.kill()
                raise
            code = process.wait()
            if failure is not None:
                raise _FAILURES.get(failure["error"], VaeError)(f"the {what}: {failure['message']}")
            if code != 0 or not plan.exists():
                raise _crashed(job, what, code, process.last_error_line())
        return plan.read_bytes()


class _Builder(subprocess.Popen[str]):
    """The building process; its standard error goes to a file."""

    def __init__(self, directory: str) -> None:
        self._errors = (Path(directory) / "stderr").open("w+", encoding="utf-8", errors="replace")
        super().__init__(
            children.command("runtimes.tensorrt.builder", directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            env=children.environment(),
        )

    def last_error_line(self) -> str:
        """Return the last line that the process wrote to standard error, or ""."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._errors.close()


def _follow(process: subprocess.Popen[str], what: str, progress: Progress) -> Mapping[str, str] | None:
    """Forward the builder's reports to `progress` until it ends; return the failure that it reported, or None."""
    failure = None
    assert process.stdout is not None
    for line in process.stdout:
        with suppress(ValueError):  # not JSON: TensorRT's libraries may print lines too
            report = json.loads(line)
            if not isinstance(report, dict):
                continue
            if "error" in report:
                failure = report
            elif "phase" in report:
                progress(f"Building the {what}: {report['phase']}", report["done"], report["total"])
    return failure


def _crashed(job: BuildJob, what: str, code: int, last_line: str) -> VaeError:
    if code == -signal.SIGKILL:
        return OutOfMemoryError(
            f"the process that built the {what} was killed, as the system does when memory runs out; "
            "build on a machine with more memory, or with smaller profiles"
        )
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    output = f"; its last output: {last_line}" if last_line else ""
    return CompatibilityError(
        f"{job.flavour} crashed while it built the {what} ({ended}){output}. Another driver or version of TensorRT "
        "may build it; nothing was written"
    )


# In the building process -------------------------------------------------------------------------------------------


def build(onnx: bytes, job: BuildJob, report: Callable[[str, int, int], None]) -> bytes:
    """Build a plan in this process; a crash of TensorRT ends it. Raises the errors that `build_plan` lists."""
    flavour = load_flavour(job.flavour)
    trt = flavour.trt
    builder = trt.Builder(flavour.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, flavour.logger)
    report("reading the graph", 0, 1)
    if not parser.parse(onnx):
        raise CompatibilityError(f"{_named(flavour)} does not take the graph: {_parser_errors(flavour, parser)}")
    config = builder.create_builder_config()
    # fp32 means fp32: TF32 rounds the factors of products to 10 bits of mantissa, as many as fp16 has.
    config.clear_flag(trt.BuilderFlag.TF32)
    _add_profiles(flavour, builder, config, job)
    if flavour.is_rtx and job.gpus:
        _choose_gpus(flavour, config, job.gpus)
    elif job.gpus:
        raise ConfigError("tensorrt builds for the GPU that is present; --gpu is for tensorrt-rtx")
    timing = None if flavour.is_rtx else _read_timing_cache(trt, config, job.timing_cache)
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CompatibilityError(f"{_named(flavour)} could not build the engine: {flavour.complaints()}")
    if timing is not None:
        _write_timing_cache(timing, job.timing_cache)
    return bytes(plan)


def _named(flavour: Flavour) -> str:
    return f"{flavour.trt.__name__} {flavour.version}"


def _parser_errors(flavour: Flavour, parser: Any) -> str:
    """Return every failure with its node; the parser lists more failures than its log."""
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = error.node_name() or (f"node {error.node()}" if error.node() >= 0 else "the graph")
        operator = f" ({error.node_operator()})" if error.node_operator() else ""
        errors.append(f"{node}{operator}: {' '.join(str(error.desc()).split())}")
    return "; ".join(dict.fromkeys(errors)) or flavour.complaints()


def _add_profiles(flavour: Flavour, builder: Any, config: Any, job: BuildJob) -> None:
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(job.input, *(tuple(shape) for shape in shapes))
        # TensorRT returns -1 instead of raising for a profile that it refuses.
        if config.add_optimization_profile(profile) < 0:
            listed = " to ".join("x".join(map(str, shape)) for shape in (shapes[0], shapes[2]))
            raise ConfigError(f"{_named(flavour)} does not take the profile {listed}: {flavour.complaints()}")


def check_gpus(flavour: Flavour, gpus: Sequence[str]) -> None:
    """Raise `ConfigError` for a GPU that TensorRT-RTX does not build for; the message lists the supported ones."""
    known = [name.lower() for name in dir(flavour.trt.ComputeCapability) if name.startswith("SM")]
    for gpu in gpus:
        if gpu not in known:
            raise ConfigError(f"{_named(flavour)} does not build for {gpu!r}, only for {', '.join(known)}")


def _choose_gpus(flavour: Flavour, config: Any, gpus: tuple[str, ...]) -> None:
    check_gpus(flavour, gpus)
    config.num_compute_capabilities = len(gpus)
    for index, gpu in enumerate(gpus):
        capability = getattr(flavour.trt.ComputeCapability, gpu.upper())
        if not config.set_compute_capability(capability, index):
            raise ConfigError(f"{_named(flavour)} does not build for {gpu}: {flavour.complaints()}")


def _read_timing_cache(trt: Any, config: Any, path: str) -> Any:
    if not path:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError:
        data = b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):  # another version wrote it: start an empty one
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return config


def _write_timing_cache(config: Any, path: str) -> None:
    """Write the timing cache atomically. Errors are ignored: without the cache the next build is only slower."""
    with suppress(BundleError), written_whole(path) as partial:
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))


def _monitor(trt: Any, report: Callable[[str, int, int], None]) -> Any:
    """Return a progress monitor that reports one of TensorRT's nested phases: the one with the most steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (0, max(num_steps, 1))
            self.report_longest()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                total = self.phases[phase_name][1]
                self.phases[phase_name] = (min(step + 1, total), total)
                self.report_longest()
            return True  # True continues the build; to stop it, the parent kills this process

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def report_longest(self) -> None:
            name = max(self.phases, key=lambda phase: self.phases[phase][1])
            report(name, *self.phases[name])

    return Monitor()


def main(directory: str) -> int:
    """Read job.json and model.onnx of a directory, write model.plan there; print reports as lines of JSON."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # sends the prints of libraries to standard error, so that they do not mix with the reports

    def send(**report: Any) -> None:
        print(json.dumps(report), file=reports, flush=True)

    given = json.loads((Path(directory) / "job.json").read_bytes())
    given |= {"profiles": tuple(given["profiles"]), "gpus": tuple(given["gpus"])}
    onnx = (Path(directory) / "model.onnx").read_bytes()
    try:
        plan = build(onnx, BuildJob(**given), lambda phase, done, total: send(phase=phase, done=done, total=total))
        (Path(directory) / "model.plan").write_bytes(plan)
    except MemoryError:
        send(error="OutOfMemoryError", message="not enough memory to build it")
        return 1
    except VaeError as error:
        send(error=type(error).__name__, message=str(error))
        return 1
    except OSError as error:
        send(error="VaeError", message=_not_written(error))
        return 1
    return 0


def _not_written(error: OSError) -> str:
    return f"{error.strerror or error} in {tempfile.gettempdir()}, where it is built; $TMPDIR names another place"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
