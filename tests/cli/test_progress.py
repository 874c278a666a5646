"""Bars appear after their patience, never on stdout, and not at all for short waits."""

from __future__ import annotations

import time

import pytest

from graphopt.cli.progress import Bars, Silent, reporter


def test_a_short_stage_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Bars(patience=5) as bars:
        bars.stage("short", 3)
        bars.advance()
        bars.done()
        bars.stage("next", None)
    assert capfd.readouterr() == ("", "")


def test_a_long_stage_shows_on_stderr_alone(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Bars(patience=0.05) as bars:
        bars.stage("counting", 4)
        for _ in range(4):
            time.sleep(0.15)
            bars.advance()
    out, errors = capfd.readouterr()
    assert out == ""
    assert "counting" in errors


def test_a_bar_ends_when_work_fails() -> None:
    bars = Bars(patience=0.01)

    def work() -> None:
        with bars:
            bars.stage("failing", None)
            time.sleep(0.2)
            raise RuntimeError("work failed")

    with pytest.raises(RuntimeError, match="work failed"):
        work()
    assert bars._bar is None
    assert bars._timer is None


def test_pipes_get_silence(capfd: pytest.CaptureFixture[str]) -> None:
    found = reporter()
    assert type(found) is Silent
    with found as silent:
        silent.stage("anything", 2)
        silent.advance(2)
    assert capfd.readouterr() == ("", "")
