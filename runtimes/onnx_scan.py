"""Safety check of an ONNX graph on its bytes, before a runtime parses them. Standard library only.

An ONNX file can name other files (external data, EPContext nodes), call code that the process has loaded under a name
(operators outside of ONNX's own domain), and contain functions that hide both. The graph of a VAE needs none of these.
The known escapes from an ONNX file (CVE-2022-25882, CVE-2024-27318 and the later ones by links) use external data,
which is therefore refused.

The file is encoded as protocol buffers (https://protobuf.dev/programming-guides/encoding): fields with a number and a
wire type. Parsers differ in how they treat unusual encodings, such as numbers with superfluous bytes, and one parser
may read what another one skips. Therefore only the fields of onnx.proto in their canonical encoding are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtimes.errors import CompatibilityError, IntegrityError

DOMAINS = ("", "ai.onnx")  #: ONNX's own operators
MAX_DEPTH = 16  #: graphs within graphs; ours have none
MOST_FIELDS = 2_000_000  #: in a model; ours have about 20,000, and a million takes a third of a second

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which ONNX never had
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of Tensor
_GRAPH = 7  # of Model
_ORT_FORMAT = b"ORTM"  # bytes 4 to 7 of a file in ONNX Runtime's own format

# message type -> {field number: type of the message in it}, from onnx.proto
_MESSAGES = {
    "Model": {_GRAPH: "Graph", 8: "OperatorSet", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "OperatorSet": {},
    "Tensor": {},
}
#: message type -> all of its field numbers
_KNOWN = {
    "Model": {*range(1, 9), 14, 20, 25, 26},
    "Graph": {1, 2, 5, *range(10, 17)},
    "Node": {*range(1, 11)},
    "Attribute": {*range(1, 12), 13, 14, 15, *range(20, 24)},
    "SparseTensor": {1, 2, 3},
    "OperatorSet": {1, 2},
    "Tensor": {*range(1, 15), 16},
}
_DOMAIN = {"Node": 7, "OperatorSet": 1}
_REFUSED = {"Training": "training information", "Function": "functions of its own"}


def check_onnx(data: bytes, file: str) -> None:
    """Check the bytes of an ONNX model; `file` is its name in messages.

    Raises `IntegrityError` for a model that refers to files or code outside of itself, `CompatibilityError` for bytes
    that are not a complete model.
    """
    try:
        if data[4:8] == _ORT_FORMAT:
            raise _Malformed("it is in ONNX Runtime's own format")
        scan = _Scan()
        scan.check(memoryview(data), "Model", MAX_DEPTH)
        if scan.graphs != 1:
            raise _Malformed(f"it has {scan.graphs} graphs")
    except _Malformed as error:
        raise CompatibilityError(f"{file} is not a whole ONNX model: {error}") from None
    except _Refused as error:
        raise IntegrityError(f"{file} {error}: refused, a bundle's graphs are complete in themselves") from None


class _Malformed(Exception):
    """Bytes that are not protocol buffers or not an ONNX model."""


class _Refused(Exception):
    """Content that no graph of a bundle may hold."""


class _Scan:
    def __init__(self) -> None:
        self.fields = 0
        self.graphs = 0  #: number of top-level graphs

    def check(self, message: memoryview, kind: str, left: int) -> None:
        if left == 0:
            raise _Refused("has graphs nested too deeply")
        for number, wire, value in _fields(message):
            self.fields += 1
            if self.fields > MOST_FIELDS:
                raise _Refused(f"has more than {MOST_FIELDS:,} fields")
            if number not in _KNOWN[kind]:
                raise _Malformed(f"a {kind} has a field {number}, which ONNX does not know")
            inner = _MESSAGES[kind].get(number)
            matters = inner is not None or number == _DOMAIN.get(kind) or (kind, number) == ("Tensor", _EXTERNAL_DATA)
            if matters and wire != _BYTES:
                raise _Malformed(f"field {number} of a {kind} has wire type {wire}")
            if inner in _REFUSED:
                raise _Refused(f"has {_REFUSED[inner]}")
            if inner is not None:
                self.graphs += kind == "Model" and inner == "Graph"
                assert isinstance(value, memoryview)
                self.check(value, inner, left - (inner == "Graph"))
            elif kind == "Tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)):
                raise _Refused("has external data")
            elif number == _DOMAIN.get(kind):
                assert isinstance(value, memoryview)
                domain = bytes(value[:200]).decode("utf-8", "replace")
                if domain not in DOMAINS:
                    raise _Refused(f"has operators of the domain {domain!r}")


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield (number, wire type, value) of each field; the value is an int for varints, else a view of its bytes."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at, 32)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed("a field has no number")
        if wire == _VARINT:
            value, at = _varint(message, at, 64)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at, 32)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _Malformed(f"a field has wire type {wire}")
        if size > end - at:
            raise _Malformed("it ends within a field")
        yield number, wire, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int, bits: int) -> tuple[int, int]:
    """Return (the number at this offset, the offset after it); it has at most `bits` bits and no superfluous bytes."""
    result = 0
    for shift in range(0, bits, 7):
        if at == len(message):
            raise _Malformed("it ends within a number")
        byte = message[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            if result >> bits or (byte == 0 and shift):
                break
            return result, at
    raise _Malformed(f"a number has more than {bits} bits, or is longer than it needs to be")
