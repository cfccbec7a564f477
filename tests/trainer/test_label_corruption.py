"""Damaged and odd samples, and shards, through labelling: the loader's cases (tests/dataio/cases.py), one to a shard.

Every case lies among good samples, whose labels are compared bit for bit with those of a run without the fault: of all
of the shard where the image is decoded in vain and so keeps its row in the batch, else of the others alone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import Unreachable
from dataio.dataset import Dataset, DatasetInfo, _parsed
from dataio.index import ShardIndex, index_path
from dataio.label_check import verify
from dataio.labels import LabelStore
from dataio.spec import DataError
from dataio.types import AffineCode
from tests.dataio.cases import (
    EXACT,
    FAULTS,
    ODDITIES,
    TURNED,
    VICTIM,
    Entry,
    H,
    W,
    by_pillow,
    clean_shards,
    entries_of,
    write_tar,
)
from tests.dataio.fakes import png
from tests.trainer.test_labelling import config_of, disparity, grip, label, labeller, save_network
from trainer.label_retry import Retrier
from trainer.label_worker import Labeller
from trainer.labelling import describe

pytestmark = pytest.mark.timeout(300)  # a hang is a failure

CLEAN = clean_shards()[0]
OF_IMAGES = {"bad_image", "missing_image", "too_large"}  # the rest of the reasons are of a depth, which nobody asks for
DECODED_IN_VAIN = {"truncated JPEG", "JPEG without an end"}
Shard = Mapping[str, Mapping[str, bytes]]
Seen = Mapping[str, Mapping[str, bytes]]  # key -> members of a label shard


def with_victim(members: Mapping[str, bytes]) -> dict[str, Mapping[str, bytes]]:
    return {key: members if key == VICTIM else value for key, value in CLEAN.items()}


def without_victim() -> dict[str, Mapping[str, bytes]]:
    return {key: value for key, value in CLEAN.items() if key != VICTIM}


def shards() -> dict[str, Shard]:
    """What every case's shard holds."""
    faults = {name: with_victim(members()) for name, (_, members) in FAULTS.items()}
    odd = {name: with_victim({extension: make()}) for name, (extension, _, make) in {**ODDITIES, **TURNED}.items()}
    pixels = {
        f"{name} as pixels": with_victim({"png": png(by_pillow(make()))})
        for name, (_, _, make) in {**ODDITIES, **TURNED}.items()
    }
    return {"whole": CLEAN, "without": without_victim(), **faults, **odd, **pixels}


SHARDS = shards()
STEMS = {name: f"{number:06d}" for number, name in enumerate(SHARDS)}


