"""The part of `fathom report` about time: what a run's went into, when it failed and how it recovered."""

from __future__ import annotations

import bisect
import glob
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.announce import TOUCH_EVERY_S
from cluster.progress import duration_text
from cluster.telemetry import BADPUT, RESTARTS
from trainer.folder import RunFolder
from trainer.goodput import Goodput, Stretch, goodput_of
from trainer.journal import read_json_lines
from trainer.report import SVG, Page, svg_of

STEPS = "steps"  # that count; all else is badput
MOST_BINS = 240  # of the figure, whatever the run's length
_ALIVE_S = 6 * TOUCH_EVERY_S
_UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_COLOURS = {
    STEPS: "#2f8f5b", "data_wait": "#e8a33d", "checkpoint": "#4c78a8", "evaluation": "#9d7bc1", "startup": "#9fb3c8",
    "waiting": "#d5dbe1", "recovery": "#d1605e", "lost_work": "#8c2d2b", "other": "#6b7078",
}  # fmt: skip
# What the journal says -> what the mark is called, its shape and colour.
_MARKS: Mapping[str, tuple[str, str, str]] = {
    "started": ("attempt begins", "|", "#1b1f24"),
    "failed": ("failed", "X", "#b3261e"),
    "preempted": ("preempted", "v", "#c46a00"),
    "resizing": ("resized", "P", "#2f6fab"),
    "rolled_back": ("rolled back", "<", "#7b3fa0"),
    "stopped": ("stopped", "s", "#57606a"),
    "step_skipped": ("step skipped", ".", "#8a6d00"),
    "checkpoint_failed": ("checkpoint failed", "D", "#b3261e"),
}


def account(folder: str) -> Goodput:
    """What the time of the run in `folder` went into, by its files; up to now if it is at work."""
    paths = RunFolder(folder)
    journal, lines = read_json_lines(paths.journal), read_json_lines(paths.metrics)
    times = [line["time"] for line in (*journal, *lines) if isinstance(line.get("time"), int | float)]
    now = time.time() if _at_work(paths) else max(times, default=0.0)
    return goodput_of(journal, lines, now)


def add_time(page: Page, folders: Mapping[str, str]) -> None:
    """A table with a column for each run of `folders` (by name), and a figure for each."""
    found = {name: account(folder) for name, folder in folders.items()}
    if not any(one.attempts for one in found.values()):
        return
    page.heading("Time")
    page.table(["", *found], rows(list(found.values())), words=True)
    for name, one in found.items():
        if one.attempts and not one.logged:
            page.text(f"{name}: its log does not say what its time went into (no step logged, or by an older fathom).")
        elif one.stretches:
            title = f"{name}: " if len(found) > 1 else ""
            journal = read_json_lines(RunFolder(folders[name]).journal)
            page.figure(
                figure(one.stretches, journal),
                f"{title}What the time went into. Pauses between a wanted stop and the resume are left out.",
            )


def rows(found: Sequence[Goodput]) -> list[list[str]]:
    """Goodput, time by cause and restarts by reason: what is 0 in all runs is left out."""

    def part(one: Goodput, seconds: float) -> str:
        share = f" ({seconds / one.elapsed_s:.1%})" if one.elapsed_s > 0 else ""
        return f"{duration_text(seconds)}{share}" if seconds >= 0.5 else "-"

    table = [
        ["goodput", *("-" if one.ratio is None else f"{one.ratio:.1%}" for one in found)],
        ["time of the run", *(duration_text(one.elapsed_s) for one in found)],
        ["in steps that count", *(part(one, one.productive_s) if one.logged else "-" for one in found)],
    ]
    for cause in BADPUT:
        if any(one.badput_s[cause] >= 0.5 for one in found):
            table.append([cause.replace("_", " "), *(part(one, one.badput_s[cause]) for one in found)])
    table.append(["attempts", *(str(one.attempts) for one in found)])
    for reason in RESTARTS:
        if any(one.restarts[reason] for one in found):
            table.append([f"restarted: {reason.replace('_', ' ')}", *(str(one.restarts[reason]) for one in found)])
    if any(one.out_of_memory for one in found):
        table.append(["out of memory", *(str(one.out_of_memory) for one in found)])
    return table


