"""The four dashboards: training, labelling, data, cluster and reliability. Each row answers a question."""

from __future__ import annotations

from cluster.monitor.panels import Board, Panel, Query, Row

_R = 'run=~"$run"'
_N = 'run=~"$run",node=~"$node"'
_W = "[$__rate_interval]"
_RANKS = f'count by (run) (fathom_rank_state{{state="step",{_N}}})'
_LABELLERS = f'count by (run) (fathom_build_info{{role="label",{_N}}})'


def _of(expr: str, legend: str = "{{run}}") -> tuple[Query, ...]:
    return (Query(expr=expr, legend=legend),)


def _share(counter: str, by: str, over: str) -> str:
    """Seconds of a counter a second, by a label, for one of the processes that `over` counts."""
    return f"sum by (run, {by}) (rate({counter}{{{_N}}}{_W})) / on (run) group_left () {over}"


_DATA_WAIT = (
    f'sum by (run, rank) (rate(fathom_phase_seconds_total{{phase="data_wait",{_N}}}{_W}))'
    f" / sum by (run, rank) (rate(fathom_step_duration_seconds_sum{{{_N}}}{_W}))"
)
_IMAGES = f"sum by (run) (rate(fathom_images_total{{{_N}}}{_W}))"
_GOODPUT = Panel(
    title="Goodput", unit="ratio", kind="stat", high=1.0, empty="until a step is logged",
    help="Share of the run's time that went into steps which count, in all of its attempts. Below 0.9: the cluster "
    "dashboard says by cause what took the rest.",
    queries=_of(f"max by (run) (fathom_goodput_ratio{{{_R}}})"),
)  # fmt: skip
_SKIPPED_SAMPLES = Panel(
    title="Bad samples", unit="ratio", empty="while no sample is bad",
    help="Samples without a say in the loss, of all that came, by reason. quarantine.*.jsonl in the run's folder names "
    "them.",
    queries=_of(
        f"sum by (run, reason) (rate(fathom_samples_skipped_total{{{_N}}}{_W})) / on (run) group_left () {_IMAGES}",
        "{{run}} {{reason}}",
    ),
)  # fmt: skip
_DATA_BOUND = Panel(
    title="Waiting for data", unit="ratio", high=1.0,
    help="Share of a step in which the rank had no batch. Above 0.2 the data, not the device, sets the pace.",
    queries=_of(_DATA_WAIT, "{{run}} rank {{rank}}"),
)  # fmt: skip
_RESTARTS = Panel(
    title="Restarts", empty="while there was none",
    help="Attempts begun because an earlier one ended too soon, in the whole run, by reason. journal.jsonl says more.",
    queries=_of(f"max by (run, reason) (fathom_restarts_total{{{_R}}}) > 0", "{{run}} {{reason}}"),
)  # fmt: skip

