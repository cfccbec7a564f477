"""More of what may happen: steps without a number, checkpoints, restarts, lost time, disks."""

from __future__ import annotations

from tests.cluster.monitor.alert_cases import (
    DRIVER,
    DRIVER_AGAIN,
    NAN,
    RANK,
    RANK_AGAIN,
    STALE,
    UP,
    Fired,
    H,
    M,
    Part,
    Series,
    fires,
    gap,
    grow,
    hold,
    of,
    silent,
    stairs,
    state,
)

DAY = 24 * H
LIVES: Series = {UP: (hold(1, DAY),)}


def skipped(*parts: Part, who: str = RANK) -> Series:
    return {of(who, "fathom_steps_skipped_total", reason="non_finite"): parts}


NON_FINITE = (
    fires(
        "FathomNonFinite", "every step of two minutes, after an hour without one; the run ends",
        {**skipped(hold(0, H), stairs(1, 1, 2 * M, 11 * M), hold(6, M), STALE),
         UP: (hold(1, H + 12 * M), STALE)},
        {H + 9 * M: None, H + 11 * M: Fired("teacher has skipped 6 steps in half an hour for gradients that are not "
                                            "finite"), H + 13 * M: None},
    ),
    silent("FathomNonFinite", "five", {**skipped(hold(0, M), grow(0, 1 / M, 5 * M), hold(5, H)), **LIVES},
           range(M, H, 2 * M)),
    silent("FathomNonFinite", "four, and four after a restart",
           {**skipped(grow(0, 1 / M, 4 * M), hold(4, 4 * M), STALE),
            **skipped(gap(10 * M), grow(0, 1 / M, 4 * M), hold(4, H), who=RANK_AGAIN), **LIVES}, range(M, H, 2 * M)),
    silent("FathomNonFinite", "one every six minutes, for three hours",
           {**skipped(stairs(0, 1, 6 * M, 3 * H)), **LIVES}, range(M, 3 * H, 7 * M), every=30),
)  # fmt: skip


def losses(*parts: Part, who: str = RANK) -> Series:
    return {of(who, "fathom_loss", term="total"): parts, of(who, "fathom_loss", term="silog"): (hold(0.1, H),)}


LOSS = (
    fires(
        "FathomLossSpike", "a step without a number half an hour before; it ends when the run does",
        {**losses(hold(0.5, H), hold(NAN, 3 * M), hold(0.5, 27 * M), hold(1.1, 20 * M), STALE),
         UP: (hold(1, 110 * M), STALE)},
        {95 * M: None, 99 * M: None, 101 * M: Fired("the loss of teacher, 1.1, is over twice that of the hour before"),
         111 * M: None},
    ),
    silent("FathomLossSpike", "1.9 times as much", {**losses(hold(0.5, 90 * M), hold(0.95, H)), **LIVES},
           range(M, 150 * M, 7 * M)),
    silent("FathomLossSpike", "one odd batch in the log line of four minutes",
           {**losses(hold(0.5, 90 * M), hold(20, 4 * M), hold(0.5, H)), **LIVES}, range(80 * M, 150 * M, M)),
    silent("FathomLossSpike", "a young run, and ranks that start again",
           {**losses(grow(8, -0.01, 10 * M), hold(2, 20 * M), STALE),
            **losses(gap(35 * M), hold(3.5, 2 * M), hold(2, H), who=RANK_AGAIN), **LIVES}, range(M, 90 * M, M)),
    silent("FathomLossSpike", "no number, for an hour", {**losses(hold(0.5, 90 * M), hold(NAN, H)), **LIVES},
           range(M, 150 * M, 7 * M)),
)  # fmt: skip


def samples(bad: tuple[Part, ...], seconds: float, reason: str = "bad_image", who: str = RANK) -> Series:
    """Ten images a second."""
    return {of(who, "fathom_samples_skipped_total", reason=reason): bad,
            of(who, "fathom_images_total"): (grow(0, 10, seconds),)}  # fmt: skip


BAD = (
    fires("FathomBadSamples", "0.8 %", samples((grow(0, 0.08, H),), H),
          {9 * M: None, 12 * M: Fired("0.8% of the samples of teacher are bad")}),
    fires("FathomBadSamples", "hundreds at once, the first ones of all", samples((gap(20 * M), hold(270, H)), 2 * H),
          {29 * M: None, 40 * M: Fired("1.5% of the samples of teacher are bad"), 52 * M: None}),
    silent("FathomBadSamples", "0.45 %", samples((grow(0, 0.045, H),), H), range(M, H, 5 * M)),
    silent("FathomBadSamples", "a filter by quality", samples((grow(0, 3, H),), H, "low_quality"), range(M, H, 5 * M)),
    silent("FathomBadSamples", "a run of three minutes", samples((grow(0, 1, 3 * M), STALE), 3 * M), range(M, H, M)),
    silent("FathomBadSamples", "they came an hour ago",
           samples((hold(900, 3 * H),), 3 * H), range(2 * H, 3 * H, 7 * M)),
)  # fmt: skip

