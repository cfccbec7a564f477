"""The metrics: each declared once, in METRICS. Exporters, dashboards, alert rules, documentation and tests go by it.

Not `ray.util.metrics`: its histogram sums are bucket mid-points, and series of dead actors linger. Every process serves
its own (cluster/exporter.py); what only one process can know, or all would say alike, only that one serves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Kind = Literal["counter", "gauge", "histogram"]
# rank: every rank of a training; first-rank: rank 0 alone; driver: the process of `fathom train`; label: a worker that
# labels; label-driver: the process of `fathom label run` or `retry`
Part = Literal["rank", "first-rank", "driver", "label", "label-driver"]
ALL: tuple[Part, ...] = get_args(Part)
_Parts = Part | tuple[Part, ...]
Unit = Literal["", "seconds", "bytes", "ratio", "timestamp"]

# From a millisecond (a tiny network on a CPU) to ten minutes (a step that waits for a checkpoint or for data).
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 600.0)
_QUALITY = tuple(round(0.05 * number, 2) for number in range(1, 21))
_FROM_2020 = 1_577_836_800.0  # seconds since the epoch: an earlier time stamp is none

PHASES = ("data_wait", "forward", "loss", "backward", "optimizer", "checkpoint", "evaluation")
STAGES = ("read", "decode", "copy", "idle")  # of the thread that makes batches
STATES = ("start", "data", "step", "checkpoint", "saving", "validation", "export")  # of a rank: WorkerContext.beat
RUN_STATES = (
    "SUBMITTED", "PENDING", "STARTING", "RUNNING", "RECOVERING", "RESIZING", "STOPPING", "SUCCEEDED", "FAILED",
    "CANCELLED",
)  # fmt: skip
RESTARTS = ("died", "hung", "lost", "away", "failed", "preempted", "resized", "rolled_back", "driver")
BADPUT = ("waiting", "startup", "data_wait", "checkpoint", "evaluation", "lost_work", "recovery", "other")
LABEL_PHASES = ("read_wait", "forward", "write")
SHARDS = ("todo", "leased", "foreign", "done", "given_up")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One declaration, in base units. `labels`: the values that a label is known to take, () where anything may come;
    known ones are served from the start, at 0. `low` and `high`: what a value can be (of a histogram: one observation).
    `absent`: when there may be none of it in a run, in words; "" where it is always there."""

    kind: Kind
    help: str
    of: tuple[Part, ...]
    unit: Unit = ""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    low: float = 0.0
    high: float = math.inf
    absent: str = ""


def _parts(of: _Parts) -> tuple[Part, ...]:
    return of if isinstance(of, tuple) else (of,)


def _counter(of: _Parts, help: str, unit: Unit = "", absent: str = "", **labels: tuple[str, ...]) -> Metric:
    return Metric(kind="counter", help=help, of=_parts(of), unit=unit, labels=labels, absent=absent)


def _gauge(
    of: _Parts, help: str, unit: Unit = "", low: float = 0.0, high: float = math.inf, absent: str = "",
    **labels: tuple[str, ...],
) -> Metric:  # fmt: skip
    low = _FROM_2020 if unit == "timestamp" else low
    return Metric(kind="gauge", help=help, of=_parts(of), unit=unit, labels=labels, low=low, high=high, absent=absent)


def _histogram(
    of: _Parts, help: str, buckets: tuple[float, ...], unit: Unit, high: float = math.inf, absent: str = "",
    **labels: tuple[str, ...],
) -> Metric:  # fmt: skip
    return Metric(kind="histogram", help=help, of=_parts(of), unit=unit, labels=labels, buckets=buckets, high=high,
                  absent=absent)  # fmt: skip


_ANY: tuple[str, ...] = ()