TRAINING = Board(
    key="training", title="fathom: training", roles=("train", "driver"),
    rows=(
        Row(question="How does it stand?", panels=(
            Panel(
                title="State", kind="stat", name=True, help="Where the run is, by its journal.",
                queries=_of(f"max by (run, state) (fathom_run_state{{{_R}}}) == 1", "{{run}} {{state}}"),
            ),
            Panel(
                title="Done", kind="stat", unit="ratio", high=1.0, help="Steps taken, of those planned.",
                queries=_of(f"max by (run) (fathom_step{{{_R}}}) / max by (run) (fathom_steps_planned{{{_R}}})"),
            ),
            Panel(
                title="Time left", kind="stat", unit="seconds", empty="while no step is taken",
                help="At the pace of now; what validation and checkpoints will take is not in it.",
                queries=_of(
                    f"(max by (run) (fathom_steps_planned{{{_R}}}) - max by (run) (fathom_step{{{_R}}}))"
                    f" / (max by (run) (rate(fathom_steps_total{{{_R}}}{_W})) > 0)"
                ),
            ),
            Panel(
                title="Images/s", kind="stat", unit="images/s", help="Of all ranks together.", queries=_of(_IMAGES),
            ),
            _GOODPUT,
        )),
        Row(question="Is it learning?", panels=(
            Panel(
                title="Loss", low=None,
                help="Over the global batch at the last logged step, by term; total is the weighted sum.",
                queries=_of(f"max by (run, term) (fathom_loss{{{_R}}})", "{{run}} {{term}}"),
            ),
            Panel(
                title="Validation", low=None, empty="without validation, and before the first one",
                help="What is measured now and then.",
                queries=_of(f"max by (run, event, name) (fathom_event_result{{{_R}}})", "{{run}} {{event}} {{name}}"),
            ),
            Panel(
                title="Gradient norm", help="Before clipping, at the last logged step.",
                queries=_of(f"max by (run) (fathom_grad_norm{{{_R}}})"),
            ),
            Panel(
                title="Learning rate", help="Of the last step, by parameter group.",
                queries=_of(f"max by (run, group) (fathom_learning_rate{{{_R}}})", "{{run}} {{group}}"),
            ),
        )),
        Row(question="Is it fast?", panels=(
            Panel(title="Throughput", unit="images/s", help="Images in optimizer steps, all ranks together.",
                  queries=_of(_IMAGES)),
            Panel(
                title="Step time", unit="seconds", help="Mean, median and 95th percentile over the ranks.",
                queries=(
                    Query(legend="{{run}} mean",
                          expr=f"sum by (run) (rate(fathom_step_duration_seconds_sum{{{_N}}}{_W}))"
                               f" / sum by (run) (rate(fathom_step_duration_seconds_count{{{_N}}}{_W}))"),
                    *(Query(legend=f"{{{{run}}}} {name}",
                            expr=f"histogram_quantile({quantile}, sum by (run, le) "
                                 f"(rate(fathom_step_duration_seconds_bucket{{{_N}}}{_W})))")
                      for name, quantile in (("median", 0.5), ("95 %", 0.95))),
                ),
            ),
            Panel(
                title="Model-FLOP utilisation", unit="ratio",
                help="Arithmetic that the networks need for the images of a second, over what the devices can do: the "
                "data sheet's for a GPU, what matrix products reach for a CPU.",
                queries=_of(f"max by (run) (fathom_model_flops_utilization_ratio{{{_R}}})"),
            ),
            Panel(
                title="Slow ranks", empty="with one rank, and before the ranks have been compared",
                help="Time of a rank's own work on a sample, in multiples of the median rank's. Above 1.5 for long: "
                "look at that machine.",
                queries=_of(f"max by (run, rank) (fathom_rank_slowdown_ratio{{{_N}}})", "{{run}} rank {{rank}}"),
            ),
        )),
        Row(question="What is it waiting for?", panels=(
            Panel(
                title="Where the time goes", unit="ratio", kind="stack", high=1.0,
                help="Share of the ranks' time by phase. What is missing to 1 is start-up, logging and recovery.",
                queries=_of(_share("fathom_phase_seconds_total", "phase", _RANKS), "{{run}} {{phase}}"),
            ),
            _DATA_BOUND,
            Panel(
                title="What the ranks do now", kind="stack", help="Ranks by state.",
                queries=_of(f"sum by (run, state) (fathom_rank_state{{{_N}}}) > 0", "{{run}} {{state}}"),
            ),
        )),
        Row(question="What broke?", panels=(
            _RESTARTS,
            Panel(
                title="Skipped steps", help="Steps in this attempt whose update was not applied, by reason.",
                queries=_of(f"max by (run, reason) (fathom_steps_skipped_total{{{_R}}})", "{{run}} {{reason}}"),
            ),
            _SKIPPED_SAMPLES,
            Panel(
                title="Out of memory, lost records", help="Attempts that ran out of memory; checkpoints, log lines and "
                "calls to trackers that could not be written while the run went on.",
                queries=(
                    *_of(f"max by (run) (fathom_device_oom_total{{{_R}}})", "{{run}} out of memory"),
                    *_of(f"max by (run) (fathom_checkpoint_failures_total{{{_R}}})", "{{run}} checkpoints"),
                    *_of(f"sum by (run) (fathom_record_failures_total{{{_R}}})", "{{run}} records"),
                    *_of(f"sum by (run) (fathom_tracker_failures_total{{{_R}}})", "{{run}} trackers"),
                ),
            ),
        )),
    ),
)  # fmt: skip

