"""Ctrl-C and SIGTERM: work that can save its state finishes its current step first; all other work stops at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator


class Stop(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped the program: exit code 75. The same command continues the work."""


class Signals:
    """Handles Ctrl-C and SIGTERM. A signal sets `requested`; it also raises Stop, unless signals are deferred.

    Several processes stop together once they have agreed (distributed.py). Signals are then deferred except inside `raising()`.
    """

    def __init__(self) -> None:
        self.requested = False  # this process received a signal
        self._any_process: Callable[[bool], bool] | None = None
        self._agreed = False
        self._deferred = False

    def install(self) -> None:
        """Installs the handlers of this object for SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def share(self, any_process: Callable[[bool], bool]) -> None:
        """Makes this one of several processes that stop together. any_process: whether a flag is True in any process (a collective)."""
        self._any_process = any_process

    def ignore(self) -> None:
        """Ignores signals from here on, because the program exits anyway."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        if not self._deferred:
            raise Stop

    def defer(self, deferred: bool = True) -> None:
        """Sets whether signals are deferred from here on."""
        self._deferred = deferred

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers signals inside the block."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Lets a signal raise Stop inside the block. A signal that arrived earlier raises Stop on entry."""
        try:
            self._deferred = False
            if self.requested:
                raise Stop
            yield
        finally:
            self._deferred = True

    @property
    def stopping(self) -> bool:
        """Whether the program stops: with several processes, whether they have agreed to; otherwise whether a signal arrived."""
        return self._agreed if self._any_process else self.requested

    def agree(self, stopping: bool) -> None:
        """Records the decision of all processes. stopping: whether they stop; the value must be the same in all."""
        self._agreed |= stopping

    def poll(self) -> None:
        """Raises Stop if a signal arrived in this or another process. All processes must call it at the same point of the program."""
        if self._any_process:
            self.agree(self._any_process(self.requested))
        if self.stopping:
            raise Stop
