"""Hostile bundles: the right error for each, no byte of another file is read, and memory stays small.

Each is whole but for one thing, with the sizes and hashes that its author would write. They are opened by a process of
its own, while the kernel tells this one of every access to the file that they try to reach.
"""

import ctypes
import hashlib
import json
import os
import shutil
import socket
import struct
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from runtimes import Bundle, BundleError, CompatibilityError, IntegrityError
from runtimes.bundle import LARGE_FILE
from runtimes.manifest import FILE_LIMIT

ENCODER, DECODER = "vae_encoder/model.onnx", "vae_decoder/model.onnx"
MOST_MEMORY = 512 << 20  # bytes, of the process that tries to open all of them
IN_ACCESS, IN_OPEN, IN_NONBLOCK = 0x1, 0x20, 0o4000


class Hostile:
    """A copy of a bundle: `manifest` is what it will say, `secret` a file outside that is none of its business."""

    def __init__(self, path, secret):
        self.path, self.secret = path, secret
        self.manifest = json.loads((path / "manifest.json").read_bytes())
        del self.manifest["manifest_sha256"]
        self.raw = None

    def put(self, name, data):
        """A file with the hash that the manifest then says."""
        (self.path / name).write_bytes(data)
        self.list(name, data)

    def list(self, name, data):
        self.manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def graph_is(self, name):
        self.list(name, self.secret.read_bytes())
        self.manifest["graphs"]["encoder"]["file"] = name

    def finish(self):
        raw = json.dumps(self.manifest).encode() if self.raw is None else self.raw
        (self.path / "manifest.json").write_bytes(raw)


HOSTILE: dict[str, tuple[Any, ...]] = {}


def hostile(error, says):
    def add(make):
        HOSTILE[make.__name__] = make, error, says
        return make

    return add


@hostile(IntegrityError, "not the name of a file inside the bundle")
def absolute_path(b):
    b.graph_is(str(b.secret))


@hostile(IntegrityError, "not the name of a file inside the bundle")
def parent_path(b):
    b.graph_is("../secret")


@hostile(IntegrityError, "not the name of a file inside the bundle")
def parent_path_in_the_middle(b):
    b.graph_is("vae_encoder/../../secret")


@hostile(IntegrityError, "not the name of a file inside the bundle")
def path_of_another_system(b):
    b.graph_is("C:\\secret")


def in_the_place_of_the_encoder(b, make):
    (b.path / ENCODER).unlink(missing_ok=True)
    make(b.path / ENCODER)
    b.list(ENCODER, b.secret.read_bytes())


@hostile(IntegrityError, "cannot be opened as a plain file")
def link(b):
    in_the_place_of_the_encoder(b, lambda file: file.symlink_to(b.secret))


@hostile(IntegrityError, "cannot be opened as a plain file")
def linked_parent(b):
    shutil.rmtree(b.path / "vae_encoder")
    (b.path / "vae_encoder").symlink_to(b.secret.parent)
    b.graph_is("vae_encoder/secret")


@hostile(IntegrityError, "hard link")
def hard_link(b):
    # One of its own: a hard link can only be told from the file, opened. Of it nothing is read.
    other = b.secret.with_name("other secret")
    other.write_bytes(b.secret.read_bytes())
    in_the_place_of_the_encoder(b, lambda file: os.link(other, file))


@hostile(IntegrityError, "not a regular file")
def fifo(b):
    in_the_place_of_the_encoder(b, os.mkfifo)


@hostile(IntegrityError, "cannot be opened as a plain file")
def open_socket(b):
    def bind(file):
        directory = os.open(file.parent, os.O_RDONLY)  # the name of a socket has 108 bytes at most
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{directory}/{file.name}")
        os.close(directory)

    in_the_place_of_the_encoder(b, bind)


@hostile(IntegrityError, "cannot be opened as a plain file")
def link_to_a_device(b):
    in_the_place_of_the_encoder(b, lambda file: file.symlink_to("/dev/zero"))


@hostile(IntegrityError, "not a regular file")
def device(b):
    try:
        in_the_place_of_the_encoder(b, lambda file: os.mknod(file, 0o20666, os.makedev(1, 5)))
    except PermissionError:  # that takes root; a directory is no regular file either
        in_the_place_of_the_encoder(b, os.mkdir)


@hostile(IntegrityError, "not a regular file")
def directory(b):
    in_the_place_of_the_encoder(b, os.mkdir)