_LABEL_IMAGES = f"sum by (run) (rate(fathom_label_images_total{{{_N}}}{_W}))"
LABELLING = Board(
    key="labelling", title="fathom: pseudo-labelling", roles=("label", "label-driver"),
    rows=(
        Row(question="How far is it?", panels=(
            Panel(
                title="Done", kind="stat", unit="ratio", high=1.0, help="Shards committed, by whichever run.",
                queries=_of(
                    f'max by (run) (fathom_label_shards{{state="done",{_R}}})'
                    f" / sum by (run) (max by (run, state) (fathom_label_shards{{{_R}}}))"
                ),
            ),
            Panel(
                title="Time left", kind="stat", unit="seconds", empty="until a shard is done, and when all are",
                help="At the pace of the last half hour.",
                queries=_of(
                    f'sum by (run) (max by (run, state) (fathom_label_shards{{state=~"todo|leased|foreign",{_R}}}))'
                    f' / (max by (run) (deriv(fathom_label_shards{{state="done",{_R}}}[30m])) > 0)'
                ),
            ),
            Panel(title="Images/s", kind="stat", unit="images/s", help="Committed, all workers together.",
                  queries=_of(_LABEL_IMAGES)),
            Panel(title="Workers", kind="stat", help="That can be scraped.",
                  queries=_of(f'count by (run) (up{{role="label",{_N}}} == 1)')),
            Panel(title="Given up", kind="stat",
                  help="Shards that no worker could label; `fathom label status` says why, `label retry` tries again.",
                  queries=_of(f'max by (run) (fathom_label_shards{{state="given_up",{_R}}})')),
        )),
        Row(question="Is it fast, and what is it waiting for?", panels=(
            Panel(title="Shards", kind="stack", help="By state; foreign ones are another run's.",
                  queries=_of(f"max by (run, state) (fathom_label_shards{{{_R}}})", "{{run}} {{state}}")),
            Panel(title="Throughput", unit="images/s", help="Images committed; a shard counts when it is done.",
                  queries=_of(f"sum by (run, node) (rate(fathom_label_images_total{{{_N}}}{_W}))",
                              "{{run}} {{node}}")),
            Panel(
                title="Where the time goes", unit="ratio", kind="stack", high=1.0,
                help="Share of the workers' time. read_wait: the data do not keep up; write: encoding or the store do "
                "not.",
                queries=_of(_share("fathom_label_phase_seconds_total", "phase", _LABELLERS), "{{run}} {{phase}}"),
            ),
        )),
        Row(question="Are the labels good?", panels=(
            Panel(
                title="Quality", unit="ratio", high=1.0, empty="with quality: off, and before the first shard",
                help="Agreement of an image's predictions with those of its changed copies: quantiles over images.",
                queries=tuple(
                    Query(legend=f"{{{{run}}}} {name}",
                          expr=f"histogram_quantile({quantile}, sum by (run, le) "
                               f"(rate(fathom_label_quality_bucket{{{_N}}}{_W})))")
                    for name, quantile in (("10 %", 0.1), ("median", 0.5), ("90 %", 0.9))
                ),
            ),
            Panel(
                title="Images without a label", unit="ratio", empty="while no image fails",
                help="Of all images, by reason. `fathom label status` names them.",
                queries=_of(
                    f"sum by (run, reason) (rate(fathom_label_failures_total{{{_N}}}{_W})) / on (run) group_left () "
                    f"{_LABEL_IMAGES}", "{{run}} {{reason}}",
                ),
            ),
        )),
        Row(question="What broke?", panels=(
            Panel(
                title="Lost work", help="Leases that ended without a word (a machine or a network stalled), and shards "
                "whose worker died (memory, most likely).",
                queries=(
                    *_of(f"sum by (run) (fathom_label_leases_expired_total{{{_R}}})", "{{run}} leases expired"),
                    *_of(f"sum by (run) (fathom_label_worker_deaths_total{{{_R}}})", "{{run}} workers died"),
                ),
            ),
            Panel(
                title="Double work", help="Shards given to a second worker at the end, work that came too late, and "
                "late work of other bytes, which says that the machines are unlike.",
                queries=(
                    *_of(f"sum by (run) (fathom_label_shards_speculated_total{{{_R}}})", "{{run}} speculated"),
                    *_of(f"sum by (run) (fathom_label_shards_late_total{{{_R}}})", "{{run}} late"),
                    *_of(f"sum by (run) (fathom_label_shards_differing_total{{{_R}}})", "{{run}} differing"),
                ),
            ),
        )),
    ),
)  # fmt: skip

