"""How far a long stage is: a bar on a terminal, elsewhere now and then a line in the log."""

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

STEP = 0.05  # of the whole, between two lines
PAUSE_S = 30.0  # at most so long without a line, at least if there is news


class Progress:
    """Counts up to `total`; use it as a context manager.

    Parameters
    ----------
    total : int
        What there is to do.
    unit, label : str
        What is counted, in the plural; what is being done.
    shown : bool
        False keeps silent.
    stream : text stream or None
        Where a bar is drawn if it is a terminal; None is stderr.
    """

    def __init__(self, total: int, unit: str, label: str, *, shown: bool = True, stream: TextIO | None = None) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done = 0
        self._shown = shown and total > 0
        self._stream = sys.stderr if stream is None else stream
        self._started = self._spoke = time.monotonic()
        self._spoke_at = 0
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._started = self._spoke = time.monotonic()
        if self._shown and self._stream.isatty():
            from rich import progress as rich
            from rich.console import Console

            parts = (
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[rate]}"),
                rich.TimeRemainingColumn(),
            )
            self._bar = rich.Progress(*parts, console=Console(file=self._stream), transient=True)
            self._bar.start()
            self._bar.add_task(self.label, total=self.total, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Units a second so far."""
        return self.done / max(time.monotonic() - self._started, 1e-9)

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, rate=f"{self.rate:.1f} {self.unit}/s")
        elif self._shown:
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if self.done - self._spoke_at < STEP * self.total and now - self._spoke < PAUSE_S:
            return
        self._spoke, self._spoke_at = now, self.done
        left = (self.total - self.done) / max(self.rate, 1e-9)
        log.info(
            "%s: %d of %d %s (%.0f %%), %.1f a second, %s left",
            self.label, self.done, self.total, self.unit, 100 * self.done / self.total, self.rate, _clock(left),
        )  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
