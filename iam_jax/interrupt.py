"""Ctrl-C and SIGTERM: work that can save itself finishes its step first; anything else is left at once."""

import contextlib
import signal
from collections.abc import Iterator


class Stop(KeyboardInterrupt):
    """Stopped by Ctrl-C or SIGTERM: exit code 75, the same command continues."""


class Signals:
    """Inside `deferred()`, a signal sets `requested`; outside, it raises Stop."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def ignore(self) -> None:
        """From here on signals change nothing: the program is ending anyway."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        if not self._deferred:
            raise Stop

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def poll(self) -> None:
        """Raises Stop if one was asked for."""
        if self.requested:
            raise Stop
