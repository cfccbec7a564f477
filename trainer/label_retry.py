"""`fathom label retry`: the samples without a label once more, and no others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from cluster import storage
from cluster.leased_worker import Grip
from cluster.stop import StopFlag
from dataio.dataset import SHARDS_NAME, Dataset
from dataio.label_tar import NO_VALID_DISPARITY, OUT_OF_RANGE
from dataio.labels import LabelSample, LabelStore
from dataio.quarantine import OF_THE_TARGET, REASONS
from trainer.config import ConfigError
from trainer.config_label import LabelConfig
from trainer.label_worker import Labeller, keys_of
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

    `config` is that of the labels (`trainer.labelling.config_again`). Raises as `run_labelling`, and ConfigError for a
    reason that there is none of.
    """
    check_reasons(reasons)
    store = LabelStore.open(folder)
    failed = {entry.stem for entry in store.entries() if wanted(entry.failures, reasons)}
    stems = sorted(failed | _half_replaced(store))
    dataset = Dataset.open(config.dataset)
    make = functools.partial(make_retrier, config.model_dump(mode="json"), folder, dataset, reasons)
    return work_on(config, Job(store, stems, make, listed=nothing), on_progress=on_progress, stop=stop)


def check_reasons(reasons: Collection[str] | None) -> None:
    """ConfigError for what no label fails for."""
    known = {*REASONS, NO_VALID_DISPARITY, OUT_OF_RANGE} - OF_THE_TARGET
    for reason in reasons or ():
        if reason not in known:
            raise ConfigError(f"reason: found {reason!r}; one of {', '.join(sorted(known))}")


def wanted(failures: dict[str, list[str]], reasons: Collection[str] | None) -> set[str]:
    """The keys that failed for one of these reasons."""
    return {key for reason, keys in failures.items() if reasons is None or reason in reasons for key in keys}


def _half_replaced(store: LabelStore) -> set[str]:
    """Shards whose writer died while it replaced them: the tar is there, the old one or the new one, and no entry."""
    shards = storage.join(store.path, SHARDS_NAME)
    try:
        names = storage.listdir(shards)
    except storage.FileMissing:
        names = []
    return {name.removesuffix(".tar") for name in names if name.endswith(".tar")} - set(store.committed())


def nothing() -> Sequence[str]:
    """No shard is done already: the ledger does not tell which have been tried again."""
    return ()


def make_retrier(
    config: dict[str, Any], folder: str, dataset: Dataset, reasons: Collection[str] | None, owner: str
) -> Retrier:
    """In a worker."""
    return Retrier(config, folder, owner, dataset, reasons)


class Retrier(Labeller):
    """Replaces a shard by one in which the samples that failed are as they come out now."""

    def __init__(
        self, config: dict[str, Any], store: str, owner: str, dataset: Dataset, reasons: Collection[str] | None
    ) -> None:
        super().__init__(config, store, owner, dataset)
        self._reasons = reasons

    def label(self, stem: str, grip: Grip) -> dict[str, Any]:
        """As `Labeller.label`."""
        told: dict[str, Any] = {}
        if not self.store.done(stem):  # a writer died while it replaced it: whichever tar is there counts
            told = super().label(stem, grip)
        entry, shard = self.store.entry(stem), self.shard(stem)
        again = set() if entry is None else wanted(entry.failures, self._reasons)
        if not again or told.get("outcome") == "written":
            return told or super().label(stem, grip)  # somebody else has tried by now
        keys = keys_of(shard)
        assert entry is not None
        if storage.sha256_file(self.store.tar(stem)) == entry.sha256:
            labels = self._merged(stem, keys, again, grip)
        else:  # damaged since: what it holds is not to be copied
            labels, again = self.labels(shard, grip), set(keys)
        commit = self.store.replace(
            stem, labels, keys=keys, by=self.by(grip), still_mine=grip.still_mine, tag=self.owner
        )
        return self.told(commit, stem, again)

    def _merged(self, stem: str, keys: Sequence[str], again: set[str], grip: Grip) -> Iterator[LabelSample]:
        """The shard's samples: as they are, but those of `again` newly made."""
        places = {place for place, key in enumerate(keys) if key in again}
        made = {sample.key: sample for sample in self.labels(self.shard(stem), grip, places)}
        for sample in self.store.read(stem):
            yield made.get(sample.key, sample)
