"""Sign bundles and verify signatures, with `model-signing` of the OpenSSF.

Hashes detect damage; a signature also proves who made a bundle. The signature covers every other file of the directory
and is stored in it as model.sig, in the format of a Sigstore bundle, which other tools of `model-signing` can read.
Keys are elliptic (P-256, P-384 or P-521), in PEM files. OpenSSL generates them:

    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
"""

from __future__ import annotations

import base64
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtimes import Bundle
from runtimes.errors import ConfigError, IntegrityError, NotInstalled
from runtimes.files import leftovers, written_whole
from runtimes.manifest import MANIFEST_FILE

SIGNATURE_FILE = "model.sig"
SIGNATURE_LIMIT = 4 << 20  #: maximum bytes of a signature file; those of bundles have about 3 KB


def sign_bundle(path: str | Path, key: str | Path) -> Path:
    """Sign a bundle with a private key, replace an existing signature, and return the path of the new one.

    Raises `IntegrityError` for a bundle that does not match its manifest, and `ConfigError` for an unusable key.
    """
    signing = _import("signing")
    bundle = Bundle(path)
    for leftover in leftovers(bundle.path, SIGNATURE_FILE):
        leftover.unlink(missing_ok=True)
    _check_files(bundle)
    bundle.verify()
    with _key_errors(key, "a private elliptic key without a password"):
        config = signing.Config().use_elliptic_key_signer(private_key=Path(key))
    config.set_hashing_config(_hashing())
    signature = bundle.path / SIGNATURE_FILE
    with tempfile.TemporaryDirectory() as directory:  # not in the bundle, all of whose files are signed
        made = Path(directory) / SIGNATURE_FILE
        config.sign(bundle.path, made)
        with written_whole(signature) as partial:
            shutil.copyfile(made, partial)
    return signature


def verify_bundle(path: str | Path, key: str | Path) -> Bundle:
    """Verify that a bundle is byte-identical to the one that the owner of a public key signed, and return it.

    Raises `IntegrityError` if the bundle is not signed, is signed with another key, or has missing, additional or
    changed files, and `ConfigError` for an unusable key.
    """
    verifying = _import("verifying")
    bundle = Bundle(path)
    names = _check_files(bundle)
    try:
        with (bundle.path / SIGNATURE_FILE).open("rb") as file:
            signature = file.read(SIGNATURE_LIMIT + 1)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is not signed: it has no {SIGNATURE_FILE}") from None
    if len(signature) > SIGNATURE_LIMIT:
        raise IntegrityError(f"{path}: {SIGNATURE_FILE} has more than {SIGNATURE_LIMIT} bytes")
    bundle.verify()
    with _key_errors(key, "a public elliptic key"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(key))
    config.set_hashing_config(_hashing())
    with tempfile.TemporaryDirectory() as directory:
        read = Path(directory) / SIGNATURE_FILE  # exactly the bytes that `_signed_names` parses below
        read.write_bytes(signature)
        try:
            config.verify(bundle.path, read)
            # `verify` ignores the files that the signature lists as ignored, which may be any files.
            signed = _signed_names(signature)
            if signed != names:
                raise ValueError(f"it does not cover {', '.join(sorted(names - signed)[:3])}")
        except Exception as error:  # parsers of a forged signature may raise anything
            raise IntegrityError(f"{path} is not what the owner of {key} signed: {_line(error)}") from None
    return bundle


@contextmanager
def _key_errors(key: str | Path, what: str) -> Iterator[None]:
    """Return a context that raises `ConfigError` if a key file cannot be read or is not `what`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the key {key} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key} is not {what}, in PEM: {_line(error)}") from None


def _hashing() -> Any:
    """Return a hashing config for all files except the signature, including the files of git, which bundles lack."""
    return _import("hashing").Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _check_files(bundle: Bundle) -> set[str]:
    """Return the names of all files except the signature.

    Raises `IntegrityError` unless these are plain files and exactly those that the manifest lists.
    """
    names, found = {MANIFEST_FILE, *bundle.manifest.files}, set()
    for path in bundle.path.rglob("*"):
        name = path.relative_to(bundle.path).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            advice = "; only plain files can be signed: copy the bundle with cp -rL" if path.is_symlink() else ""
            raise IntegrityError(f"{name} is not a plain file of {bundle.path}{advice}")
        if path.is_file() and name != SIGNATURE_FILE:
            found.add(name)
    for name in sorted(found - names):
        raise IntegrityError(f"{bundle.path} has {name!r}, which is not listed in its manifest")
    for name in sorted(names - found):
        raise IntegrityError(f"{bundle.path} lacks {name}")
    return names


def _signed_names(signature: bytes) -> set[str]:
    """Return the names of the files that a signature covers, from its in-toto statement."""
    statement = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    return {str(resource["name"]) for resource in statement["predicate"]["resources"]}


def _import(module: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{module}")
    except ModuleNotFoundError:
        raise NotInstalled("signing needs model-signing: pip install 'vae-export[sign]'") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
