"""The schema of manifest.json, which describes a bundle: parsing, checking, writing. Standard library only.

A manifest may come from anyone: every field is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from runtimes.config import OtherConfig, VaeConfig
from runtimes.errors import CompatibilityError, ConfigError, IntegrityError
from runtimes.latent_space import LatentSpace
from runtimes.names import GRAPHS, PRECISIONS, Graph
from runtimes.tensorrt.profiles import Profile

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
FILE_LIMIT = 4 << 30  #: bytes; far above the size of any VAE
MAX_DEPTH = 32  #: levels of nesting in a manifest; ours have about 6
MAX_CHANNELS = 1 << 16  #: of a step of seamless tiling
REQUIRED_KEYS = (
    *("version", "target", "precision", "config", "source"),
    *("graphs", "rewrites", "tools", "validation", "files"),
)
OPTIONAL_KEYS = ("family", "latent_space", "latents", "engine", "tileable", "halo")
LATENTS = ("raw", "normalised")  #: what the graphs give and take
DEFAULT_FAMILY = "AutoencoderKL"  #: family of manifests that were written before they named one
DTYPES = ("float32", "float16", "bfloat16", "uint8")
#: kind of a step of seamless tiling -> its letter in STEP_ORDER, a regular expression for the order of steps
STEP_KINDS = {"whole": "w", "in": "i", "conv1": "a", "conv2": "b", "up": "u", "down": "d", "out": "o"}
STEP_ORDER = {"encoder": re.compile(r"i((ab)|d)*w"), "decoder": re.compile(r"w((ab)|u)*o")}

#: the last key of a manifest: the sha256 of its content. It detects accidents, such as a changed digit in a scaling
#: factor. It does not detect manipulation: whoever edits a manifest on purpose can update this key as well.
SEAL = "manifest_sha256"

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,3}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_GPU = re.compile(r"sm\d{2,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of a file of the bundle."""

    size: int  #: bytes
    sha256: str  #: 64 hex digits


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. A dimension is a number, or a name if it is dynamic."""

    name: str
    dtype: str  #: NumPy's name: float32, float16, ...; uint8 for pixels
    shape: tuple[int | str, ...]

    @property
    def axes(self) -> tuple[int, int, int]:
        """The axes of channels, height and width. Pixels (uint8) have their channels last, as images are stored."""
        return (3, 1, 2) if self.dtype == "uint8" else (1, 2, 3)

    @property
    def channels(self) -> int:
        return int(self.shape[self.axes[0]])


@dataclass(frozen=True)
class GraphSpec:
    """A graph of the bundle: its file, input and output."""

    file: str
    input: TensorSpec
    output: TensorSpec


@dataclass(frozen=True)
class Step:
    """A part of a graph that seamless tiling runs separately, see `runtimes.tiling.seamless`."""

    kind: str  #: one of STEP_KINDS
    file: str
    channels: int  #: channels of its output


@dataclass(frozen=True)
class Engine:
    """The TensorRT version, GPUs and profiles that plans were built for; they run nowhere else."""

    flavour: str  #: tensorrt or tensorrt-rtx
    version: str  #: of the flavour
    gpus: tuple[str, ...]  #: compute capabilities, such as sm89; empty for all GPUs that TensorRT-RTX supports
    system: str  #: operating system and processor, such as linux-x86_64
    profiles: tuple[Profile, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "gpus": list(self.gpus), "profiles": [profile.to_dict() for profile in self.profiles]}

    @classmethod
    def from_dict(cls, value: Any, factor: int) -> Engine:
        data = _exactly(_object(value, "engine"), "engine", ("flavour", "version", "gpus", "system", "profiles"))
        gpus, profiles = data["gpus"], data["profiles"]
        if not isinstance(gpus, list) or not all(isinstance(gpu, str) and _GPU.fullmatch(gpu) for gpu in gpus):
            raise IntegrityError(f"{MANIFEST_FILE}: gpus {gpus!r} of the engine is not a list such as ['sm89']")
        if not isinstance(profiles, list) or not profiles:
            raise IntegrityError(f"{MANIFEST_FILE}: profiles of the engine is not a list with one or more")
        try:
            parsed = tuple(Profile.from_dict(_object(profile, "a profile"), factor) for profile in profiles)
        except ConfigError as error:
            raise IntegrityError(f"{MANIFEST_FILE}: {error}") from None
        flavour, version, system = (_text(data[name], name) for name in ("flavour", "version", "system"))
        return cls(_name(flavour, "flavour"), version, tuple(gpus), system, parsed)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `source`, `rewrites`, `tools` and `validation` are records for people and tools; runtimes do not depend on them.
    """

    version: str  #: version of the vae-export that wrote it
    target: str
    precision: str
    config: VaeConfig | OtherConfig
    files: Mapping[str, FileEntry]
    graphs: Mapping[Graph, GraphSpec]
    latent_space: LatentSpace
    family: str = DEFAULT_FAMILY  #: diffusers' class name of the architecture
    source: Mapping[str, Any] = field(default_factory=dict)
    rewrites: tuple[Mapping[str, Any], ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    engine: Engine | None = None  #: of TensorRT bundles
    tileable: Mapping[str, tuple[Step, ...]] | None = None  #: graph -> its steps, in bundles for seamless tiling
    #: graph -> latents around a tile that its result depends on, for networks without norms and attention
    halo: Mapping[Graph, int] | None = None
    latents: str = "raw"  #: what the graphs give and take: one of LATENTS

    @property
    def graph_space(self) -> LatentSpace:
        """Shape of the latents that the graphs give and take, and whether the encoder gives a posterior."""
        return self.latent_space if self.latents == "raw" else self.latent_space.as_normalised

    def to_json(self) -> str:
        data = {
            "schema_version": SCHEMA_VERSION,
            "version": self.version,
            "target": self.target,
            "precision": self.precision,
            "family": self.family,
            "config": self.config.to_dict(),
            "latent_space": self.latent_space.to_dict(),
            **({} if self.latents == "raw" else {"latents": self.latents}),
            "source": dict(self.source),
            "graphs": {name: asdict(graph) for name, graph in self.graphs.items()},
            "rewrites": list(self.rewrites),
            "tools": dict(self.tools),
            **({} if self.engine is None else {"engine": self.engine.to_dict()}),
            **({} if self.tileable is None else {"tileable": _steps_to_dict(self.tileable)}),
            **({} if self.halo is None else {"halo": dict(self.halo)}),
            "validation": dict(self.validation),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        return json.dumps({**data, SEAL: seal(data)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Parse and check a manifest.

        Raises `IntegrityError` for a malformed manifest, `CompatibilityError` for another schema version.
        """
        data = _object(_parse_json(raw), "manifest")
        stored_seal, actual_seal = data.pop(SEAL, ...), seal(data)
        schema = data.pop("schema_version", None)
        if not _is_int(schema):
            raise IntegrityError(f"{MANIFEST_FILE}: schema_version is {schema!r}, not a number")
        if schema != SCHEMA_VERSION:
            raise CompatibilityError(
                f"the bundle has schema version {schema}, and this vae-export reads {SCHEMA_VERSION}; "
                + ("upgrade vae-export" if schema > SCHEMA_VERSION else "export the model again")
            )
        keys = (*REQUIRED_KEYS, *(key for key in OPTIONAL_KEYS if key in data))
        fields = _exactly(data, "manifest", keys)
        files = {_file_name(n): _file_entry(n, e) for n, e in _object(fields["files"], "files").items()}
        _reject_case_twins(files)
        graphs: dict[Graph, GraphSpec] = {}
        for name, graph in _object(fields["graphs"], "graphs").items():
            known = cast(Graph, _choice(name, "graph", GRAPHS))
            graphs[known] = _graph(known, graph, files)
        if set(graphs) != set(GRAPHS):
            raise IntegrityError(f"{MANIFEST_FILE}: graphs must be encoder and decoder, not {sorted(graphs)}")
        family = _name(fields.get("family", DEFAULT_FAMILY), "family")
        config, latent_space = _model(family, _object(fields["config"], "config"), fields.get("latent_space"))
        latents = _choice(fields.get("latents", "raw"), "latents", LATENTS)
        graph_space = latent_space if latents == "raw" else latent_space.as_normalised
        if not isinstance(fields["rewrites"], list):
            raise IntegrityError(f"{MANIFEST_FILE}: rewrites is not a list")
        if stored_seal not in (..., actual_seal):  # ...: the manifest was written before manifests had a seal
            raise IntegrityError(
                f"{MANIFEST_FILE} was changed: its {SEAL} is {actual_seal}, and it says {stored_seal!r}"
            )
        return cls(
            version=_text(fields["version"], "version"),
            target=_name(fields["target"], "target"),
            precision=_choice(fields["precision"], "precision", PRECISIONS),
            config=config,
            files=files,
            graphs=graphs,
            latent_space=latent_space,
            latents=latents,
            family=family,
            source=_object(fields["source"], "source"),
            rewrites=tuple(_object(rewrite, "rewrites") for rewrite in fields["rewrites"]),
            tools={name: _text(tool, "tools") for name, tool in _object(fields["tools"], "tools").items()},
            validation=_object(fields["validation"], "validation"),
            engine=Engine.from_dict(fields["engine"], graph_space.factor) if "engine" in fields else None,
            tileable=_steps(fields["tileable"], files) if "tileable" in fields else None,
            halo=_halo(fields["halo"]) if "halo" in fields else None,
        )


# Schema -----------------------------------------------------------------------------------------------------------


def seal(data: Mapping[str, Any]) -> str:
    """Return the sha256, 64 hex digits, of a manifest without its seal, as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse_json(raw: bytes) -> Any:
    def refuse_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is duplicated")
        return result

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse_constant(text)  # 1e999 parses as infinity

    try:
        value = json.loads(
            raw.decode("utf-8"),
            parse_float=finite,
            parse_constant=refuse_constant,
            object_pairs_hook=refuse_duplicates,
        )
        _check_depth(value, MAX_DEPTH)
        return value
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{MANIFEST_FILE} is not readable: {error}") from None


def _check_depth(value: Any, left: int) -> None:
    """Raise `ValueError` for nesting so deep that writing the manifest could fail although reading it succeeded."""
    if left == 0:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(child, left - 1)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IntegrityError(f"{MANIFEST_FILE}: {what} is not an object")
    return value


def _exactly(data: dict[str, Any], what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    missing, unknown = [k for k in keys if k not in data], [k for k in data if k not in keys]
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] if missing else []
        problems += (
            [f"has unknown {', '.join(map(repr, unknown[:5]))} (a later vae-export may know it)"] if unknown else []
        )
        raise IntegrityError(f"{MANIFEST_FILE}: {what} {' and '.join(problems)}")
    return data


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise IntegrityError(f"{MANIFEST_FILE}: {what} is {value!r}, not a text")
    return value


def _choice(value: Any, what: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise IntegrityError(f"{MANIFEST_FILE}: {what} is {value!r}; known are {', '.join(known)}")
    return str(value)


def _name(value: Any, what: str) -> str:
    """Check the syntax of the name of a target, family or flavour; its user checks whether the name is known."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise IntegrityError(f"{MANIFEST_FILE}: {what} is {value!r}, not a name")
    return value


def _halo(value: Any) -> Mapping[Graph, int]:
    data = _exactly(_object(value, "halo"), "halo", GRAPHS)
    for name, latents in data.items():
        if not _is_int(latents) or not 0 <= latents <= 65536:
            raise IntegrityError(f"{MANIFEST_FILE}: halo of the {name} is {latents!r}, not a number of latents")
    return cast(Mapping[Graph, int], data)


def _model(family: str, config: dict[str, Any], latent_space: Any) -> tuple[VaeConfig | OtherConfig, LatentSpace]:
    """Parse config and latent space. In a manifest without a latent space, that of the AutoencoderKL config counts."""
    try:
        if family == DEFAULT_FAMILY:
            known = VaeConfig.from_dict(config, strict=True)
            if latent_space is not None and LatentSpace.from_dict(_object(latent_space, "latent_space")) != (
                known.latent_space
            ):
                raise ConfigError("latent_space and config contradict each other")
            return known, known.latent_space
        if latent_space is None:
            raise ConfigError(f"there is no latent_space, which bundles of the family {family} have")
        return OtherConfig(config), LatentSpace.from_dict(_object(latent_space, "latent_space"))
    except ConfigError as error:
        raise IntegrityError(f"{MANIFEST_FILE}: {error}") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _file_name(name: str) -> str:
    r"""Check that a name is a relative path of plain names; rejects `..`, `/etc`, `C:` and `a\b`."""
    if not _FILE_NAME.fullmatch(name) or ".." in name or len(name) > 200 or name.lower() == MANIFEST_FILE:
        raise IntegrityError(f"{MANIFEST_FILE}: {name!r} is not the name of a file inside the bundle")
    return name


def _reject_case_twins(files: Mapping[str, Any]) -> None:
    """Reject two names that differ only in case: on some systems they are one file, with two hashes."""
    if len({name.lower() for name in files}) != len(files):
        raise IntegrityError(f"{MANIFEST_FILE}: two file names differ in case alone")


def _file_entry(name: str, value: Any) -> FileEntry:
    entry = _exactly(_object(value, name), name, ("size", "sha256"))
    if not _is_int(entry["size"]) or not 0 <= entry["size"] <= FILE_LIMIT:
        raise IntegrityError(f"{MANIFEST_FILE}: size of {name} is {entry['size']!r}; it may be 0 to {FILE_LIMIT}")
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        raise IntegrityError(f"{MANIFEST_FILE}: sha256 of {name} is not 64 hex digits")
    return FileEntry(entry["size"], entry["sha256"])


def _graph(name: str, value: Any, files: Mapping[str, FileEntry]) -> GraphSpec:
    graph = _exactly(_object(value, name), name, ("file", "input", "output"))
    if _text(graph["file"], "file") not in files:
        raise IntegrityError(f"{MANIFEST_FILE}: the {name} graph {graph['file']!r} is not among the listed files")
    return GraphSpec(graph["file"], _tensor(name, graph["input"]), _tensor(name, graph["output"]))


def _steps(value: Any, files: Mapping[str, FileEntry]) -> dict[str, tuple[Step, ...]]:
    parsed_steps = {}
    for graph, steps in _exactly(_object(value, "tileable"), "tileable", GRAPHS).items():
        if not isinstance(steps, list):
            raise IntegrityError(f"{MANIFEST_FILE}: the tileable {graph} is not a list of steps")
        parsed = []
        for step in steps:
            step = _exactly(_object(step, "a step"), "a step", ("kind", "file", "channels"))
            if _text(step["file"], "file") not in files:
                raise IntegrityError(f"{MANIFEST_FILE}: the step {step['file']!r} is not among the listed files")
            if not _is_int(step["channels"]) or not 0 < step["channels"] <= MAX_CHANNELS:
                raise IntegrityError(f"{MANIFEST_FILE}: a step has {step['channels']!r} channels")
            parsed.append(Step(_choice(step["kind"], "kind", tuple(STEP_KINDS)), step["file"], step["channels"]))
        if not STEP_ORDER[graph].fullmatch("".join(STEP_KINDS[step.kind] for step in parsed)):
            raise IntegrityError(f"{MANIFEST_FILE}: the steps of the tileable {graph} are not in an order that runs")
        parsed_steps[graph] = tuple(parsed)
    return parsed_steps


def _steps_to_dict(steps: Mapping[str, tuple[Step, ...]]) -> dict[str, Any]:
    return {graph: [asdict(step) for step in of_graph] for graph, of_graph in steps.items()}


def _tensor(name: str, value: Any) -> TensorSpec:
    tensor = _exactly(_object(value, name), f"tensor of {name}", ("name", "dtype", "shape"))
    shape = tensor["shape"]
    if not isinstance(shape, list) or not all(isinstance(d, str) or (_is_int(d) and d > 0) for d in shape):
        raise IntegrityError(f"{MANIFEST_FILE}: shape {shape!r} of {name} is not a list of sizes and names")
    if len(shape) != 4:
        raise IntegrityError(f"{MANIFEST_FILE}: shape {shape!r} of {name} does not have the 4 dimensions of images")
    return TensorSpec(_text(tensor["name"], "name"), _choice(tensor["dtype"], "dtype", DTYPES), tuple(shape))
