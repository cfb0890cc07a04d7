"""Ctrl-C and SIGTERM: work that can save itself finishes its step first; anything else is left at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator


class Stop(KeyboardInterrupt):
    """Stopped by Ctrl-C or SIGTERM: exit code 75, the same command continues."""


class Signals:
    """While deferred, a signal sets `requested`; otherwise it raises Stop. Of several processes all stop together, when they have agreed
    (distributed.py): there signals are deferred except in `raising()`."""

    def __init__(self) -> None:
        self.requested = False  # this process was asked to stop
        self._any_process: Callable[[bool], bool] | None = None
        self._agreed = False
        self._deferred = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def share(self, any_process: Callable[[bool], bool]) -> None:
        """From here on this is one of several processes; any_process: whether any of them raises its flag."""
        self._any_process = any_process

    def ignore(self) -> None:
        """From here on signals change nothing: the program is ending anyway."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        if not self._deferred:
            raise Stop

    def defer(self, deferred: bool = True) -> None:
        self._deferred = deferred

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises Stop; one that came before does at once."""
        try:
            self._deferred = False
            if self.requested:
                raise Stop
            yield
        finally:
            self._deferred = True

    @property
    def stopping(self) -> bool:
        """Whether the processes stop: what they may act on."""
        return self._agreed if self._any_process else self.requested

    def agree(self, stopping: bool) -> None:
        """stopping: what all processes know by now."""
        self._agreed |= stopping

    def poll(self) -> None:
        """Raises Stop if one was asked for. Several processes agree on it: all must poll at the same point of the program."""
        if self._any_process:
            self.agree(self._any_process(self.requested))
        if self.stopping:
            raise Stop
