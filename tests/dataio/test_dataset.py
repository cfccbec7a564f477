"""Opening datasets: every mistake in one line, naming the file and the remedy."""

import json
import os
import re
import shutil
from pathlib import Path

import fsspec
import pytest

from dataio.dataset import Dataset, DatasetInfo
from dataio.shards import ShardWriter
from dataio.spec import DataError
from dataio.types import AffineCode

INFO = DatasetInfo(name="d", role="labelled", quantity="depth_m", code=AffineCode(scale=0.001), samples=5)


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(str(tmp_path / "d" / "shards"), shard_samples=2) as writer:
        for i in range(5):
            writer.write(f"k{i}", {"jpg": b"j" * 700, "depth.png": f"depth {i}".encode()})
    INFO.write(str(tmp_path / "d"))
    return tmp_path / "d"


def edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content.update(changes)
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v != "DELETE"}))


def test_open(folder):
    dataset = Dataset.open(str(folder))
    assert dataset.info == INFO
    assert [(shard.stem, shard.samples) for shard in dataset.shards] == [("000000", 2), ("000001", 2), ("000002", 1)]
    assert dataset.starts == [0, 2, 4, 5]
    entry = dataset.shards[1].index.samples[1]
    assert entry.key == "k3"
    assert dataset.shards[1].read(entry, "depth.png") == b"depth 3"
    assert dataset.shards[1].read(entry, "sky.png") is None


def test_fingerprint_depends_on_what_reading_depends_on(folder, tmp_path):
    fingerprint = Dataset.open(str(folder)).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert Dataset.open(str(copy)).fingerprint == fingerprint
    edit(copy, name="other")
    assert Dataset.open(str(copy)).fingerprint == fingerprint
    edit(copy, code={"scale": 0.002, "shift": 0, "zero": 0})
    assert Dataset.open(str(copy)).fingerprint != fingerprint
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    for ending in ("tar", "idx"):
        (copy / "shards" / f"000002.{ending}").rename(copy / "shards" / f"000003.{ending}")
    assert Dataset.open(str(copy)).fingerprint != fingerprint


def test_unlabelled(folder):
    edit(folder, role="unlabelled", quantity=None, code=None)
    assert Dataset.open(str(folder)).info.code is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qantity": "depth_m"}, "unknown key 'qantity': did you mean 'quantity'"),
        ({"xyzzy": 1}, "unknown key 'xyzzy': allowed are name"),
        ({"code": {"scal": 1.0}}, "unknown key 'code.scal': did you mean 'scale'"),
        ({"code": {"shift": 1.0}}, "'code.scale' is missing"),
        ({"code": {"scale": 0}}, "code.scale is 0"),
        ({"code": {"scale": "x"}}, "code.scale is 'x'"),
        ({"code": None}, "code is None: an object"),
        ({"role": "DELETE"}, "'role' is missing"),
        ({"role": "labeled"}, "role is 'labeled': allowed are labelled, unlabelled"),
        ({"quantity": "feet"}, "quantity is 'feet': allowed are depth_m, disparity, null"),
        ({"quantity": None}, "needs a quantity"),
        ({"role": "unlabelled"}, "needs quantity null"),
        ({"role": "unlabelled", "quantity": None}, "null, as the role is unlabelled"),
        ({"name": ""}, "name is ''"),
        ({"samples": 0}, "states 0 samples"),
        ({"samples": "5"}, "samples is '5'"),
        ({"samples": 6}, "states 6 samples, 3 shards hold 5"),
        ({"format_version": 2}, "format_version is 2, this fathom reads 1"),
    ],
)
def test_wrong_info(folder, changes, says):
    edit(folder, **changes)
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        Dataset.open(str(folder))
    assert str(folder / "dataset.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_wrong_info_is_not_written(tmp_path):
    with pytest.raises(DataError, match="states 0 samples"):
        DatasetInfo(name="d", role="unlabelled", quantity=None, code=None, samples=0).write(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"no such folder.*fathom data pack"):
        Dataset.open(str(tmp_path / "nowhere"))


def test_no_dataset_json(folder):
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"no dataset\.json.*fathom data pack"):
        Dataset.open(str(folder))


@pytest.mark.parametrize("text", ["{", "", "[]", "\xff\xfe"])
def test_invalid_json(folder, text):
    (folder / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"dataset\.json: (not valid JSON|holds list)"):
        Dataset.open(str(folder))


def test_no_shards(folder):
    shutil.rmtree(folder / "shards")
    with pytest.raises(DataError, match="no shards"):
        Dataset.open(str(folder))


def test_lost_shard(folder):
    (folder / "shards" / "000001.tar").unlink()
    with pytest.raises(DataError, match="states 5 samples, 2 shards hold 3"):
        Dataset.open(str(folder))


def test_cut_shard(folder):
    whole = Dataset.open(str(folder))
    os.truncate(folder / "shards" / "000001.tar", 1500)
    # its index tells what it held: reading counts what is lost, and the order of all others stays
    assert Dataset.open(str(folder)).fingerprint == whole.fingerprint
    (folder / "shards" / "000001.idx").unlink()
    with pytest.raises(DataError, match=r"000001\.tar: 1500 bytes found, at least \d+ expected"):
        Dataset.open(str(folder))


def test_indexes_are_rebuilt(folder):
    text = (folder / "shards" / "000000.idx").read_text()
    fingerprint = Dataset.open(str(folder)).fingerprint
    (folder / "shards" / "000000.idx").unlink()
    assert Dataset.open(str(folder)).fingerprint == fingerprint
    assert (folder / "shards" / "000000.idx").read_text() == text


def test_a_shard_replaced_under_an_open_dataset_is_noticed(folder):
    dataset = Dataset.open(str(folder))
    with ShardWriter(str(folder / "shards"), shard_samples=2) as writer:
        writer.write("other", {"jpg": b"j"})
    with pytest.raises(DataError, match="changed since"):
        dataset.shards[0].index  # noqa: B018


def test_a_damaged_index_line_that_opening_does_not_see(folder):
    with ShardWriter(str(folder / "shards")) as writer:
        for i in range(5):
            writer.write(f"k{i}", {"jpg": b"j"})
    for stem in ("000001", "000002"):
        (folder / "shards" / f"{stem}.tar").unlink()
    index = folder / "shards" / "000000.idx"
    lines = index.read_text().split("\n")
    index.write_text("\n".join([*lines[:2], "gone", *lines[3:]]))
    assert [entry.key for entry in Dataset.open(str(folder)).shards[0].index.samples] == ["k0", "k1", "k2", "k3", "k4"]


def test_over_a_url(folder):
    fsspec.filesystem("memory").put(str(folder), "/dataset-test", recursive=True)
    local, remote = Dataset.open(str(folder)), Dataset.open("memory://dataset-test")
    assert remote.fingerprint == local.fingerprint
    assert remote.shards[2].read(remote.shards[2].index.samples[0], "depth.png") == b"depth 4"