@hostile(IntegrityError, "manifest.json cannot be opened as a plain file")
def linked_manifest(b):
    b.finish()
    shutil.move(b.path / "manifest.json", b.path / "real.json")
    (b.path / "manifest.json").symlink_to(b.path / "real.json")
    b.finish = lambda: None


@hostile(IntegrityError, "size of")
def huge_size(b):
    b.manifest["files"][ENCODER]["size"] = 10**15


@hostile(IntegrityError, "and the manifest says")
def large_size(b):
    b.manifest["files"][ENCODER]["size"] = FILE_LIMIT


@hostile(IntegrityError, "was changed")
def large_file_of_nothing(b):
    """It takes no place on disk, and would take a gigabyte of memory."""
    with (b.path / ENCODER).open("r+b") as file:
        file.truncate(4 * LARGE_FILE)
    b.manifest["files"][ENCODER]["size"] = 4 * LARGE_FILE


@hostile(IntegrityError, "manifest.json has")
def large_manifest(b):
    b.finish()
    with (b.path / "manifest.json").open("r+b") as file:
        file.truncate(4 << 30)
    b.finish = lambda: None


@hostile(IntegrityError, "size of")
def negative_size(b):
    b.manifest["files"][ENCODER]["size"] = -1


@hostile(IntegrityError, "a key is duplicated")
def duplicate_key(b):
    b.raw = json.dumps(b.manifest).encode().replace(b'"target":', b'"target": "flax", "target":', 1)


@hostile(IntegrityError, "unknown 'plugins'")
def unknown_key(b):
    b.manifest["plugins"] = [str(b.secret)]


@hostile(IntegrityError, "is not readable")
def deep_json(b):
    b.manifest["source"] = "DEEP"
    b.raw = json.dumps(b.manifest).encode().replace(b'"DEEP"', b'{"a":' * 300_000 + b"1" + b"}" * 300_000)


@hostile(IntegrityError, "nested deeper")
def rather_deep_json(b):
    b.manifest["source"] = "DEEP"
    b.raw = json.dumps(b.manifest).encode().replace(b'"DEEP"', b'{"a":' * 100 + b"1" + b"}" * 100)


@hostile(IntegrityError, "NaN is not JSON")
def not_a_number(b):
    b.manifest["validation"] = {"psnr_db": float("nan")}


@hostile(IntegrityError, "is not readable")
def not_utf8(b):
    b.raw = json.dumps(b.manifest).encode().replace(b'"version": "', b'"version": "\xff', 1)


@hostile(IntegrityError, "differ in case alone")
def two_cases(b):
    b.put("vae_encoder/Model.onnx", b"the one that would win on some systems")


@hostile(IntegrityError, "not the name of a file inside the bundle")
def manifest_in_another_case(b):
    b.put("Manifest.json", b"{}")


@hostile(IntegrityError, "is not among the listed files")
def file_that_is_not_listed(b):
    del b.manifest["files"][ENCODER]


@hostile(CompatibilityError, "schema version 2")
def later_schema(b):
    b.manifest["schema_version"] = 2


