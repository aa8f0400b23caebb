"""Wrappers of standard output and error that print any text and remember failures to print."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class WatchedStream:
    """A text stream that remembers its first write error, such as a full disk or a closed pipe.

    Otherwise such an error could not be distinguished from an error of another file. With `lossy`, errors are not
    raised.
    """

    def __init__(self, stream: TextIO | None, *, lossy: bool = False) -> None:
        self.failed: OSError | None = None
        self._stream, self._lossy = stream, lossy
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an unencodable name must not end a command

    def write(self, text: str) -> int:
        """Write text and return its length."""
        with self._watching():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._watching():
            if self._stream is not None:
                self._stream.flush()

    def discard(self) -> None:
        """Redirect the stream to the null device, so that the interpreter does not fail to flush it at exit."""
        if self._stream is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = self.failed or error
            if not self._lossy:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched_streams() -> Iterator[WatchedStream]:
    """Return a context with a watched standard output. Write errors of standard error are ignored."""
    before = sys.stdout, sys.stderr
    out, err = WatchedStream(sys.stdout), WatchedStream(sys.stderr, lossy=True)
    # A closed stream stays None: all code that prints handles this case.
    sys.stdout = cast(TextIO, out) if before[0] is not None else before[0]
    sys.stderr = cast(TextIO, err) if before[1] is not None else before[1]
    try:
        yield out
    finally:
        with suppress(OSError):
            out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            if stream.failed is not None:
                stream.discard()
