"""How a labelling job stands, from the labels' folder alone: the ledger, and what runs at work say of themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster import storage
from cluster.claims import FOLDER, Claim, read_claims
from dataio.dataset import Dataset
from dataio.label_ledger import LabelStatus, LedgerEntry, sum_up
from dataio.labels import LabelStore, missing_of

RATE_OVER_S = 900.0  # of the last shards: long enough for some, short enough to follow machines that come and go
_RATED = 3  # shards that a rate is taken of, at least: of longer ones for as long as these take


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """One machine: shards it has `done` and has in hand now, images, and its rate lately (None: unknown)."""

    done: int = 0
    leased: int = 0
    images: int = 0
    images_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobState:
    """All of a job. `todo`: shards that nobody has begun; None without the dataset. `left_s`: at the present rate."""

    status: LabelStatus
    leased: Mapping[str, Mapping[str, object]]
    runs: int
    todo: int | None
    images_per_second: float | None
    left_s: float | None
    nodes: Mapping[str, NodeState] = field(default_factory=dict)


def job_state(store: LabelStore, dataset: Dataset | None, now: float | None = None) -> JobState:
    """Reads the ledger and the runs' files. `now`: seconds since the epoch.

    Raises StorageError; DataError when the labels are not those of `dataset`.
    """
    now = time.time() if now is None else now
    if dataset is not None:
        store.require_made_of(dataset)
    entries = store.done_entries()
    status = sum_up(entries, missing_of(dataset, entries) if dataset else ())
    claims = [claim for claim in read_claims(storage.join(store.path, FOLDER)) if _works(claim, now)]
    leased = {item: lease for claim in claims for item, lease in claim.leased.items()}
    nodes = _nodes(entries, leased, now)
    rates = [node.images_per_second for node in nodes.values() if node.images_per_second is not None]
    rate = sum(rates) if rates else None
    todo = left_s = None
    if dataset is not None:
        # a run's file lags behind the ledger: where it names a shard that is done, its worker is at the next by now
        todo = max(0, len(status.missing) - len(leased))
        if rate:
            left_s = (dataset.info.samples - status.samples) / rate
    return JobState(
        status=status, leased=leased, runs=len(claims), todo=todo, images_per_second=rate, left_s=left_s, nodes=nodes
    )


def _works(claim: Claim, now: float) -> bool:
    return claim.ends >= now and not claim.gone()


def _nodes(
    entries: Iterable[LedgerEntry], leased: Mapping[str, Mapping[str, object]], now: float
) -> dict[str, NodeState]:
    """By host name. A rate is that of the node's shards that ended lately, from the first one's begin until now: lately
    is long enough for a few shards of each of its workers, however long they take."""
    done: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        done.setdefault(str(entry.by.get("node", "unknown")), []).append(entry)
    holding = [str(lease.get("node", "unknown")) for lease in leased.values()]
    found = {}
    for name in sorted({*done, *holding}):
        mine = done.get(name, [])
        took_s = [entry.seconds for entry in mine if entry.seconds is not None]
        lately_s = max(RATE_OVER_S, _RATED * statistics.median(took_s) if took_s else 0.0)
        recent = [(entry, at) for entry in mine if now - (at := _finished(entry)) <= lately_s]
        rate = None
        if len(recent) >= _RATED and name in holding:
            began = min(at - (entry.seconds or 0.0) for entry, at in recent)
            longest_s = max(entry.seconds or 0.0 for entry, _ in recent)  # for a clock that is ahead of this one
            elapsed_s = min(lately_s, max(1e-3, longest_s, now - began))
            rate = sum(entry.samples for entry, _ in recent) / elapsed_s
        found[name] = NodeState(
            done=len(mine),
            leased=holding.count(name),
            images=sum(entry.samples for entry in mine),
            images_per_second=rate,
        )
    return found


def _finished(entry: LedgerEntry) -> float:
    """When, or long ago where nobody said: what `by` holds is free."""
    at = entry.by.get("finished")
    return float(at) if isinstance(at, int | float) and not isinstance(at, bool) else 0.0
