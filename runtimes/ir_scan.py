"""Safety check of an OpenVINO IR on its bytes, before OpenVINO parses them. Standard library only.

OpenVINO's own operators are identified by their opset. A layer of any other kind runs code that was loaded into the
process under that name, and a document type can expand to arbitrary content. The graph of a VAE needs neither.
"""

from __future__ import annotations

import re
from typing import Any
from xml.parsers import expat

from runtimes.errors import CompatibilityError, IntegrityError

_OPSET = re.compile(r"opset\d{1,3}")


def check_ir(data: bytes, file: str) -> None:
    """Check the XML of an IR; `file` is its name in messages.

    Raises `IntegrityError` for a layer outside of OpenVINO's opsets or a document type, `CompatibilityError` for bytes
    that are not a complete IR.
    """
    parser = expat.ParserCreate("utf-8")  # overrides the encoding that the file declares, as OpenVINO does
    root: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        root.append(tag) if not root else None
        if tag == "layer" and not _OPSET.fullmatch(attributes.get("version", "")):
            operator, version = attributes.get("type", "")[:200], attributes.get("version", "")[:200]
            raise _Refused(f"has a layer {operator!r} of {version!r}, which is none of OpenVINO's opsets")

    def refuse_document_type(*_: Any) -> None:
        raise _Refused("has a document type")

    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse_document_type
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise CompatibilityError(f"{file} is not a whole OpenVINO IR: {error}") from None
    except _Refused as error:
        raise IntegrityError(f"{file} {error}: refused") from None
    if root != ["net"]:
        raise CompatibilityError(f"{file} is not an OpenVINO IR: it holds <{root[0]}>")


class _Refused(Exception):
    """Content that no graph of a bundle may hold."""
