"""More of what may happen: processes that do not answer, labelling; and whole runs in which nothing may fire."""

from __future__ import annotations

from cluster.monitor.alerts import ALERTS
from tests.cluster.monitor.alert_cases import (
    DRIVER,
    DRIVER_AGAIN,
    OTHER,
    RANK,
    RANK_AGAIN,
    STALE,
    Case,
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
    states,
)

NAMES = tuple(alert.name for alert in ALERTS)
JOB = "label-0f3a"
LABEL_DRIVER = f'run="{JOB}", role="label-driver", node="head", instance="head:7"'
LABEL_DRIVER_TOO = LABEL_DRIVER.replace("head", "gpu9")
WORKER = f'run="{JOB}", role="label", worker="a1", node="gpu1", instance="gpu1:7"'
WORKER_TOO = f'run="{JOB}", role="label", worker="b2", node="gpu2", instance="gpu2:7"'
ON: Series = {of(LABEL_DRIVER, "up"): (hold(1, 10 * H),)}


def at_work(text: str) -> Fired:
    return Fired(text, {"run": JOB})


def down(who: str, *parts: Part) -> Series:
    return {of(who, "up", job="fathom"): parts}


def silent_one(text: str, **labels: str) -> Fired:
    return Fired(f"{text} does not answer", {**labels, "job": "fathom"})


NODE = 'role="ray", node="gpu3", instance="gpu3:1"'
TARGET_DOWN = (
    fires("FathomTargetDown", "a rank", down(OTHER, hold(1, 5 * M), hold(0, 5 * M), hold(1, M)), {
        6.5 * M: None, 8 * M: silent_one("train 1 of teacher on gpu2", run="teacher", role="train", rank="1",
                                         node="gpu2", instance="gpu2:1"), 10.5 * M: None}),
    fires("FathomTargetDown", "a driver", down(DRIVER, hold(0, 5 * M)), {
        3 * M: silent_one("driver of teacher on head", run="teacher", role="driver", node="head", instance="head:1")}),
    fires("FathomTargetDown", "a worker that labels", down(WORKER, hold(0, 5 * M)), {
        3 * M: silent_one(f"label a1 of {JOB} on gpu1", run=JOB, role="label", worker="a1", node="gpu1",
                          instance="gpu1:7")}),
    fires("FathomTargetDown", "a machine of the cluster", down(NODE, hold(0, 5 * M)), {
        3 * M: silent_one("ray on gpu3", role="ray", node="gpu3", instance="gpu3:1")}),
    silent("FathomTargetDown", "dead, and after 110 seconds forgotten",
           down(OTHER, hold(1, 5 * M), hold(0, 105), STALE), range(M, 15 * M, 30)),
    silent("FathomTargetDown", "too busy for every other scrape",
           down(OTHER, *[hold(0, 90), hold(1, 30)] * 20), range(M, 30 * M, M)),
    silent("FathomTargetDown", "none of ours", {'up{job="node", instance="gpu1:9100"}': (hold(0, H),)},
           range(M, H, 5 * M)),
)  # fmt: skip


def shards(who: str = LABEL_DRIVER, **by_state: tuple[Part, ...]) -> Series:
    return {of(who, "fathom_label_shards", state=which): parts for which, parts in by_state.items()}


def forward(*parts: Part, who: str = WORKER) -> Series:
    return {of(who, "fathom_label_phase_seconds_total", phase="forward"): parts}


