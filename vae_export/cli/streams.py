"""Standard output and error while a command runs: any text can be printed, and a failure to print is remembered."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class WatchedStream:
    """A text stream that remembers the first error of writing to it: a full disk, a reader that has gone.

    Only so can that be told from an error of another file. With `lossy`, the error is not raised.
    """

    def __init__(self, stream: TextIO | None, *, lossy: bool = False) -> None:
        self.failed: OSError | None = None
        self._stream, self._lossy = stream, lossy
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that its encoding lacks must not end a command

    def write(self, text: str) -> int:
        with self._watching():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._watching():
            if self._stream is not None:
                self._stream.flush()

    def discard(self) -> None:
        """Send what is left in the stream's buffer nowhere: the interpreter would try again at its end, and say so."""
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
    """Standard output, watched; what standard error does not take is lost, since nobody could be told."""
    before = sys.stdout, sys.stderr
    out, err = WatchedStream(sys.stdout), WatchedStream(sys.stderr, lossy=True)
    # A stream that was closed stays None: everything that prints knows this case.
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
