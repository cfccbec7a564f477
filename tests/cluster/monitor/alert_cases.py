"""What may happen to a run, as series that Prometheus would have scraped, and which alerts are to fire when.

A series is a row of parts, one after the other from the beginning: `hold(0.5, 20 * M)`, `grow(0, 1.5, H)`. A process
that starts again is another instance; where one ends Prometheus marks its series stale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

M, H = 60, 3600
NAN = math.nan


@dataclass(frozen=True)
class Part:
    """Samples for so many seconds: `value` of the seconds since the part began; None: no sample."""

    seconds: float
    value: Callable[[float], float | None]


STALE = Part(0, lambda _: None)  # the process is gone: one mark, in the place of a sample


def hold(value: float, seconds: float) -> Part:
    """The same value all the time."""
    return Part(seconds, lambda _: value)


def grow(start: float, per_s: float, seconds: float) -> Part:
    """From `start` on, so much more a second."""
    return Part(seconds, lambda t: start + per_s * t)


def stairs(start: float, by: float, every: float, seconds: float) -> Part:
    """`by` more each time that `every` seconds have passed."""
    return Part(seconds, lambda t: start + by * (t // every))


def gap(seconds: float) -> Part:
    """No samples: not there yet."""
    return Part(seconds, lambda _: None)


Series = dict[str, tuple[Part, ...]]


def written(parts: tuple[Part, ...], every: float) -> str:
    """As promtool takes them, a sample each `every` seconds."""
    found: list[str] = []
    for part in parts:
        if part is STALE:
            found.append("stale")
        for number in range(round(part.seconds / every)):
            value = part.value(number * every)
            found.append("_" if value is None else "NaN" if math.isnan(value) else f"{value:.6f}")
    return " ".join(found)


@dataclass(frozen=True)
class Fired:
    """One alert that fires: its labels beside the name and the severity, and what people read."""

    summary: str
    labels: Mapping[str, str] = field(default_factory=lambda: {"run": "teacher"})


@dataclass(frozen=True, kw_only=True)
class Case:
    """`at`: by seconds since the beginning, what fires then; nothing, where there is nothing. `alerts`: of which;
    `every`: seconds between two scrapes, and two looks at the rules."""

    name: str
    alerts: tuple[str, ...]
    series: Series
    at: Mapping[float, tuple[Fired, ...]]
    every: float = 15

    @property
    def fires(self) -> bool:
        return any(self.at.values())


def fires(alert: str, name: str, series: Series, at: Mapping[float, Fired | None], every: float = 15) -> Case:
    """It fires at some of these times, and not at others."""
    found = {when: (fired,) if fired else () for when, fired in at.items()}
    return Case(name=f"{alert}: {name}", alerts=(alert,), series=series, at=found, every=every)


def silent(alert: str, name: str, series: Series, at: tuple[float, ...] | range, every: float = 15) -> Case:
    """Nothing fires."""
    return Case(name=f"{alert}: {name}", alerts=(alert,), series=series, at=dict.fromkeys(at, ()), every=every)


def of(who: str, name: str, **labels: str) -> str:
    """A series' name and labels."""
    found = ", ".join([who, *(f'{key}="{value}"' for key, value in labels.items())])
    return f"{name}{{{found}}}"


DRIVER = 'run="teacher", role="driver", node="head", instance="head:1"'
DRIVER_AGAIN = DRIVER.replace(":1", ":2")
RANK = 'run="teacher", role="train", rank="0", node="gpu1", instance="gpu1:1"'
RANK_AGAIN = RANK.replace(":1", ":9")
OTHER = 'run="teacher", role="train", rank="1", node="gpu2", instance="gpu2:1"'
UP = of(DRIVER, "up")


def state(which: str, *parts: Part, who: str = RANK, metric: str = "fathom_rank_state") -> Series:
    """One of the states; the others are not looked at in the case."""
    return {of(who, metric, state=which): parts}


def run_state(seconds: Mapping[str, tuple[Part, ...]], who: str = DRIVER) -> Series:
    return {of(who, "fathom_run_state", state=which): parts for which, parts in seconds.items()}