DATA = Board(
    key="data", title="fathom: data", roles=("train",),
    rows=(
        Row(question="Do the data keep up?", panels=(
            _DATA_BOUND,
            Panel(
                title="What the loader does", unit="ratio", kind="stack", high=1.0,
                help="Share of the time of the threads that make batches. idle: batches are ready, the data keep up; "
                "read: the store is slow; decode: too few cores, or too strong a perturbation.",
                queries=_of(_share("fathom_loader_seconds_total", "stage", _RANKS), "{{run}} {{stage}}"),
            ),
            Panel(title="Throughput", unit="images/s", help="Images in optimizer steps, by machine.",
                  queries=_of(f"sum by (run, node) (rate(fathom_images_total{{{_N}}}{_W}))", "{{run}} {{node}}")),
        )),
        Row(question="What is read?", panels=(
            Panel(title="Read", unit="bytes/s", help="Bytes of shards asked for, prefetched batches included.",
                  queries=_of(f"sum by (run, node) (rate(fathom_data_read_bytes_total{{{_N}}}{_W}))",
                              "{{run}} {{node}}")),
            Panel(
                title="Local copies", unit="1/s",
                help="Reads of shards behind a URL: from a local copy, and copies that had to be made. Both are 0 for "
                "data on a disk.",
                queries=(
                    *_of(f"sum by (run) (rate(fathom_data_cache_hits_total{{{_N}}}{_W}))", "{{run}} hits"),
                    *_of(f"sum by (run) (rate(fathom_data_cache_misses_total{{{_N}}}{_W}))", "{{run}} misses"),
                ),
            ),
        )),
        Row(question="What is wrong with them?", panels=(
            _SKIPPED_SAMPLES,
            Panel(
                title="Bad samples so far", empty="while no sample is bad", help="In this attempt, by reason.",
                queries=_of(f"sum by (run, reason) (fathom_samples_skipped_total{{{_N}}})", "{{run}} {{reason}}"),
            ),
        )),
    ),
)  # fmt: skip