STUCK = (
    fires(
        "FathomLabelStuck", "all workers died, and none comes",
        {**shards(todo=(hold(8, 10 * M), hold(10, H)), leased=(hold(2, 10 * M), hold(0, H)), done=(hold(5, 70 * M),)),
         **forward(grow(0, 0.9, 10 * M), STALE), **forward(grow(0, 0.9, 10 * M), STALE, who=WORKER_TOO)},
        {38 * M: None, 42 * M: at_work(f"{JOB} has got nowhere for half an hour, with 10 shards to do")},
    ),
    fires("FathomLabelStuck", "workers wait for a store that does not answer",
          {**shards(todo=(hold(0, H),), leased=(hold(2, H),), done=(hold(5, H),)),
           **forward(grow(0, 0.9, 10 * M), hold(540, 50 * M))},
          {38 * M: None, 42 * M: at_work(f"{JOB} has got nowhere for half an hour, with 2 shards to do")}),
    silent("FathomLabelStuck", "a shard takes three hours, a batch eight minutes",
           {**shards(todo=(hold(9, 3 * H),), leased=(hold(1, 3 * H),), done=(hold(0, 3 * H),)),
            **forward(stairs(0, 480, 480, 3 * H))}, range(M, 3 * H, 3 * M)),
    silent("FathomLabelStuck", "photographs that cannot be decoded, shard after shard",
           {**shards(todo=(hold(9, H),), leased=(hold(1, H),), done=(stairs(0, 1, 4 * M, H),)), **forward(hold(0, H))},
           range(M, H, 3 * M)),
    silent("FathomLabelStuck", "24 minutes to the first batch",
           {**shards(todo=(hold(9, H),), leased=(hold(1, H),), done=(hold(0, H),)),
            **forward(hold(0, 24 * M), grow(0, 1, 36 * M))}, range(M, H, M)),
    silent("FathomLabelStuck", "another run has the rest",
           shards(todo=(hold(0, H),), leased=(hold(0, H),), foreign=(hold(7, H),), done=(hold(5, H),)),
           range(M, H, 5 * M)),
    silent("FathomLabelStuck", "stopped with nine left",
           {**shards(todo=(hold(9, 10 * M), STALE), leased=(hold(1, 10 * M), STALE), done=(hold(5, 10 * M), STALE)),
            **forward(grow(0, 1, 10 * M), STALE)}, range(M, 2 * H, 5 * M)),
)  # fmt: skip

GIVEN_UP = (
    fires("FathomLabelGivenUp", "two by one run, one by the other; and the runs are over",
          {**shards(given_up=(hold(0, 5 * M), hold(2, 5 * M), STALE)),
           **shards(LABEL_DRIVER_TOO, given_up=(hold(1, 10 * M), STALE))},
          {M: at_work(f"shards that {JOB} has given up: 1"), 6 * M: at_work(f"shards that {JOB} has given up: 2"),
           11 * M: None}),
    silent("FathomLabelGivenUp", "none, with all the others in hand or done",
           shards(given_up=(hold(0, H),), leased=(hold(4, H),), done=(hold(90, H),)), range(M, H, 5 * M)),
)  # fmt: skip

EXPIRED = "fathom_label_leases_expired_total"
LEASES = (
    fires("FathomLabelLeasesExpire", "six, of two runs on one folder; and an hour later they are past",
          {of(LABEL_DRIVER, EXPIRED): (hold(3, 20 * M), hold(7, 2 * H)),
           of(LABEL_DRIVER_TOO, EXPIRED): (hold(0, 40 * M), hold(2, 2 * H)), **ON},
          {39 * M: None, 41 * M: at_work(f"6 leases of {JOB} ended without a word within an hour"), 82 * M: None}),
    silent("FathomLabelLeasesExpire", "five at once",
           {of(LABEL_DRIVER, EXPIRED): (hold(9, 20 * M), hold(14, 2 * H)), **ON}, range(M, 2 * H, 5 * M)),
    silent("FathomLabelLeasesExpire", "one every quarter of an hour, all day",
           {of(LABEL_DRIVER, EXPIRED): (stairs(0, 1, 15 * M, 4 * H),), **ON}, range(M, 4 * H, 7 * M), every=30),
    silent("FathomLabelLeasesExpire", "nine, and the run is over",
           {of(LABEL_DRIVER, EXPIRED): (hold(0, 20 * M), hold(9, 15), STALE),
            of(LABEL_DRIVER, "up"): (hold(1, 20 * M + 15), STALE)}, range(21 * M, 2 * H, 3 * M)),
)  # fmt: skip