def write(folder: Path, content: Mapping[str, list[Entry]]) -> str:
    """A labelled dataset, one shard to a stem."""
    (folder / "shards").mkdir(parents=True)
    samples = 0
    for stem, entries in content.items():
        tar = folder / "shards" / f"{stem}.tar"
        write_tar(tar, entries)
        samples += len(ShardIndex.build(str(tar)))
    code = AffineCode(scale=0.001)
    DatasetInfo(name=folder.name, role="labelled", quantity="depth_m", code=code, samples=samples).write(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_network(tmp_path_factory.mktemp("teacher") / "weights", 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    content = {STEMS[name]: entries_of(shard) for name, shard in SHARDS.items()}
    return write(tmp_path_factory.mktemp("data") / "cases", content)


@dataclass(frozen=True)
class Labelled:
    store: LabelStore
    dataset: Dataset

    def of(self, name: str) -> Seen:
        return read(self.store, STEMS[name])


def read(store: LabelStore, stem: str) -> dict[str, Mapping[str, bytes]]:
    return {sample.key: sample.members for sample in store.read(stem)}


@pytest.fixture(scope="module", params=[1, 4])
def labelled(
    request: pytest.FixtureRequest, dataset: str, weights: str, tmp_path_factory: pytest.TempPathFactory
) -> Labelled:
    """All cases in one go, in batches of 1 and of 4."""
    config = config_of(dataset, weights, batch=request.param)
    store, _ = label(config, tmp_path_factory.mktemp("labels") / f"by-{request.param}")
    return Labelled(store, Dataset.open(dataset))


def failures(store: LabelStore, stem: str) -> dict[str, list[str]]:
    """As the ledger says, which must be as KEY.json does."""
    entry = store.entry(stem)
    assert entry is not None
    told: dict[str, list[str]] = {}
    samples = list(store.read(stem))
    for sample in samples:
        if sample.failure is not None:
            told.setdefault(sample.failure, []).append(sample.key)
            assert sample.members.keys() == {"json"}
            assert json.loads(sample.members["json"]) == {"failure": sample.failure}
    assert entry.failures == told and entry.samples == len(samples)
    return told


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_labelled_is_named_and_the_others_are_as_ever(labelled: Labelled, name: str) -> None:
    reason = FAULTS[name][0]
    found, whole, without = labelled.of(name), labelled.of("whole"), labelled.of("without")
    assert list(found) == list(CLEAN)
    if reason in OF_IMAGES:
        assert failures(labelled.store, STEMS[name]) == {reason: [VICTIM]}
        expected = whole if name in DECODED_IN_VAIN else without
    else:
        assert failures(labelled.store, STEMS[name]) == {}
        expected = whole
    for key in without:
        assert found[key] == expected[key], key


@pytest.mark.parametrize("name", [*ODDITIES, *TURNED])
def test_an_odd_picture_is_labelled_as_it_is_displayed(labelled: Labelled, name: str) -> None:
    """As another decoder sees its pixels."""
    found, pixels = labelled.of(name), labelled.of(f"{name} as pixels")
    assert failures(labelled.store, STEMS[name]) == {}
    assert {key: found[key] for key in found if key != VICTIM} == {key: pixels[key] for key in found if key != VICTIM}
    found_HW, pixels_HW = disparity(found[VICTIM]), disparity(pixels[VICTIM])
    assert found_HW.shape == pixels_HW.shape == (H, W)
    tolerance = {**ODDITIES, **TURNED}[name][1]
    if tolerance == EXACT:
        assert found[VICTIM] == pixels[VICTIM]
    assert np.abs(found_HW - pixels_HW).max() < 0.1 * np.ptp(pixels_HW)


def test_every_key_is_accounted_for(labelled: Labelled) -> None:
    report = verify(labelled.store, labelled.dataset)
    assert report.ok, str(report)
    expected: dict[str, int] = {}
    for reason, _ in FAULTS.values():
        if reason in OF_IMAGES:
            expected[reason] = expected.get(reason, 0) + 1
    assert report.failures == expected and report.samples == sum(map(len, SHARDS.values()))
    labelled.store.complete_for(labelled.dataset)


# --- tars


def renamed(name: str) -> list[Entry]:
    return entries_of({name if key == VICTIM else key: members for key, members in CLEAN.items()})


def twice(apart: bool) -> list[Entry]:
    first = list(CLEAN.items())
    neighbour = first[4 if apart else 3][0]
    return [entry for key, members in first for entry in entries_of({VICTIM if key == neighbour else key: members})]


def linked() -> list[Entry]:
    """The victim's image is a link to a picture that is there."""
    entries = entries_of(CLEAN)
    link = Entry(f"{VICTIM}.jpg", type=tarfile.SYMTYPE, link=f"{next(iter(CLEAN))}.jpg")
    return [link if entry.name == link.name else entry for entry in entries]


def with_others() -> list[Entry]:
    *first, last = entries_of(CLEAN)
    return [
        Entry("folder", type=tarfile.DIRTYPE),
        Entry("folder.jpg", type=tarfile.DIRTYPE),
        *first,
        Entry("outside.jpg", type=tarfile.SYMTYPE, link="../../outside.jpg"),
        Entry("again.jpg", type=tarfile.LNKTYPE, link=f"{VICTIM}.jpg"),
        Entry("pipe.jpg", type=tarfile.FIFOTYPE),
        last,
    ]


@dataclass(frozen=True)
class Tar:
    """A shard: what fails and why, what it is written from, and what happens to it once it has an index."""

    entries: list[Entry]
    bad: Mapping[str, str]
    damage: Callable[[Path, ShardIndex], None] = lambda tar, index: None


def cut(sample: int, behind: int) -> Callable[[Path, ShardIndex], None]:
    return lambda tar, index: os.truncate(tar, index.samples[sample].start + behind)


def spoil(member: int) -> Callable[[Path, ShardIndex], None]:
    """The victim's first or second header, by a disk that does not date it."""

    def damage(tar: Path, index: ShardIndex) -> None:
        before, entry = tar.stat(), index.samples[2]
        at = entry.start if member == 0 else list(entry.members.values())[1][0] - 512
        with open(tar, "r+b") as file:
            file.seek(at)
            file.write(b"\x9c" * 512)
        os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


UNREADABLE = dict.fromkeys(list(CLEAN)[2:], "unreadable_member")
TARS: dict[str, Tar] = {
    "folders, links and devices": Tar(with_others(), {}),
    "a link in place of an image": Tar(linked(), {VICTIM: "missing_image"}),
    "a name that leads up": Tar(renamed("../evil"), {"../evil": "unsafe_name"}),
    "a name that leads up from below": Tar(renamed("a/../../evil"), {"a/../../evil": "unsafe_name"}),
    "an absolute name": Tar(renamed("/evil"), {"/evil": "unsafe_name"}),
    "a key twice": Tar(twice(False), {VICTIM: "duplicate_key"}),
    "a key twice, apart": Tar(twice(True), {VICTIM: "duplicate_key"}),
    "no samples": Tar([], {}),
    "no samples, but a folder": Tar([Entry("shards", type=tarfile.DIRTYPE)], {}),
    "listed in the quarantine": Tar(entries_of(CLEAN), {VICTIM: "duplicate"}),
    "cut in a header": Tar(entries_of(CLEAN), UNREADABLE, cut(2, 100)),
    "cut in an image": Tar(entries_of(CLEAN), UNREADABLE, cut(2, 3000)),
    "cut before the last": Tar(entries_of(CLEAN), {list(CLEAN)[5]: "unreadable_member"}, cut(5, 0)),
    "nothing left": Tar(entries_of(CLEAN), dict.fromkeys(CLEAN, "unreadable_member"), cut(0, 0)),
    "a spoiled first header": Tar(entries_of(CLEAN), {VICTIM: "unreadable_member"}, spoil(0)),
    "a spoiled second header": Tar(entries_of(CLEAN), {VICTIM: "unreadable_member"}, spoil(1)),
}
TAR_STEMS = {name: f"{2 * number:06d}" for number, name in enumerate(TARS)}


def beside(name: str) -> str:
    """The shard that holds what of a case is good."""
    return f"{int(TAR_STEMS[name]) + 1:06d}"


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "tars"
    content: dict[str, list[Entry]] = {}
    for name, case in TARS.items():
        keys = dict.fromkeys(entry.name.removesuffix(".jpg") for entry in case.entries if entry.name.endswith(".jpg"))
        content[TAR_STEMS[name]] = case.entries
        content[beside(name)] = entries_of({key: CLEAN[key] for key in keys if key in CLEAN and key not in case.bad})
    write(folder, content)
    paths = {name: folder / "shards" / f"{stem}.tar" for name, stem in TAR_STEMS.items()}
    listed = {"shard": str(paths["listed in the quarantine"]), "key": VICTIM, "reason": "duplicate"}
    (folder / "quarantine.jsonl").write_text(json.dumps(listed) + "\n")
    for shard in Dataset.open(str(folder)).shards:  # writes the indexes, which tell what the tars held
        for name, path in paths.items():
            if str(path) == shard.tar:
                TARS[name].damage(path, shard.index)
    return str(folder)


@pytest.mark.parametrize("batch", [1, 4])
def test_tars_of_all_kinds(tars: str, weights: str, tmp_path: Path, batch: int) -> None:
    """In one run: each key of each is labelled or failed, and the good ones are as without the bad."""
    before = sorted(path for path in Path(tars).rglob("*"))
    store, _ = label(config_of(tars, weights, batch=batch), tmp_path / "labels" / "x")
    for name, case in TARS.items():
        found = list(store.read(TAR_STEMS[name]))
        counts = Counter(sample.failure for sample in found)
        expected = Counter(case.bad.values())
        if "duplicate_key" in expected:
            expected["duplicate_key"] = 2
        assert {reason: count for reason, count in counts.items() if reason} == expected, name
        assert {sample.key for sample in found if sample.failure} == case.bad.keys(), name
        good = {sample.key: sample.members for sample in found if not sample.failure}
        assert good == read(store, beside(name)), name
        failures(store, TAR_STEMS[name])
    report = verify(store, Dataset.open(tars))
    assert report.ok, str(report)
    assert sorted(path for path in Path(tars).rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels"]
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["x"]


# --- shards of which nothing can be read, found at work


def remove(tar: Path) -> None:
    tar.unlink()


def replace_by_a_folder(tar: Path) -> None:
    tar.unlink()
    tar.mkdir()


def replace_by_itself(tar: Path) -> None:
    tar.unlink()
    tar.symlink_to(tar.name)


def replace_by_a_page(tar: Path) -> None:
    tar.write_bytes(b"<html>404</html>" * 10_000)


def replace_by_another(tar: Path) -> None:
    write_tar(tar, entries_of(without_victim()))


def cut_without_an_index(tar: Path) -> None:
    os.truncate(tar, 3000)
    os.remove(index_path(str(tar)))


LOST: dict[Callable[[Path], None], str] = {
    remove: "missing: restore it, or pack the dataset again",
    replace_by_a_folder: "cannot read: it is a folder",
    replace_by_itself: "missing: restore it, or pack the dataset again",
    replace_by_a_page: "not a tar file",
    replace_by_another: "changed since the dataset was opened: start again",
    cut_without_an_index: "3000 bytes found, at least .* copy it again",
}


def three_shards(folder: Path) -> tuple[str, Path]:
    """A dataset, and the tar in its middle."""
    data = write(folder / "photos", {f"{number:06d}": entries_of(CLEAN) for number in range(3)})
    Dataset.open(data)  # writes the indexes
    _parsed.cache_clear()
    return data, Path(data) / "shards" / "000001.tar"


@pytest.mark.parametrize("lose", LOST, ids=lambda lose: lose.__name__)
def test_a_shard_that_cannot_be_read_is_given_up_and_after_a_repair_the_same_finishes(
    weights: str, labelled_one: LabelStore, tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    data, tar = three_shards(tmp_path)
    kept = tmp_path / "kept"
    shutil.copytree(tar.parent, kept)
    config = config_of(data, weights)
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(data)))
    with labeller(config, store) as worker:
        lose(tar)
        for stem in ("000000", "000002"):
            assert worker.process(stem, grip(stem))["failed"] == 0
        with pytest.raises(DataError, match=LOST[lose]) as caught:  # what has the pool give up this one and go on
            worker.process("000001", grip("000001"))
        assert str(tar) in str(caught.value) and "\n" not in str(caught.value)
    assert store.committed() == ["000000", "000002"] and not list(Path(store.path).rglob("*000001*"))
    shutil.rmtree(tar.parent)
    shutil.copytree(kept, tar.parent)
    _parsed.cache_clear()
    store, entries = label(config, Path(store.path))
    assert verify(store, Dataset.open(data)).ok
    assert [entry.failures for entry in entries] == [{}, {}, {}]
    for stem in ("000000", "000001", "000002"):
        assert read(store, stem) == read(labelled_one, "000000")


@pytest.fixture(scope="module")
def labelled_one(weights: str, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    folder = tmp_path_factory.mktemp("one")
    data = write(folder / "photos", {"000000": entries_of(CLEAN)})
    return label(config_of(data, weights), folder / "labels")[0]


def test_what_a_cut_has_lost_is_labelled_by_a_retry(weights: str, labelled_one: LabelStore, tmp_path: Path) -> None:
    """With one image at a time: as if nothing had ever been wrong."""
    data, tar = three_shards(tmp_path)
    whole = tar.read_bytes()
    config = config_of(data, weights, batch=1)
    expected, _ = label(config, tmp_path / "expected")
    os.truncate(tar, 3000)
    store, entries = label(config, tmp_path / "labels")
    assert [entry.failed for entry in entries] == [0, 6, 0]
    tar.write_bytes(whole)
    with labeller(config, store, Retrier, None) as worker:
        assert worker.process("000001", grip("000001"))["failed"] == 0
    assert [entry.content() for entry in store.entries()] == [entry.content() for entry in expected.entries()]
    for stem in ("000000", "000001", "000002"):
        assert Path(store.tar(stem)).read_bytes() == Path(expected.tar(stem)).read_bytes()


@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ETIMEDOUT])
def test_of_a_mount_that_fails_no_image_is_to_blame(
    weights: str, tmp_path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is committed; the same shard is labelled, whole, once the mount is back."""
    data, tar = three_shards(tmp_path)
    config = config_of(data, weights)
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(data)))
    real = getattr(os, call)

    def fail(what: Any, *args: Any, **kwargs: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{what}") if call == "pread" else what
        if str(path) == str(tar):
            raise OSError(number, os.strerror(number), str(path) if call == "open" else None)
        return real(what, *args, **kwargs)

    with labeller(config, store) as worker:
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(Unreachable, match=f"^{re.escape(str(tar))}: cannot read: "):
                worker.process("000001", grip("000001"))
        assert store.committed() == [] and not store.clean()
        assert worker.process("000001", grip("000001"))["failed"] == 0


def test_of_a_dataset_that_is_not_there_no_shard_is_to_blame(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = three_shards(tmp_path)
    config = config_of(data, weights)
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(data)))
    with labeller(config, store) as worker:
        os.rename(data, f"{data}-away")
        with pytest.raises(Unreachable, match=f"photos: not there on {socket.gethostname()}: mount it"):
            worker.process("000001", grip("000001"))
    opened = Dataset.open(f"{data}-away")
    with pytest.raises(Unreachable, match="mount it on every machine"):
        Labeller(config.model_dump(mode="json"), store.path, "0badcafe", replace(opened, path=data))
    os.rename(f"{data}-away", data)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    jxl = config_of(data, weights, encoding="jxl")
    with pytest.raises(DataError, match=f"^{socket.gethostname()}: JPEG XL labels need imagecodecs"):
        Labeller(jxl.model_dump(mode="json"), store.path, "0badcafe", Dataset.open(data))


def test_a_shard_that_has_changed_since_the_run_began_is_refused(weights: str, tmp_path: Path) -> None:
    """A worker begins later than the run, with the dataset as the run has seen it."""
    data, tar = three_shards(tmp_path)
    config = config_of(data, weights)
    store = LabelStore.create(str(tmp_path / "labels"), describe(config, Dataset.open(data)))
    with labeller(config, store) as worker:
        write_tar(tar, entries_of({"other" if key == VICTIM else key: members for key, members in CLEAN.items()}))
        with pytest.raises(DataError, match=f"{tar.name}: changed since the dataset was opened: start again"):
            worker.process(tar.stem, grip(tar.stem))
        with pytest.raises(DataError, match=r"photos has no shard '000009': move it"):
            worker.process("000009", grip("000009"))
