"""`fathom label` where dataset, labels or both lie in an object store: what is written is what a local run writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import storage
from cluster.places import remote_store
from cluster.runtime import ray_session
from dataio.dataset import Dataset
from dataio.labels import LabelStore
from tests.dataio.fakes import shards_of, unlabelled, write_dataset
from tests.launcher.test_verbs_label import called
from tests.trainer.test_labelling import save_network

pytestmark = pytest.mark.timeout(900)

SHARDS, EACH = 4, 5
OPTIONS = ("--input-size", "28", "--quality", "flip", "--batch", "2")
STEM, VICTIM = "000002", "s2_001"


@pytest.fixture(autouse=True)
def session(s3: str) -> Iterator[None]:
    """Ray's processes have the environment of their start: the store's address and credentials are in it by then."""
    with ray_session(cpus=2):
        yield


@dataclass(frozen=True)
class Made:
    """A local dataset with an image that cannot be decoded, its copy in the store, and the labels of a local run."""

    teacher: str
    local: str
    remote: str
    labels: str
    whole: bytes  # the shard of that image, as it should be


@pytest.fixture
def made(session: None, s3: str, tmp_path: Path) -> Made:
    shards = shards_of([EACH] * SHARDS, unlabelled)
    local = write_dataset(tmp_path / "photos", shards, with_depth=False)
    Dataset.open(local)  # writes the indexes: they show nothing of what follows
    tar = Path(local) / "shards" / f"{STEM}.tar"
    whole, image = tar.read_bytes(), shards[2][VICTIM]["jpg"]
    table = image.index(b"\xff\xc4") + 5  # how many Huffman codes have each length: too many
    tar.write_bytes(whole.replace(image, image[:table] + b"\xff" * 16 + image[table + 16 :]))
    copied(Path(local), f"{s3}/photos")
    teacher = save_network(tmp_path / "teacher", 3)
    return Made(teacher, local, f"{s3}/photos", run(local, teacher), whole)


def copied(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.atomic_write(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def run(dataset: str, teacher: str, *more: str) -> str:
    """The folder of the labels."""
    status, out, err = called("run", dataset, "--weights", teacher, *OPTIONS, *more)
    assert status == 0, err
    assert "warning" not in err and "1 of 20 images have no label" in err
    return out.strip()


def content(labels: str) -> dict[str, bytes]:
    """What two runs must agree in."""
    store = LabelStore.open(labels)
    found = {"labels.json": storage.read_bytes(f"{labels}/labels.json")}
    for stem in store.committed():
        entry = store.entry(stem)
        assert entry is not None
        tar = store.tar(stem)
        for path in (tar, tar.removesuffix(".tar") + ".idx"):
            found[path.removeprefix(labels)] = storage.read_bytes(path)
        found[stem] = json.dumps(entry.content(), sort_keys=True).encode()
    return found


def names(url: str) -> list[str]:
    """All objects below a URL."""
    fs, path = remote_store(url)
    fs.invalidate_cache()
    return sorted(name.removeprefix(path) for name in fs.find(path))


def test_all_of_it_in_a_store(made: Made, s3: str, tmp_path: Path) -> None:
    labels = run(made.remote, made.teacher)
    assert labels == f"{made.remote}/labels/{Path(made.labels).name}"
    assert content(labels) == content(made.labels) and len(content(labels)) == 1 + 3 * SHARDS
    shards = [f"/shards/{number:06d}.{ending}" for number in range(SHARDS) for ending in ("idx", "tar")]
    ledger = [f"/ledger/{number:06d}.json" for number in range(SHARDS)]
    assert names(labels) == ["/labels.json", *ledger, *shards]

    status, out, err = called("status", labels)
    assert status == 0, err
    assert out.startswith(f"shards: {SHARDS} done, 0 in hand, 0 to do; runs at work: 0\nimages: 20, of which 1 without")
    status, out, _ = called("status", labels, "--json", "--dataset", made.local)
    assert status == 0 and json.loads(out)["todo"] == 0 and json.loads(out)["status"]["failures"] == {"bad_image": 1}
    assert called("verify", labels)[0] == 0
    assert called("verify", labels, "--workers", "2", "--report", f"{s3}/report.json")[0] == 0
    assert json.loads(storage.read_bytes(f"{s3}/report.json"))["samples"] == 20

    stamps = {name: storage.stamp(labels + name) for name in names(labels)}
    status, out, err = called("run", made.remote, "--weights", made.teacher, *OPTIONS)
    assert (status, out) == (0, f"{labels}\n") and "no label" not in err
    assert {name: storage.stamp(labels + name) for name in names(labels)} == stamps

    storage.atomic_write(f"{made.remote}/shards/{STEM}.tar", made.whole)
    status, out, err = called("retry", labels, "--weights", made.teacher)
    assert (status, out) == (0, f"{labels}\n") and "no label" not in err
    changed = {name for name in names(labels) if storage.stamp(labels + name) != stamps[name]}
    assert changed == {f"/shards/{STEM}.tar", f"/shards/{STEM}.idx", f"/ledger/{STEM}.json"}
    assert called("verify", labels)[0] == 0
    (Path(made.local) / "shards" / f"{STEM}.tar").write_bytes(made.whole)
    assert called("retry", made.labels, "--weights", made.teacher)[0] == 0
    assert content(labels) == content(made.labels)


def test_one_of_both_in_a_store(made: Made, s3: str, tmp_path: Path) -> None:
    """Photographs behind a URL and labels on the disk, and the other way round."""
    expected = content(made.labels)
    here = run(made.remote, made.teacher, "--out", str(tmp_path / "labels"))
    there = run(made.local, made.teacher, "--out", f"{s3}/labels", "--workers", "1")
    assert Path(here).parent == tmp_path / "labels" and there.startswith(f"{s3}/labels/")
    assert content(here) == content(there) == expected
    for labels, dataset in ((here, made.remote), (there, made.local)):
        assert called("verify", labels, "--dataset", dataset)[0] == 0
        status, out, _ = called("status", labels)
        assert status == 0 and out.startswith(f"shards: {SHARDS} done, 0 in hand; runs at work: 0\n")
    shutil.rmtree(Path(here) / "ledger")
    assert called("run", made.remote, "--weights", made.teacher, *OPTIONS, "--out", str(tmp_path / "labels"))[0] == 0
    assert content(here) == expected, "adopted: what the tars say is what stood there"
