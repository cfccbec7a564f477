"""The alerts: each declared once, with the section of docs/runbook.md that says what to do. Prometheus' rules are made
of them. One whose metric is absent stays silent.
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


_RESTARTS = (
    '(sum by (run) (max by (run, reason) (fathom_restarts_total{reason!~"preempted|resized"})))[1h:1m]'
)  # one driver replaces another: a plain increase would start again with it

ALERTS = (
    Alert(
        name="FathomStalled", severity="critical", for_="1m",
        expr='time() - max by (run) (fathom_last_step_timestamp_seconds) > 600 '
             'unless on (run) max by (run) (fathom_rank_state{state="validation"}) == 1',
        what="{{ $labels.run }} has taken no step for {{ $value | humanizeDuration }}",
    ),
    Alert(
        name="FathomNotRunning", severity="warning", for_="30m",
        expr='max by (run, state) (fathom_run_state{state=~"PENDING|STARTING|RECOVERING|RESIZING"}) == 1',
        what="{{ $labels.run }} has been {{ $labels.state }} for half an hour",
    ),
    Alert(
        name="FathomDataBound", severity="warning", for_="15m",
        expr='sum by (run) (rate(fathom_phase_seconds_total{phase="data_wait"}[10m])) '
             '/ sum by (run) (rate(fathom_step_duration_seconds_sum[10m])) > 0.2',
        what="{{ $labels.run }} waits for data {{ $value | humanizePercentage }} of the time",
    ),
    Alert(
        name="FathomStraggler", severity="warning", for_="10m",
        expr="max by (run, rank, node) (fathom_rank_slowdown_ratio) > 1.5",
        what="rank {{ $labels.rank }} of {{ $labels.run }} on {{ $labels.node }} takes {{ $value | humanize }} times "
             "the median rank's time",
    ),
    Alert(
        name="FathomNonFinite", severity="critical", for_="0m",
        expr='max by (run) (increase(fathom_steps_skipped_total{reason="non_finite"}[10m])) > 5',
        what="{{ $labels.run }} has skipped {{ $value | humanize }} steps in 10 minutes for gradients that are not "
             "finite",
    ),
    Alert(
        name="FathomLossSpike", severity="warning", for_="5m",
        expr='max by (run) (fathom_loss{term="total"}) '
             '> 2 * (max by (run) (avg_over_time(fathom_loss{term="total"}[1h] offset 10m)) > 0)',
        what="the loss of {{ $labels.run }}, {{ $value | humanize }}, is over twice its mean of the last hour",
    ),
    Alert(
        name="FathomBadSamples", severity="warning", for_="10m",
        expr="sum by (run) (rate(fathom_samples_skipped_total[30m])) / sum by (run) (rate(fathom_images_total[30m])) "
             "> 0.01",
        what="{{ $value | humanizePercentage }} of the samples of {{ $labels.run }} are bad",
    ),
    Alert(
        name="FathomCheckpointOld", severity="critical", for_="5m",
        expr="time() - max by (run) (fathom_checkpoint_last_success_timestamp_seconds) "
             "> 2 * max by (run) (fathom_checkpoint_interval_seconds)",
        what="the last checkpoint of {{ $labels.run }} is {{ $value | humanizeDuration }} old, over twice the interval",
    ),
    Alert(
        name="FathomCheckpointFailed", severity="critical", for_="0m",
        expr="max by (run) (increase(fathom_checkpoint_failures_total[1h])) > 0",
        what="{{ $labels.run }} could not write a checkpoint",
    ),
    Alert(
        name="FathomRestartStorm", severity="critical", for_="0m",
        expr=f"max_over_time({_RESTARTS}) - min_over_time({_RESTARTS}) > 3",
        what="{{ $labels.run }} was restarted {{ $value | humanize }} times in an hour",
    ),
    Alert(
        name="FathomOutOfMemory", severity="warning", for_="0m",
        expr="max by (run) (max_over_time(fathom_device_oom_total[1h])) "
             "- min by (run) (min_over_time(fathom_device_oom_total[1h])) > 0",
        what="an attempt of {{ $labels.run }} ran out of memory",
    ),
    Alert(
        name="FathomGoodputLow", severity="warning", for_="30m",
        expr="max by (run) (fathom_goodput_ratio) < 0.9 and on (run) max by (run) (fathom_run_elapsed_seconds) > 7200",
        what="only {{ $value | humanizePercentage }} of the time of {{ $labels.run }} goes into steps that count",
    ),
    Alert(
        name="FathomDiskFilling", severity="critical", for_="10m",
        expr="min by (run) (predict_linear(fathom_disk_free_bytes[1h], 4 * 3600)) < 0 "
             "and on (run) min by (run) (fathom_disk_free_bytes / fathom_disk_size_bytes) < 0.5",
        what="the disk of {{ $labels.run }} will be full within four hours",
    ),
    Alert(
        name="FathomTargetDown", severity="warning", for_="2m",
        expr='up{role!=""} == 0',
        what="{{ $labels.role }} {{ $labels.rank }}{{ $labels.worker }} of {{ $labels.run }} on {{ $labels.node }} "
             "does not answer",
    ),
    Alert(
        name="FathomLabelStuck", severity="critical", for_="5m",
        expr='max by (run) (fathom_label_shards{state="leased"}) > 0 '
             'and on (run) max by (run) (delta(fathom_label_shards{state="done"}[30m])) == 0 '
             'and on (run) max by (run) (min_over_time(fathom_label_shards{state="leased"}[30m])) > 0',
        what="{{ $labels.run }} has shards at work but has finished none for half an hour",
    ),
    Alert(
        name="FathomLabelGivenUp", severity="warning", for_="0m",
        expr='max by (run) (fathom_label_shards{state="given_up"}) > 0',
        what="{{ $labels.run }} has given up {{ $value }} shards",
    ),
    Alert(
        name="FathomLabelLeasesExpire", severity="warning", for_="0m",
        expr="sum by (run) (increase(fathom_label_leases_expired_total[1h])) > 5",
        what="{{ $value | humanize }} leases of {{ $labels.run }} ended without a word within an hour",
    ),
    Alert(
        name="FathomLabelFailures", severity="warning", for_="10m",
        expr="sum by (run) (rate(fathom_label_failures_total[30m])) "
             "/ sum by (run) (rate(fathom_label_images_total[30m])) > 0.05",
        what="{{ $value | humanizePercentage }} of the images of {{ $labels.run }} get no label",
    ),
    Alert(
        name="FathomLabelQualityDrop", severity="warning", for_="15m",
        expr="sum by (run) (rate(fathom_label_quality_sum[30m])) "
             "/ sum by (run) (rate(fathom_label_quality_count[30m])) "
             "< 0.8 * sum by (run) (rate(fathom_label_quality_sum[6h] offset 30m)) "
             "/ sum by (run) (rate(fathom_label_quality_count[6h] offset 30m))",
        what="the labels of {{ $labels.run }} have a mean quality of {{ $value | humanize }}, under 0.8 of what it was",
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
