"""`fathom label`: what each verb prints and leaves behind, and how it ends. One session of Ray for the file."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from safetensors.torch import load_file

from cluster.runtime import ray_session
from dataio.dataset import Dataset
from dataio.labels import LabelStore
from launcher.cli import build_app
from launcher.errors import run_main
from launcher.parsing import parsed
from tests.dataio.fakes import shards_of, unlabelled, write_dataset, write_labels
from tests.launcher.conftest import Run
from tests.trainer.test_labelling import save_network
from trainer.labelling import make_labeller

GROUP = "label"
SHARDS, EACH = 6, 5
SIZE = ("--input-size", "28")
VICTIM = ("000001", "s1_002")

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class World:
    """A dataset with one image that cannot be decoded, a teacher, and what a whole run printed. Tests only read it."""

    folder: Path
    labels: Path
    status: int
    out: str
    err: str
    whole: bytes  # the first shard that has a damaged image, as it was before
    damaged: bytes

    @property
    def dataset(self) -> str:
        return str(self.folder / "photos")

    @property
    def teacher(self) -> str:
        return str(self.folder / "teacher")


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One start of Ray for all runs of this file: each starts its workers alone."""
    with ray_session(cpus=2):
        yield


@pytest.fixture(scope="module")
def world(session: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made by `label run`: rated, and with an image that has no label."""
    folder = tmp_path_factory.mktemp("world")
    save_network(folder / "teacher", 3)
    shards = shards_of([EACH] * SHARDS, unlabelled)
    write_dataset(folder / "photos", shards, with_depth=False)
    tar = folder / "photos" / "shards" / f"{VICTIM[0]}.tar"
    Dataset.open(str(folder / "photos"))  # writes the indexes: they show nothing of what follows
    whole = tar.read_bytes()
    image = shards[1][VICTIM[1]]["jpg"]
    table = image.index(b"\xff\xc4") + 5  # how many Huffman codes have each length: too many
    damaged = whole.replace(image, image[:table] + b"\xff" * 16 + image[table + 16 :])
    tar.write_bytes(damaged)
    arguments = ["run", str(folder / "photos"), "--weights", str(folder / "teacher"), *SIZE, "--quality", "flip"]
    status, out, err = called(*arguments)
    return World(folder, Path(out.splitlines()[-1]), status, out, err, whole, damaged)


def called(*arguments: str) -> tuple[int, str, str]:
    """As the fixture `fathom`, outside a test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        run_main(build_app(), [GROUP, *arguments])
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture
def copy(world: World, tmp_path: Path) -> World:
    """To be spoiled."""
    folder = tmp_path / "world"
    shutil.copytree(world.folder, folder)
    Dataset.open(str(folder / "photos"))  # copied indexes may be older than their tars: made again
    labels = folder / "photos" / "labels" / world.labels.name
    return World(folder, labels, world.status, world.out, world.err, world.whole, world.damaged)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(done: tuple[int, str, str], *words: str) -> None:
    """Status 2, one line that holds all of the words, nothing on stdout."""
    status, out, err = done
    assert (status, out) == (2, ""), (status, out, err)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


# --- help


@pytest.mark.parametrize("verb", ["run", "retry", "status", "verify"])
def test_the_example_of_the_help_can_be_typed(verb: str) -> None:
    status, out, _ = called(verb, "--help")
    assert status == 0
    lines = [line.strip() for line in out.partition("Example:")[2].splitlines()]
    examples = [line for line in lines if line.startswith("fathom ")]
    assert examples
    for line in examples:
        words, _ = parsed(shlex.split(line)[1:])
        assert words == ["label", verb]


def test_the_help_of_run_states_what_quality_costs() -> None:
    help_text = " ".join(called("run", "--help")[1].split())
    assert "flip one more (none with --flip), flip+scale another at three quarters of the size" in help_text
    command: Any = typer.main.get_command(build_app())
    options = {option for one in command.commands["label"].commands["run"].params for option in one.opts}
    assert {"--quality", "--encoding", "--precision", "--batch", "--compile", "--lease", "--workers"} <= options


# --- run


def test_a_run_prints_the_folder_and_says_what_has_no_label(world: World) -> None:
    assert world.status == 0, world.err
    assert world.out == f"{world.labels}\n"
    assert world.labels.parent == Path(world.dataset) / "labels" and re.fullmatch("[0-9a-f]{16}", world.labels.name)
    assert "1 of 30 images have no label; `fathom label status` says why" in world.err
    assert "label: 6/6 shards" in world.err
    store = LabelStore.open(str(world.labels))
    assert store.committed() == [f"{number:06d}" for number in range(SHARDS)]
    assert [entry.failures for entry in store.entries() if entry.failures] == [{"bad_image": [VICTIM[1]]}]
    assert {path.name for path in world.labels.iterdir()} <= {
        "labels.json", "shards", "ledger", "leases", "telemetry",
    }  # fmt: skip
    assert not any((world.labels / name).exists() and list((world.labels / name).iterdir())
                   for name in ("leases", "telemetry"))  # fmt: skip


def test_a_second_run_finds_nothing_to_do(fathom: Run, world: World) -> None:
    before = snapshot(world.labels)
    arguments = (world.dataset, "--weights", world.teacher, *SIZE, "--quality", "flip", "--workers", "1")
    status, out, err = fathom("run", *arguments)
    assert (status, out) == (0, f"{world.labels}\n")
    assert "no label" not in err
    assert snapshot(world.labels) == before


def test_relative_paths_and_another_place_for_the_labels(fathom: Run, copy: World, tmp_path: Path) -> None:
    """The same settings make the same labels, wherever they lie."""
    arguments = ("--weights", "world/teacher", *SIZE, "--quality", "flip", "--workers", "1", "--out", "elsewhere")
    status, out, err = fathom("run", "world/photos", *arguments)
    assert status == 0, err
    other = Path(out.strip())
    assert other == tmp_path / "elsewhere" / copy.labels.name
    for path in [other / "labels.json", *(other / "shards").iterdir()]:
        assert path.read_bytes() == (copy.labels / path.relative_to(other)).read_bytes()
    status, out, err = fathom("status", str(other), "--json")
    assert status == 0 and json.loads(out)["todo"] is None
    refused(fathom("verify", "elsewhere/" + other.name), "--dataset", "lies in no dataset; name the one it is of")
    assert fathom("verify", str(other), "--dataset", "world/photos")[0] == 0


def lost_at_work(stems: Sequence[str], config: dict[str, Any], store: str, dataset: Dataset, owner: str) -> Any:
    """In a worker: what makes it, and then shards are gone that were there when it looked."""
    made = make_labeller(config, store, dataset, owner)
    for stem in stems:
        (Path(config["dataset"]) / "shards" / f"{stem}.tar").unlink(missing_ok=True)
    return made


def test_shards_that_cannot_be_labelled_are_named_and_the_others_done(
    fathom: Run, copy: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same command finishes."""
    for stem in ("000003", "000004"):
        for name in (f"shards/{stem}.tar", f"shards/{stem}.idx", f"ledger/{stem}.json"):
            (copy.labels / name).unlink()
    tar = Path(copy.dataset) / "shards" / "000003.tar"
    data = tar.read_bytes()
    arguments = ("run", copy.dataset, "--weights", copy.teacher, *SIZE, "--quality", "flip", "--workers", "1")
    with monkeypatch.context() as patched:
        patched.setattr("trainer.labelling.make_labeller", functools.partial(lost_at_work, ["000003"]))
        status, out, err = fathom(*arguments)
    assert (status, out) == (1, f"{copy.labels}\n"), err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: shard 000003: {tar}: missing: restore it, or pack the dataset again"]
    assert "1 shards could not be labelled; the same command tries again" in err
    assert fathom("verify", str(copy.labels))[0] == 2  # the dataset lacks a shard
    tar.write_bytes(data)
    status, out, _ = fathom("verify", str(copy.labels))
    assert status == 1 and "1 missing (not labelled: `fathom label run` goes on)" in out
    assert fathom(*arguments)[:2] == (0, f"{copy.labels}\n")
    assert fathom("verify", str(copy.labels))[0] == 0


# --- status


def test_status_in_words(fathom: Run, world: World) -> None:
    status, out, err = fathom("status", str(world.labels))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "shards: 6 done, 0 in hand, 0 to do; runs at work: 0"
    tars = sum(path.stat().st_size for path in (world.labels / "shards").glob("*.tar"))
    assert lines[1] == f"images: 30, of which 1 without a label; {tars} bytes"
    assert lines[2] == "failed 1: bad_image"
    assert re.fullmatch(r"quality: 10 % below \d\.\d\d, 50 % below \d\.\d\d, 90 % below \d\.\d\d", lines[3])
    assert re.fullmatch(r"machine \S+: 6 shards done, 0 in hand, 30 images", lines[4]) and len(lines) == 5


def test_status_of_an_unfinished_job(fathom: Run, copy: World) -> None:
    for stem in ("000002", "000004"):
        (copy.labels / "ledger" / f"{stem}.json").unlink()
    (copy.labels / "leases").mkdir(exist_ok=True)
    claim = {
        "owner": "0badcafe", "host": "elsewhere", "space": "s", "pid": 1, "born": 1.0, "beat": 3,
        "written": 4e9, "ends": 4e9,
        "items": {"000004": 4e9}, "done": {},
        "leased": {"000004": {"worker": "0badf00d", "node": "far", "token": 7, "progress": 0.5}},
    }  # fmt: skip
    (copy.labels / "leases" / "0badcafe.json").write_text(json.dumps(claim))
    status, out, _ = fathom("status", str(copy.labels))
    assert status == 0
    assert out.startswith("shards: 4 done, 1 in hand, 1 to do; runs at work: 1\nimages: 20, ")
    assert "machine far: 0 shards done, 1 in hand, 0 images\n" in out
    assert out.endswith("not done: 000002, 000004\n")
    status, out, _ = fathom("status", str(copy.labels), "--json", "--dataset", copy.dataset)
    found = json.loads(out)
    assert (status, found["todo"], found["runs"], found["left_s"]) == (0, 1, 1, None)
    assert found["status"]["missing"] == ["000002", "000004"] and found["status"]["shards"] == 4
    assert found["status"]["failures"] == {"bad_image": 1} and sum(found["status"]["quality"]) == 19
    assert found["leased"] == claim["leased"] and found["nodes"]["far"]["leased"] == 1


# --- verify


def test_verify_proves(fathom: Run, world: World, tmp_path: Path) -> None:
    status, out, _ = fathom("verify", str(world.labels), "--report", "report.json")
    assert status == 0
    assert out.splitlines()[0].startswith(f"{world.labels}: 30 samples in 6 shards, ")
    assert out.splitlines()[1] == "failed 1: bad_image"
    assert out.endswith(f"proved: every key of {world.dataset} is labelled once or listed as failed\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["samples"] == 30 and report["findings"] == []


def test_verify_tells_all_that_is_wrong(fathom: Run, copy: World, tmp_path: Path) -> None:
    tar = copy.labels / "shards" / "000002.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    (copy.labels / "ledger" / "000004.json").unlink()
    (copy.labels / "notes.txt").write_text("mine")
    status, out, _ = fathom("verify", str(copy.labels), "--report", "report.json", "--workers", "2", "--no-decode")
    assert status == 1
    assert out.endswith("not proved: 3 findings\n")
    for path in (tar, copy.labels / "ledger" / "000004.json", copy.labels / "notes.txt"):
        assert f"  {path}: " in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["ok"] and {each["kind"] for each in report["findings"]} == {"damaged", "entry", "foreign"}


# --- retry


def repair(world: World) -> None:
    (Path(world.dataset) / "shards" / f"{VICTIM[0]}.tar").write_bytes(world.whole)


def test_retry_after_a_repair_labels_what_had_failed(fathom: Run, copy: World) -> None:
    before = snapshot(copy.labels)
    weights = ("--weights", copy.teacher, "--workers", "1")
    status, out, err = fathom("retry", str(copy.labels), *weights)  # not mended yet
    assert (status, out) == (0, f"{copy.labels}\n")
    assert "1 of 1 images have no label" in err
    assert {name: data for name, (data, _) in snapshot(copy.labels).items()} == {
        name: data for name, (data, _) in before.items()
    }
    repair(copy)
    status, out, err = fathom("retry", str(copy.labels), *weights, "--reason", "missing_image")
    assert (status, out) == (0, f"{copy.labels}\n") and snapshot(copy.labels) == before
    assert "no sample has failed for missing_image: there is nothing to try again" in err
    status, out, err = fathom("retry", str(copy.labels), *weights, "--reason", "missing_image", "--reason", "bad_image")
    assert (status, out) == (0, f"{copy.labels}\n") and "no label" not in err
    changed = {name for name, seen in snapshot(copy.labels).items() if seen != before[name]}
    assert changed == {f"shards/{VICTIM[0]}.tar", f"shards/{VICTIM[0]}.idx", f"ledger/{VICTIM[0]}.json"}
    assert fathom("verify", str(copy.labels))[0] == 0
    status, out, _ = fathom("status", str(copy.labels), "--json")
    assert json.loads(out)["status"]["failures"] == {}


def test_retry_goes_on_where_its_worker_died(fathom: Run, copy: World) -> None:
    """The entry is gone, the old tar is there: it is adopted, and its failures are tried again."""
    repair(copy)
    (copy.labels / "ledger" / f"{VICTIM[0]}.json").unlink()
    status, _, err = fathom("retry", str(copy.labels), "--weights", copy.teacher, "--workers", "1")
    assert status == 0, err
    entry = LabelStore.open(str(copy.labels)).entry(VICTIM[0])
    assert entry is not None and entry.failures == {} and entry.samples == EACH
    assert fathom("verify", str(copy.labels))[0] == 0


def test_retry_wants_the_same_teacher_and_dataset(fathom: Run, world: World, tmp_path: Path) -> None:
    before = snapshot(world.labels)
    other = save_network(tmp_path / "other", 4)
    refused(
        fathom("retry", str(world.labels), "--weights", other),
        f"weights: not what made {world.labels}: teacher was", "name the same teacher and dataset",
    )  # fmt: skip
    shards = shards_of([EACH], unlabelled)
    data = write_dataset(tmp_path / "photos", shards, with_depth=False)
    refused(
        fathom("retry", str(world.labels), "--weights", world.teacher, "--dataset", data),
        f"dataset: not what made {world.labels}: dataset was", "name the same teacher and dataset",
    )  # fmt: skip
    refused(
        fathom("retry", str(world.labels), "--weights", world.teacher, "--reason", "bad_imag"),
        "reason: found 'bad_imag'; one of bad_image, ",
    )
    refused(
        fathom("retry", str(world.labels), "--weights", "nowhere", "--reason", "low_quality"),  # none fails for it
        "reason: found 'low_quality'; one of bad_image, ",
    )
    refused(
        fathom("status", str(world.labels), "--dataset", data),
        f"{world.labels}: these are labels of a dataset with fingerprint", "name their own with --dataset",
    )  # fmt: skip
    made_otherwise = write_labels(tmp_path / "photos" / "labels" / "x", shards)
    refused(fathom("retry", made_otherwise, "--weights", world.teacher), "labels.json: description lacks 'device'")
    assert snapshot(world.labels) == before


def test_retry_with_weights_that_do_not_tell_their_preset(fathom: Run, copy: World, tmp_path: Path) -> None:
    """An official file: its preset was given to `run`, and is to `retry`."""
    import torch

    torch.save(load_file(Path(copy.teacher) / "model.safetensors"), tmp_path / "official.pth")
    weights = ("--weights", str(tmp_path / "official.pth"), "--workers", "1", "--preset", "tiny")
    shutil.rmtree(copy.labels)
    status, out, err = fathom("run", copy.dataset, *weights, *SIZE)
    assert status == 0, err
    labels = out.strip()
    repair(copy)
    refused(fathom("retry", labels, *weights[:4]), "official.pth")
    status, _, err = fathom("retry", labels, *weights)
    assert status == 0 and "no label" not in err


# --- wrong inputs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quality", "good"), ("label run: quality: found 'good'", "'off', 'flip' or 'flip+scale'")),
        (("--encoding", "jpg"), ("encoding: found 'jpg'", "'png', 'npy' or 'jxl'")),
        (("--precision", "fp16"), ("precision: found 'fp16'", "'bf16' or 'fp32'")),
        (("--input-size", "500"), ("input_size: found 500", "multiple of 14")),
        (("--quality", "good", "--precision", "fp16"), ("quality: found", "; precision: found")),
        (("--batch", "0"), ("--batch", "greater than or equal to 1")),
        (("--workers", "0"), ("--workers", "greater than or equal to 1")),
        (("--lease", "0.5"), ("--lease", "greater than or equal to 1")),
        (("--position-mode", "other"), ("--position-mode", "'other'; official or exact")),
        (("--address", "127.0.0.1:1"), ("127.0.0.1:1",)),
    ],
)
def test_wrong_values_name_the_field_and_what_is_allowed(
    fathom: Run, world: World, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    out = ("--out", str(tmp_path / "out"))
    refused(fathom("run", world.dataset, "--weights", world.teacher, *out, *arguments), *words)
    assert not list((tmp_path / "out").glob("*/shards/*"))


def test_what_is_missing_or_of_another_kind_is_named(fathom: Run, world: World, tmp_path: Path) -> None:
    teacher = ("--weights", world.teacher)
    refused(fathom("run", "nowhere", *teacher), "nowhere: no such folder: check the path")
    (tmp_path / "empty").mkdir()
    refused(fathom("run", "empty", *teacher), "empty: no dataset.json in it", "`fathom data pack`")
    refused(fathom("run", world.dataset, "--weights", "none.pth"), "none.pth")
    refused(fathom("run", world.dataset), "Missing option '--weights'")
    metric = save_network(tmp_path / "metric", 0, "tiny-metric-indoor")
    refused(
        fathom("run", world.dataset, "--weights", metric),
        f"weights: {metric} predicts metres; pseudo-labels are disparities, name a relative network",
    )
    for verb in (("status", "empty"), ("verify", "empty"), ("retry", "empty", *teacher)):
        refused(fathom(*verb), "empty: no labels.json in it", "`fathom label run` makes them")
    refused(fathom("verify", str(world.labels), "--dataset", "empty"), "empty: no dataset.json in it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "metric"]


def test_labels_that_were_edited_or_of_another_format_are_refused(fathom: Run, copy: World) -> None:
    path = copy.labels / "labels.json"
    content = json.loads(path.read_text())
    for change, words in (
        ({"label_format": 99}, ("labels.json: label_format is 99", "label again, or update fathom")),
        ({"digest": "0" * 16}, ("digest and description disagree", "restore it, or label again")),
    ):
        path.write_text(json.dumps(content | change))
        for verb in (("status",), ("verify",), ("retry", "--weights", copy.teacher)):
            refused(fathom(verb[0], str(copy.labels), *verb[1:]), *words)