SAVED, EVERY = "fathom_checkpoint_last_success_timestamp_seconds", "fathom_checkpoint_interval_seconds"


def saves(seconds: float, interval: float, *saved: Part, validates: tuple[Part, ...] = ()) -> Series:
    return {
        of(RANK, SAVED): saved,
        of(RANK, EVERY): (hold(interval, seconds),),
        of(RANK, "fathom_phase_seconds_total", phase="evaluation"): validates or (hold(0, seconds),),
        of(RANK, "fathom_step_duration_seconds_sum"): (grow(0, 1, seconds),),
    }


def none_for(text: str) -> Fired:
    return Fired(f"teacher has made no checkpoint for {text}, over twice the interval")


PACES = {
    **saves(10 * H, 20_000, stairs(0, 20_000, 20_000, 20_000), stairs(20_000, 2000, 2000, 4 * H)),
    of(RANK, EVERY): (hold(20_000, 15_000), hold(2000, 7 * H)),
}
OLD = (
    fires("FathomCheckpointOld", "the next one does not come", saves(2 * H, 1800, hold(0, 600), hold(600, 2 * H)),
          {69 * M: None, 74 * M: None, 76 * M: none_for("1h 6m 0s")}),
    fires("FathomCheckpointOld", "this attempt has not made one", saves(2 * H, 1800, gap(M)),
          {59 * M: None, 64 * M: None, 66 * M: none_for("1h 6m 0s")}),
    silent("FathomCheckpointOld", "59 minutes, of intervals of half an hour",
           saves(5 * H, 1800, stairs(0, 59 * M, 59 * M, 5 * H)), range(M, 5 * H, 3 * M), every=30),
    silent("FathomCheckpointOld", "intervals of seconds, saves of fourteen minutes",
           saves(2 * H, 0.2, stairs(0, 840, 840, 2 * H)), range(M, 2 * H, 2 * M)),
    silent(
        "FathomCheckpointOld", "a validation of forty minutes before it is due",
        {**saves(2 * H, 1800, hold(0, 90 * M), hold(90 * M, 30 * M), validates=(hold(0, 80 * M), hold(2400, 40 * M))),
         **state("validation", hold(0, 40 * M), hold(1, 40 * M), hold(0, 40 * M))},
        range(M, 110 * M, M),
    ),
    silent("FathomCheckpointOld", "steps get ten times as fast", PACES, range(M, 9 * H, 9 * M), every=60),
    silent("FathomCheckpointOld", "a run of half an hour, which is too short for one",
           saves(1800, 3000), range(M, H, M)),
    silent("FathomCheckpointOld", "the run is done",
           {key: (*parts, STALE) for key, parts in saves(H, 1800, stairs(0, 1800, 1800, H)).items()},
           range(M, 3 * H, 9 * M), every=30),
)  # fmt: skip

FAILED = "fathom_checkpoint_failures_total"
CHECKPOINT_FAILED = (
    fires("FathomCheckpointFailed", "one, and an hour later it is past",
          {of(RANK, FAILED): (hold(0, 20 * M), hold(1, 2 * H)), **LIVES},
          {19 * M: None, 21 * M: Fired("teacher could not write a checkpoint"), 82 * M: None}),
    silent("FathomCheckpointFailed", "three in all, of which the last was an hour ago",
           {of(RANK, FAILED): (hold(3, 2 * H),), **LIVES}, range(M, 2 * H, 7 * M)),
    silent("FathomCheckpointFailed", "the run went on, and is done",
           {of(RANK, FAILED): (hold(0, 20 * M), hold(1, 10 * M), STALE), UP: (hold(1, 30 * M), STALE)},
           range(31 * M, 2 * H, 3 * M)),
)  # fmt: skip


def restarts(*parts: Part, who: str = DRIVER, reason: str = "died") -> Series:
    return {of(who, "fathom_restarts_total", reason=reason): parts}