METRICS: Mapping[str, Metric] = {
    # -- what it learns
    "fathom_step": _gauge("first-rank", "Optimizer steps that the run has taken, in all of its attempts."),
    "fathom_steps_planned": _gauge("first-rank", "Optimizer steps that the run is to take."),
    "fathom_steps_total": _counter("rank", "Optimizer steps taken by this process."),
    "fathom_images_total": _counter("rank", "Images in optimizer steps, without rows that fill up a pass."),
    "fathom_steps_skipped_total": _counter(
        "rank", "Steps whose update was not applied, by reason.", reason=("non_finite",)
    ),
    "fathom_loss": _gauge(
        "first-rank", "Loss over the global batch at the last logged step, by term; total is the weighted sum.",
        low=-math.inf, term=_ANY,
    ),
    "fathom_grad_norm": _gauge("first-rank", "Gradient norm before clipping, at the last logged step."),
    "fathom_learning_rate": _gauge("first-rank", "Learning rate of the last step, by parameter group.", group=_ANY),
    "fathom_event_result": _gauge(
        "first-rank", "Results that are measured now and then, such as a validation's.", low=-math.inf,
        absent="without validation", event=_ANY, name=_ANY,
    ),
    # -- how fast, and what it waits for
    "fathom_step_duration_seconds": _histogram("rank", "Wall time of one optimizer step.", _SECONDS, "seconds"),
    "fathom_phase_seconds_total": _counter(
        "rank", "Wall time by phase of a step and of the run; on a GPU what its stream took.", "seconds", phase=PHASES
    ),
    "fathom_last_step_timestamp_seconds": _gauge("rank", "When the last optimizer step ended.", "timestamp"),
    "fathom_rank_state": _gauge(
        "rank", "1 for what this rank is doing now, 0 for everything else.", high=1, state=STATES
    ),
    "fathom_rank_slowdown_ratio": _gauge(
        "rank", "Time of this rank's own work on a sample, over the median rank's.", "ratio",
        absent="until the driver has compared the ranks, and in a run of one rank",
    ),
    "fathom_model_flops_utilization_ratio": _gauge(
        "first-rank", "Arithmetic that the networks need for the images of a second, over what the devices can do.",
        "ratio", high=1.5,
    ),
    # -- data
    "fathom_samples_skipped_total": _counter(
        "rank", "Samples with weight 0, by reason.", absent="while no sample is bad", reason=_ANY
    ),
    "fathom_data_read_bytes_total": _counter("rank", "Bytes of shards asked for, prefetched batches included.",
                                             "bytes"),
    "fathom_data_cache_hits_total": _counter("rank", "Reads of shards behind a URL from a local copy."),
    "fathom_data_cache_misses_total": _counter("rank", "Local copies of shards that had to be made."),
    "fathom_loader_seconds_total": _counter(
        "rank", "Time of the thread that makes batches, beside the steps: reading, decoding and perturbing, waiting "
        "for the device, and idle because batches are ready.", "seconds", stage=STAGES,
    ),
    # -- memory, disks
    "fathom_device_memory_bytes": _gauge(
        "rank", "Memory of the device: resident in this process and total on a CPU; allocated, reserved, peak and "
        "total on a GPU.", "bytes", kind=_ANY,
    ),
    "fathom_disk_free_bytes": _gauge(
        ("driver", "label-driver"), "Free for this user where the run's folder or the labels are.", "bytes",
        absent="behind a URL",
    ),
    "fathom_disk_size_bytes": _gauge(
        ("driver", "label-driver"), "Size of the file system where the run's folder or the labels are.", "bytes",
        absent="behind a URL",
    ),
    # -- what broke
    "fathom_checkpoint_duration_seconds": _histogram(
        "rank", "Wall time of one checkpoint operation, by operation.", _SECONDS, "seconds",
        absent="until one is saved or loaded", op=("save", "load"),
    ),
    "fathom_checkpoint_stall_seconds_total": _counter("rank", "Time that training waited for checkpoints.", "seconds"),
    "fathom_checkpoint_failures_total": _counter(
        "first-rank", "Checkpoints that could not be written; the run went on."
    ),
    "fathom_checkpoint_last_success_timestamp_seconds": _gauge(
        "first-rank", "When the last checkpoint was complete.", "timestamp",
        absent="until there is a checkpoint",
    ),
    "fathom_checkpoint_bytes": _gauge(
        "first-rank", "Size of the last checkpoint.", "bytes", absent="until there is a checkpoint"
    ),
    "fathom_checkpoint_interval_seconds": _gauge(
        "first-rank", "Time from one checkpoint to the next, as configured and at the present pace.", "seconds",
        absent="until a step is logged",
    ),
    "fathom_record_failures_total": _counter("rank", "Log lines and previews that could not be written."),
    "fathom_tracker_failures_total": _counter(
        "first-rank", "Calls to TensorBoard or Weights & Biases that were lost, by tracker.",
        tracker=("tensorboard", "wandb"),
    ),
    "fathom_world_size": _gauge("first-rank", "Ranks in the worker group.", low=1),
    "fathom_run_state": _gauge("driver", "1 for the state that the run is in, 0 for all others.", high=1,
                               state=RUN_STATES),
    "fathom_run_attempts": _gauge("driver", "Attempts of the run so far, this one included."),
    "fathom_restarts_total": _counter("driver", "Attempts begun after an earlier one ended too soon, by reason.",
                                      reason=RESTARTS),
    "fathom_device_oom_total": _counter("driver", "Attempts that ran out of memory."),
    "fathom_run_elapsed_seconds": _gauge(
        "driver", "Time that was asked for the run: pauses between a stop and a resume are not in it.", "seconds"
    ),
    "fathom_goodput_ratio": _gauge(
        "driver", "Share of the run's time that went into steps which count.", "ratio", high=1,
        absent="until a step is logged",
    ),
    "fathom_badput_seconds_total": _counter("driver", "The run's time that did not go into steps which count, by "
                                            "cause.", "seconds", cause=BADPUT),
    # -- labelling
    "fathom_label_images_total": _counter("label", "Images pseudo-labelled and committed."),
    "fathom_label_failures_total": _counter(
        "label", "Images without a label, by reason.", absent="while no image fails", reason=_ANY
    ),
    "fathom_label_quality": _histogram(
        "label", "Agreement of the predictions of an image.", _QUALITY, "ratio", high=1, absent="with quality: off"
    ),
    "fathom_label_phase_seconds_total": _counter(
        "label", "Wall time of shards by what the worker did: wait for images, run the network, write labels.",
        "seconds", phase=LABEL_PHASES,
    ),
    "fathom_label_shards": _gauge("label-driver", "Label shards, by state.", state=SHARDS),
    "fathom_label_leases_expired_total": _counter("label-driver", "Leases of shards that ended without a word."),
    "fathom_label_shards_speculated_total": _counter("label-driver", "Shards given to a second worker at the end."),
    "fathom_label_shards_late_total": _counter("label-driver", "Shards done by somebody else when they were done."),
    "fathom_label_shards_differing_total": _counter("label-driver", "Late shards of other bytes: hardware is mixed."),
    "fathom_label_worker_deaths_total": _counter("label-driver", "Shards whose worker died."),
    # -- all
    "fathom_build_info": _gauge(ALL, "Always 1; the labels say what runs.", low=1, high=1, version=_ANY, torch=_ANY,
                                python=_ANY),
}  # fmt: skip


def make_metric(name: str, registry: CollectorRegistry) -> Any:
    """The prometheus_client object for a declared name, its known label values at 0. KeyError for any other name."""
    declared = METRICS[name]
    labels = tuple(declared.labels)
    if declared.kind == "histogram":
        metric: Any = Histogram(name, declared.help, labels, buckets=declared.buckets, registry=registry)
    else:
        metric = {"counter": Counter, "gauge": Gauge}[declared.kind](name, declared.help, labels, registry=registry)
    for values in itertools.product(*declared.labels.values()) if labels else ():
        metric.labels(*values)
    return metric


def served_by(parts: Collection[Part]) -> list[str]:
    """The names of what a process that plays these parts serves."""
    return [name for name, declared in METRICS.items() if not set(declared.of).isdisjoint(parts)]
