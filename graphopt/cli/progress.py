"""Progress bars: on stderr, only on a terminal, and only for waits over two seconds."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 2.0


class Reporter(Protocol):
    """What long work tells about itself."""

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage of so many units of work, or of unknown length."""
        ...

    def advance(self, n: int = 1) -> None:
        """Say that units of work are done."""
        ...

    def done(self) -> None:
        """End the stage."""
        ...


class Silent:
    """A reporter that shows nothing."""

    def stage(self, name: str, total: int | None) -> None:
        """Show nothing."""

    def advance(self, n: int = 1) -> None:
        """Show nothing."""

    def done(self) -> None:
        """Show nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()


class Bars(Silent):
    """A bar for each stage that lasts longer than `patience` seconds.

    A timer shows it, because the work itself may be one long call that never advances.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""
        self._total: int | None = None
        self._count = 0

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage; its bar appears once it has lasted long enough."""
        self.done()
        with self._lock:
            self._name, self._total, self._count = name, total, 0
            self._timer = threading.Timer(self.patience, self._show)
            self._timer.daemon = True
            self._timer.start()

    def advance(self, n: int = 1) -> None:
        """Move the bar."""
        with self._lock:
            self._count += n
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=self._count)

    def done(self) -> None:
        """End the stage and wipe its bar."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._bar is not None:
                self._bar.stop()
            self._timer = self._bar = self._task = None

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        with self._lock:
            if self._timer is None or self._timer is not threading.current_thread():
                return
            columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
            if self._total is not None:
                columns.insert(3, TaskProgressColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._count)
            self._bar.start()


def reporter() -> Silent:
    """Bars where someone can see them, silence elsewhere."""
    return Bars() if sys.stderr.isatty() else Silent()