def images(good: float, bad: tuple[Part, ...], seconds: float, who: str = WORKER) -> Series:
    """So many a second with a label."""
    return {of(who, "fathom_label_images_total"): (grow(0, good, seconds),),
            of(who, "fathom_label_failures_total", reason="bad_image"): bad}  # fmt: skip


FAILURES = (
    fires("FathomLabelFailures", "6 % of one worker's, and of the other's",
          {**images(0.94, (grow(0, 0.06, H),), H), **images(4.7, (grow(0, 0.3, H),), H, WORKER_TOO)},
          {9 * M: None, 12 * M: at_work(f"6% of the images of {JOB} get no label")}),
    fires("FathomLabelFailures", "all, a shard at a time",
          images(0, (gap(10 * M), stairs(100, 100, 10 * M, H)), 2 * H),
          {19 * M: None, 21 * M: at_work(f"100% of the images of {JOB} get no label")}),
    silent("FathomLabelFailures", "4.9 %", images(0.951, (grow(0, 0.049, H),), H), range(M, H, 5 * M)),
    silent("FathomLabelFailures", "a bad shard for nine minutes, in a run that goes on well",
           images(1, (gap(10 * M), hold(60, H)), 2 * H), range(M, H, M)),
    silent("FathomLabelFailures", "an hour ago", images(1, (hold(4000, 3 * H),), 3 * H), range(H, 3 * H, 7 * M)),
)  # fmt: skip


def quality(*means: tuple[float, float], who: str = WORKER, ends: tuple[Part, ...] = ()) -> Series:
    """Two images a second, so many seconds of each mean."""
    totals, total = [], 0.0
    for mean, seconds in means:
        totals.append(grow(total, 2 * mean, seconds))
        total += 2 * mean * seconds
    lasts = sum(seconds for _, seconds in means)
    return {of(who, "fathom_label_quality_sum"): (*totals, *ends),
            of(who, "fathom_label_quality_count"): (grow(0, 2, lasts), *ends),
            of(who, "up"): (hold(1, lasts), *ends)}  # fmt: skip


def dropped(to: str) -> Fired:
    return at_work(f"the labels of {JOB} have a mean quality of {to}, under 0.8 of what it was")


QUALITY = (
    fires("FathomLabelQualityDrop", "from 0.9 to 0.6; and the run is over",
          quality((0.9, H), (0.6, 50 * M), ends=(STALE,)), {80 * M: None, 100 * M: dropped("0.60"), 112 * M: None}),
    fires("FathomLabelQualityDrop", "every other quarter of an hour",
          quality((0.9, 3 * H), *[(0.4, 15 * M), (0.9, 15 * M)] * 2), {190 * M: None, 225 * M: dropped("0.65")},
          every=30),
    silent("FathomLabelQualityDrop", "from 0.9 to 0.73", quality((0.9, 3 * H), (0.73, 2 * H)), range(M, 5 * H, 9 * M),
           every=30),
    silent("FathomLabelQualityDrop", "a bad quarter of an hour", quality((0.9, 3 * H), (0.6, 15 * M), (0.9, 2 * H)),
           range(M, 5 * H, 3 * M), every=30),
    silent("FathomLabelQualityDrop", "half an hour old, with little to compare with",
           quality((0.9, 10 * M), (0.5, 25 * M)), range(M, 35 * M, M)),
    silent("FathomLabelQualityDrop", "quality is not measured",
           {key: (hold(0, 2 * H),) for key in quality((0, H)) if "quality" in key} | ON, range(M, 2 * H, 7 * M)),
)  # fmt: skip