def states(*row: tuple[str, float], end: bool = False, who: str = DRIVER, late: float = 0) -> Series:
    """A driver's states one after the other, all of them served all the time, and its `up`. `late`: when it begins."""
    known = ("STARTING", "RUNNING", "RECOVERING", "FAILED", "STOPPING", "SUCCEEDED", "CANCELLED")
    tail, head = (STALE,) if end else (), (gap(late),) if late else ()
    lasts = sum(seconds for _, seconds in row)
    found: Series = {
        of(who, "fathom_run_state", state=which): (*head, *(hold(which == now, s) for now, s in row), *tail)
        for which in known
    }
    return {**found, of(who, "up"): (*head, hold(1, lasts), *tail)}


LAST_STEP = "fathom_last_step_timestamp_seconds"
STALLED = (
    fires(
        "FathomStalled", "hangs in a step; the ranks' newest counts",
        {
            of(RANK, LAST_STEP): (grow(0, 1, 20 * M), hold(1200, 20 * M)),
            of(OTHER, LAST_STEP): (grow(-5, 1, 20 * M), hold(1190, 20 * M)),
            **state("step", hold(1, 40 * M)), **state("validation", hold(0, 40 * M)),
        },
        {29 * M: None, 30 * M + 45: None, 31 * M + 30: Fired("teacher has taken no step for 11m 30s")},
    ),
    fires(
        "FathomStalled", "hangs in a validation",
        {
            of(RANK, LAST_STEP): (grow(0, 1, 10 * M), hold(600, 3 * H)),
            **state("validation", hold(0, 10 * M), hold(1, 3 * H)),
        },
        {129 * M: None, 132 * M: Fired("teacher has taken no step for 2h 2m 0s")}, every=30,
    ),
    silent(
        "FathomStalled", "steps of nine minutes and a half",
        {of(RANK, LAST_STEP): (stairs(0, 570, 570, 2 * H),), **state("step", hold(1, 2 * H))},
        range(5 * M, 2 * H, 2 * M), every=30,
    ),
    silent(
        "FathomStalled", "a validation of half an hour, and a step of three minutes after it",
        {
            of(RANK, LAST_STEP): (grow(0, 1, 20 * M), hold(1200, 33 * M), grow(53 * M, 1, 20 * M)),
            **state("validation", hold(0, 20 * M), hold(1, 30 * M), hold(0, 23 * M)),
            **state("step", hold(1, 20 * M), hold(0, 30 * M), hold(1, 23 * M)),
        },
        range(20 * M, 70 * M, M),
    ),
    silent(
        "FathomStalled", "the last checkpoint takes twenty minutes, and so does the export; then the run is done",
        {
            of(RANK, LAST_STEP): (grow(0, 1, 20 * M), hold(1200, 40 * M), STALE),
            **state("saving", hold(0, 20 * M), hold(1, 20 * M), hold(0, 20 * M), STALE),
            **state("export", hold(0, 40 * M), hold(1, 20 * M), STALE),
        },
        range(20 * M, 2 * H, 2 * M),
    ),
    silent(
        "FathomStalled", "ranks that start again take twenty minutes to the first step",
        {
            of(RANK, LAST_STEP): (grow(0, 1, 20 * M), STALE),
            of(RANK_AGAIN, LAST_STEP): (gap(40 * M), grow(40 * M, 1, 20 * M)),
            **state("start", gap(21 * M), hold(1, 19 * M), hold(0, 20 * M), who=RANK_AGAIN),
        },
        range(20 * M, 60 * M, M),
    ),
)  # fmt: skip

CRASHES = [(which, s) for _ in range(8) for which, s in (("STARTING", 240), ("RUNNING", 60), ("FAILED", 15),
                                                        ("RECOVERING", 45))]  # fmt: skip
