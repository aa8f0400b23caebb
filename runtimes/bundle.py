"""A bundle on disk: its manifest, and reading its files without trusting them. Standard library only.

A bundle may come from anyone. Before a native parser sees a byte of it, the manifest's schema has been checked, every
path has been opened without following a link out of the bundle (or out of a directory that the user named), and the
bytes that will be parsed have been hashed: those very bytes, not the file, which could change in between.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import stat
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runtimes.config import VaeConfig
from runtimes.errors import BundleError, CompatibilityError, ConfigError, IntegrityError
from runtimes.tensorrt.profiles import Profile

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
MANIFEST_LIMIT = 4 << 20  #: bytes; a manifest with long validation tables has some 50 KB
FILE_LIMIT = 4 << 30  #: bytes; no VAE comes near
SMALL_FILE = 1 << 20  #: bytes; configs have some 2 KB, and hashing so much takes about a millisecond
LARGE_FILE = 256 << 20  #: bytes; the graphs of Stable Diffusion's size in fp32 have up to 200 MB
DEEPEST = 32  #: levels of nesting in a manifest; ours have some 6
MOST_CHANNELS = 1 << 16
TARGETS = ("onnx", "tensorrt", "tensorrt-rtx", "openvino", "flax")
ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
MANIFEST_KEYS = (
    *("version", "target", "precision", "config", "source"),
    *("graphs", "rewrites", "tools", "validation", "files"),
)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
GRAPHS = ("encoder", "decoder")
DTYPES = ("float32", "float16", "bfloat16", "uint8")
#: the kinds of steps of seamless tiling, and the order in which they come: a letter for each
STEP_KINDS = {"whole": "w", "in": "i", "conv1": "a", "conv2": "b", "up": "u", "down": "d", "out": "o"}
STEP_ORDER = {"encoder": re.compile(r"i((ab)|d)*w"), "decoder": re.compile(r"w((ab)|u)*o")}

#: a manifest's last key: sha256 of all that it says. It finds accidents, such as another digit in a scaling factor;
#: who changes a manifest on purpose can change it, too.
SEAL = "manifest_sha256"

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,3}")
_GPU = re.compile(r"sm\d{2,3}")
_HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    size: int  #: bytes
    sha256: str  #: 64 hex digits


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. Dimensions are numbers, or names where they are free."""

    name: str
    dtype: str  #: as NumPy calls it: float32, float16, ...; uint8 for pixels
    shape: tuple[int | str, ...]

    @property
    def axes(self) -> tuple[int, int, int]:
        """Where channels, height and width are: pixels have their channels last, as images are stored."""
        return (3, 1, 2) if self.dtype == "uint8" else (1, 2, 3)


@dataclass(frozen=True)
class GraphSpec:
    """A graph of the bundle: the file that holds it, its input and its output."""

    file: str
    input: TensorSpec
    output: TensorSpec


@dataclass(frozen=True)
class Step:
    """A part of a graph that seamless tiling runs by itself: see `runtimes.tiling.seamless`."""

    kind: str  #: one of STEP_KINDS
    file: str
    channels: int  #: of what it gives


