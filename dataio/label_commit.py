"""How one label shard is committed: exactly once, by any number of writers, each of which may die at any step.

    tar     appears under its name only if the name is free, whole and read back; from then on nobody changes it
    index   derived from the tar
    ledger  last, only if there is none; derived from the tar that is there

Whoever comes later, or next, finds one of four states: an entry and its tar (done, nothing is written); a tar without
an entry (its writer died, or is about to make the entry: it is read wholly and adopted, or removed when damaged); an
entry whose tar is gone or has another size, or that was copied from elsewhere (both are removed, the entry first);
nothing. `replace`, for failed samples that are redone, removes the entry, then renames over the tar: in between it is
a tar without an entry, the old one or the new one.

Two files cannot be changed at once, so each writer that has made an entry looks whether the tar is still the one that
it describes, and takes the entry back otherwise. That happens only where a damaged or replaced shard meets a second
writer. Removing goes by stamp (`storage.remove_if`): what somebody else placed meanwhile stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster import storage
from dataio.index import ShardIndex, index_path
from dataio.label_ledger import ForeignEntry, LedgerEntry, parse_entry
from dataio.label_tar import Contents, LabelSample, check_keys_of, check_written, read_tar, write_tar
from dataio.spec import DataError

Outcome = Literal["written", "adopted", "duplicate", "fenced"]
By = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
_PATIENCE = 50  # looks at a shard that others keep changing


class _Moved(Exception):
    """The tar was replaced or removed while it was read."""


@dataclass(frozen=True)
class Commit:
    """What became of one writer's work on a shard.

    `written`: it is committed. `adopted`: a tar of somebody else was there, and this writer made its entry.
    `duplicate`: all of it was there, by somebody else. `fenced`: the work was no longer this writer's, and is dropped;
    only then `entry` is None. `differs`: this writer did the work, too, and came to other bytes, a sign of unlike
    hardware or software.
    """

    outcome: Outcome
    entry: LedgerEntry | None
    differs: bool = False


@dataclass(frozen=True, kw_only=True)
class LabelSlot:
    """The place of one label shard, and one writer's view of it. `keys` are the source shard's, in order; `plan` is the
    digest of the labels.

    `by` goes into the ledger entry, a function is asked when that is made; `tag` names the writer's temporary files.
    """

    stem: str
    plan: str
    tar: str
    ledger: str
    keys: Sequence[str]
    by: By = field(default_factory=dict)
    tag: str = field(default_factory=storage.new_tag)

    def commit(
        self, samples: Iterable[LabelSample], seconds: float | None, still_mine: Callable[[], bool] | None
    ) -> Commit:
        """As `LabelStore.commit`."""
        began = time.monotonic()
        found = self._settled()
        if found is not None:
            return found
        with storage.draft(self.tar, self.tag) as draft:
            mine = self._write(draft, samples)
            seconds = time.monotonic() - began if seconds is None else seconds
            for attempt in _attempts():
                if still_mine is not None and not still_mine():
                    return Commit("fenced", None)
                placed = self._placed(draft, mine) if draft.place() else None
                found = self._enter(placed, seconds, "written") if placed else None
                found = found or self._settled(reindex=attempt > 0 or placed is not None)
                if found is not None and found.entry is not None:
                    return replace(found, differs=found.entry.sha256 != mine.sha256)
        raise self._restless()

    def replace(
        self, samples: Iterable[LabelSample], seconds: float | None, still_mine: Callable[[], bool] | None
    ) -> Commit:
        """As `LabelStore.replace`."""
        began = time.monotonic()
        with storage.draft(self.tar, self.tag) as draft:
            mine = self._write(draft, samples)
            seconds = time.monotonic() - began if seconds is None else seconds
            entry = self._entry()
            if entry is not None and entry.sha256 == mine.sha256 and self._holds(entry):
                return Commit("duplicate", entry)
            if still_mine is not None and not still_mine():
                return Commit("fenced", None)
            while (ledger_seen := storage.stamp(self.ledger)) is not None:
                storage.remove_if(self.ledger, ledger_seen, self.tag)
            draft.place(over=True)
            placed = self._placed(draft, mine)
            for _ in _attempts():
                found = self._enter(placed, seconds, "written") if placed else None
                if found is None and (placed is None or storage.stamp(self.tar) != placed.stamp):
                    found = self._settled(reindex=True)
                    if found is None and draft.stamp is None and draft.place():  # behind a URL: removed meanwhile
                        placed = self._placed(draft, mine)
                if found is not None and found.entry is not None:
                    return replace(found, differs=found.entry.sha256 != mine.sha256)
        raise self._restless()

    def _read(self, seen: storage.Stamp) -> Contents:
        """All that is under the tar's name. DataError when it is damaged, or not of the source's keys; _Moved when it
        is another one by now, or none."""
        try:
            with storage.open_range(self.tar, 0, seen.size) as file:
                found = read_tar(file, self.tar)
            check_keys_of(self.tar, found, self.keys)
        except (DataError, storage.StorageError) as error:
            if storage.stamp(self.tar) != seen:
                raise _Moved from error
            raise
        if storage.stamp(self.tar) != seen:
            raise _Moved
        return replace(found, stamp=seen)

    def _settled(self, *, reindex: bool = False) -> Commit | None:
        """The shard, if it is committed or can be adopted; else None, and neither tar nor entry is there.

        `reindex`: this writer may have written the index of a tar that is not there any more.
        """
        for _ in _attempts():
            # in this order: an entry is made after its tar
            ledger_seen, tar_seen = storage.stamp(self.ledger), storage.stamp(self.tar)
            if ledger_seen is not None:
                entry, is_of_the_tar = self._found_entry()
                if entry is not None and tar_seen is not None and tar_seen.size == entry.bytes:
                    if reindex:
                        self._reindex()
                    return Commit("duplicate", entry)
                storage.remove_if(self.ledger, ledger_seen, self.tag)
                if is_of_the_tar and tar_seen is not None:
                    storage.remove_if(self.tar, tar_seen, self.tag)
                continue
            if tar_seen is None:
                return None
            try:
                there = self._read(tar_seen)
            except _Moved:
                continue
            except DataError:
                storage.remove_if(self.tar, tar_seen, self.tag)
                continue
            found = self._enter(there, None, "adopted")
            if found is not None:
                return found
            reindex = True
        raise self._restless()

    def _enter(self, there: Contents, seconds: float | None, outcome: Outcome) -> Commit | None:
        """Index and ledger entry of the tar that was read; None when it is not there any more, or an entry of
        another one was, and is removed."""
        storage.atomic_write(index_path(self.tar), there.index.text, self.tag)
        by = self.by() if callable(self.by) else self.by
        entry = LedgerEntry.of(self.stem, self.plan, there, seconds, {**by, "tag": self.tag})
        storage.write_if_absent(self.ledger, entry.to_json(), self.tag)
        # whether it is there by this very call says nothing: an earlier attempt may have arrived whose answer got lost
        seen, found = storage.stamp(self.ledger), self._entry()
        is_mine = found == entry
        is_there = storage.stamp(self.tar) == there.stamp
        if is_there and is_mine:
            return Commit(outcome, entry)
        if is_there and found is not None and found.sha256 == there.sha256:
            return Commit("duplicate", found)
        if seen is not None and (is_there or is_mine):  # it speaks of a tar that is not there
            storage.remove_if(self.ledger, seen, self.tag)
        return None

    def _write(self, draft: storage.Draft, samples: Iterable[LabelSample]) -> Contents:
        written = write_tar(draft.file, samples, self.keys, self.tar)
        with draft.reread() as again:
            found = read_tar(again, self.tar)
        check_written(self.tar, written, found)
        return found

    def _placed(self, draft: storage.Draft, mine: Contents) -> Contents | None:
        """What was placed, as it is there; None when another writer's is. DataError when the store holds other bytes
        than it was sent."""
        if draft.stamp is not None:
            return replace(mine, stamp=draft.stamp)
        seen = storage.stamp(self.tar)
        try:
            there = self._read(seen) if seen is not None else None
        except _Moved:
            return None
        except DataError as error:
            if seen is not None and not storage.remove_if(self.tar, seen, self.tag):
                return None
            raise DataError(f"{self.tar}: the bytes read back differ from those sent: run again ({error})") from error
        return there if there is not None and there.sha256 == mine.sha256 else None

    def _holds(self, entry: LedgerEntry) -> bool:
        """Whether the tar is byte by byte the one that the entry is of."""
        try:
            return storage.sha256_file(self.tar) == entry.sha256
        except storage.FileMissing:
            return False

    def _entry(self) -> LedgerEntry | None:
        """The entry, None when there is none, or none that can be used."""
        return self._found_entry()[0]

    def _found_entry(self) -> tuple[LedgerEntry | None, bool]:
        """(as `_entry`, whether the tar that lies beside it stands and falls with it): so it does, too, where both may
        have been copied from elsewhere."""
        try:
            return parse_entry(self.ledger, storage.read_bytes(self.ledger), self.stem, self.plan), True
        except ForeignEntry:
            return None, True
        except (storage.FileMissing, DataError):
            return None, False

    def _reindex(self) -> None:
        with suppress(storage.FileMissing, DataError):
            storage.atomic_write(index_path(self.tar), ShardIndex.build(self.tar).text, self.tag)

    def _restless(self) -> DataError:
        return DataError(f"{self.tar}: several writers keep changing it: run again")


def _attempts() -> Iterator[int]:
    """Looks at a shard that somebody else is changing, which takes him a moment."""
    for attempt in range(_PATIENCE):
        if attempt > 1:
            time.sleep(min(0.0005 * 2**attempt, 0.1))
        yield attempt
