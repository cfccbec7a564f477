"""The alerts: each declared once, with the section of docs/runbook.md that says what to do. Prometheus' rules are made
of them. One whose metric is absent stays silent, and none fires for a run that has succeeded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import yaml

Severity = Literal["critical", "warning"]  # critical: the work stands still or is being lost


@dataclass(frozen=True, kw_only=True)
class Alert:
    """`expr` must hold for `for_`; `what` may use `{{ $labels.NAME }}` and `{{ $value }}`."""

    name: str
    severity: Severity
    expr: str
    for_: str
    what: str

    @property
    def section(self) -> str:
        """Of the runbook."""
        return f"docs/runbook.md#{self.name.lower()}"


# A range still holds samples of processes that are gone; of a run that has ended, there is no target.
_LIVES = " and on (run) up"


def _grown(counter: str, window: str) -> str:
    """By how much a process's counter has grown: a whole number, where increase() would extrapolate to a fraction. It
    never falls, since a process that starts again is another series."""
    return f"(max_over_time({counter}[{window}]) - min_over_time({counter}[{window}]))"


def _added(counter: str, window: str) -> str:
    """The same, for series that are born with their first count, which counts too."""
    return f"({counter} - ({counter} offset {window} or {counter} * 0))"


def _last(expr: str) -> str:
    """Of the last hour, at the newest time at which there was anything."""
    return f"last_over_time(({expr})[1h:5s])"


_AT_IT = 'max by (run) (fathom_run_state{state=~"STARTING|RUNNING|RECOVERING|RESIZING"})'
_FAILED = 'max by (run) (fathom_run_state{state="FAILED"})'
# Of the driver: one replaces another and takes the count over, so each series is not looked at by itself.
_RESTARTS = 'sum by (run) (max by (run, reason) (fathom_restarts_total{reason!~"preempted|resized"}))'
_LOST_S = 'sum by (run) (max by (run, cause) (fathom_badput_seconds_total{cause!="evaluation"}))'
# Work of now and then, which may hold up the steps for longer than any step takes.
_BUSY = 'fathom_rank_state{state=~"validation|checkpoint|saving|export"}'
_SKIPPED = 'fathom_steps_skipped_total{reason="non_finite"}'
_LOSS = 'fathom_loss{term="total"}'
# The pace jumps about, and the first step's says nothing; of a few seconds, nobody would miss a checkpoint.
_TWO_INTERVALS = "2 * clamp_min(max by (run) (quantile_over_time(0.9, fathom_checkpoint_interval_seconds[6h])), 300)"
_NO_STEP_S = "time() - max by (run) (fathom_last_step_timestamp_seconds)"
_BAD = 'fathom_samples_skipped_total{reason!="low_quality"}'  # that one is a filter that somebody has set
_FULL_S = 4 * 3600

ALERTS = (
    Alert(
        name="FathomStalled", severity="critical", for_="1m",
        expr=f"{_NO_STEP_S} > 600 unless on (run) max by (run) (max_over_time({_BUSY}[10m])) == 1 "
             f"or {_NO_STEP_S} > 7200",
        what="{{ $labels.run }} has taken no step for {{ $value | humanizeDuration }}",
    ),
    Alert(
        name="FathomNotRunning", severity="warning", for_="30m",
        # ranks that cannot be scraped are no reason, once they are at work by the driver's word
        expr='max by (run) (fathom_run_state{state=~"STOPPING|SUCCEEDED|CANCELLED"}) == 0 '
             "unless on (run) fathom_last_step_timestamp_seconds "
             'unless on (run) (min_over_time(fathom_run_state{state="RUNNING"}[2m]) == 1 '
             'unless on (run) up{role="train"})',
        what="{{ $labels.run }} has been waiting, starting or recovering for half an hour, without a step",
    ),
    Alert(
        name="FathomRunGone", severity="critical", for_="10m",
        # its last minutes may pass between two scrapes: it has not ended well if over two of them were left
        expr=f"({_last(_AT_IT)} == 1 "
             f'and on (run) {_last("max by (run) (fathom_steps_planned - fathom_step)")} '
             '> 120 * max_over_time((max by (run) (rate(fathom_steps_total{rank="0"}[2m])))[1h:1m]) '
             f"or {_last(_FAILED)} == 1) "
             'unless on (run) up{role="driver"}',
        what="{{ $labels.run }} is not done, and nobody is at work on it any more",
    ),
    Alert(
        name="FathomDataBound", severity="warning", for_="15m",
        # the slowest rank's: the others wait for it
        expr='max by (run) (sum by (run, rank) (rate(fathom_phase_seconds_total{phase="data_wait"}[10m])) '
             f"/ sum by (run, rank) (rate(fathom_step_duration_seconds_sum[10m]))) > 0.2{_LIVES}",
        what="{{ $labels.run }} waits for data {{ $value | humanizePercentage }} of the time",
    ),
    Alert(
        name="FathomStraggler", severity="warning", for_="10m",
        expr="max by (run, rank, node) (fathom_rank_slowdown_ratio) > 1.5",
        what="rank {{ $labels.rank }} of {{ $labels.run }} on {{ $labels.node }} takes "
             "{{ $value | printf `%.1f` }} times the median rank's time",
    ),
    Alert(
        name="FathomNonFinite", severity="critical", for_="0m",
        expr=f"max by (run) {_grown(_SKIPPED, '30m')} > 5{_LIVES}",
        what="{{ $labels.run }} has skipped {{ $value }} steps in half an hour for gradients that are not finite",
    ),
    Alert(
        name="FathomLossSpike", severity="warning", for_="5m",
        # medians: one NaN would make a mean NaN for an hour, one odd batch would move it
        expr=f"max by (run) (quantile_over_time(0.5, {_LOSS}[10m])) "
             f"> 2 * (max by (run) (quantile_over_time(0.5, {_LOSS}[1h] offset 10m)) > 0){_LIVES}",
        what="the loss of {{ $labels.run }}, {{ $value | printf `%.3g` }}, is over twice that of the hour before",
    ),
    Alert(
        name="FathomBadSamples", severity="warning", for_="10m",
        expr=f"sum by (run) {_added(_BAD, '30m')} / sum by (run) {_added('fathom_images_total', '30m')} > 0.005",
        what="{{ $value | humanizePercentage }} of the samples of {{ $labels.run }} are bad",
    ),
    Alert(
        name="FathomCheckpointOld", severity="critical", for_="5m",
        # validation is no part of the interval; the time in steps stands for an attempt that has no checkpoint yet
        expr="time() - max by (run) (fathom_checkpoint_last_success_timestamp_seconds) "
             f'> {_TWO_INTERVALS} + max by (run) (increase(fathom_phase_seconds_total{{phase="evaluation"}}[1h])) '
             'unless on (run) max by (run) (fathom_rank_state{state="validation"}) == 1 '
             f"or (max by (run) (fathom_step_duration_seconds_sum) > {_TWO_INTERVALS} "
             "unless on (run) fathom_checkpoint_last_success_timestamp_seconds)",
        what="{{ $labels.run }} has made no checkpoint for {{ $value | humanizeDuration }}, over twice the interval",
    ),
    Alert(
        name="FathomCheckpointFailed", severity="critical", for_="0m",
        expr=f"max by (run) {_grown('fathom_checkpoint_failures_total', '1h')} > 0{_LIVES}",
        what="{{ $labels.run }} could not write a checkpoint",
    ),
    Alert(
        name="FathomRestartStorm", severity="critical", for_="0m",
        expr=f"round(increase(({_RESTARTS})[1h:1m])) > 3{_LIVES}",
        what="{{ $labels.run }} was restarted {{ $value }} times in an hour",
    ),
    Alert(
        name="FathomOutOfMemory", severity="warning", for_="0m",
        expr=f"round(increase((max by (run) (fathom_device_oom_total))[1h:1m])) > 0{_LIVES}",
        what="an attempt of {{ $labels.run }} ran out of memory",
    ),
    Alert(
        name="FathomGoodputLow", severity="warning", for_="30m",
        # lately, as what a run has lost once it never makes good; validation is wanted
        expr=f"1 - increase(({_LOST_S})[6h:5m]) / delta((max by (run) (fathom_run_elapsed_seconds))[6h:5m]) < 0.9 "
             f"and on (run) fathom_run_elapsed_seconds offset 2h{_LIVES}",
        what="only {{ $value | humanizePercentage }} of the last hours of {{ $labels.run }} went into steps that count "
             "and validation",
    ),
    Alert(
        name="FathomDiskFilling", severity="critical", for_="20m",
        # checkpoints come in jumps, and their number grows in a run's first hour: the fall has to be a steady one
        expr="min by (run) (fathom_disk_free_bytes) "
             f"and on (run) min by (run) (predict_linear(fathom_disk_free_bytes[15m], {_FULL_S})) < 0 "
             f"and on (run) min by (run) (predict_linear(fathom_disk_free_bytes[1h], {_FULL_S})) < 0 "
             "and on (run) fathom_disk_free_bytes offset 1h "
             "and on (run) min by (run) (fathom_disk_free_bytes / fathom_disk_size_bytes) < 0.5 "
             "or min by (run) (fathom_disk_free_bytes) < 2 * max by (run) (fathom_checkpoint_bytes)",
        what="the disk of {{ $labels.run }} will soon be full: {{ $value | humanize1024 }}B are free",
    ),
    Alert(
        name="FathomTargetDown", severity="warning", for_="2m",
        expr='up{role!=""} == 0',
        what="{{ $labels.role }}{{ with $labels.rank }} {{ . }}{{ end }}{{ with $labels.worker }} {{ . }}{{ end }}"
             "{{ with $labels.run }} of {{ . }}{{ end }} on {{ $labels.node }} does not answer",
    ),
    Alert(
        name="FathomLabelStuck", severity="critical", for_="25m",
        # by the network's work: a shard may take hours, and workers that are gone hold no lease
        expr='sum by (run) (max by (run, state) (fathom_label_shards{state=~"todo|leased"})) > 0 '
             'unless on (run) increase(fathom_label_phase_seconds_total{phase="forward"}[5m]) > 0 '
             'unless on (run) changes(fathom_label_shards{state="done"}[5m]) > 0',
        what="{{ $labels.run }} has got nowhere for half an hour, with {{ $value }} shards to do",
    ),
    Alert(
        name="FathomLabelGivenUp", severity="warning", for_="0m",
        expr='max by (run) (fathom_label_shards{state="given_up"}) > 0',
        what="shards that {{ $labels.run }} has given up: {{ $value }}",
    ),
    Alert(
        name="FathomLabelLeasesExpire", severity="warning", for_="0m",
        expr=f"sum by (run) {_grown('fathom_label_leases_expired_total', '1h')} > 5{_LIVES}",
        what="{{ $value }} leases of {{ $labels.run }} ended without a word within an hour",
    ),
    Alert(
        name="FathomLabelFailures", severity="warning", for_="10m",
        expr=f"sum by (run) {_added('fathom_label_failures_total', '30m')} "
             f"/ (sum by (run) {_added('fathom_label_failures_total', '30m')} "
             f"+ sum by (run) {_added('fathom_label_images_total', '30m')}) > 0.05",
        what="{{ $value | humanizePercentage }} of the images of {{ $labels.run }} get no label",
    ),
    Alert(
        name="FathomLabelQualityDrop", severity="warning", for_="15m",
        expr="sum by (run) (rate(fathom_label_quality_sum[30m])) "
             "/ sum by (run) (rate(fathom_label_quality_count[30m])) "
             "< 0.8 * sum by (run) (rate(fathom_label_quality_sum[6h] offset 30m)) "
             f"/ sum by (run) (rate(fathom_label_quality_count[6h] offset 30m)){_LIVES}",
        what="the labels of {{ $labels.run }} have a mean quality of {{ $value | printf `%.2f` }}, under 0.8 of what "
             "it was",
    ),
)  # fmt: skip


def rules(alerts: tuple[Alert, ...] = ALERTS) -> str:
    """Prometheus' rule file."""
    found: list[dict[str, Any]] = []
    for alert in alerts:
        found.append(
            {
                "alert": alert.name,
                "expr": alert.expr,
                "for": alert.for_,
                "labels": {"severity": alert.severity},
                "annotations": {"summary": alert.what, "runbook": alert.section},
            }
        )
    return yaml.safe_dump({"groups": [{"name": "fathom", "rules": found}]}, sort_keys=False, width=10_000)
