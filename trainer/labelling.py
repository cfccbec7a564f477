"""Offline pseudo-labelling: one image shard in, one label shard out, committed or not there.

The driver: it settles what is to be done and under which name, starts workers (trainer/label_worker.py) on a leased
pool, and clears up. A run that was stopped, or joined later by another, skips what the ledger says is done.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster import storage
from cluster.claims import FOLDER as CLAIMS
from cluster.claims import alone, read_claims
from cluster.exporter import Exporter
from cluster.lease_actor import View
from cluster.leased_pool import Need, run_leased
from cluster.remote import warn
from cluster.stop import StopFlag
from cluster.telemetry import SHARDS
from dataio.dataset import Dataset
from dataio.label_codec import EXTENSIONS, check_available
from dataio.labels import INFO_NAME, LABEL_FORMAT, WORKING, LabelStore, plan_digest
from dataio.spec import DataError
from model.presets import Preset
from trainer.config import ConfigError, parse_config
from trainer.config_label import LabelCluster, LabelConfig
from trainer.vitals import watch_disk

_STALE = 2  # times the length of a lease: a temporary file that nobody has written to for so long


@dataclass(frozen=True, kw_only=True)
class LabelOutcome:
    """`folder` is the sidecar to name in a training configuration; `stopped` the reason of an early stop.

    `images`, `failed` (without a label) and `differing` (other bytes than another worker's, for the same shard) count
    what this run did; `given_up` are shards that could not be labelled, with the reason.
    """

    folder: str
    shards: int
    images: int
    failed: int
    seconds: float
    differing: int = 0
    given_up: Mapping[str, str] = field(default_factory=dict)
    stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class LabelProgress:
    """How a run stands: shards by state, of all runs together, and images of this one."""

    done: int
    total: int
    leased: int
    failed: int
    images: int
    others: int  # runs that work on the same labels
    trouble: str | None  # what a store said that does not answer


@dataclass
class Listing:
    """The shards that need no work: all of the ledger at first, then what has come in.

    An entry that does not fit its tar is found at the first look, which is the thorough one, and stays out.
    """

    store: str
    _damaged: set[str] | None = None

    def __call__(self) -> Collection[str]:
        store = LabelStore.open(self.store)
        if self._damaged is None:
            done = store.done_stems()
            self._damaged = set(store.committed()) - done
            return done
        return set(store.committed()) - self._damaged


def run_labelling(
    config: LabelConfig,
    *,
    on_progress: Callable[[LabelProgress], None] | None = None,
    stop: StopFlag | None = None,
) -> LabelOutcome:
    """Label every shard that has no ledger entry yet; `on_progress` twice a second.

    Raises WeightsError, DataError, StorageError or ConfigError for what the user can mend.
    """
    check_available(EXTENSIONS[config.encoding])
    dataset, teacher = Dataset.open(config.dataset), read_teacher(config)
    description = describe(config, dataset, teacher)
    root = config.out or storage.join(config.dataset, "labels")
    store = LabelStore.create(storage.join(root, plan_digest(description)), description)
    if not store.heeds_condition():
        warn(
            f"{store.path}: this store overwrites what is there although it is asked not to (If-None-Match): let no "
            "two runs work on it at once"
        )
    make = functools.partial(make_labeller, config.model_dump(mode="json"), store.path, dataset)
    job = Job(store, [shard.stem for shard in dataset.shards], make, listed=Listing(store.path))
    return work_on(config, job, preset=teacher.preset, on_progress=on_progress, stop=stop)


@dataclass(frozen=True)
class Job:
    """Shards to be worked on in one store. `make(owner)` is called in a worker, `listed` in the lease actor."""

    store: LabelStore
    stems: Sequence[str]
    make: Callable[[str], Any]
    listed: Callable[[], Collection[str]]


def work_on(
    config: LabelConfig,
    job: Job,
    *,
    preset: Preset | None = None,
    on_progress: Callable[[LabelProgress], None] | None = None,
    stop: StopFlag | None = None,
) -> LabelOutcome:
    """Have the shards of a job processed, and clear up. `preset`: the teacher's, where it is known."""
    began, stop, store = time.monotonic(), stop or StopFlag(), job.store
    claims = storage.join(store.path, CLAIMS)
    account = _Account(len(job.stems), on_progress)
    done = set(job.listed())
    if not done.issuperset(job.stems):
        need = need_of(config, preset or read_teacher(config).preset)
        _sweep(store, config.cluster.lease_s)
        with exporter(store, "label-driver", config.cluster) as account.exporter:
            if not storage.is_url(store.path):
                watch_disk(account.exporter, store.path)
            result = run_leased(
                job.make,
                job.stems,
                listed=job.listed,
                claims=claims,
                need=need,
                workers=config.cluster.workers or workers_here(config, need),
                on_look=account.on_look,
                stop=stop,
                address=config.cluster.address,
                ttl_s=config.cluster.lease_s,
                telemetry=_discovery(store, config.cluster),
            )
            account.on_look(replace(result.view, results=[], late=[]))
            if stop.reason is None:
                account.exporter.last_word()
    left = len(job.stems) - account.done - len(account.given_up)
    if not left and alone(claims, config.cluster.lease_s, lambda: stop.reason is not None):
        _clear_up(store)
    return LabelOutcome(
        folder=store.path,
        shards=account.done,
        images=account.images,
        failed=account.failed,
        differing=account.differing,
        given_up=account.given_up,
        seconds=round(time.monotonic() - began, 3),
        stopped=stop.reason if left else None,
    )


def make_labeller(config: dict[str, Any], store: str, dataset: Dataset, owner: str) -> Any:
    """In a worker: torch is imported there."""
    from trainer.label_worker import Labeller

    return Labeller(config, store, owner, dataset)


class _Account:
    """What the driver adds up, shows and exports."""

    def __init__(self, total: int, on_progress: Callable[[LabelProgress], None] | None) -> None:
        self._total, self._on_progress = total, on_progress
        self.exporter: Exporter | None = None
        self.done, self.images, self.failed, self.differing = total, 0, 0, 0
        self.given_up: Mapping[str, str] = {}
        self._counted: dict[str, int] = {}

    def on_look(self, view: View) -> None:
        for _, result in view.results:
            self.images += result["samples"]
            self.failed += result["failed"]
        self.differing += sum(bool(result["differs"]) for _, result in [*view.results, *view.late])
        counts = view.counts
        self.done, self.given_up = counts.done, view.given_up
        if self.exporter is not None:
            for state in SHARDS:
                self.exporter.metric("fathom_label_shards").labels(state=state).set(getattr(counts, state))
            for name, value in (
                ("fathom_label_leases_expired_total", counts.expired),
                ("fathom_label_shards_speculated_total", counts.speculated),
                ("fathom_label_shards_late_total", counts.late),
                ("fathom_label_worker_deaths_total", counts.deaths),
                ("fathom_label_shards_differing_total", self.differing),
            ):
                self.exporter.metric(name).inc(max(0, value - self._counted.get(name, 0)))
                self._counted[name] = max(value, self._counted.get(name, 0))
        if self._on_progress:
            self._on_progress(
                LabelProgress(
                    done=counts.done,
                    total=self._total,
                    leased=counts.leased,
                    failed=self.failed,
                    images=self.images,
                    others=view.others,
                    trouble=view.trouble,
                )
            )


@dataclass(frozen=True)
class Teacher:
    """What of the network names the labels, and says what a worker takes."""

    preset: Preset
    fingerprint: str


def read_teacher(config: LabelConfig) -> Teacher:
    """Raises WeightsError when the teacher cannot be read, ConfigError when it predicts metres."""
    from model import DepthAnything

    network = DepthAnything.from_pretrained(config.weights, preset=config.preset, position_mode=config.position_mode)
    if network.preset.head == "metric":
        raise ConfigError(
            f"weights: {config.weights} predicts metres; pseudo-labels are disparities, name a relative network"
        )
    return Teacher(network.preset, network.fingerprint())


def describe(config: LabelConfig, dataset: Dataset, teacher: Teacher | None = None) -> dict[str, Any]:
    """What decides the labels, in words and numbers: the digest of this names the folder. Raises as `read_teacher`."""
    teacher = teacher or read_teacher(config)
    return {
        "label_format": LABEL_FORMAT,
        "teacher": {"fingerprint": teacher.fingerprint, "position_mode": teacher.preset.position_mode},
        "dataset": {"name": dataset.info.name, "fingerprint": dataset.fingerprint, "samples": dataset.info.samples},
        "preprocessing": {
            "resize": "shorter side to input_size (lower bound), multiples of 14, cubic (a = -0.75), no antialias",
            "input_size": config.input_size,
            "normalisation": "ImageNet mean and deviation",
            "orientation": "EXIF orientation applied",
            "flip_average": config.flip,
        },
        "precision": config.precision,
        # what changes the last bits; the kind of processor does so too, and stands in the ledger
        "batch": config.rows,
        "device": "gpu" if config.cluster.use_gpu else "cpu",
        "threads": None if config.cluster.use_gpu else config.cluster.threads,
        "compile": config.compile,
        "quality": config.quality,
        "encoding": config.encoding,
        "quantity": "disparity, relative: scale and shift are the teacher's own",
        "resolution": "the network's input",
    }


def config_again(
    folder: str, dataset: str, weights: str, cluster: Mapping[str, Any], preset: str | None = None
) -> LabelConfig:
    """The configuration that made the labels in `folder`, to make them again. `cluster`: where, as in LabelCluster.

    Raises DataError when there are no labels, or another fathom made them; ConfigError when these are not their dataset
    and teacher.
    """
    made = LabelStore.open(folder).description
    try:
        on_gpu = made["device"] == "gpu"
        values = {
            "dataset": dataset,
            "weights": weights,
            "preset": preset,
            "position_mode": made["teacher"]["position_mode"],
            "input_size": made["preprocessing"]["input_size"],
            "flip": made["preprocessing"]["flip_average"],
            **{name: made[name] for name in ("precision", "batch", "compile", "quality", "encoding")},
            "cluster": {**cluster, "use_gpu": on_gpu, **({} if on_gpu else {"threads": made["threads"]})},
        }
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{storage.join(folder, INFO_NAME)}: description lacks {error}: another program made these labels, or "
            "another fathom: label again"
        ) from None
    config = parse_config(LabelConfig, values, source=storage.join(folder, INFO_NAME))
    now = describe(config, Dataset.open(dataset))
    if now != made:
        field = next(name for name in [*made, *now] if now.get(name) != made.get(name))
        raise ConfigError(
            f"{'weights' if field == 'teacher' else field}: not what made {folder}: {field} was "
            f"{json.dumps(made.get(field))}, now {json.dumps(now.get(field))}; name the same teacher and dataset"
        )
    return config