def figure(stretches: Sequence[Stretch], journal: Sequence[Mapping[str, Any]]) -> str:
    """An SVG: shares of the time by what it went into, over the run's time, and marks for what happened."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    clock = _Clock(stretches)
    per, unit = next((one for one in _UNITS if clock.total >= one[0]), _UNITS[-1])
    edges, shares = _shares(stretches, clock)
    with rc_context(SVG):
        drawn = Figure(figsize=(8, 3.4), layout="constrained")
        axes = drawn.add_subplot()
        base = [0.0] * len(edges)
        for what, values in shares.items():
            top = [low + value for low, value in zip(base, [*values, values[-1]], strict=True)]
            axes.fill_between([edge / per for edge in edges], base, top, step="post", label=what.replace("_", " "),
                              color=_COLOURS[what], linewidth=0)  # fmt: skip
            base = top
        for event, (name, shape, colour) in _MARKS.items():
            at = [clock.at(line["time"]) / per for line in journal if line.get("event") == event and _timed(line)]
            if at:
                places = _spread(at, clock.total / per)
                axes.plot(places, [104] * len(places), shape, color=colour, markersize=6, clip_on=False,
                          label=f"{name} ({len(at)})")  # fmt: skip
        axes.set(xlabel=f"time of the run ({unit})", ylabel="share of the time (%)", xlim=(0, clock.total / per),
                 ylim=(0, 100))  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        drawn.legend(frameon=False, loc="outside upper left", ncols=4)
        return svg_of(drawn)


class _Clock:
    """Maps times to the time of the run, in which there are no pauses."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        ordered = sorted(stretches, key=lambda one: one.begin)
        self._begins = [one.begin for one in ordered]
        self._before: list[float] = []
        self._lengths = [one.end - one.begin for one in ordered]
        total = 0.0
        for length in self._lengths:
            self._before.append(total)
            total += length
        self.total = max(total, 1e-9)

    def at(self, when: float) -> float:
        """Seconds of the run until `when`."""
        place = bisect.bisect_right(self._begins, when) - 1
        if place < 0:
            return 0.0
        return self._before[place] + min(when - self._begins[place], self._lengths[place])


def _shares(stretches: Sequence[Stretch], clock: _Clock) -> tuple[list[float], dict[str, list[float]]]:
    """Edges of bins in seconds of the run, and for each of what occurs its percent of every bin."""
    count = MOST_BINS
    width = clock.total / count
    seconds = {what: [0.0] * count for what in _COLOURS}
    at = 0.0
    for one in sorted(stretches, key=lambda one: one.begin):
        end = at + one.end - one.begin
        place = min(int(at / width), count - 1)
        while at < end and place < count:
            until = end if place == count - 1 else min(end, (place + 1) * width)
            seconds[one.what][place] += max(0.0, until - at)
            at, place = until, place + 1
        at = end
    shares = {what: [100 * value / width for value in values] for what, values in seconds.items() if any(values)}
    return [number * width for number in range(count + 1)], shares


def _spread(at: Sequence[float], total: float) -> list[float]:
    """One mark where several would lie on one another."""
    return sorted({round(value / total * MOST_BINS) / MOST_BINS * total for value in at})


def _timed(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("time"), int | float) and not isinstance(line["time"], bool)


def _at_work(paths: RunFolder) -> bool:
    """Whether a process of the run has said so within the last minute."""
    for path in glob.glob(os.path.join(glob.escape(paths.telemetry), "*.json")):
        try:
            if time.time() - os.stat(path).st_mtime < _ALIVE_S:
                return True
        except OSError:
            continue
    return False
