"""Progress on a terminal and in a log."""

import io
import logging

import pytest

from wsipipe import progress as module
from wsipipe.progress import Progress


class Clock:
    """A clock that goes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_gets_a_line_every_few_percent(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(1000, "tiles", "maps of s1", stream=io.StringIO()) as bar:
        for _ in range(500):
            clock.now += 0.1
            bar.advance(2)
    assert len(caplog.messages) == 20
    assert caplog.messages[9] == "maps of s1: 500 of 1000 tiles (50 %), 20.0 a second, 0:00:25 left"


def test_a_slow_stage_says_every_half_minute_that_it_lives(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(100_000, "tiles", "maps", stream=io.StringIO()) as bar:
        for _ in range(12):
            clock.now += 10
            bar.advance()
    assert len(caplog.messages) == 4
    assert "277:" in caplog.messages[-1]


def test_silence_is_kept_on_demand_and_where_there_is_nothing_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        with Progress(10, "tiles", "maps", shown=False) as bar:
            bar.advance(10)
        with Progress(0, "tiles", "maps"):
            pass
    assert not caplog.messages
    assert bar.done == 10


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO), Progress(10, "tiles", "maps", stream=terminal) as bar:
        bar.advance(4)
        assert bar._bar is not None
        bar._bar.refresh()
    assert "4/10" in terminal.getvalue()
    assert "tiles/s" in terminal.getvalue()
    assert not caplog.messages
