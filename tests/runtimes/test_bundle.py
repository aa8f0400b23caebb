"""A bundle may come from anyone: nothing in it is believed before it has been checked.

Tests runtimes/manifest.py.
"""

import hashlib
import json
import os
import re
import shutil

import pytest

from runtimes import Bundle, BundleError, CompatibilityError, IntegrityError, open_vae
from runtimes.bundle import MANIFEST_LIMIT
from runtimes.manifest import FILE_LIMIT, Manifest
from tests.helpers.damage import DAMAGE, assert_damage_is_found
from tests.helpers.parsed_bytes import parsed_by_onnxruntime  # noqa: F401  (a fixture)

GRAPH_FILES = ("vae_encoder/model.onnx", "vae_decoder/model.onnx")
LISTED = (*GRAPH_FILES, "config.json", "vae_encoder/config.json", "vae_decoder/config.json")


@pytest.fixture
def raw(tiny_bundle):
    return (tiny_bundle / "manifest.json").read_bytes()


def refuses(error, manifest, says=""):
    with pytest.raises(error, match=re.escape(says)) as caught:
        Manifest.from_json(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    assert caught.type is error


def changed(raw, keys, value):
    """The manifest with another value at these keys; without them, where the value is `...`."""
    manifest = holder = json.loads(raw)
    del manifest["manifest_sha256"]
    for key in keys[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[keys[-1]]
    else:
        holder[keys[-1]] = value
    return manifest


def test_a_good_bundle_opens_and_the_parser_gets_the_very_bytes_that_were_hashed(tiny_bundle, tmp_path, raw, parsed):
    (tmp_path / "link").symlink_to(tiny_bundle)  # the bundle itself may be one
    bundle = Bundle(tmp_path / "link")
    bundle.verify()
    assert sorted(bundle.manifest.files) == sorted(LISTED)
    assert bundle.manifest.to_json().encode() == raw
    assert Manifest.from_json(raw) == bundle.manifest
    open_vae(tmp_path / "link").close()
    assert [hashlib.sha256(data).hexdigest() for data in parsed] == [
        bundle.manifest.files[f].sha256 for f in GRAPH_FILES
    ]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", LISTED)
def test_damage_to_any_listed_file_is_found_and_never_parsed(bundle_copy, parsed, name, damage):
    assert_damage_is_found(bundle_copy, parsed, name, damage, opened=name in GRAPH_FILES)


def move_parent(file, aside):
    shutil.move(file.parent, aside.parent / "folder")
    shutil.copy(aside, aside.parent / "folder" / file.name)
    file.parent.symlink_to(aside.parent / "folder")


# What stands where the file was. `aside` holds the right bytes: following it would go unnoticed.
IMPOSTORS = {
    "link": lambda file, aside: file.symlink_to(aside),
    "dangling link": lambda file, aside: file.symlink_to(aside.parent / "nothing"),
    "hard link": lambda file, aside: os.link(aside, file),
    "FIFO": lambda file, aside: os.mkfifo(file),
    "directory": lambda file, aside: file.mkdir(),
    "nothing": lambda file, aside: None,
    "parent is a link": move_parent,
}


@pytest.mark.parametrize(
    ("name", "impostor"),
    [(GRAPH_FILES[0], impostor) for impostor in IMPOSTORS]
    + [("manifest.json", impostor) for impostor in IMPOSTORS if impostor not in ("nothing", "parent is a link")],
)
def test_only_a_plain_file_of_the_bundle_is_read(bundle_copy, tmp_path, parsed, name, impostor):
    path, aside = bundle_copy(), tmp_path / "aside"
    shutil.move(path / name, aside)
    IMPOSTORS[impostor](path / name, aside)
    # Behind a linked folder other files are refused as well, whichever is read first.
    said = "vae_encoder/" if impostor == "parent is a link" else re.escape(name)
    for use in (lambda: Bundle(path).read(name), lambda: open_vae(path)):
        with pytest.raises(IntegrityError, match=said):
            use()
    assert parsed == []


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("{}"), lambda p: p.mkdir()])
def test_where_there_is_no_bundle_it_says_so(tmp_path, make):
    make(tmp_path / "place")
    with pytest.raises(BundleError, match=re.escape(str(tmp_path / "place"))) as caught:
        open_vae(tmp_path / "place")
    assert caught.type is BundleError


def test_an_unlisted_file_is_never_used(bundle_copy):
    bundle = Bundle(bundle_copy(lambda manifest: manifest["files"].pop("vae_encoder/config.json")))
    for name in ("vae_encoder/config.json", "manifest.json", "../aside", "config.json/"):
        with pytest.raises(IntegrityError, match="not listed"):
            bundle.read(name)


