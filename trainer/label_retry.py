"""`fathom label retry`: the samples without a label once more, and no others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from cluster.leased_worker import Grip
from cluster.stop import StopFlag
from dataio.labels import LabelSample, LabelStore
from trainer.config_label import LabelConfig
from trainer.label_worker import Labeller
from trainer.labelling import Job, LabelOutcome, LabelProgress, work_on


def run_retry(
    config: LabelConfig,
    folder: str,
    *,
    reasons: Collection[str] | None = None,
    on_progress: Callable[[LabelProgress], None] | None = None,
    stop: StopFlag | None = None,
) -> LabelOutcome:
    """Label again what failed for one of `reasons` (None: any) in the committed shards of `folder`.

    `config` is that of the labels (`trainer.labelling.config_again`). Raises as `run_labelling`.
    """
    store = LabelStore.open(folder)
    stems = [entry.stem for entry in store.entries() if wanted(entry.failures, reasons)]
    make = functools.partial(make_retrier, config.model_dump(mode="json"), folder, reasons)
    return work_on(config, Job(store, stems, make, listed=nothing), on_progress=on_progress, stop=stop)


def wanted(failures: dict[str, list[str]], reasons: Collection[str] | None) -> set[str]:
    """The keys that failed for one of these reasons."""
    return {key for reason, keys in failures.items() if reasons is None or reason in reasons for key in keys}


def nothing() -> Sequence[str]:
    """No shard is done already: the ledger does not tell which have been tried again."""
    return ()


def make_retrier(config: dict[str, Any], folder: str, reasons: Collection[str] | None, owner: str) -> Retrier:
    """In a worker."""
    return Retrier(config, folder, owner, reasons)


class Retrier(Labeller):
    """Replaces a shard by one in which the samples that failed are as they come out now."""

    def __init__(self, config: dict[str, Any], store: str, owner: str, reasons: Collection[str] | None) -> None:
        super().__init__(config, store, owner)
        self._reasons = reasons

    def process(self, stem: str, grip: Grip) -> dict[str, Any]:
        """As `Labeller.process`."""
        entry, shard = self.store.entry(stem), self.shard(stem)
        again = set() if entry is None else wanted(entry.failures, self._reasons)
        keys = [sample.key for sample in shard.index.samples]
        if not again:  # a crash left it without an entry, or somebody else has tried by now
            return super().process(stem, grip)
        merged = self.watched(self._merged(stem, keys, again), len(keys), grip)
        commit = self.store.replace(
            stem, merged, keys=keys, by=self.by(grip), still_mine=grip.still_mine, tag=self.owner
        )
        return self.told(commit, stem)

    def _merged(self, stem: str, keys: Sequence[str], again: set[str]) -> Iterator[LabelSample]:
        """The shard's samples: as they are, but those of `again` newly made."""
        places = {place for place, key in enumerate(keys) if key in again}
        made = {sample.key: sample for sample in self.labels(self.shard(stem), places)}
        for sample in self.store.read(stem):
            yield made.get(sample.key, sample)