WAITS = Fired("teacher has been waiting, starting or recovering for half an hour, without a step")
NOT_RUNNING = (
    fires("FathomNotRunning", "the ranks never come up", states(("STARTING", H)), {29 * M: None, 31 * M: WAITS}),
    fires("FathomNotRunning", "they crash before their first step, again and again", states(*CRASHES),
          {29 * M: None, 31 * M: WAITS, 45 * M: WAITS}),
    fires(
        "FathomNotRunning", "at work by the driver's word, but none has taken a step",
        {**states(("STARTING", 2 * M), ("RUNNING", H)), of(RANK, "up"): (gap(2 * M), hold(1, H))},
        {29 * M: None, 31 * M: WAITS},
    ),
    silent(
        "FathomNotRunning", "the first step comes after 29 minutes",
        {**states(("STARTING", 29 * M), ("RUNNING", H)), of(RANK, "up"): (gap(28 * M), hold(1, 61 * M)),
         of(RANK, LAST_STEP): (gap(29.5 * M), grow(29.5 * M, 1, H))},
        range(25 * M, 85 * M, 5 * M),
    ),
    silent("FathomNotRunning", "ranks on other machines serve on their loopback alone",
           states(("STARTING", 10 * M), ("RUNNING", 2 * H)), range(5 * M, 2 * H, 5 * M)),
    silent(
        "FathomNotRunning", "ten minutes of recovery, three times, with steps in between",
        {
            **states(*[("RUNNING", 15 * M), ("RECOVERING", 10 * M)] * 3, ("RUNNING", 15 * M)),
            **{of(RANK.replace("gpu1:1", f"gpu1:{n}"), LAST_STEP): (gap(25 * M * n), grow(25 * M * n, 1, 15 * M), STALE)
               for n in range(4)},
        },
        range(5 * M, 90 * M, 5 * M),
    ),
    silent("FathomNotRunning", "it saves for long, and lets go of the cluster for long after it is done",
           states(("STARTING", 5 * M), ("STOPPING", 40 * M), ("SUCCEEDED", 40 * M), end=True),
           range(5 * M, 2 * H, 5 * M)),
)  # fmt: skip


def progress(pace: float, planned: float, *ends: Part, seconds: float, start: float = 0, who: str = RANK) -> Series:
    """Rank 0's steps at a pace (a second), for so long."""
    return {
        of(who, "fathom_step"): (grow(start, pace, seconds), *ends),
        of(who, "fathom_steps_planned"): (hold(planned, seconds), *ends),
        of(who, "fathom_steps_total"): (grow(0, pace, seconds), *ends),
        of(who, "up"): (hold(1, seconds), *ends),
    }


GONE = Fired("teacher is not done, and nobody is at work on it any more")
RUN_GONE = (
    fires(
        "FathomRunGone", "the driver and all are killed; after an hour it is history",
        {**states(("STARTING", M), ("RUNNING", 19 * M), end=True), **progress(0.05, 500, STALE, seconds=20 * M)},
        {15 * M: None, 29 * M: None, 31 * M: GONE, 75 * M: GONE, 82 * M: None},
    ),
    fires(
        "FathomRunGone", "it gave up before its first step",
        states(("STARTING", 5 * M), ("RECOVERING", M), ("STARTING", 5 * M), ("FAILED", 15), end=True),
        {11 * M: None, 20 * M: None, 22 * M: GONE, 73 * M: None},
    ),
    fires(
        "FathomRunGone", "four minutes before its end",
        {**states(("RUNNING", 20 * M), end=True), **progress(1, 1440, STALE, seconds=20 * M)},
        {29 * M: None, 31 * M: GONE},
    ),
    silent(
        "FathomRunGone", "done between two scrapes: seconds before, a minute and a half was left",
        {**states(("RUNNING", 20 * M), end=True), **progress(1, 1290, STALE, seconds=20 * M)},
        range(M, 90 * M, 5 * M),
    ),
    silent(
        "FathomRunGone", "done, after another driver had taken over",
        {
            **states(("RUNNING", 10 * M), end=True),
            **states(("RUNNING", 20 * M), ("SUCCEEDED", 15), end=True, who=DRIVER_AGAIN, late=12 * M),
            **progress(0.05, 500, STALE, seconds=10 * M),
            **{key: (gap(12 * M), *parts)
               for key, parts in progress(0.5, 500, STALE, seconds=20 * M, who=RANK_AGAIN).items()},
        },
        range(M, 100 * M, 5 * M),
    ),
    silent(
        "FathomRunGone", "somebody stopped it",
        {**states(("RUNNING", 20 * M), ("STOPPING", 15), end=True), **progress(0.05, 500, STALE, seconds=20 * M)},
        range(M, 90 * M, 5 * M),
    ),
    silent(
        "FathomRunGone", "another driver takes over after nine minutes",
        {**states(("RUNNING", 20 * M), end=True), **progress(0.05, 500, STALE, seconds=20 * M),
         **states(("RUNNING", H), who=DRIVER_AGAIN, late=29 * M)},
        range(M, 85 * M, 3 * M),
    ),
    silent(
        "FathomRunGone", "the driver is too busy to answer",
        {**states(("RUNNING", 20 * M), end=True), UP: (hold(1, 20 * M), hold(0, H)),
         **progress(0.05, 500, seconds=80 * M)},
        range(M, 80 * M, 5 * M),
    ),
    silent("FathomRunGone", "a run of seconds, whose ranks nobody has scraped",
           states(("STARTING", 15), ("RUNNING", 15), end=True), range(M, 80 * M, 5 * M)),
)  # fmt: skip