BYTES = {
    "empty": lambda raw: b"",
    "not UTF-8": lambda raw: raw.replace(b'"memory"', b'"\xff"', 1),
    "NaN": lambda raw: raw.replace(b'"memory"', b"NaN", 1),
    "infinity": lambda raw: raw.replace(b'"memory"', b"-Infinity", 1),
    "infinity by another name": lambda raw: raw.replace(b'"memory"', b"1e999", 1),
    "endless integer": lambda raw: raw.replace(b'"memory"', b"9" * 100_000, 1),
    "a key twice": lambda raw: raw.replace(b'"repo"', b'"kind"', 1),
    "deep lists": lambda raw: raw.replace(b'"memory"', b"[" * 100_000 + b"]" * 100_000, 1),
    "deep objects": lambda raw: raw.replace(b'"memory"', b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 1),
    "cut short": lambda raw: raw[:-3],
    "a list": lambda raw: b"[" + raw + b"]",
}


@pytest.mark.parametrize("case", BYTES)
def test_malformed_json_is_refused(raw, case):
    assert BYTES[case](raw) != raw
    refuses(IntegrityError, BYTES[case](raw), "manifest.json")


def test_an_oversized_manifest_is_refused_before_it_is_parsed(bundle_copy, raw):
    path = bundle_copy()
    (path / "manifest.json").write_bytes(raw + b" " * MANIFEST_LIMIT)
    with pytest.raises(IntegrityError, match=str(MANIFEST_LIMIT)):
        Bundle(path)


@pytest.mark.parametrize("version", [0, 2, 10**30])
def test_another_schema_is_named_as_such(raw, version):
    refuses(CompatibilityError, changed(raw, ["schema_version"], version), str(version))


ENTRY, ENCODER = ("files", "config.json"), ("graphs", "encoder")
# Where, what stands there (nothing for ...), and what the message names.
WRONG = [
    *(((*keys, "surplus"), 1, "surplus") for keys in ((), ENTRY, ENCODER, (*ENCODER, "input"), ["config"], ["graphs"])),
    *((keys, ..., keys[-1]) for keys in (["files"], ["schema_version"], (*ENTRY, "size"), (*ENCODER, "file"), ENCODER)),
    *(((*ENTRY, "size"), size, "size") for size in (-1, FILE_LIMIT + 1, 10**40, True, 1.0, "1", None)),
    *(((*ENTRY, "sha256"), sha, "sha256") for sha in ("A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "g" * 64, 0)),
    *((["schema_version"], version, "schema_version") for version in ("1", True, 1.0, None)),
    (["version"], 1, "version"),
    (["target"], "../onnx", "not a name"),
    (["precision"], ["fp32"], "precision"),
    (["rewrites"], {}, "rewrites"),
    (["tools"], {"torch": 2}, "tools"),
    (["files"], [], "files"),
    (ENCODER, None, "encoder"),
    ((*ENCODER, "file"), "vae_encoder/other.onnx", "other.onnx"),
    ((*ENCODER, "file"), ["config.json"], "file"),
    ((*ENCODER, "input", "dtype"), "object", "dtype"),
    ((*ENCODER, "input", "shape"), ["batch", -3, "height", "width"], "shape"),
    ((*ENCODER, "output", "shape"), [], "shape"),
    (["config", "block_out_channels"], [30], "block_out_channels"),
    (["config", "scaling_factor"], 10**400, "scaling_factor"),
    (["config", "sample_size"], 10**400, "sample_size"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_a_manifest_that_breaks_the_schema_is_refused(raw, keys, value, says):
    refuses(IntegrityError, changed(raw, keys, value), says)


def places(value, keys=()):
    """The way to every value in a manifest, and to one more in every object."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from ([keys] if keys else []) + ([(*keys, "\ud800")] if isinstance(value, dict) else [])
    for key, child in children:
        yield from places(child, (*keys, key))


@pytest.mark.parametrize("odd", [None, True, -1, 10**400, 1e308, "", "\ud800", [], [[]], {"\ud800": []}], ids=ascii)
def test_whatever_stands_anywhere_the_answer_is_a_manifest_or_a_bundle_error(raw, odd):
    for keys in places(json.loads(raw)):
        try:
            manifest = Manifest.from_json(json.dumps(changed(raw, keys, odd)).encode())
        except BundleError as error:
            str(error).encode()  # lone surrogates could not be shown
        else:
            assert Manifest.from_json(manifest.to_json().encode()) == manifest


HOSTILE = (
    "/etc/passwd", "../config.json", "vae_encoder/../config.json", "..", ".", "./config.json", "vae_encoder\\a.onnx",
    "C:config.json", "C:/config.json", "manifest.json", "Manifest.JSON", "", "vae_encoder/", "a//b", ".hidden", "a/.b",
    "nul\0byte", "line\nbreak", "config.json\n", "Config.json", "caf\u00e9.json", "a/b/c/d/e", "x" * 201,
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:30]))
def test_no_file_name_leads_out_of_the_bundle(raw, name):
    says = "differ in case alone" if name == "Config.json" else repr(name)
    refuses(IntegrityError, changed(raw, ("files", name), json.loads(raw)["files"]["config.json"]), says)