def laptop() -> Series:
    """A run of three minutes, of which the last scrape sees nothing but that it runs."""
    ends, lasts = (gap(25), hold(1, 150), STALE), 150

    def rank(name: str, part: Part, **labels: str) -> Series:
        return {of(RANK, f"fathom_{name}", **labels): (gap(25), part, STALE)}

    return {
        **states(("STARTING", 20), ("RUNNING", 160), end=True),
        of(RANK, "up"): ends, of(RANK, "fathom_rank_state", state="step"): ends,
        **{key: value for which in ("validation", "saving") for key, value in rank(
            "rank_state", hold(0, lasts), state=which).items()},
        **rank("last_step_timestamp_seconds", grow(30, 1, lasts)),
        **rank("step", grow(2, 8, lasts)), **rank("steps_planned", hold(1240, lasts)),
        **rank("steps_total", grow(0, 8, lasts)), **rank("step_duration_seconds_sum", grow(0, 0.9, lasts)),
        **rank("phase_seconds_total", grow(5, 0.4, lasts), phase="data_wait"),
        **rank("phase_seconds_total", stairs(0, 4, 50, lasts), phase="evaluation"),
        **rank("steps_skipped_total", hold(0, lasts), reason="non_finite"), **rank("images_total", grow(0, 64, lasts)),
        **rank("loss", grow(2, -0.01, lasts), term="total"), **rank("checkpoint_interval_seconds", hold(6, lasts)),
        **rank("checkpoint_last_success_timestamp_seconds", stairs(30, 10, 10, lasts)),
        **rank("checkpoint_failures_total", hold(0, lasts)), **rank("checkpoint_bytes", hold(1e8, lasts)),
        of(DRIVER, "fathom_disk_free_bytes"): (grow(2e10, -5e6, 180), STALE),
        of(DRIVER, "fathom_disk_size_bytes"): (hold(2.5e11, 180), STALE),
        of(DRIVER, "fathom_run_elapsed_seconds"): (grow(0, 1, 180), STALE),
        of(DRIVER, "fathom_badput_seconds_total", cause="startup"): (grow(0, 1, 30), hold(30, 150), STALE),
        of(DRIVER, "fathom_restarts_total", reason="died"): (hold(0, 180), STALE),
        of(DRIVER, "fathom_device_oom_total"): (hold(0, 180), STALE),
    }  # fmt: skip