def waits(share: float, seconds: float, *ends: Part, who: str = RANK) -> Series:
    """Steps without a break, of which so much is waiting for data."""
    return {
        of(who, "fathom_phase_seconds_total", phase="data_wait"): (grow(0, share, seconds), *ends),
        of(who, "fathom_step_duration_seconds_sum"): (grow(0, 1, seconds), *ends),
        of(who, "up"): (hold(1, seconds), *ends),
    }


def cold(seconds: float) -> Series:
    """80 % for five minutes, then 2 %."""
    return {**waits(0, seconds), of(RANK, "fathom_phase_seconds_total", phase="data_wait"): (
        grow(0, 0.8, 5 * M), grow(240, 0.02, seconds - 5 * M))}  # fmt: skip


DATA_BOUND = (
    fires(
        "FathomDataBound", "one rank of two waits; then the run ends",
        {**waits(0.02, 30 * M, STALE), **waits(0.25, 30 * M, STALE, who=OTHER)},
        {14 * M: None, 16 * M: Fired("teacher waits for data 25% of the time"), 31 * M: None},
    ),
    silent("FathomDataBound", "19 %", waits(0.19, H), range(M, H, 5 * M)),
    silent("FathomDataBound", "the first five minutes, until the caches are warm", cold(H), range(M, H, M)),
    silent("FathomDataBound", "a run of three minutes", waits(0.6, 3 * M, STALE), range(M, H, 2 * M), every=5),
    silent(
        "FathomDataBound", "a validation of half an hour: no steps, nothing to divide by",
        {
            of(RANK, "fathom_phase_seconds_total", phase="data_wait"): (grow(0, 0.1, 20 * M), hold(120, 40 * M)),
            of(RANK, "fathom_step_duration_seconds_sum"): (grow(0, 1, 20 * M), hold(1200, 40 * M)),
            of(RANK, "up"): (hold(1, H),),
        },
        range(M, H, 5 * M),
    ),
    silent("FathomDataBound", "ranks that start again wait, for fourteen minutes in all",
           {**waits(0.3, 7 * M, STALE), **waits(0.0, H, who=RANK_AGAIN),
            of(RANK_AGAIN, "fathom_phase_seconds_total", phase="data_wait"): (gap(9 * M), hold(0, H))},
           range(M, H, 2 * M)),
)  # fmt: skip

SLOWDOWN = "fathom_rank_slowdown_ratio"
SLOW = Fired("rank 1 of teacher on gpu2 takes 1.8 times the median rank's time",
             {"run": "teacher", "rank": "1", "node": "gpu2"})  # fmt: skip
STRAGGLER = (
    fires("FathomStraggler", "one of two", {of(RANK, SLOWDOWN): (hold(1, H),), of(OTHER, SLOWDOWN): (hold(1.8, H),)},
          {9 * M: None, 11 * M: SLOW}),
    silent("FathomStraggler", "half as slow again, and no more", {of(OTHER, SLOWDOWN): (hold(1.5, H),)},
           range(M, H, 5 * M)),
    silent("FathomStraggler", "nine minutes", {of(OTHER, SLOWDOWN): (hold(1, M), hold(2.4, 9 * M), hold(1, H))},
           range(M, H, M)),
    silent("FathomStraggler", "started again elsewhere, it is slow no more",
           {of(OTHER, SLOWDOWN): (hold(1.9, 8 * M), STALE),
            of(OTHER.replace("gpu2", "gpu3"), SLOWDOWN): (gap(10 * M), hold(1, H))}, range(M, H, M)),
)  # fmt: skip

TRAINING = (*STALLED, *NOT_RUNNING, *RUN_GONE, *DATA_BOUND, *STRAGGLER)