def with_graph(b, *nodes, weights=()):
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", channels, "h", "w"])]
        for name, channels in (("sample", 3), ("latent_parameters", 8))
    )
    graph = helper.make_graph(list(nodes), "encoder", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    b.put(ENCODER, helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def external_weights(b, location):
    model = onnx.load(b.path / ENCODER)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    onnx.external_data_helper.set_external_data(largest, location, 0, len(largest.raw_data))
    largest.ClearField("raw_data")
    b.put(ENCODER, model.SerializeToString())


@hostile(IntegrityError, "has external data")
def external_data_of_an_absolute_path(b):
    external_weights(b, str(b.secret))


@hostile(IntegrityError, "has external data")
def external_data_of_the_parent(b):
    external_weights(b, "../../secret")


@hostile(IntegrityError, "has external data")
def external_data_through_a_link(b):
    (b.path / "vae_encoder" / "weights").symlink_to(b.secret)
    external_weights(b, "weights")


@hostile(IntegrityError, "has external data")
def external_data_through_a_hard_link(b):
    os.link(b.secret, b.path / "vae_encoder" / "weights")
    external_weights(b, "weights")


@hostile(IntegrityError, "domain 'com.microsoft'")
def plan_in_another_file(b):
    with_graph(
        b,
        helper.make_node(
            "EPContext",
            ["sample"],
            ["latent_parameters"],
            domain="com.microsoft",
            embed_mode=0,
            ep_cache_context=str(b.secret),
        ),
    )


@hostile(IntegrityError, "domain 'ai.example'")
def operator_of_its_own(b):
    model = onnx.load(b.path / ENCODER)
    model.graph.node[0].domain = "ai.example"
    b.put(ENCODER, model.SerializeToString())


@hostile(CompatibilityError, "not a whole ONNX model")
def another_format(b):
    b.put(ENCODER, b"\x18\x00\x00\x00ORTM" + bytes(1000))


@hostile(CompatibilityError, "does not open")
def another_backend(b):
    """Its files would be parsed as what they are not."""
    b.manifest["target"] = "openvino"


OPEN = """
import json, sys
from runtimes import VaeError, open_vae

for path in sys.argv[1:]:
    try:
        open_vae(path, backend="onnxruntime")
        print(json.dumps(["opened", path]))
    except VaeError as error:
        print(json.dumps([type(error).__name__, str(error)]))
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


class Watch:
    """Whether a file is opened, by any process (Linux's inotify; a file that is mapped is not seen to be read)."""

    def __init__(self, path, what=IN_OPEN | IN_ACCESS):
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(IN_NONBLOCK)
        assert libc.inotify_add_watch(self.descriptor, os.fsencode(path), what) > 0

    def seen(self):
        try:
            events = os.read(self.descriptor, 65536)
        except BlockingIOError:
            return []
        return [struct.unpack_from("iI", events, place)[1] for place in range(0, len(events), 16)]


def test_hostile_bundles_get_the_right_error_and_nothing_else(onnx_bundle, tmp_path, alone):
    secret = tmp_path / "secret"
    secret.write_bytes((onnx_bundle / ENCODER).read_bytes())  # a graph that would open, were it read
    paths = []
    for name, (make, _, _) in HOSTILE.items():
        shutil.copytree(onnx_bundle, tmp_path / name)
        made = Hostile(tmp_path / name, secret)
        make(made)
        made.finish()
        paths.append(made.path)
    assert len(paths) >= 20
    watch, linked = Watch(secret), Watch(tmp_path / "other secret", IN_ACCESS)
    *answers, peak = alone(OPEN, *paths)
    assert not watch.seen(), "the file outside was opened"
    assert not linked.seen(), "the file outside was read"
    for (name, (_, error, says)), answer in zip(HOSTILE.items(), answers, strict=True):
        kind, message = json.loads(answer)
        assert (name, kind) == (name, error.__name__), message
        assert says in message, name
        assert issubclass(error, BundleError)
    assert int(peak) * 1024 < MOST_MEMORY


def test_the_watch_sees_what_onnx_runtime_reads_from_outside(onnx_bundle, tmp_path):
    """What the test above would see, were external data not refused."""
    graph = onnx.load(onnx_bundle / ENCODER)
    onnx.save(graph, tmp_path / "a.onnx", save_as_external_data=True, location="secret", size_threshold=1024)
    watch = Watch(tmp_path / "secret")
    assert not watch.seen()
    onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert watch.seen()


def test_the_bundle_that_they_were_made_of_is_sound(onnx_bundle, tmp_path):
    shutil.copytree(onnx_bundle, tmp_path / "sound")
    sound = Hostile(tmp_path / "sound", tmp_path / "secret")
    sound.finish()
    Bundle(sound.path).verify()


def test_a_file_that_grows_or_is_exchanged_while_it_is_read_is_found(onnx_bundle, tmp_path, monkeypatch):
    """The bytes that are hashed are those that are parsed: between the two there is nothing to exchange."""
    shutil.copytree(onnx_bundle, tmp_path / "bundle")
    bundle, real = Bundle(tmp_path / "bundle"), hashlib.sha256

    def exchange(data=b""):
        (tmp_path / "bundle" / DECODER).write_bytes(b"another graph")
        return real(data)

    expected = (onnx_bundle / DECODER).read_bytes()
    monkeypatch.setattr("runtimes.bundle.hashlib.sha256", exchange)
    assert bundle.read(DECODER) == expected, "what was hashed, not what is there now"
    with pytest.raises(IntegrityError, match=DECODER):
        bundle.read(DECODER)