@dataclass(frozen=True)
class Engine:
    """What TensorRT plans were built with and for: they run nowhere else."""

    flavour: str  #: tensorrt or tensorrt-rtx
    version: str  #: of it
    gpus: tuple[str, ...]  #: compute capabilities, as in sm89; empty for all that TensorRT-RTX takes
    system: str  #: as in linux-x86_64
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
        return cls(_choice(flavour, "flavour", ENGINE_TARGETS), version, tuple(gpus), system, parsed)


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. `source`, `rewrites`, `tools` and `validation` are records, for people and tools."""

    version: str  #: of the vae-export that wrote it
    target: str
    precision: str
    config: VaeConfig
    files: Mapping[str, FileEntry]
    graphs: Mapping[str, GraphSpec]
    source: Mapping[str, Any] = field(default_factory=dict)
    rewrites: tuple[Mapping[str, Any], ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    engine: Engine | None = None  #: of TensorRT bundles
    tileable: Mapping[str, tuple[Step, ...]] | None = None  #: graph -> its steps, in bundles for seamless tiling

    def to_json(self) -> str:
        data = {
            "schema_version": SCHEMA_VERSION,
            "version": self.version,
            "target": self.target,
            "precision": self.precision,
            "config": self.config.to_dict(),
            "source": dict(self.source),
            "graphs": {name: asdict(graph) for name, graph in self.graphs.items()},
            "rewrites": list(self.rewrites),
            "tools": dict(self.tools),
            **({} if self.engine is None else {"engine": self.engine.to_dict()}),
            **({} if self.tileable is None else {"tileable": _steps_to_dict(self.tileable)}),
            "validation": dict(self.validation),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        return json.dumps({**data, SEAL: seal(data)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Parse and check. `IntegrityError` for anything malformed, `CompatibilityError` for another schema."""
        data = _object(_parse_json(raw), "manifest")
        sealed, found = data.pop(SEAL, ...), seal(data)
        schema = data.pop("schema_version", None)
        if not _is_int(schema):
            raise IntegrityError(f"{MANIFEST_FILE}: schema_version is {schema!r}, not a number")
        if schema != SCHEMA_VERSION:
            raise CompatibilityError(
                f"the bundle has schema version {schema}, and this vae-export reads {SCHEMA_VERSION}; "
                + ("upgrade vae-export" if schema > SCHEMA_VERSION else "export the model again")
            )
        keys = MANIFEST_KEYS + (("engine",) if data.get("target") in ENGINE_TARGETS else ())
        keys += ("tileable",) if "tileable" in data else ()
        fields = _exactly(data, "manifest", keys)
        files = {_file_name(n): _file_entry(n, e) for n, e in _object(fields["files"], "files").items()}
        _reject_case_twins(files)
        graphs = {}
        for name, graph in _object(fields["graphs"], "graphs").items():
            graphs[name] = _graph(_choice(name, "graph", GRAPHS), graph, files)
        if set(graphs) != set(GRAPHS):
            raise IntegrityError(f"{MANIFEST_FILE}: graphs must be encoder and decoder, not {sorted(graphs)}")
        try:
            config = VaeConfig.from_dict(_object(fields["config"], "config"))
        except ConfigError as error:
            raise IntegrityError(f"{MANIFEST_FILE}: {error}") from None
        if not isinstance(fields["rewrites"], list):
            raise IntegrityError(f"{MANIFEST_FILE}: rewrites is not a list")
        if sealed not in (..., found):  # ... where there is none: written before manifests had it
            raise IntegrityError(f"{MANIFEST_FILE} was changed: its {SEAL} is {found}, and it says {sealed!r}")
        return cls(
            version=_text(fields["version"], "version"),
            target=_choice(fields["target"], "target", TARGETS),
            precision=_choice(fields["precision"], "precision", PRECISIONS),
            config=config,
            files=files,
            graphs=graphs,
            source=_object(fields["source"], "source"),
            rewrites=tuple(_object(rewrite, "rewrites") for rewrite in fields["rewrites"]),
            tools={name: _text(tool, "tools") for name, tool in _object(fields["tools"], "tools").items()},
            validation=_object(fields["validation"], "validation"),
            engine=Engine.from_dict(fields["engine"], config.downscale) if "engine" in fields else None,
            tileable=_steps(fields["tileable"], files) if "tileable" in fields else None,
        )


