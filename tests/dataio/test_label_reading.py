"""Labels in training: every format joins and decodes, damage is the sample's own, and a filter by quality filters."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from webdataset import TarWriter

from dataio import label_quality, show
from dataio.codec import decode_png16
from dataio.dataset import Dataset
from dataio.index import ShardIndex
from dataio.label_codec import EXTENSIONS, decode, encode
from dataio.labels import LabelSample, LabelStore
from dataio.loader import Loader
from dataio.png16 import decode_codes
from dataio.quarantine import BadSample, Quarantine
from dataio.reader import ShardSource, read_samples
from dataio.spec import DataError, DataSpec, RoleNeeds, RoleSpec
from dataio.types import Sample

from .fakes import labelled, metadata, shards_of, unlabelled, write_dataset

SIDECAR = RoleNeeds(sidecar=True)
ENCODINGS = ("png", "npy", "jxl")
RAMP_HW = (np.add.outer(np.arange(28), 3 * np.arange(42)) / 7 - 3).astype(np.float32)
RAMP_HW[3, 5:9] = np.nan

Members = Mapping[str, bytes]


def members_of(encoding: Any, **meta: Any) -> dict[str, bytes]:
    """A label as it stands in its shard."""
    label = encode(RAMP_HW, encoding)
    return {label.extension: label.data, "json": metadata(**{**label.meta, **meta})}


def read(folder: Path, labels: Mapping[str, Members], min_quality: float | None = None) -> list[Sample]:
    """The samples of a shard of photographs, one a label."""
    dataset = Dataset.open(write_dataset(folder / "d", [{key: unlabelled(0) for key in labels}], with_depth=False))
    (shard,) = dataset.shards
    tar = str(folder / "labels.tar")
    with TarWriter(tar, encoder=False) as writer:
        for key, members in labels.items():
            writer.write({"__key__": key, **members})
    index = ShardIndex.build(tar)
    source = ShardSource(
        tar=shard.tar, shard=shard, label_tar=tar, label_index=lambda: index, min_quality=min_quality
    )
    return read_samples(source, range(len(labels)), SIDECAR)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_format_becomes_what_the_decoder_takes(tmp_path: Path, encoding: str) -> None:
    members = members_of(encoding, quality=0.5)
    (sample,) = read(tmp_path, {"k": members})
    assert sample.problem is None and sample.quantity == "disparity" and sample.meta["quality"] == 0.5
    assert sample.target is not None and sample.code is not None
    assert (decode_codes(sample.target) > 0).sum() == np.isfinite(RAMP_HW).sum()
    exact_HW = decode(EXTENSIONS[encoding], members[EXTENSIONS[encoding]], json.loads(members["json"]))
    span = np.nanmax(RAMP_HW) - np.nanmin(RAMP_HW)
    np.testing.assert_allclose(decode_png16(sample.target, sample.code), exact_HW, atol=span / 131068 + 1e-6)
    np.testing.assert_allclose(exact_HW, RAMP_HW, atol=span / 4096)


def test_what_is_wrong_with_a_label_is_its_own_samples(tmp_path: Path) -> None:
    labels: dict[str, Members] = {"good": members_of("jxl")}
    expected: dict[str, str | None] = {"good": None}
    for encoding in ("npy", "jxl"):
        whole, extension = members_of(encoding), EXTENSIONS[encoding]
        for name, data in {
            "cut": whole[extension][:-9],
            "flipped": whole[extension][:-9] + bytes([whole[extension][-9] ^ 16]) + whole[extension][-8:],
            "other": b"\x89PNG" + bytes(50),
            "empty": b"",
        }.items():
            labels[f"{encoding}_{name}"], expected[f"{encoding}_{name}"] = {**whole, extension: data}, "bad_target"
        labels[f"{encoding}_unsummed"] = {**whole, "json": metadata(scale=1.0, shift=0.0)}
        labels[f"{encoding}_unscaled"] = {**whole, "json": metadata(shift=0.0)}
        labels[f"{encoding}_alone"] = {extension: whole[extension]}
        labels[f"{encoding}_torn"] = {**whole, "json": b"{"}
        labels[f"{encoding}_failed"] = {"json": metadata(failure="bad_image")}
        expected |= {f"{encoding}_unsummed": "bad_target", f"{encoding}_unscaled": "bad_metadata"}
        expected |= {f"{encoding}_alone": "missing_target", f"{encoding}_torn": "bad_metadata"}
        expected[f"{encoding}_failed"] = "missing_target"
    assert {sample.key: sample.problem for sample in read(tmp_path, labels)} == expected


def test_a_missing_package_is_no_samples_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"k": members_of("jxl")}
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(DataError, match=r"pip install 'fathom-depth\[labels\]'"):
        read(tmp_path, labels)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_sheet_shows_every_format(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "d", [{"k": unlabelled(0)}], with_depth=False)
    tar = str(tmp_path / "labels.tar")
    with TarWriter(tar, encoder=False) as writer:
        writer.write({"__key__": "k", **members_of(encoding)})
    store = SimpleNamespace(index=lambda stem: ShardIndex.build(tar), tar=lambda stem: tar)
    monkeypatch.setattr(show.LabelStore, "open", lambda folder: store)
    seen: list[Any] = []
    monkeypatch.setattr(show, "colorize", lambda map_HW, quantity: seen.append(map_HW) or np.zeros((4, 4, 3), np.uint8))
    show.contact_sheet(str(tmp_path / "d"), labels="anywhere")
    np.testing.assert_allclose(seen[0], RAMP_HW, atol=(np.nanmax(RAMP_HW) - np.nanmin(RAMP_HW)) / 4096)


# --- the filter


def test_below_the_least_quality_a_label_is_passed_over(tmp_path: Path) -> None:
    qualities = {"low": 0.49, "just": 0.5, "high": 0.9, "whole": 1}
    labels = {key: members_of("png", quality=value) for key, value in qualities.items()}
    labels |= {"silent": members_of("png"), "wordy": members_of("npy", quality="high")}
    labels |= {"low_npy": members_of("npy", quality=0.1), "failed": {"json": metadata(failure="bad_image")}}
    found = {sample.key: sample.problem for sample in read(tmp_path / "a", labels, 0.5)}
    assert found == {
        "low": "low_quality", "just": None, "high": None, "whole": None, "silent": "bad_metadata",
        "wordy": "bad_metadata", "low_npy": "low_quality", "failed": "missing_target",
    }  # fmt: skip
    assert {sample.key for sample in read(tmp_path / "b", labels) if sample.problem} == {"failed"}


@pytest.mark.parametrize("quality", [None, True, "1", [], float("nan")])
def test_a_quality_is_a_number(quality: Any) -> None:
    with pytest.raises(DataError, match="a number is needed"):
        label_quality.of({} if quality is None else {"quality": quality})


def sidecar(
    folder: Path, shards: Sequence[Mapping[str, Members]], qualities: Mapping[str, float], **description: Any
) -> str:
    store = LabelStore.create(str(folder), {"teacher": "test", **description})
    for number, samples in enumerate(shards):
        labels = [LabelSample.encoded(key, RAMP_HW, {"quality": qualities[key]}) for key in samples]
        store.commit(f"{number:06d}", labels, keys=list(samples))
    return str(folder)


@pytest.fixture
def halves(tmp_path: Path) -> tuple[DataSpec, set[str], Path]:
    """Sixteen photographs, every second one's label poor and one image broken; and the poor ones' keys."""
    shards = shards_of([8, 8], unlabelled)
    quality = {key: 0.2 if i % 2 else 0.8 for i, key in enumerate(key for shard in shards for key in shard)}
    labels = sidecar(tmp_path / "l", shards, quality, quality="flip")
    shards[0]["s0_000"] = {"jpg": b"x"}
    role = RoleSpec(
        datasets=(write_dataset(tmp_path / "d", shards, with_depth=False),), labels=(labels,), batch=8, min_quality=0.5
    )
    data = DataSpec(roles={"r": role}, input_size=28, max_bad_fraction=0.125)
    return data, {key for key, value in quality.items() if value < 0.5}, tmp_path / "quarantine.jsonl"


def test_what_the_filter_takes_keeps_its_slot_and_is_only_counted(halves: tuple[DataSpec, set[str], Path]) -> None:
    data, poor, path = halves
    orders = {}
    for minimum in (0.5, None):
        role = RoleSpec(**{**vars(data.roles["r"]), "min_quality": minimum})
        spec = DataSpec(**{**vars(data), "roles": {"r": role}})
        quarantine = Quarantine(str(path), spec.max_bad_fraction)
        with Loader(spec, {"r": SIDECAR}, views=("clean",), seed=3, quarantine=quarantine) as loader:
            batches = [next(loader) for _ in range(2)]
            described = loader.describe()["roles"]["r"]
        orders[minimum] = [batch.keys for batch in batches]
        weight = {k: float(w) for batch in batches for k, w in zip(batch.keys, batch.weight_B, strict=True)}
        gone = {"s0_000"} | (poor if minimum else set())
        assert {key for key, value in weight.items() if value == 0} == gone and len(weight) == 16
        for batch in batches:
            assert batch.region_BHW.flatten(1).any(1).eq(batch.weight_B > 0).all()
        passes = quarantine.seen // 16  # the thread may have counted a batch more than was taken
        assert quarantine.counts["low_quality"] >= (8 * passes if minimum else 0)
        assert ("min_quality" in described) == bool(minimum)
    assert orders[0.5] == orders[None]
    assert {json.loads(line)["reason"] for line in path.read_text().splitlines()} == {"bad_image"}


def test_the_filter_does_not_stop_a_run_and_what_is_bad_still_does(halves: tuple[DataSpec, set[str], Path]) -> None:
    """One of eight that are left is bad: 0.125 is not exceeded, 0.12 is, though it is one of sixteen."""
    data, _, path = halves
    with Loader(data, {"r": SIDECAR}, views=("clean",), seed=3) as loader:
        for _ in range(4):
            next(loader)
    strict = DataSpec(**{**vars(data), "max_bad_fraction": 0.12})
    says = r"1 of 8 samples are bad: 1 bad_image \([^;]*s0_000[^;]*; they are listed"
    with Loader(strict, {"r": SIDECAR}, views=("clean",), seed=3, quarantine=Quarantine(str(path), 0.12)) as loader:
        next(loader)
        with pytest.raises(DataError, match=says):
            next(loader)


def test_a_quarantine_counts_the_filtered_apart() -> None:
    poor, broken = BadSample("k", "t", "low_quality"), BadSample("l", "t", "bad_image")
    quarantine = Quarantine(None, 0.1, minimum_seen=10)
    quarantine.record(20, [poor] * 15)
    assert (quarantine.seen, quarantine.bad, quarantine.filtered) == (20, 0, 15)
    quarantine.record(1, [broken])  # one of six, but six are too few
    with pytest.raises(DataError, match="2 of 11 samples are bad: 2 bad_image"):
        quarantine.record(5, [broken])
    everything = Quarantine(None, 0.0)
    everything.record(8, [poor] * 8, end_of_pass=True)  # nothing is left to judge
    assert everything.counts == {"low_quality": 8}


@pytest.mark.parametrize(
    ("description", "labels", "minimum", "says"),
    [
        ({}, True, 0.5, r"is 0\.5, and .*l says nothing of .*`fathom label run --quality flip`"),
        ({"quality": "off"}, True, 0.5, r"is 0\.5, and .*l says nothing of .*`fathom label run --quality flip`"),
        ({"quality": "flip"}, False, 0.5, r"is 0\.5, and the role reads no pseudo-labels: remove it"),
        ({"quality": "flip"}, True, 1.5, r"is 1\.5: it must be between 0 and 1"),
    ],
)
def test_a_filter_without_qualities_is_refused(
    tmp_path: Path, description: dict[str, Any], labels: bool, minimum: float, says: str
) -> None:
    shards = shards_of([4], labelled)
    folder = sidecar(tmp_path / "l", shards, dict.fromkeys(shards[0], 1.0), **description)
    role = RoleSpec(
        datasets=(write_dataset(tmp_path / "d", shards),), labels=(folder,), batch=2, lanes=1, min_quality=minimum
    )
    data = DataSpec(roles={"r": role}, input_size=28)
    with pytest.raises(DataError, match=r"^data\.roles\.r\.min_quality " + says):
        Loader(data, {"r": RoleNeeds(sidecar=labels)}, views=("clean",), seed=0)


@pytest.mark.parametrize("quality", ["flip", "flip+scale"])
def test_a_filter_with_qualities_or_none_at_all_is_accepted(quality: str) -> None:
    label_quality.check_filter("f", 0.5, {"l": {"quality": quality}})
    label_quality.check_filter("f", None, {"l": {"quality": "off"}})
    label_quality.check_filter("f", None, {})