def need_of(config: LabelConfig, preset: Preset) -> Need:
    """What a worker takes, from the network's shapes alone."""
    from trainer.plan_label import worker_bytes

    return Need(
        cpus=config.cluster.threads,
        gpus=1 if config.cluster.use_gpu else 0,
        memory_bytes=worker_bytes(config, preset),
    )


def workers_here(config: LabelConfig, need: Need) -> int | None:
    """On a cluster as many as find room (None), which may change; on this machine as many as it holds now."""
    from cluster.leased_pool import room_here
    from cluster.machine import free_memory
    from cluster.runtime import usual_address

    if config.cluster.address or usual_address() or config.cluster.use_gpu:
        return None
    return room_here(need, free_memory())


def _clear_up(store: LabelStore) -> None:
    """What nobody needs once all is done and nobody is at work: half-written files, and what those who were killed have
    told of themselves."""
    store.clean()
    for folder in (storage.join(store.path, name) for name in WORKING):
        with suppress(storage.FileMissing):
            for name, size in storage.sizes(folder).items():
                if size is not None:
                    storage.remove(storage.join(folder, name))


def _sweep(store: LabelStore, lease_s: float) -> None:
    """Take away what writers that are gone have left half-written."""
    claims = [claim for claim in read_claims(storage.join(store.path, CLAIMS)) if not claim.gone()]
    working = {str(lease.get("worker")) for claim in claims for lease in claim.leased.values()}
    store.clean(keep=working, older_than_s=_STALE * lease_s)


def exporter(
    store: LabelStore, role: Literal["label", "label-driver"], cluster: LabelCluster, worker: str | None = None
) -> Exporter:
    """The metrics of one process of a labelling job."""
    where = _discovery(store, cluster)
    return Exporter(f"label-{store.digest}", role, worker=worker, host=cluster.metrics_host, discovery=where)


def _discovery(store: LabelStore, cluster: LabelCluster) -> str | None:
    """Where its processes can be found: a folder on a disk, if there is one."""
    return cluster.telemetry or (None if storage.is_url(store.path) else storage.join(store.path, "telemetry"))
