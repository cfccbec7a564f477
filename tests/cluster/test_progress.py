from __future__ import annotations

import io

import pytest

from cluster.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_now_and_then_with_rate_and_time_left() -> None:
    now = [0.0]
    out = io.StringIO()
    with Progress("train", 1000, "steps", stream=out, clock=lambda: now[0]) as progress:
        for second in range(31):
            now[0] = float(second)
            progress.update(100 + 10 * second, loss=0.123456)
    lines = out.getvalue().splitlines()
    assert lines[0] == "train: 200/1000 steps  10 steps/s  0:01:20 left  loss 0.1235"
    assert len(lines) == 3  # at 10, 20 and 30 s; closing repeats nothing


def lines_of(updates: list[tuple[float, float]], total: float | None = 1e6) -> list[str]:
    """What is printed off a terminal for updates at (time in s, done)."""
    now = [0.0]
    out = io.StringIO()
    with Progress("train", total, "steps", stream=out, clock=lambda: now[0]) as progress:
        for at, done in updates:
            now[0] = at
            progress.update(done)
    return out.getvalue().splitlines()


def test_updates_may_be_minutes_apart() -> None:
    (*_, last) = lines_of([(0, 100), (400, 200), (800, 300)], total=1300)
    assert last == "train: 300/1300 steps  0.25 steps/s  1:06:40 left"


def test_the_rate_is_that_of_the_last_minutes() -> None:
    slow = [(float(t), float(t)) for t in range(1000)]
    fast = [(1000.0 + t / 20, 1000 + t / 2) for t in range(20 * 400)]  # twenty updates a second
    assert lines_of(slow)[-1].split("  ")[1] == "1 steps/s"
    assert lines_of([*slow, *fast])[-1].split("  ")[1] == "10 steps/s"


def test_large_counts_and_days_are_written_out() -> None:
    (*_, last) = lines_of([(0, 1_000_000), (100, 1_000_200)], total=1_484_375)
    assert last == "train: 1000200/1484375 steps  2 steps/s  2 d 19:14:47 left"
    assert lines_of([(0, 0), (60, 30)], total=None) == ["train: 30 steps  0.5 steps/s"]


def test_a_narrow_terminal_keeps_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    now, out = [0.0], Terminal()
    with Progress("teacher", 484375, "steps", stream=out, clock=lambda: now[0]) as progress:
        progress.update(10, loss=0.5)
        now[0] = 60.0  # farther apart than Rich's own memory
        progress.update(130, loss=0.5, **{"images/s": 51.25, "more": "than fits"})
    assert "130/484375 steps  2 steps/s  2 d 19:15:22 left  loss 0.5" in out.getvalue()  # in one line
    assert "fits" not in out.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with Progress("train", 10, "steps", stream=out) as progress:
        progress.update(0)
        progress.update(10, loss=1.5)
        progress.note("saved [step 10]")
    text = out.getvalue()
    assert "10/10" in text and "━━" in text
    assert "loss 1.5" in text
    assert "saved [step 10]" in text


def test_it_never_raises() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = Progress("x", None, "images", stream=Closed())
    progress.update(1.0)
    progress.update("not a number")  # type: ignore[arg-type]
    progress.note("x")
    progress.close()
    progress.close()
