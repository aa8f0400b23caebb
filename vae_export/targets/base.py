"""The contract of a target: how the graphs of a bundle are written for one runtime, and checked where they were made.

A target is one class in one module, and one line in `vae_export.targets`. `export_bundle` calls its methods in the
order in which they stand here, and knows nothing else about it.
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
from vae_export.options import ExportOptions
from vae_export.rewrites.form import CONVOLUTIONS, LAST_BLOCKS, NORMS, UPSAMPLES, Form

if TYPE_CHECKING:
    from runtimes.progress import Progress
    from runtimes.tensorrt.profiles import Profile
    from vae_export.bundle import BundleWriter
    from vae_export.families.base import ReferenceVae


@dataclass(frozen=True)
class Export:
    """An export at work: what a target is given to write.

    `options` are complete: precision and forms are chosen. `exact` is `model`, rescaled where the precision needs it.
    `cases` are inputs with the outputs of the reference; empty where nothing is to be validated.
    """

    model: ReferenceVae
    options: ExportOptions
    exact: ReferenceVae
    cases: Sequence[Case]
    progress: Progress
    #: what a target computes once and needs for both graphs
    memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def precision(self) -> str:
        assert self.options.precision is not None
        return self.options.precision

    def form(self, graph: str) -> Form:
        assert self.options.forms is not None
        return self.options.forms[graph]


class Written(NamedTuple):
    """A graph as it was written: its file, input and output, and what the manifest is to say of how it was made."""

    spec: GraphSpec
    records: tuple[Mapping[str, Any], ...] = ()


class FormChoices(NamedTuple):
    """The alternatives that `tune` times for one graph."""

    upsamples: tuple[str, ...] = UPSAMPLES
    norms: tuple[str, ...] = NORMS
    last_blocks: tuple[str, ...] = LAST_BLOCKS
    convolutions: tuple[str, ...] = CONVOLUTIONS


class Target(ABC):
    """How bundles of one kind are written."""

    name: ClassVar[str]
    graph_file: ClassVar[str]  #: the file that `write` is given, in the folder of each graph
    forms: ClassVar[Mapping[str, Form]]  #: precision -> the form of its graphs, where `forms=` says nothing else
    default_precision: ClassVar[str] = "fp32"
    io_precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    ios: ClassVar[tuple[str, ...]] = ("float", "uint8")
    rescales: ClassVar[bool] = True  #: whether half precision needs rescaled activations
    tileable: ClassVar[bool] = False  #: whether its bundles can hold the steps of seamless tiling
    families: ClassVar[tuple[str, ...] | None] = None  #: the families that it can write; None: all
    takes_threads: ClassVar[bool] = True  #: whether its backend has a number of threads for `tune` to choose

    def check(self, model: ReferenceVae, options: ExportOptions) -> None:  # noqa: B027  # optional
        """Raise `ConfigError` for options that this target cannot serve, `BackendUnavailable` for a missing tool.

        Called before any work. What the attributes above exclude has been refused already.
        """

    def plan(self, profiles: Sequence[Profile] = (), gpus: Sequence[str] = ()) -> Engine | None:
        """What an engine is built for: None for targets without engines, which take any shape on any device.

        Raises `ConfigError` where `profiles` or `gpus` are given to such a target.
        """
        if profiles or gpus:
            raise ConfigError(f"profiles and GPUs are for TensorRT, and {self.name} bundles take any shape")
        return None

    def notes(self, model: ReferenceVae, options: ExportOptions) -> list[str]:
        """Return lines that a user should read before the export starts."""
        return []

    @abstractmethod
    def write(self, export: Export, graph: Graph, path: Path) -> Written:
        """Write `graph`, "encoder" or "decoder", to `path` and any files beside it; the spec's `file` is its name."""

    def write_steps(self, export: Export, divided: ReferenceVae, directory: Path) -> Mapping[str, tuple[Step, ...]]:
        """Write both graphs cut into steps, for seamless tiling; called for targets that are `tileable` alone.

        `divided` is the model with rescaled activations: what lies between two steps is kept in fp16.
        """
        raise NotImplementedError

    def finish(self, export: Export, writer: BundleWriter) -> None:  # noqa: B027  # optional
        """Write what belongs to both graphs into `writer.directory`."""

    def reason_not_run(self, precision: str) -> str | None:
        """Why a bundle cannot be run on this machine, as the manifest is to say it; None where it can."""
        return None

    def stand_ins(self, bundle: Bundle) -> Iterator[Validator]:
        """What computes the same graphs where the bundle itself may not run; compared before the bundle is."""
        yield from ()

    def validators(self, bundle: Bundle, device: str | None = None) -> Iterator[Validator]:
        """What computes the graphs of a bundle, one after the other, to be compared with the reference.

        Shared by `export_bundle` and `validate_bundle`: the opened bundle, and its steps where it is tileable.
        """
        yield from bundle_validators(bundle, device)

    def tool_versions(self, options: ExportOptions) -> Mapping[str, str]:
        """Name and version of the tools that wrote the graphs, beside Python, PyTorch and onnx."""
        return {}

    # For `tune` -----------------------------------------------------------------------------------------------------

    def plan_for_size(self, height: int, width: int, factor: int) -> Engine | None:
        """What an engine is built for that is timed at one size in pixels; None for targets without engines."""
        return None

    def with_common_sizes(self, engine: Engine | None, height: int, width: int) -> Engine | None:
        """The engine of the tuned bundle, which also takes the sizes that `plan` has by default."""
        return engine

    def choices(self, graph: Graph, precision: str) -> FormChoices:
        """The forms of a graph that are worth timing. `ConfigError` where there is one form alone."""
        convolutions = CONVOLUTIONS if precision == "fp32" else ("direct",)  # it loses digits in half precision
        if graph == "encoder":
            form = self.forms[precision]
            return FormChoices((form.upsample,), NORMS, (form.last_block,), convolutions)
        return FormChoices(convolutions=convolutions)
