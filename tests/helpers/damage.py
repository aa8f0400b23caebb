"""Files that are damaged in every way, and the promise that each is found."""

import re

import pytest

from runtimes import Bundle, IntegrityError, open_vae

DAMAGE = {
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle byte": lambda data: data[:300] + bytes([data[300] ^ 128]) + data[301:],
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut short": lambda data: data[:-1],
    "made longer": lambda data: data + b"\0",
    "emptied": lambda data: b"",
}


def assert_damage_is_found(bundle_copy, parsed, name, damage, *, opened=True, open=open_vae):
    """A promise of every backend; `opened` where the file is one that it reads."""
    path = bundle_copy()
    damaged = DAMAGE[damage]((path / name).read_bytes())
    (path / name).write_bytes(damaged)
    for use in (lambda: Bundle(path).verify(), *([lambda: open(path)] if opened else [])):
        with pytest.raises(IntegrityError, match=re.escape(name)):
            use()
    assert damaged not in parsed