class Bundle:
    """A bundle directory, opened and its manifest checked; `read` gives a file's bytes after checking them.

    Files that are links are refused, unless `allow_links` names a directory inside which links may lead: that of a
    Kubernetes volume, for example. For a snapshot in a cache of the Hugging Face Hub, whose files are links to its
    blobs, it is the repository's directory in that cache unless another is given.

    Raises `BundleError` where there is no bundle, `IntegrityError` where it is not what it says, `CompatibilityError`
    for a manifest of another schema.
    """

    def __init__(self, path: str | Path, *, allow_links: str | Path | None = None) -> None:
        self.path = Path(path)
        self.directory = Path(os.path.abspath(path))  #: the same, also after the working directory has changed
        if not self.path.is_dir():
            raise BundleError(f"{path} is not a directory" if self.path.exists() else f"{path} does not exist")
        if allow_links is not None and not Path(allow_links).is_dir():
            raise BundleError(f"allow_links names {allow_links}, which is not a directory")
        given = allow_links or _hub_repository(self.directory)
        self.allow_links = None if given is None else Path(os.path.abspath(given))
        self.manifest = Manifest.from_json(self._read_manifest())

    def _read_manifest(self) -> bytes:
        for _ in range(3):  # an export may replace the directory between opening it and its file
            with suppress(FileNotFoundError):
                descriptor = self._open(MANIFEST_FILE)
                try:
                    return _read_open_file(descriptor, MANIFEST_FILE, limit=MANIFEST_LIMIT)
                finally:
                    os.close(descriptor)
        raise BundleError(f"{self.path} has no {MANIFEST_FILE}: not a bundle of vae-export")

    def _open(self, name: str) -> int:
        """A descriptor of a regular file of the bundle. `FileNotFoundError` where there is none."""
        if self.allow_links is None:
            return _open_regular_file(self.directory, name)
        # Where the links lead is found first; that path is then opened without following any link.
        root, target = (os.path.realpath(path) for path in (self.allow_links, self.directory / name))
        if not Path(target).is_relative_to(root):
            raise IntegrityError(f"{name} is a link to {target}, outside of {root}, the directory where links may lead")
        return _open_regular_file(Path(root), os.path.relpath(target, root))

    def read(self, name: str) -> bytes:
        """The bytes of a file that the manifest lists, checked: parse these, not the file."""
        with self.hold(name) as file:
            return file.read()

    def hold(self, name: str) -> HeldFile:
        """A file that the manifest lists, opened, for what is to be read again later."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise IntegrityError(f"{name} is not listed in the manifest of {self.path}")
        try:
            return HeldFile(self._open(name), name, entry)
        except FileNotFoundError:
            raise IntegrityError(f"{name} is missing from {self.path}") from None

    def seen_as(self, **changes: Any) -> Bundle:
        """The same files, as another manifest describes them: `changes` are fields of the manifest."""
        other = copy.copy(self)
        other.manifest = replace(self.manifest, **changes)
        return other

    def check_small_files(self) -> None:
        """Check the listed files of at most SMALL_FILE bytes: configs, which no graph's parser would read."""
        for name, entry in self.manifest.files.items():
            if entry.size <= SMALL_FILE:
                self.read(name)

    def verify(self) -> None:
        """Check every listed file."""
        for name in self.manifest.files:
            self.read(name)


