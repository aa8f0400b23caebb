"""The lifetime of an open bundle: counts its calls; after `close`, the last running call releases its resources."""

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
    """A resource that is opened, used from any number of threads, and closed once."""

    backend: ClassVar[str]

    def _begin_life(self) -> None:
        """Initialise the counters and record the owning process; raises `VaeError` if the backend was forked."""
        self._closed = False
        self._released = False
        self._calls = 0  #: number of running calls
        self._counting = threading.RLock()  # reentrant: a signal handler may close the runtime whose call it interrupts
        forks.watch(self)

    @abstractmethod
    def _close(self) -> None:
        """Release sessions and memory. Called once, when no call is running."""

    def _check_open(self) -> None:
        if self._closed:
            raise VaeError("this VAE was closed; open the bundle again")
        forks.check(self)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Count the call in this block: resources are not released before it ends, even if another thread closes."""
        self._check_open()
        with self._counting:
            self._calls += 1
        try:
            self._check_open()  # again: from here on nothing is released before this call ends
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
                except Exception as error:  # the call itself succeeded
                    warnings.warn(f"closing {self!r} failed: {error}", RuntimeWarning, stacklevel=4)

    def _take_release(self) -> bool:
        """Return whether this thread must release the resources now."""
        with self._counting:
            if not self._closed or self._calls or self._released:
                return False
            self._released = True
            return True

    def is_closed(self) -> bool:
        """Return whether `close` was called."""
        return self._closed

    def is_at_work(self) -> bool:
        """Return whether a call of any thread is running."""
        return self._calls > 0

    def close(self) -> None:
        """Close the runtime and release its resources; later calls raise `VaeError`.

        Calls that are running in other threads finish normally, and the last of them releases the resources. In a
        process forked from the one that opened the bundle, nothing is released.
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
