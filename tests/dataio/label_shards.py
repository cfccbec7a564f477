"""Label shards for tests: samples made from a seed, written without ado."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from dataio.index import index_path
from dataio.labels import LabelSample, LabelStore, LedgerEntry

TEACHER = {"teacher": "0123abcd", "preprocessing": {"size": 518, "flip": True}, "precision": "fp32"}
STEM = "000000"
TAG = "0123abcd"
PLACES = ["local", "memory", "s3"]


def store_in(place: str, request: Any, tmp_path: Path) -> LabelStore:
    """New labels in one of PLACES; `request` is pytest's."""
    if place == "s3":
        return LabelStore.create(f"{request.getfixturevalue('s3')}/labels", TEACHER)
    base = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}[place]
    return LabelStore.create(storage.join(base, "labels"), TEACHER)


def label(key: str, seed: int = 0, quality: float | None = 0.5) -> LabelSample:
    disparity_HW = np.random.default_rng(seed).uniform(0, 5, (14, 28)).astype(np.float32)
    return LabelSample.encoded(key, disparity_HW, {} if quality is None else {"quality": quality})


def labels(*keys: str, seed: int = 0) -> list[LabelSample]:
    return [label(key, seed) for key in keys]


def write(store: LabelStore, samples: list[LabelSample], stem: str = STEM, **options: Any) -> LedgerEntry:
    commit = store.commit(stem, samples, keys=[sample.key for sample in samples], **options)
    assert commit.outcome == "written" and not commit.differs and commit.entry is not None
    return commit.entry


def files(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def ledger(store: LabelStore, stem: str = STEM) -> Path:
    return Path(store.ledger(stem))


def leave_a_tar(store: LabelStore, samples: list[LabelSample]) -> None:
    """As a writer that died before its index."""
    write(store, samples)
    for path in (store.ledger(STEM), index_path(store.tar(STEM))):
        seen = storage.stamp(path)
        assert seen is not None and storage.remove_if(path, seen)
