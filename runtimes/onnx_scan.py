"""What an ONNX graph may hold, checked on its bytes before a runtime parses them. Standard library only.

ONNX can name files (external data, EPContext nodes), call code that a process has loaded under a name (operators of
other domains than ONNX's own), and bring functions that hide both. No graph of a VAE needs any of it, and the
known ways out of an ONNX file (CVE-2022-25882, CVE-2024-27318 and those with links that followed) go through external
data: so there is none here.

The file is protocol buffers (https://protobuf.dev/programming-guides/encoding): fields of a number and a wire type.
Walked are the messages of onnx.proto that can hold tensors or nodes; all else is skipped, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtimes.errors import CompatibilityError, IntegrityError

DOMAINS = ("", "ai.onnx")  #: ONNX's own operators
DEEPEST = 16  #: graphs within graphs; ours have none

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which ONNX never had
_EXTERNAL = 1  # TensorProto.DataLocation

# message -> {number of a field: the message that it holds}, from onnx.proto
_MESSAGES = {
    "Model": {7: "Graph", 8: "OperatorSet", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "OperatorSet": {},
    "Tensor": {},
}
_DOMAIN = {"Node": 7, "OperatorSet": 1}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of Tensor
_REFUSED = {"Training": "training information", "Function": "functions of its own"}


def check_onnx(data: bytes, file: str) -> None:
    """`IntegrityError` for a model that reaches outside of itself, `CompatibilityError` for what is no whole model.

    `file` is its name in the message.
    """
    try:
        _check(memoryview(data), "Model", DEEPEST)
    except _Malformed as error:
        raise CompatibilityError(f"{file} is not a whole ONNX model: {error}") from None
    except _Refused as error:
        raise IntegrityError(f"{file} {error}: refused, a bundle's graphs are complete in themselves") from None


class _Malformed(Exception):
    """Not protocol buffers."""


class _Refused(Exception):
    """What no graph of a bundle may hold."""


def _check(message: memoryview, kind: str, left: int) -> None:
    if left == 0:
        raise _Refused("has graphs nested too deeply")
    for number, wire, value in _fields(message):
        inner = _MESSAGES[kind].get(number) if wire == _BYTES else None
        if inner in _REFUSED:
            raise _Refused(f"has {_REFUSED[inner]}")
        if inner is not None:
            assert isinstance(value, memoryview)
            _check(value, inner, left - (inner == "Graph"))
        elif kind == "Tensor" and (
            (number == _EXTERNAL_DATA and wire == _BYTES) or (number == _DATA_LOCATION and value == _EXTERNAL)
        ):
            raise _Refused("has external data")
        elif wire == _BYTES and number == _DOMAIN.get(kind):
            assert isinstance(value, memoryview)
            domain = bytes(value[:200]).decode("utf-8", "replace")
            if domain not in DOMAINS:
                raise _Refused(f"has operators of the domain {domain!r}")


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(number, wire type, value) of each field: a number for varints, else its bytes, not copied."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed("a field has no number")
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _Malformed(f"a field has wire type {wire}")
        if size > end - at:
            raise _Malformed("it ends within a field")
        yield number, wire, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(the number at this place, the place behind it)."""
    result = 0
    for shift in range(0, 70, 7):  # 64 bits have at most 10 bytes
        if at == len(message):
            raise _Malformed("it ends within a number")
        byte = message[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
    raise _Malformed("a number has more than 64 bits")
