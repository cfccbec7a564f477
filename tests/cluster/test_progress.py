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


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with Progress("train", 10, "steps", stream=out) as progress:
        progress.update(0)
        progress.update(10, loss=1.5)
        progress.note("saved [step 10]")
    text = out.getvalue()
    assert "10/10" in text
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