RESTARTS = (
    fires(
        "FathomRestartStorm", "four, of which another driver counted two",
        {**restarts(hold(0, 10 * M), hold(1, 10 * M), hold(2, 5 * M), STALE),
         **restarts(gap(27 * M), hold(2, 3 * M), hold(3, 10 * M), hold(4, H), who=DRIVER_AGAIN), **LIVES},
        {39 * M: None, 42 * M: Fired("teacher was restarted 4 times in an hour"), 75 * M: None},
    ),
    silent("FathomRestartStorm", "three, by two drivers that overlap for a minute",
           {**restarts(hold(5, 10 * M), hold(6, 10 * M), hold(7, 5 * M), STALE),
            **restarts(gap(24 * M), hold(7, 6 * M), hold(8, H), who=DRIVER_AGAIN), **LIVES}, range(45, 80 * M, M)),
    silent("FathomRestartStorm", "a driver that goes on with a run of nine",
           {**restarts(gap(M), hold(9, H)), **LIVES}, range(M, H, 2 * M)),
    silent("FathomRestartStorm", "machines that come and go",
           {**restarts(stairs(0, 1, 5 * M, H), reason="preempted"),
            **restarts(stairs(0, 1, 5 * M, H), reason="resized"), **LIVES}, range(M, H, 2 * M)),
    silent("FathomRestartStorm", "begun anew under the name of a run with five",
           {**restarts(hold(5, 20 * M), STALE), **restarts(gap(25 * M), hold(0, H), who=DRIVER_AGAIN), **LIVES},
           range(M, 80 * M, 2 * M)),
    silent("FathomRestartStorm", "five, and the run is done",
           {**restarts(stairs(0, 1, 5 * M, 29 * M), STALE), UP: (hold(1, 29 * M), STALE)}, range(30 * M, 2 * H, 5 * M)),
)  # fmt: skip

OOM = "fathom_device_oom_total"
MEMORY = (
    fires("FathomOutOfMemory", "one, counted by another driver",
          {of(DRIVER, OOM): (hold(0, 20 * M), STALE), of(DRIVER_AGAIN, OOM): (gap(22 * M), hold(1, 2 * H)), **LIVES},
          {20 * M: None, 24 * M: Fired("an attempt of teacher ran out of memory"), 85 * M: None}),
    silent("FathomOutOfMemory", "a driver that goes on with a run of two",
           {of(DRIVER, OOM): (gap(M), hold(2, H)), **LIVES}, range(M, H, 2 * M)),
    silent("FathomOutOfMemory", "begun anew under the name of a run with one",
           {of(DRIVER, OOM): (hold(1, 20 * M), STALE), of(DRIVER_AGAIN, OOM): (gap(25 * M), hold(0, H)), **LIVES},
           range(M, 80 * M, 2 * M)),
    silent("FathomOutOfMemory", "the run went on with more workers, and is done",
           {of(DRIVER, OOM): (hold(0, 20 * M), hold(1, 20 * M), STALE), UP: (hold(1, 40 * M), STALE)},
           range(41 * M, 2 * H, 5 * M)),
)  # fmt: skip


def lost(seconds: float, *ends: Part, who: str = DRIVER, at: float = 0, **per_s: float) -> Series:
    """A driver's account for so long, by cause; `at`: of the run's time, when the driver began."""
    head = (gap(at),) if at else ()
    return {
        of(who, "fathom_run_elapsed_seconds"): (*head, grow(at, 1, seconds), *ends),
        of(who, "up"): (*head, hold(1, seconds), *ends),
        **{of(who, "fathom_badput_seconds_total", cause=cause): (*head, grow(rate * at, rate, seconds), *ends)
           for cause, rate in per_s.items()},
    }  # fmt: skip


