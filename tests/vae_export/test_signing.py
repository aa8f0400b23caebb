"""Signed bundles: who made it, to the byte. Checked with model-signing's own command, too."""

import shutil
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from runtimes import BundleError, ConfigError, IntegrityError, open_vae
from vae_export.signing import SIGNATURE_FILE, sign_bundle, verify_bundle

model_signing = pytest.importorskip("model_signing", reason="pip install 'vae-export[sign]'")

PEM = serialization.Encoding.PEM


def write_keys(directory, name, private=None):
    """(private, public) key files."""
    private = private or ec.generate_private_key(ec.SECP256R1())
    files = directory / f"{name}.pem", directory / f"{name}.pub.pem"
    plain = serialization.NoEncryption()
    files[0].write_bytes(private.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain))
    files[1].write_bytes(private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return files


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture
def signed(bundle_copy, keys):
    path = bundle_copy()
    assert sign_bundle(path, keys[0]) == path / SIGNATURE_FILE
    return path


def test_a_signed_bundle_is_verified_wherever_it_lies_and_opens_as_before(signed, keys, tmp_path):
    assert verify_bundle(signed, keys[1]).manifest.target == "onnx"
    moved = tmp_path / "another name"
    shutil.copytree(signed, moved)
    verify_bundle(moved, keys[1])
    open_vae(moved).close()
    sign_bundle(moved, keys[0])  # once more, in the place of the first
    verify_bundle(moved, keys[1])


def test_model_signing_itself_takes_the_signature(signed, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed, "--signature", signed / SIGNATURE_FILE,
               "--public_key", keys[1], "--ignore-paths", signed / SIGNATURE_FILE]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


FORGERIES = {
    "a graph and its hash": lambda path, other: edited(path),
    "a file more": lambda path, other: (path / "plugin.so").write_bytes(b"\x7fELF"),
    "a hidden file more": lambda path, other: (path / ".git").mkdir() or (path / ".git" / "hook").write_text("x"),
    "a file less": lambda path, other: (path / "vae_encoder" / "config.json").unlink(),
    "a link": lambda path, other: (path / "more").symlink_to("/etc/passwd"),
    "another signature": lambda path, other: sign_bundle(path, other[0]),
    "no signature": lambda path, other: (path / SIGNATURE_FILE).unlink(),
    "an empty signature": lambda path, other: (path / SIGNATURE_FILE).write_bytes(b""),
    "half a signature": lambda path, other: halve(path / SIGNATURE_FILE),
    "a signature of noise": lambda path, other: (path / SIGNATURE_FILE).write_bytes(bytes(range(256)) * 20),
}


def edited(path):
    """What hashes alone cannot show: the manifest says what the file is now."""
    from runtimes.manifest import Manifest

    manifest = Manifest.from_json((path / "manifest.json").read_bytes())
    config = manifest.config.__class__(**{**vars(manifest.config), "scaling_factor": 9.0})
    (path / "manifest.json").write_text(
        Manifest(**{**vars(manifest), "config": config, "latent_space": config.latent_space}).to_json()
    )
    open_vae(path).close()


def halve(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("forgery", FORGERIES)
def test_whatever_is_changed_is_found(signed, keys, tmp_path, forgery):
    FORGERIES[forgery](signed, write_keys(tmp_path, "theirs"))
    with pytest.raises(IntegrityError):
        verify_bundle(signed, keys[1])


@pytest.mark.parametrize("ignored", [["vae_decoder"], ["manifest.json"], [".github"]])
def test_a_signature_that_leaves_files_out_is_none(bundle_copy, keys, ignored):
    """model-signing leaves out what the signature says, and what belongs to git: such a one could cover anything."""
    path = bundle_copy()
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0])
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE, *ignored])
    config.set_hashing_config(hashing).sign(path, path / SIGNATURE_FILE)
    if ignored == [".github"]:
        (path / ".github").mkdir()
        (path / ".github" / "more").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"does not cover|not listed"):
        verify_bundle(path, keys[1])


def test_signing_goes_on_where_it_was_killed(bundle_copy, keys):
    path = bundle_copy()
    (path / ".model.sig.0123abcd.partial").write_bytes(b"half a signature")
    sign_bundle(path, keys[0])
    verify_bundle(path, keys[1])


def test_what_the_manifest_does_not_list_is_not_signed(bundle_copy, keys):
    path = bundle_copy()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(IntegrityError, match=r"notes\.txt.*not listed"):
        sign_bundle(path, keys[0])


def test_a_damaged_bundle_is_not_signed(bundle_copy, keys):
    path = bundle_copy()
    (path / "config.json").write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        sign_bundle(path, keys[0])
    assert not (path / SIGNATURE_FILE).exists()
    with pytest.raises(BundleError, match="does not exist"):
        sign_bundle(path / "nothing", keys[0])


@pytest.mark.parametrize("which", ["missing", "text", "RSA", "public", "encrypted"])
def test_a_key_that_is_none_is_named(bundle_copy, signed, keys, tmp_path, which):
    key = tmp_path / "key.pem"
    if which == "text":
        key.write_text("not a key")
    elif which == "RSA":
        shutil.copy(write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))[0], key)
    elif which == "public":
        shutil.copy(keys[1], key)
    elif which == "encrypted":
        locked = serialization.BestAvailableEncryption(b"secret")
        private = ec.generate_private_key(ec.SECP256R1())
        key.write_bytes(private.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigError, match=r"key\.pem"):
        sign_bundle(bundle_copy(), key)
    if which in ("missing", "text"):
        with pytest.raises(ConfigError, match=r"key\.pem"):
            verify_bundle(signed, key)


def test_the_commands_say_what_they_did(run, bundle_copy, keys, tmp_path):
    path = bundle_copy()
    said = run("sign", path, "--key", keys[0])
    assert said.code == 0 and "model.sig signs" in " ".join(said.out.split())
    said = run("verify", path, "--key", keys[1])
    assert said.code == 0 and "signed by the owner" in " ".join(said.out.split())
    run("verify", path, "--key", write_keys(tmp_path, "theirs")[1]).check_refusal(IntegrityError, "not what the owner")
