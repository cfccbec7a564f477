"""One role's datasets and labels, opened, and the lanes of it that a rank serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dataio import label_quality
from dataio.cache import Opener
from dataio.dataset import Dataset
from dataio.labels import LabelStore
from dataio.mix import MixedPlan
from dataio.plan import RolePlan, Slot, check_lanes, lanes_of
from dataio.reader import LaneReader, ShardSource
from dataio.spec import DataError, DataSpec, RoleNeeds, RoleSpec
from dataio.types import Sample


@dataclass(frozen=True, slots=True)
class Pick:
    """A slot of a batch, None where the pass has ended, and its sample. `own` of `share` within its lane's part."""

    slot: Slot | None
    sample: Sample | None
    own: int
    share: int


class RoleStream:
    """A role as one rank reads it. Raises DataError for datasets, labels and numbers that do not fit the needs."""

    def __init__(
        self,
        role: str,
        data: DataSpec,
        needs: RoleNeeds,
        *,
        seed: int,
        rank: int,
        world_size: int,
        opener: Opener | None = None,
    ) -> None:
        spec = data.roles[role]
        if not spec.datasets:
            raise DataError(f"role {role!r}: datasets is empty: name at least one")
        check_lanes(role, spec.batch, spec.lanes, per_lane=2 if spec.perturbation.cutmix_p > 0 else 1)
        lanes = lanes_of(role, spec.lanes, rank, world_size)
        self.role, self.spec, self.needs = role, spec, needs
        self.datasets = [Dataset.open(path) for path in spec.datasets]
        self.labels = _open_labels(role, self.datasets, spec, needs)
        opener = opener or Opener()
        self.sources = [
            source
            for number, dataset in enumerate(self.datasets)
            for source in _sources(role, dataset, self.labels[number] if self.labels else None, spec, needs, opener)
        ]
        # With weights every dataset has a plan of its own, else all of them together have one.
        groups = [[dataset] for dataset in self.datasets] if spec.weights else [self.datasets]
        parts: list[RolePlan] = []
        for group in groups:
            sizes = [shard.samples for dataset in group for shard in dataset.shards]
            before = sum(part.shards for part in parts)
            parts.append(
                RolePlan(
                    role, sizes, batch=spec.batch, lanes=spec.lanes, window=data.shuffle_window, seed=seed,
                    first_shard=before,
                )
            )  # fmt: skip
        self.plan = MixedPlan(parts, spec.weights) if spec.weights else parts[0]
        self._readers = {lane: [LaneReader(part, lane, self.sources, needs) for part in parts] for lane in lanes}

    @property
    def rows(self) -> int:
        """This rank's rows of every global batch."""
        return len(self._readers) * self.plan.share

    def read(self, consumed: int) -> list[Pick]:
        """This rank's rows of the global batch that follows `consumed` samples, lane after lane."""
        picks = []
        for lane, readers in self._readers.items():
            drawn = self.plan.drawn(consumed, lane)
            samples: list[Sample | None] = [None] * len(drawn)
            for part, reader in enumerate(readers):
                places = [place for place, (number, _) in enumerate(drawn) if number == part]
                for place, sample in zip(places, reader.read([drawn[place][1] for place in places]), strict=True):
                    samples[place] = sample
            pairs = zip(drawn, samples, strict=True)
            picks += [Pick(slot, sample, own, self.plan.share) for own, ((_, slot), sample) in enumerate(pairs)]
        return picks

    def shard(self, slot: Slot) -> str:
        """The path of the slot's shard."""
        return self.sources[slot.shard].tar

    def describe(self) -> Mapping[str, Any]:
        """What the order of samples and their content depend on, for a checkpoint's manifest."""
        return {
            "datasets": [dataset.fingerprint for dataset in self.datasets],
            "labels": [store.digest for store in self.labels],
            "samples": self.plan.samples,
            "batch": self.plan.batch,
            "lanes": self.plan.lanes,
            **({"quotas": self.plan.quotas} if isinstance(self.plan, MixedPlan) else {}),
            **({"min_quality": self.spec.min_quality} if self.spec.min_quality is not None else {}),
        }


def _open_labels(role: str, datasets: list[Dataset], spec: RoleSpec, needs: RoleNeeds) -> list[LabelStore]:
    stores: list[LabelStore] = []
    if needs.sidecar and needs.target != "none":
        if len(spec.labels) != len(datasets):
            raise DataError(
                f"role {role!r}: {len(spec.labels)} labels for {len(datasets)} datasets: name one folder of labels per "
                "dataset; `fathom label run` makes them"
            )
        stores = [LabelStore.open(folder) for folder in spec.labels]
        for store, dataset in zip(stores, datasets, strict=True):
            store.complete_for(dataset)
    descriptions = {store.path: store.description for store in stores}
    label_quality.check_filter(f"data.roles.{role}.min_quality", spec.min_quality, descriptions)
    return stores


def _sources(
    role: str, dataset: Dataset, store: LabelStore | None, spec: RoleSpec, needs: RoleNeeds, opener: Opener
) -> list[ShardSource]:
    info = dataset.info
    if needs.target != "none" and store is None and info.quantity is None:
        raise DataError(
            f"role {role!r}: {dataset.path} is {info.role} and the task needs a target: name a labelled dataset, "
            "or one with pseudo-labels in a role that reads them"
        )
    return [
        ShardSource(
            tar=shard.tar,
            shard=shard,
            label_tar=store.tar(shard.stem) if store else None,
            label_index=partial(store.index, shard.stem) if store else None,
            quantity=info.quantity,
            code=info.code,
            quarantined=dataset.quarantined.get(shard.stem, {}),
            sha256=shard.sha256,
            opener=opener,
            min_quality=spec.min_quality,
        )
        for shard in dataset.shards
    ]
