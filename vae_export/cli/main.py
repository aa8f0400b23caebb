"""Running the command line: its exit codes, its errors, and the signals that end it.

Exit codes: 0 success, 1 a bug in this program, 2 wrong usage, 4 and up the error classes (see `runtimes.errors`),
130 and 143 interrupted (Ctrl-C, SIGTERM), 141 a reader of standard output that has gone.

With --json, an error is printed as {"error": {"class", "message", "exit_code"}}, with "measurements" where it has some.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from runtimes.cancellation import cancel_calls
from runtimes.errors import BundleError, NumericsError, VaeError
from vae_export.cli.app import app
from vae_export.cli.printing import err, measurements_table, print_error, say
from vae_export.cli.streams import watched_streams

_stopped_by: list[int] = []  #: signals that asked this process to end


def main() -> NoReturn:
    """Entry point: runs the command and turns every error into one line and an exit code; into JSON with --json."""
    with watched_streams() as stdout:
        try:
            code = _run()
            stdout.flush()
        except Exception as error:
            _exit_if_stopped()  # a library may have made another exception of it
            code = 0 if stdout.failed is not None else _report_bug(error)
        if stdout.failed is not None and code in (0, 1):  # 1: what typer makes of it
            code = _report_stdout(stdout.failed)
    sys.exit(code)


def _run() -> int:
    """Run the command -> its exit code."""
    as_json = _json_asked()
    try:
        with _heeding_signals():
            # Wrong usage: typer prints it for people.
            code = app(prog_name="vae-export", standalone_mode=not as_json)
            return code if isinstance(code, int) else 0
    except VaeError as error:
        _exit_if_stopped()  # a call that was ended says so
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
        # Wrong usage, without typer's printing. Its versions have a ClickException of their own, or that of click.
        if not as_json or not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        say(f"error: {error.format_message()}", err)
        print_error(error, error.exit_code, error.format_message())
        return int(error.exit_code)


def _json_asked() -> bool:
    """Whether errors go to standard output as well: known before the arguments are parsed, which may be what fails."""
    return "--json" in sys.argv[1:]


def _report_bug(error: Exception) -> int:
    """What this program did not foresee."""
    if os.environ.get("VAE_EXPORT_DEBUG"):
        raise error
    _complain("internal error", error)
    say("This is a bug; VAE_EXPORT_DEBUG=1 shows where.", err)
    if _json_asked():
        print_error(error, 1)
    return 1


def _report_stdout(failed: OSError) -> int:
    """The exit code where standard output takes no more; a reader that has gone wants no message."""
    if failed.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    error = BundleError(f"cannot write to standard output: {failed.strerror or failed}")
    _complain("error", error)
    return error.exit_code


def _complain(what: str, error: Exception) -> None:
    say(f"{what} ({type(error).__name__}): {str(error) or 'no message'}", err, first=what)


@contextmanager
def _heeding_signals() -> Iterator[None]:
    """SIGINT and SIGTERM call `_stop`, and end what may keep it waiting: a call at work in native code."""
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    reading, writing = os.pipe()  # Python writes each signal to it, whatever the main thread is at
    os.set_blocking(writing, False)
    left = threading.Event()

    def watch() -> None:
        while said := os.read(reading, 1):
            while said[0] in numbers and not left.wait(0.1):
                cancel_calls()  # again and again: the main thread may be just about to call
        os.close(reading)

    for number in numbers:  # SIG_IGN stays, as under nohup
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
    """On Ctrl-C and SIGTERM alike: unwind, so that nothing half-written stays behind.

    SystemExit, since versions of typer differ in what they make of KeyboardInterrupt.
    """
    _stopped_by.append(number)
    raise SystemExit(128 + number)


def _exit_if_stopped() -> None:
    if _stopped_by:
        say("interrupted; nothing was left half-written", err)
        sys.exit(128 + _stopped_by[0])