_GPU = "without GPUs"
CLUSTER = Board(
    key="cluster", title="fathom: cluster and reliability", roles=("train", "driver", "label", "label-driver"),
    rows=(
        Row(question="Is anything wrong now?", panels=(
            Panel(
                title="Alerts", kind="stat", name=True, empty="while nothing fires", help="What fires; docs/runbook.md "
                "says what to do.",
                queries=_of('max by (alertname, severity, run) (ALERTS{alertstate="firing"})',
                            "{{alertname}} {{run}} ({{severity}})"),
            ),
            Panel(title="Processes", kind="stat", help="That answer when they are scraped, by what they do.",
                  queries=_of('sum by (role) (up{role!="",node=~"$node"})', "{{role}}")),
            Panel(title="Silent processes", kind="stat", empty="while all answer",
                  help="Announced, but not to be scraped.",
                  queries=_of('count by (role, node) (up{role!="",node=~"$node"} == 0)', "{{role}} {{node}}")),
            Panel(title="Ranks", kind="stat", help="In the worker group.",
                  empty="while no training is on", queries=_of(f"max by (run) (fathom_world_size{{{_R}}})")),
        )),
        Row(question="What did the time go into?", panels=(
            _GOODPUT,
            Panel(
                title="Badput", unit="seconds", kind="stack", empty="while no training is on",
                help="The run's time that did not go into steps which count, by cause, since it began.",
                queries=_of(f"max by (run, cause) (fathom_badput_seconds_total{{{_R}}}) > 0", "{{run}} {{cause}}"),
            ),
            _RESTARTS,
        )),
        Row(question="What would a crash cost?", panels=(
            Panel(
                title="Age of the last checkpoint", unit="seconds", empty="until there is a checkpoint",
                help="Beside the interval at which they are to come: work since then is lost with a crash.",
                queries=(
                    *_of(f"time() - max by (run) (fathom_checkpoint_last_success_timestamp_seconds{{{_R}}})",
                         "{{run}} age"),
                    *_of(f"max by (run) (fathom_checkpoint_interval_seconds{{{_R}}})", "{{run}} interval"),
                ),
            ),
            Panel(
                title="Checkpoint time", unit="seconds", empty="until one is saved or loaded",
                help="Mean wall time of a rank's operation.",
                queries=_of(
                    f"sum by (run, op) (fathom_checkpoint_duration_seconds_sum{{{_R}}})"
                    f" / (sum by (run, op) (fathom_checkpoint_duration_seconds_count{{{_R}}}) > 0)", "{{run}} {{op}}",
                ),
            ),
            Panel(title="Checkpoint size", unit="bytes", empty="until there is a checkpoint", help="Of the last one.",
                  queries=_of(f"max by (run) (fathom_checkpoint_bytes{{{_R}}})")),
            Panel(title="Training waits for checkpoints", unit="ratio", help="Share of the ranks' time.",
                  empty="while no training is on",
                  queries=_of(f"sum by (run) (rate(fathom_checkpoint_stall_seconds_total{{{_N}}}{_W})) / {_RANKS}")),
        )),
        Row(question="Will something run full?", panels=(
            Panel(
                title="Free disk", unit="ratio", high=1.0, empty="behind a URL",
                help="Of the file system with the run's folder or the labels.",
                queries=_of(f"min by (run) (fathom_disk_free_bytes{{{_R}}} / fathom_disk_size_bytes{{{_R}}})"),
            ),
            Panel(
                title="Device memory", unit="bytes", empty="while no training is on",
                help="The largest rank's, by kind: resident in the process on a CPU; allocated, reserved and peak on a "
                "GPU; total is what the device has.",
                queries=_of(f"max by (run, kind) (fathom_device_memory_bytes{{{_N}}})", "{{run}} {{kind}}"),
            ),
            Panel(title="Memory of the machines", unit="ratio", high=1.0, empty="where Ray serves no metrics",
                  help="In use, of what they have, by Ray.",
                  queries=_of('max by (node, ip) (ray_node_mem_used{node=~"$node"} / '
                              'ray_node_mem_total{node=~"$node"})', "{{node}} {{ip}}")),
        )),
        Row(question="What do the machines do?", panels=(
            Panel(title="Processors", unit="ratio", high=1.0, empty="where Ray serves no metrics",
                  help="In use, of all cores, by Ray.",
                  queries=_of('max by (node, ip) (ray_node_cpu_utilization{node=~"$node"}) / 100',
                              "{{node}} {{ip}}")),
            Panel(title="GPUs", unit="ratio", high=1.0, empty=_GPU, help="In use, by Ray.",
                  queries=_of('max by (node, ip, GpuIndex) (ray_node_gpus_utilization{node=~"$node"}) / 100',
                              "{{node}} {{ip}} GPU {{GpuIndex}}")),
            Panel(
                title="Network", unit="bytes/s", empty="where Ray serves no metrics", help="Sent and received, by Ray.",
                queries=(
                    *_of('max by (node, ip) (ray_node_network_send_speed{node=~"$node"})', "{{node}} {{ip}} sent"),
                    *_of('max by (node, ip) (ray_node_network_receive_speed{node=~"$node"})',
                         "{{node}} {{ip}} received"),
                ),
            ),
            Panel(title="Actors", kind="stack", empty="where Ray serves no metrics", help="Ray's actors, by state.",
                  queries=_of('sum by (State) (ray_actors{Source!="executor",node=~"$node"}) > 0', "{{State}}")),
            Panel(title="Memory by program", unit="bytes", kind="stack", empty="where Ray serves no metrics",
                  help="What Ray's processes hold, its workers (our ranks) among them.",
                  queries=_of('sum by (Component) (ray_component_rss_bytes{node=~"$node"})', "{{Component}}")),
            Panel(title="Versions", kind="stat", name=True, help="What runs: more than one is worth a look.",
                  queries=_of(f"count by (version, torch, python) (fathom_build_info{{{_N}}})",
                              "fathom {{version}}, torch {{torch}}, Python {{python}}")),
        )),
    ),
)  # fmt: skip

BOARDS: dict[str, Board] = {board.key: board for board in (TRAINING, LABELLING, DATA, CLUSTER)}
