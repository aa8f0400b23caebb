"""The life of an opened bundle: its calls are counted, and what it holds is released when the last one has ended."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, TypeVar

from runtimes import exits, forks
from runtimes.errors import VaeError

Self = TypeVar("Self", bound="Lifetime")


class Lifetime(ABC):
    """What is opened, used from any number of threads, and closed once."""

    backend: ClassVar[str]

    def _begin_life(self) -> None:
        """From now on this belongs to this process. `VaeError` where the backend does not survive a fork."""
        self._closed = False
        self._released = False
        self._calls = 0  #: that have begun and not ended
        self._counting = threading.RLock()  # reentrant: a signal handler may close what it interrupts
        forks.watch(self)

    @abstractmethod
    def _close(self) -> None:
        """Release sessions and memory; called once, when no call is at work."""

    def _check_open(self) -> None:
        if self._closed:
            raise VaeError("this VAE was closed; open the bundle again")
        forks.check(self)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Surround a call: what it uses stays until it has ended, also where another thread closes meanwhile."""
        self._check_open()
        with self._counting:
            self._calls += 1
        try:
            self._check_open()  # once more: now nothing is released before this call has ended
            if exits.must_stop():
                raise SystemExit
            yield
        except VaeError:
            if exits.must_stop():  # it was cancelled
                raise SystemExit from None
            raise
        finally:
            with self._counting:
                self._calls -= 1
            if self._take_release():
                try:
                    self._close()
                except Exception as error:  # it is not this call that failed
                    warnings.warn(f"closing {self!r} failed: {error}", RuntimeWarning, stacklevel=4)

    def _take_release(self) -> bool:
        """Whether what a closed runtime holds is to be released now, by this thread."""
        with self._counting:
            if not self._closed or self._calls or self._released:
                return False
            self._released = True
            return True

    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def is_at_work(self) -> bool:
        """Whether a call of any thread has begun and not ended."""
        return self._calls > 0

    def close(self) -> None:
        """Release everything; using it afterwards raises.

        Calls that are at work in other threads end well, and the last of them releases. In a process forked from the
        one that opened it, nothing is released.
        """
        self._closed = True
        if not forks.is_foreign(self) and self._take_release():
            self._close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
