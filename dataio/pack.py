"""Making datasets from data that somebody has: one way for all layouts (`dataio.importers`).

Photographs are copied byte by byte, never encoded again. A bad file is left out, counted and named; making goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from cluster import storage
from dataio.dataset import DatasetInfo
from dataio.importers.base import Entry, Importer, make_item, sky_finder
from dataio.processes import in_processes
from dataio.shards import SHARD_BYTES, Packing, PackReport, Progress
from dataio.spec import DataError

_CHUNK = 8  # samples per message between processes
_PER_SAMPLE = 4096  # bytes of headers, padding and metadata, at most


def pack(
    importer: Importer,
    out: str,
    *,
    name: str,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    sky: str | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> PackReport:
    """Pack what an importer finds into the dataset `out` (folder or URL). `workers` processes read.

    `sky` names a function that finds the sky where the layout has no mask: `dataio.importers.base.sky_finder`.

    What cannot be used is skipped and named in the report, among others: unreadable_image, too_large, missing_image,
    unknown_image_format, unreadable_depth, missing_depth, depth_not_16_bit, depth_size_differs, no_valid_depth,
    unusable_sky, rotated_by_exif (labelled only).
    The same call resumes; other arguments or other files are refused unless `restart` deletes what is there. Shards do
    not depend on `workers`.
    Raises DataError (nothing to pack, two samples with one key, nothing usable, `out` in the source or around it) and
    StorageError (no space).
    """
    if not name:
        raise DataError("name is empty: give the dataset a name")
    if shard_bytes < 1:
        raise DataError(f"shard_bytes is {shard_bytes}: it must be at least 1")
    if sky is not None:
        sky_finder(sky)
    _check_apart(importer.root, out)
    entries = list(importer.entries())
    if not entries:
        raise DataError(f"{importer.root}: nothing in it that the layout {importer.name!r} knows: check the path")
    _check_keys(importer, entries)
    sizes = {path: _size(importer, path) for entry in entries for path in entry.files}
    listing = [(entry.key, [(path, sizes[path]) for path in entry.files], entry.extra) for entry in entries]
    plan: dict[str, Any] = {
        **importer.options.model_dump(mode="json"),
        "maker": importer.name,
        "name": name,
        "source": str(importer.root.resolve()),
        "shard_bytes": shard_bytes,
        "sky": sky,
        "files": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }
    packing = Packing(out, plan, restart=restart)
    todo = entries[packing.next :]
    needed = sum(sizes[path] for path in {path for entry in todo for path in entry.files})
    storage.require_free(out, needed + needed // 50 + _PER_SAMPLE * len(todo), "packing")
    info = DatasetInfo(
        name=name,
        role="labelled" if importer.labelled else "unlabelled",
        quantity=importer.quantity if importer.labelled else None,
        code=importer.code if importer.labelled else None,
        samples=0,
    )
    items = in_processes(partial(make_item, importer, sky), todo, workers, _CHUNK)
    return packing.run(items, len(entries), info, {"shard_bytes": shard_bytes}, progress)


def _check_apart(source: Path, out: str) -> None:
    """DataError when one holds the other: packing again would take what was packed for photographs."""
    if storage.is_url(out):
        return
    inside, outside = source.resolve(), Path(out.removeprefix("file://")).resolve()
    if inside == outside:
        where = "is the source itself"
    elif inside in outside.parents:
        where = f"lies inside the source, {source}"
    elif outside in inside.parents:
        where = f"holds the source, {source}"
    else:
        return
    raise DataError(f"{out}: the output {where}: choose a folder apart from it")


def _check_keys(importer: Importer, entries: list[Entry]) -> None:
    owners: dict[str, Entry] = {}
    for entry in entries:
        other = owners.setdefault(entry.key, entry)
        if other is not entry:
            raise DataError(
                f"{importer.root}: {other.name!r} and {entry.name!r} would both have the key {entry.key!r}: rename one"
            )


def _size(importer: Importer, path: str) -> int:
    """In bytes; 0 for a file that is not there, which reading will name."""
    try:
        return (importer.root / path).stat().st_size
    except FileNotFoundError:
        return 0
