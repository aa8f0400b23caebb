"""Signing bundles and verifying them, with `model-signing` of the OpenSSF: who made a bundle, which hashes do not tell.

The signature covers every file of the directory and lies in it as model.sig, in the format of a Sigstore bundle: other
tools of `model-signing` read it. Keys are elliptic (P-256, P-384 or P-521), in PEM files, as OpenSSL makes them:

    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from runtimes import Bundle
from runtimes.errors import BackendUnavailable, ConfigError, IntegrityError
from runtimes.files import written_whole

SIGNATURE_FILE = "model.sig"


def sign_bundle(path: str | Path, key: str | Path) -> Path:
    """Sign a bundle with a private key -> the signature, which replaces the one that was there.

    Raises `IntegrityError` for a bundle that is damaged: what is signed is what its manifest says. `ConfigError` for a
    key that cannot be used.
    """
    signing = _import("signing")
    bundle = Bundle(path)
    bundle.verify()
    _check_plain(bundle.path)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=Path(key))
    except OSError as error:
        raise ConfigError(f"the key {key} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key} is not a private elliptic key without a password, in PEM: {_line(error)}") from None
    config.set_hashing_config(_hashing())
    signature = bundle.path / SIGNATURE_FILE
    with written_whole(signature) as partial:
        config.sign(bundle.path, partial)  # it reads all before it writes
    return signature


def verify_bundle(path: str | Path, key: str | Path) -> Bundle:
    """Check that a bundle is, to the byte, what the owner of a public key signed, and whole.

    Raises `IntegrityError` where it is not signed, or not with that key, or has other files than it had.
    """
    verifying = _import("verifying")
    bundle = Bundle(path)
    _check_plain(bundle.path)
    signature = bundle.path / SIGNATURE_FILE
    if not signature.is_file():
        raise IntegrityError(f"{path} is not signed: it has no {SIGNATURE_FILE}")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(key))
    except OSError as error:
        raise ConfigError(f"the key {key} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key} is not a public elliptic key in PEM: {_line(error)}") from None
    config.set_hashing_config(_hashing())
    try:
        config.verify(bundle.path, signature)
    except Exception as error:  # a signature of anything: of its parsers and of cryptography nothing is promised
        raise IntegrityError(f"{path} is not what the owner of {key} signed: {_line(error)}") from None
    bundle.verify()
    return bundle


def _hashing() -> Any:
    """All files but the signature; what git keeps beside them too, since a bundle has none of it."""
    return _import("hashing").Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _check_plain(directory: Path) -> None:
    """`IntegrityError` for links: what they lead to is not the bundle's."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise IntegrityError(f"{path} is not a plain file")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{module}")
    except ModuleNotFoundError:
        raise BackendUnavailable("signing needs model-signing: pip install 'vae-export[sign]'") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
