"""A bundle may come from anyone: nothing in it is believed before it has been checked."""

import hashlib
import json
import os
import re
import shutil
import socket

import onnxruntime
import pytest

from runtimes import Bundle, BundleError, CompatibilityError, IntegrityError, open_vae
from runtimes.bundle import FILE_LIMIT, MANIFEST_LIMIT, Manifest

GRAPH_FILES = ("vae_encoder/model.onnx", "vae_decoder/model.onnx")
LISTED = (*GRAPH_FILES, "config.json", "vae_encoder/config.json", "vae_decoder/config.json")
SHA = "0" * 64


@pytest.fixture
def parsed(monkeypatch):
    """Everything that reaches the native parser, in a list."""
    seen, real = [], onnxruntime.InferenceSession

    def spy(data, *args, **kwargs):
        seen.append(data)
        return real(data, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    return seen


def refuses(error, manifest, *says):
    with pytest.raises(error) as caught:
        Manifest.from_json(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    assert caught.type is error
    assert all(word in str(caught.value) for word in says)


def set_at(data, keys, value):
    for key in keys[:-1]:
        data = data[key]
    data[keys[-1]] = value


@pytest.fixture
def manifest(tiny_bundle):
    return json.loads((tiny_bundle / "manifest.json").read_bytes())


def test_a_good_bundle_opens_and_the_parser_gets_the_very_bytes_that_were_hashed(tiny_bundle, parsed):
    bundle = Bundle(tiny_bundle)
    bundle.verify()
    assert sorted(bundle.manifest.files) == sorted(LISTED)
    open_vae(tiny_bundle).close()
    hashes = [bundle.manifest.files[name].sha256 for name in GRAPH_FILES]
    assert [hashlib.sha256(data).hexdigest() for data in parsed] == hashes


def test_the_path_of_the_bundle_itself_may_be_a_link(tiny_bundle, tmp_path):
    (tmp_path / "link").symlink_to(tiny_bundle)
    Bundle(tmp_path / "link").verify()


def test_the_manifest_round_trips(tiny_bundle):
    raw = (tiny_bundle / "manifest.json").read_bytes()
    manifest = Manifest.from_json(raw)
    assert manifest.to_json().encode() == raw
    assert Manifest.from_json(manifest.to_json().encode()) == manifest


# Files --------------------------------------------------------------------------------------------------------------


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "first byte": lambda data: flip(data, 0),
    "middle byte": lambda data: flip(data, len(data) // 2),
    "last byte": lambda data: flip(data, len(data) - 1),
    "cut short": lambda data: data[:-1],
    "made longer": lambda data: data + b"\0",
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", LISTED)
def test_damage_to_any_listed_file_is_found_and_never_parsed(bundle_copy, parsed, name, damage):
    path = bundle_copy()
    damaged = DAMAGE[damage]((path / name).read_bytes())
    (path / name).write_bytes(damaged)
    with pytest.raises(IntegrityError, match=re.escape(name)):
        Bundle(path).verify()
    if name in GRAPH_FILES:
        with pytest.raises(IntegrityError, match=re.escape(name)):
            open_vae(path)
    assert damaged not in parsed


def replace_by_link(file, aside):
    file.symlink_to(aside)


def replace_by_parent_link(file, aside):
    shutil.move(file.parent, aside.parent / "folder")
    shutil.copy(aside, aside.parent / "folder" / file.name)
    file.parent.symlink_to(aside.parent / "folder")


def replace_by_socket(file, aside):
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(file.parent)  # a socket's path may have some 100 characters only
        listener.bind(file.name)


# What stands where the file was: `aside` holds the right bytes, so that following it would go unnoticed.
IMPOSTORS = {
    "link": replace_by_link,
    "dangling link": lambda file, aside: file.symlink_to(aside.parent / "nothing"),
    "parent is a link": replace_by_parent_link,
    "hard link": lambda file, aside: os.link(aside, file),
    "FIFO": lambda file, aside: os.mkfifo(file),
    "socket": replace_by_socket,
    "directory": lambda file, aside: file.mkdir(),
    "nothing": lambda file, aside: None,
}


@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_only_a_plain_file_of_the_bundle_is_read(bundle_copy, tmp_path, monkeypatch, parsed, impostor):
    monkeypatch.chdir(tmp_path)
    path, name = bundle_copy(), GRAPH_FILES[0]
    aside = tmp_path / "aside" / "model.onnx"
    aside.parent.mkdir()
    shutil.move(path / name, aside)
    IMPOSTORS[impostor](path / name, aside)
    for use in (lambda: Bundle(path).read(name), lambda: open_vae(path)):
        with pytest.raises(IntegrityError, match=re.escape(name)):
            use()
    assert parsed == []


@pytest.mark.parametrize("impostor", [i for i in IMPOSTORS if i not in ("nothing", "parent is a link")])
def test_the_manifest_too_is_a_plain_file(bundle_copy, tmp_path, monkeypatch, impostor):
    monkeypatch.chdir(tmp_path)
    path, aside = bundle_copy(), tmp_path / "aside.json"
    shutil.move(path / "manifest.json", aside)
    IMPOSTORS[impostor](path / "manifest.json", aside)
    with pytest.raises(IntegrityError, match=re.escape("manifest.json")):
        Bundle(path)


@pytest.mark.parametrize("what", ["nothing", "file", "empty directory"])
def test_where_there_is_no_bundle_it_says_so(tmp_path, what):
    path = tmp_path / "place"
    if what == "file":
        path.write_text("{}")
    elif what == "empty directory":
        path.mkdir()
    with pytest.raises(BundleError, match=re.escape(str(path))) as caught:
        open_vae(path)
    assert caught.type is BundleError


def test_an_unlisted_file_is_never_used(bundle_copy):
    path = bundle_copy(lambda manifest: manifest["files"].pop("vae_encoder/config.json"))
    bundle = Bundle(path)
    bundle.verify()
    for name in ("vae_encoder/config.json", "manifest.json", "../copy-0/config.json", "config.json/"):
        with pytest.raises(IntegrityError, match="not listed"):
            bundle.read(name)


# Manifest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 10**30])
def test_another_schema_is_named_as_such(manifest, version):
    refuses(CompatibilityError, manifest | {"schema_version": version}, str(version), "1")


BYTES = {
    "empty": lambda raw: b"",
    "not UTF-8": lambda raw: raw.replace(b'"memory"', b'"\xff"', 1),
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "cut short": lambda raw: raw[:-3],
    "two values": lambda raw: raw + b"{}",
    "NaN": lambda raw: raw.replace(b'"memory"', b"NaN", 1),
    "infinity": lambda raw: raw.replace(b'"memory"', b"-Infinity", 1),
    "infinity by another name": lambda raw: raw.replace(b'"memory"', b"1e999", 1),
    "endless integer": lambda raw: raw.replace(b'"memory"', b"9" * 100_000, 1),
    "a key twice": lambda raw: raw.replace(b'"repo"', b'"kind"', 1),
    "deep nesting": lambda raw: raw.replace(b'"memory"', b"[" * 100_000 + b"]" * 100_000, 1),
    "deep objects": lambda raw: raw.replace(b'"memory"', b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 1),
    "a list": lambda raw: b"[" + raw + b"]",
}


@pytest.mark.parametrize("case", BYTES)
def test_malformed_json_is_refused(tiny_bundle, case):
    raw = (tiny_bundle / "manifest.json").read_bytes()
    assert BYTES[case](raw) != raw
    refuses(IntegrityError, BYTES[case](raw), "manifest.json")


def test_an_oversized_manifest_is_refused_before_it_is_parsed(bundle_copy):
    path = bundle_copy()
    with (path / "manifest.json").open("ab") as file:
        file.write(b" " * MANIFEST_LIMIT)
    with pytest.raises(IntegrityError, match=str(MANIFEST_LIMIT)):
        Bundle(path)


ENTRY, ENCODER = ("files", "config.json"), ("graphs", "encoder")
# (where, what stands there, what the message says)
WRONG = [
    (("surplus",), 1, "surplus"),
    ((*ENTRY, "mode"), 1, "mode"),
    ((*ENCODER, "surplus"), 1, "surplus"),
    ((*ENCODER, "input", "surplus"), 1, "surplus"),
    (("graphs", "third"), {}, "third"),
    (("config", "surplus"), 1, "surplus"),
    *(((*ENTRY, "size"), size, "size") for size in (-1, FILE_LIMIT + 1, 10**40, True, 1.0, "1", None)),
    *(((*ENTRY, "sha256"), sha, "sha256") for sha in ("A" * 64, SHA[1:], SHA + "0", SHA + "\n", "g" * 64, 0, None)),
    (("schema_version",), "1", "schema_version"),
    (("schema_version",), True, "schema_version"),
    (("version",), 1, "version"),
    (("target",), "tflite", "tflite"),
    (("precision",), ["fp32"], "precision"),
    (("rewrites",), {}, "rewrites"),
    (("tools",), {"torch": 2}, "tools"),
    (("files",), [], "files"),
    (("graphs", "encoder"), None, "encoder"),
    ((*ENCODER, "file"), "vae_encoder/other.onnx", "other.onnx"),
    ((*ENCODER, "file"), ["config.json"], "file"),
    ((*ENCODER, "input", "dtype"), "object", "dtype"),
    ((*ENCODER, "input", "shape"), ["batch", -3, "height", "width"], "shape"),
    ((*ENCODER, "output", "shape"), [], "shape"),
    (("config", "block_out_channels"), [30], "block_out_channels"),
    (("config", "scaling_factor"), 0, "scaling_factor"),
    (("config", "scaling_factor"), 10**400, "scaling_factor"),
    (("config", "sample_size"), 10**400, "sample_size"),
]


@pytest.mark.parametrize(("keys", "value", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_a_manifest_that_breaks_the_schema_is_refused(manifest, keys, value, says):
    set_at(manifest, keys, value)
    refuses(IntegrityError, manifest, says)


@pytest.mark.parametrize("keys", [("files",), ("config",), ENTRY, (*ENTRY, "size"), ("graphs", "decoder"), ENCODER])
def test_a_manifest_that_lacks_something_is_refused(manifest, keys):
    holder = manifest
    for key in keys[:-1]:
        holder = holder[key]
    if keys != ENTRY:  # files are free to be listed or not
        del holder[keys[-1]]
    else:
        holder[keys[-1]] = {}
    refuses(IntegrityError, manifest)


def places(value, keys=()):
    """The way to every value in a manifest."""
    if keys:
        yield keys
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*keys, key))


@pytest.mark.parametrize("odd", [None, True, -1, 10**400, 1e308, "", "\ud800", [], [[]], {"\ud800": []}], ids=ascii)
def test_whatever_stands_anywhere_the_answer_is_a_manifest_or_a_bundle_error(manifest, odd):
    good, opened = json.dumps(manifest), 0
    for keys in places(manifest):
        for where in {keys, keys if isinstance(keys[-1], int) else (*keys[:-1], "\ud800")}:  # as value, or beside it
            data = json.loads(good)
            set_at(data, where, odd)
            try:
                again = Manifest.from_json(json.dumps(data).encode())
            except BundleError as error:
                str(error).encode()  # can be shown
            else:
                opened += 1
                assert Manifest.from_json(again.to_json().encode()) == again
    assert opened  # source, tools and validation are free


HOSTILE = (
    "/etc/passwd", "../config.json", "vae_encoder/../config.json", "..", ".", "./config.json", "vae_encoder\\model.onnx",
    "C:config.json", "C:/config.json", "manifest.json", "Manifest.JSON", "", "vae_encoder/", "a//b", ".hidden", "a/.b",
    "nul\0byte", "line\nbreak", "config.json\n", "~/config", "caf\u00e9.json", "a/b/c/d/e", "x" * 201,
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:30]))
def test_no_file_name_leads_out_of_the_bundle(manifest, name):
    manifest["files"][name] = manifest["files"].pop("config.json")
    refuses(IntegrityError, manifest, repr(name))


def test_two_names_that_differ_in_case_alone_are_refused(manifest):
    manifest["files"]["Config.json"] = manifest["files"]["config.json"]
    refuses(IntegrityError, manifest, "case")