def _hub_repository(directory: Path) -> Path | None:
    """REPOSITORY for a directory in REPOSITORY/snapshots/COMMIT of a Hub cache, whose files are links to its blobs."""
    real = Path(os.path.realpath(directory))
    for folder in (real, *real.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and _HUB_REPOSITORY.match(repository.name):
            return repository if (repository / "blobs").is_dir() else None
    return None


# Files ------------------------------------------------------------------------------------------------------------


class HeldFile:
    """A file of a bundle, open: each `read` gives its bytes, checked. It stays whole where the bundle is replaced."""

    def __init__(self, descriptor: int, name: str, entry: FileEntry) -> None:
        self._descriptor, self._name, self._entry = descriptor, name, entry
        self._finish = weakref.finalize(self, os.close, descriptor)

    def read(self) -> bytes:
        """`IntegrityError` where they are not those that the manifest lists. For one thread at a time."""
        return _read_open_file(self._descriptor, self._name, limit=self._entry.size, entry=self._entry)

    def close(self) -> None:
        self._finish()

    def __enter__(self) -> HeldFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_regular_file(root: Path, name: str) -> int:
    """A descriptor of `root/name`, following no link below `root`."""
    *folders, last = name.split("/")
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = _open_inside(directory, folder, os.O_RDONLY | os.O_DIRECTORY, name)
            os.close(directory)
            directory = inner
        # Non-blocking: opening a FIFO must not wait for a writer.
        descriptor = _open_inside(directory, last, os.O_RDONLY | os.O_NONBLOCK, name)
    finally:
        os.close(directory)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file"
    elif status.st_nlink > 1:  # 0 where an export has just replaced the bundle: the open file stays whole
        problem = "is a hard link: a bundle's files belong to it alone; copy it with cp -r"
    else:
        return descriptor
    os.close(descriptor)
    raise IntegrityError(f"{name} {problem}")


def _read_open_file(descriptor: int, name: str, *, limit: int, entry: FileEntry | None = None) -> bytes:
    """All of an open file, from its start: at most `limit` bytes, and those of `entry` where it is given.

    A large file is hashed once more before it is read: one that is not what the manifest says takes no memory.
    """
    size = os.fstat(descriptor).st_size
    if size > limit or (entry is not None and size != entry.size):
        rule = "and the most is" if entry is None else "and the manifest says"
        raise IntegrityError(f"{name} has {size} bytes, {rule} {limit}")
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        if entry is not None and entry.size > LARGE_FILE:
            _check_digest(name, hashlib.file_digest(file, "sha256").hexdigest(), entry)
            file.seek(0)
        data = file.read(size)
        if len(data) != size or file.read(1):
            raise IntegrityError(f"{name} changed while it was read")
    if entry is not None:
        _check_digest(name, hashlib.sha256(data).hexdigest(), entry)
    return data


def _check_digest(name: str, found: str, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise IntegrityError(f"{name} was changed: sha256 is {found}, and the manifest says {entry.sha256}")


def _open_inside(directory: int, part: str, flags: int, name: str) -> int:
    try:
        return os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        # ELOOP or ENOTDIR: a link, or a file where a directory belongs.
        raise IntegrityError(
            f"{name} cannot be opened as a plain file of the bundle: {_link_advice(directory, part) or error.strerror}"
        ) from None


def _link_advice(directory: int, part: str) -> str | None:
    """What to do about a link; None for what is not one."""
    try:
        if not stat.S_ISLNK(os.stat(part, dir_fd=directory, follow_symlinks=False).st_mode):
            return None
    except OSError:
        return None
    return (
        f"{part} is a symbolic link. If you trust where it leads, as on a Kubernetes volume, allow links inside of a "
        "directory with open_vae(..., allow_links=DIRECTORY), or copy the bundle with cp -rL"
    )


# Schema -----------------------------------------------------------------------------------------------------------


def seal(data: Mapping[str, Any]) -> str:
    """sha256, 64 hex digits, of what a manifest says, but for its seal: of its JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse_json(raw: bytes) -> Any:
    def refuse_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice")
        return result

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse_constant(text)  # 1e999: infinity by another name

    try:
        value = json.loads(
            raw.decode("utf-8"),
            parse_float=finite,
            parse_constant=refuse_constant,
            object_pairs_hook=refuse_duplicates,
        )
        _check_depth(value, DEEPEST)
        return value
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{MANIFEST_FILE} is not readable: {error}") from None


def _check_depth(value: Any, left: int) -> None:
    """`ValueError` for what is nested so deeply that writing it again could fail where reading did not."""
    if left == 0:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(child, left - 1)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IntegrityError(f"{MANIFEST_FILE}: {what} is not an object")
    return value


def _exactly(data: dict[str, Any], what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    missing, unknown = [k for k in keys if k not in data], [k for k in data if k not in keys]
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"has unknown {', '.join(map(repr, unknown[:5]))} (a later vae-export may know it)"] if unknown else []
        raise IntegrityError(f"{MANIFEST_FILE}: {what} {' and '.join(said)}")
    return data


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise IntegrityError(f"{MANIFEST_FILE}: {what} is {value!r}, not a text")
    return value


def _choice(value: Any, what: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise IntegrityError(f"{MANIFEST_FILE}: {what} is {value!r}; known are {', '.join(known)}")
    return str(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _file_name(name: str) -> str:
    """A relative path of plain names; what could leave the directory (`..`, `/etc`, `C:`, `a\\b`) does not match."""
    if not _FILE_NAME.fullmatch(name) or ".." in name or len(name) > 200 or name.lower() == MANIFEST_FILE:
        raise IntegrityError(f"{MANIFEST_FILE}: {name!r} is not the name of a file inside the bundle")
    return name


def _reject_case_twins(files: Mapping[str, Any]) -> None:
    """Two names that differ in case alone are one file on some systems: whose hash would count?"""
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
    found = {}
    for graph, steps in _exactly(_object(value, "tileable"), "tileable", GRAPHS).items():
        if not isinstance(steps, list):
            raise IntegrityError(f"{MANIFEST_FILE}: the tileable {graph} is not a list of steps")
        parsed = []
        for step in steps:
            step = _exactly(_object(step, "a step"), "a step", ("kind", "file", "channels"))
            if _text(step["file"], "file") not in files:
                raise IntegrityError(f"{MANIFEST_FILE}: the step {step['file']!r} is not among the listed files")
            if not _is_int(step["channels"]) or not 0 < step["channels"] <= MOST_CHANNELS:
                raise IntegrityError(f"{MANIFEST_FILE}: a step has {step['channels']!r} channels")
            parsed.append(Step(_choice(step["kind"], "kind", tuple(STEP_KINDS)), step["file"], step["channels"]))
        if not STEP_ORDER[graph].fullmatch("".join(STEP_KINDS[step.kind] for step in parsed)):
            raise IntegrityError(f"{MANIFEST_FILE}: the steps of the tileable {graph} are not in an order that runs")
        found[graph] = tuple(parsed)
    return found


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
