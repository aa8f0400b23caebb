"""The interface of a target, which writes the graphs of a bundle for one runtime and validates them.

A target is one class in one module and one line in `vae_export.targets`. `export_bundle` uses only the members of
`Target`, and calls the methods in the order of their definition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from runtimes.bundle import Bundle
from runtimes.errors import ConfigError
from runtimes.manifest import Engine, GraphSpec, Step
from runtimes.names import Graph
from vae_export.comparison import Case, Validator, bundle_validators
from vae_export.normalised import as_written
from vae_export.options import ExportOptions
from vae_export.rewrites.form import CONVOLUTIONS, LAST_BLOCKS, NORMS, UPSAMPLES, Form

if TYPE_CHECKING:
    from runtimes.progress import Progress
    from runtimes.tensorrt.profiles import Profile
    from vae_export.bundle import BundleWriter
    from vae_export.families.base import ReferenceVae


@dataclass(frozen=True)
class Export:
    """The state of a running export, from which a target writes its graphs.

    `options` are complete: precision and forms are set. `exact` is `model`, rescaled if the precision needs it. `cases`
    are inputs with the outputs of the reference; empty if the export is not validated.
    """

    model: ReferenceVae
    options: ExportOptions
    exact: ReferenceVae
    cases: Sequence[Case]
    progress: Progress
    #: values that a target computes once and uses for both graphs
    memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def precision(self) -> str:
        """The precision of the bundle."""
        assert self.options.precision is not None
        return self.options.precision

    def written(self, model: ReferenceVae) -> ReferenceVae:
        """Return a model as the graphs compute it, with the latents of the options: `as_written`."""
        return as_written(model, self.options.latents)

    def form(self, graph: str) -> Form:
        """Return the form in which a graph is written."""
        assert self.options.forms is not None
        return self.options.forms[graph]


class Written(NamedTuple):
    """A written graph: its file, input and output, and manifest records of how it was made."""

    spec: GraphSpec
    records: tuple[Mapping[str, Any], ...] = ()


class FormChoices(NamedTuple):
    """The alternatives that `tune` times for one graph."""

    upsamples: tuple[str, ...] = UPSAMPLES
    norms: tuple[str, ...] = NORMS
    last_blocks: tuple[str, ...] = LAST_BLOCKS
    convolutions: tuple[str, ...] = CONVOLUTIONS


class Target(ABC):
    """The writer of bundles for one runtime."""

    name: ClassVar[str]
    graph_file: ClassVar[str]  #: name of the file that `write` creates in the folder of each graph
    forms: ClassVar[Mapping[str, Form]]  #: precision -> default form of both graphs
    default_precision: ClassVar[str] = "fp32"
    io_precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    ios: ClassVar[tuple[str, ...]] = ("float", "uint8")
    rescales: ClassVar[bool] = True  #: whether half precision needs rescaled activations
    tileable: ClassVar[bool] = False  #: whether its bundles can contain the steps of seamless tiling
    families: ClassVar[tuple[str, ...] | None] = None  #: supported families; None means all
    takes_threads: ClassVar[bool] = True  #: whether its backend has a thread count that `tune` can choose

    def check(self, model: ReferenceVae, options: ExportOptions) -> None:  # noqa: B027  # optional
        """Raise `ConfigError` for unsupported options, and `BackendUnavailable` for a missing tool.

        Called before any work, and after options that the attributes above exclude have been rejected.
        """

    def plan(self, profiles: Sequence[Profile] = (), gpus: Sequence[str] = ()) -> Engine | None:
        """Return the description of the engines to build, or None for a target without engines.

        Bundles without engines take any shape on any device. Raises `ConfigError` if `profiles` or `gpus` are given to
        such a target.
        """
        if profiles or gpus:
            raise ConfigError(f"profiles and GPUs are for TensorRT, and {self.name} bundles take any shape")
        return None

    def notes(self, model: ReferenceVae, options: ExportOptions) -> list[str]:
        """Return lines that a user should read before the export starts."""
        return []

    @abstractmethod
    def write(self, export: Export, graph: Graph, path: Path) -> Written:
        """Write `graph` ("encoder" or "decoder") to `path`, and any further files into the same folder.

        The `file` of the returned spec is the file name, without the folder.
        """

    def write_steps(self, export: Export, divided: ReferenceVae, directory: Path) -> Mapping[str, tuple[Step, ...]]:
        """Write both graphs, cut into steps for seamless tiling. Called only if the target is `tileable`.

        `divided` is the model with rescaled activations, because maps between steps are stored in fp16.
        """
        raise NotImplementedError

    def finish(self, export: Export, writer: BundleWriter) -> None:  # noqa: B027  # optional
        """Write files that both graphs share into `writer.directory`."""

    def reason_not_run(self, precision: str) -> str | None:
        """Return why a bundle cannot run on this machine, for the manifest, or None if it can."""
        return None

    def stand_ins(self, bundle: Bundle) -> Iterator[Validator]:
        """Yield validators that compute the same graphs on machines where the bundle itself may not run.

        They are compared with the reference before the bundle is.
        """
        yield from ()

    def validators(self, bundle: Bundle, device: str | None = None) -> Iterator[Validator]:
        """Yield the validators that compute the graphs of a bundle, to be compared with the reference.

        These are the open bundle and, if it is tileable, its steps. `export_bundle` and `validate_bundle` use them.
        """
        yield from bundle_validators(bundle, device)

    def tool_versions(self, options: ExportOptions) -> Mapping[str, str]:
        """Return {name: version} of the tools that wrote the graphs, in addition to Python, PyTorch and onnx."""
        return {}

    # For `tune` -----------------------------------------------------------------------------------------------------

    def plan_for_size(self, height: int, width: int, factor: int) -> Engine | None:
        """Return the description of an engine for a single size in pixels, or None for a target without engines."""
        return None

    def with_common_sizes(self, engine: Engine | None, height: int, width: int) -> Engine | None:
        """Return the engine of the tuned bundle, which also takes the default sizes of `plan`."""
        return engine

    def choices(self, graph: Graph, precision: str) -> FormChoices:
        """Return the alternatives of a graph that are worth timing. Raises `ConfigError` if there is only one form."""
        convolutions = (
            CONVOLUTIONS if precision == "fp32" else ("direct",)
        )  # Winograd is less accurate in half precision
        if graph == "encoder":
            form = self.forms[precision]
            return FormChoices((form.upsample,), NORMS, (form.last_block,), convolutions)
        return FormChoices(convolutions=convolutions)