GOODPUT = (
    fires(
        "FathomGoodputLow", "an eighth is lost; a second driver goes on counting",
        {**lost(5 * H, STALE, recovery=0.075, lost_work=0.05),
         **lost(4 * H, at=5 * H + 3 * M, who=DRIVER_AGAIN, recovery=0.075, lost_work=0.05)},
        {140 * M: None,
         8 * H: Fired("only 87.5% of the last hours of teacher went into steps that count and validation")}, every=60,
    ),
    silent("FathomGoodputLow", "a twelfth",
           lost(9 * H, recovery=0.05, data_wait=0.033), range(M, 9 * H, 20 * M), every=60),
    silent("FathomGoodputLow", "one driver takes the count over from another, beside which it is for six minutes",
           {**lost(5 * H + 6 * M, STALE, recovery=0.07), **lost(4 * H, at=5 * H, who=DRIVER_AGAIN, recovery=0.07)},
           range(M, 9 * H, 20 * M), every=60),
    silent("FathomGoodputLow", "a validation of a quarter of an hour every hour",
           lost(9 * H, evaluation=0.25, other=0.05), range(M, 9 * H, 20 * M), every=60),
    silent("FathomGoodputLow", "two hours and a half, of which the first ten minutes were the start",
           {**lost(150 * M), of(DRIVER, "fathom_badput_seconds_total", cause="startup"): (
               grow(0, 1, 10 * M), hold(600, 140 * M))}, range(M, 150 * M, 5 * M), every=60),
    silent("FathomGoodputLow", "a run that waited for machines before its driver began",
           {**lost(9 * H, at=5 * H, checkpoint=0.03),
            of(DRIVER, "fathom_badput_seconds_total", cause="waiting"): (gap(5 * H), hold(18_000, 9 * H))},
           range(5 * H, 14 * H, 20 * M), every=60),
    silent("FathomGoodputLow", "an hour lost, and seven hours later",
           {**lost(15 * H), of(DRIVER, "fathom_badput_seconds_total", cause="lost_work"): (
               hold(0, 3 * H), hold(H, 12 * H))}, range(10 * H, 15 * H, 20 * M), every=60),
    silent("FathomGoodputLow", "half of it lost, and done",
           lost(4 * H, STALE, other=0.5), range(4 * H + M, 9 * H, 20 * M), every=60),
)  # fmt: skip

GB = 1e9


def disk(*free: Part, size: float = 100 * GB, who: str = DRIVER, **more: tuple[Part, ...]) -> Series:
    return {of(who, "fathom_disk_free_bytes"): free, of(who, "fathom_disk_size_bytes"): (hold(size, DAY / 2),),
            **{of(RANK, f"fathom_{name}"): parts for name, parts in more.items()}}  # fmt: skip


def full(free: str, run: str = "teacher") -> Fired:
    return Fired(f"the disk of {run} will soon be full: {free} are free", {"run": run})


LABEL_DRIVER = 'run="label-0f", role="label-driver", node="head", instance="head:7"'
# Three checkpoints of 8 GB, one every half hour, then one more for two minutes while the oldest is not removed.
RAMP = (hold(60 * GB, 30 * M), hold(52 * GB, 30 * M), hold(44 * GB, 30 * M),
        *[hold(28 * GB, 2 * M), hold(36 * GB, 28 * M)] * 5)  # fmt: skip
DISK = (
    fires("FathomDiskFilling", "full in an hour and a half", disk(grow(40 * GB, -4e6, 2 * H)),
          {59 * M: None, 78 * M: None, 82 * M: full("18.92GiB")}),
    fires("FathomDiskFilling", "labels do it as well", disk(grow(40 * GB, -4e6, 2 * H), who=LABEL_DRIVER),
          {78 * M: None, 82 * M: full("18.92GiB", "label-0f")}),
    fires("FathomDiskFilling", "no room for two checkpoints",
          disk(hold(15 * GB, H), checkpoint_bytes=(gap(10 * M), hold(8 * GB, H))),
          {28 * M: None, 31 * M: full("13.97GiB")}),
    silent("FathomDiskFilling", "full in over four hours", disk(grow(40 * GB, -1.6e6, 3 * H - 200)),
           range(M, 170 * M, 7 * M)),
    silent("FathomDiskFilling", "the run's first checkpoints, and then one comes as one goes",
           disk(*RAMP, checkpoint_bytes=(gap(30 * M), hold(8 * GB, 3.5 * H))), range(M, 4 * H, 3 * M), every=30),
    silent("FathomDiskFilling", "three checkpoints in a run of twenty minutes",
           disk(grow(20 * GB, -GB / M, 3 * M), hold(17 * GB, 17 * M), STALE), range(M, H, M)),
    silent("FathomDiskFilling", "most of it is free", disk(grow(95 * GB, -8e6, 90 * M)), range(M, 90 * M, 5 * M)),
    silent("FathomDiskFilling", "less than two checkpoints while one is written",
           disk(*[hold(20 * GB, 12 * M), hold(12 * GB, 18 * M)] * 4, checkpoint_bytes=(hold(8 * GB, 2 * H),)),
           range(M, 2 * H, 3 * M)),
)  # fmt: skip

FAULTS = (*NON_FINITE, *LOSS, *BAD, *OLD, *CHECKPOINT_FAILED, *RESTARTS, *MEMORY, *GOODPUT, *DISK)
