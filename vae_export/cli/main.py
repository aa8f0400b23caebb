"""Run the command line: exit codes, errors and signals.

Exit codes: 0 success, 1 a bug in this program, 2 wrong usage, 4 and up the error classes (see `runtimes.errors`),
130 and 143 interrupted (Ctrl-C, SIGTERM), 141 the reader of the output has closed the pipe.

With --json, an error is printed as {"error": {"class", "message", "exit_code"}}, with "measurements" if it has any.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from runtimes.cancellation import cancel_calls
from runtimes.errors import BundleError, NumericsError, VaeError
from vae_export.cli.app import app
from vae_export.cli.printing import err, measurements_table, print_error, say
from vae_export.cli.streams import watched_streams

_CLOSED_PIPE = 128 + signal.SIGPIPE  #: exit code of a program that SIGPIPE ends, 141
_stopped_by: list[int] = []  #: signals that interrupted this process


def main() -> NoReturn:
    """Run the command; turn every error into one line (with --json, also into JSON) and an exit code."""
    with watched_streams() as stdout, _plain_warnings():
        try:
            code = _run()
            with suppress(OSError):  # `stdout` remembers it, and an error that was found before keeps its code
                stdout.flush()
        except Exception as error:
            _exit_if_stopped()  # a library may have converted the interruption to another exception
            code = 0 if stdout.failed is not None else _report_bug(error)
        if stdout.failed is not None and code in (0, 1):  # 1: the exit code of typer for it
            code = _report_stdout(stdout.failed)
    sys.exit(code)


def _run() -> int:
    """Run the command and return its exit code."""
    as_json = _json_asked()
    try:
        with _signals_handled():
            # Without --json, typer prints usage errors.
            code = app(prog_name="vae-export", standalone_mode=not as_json)
            return code if isinstance(code, int) else 0
    except VaeError as error:
        _exit_if_stopped()  # a cancelled call raises a `VaeError`
        if isinstance(error.__cause__, BrokenPipeError):
            return _CLOSED_PIPE
        if isinstance(error, NumericsError) and error.measurements:
            err.print(measurements_table(error.measurements))
        _complain("error", error)
        if as_json:
            print_error(error, error.exit_code)
        return error.exit_code
    except SystemExit as stop:
        _exit_if_stopped()
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:
        # A usage error that typer did not print. Versions of typer raise their own ClickException or that of click.
        if not as_json or not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        say(f"error: {error.format_message()}", err)
        print_error(error, error.exit_code, error.format_message())
        return int(error.exit_code)


def _json_asked() -> bool:
    """Return whether --json is given. Needed before the arguments are parsed, because parsing may fail."""
    return "--json" in sys.argv[1:]


def _report_bug(error: Exception) -> int:
    """Print an unexpected error and return exit code 1; with VAE_EXPORT_DEBUG set, raise it."""
    if os.environ.get("VAE_EXPORT_DEBUG"):
        raise error
    _complain("internal error", error)
    say("This is a bug; VAE_EXPORT_DEBUG=1 shows where.", err)
    if _json_asked():
        print_error(error, 1)
    return 1


def _report_stdout(failed: OSError) -> int:
    """Report a write error of standard output, silently for a closed pipe, and return the exit code."""
    if failed.errno == errno.EPIPE:
        return _CLOSED_PIPE
    error = BundleError(f"cannot write to standard output: {failed.strerror or failed}")
    _complain("error", error)
    return error.exit_code


def _complain(what: str, error: Exception) -> None:
    say(f"{what} ({type(error).__name__}): {str(error) or 'no message'}", err, first=what)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Return a context that prints each Python warning as one line, `warning: TEXT`, on standard error."""
    before = warnings.showwarning

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {' '.join(str(message).split())}", err)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def _signals_handled() -> Iterator[None]:
    """Return a context in which SIGINT and SIGTERM call `_stop` and cancel running calls in native code."""
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    reading, writing = os.pipe()  # Python writes each signal to it, whatever the main thread is doing
    os.set_blocking(writing, False)
    left = threading.Event()

    def watch() -> None:
        while received := os.read(reading, 1):
            while received[0] in numbers and not left.wait(0.1):
                cancel_calls()  # repeatedly: the main thread may be just about to start a call
        os.close(reading)

    for number in numbers:  # ignored signals stay ignored, as under nohup
        signal.signal(number, _stop)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.close(writing)


def _stop(number: int, _: object) -> NoReturn:
    """Unwind the stack on SIGINT or SIGTERM, so that no partial files are left behind.

    Raises SystemExit, because versions of typer differ in their handling of KeyboardInterrupt.
    """
    _stopped_by.append(number)
    raise SystemExit(128 + number)


def _exit_if_stopped() -> None:
    if _stopped_by:
        say("interrupted; nothing was left half-written", err)
        sys.exit(128 + _stopped_by[0])