def _training(who: str, begins: float, lasts: float) -> Series:
    """An attempt of steps of 20 s: validation for ten minutes of each hour, checkpoints every half hour."""

    def rank(name: str, part: Part, **labels: str) -> Series:
        return {of(who, f"fathom_{name}", **labels): (gap(begins), part, STALE)}

    def trained(t: float) -> float:  # seconds in steps until then, in multiples of one
        return (t // H * 3000 + min(t % H, 3000)) // 20 * 20

    def validates(t: float) -> bool:
        return t % H >= 3000

    return {
        **rank("last_step_timestamp_seconds", Part(lasts, lambda t: begins + t - max(0, t % H - 3000) - t % 20)),
        **rank("rank_state", Part(lasts, lambda t: not validates(t)), state="step"),
        **rank("rank_state", Part(lasts, validates), state="validation"),
        **rank("rank_state", Part(lasts, lambda t: t % 1800 < 30), state="saving"),
        **rank("step", Part(lasts, lambda t: begins / 20 + trained(t) / 20)),
        **rank("steps_planned", hold(1000, lasts)),
        of(who, "up"): (gap(begins), hold(1, lasts), STALE),
        **rank("steps_total", Part(lasts, lambda t: trained(t) / 20)),
        **rank("step_duration_seconds_sum", Part(lasts, trained)),
        **rank("phase_seconds_total", Part(lasts, lambda t: 0.1 * trained(t)), phase="data_wait"),
        **rank("phase_seconds_total", stairs(0, 600, H, lasts), phase="evaluation"),
        **rank("images_total", Part(lasts, lambda t: 32 * trained(t))),
        **rank("steps_skipped_total", stairs(0, 1, 2 * H, lasts), reason="non_finite"),
        **rank("loss", Part(lasts, lambda t: 0.4 + (0.3 if t % 700 < 200 else 0)), term="total"),
        **rank("rank_slowdown_ratio", hold(1.1, lasts)), **rank("checkpoint_interval_seconds", hold(1800, lasts)),
        of(who, "fathom_checkpoint_last_success_timestamp_seconds"): (
            gap(begins + 1800), stairs(begins + 1800, 1800, 1800, lasts - 1800), STALE),
        **rank("checkpoint_bytes", hold(8e9, lasts)), **rank("checkpoint_failures_total", hold(0, lasts)),
    }  # fmt: skip


def _driving(who: str, begins: float, lasts: float, restarts: float) -> Series:
    def driver(name: str, part: Part, **labels: str) -> Series:
        return {of(who, f"fathom_{name}", **labels): (gap(begins), part, STALE)}

    return {
        **driver("disk_free_bytes", Part(lasts, lambda t: 60e9 - min(3, (begins + t) // 1800) * 8e9)),
        **driver("disk_size_bytes", hold(1e11, lasts)), **driver("run_elapsed_seconds", grow(begins, 1, lasts)),
        **driver("badput_seconds_total", hold(300, lasts), cause="startup"),
        **driver("badput_seconds_total", Part(lasts, lambda t: (begins + t) // H * 600), cause="evaluation"),
        **driver("badput_seconds_total", hold(700 * restarts, lasts), cause="lost_work"),
        **driver("restarts_total", hold(restarts, lasts), reason="died"), **driver("device_oom_total", hold(0, lasts)),
    }  # fmt: skip


def long() -> Series:
    """Five hours as those of a week: a rank dies after two, the driver after three and a bit; it ends well."""
    second = DRIVER_AGAIN
    return {
        **_training(RANK, 5 * M, 115 * M), **_training(OTHER, 5 * M, 115 * M),
        **_training(RANK_AGAIN, 125 * M, 59 * M), **_training(RANK.replace(":1", ":11"), 190 * M, 110 * M),
        **states(("STARTING", 5 * M), ("RUNNING", 115 * M), ("FAILED", 30), ("RECOVERING", 30), ("STARTING", 4 * M),
                 ("RUNNING", 59 * M), end=True),
        **states(("STARTING", 3 * M), ("RUNNING", 111 * M), ("SUCCEEDED", 30), end=True, who=second, late=187 * M),
        **_driving(DRIVER, 0, 184 * M, 1), **_driving(second, 187 * M, 114.5 * M, 2),
    }  # fmt: skip


def labelling() -> Series:
    """Two hours, a worker of which dies, and comes again under another name."""
    third = WORKER_TOO.replace("b2", "c3").replace(":7", ":8")
    found: Series = {of(LABEL_DRIVER, "up"): (hold(1, 2 * H), STALE)}
    for who, begins, lasts in ((WORKER, M, 119 * M), (WORKER_TOO, M, 40 * M), (third, 45 * M, 75 * M)):
        found |= images(0.8, (), lasts, who) | quality((0.62, lasts), who=who)
        found |= forward(grow(0, 0.9, lasts), who=who)
        found = {key: (gap(begins), *parts, STALE) if who in key else parts for key, parts in found.items()}
    return {
        key: parts for key, parts in found.items() if len(parts) > 2 or "head" in key
    } | shards(
        todo=(stairs(20, -1, 6 * M, 2 * H), STALE), leased=(hold(2, 40 * M), hold(1, 5 * M), hold(2, 75 * M), STALE),
        done=(stairs(0, 1, 6 * M, 2 * H), STALE), given_up=(hold(0, 2 * H), STALE),
    ) | {of(LABEL_DRIVER, EXPIRED): (hold(0, 41 * M), hold(1, 79 * M), STALE)}  # fmt: skip


def quiet(name: str, series: Series, at: range, every: float) -> Case:
    return Case(name=f"whole run: {name}", alerts=NAMES, series=series, at=dict.fromkeys(at, ()), every=every)


LABEL = (*TARGET_DOWN, *STUCK, *GIVEN_UP, *LEASES, *FAILURES, *QUALITY)
RUNS = (
    quiet("three minutes on a laptop", laptop(), range(15, 20 * M, 75), 5),
    quiet("three minutes on a laptop, scraped every half minute, and the hour after them", laptop(),
          range(30, 75 * M, 90), 30),
    quiet("hours with validation, checkpoints and restarts, and an hour after them", long(),
          range(M, 373 * M, 7 * M), 30),
    quiet("labelling, and the hour after it", labelling(), range(M, 190 * M, 7 * M), 30),
)  # fmt: skip
