"""Wrong input: one line that names the file or field, what was found and what to do; status 2; nothing good lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.end_to_end.cli import (
    SIZE,
    fathom,
    refuse,
    run_values,
    succeed,
    teacher_values,
    write_config,
)
from tests.end_to_end.conftest import World

pytestmark = pytest.mark.timeout(1800)  # the commands have a limit of their own


def config_file(folder: Path, world: World, **other: Any) -> Path:
    return write_config(folder / "teacher.yaml", teacher_values(world.data, **other))


def refuse_training(folder: Path, world: World, *words: str, arguments: tuple[str, ...] = (), **other: Any) -> str:
    """A training that must be refused, and leaves no run behind."""
    line = refuse("train", config_file(folder, world, **other), *arguments, cwd=folder, words=words)
    assert not (folder / "runs").exists()
    return line


# Configurations


def test_a_mistyped_key_is_named_with_the_right_one(tmp_path: Path, data_world: World) -> None:
    refuse_training(
        tmp_path, data_world, "optim.encoder_rl: unknown key", "did you mean 'encoder_lr'", optim={"encoder_rl": 1e-3}
    )


def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, data_world: World) -> None:
    refuse_training(tmp_path, data_world, "--set", "expected KEY=VALUE", arguments=("--set", "steps"))
    refuse_training(tmp_path, data_world, "steps: found 'many'", arguments=("--set", "steps=many"))


def test_two_mistakes_stand_in_one_line(tmp_path: Path, data_world: World) -> None:
    refuse_training(tmp_path, data_world, "steps: found 0", "engine.zero_stage: found 4", steps=0,
                    engine={"zero_stage": 4})  # fmt: skip


def test_more_workers_than_lanes(tmp_path: Path, data_world: World) -> None:
    refuse_training(tmp_path, data_world, "data.roles.labelled.lanes: 2", "3 cluster.workers", cluster={"workers": 3})


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("train", "none.yaml"), ("none.yaml", "no such configuration file")),
        (("evaluate", "none.yaml"), ("none.yaml", "no such configuration file")),
        (("predict", "none.jpg", "--weights", "none.pth", "--out", "out"), ("none.jpg", "no such image")),
        (("label", "run", "none", "--weights", "none.pth"), ("none", "no such folder")),
        (("data", "pack", "none", "out"), ("none", "no such folder")),
        (("data", "show", "none"), ("none", "no such folder")),
        (("label", "status", "none"), ("none", "no labels.json")),
        (("quickstart", "--encoder", "none.pth", "--out", "out"), ("none.pth",)),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("train", "evaluate", "predict", "label", "data") else "",
)
def test_a_missing_file_is_named(tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refuse(*arguments, cwd=tmp_path, words=words)
    assert list(tmp_path.iterdir()) == []


def test_missing_datasets_and_weights_of_a_configuration(tmp_path: Path, data_world: World) -> None:
    gone = {"labelled": {"datasets": ["gone"], "batch": 4, "lanes": 2}}
    values = run_values("teacher", "teacher", gone)
    refuse("train", write_config(tmp_path / "a.yaml", values), cwd=tmp_path, words=("gone", "no such folder"))
    refuse_training(
        tmp_path,
        data_world,
        "model.weights",
        "none.pth",
        "no such file",
        model={"preset": "tiny", "weights": "none.pth"},
    )
    evaluation = {"weights": "none.pth", "datasets": [str(data_world.data / "labelled")], "input_size": SIZE}
    refuse("evaluate", write_config(tmp_path / "b.yaml", evaluation), cwd=tmp_path, words=("none.pth",))


# Weights, labels, runs


def test_weights_of_another_network(tmp_path: Path, world: World) -> None:
    """An encoder is no depth network, and a picture no weights."""
    teacher = world.teacher / "model.safetensors"
    refuse(
        "predict", world.data, "--weights", teacher, "--preset", "v2-vits", "--out", "out", cwd=tmp_path,
        words=("no image",),
    )  # fmt: skip
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    refuse(
        "predict", picture, "--weights", teacher, "--preset", "v2-vits", "--out", "out", cwd=tmp_path,
        words=(str(teacher), "v2-vits"),
    )  # fmt: skip
    refuse("predict", picture, "--weights", picture, "--out", "out", cwd=tmp_path, words=("picture.png",))
    refuse(
        "label", "run", world.data / "wide", "--weights", picture, "--out", "labels", cwd=tmp_path,
        words=("picture.png",),
    )  # fmt: skip
    assert not (tmp_path / "labels").exists()


def test_starting_weights_of_another_network(tmp_path: Path, world: World) -> None:
    model = {"preset": "v2-vits", "weights": str(world.teacher / "model.safetensors")}
    line = refuse("train", config_file(tmp_path, world, model=model), cwd=tmp_path, words=("model.safetensors",))
    assert "v2-vits" in line or "tiny" in line


@pytest.fixture
def run(tmp_path: Path, world: World) -> Path:
    """A copy of the finished teacher's run under tmp_path/runs, with its configuration beside it."""
    config_file(tmp_path, world)
    folder = Path(shutil.copytree(world.runs / "teacher", tmp_path / "runs" / "teacher"))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    write_config(folder / "config.yaml", saved | {"runs": str(tmp_path / "runs")})
    return folder


def state_of(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_existing_run_is_not_overwritten(tmp_path: Path, run: Path) -> None:
    before = state_of(run)
    refuse("train", "teacher.yaml", cwd=tmp_path, words=(str(run), "--resume"))
    assert state_of(run) == before


def test_a_resumed_run_keeps_its_data_and_network(tmp_path: Path, run: Path) -> None:
    before = state_of(run)
    for field, found, was in (
        ("seed", "4", "3"),
        ("data.input_size", "112", "56"),
        ("model.preset", "v2-vits", "tiny"),
    ):
        words = (f"{field}: is ", found, was)
        refuse("train", "teacher.yaml", "--resume", "--set", f"{field}={found}", cwd=tmp_path, words=words)
    assert state_of(run) == before


def test_nothing_to_resume(tmp_path: Path, data_world: World) -> None:
    refuse_training(tmp_path, data_world, "no run to resume", arguments=("--resume",))


def test_a_checkpoint_of_another_network(tmp_path: Path, run: Path, world: World) -> None:
    """Its configuration was edited by hand, or the folder copied over another: found by the tensors themselves."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"]["preset"] = "v2-vits"
    write_config(run / "config.yaml", values)
    words = ("step_00000006", "another network", "model.preset")
    longer = ("--set", "steps=8")  # the run is finished as it is
    refuse("train", "teacher.yaml", "--resume", *longer, "--set", "model.preset=v2-vits", cwd=tmp_path, words=words)
    assert (run / "checkpoints" / "step_00000006" / "manifest.json").exists()


@pytest.fixture(scope="module")
def labels(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the wide set, outside it."""
    out = tmp_path_factory.mktemp("labels")
    arguments = ("--weights", world.teacher, "--out", out, "--input-size", SIZE, "--no-flip")
    return Path(succeed("label", "run", world.data / "wide", *arguments, cwd=out).out.strip())


def student_values(world: World, dataset: Path, labels: Path) -> dict[str, Any]:
    roles = {
        "labelled": {"datasets": [str(world.data / "labelled")], "batch": 4, "lanes": 2},
        "unlabelled": {"datasets": [str(dataset)], "labels": [str(labels)], "batch": 4, "lanes": 2},
    }
    values = run_values("student", "student", roles)
    values["task"]["feature_weight"] = 0
    return values


def test_labels_of_another_dataset(tmp_path: Path, world: World, labels: Path) -> None:
    """As many shards, samples and the same keys: only the fingerprint tells."""
    arguments = ("--domain", "wide", "--count", "32", "--size", str(SIZE), "--no-labels", "--shard-samples", "8")
    succeed("data", "synth", "other", *arguments, "--seed", "9", cwd=tmp_path)
    file = write_config(tmp_path / "student.yaml", student_values(world, tmp_path / "other", labels))
    refuse("train", file, cwd=tmp_path, words=("data.roles.unlabelled.labels", str(labels), "another dataset"))


def test_incomplete_labels(tmp_path: Path, world: World, labels: Path) -> None:
    copy = Path(shutil.copytree(labels, tmp_path / labels.name))
    (copy / "ledger" / "000002.json").unlink()
    file = write_config(tmp_path / "student.yaml", student_values(world, world.data / "wide", copy))
    words = (str(copy), "1 of 4 shards", "000002", "fathom label run")
    refuse("train", file, cwd=tmp_path, words=words)
    done = fathom("label", "status", copy, "--dataset", world.data / "wide", cwd=tmp_path)
    assert "not done: 000002\n" in done.out


# Places


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, world: World) -> None:
    """A file is in the way; and, unless root runs the test, a folder without the right to write."""
    blocked = tmp_path / "blocked"
    blocked.write_text("in the way")
    places = [blocked / "out"]
    if os.geteuid() != 0:
        (tmp_path / "readonly").mkdir(mode=0o555)
        places.append(tmp_path / "readonly" / "out")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    evaluation = {"weights": str(world.teacher), "datasets": [str(world.data / "labelled")], "input_size": SIZE}
    for place in places:
        words = (str(place), "cannot write", "another")
        refuse("train", config_file(tmp_path, world), "--set", f"runs={place}", cwd=tmp_path, words=words)
        refuse("predict", picture, "--weights", world.teacher, "--out", place, cwd=tmp_path, words=words)
        file = write_config(tmp_path / "evaluate.yaml", evaluation | {"out": str(place)})
        refuse("evaluate", file, cwd=tmp_path, words=words)
        refuse("data", "synth", place, "--count", "2", "--size", SIZE, cwd=tmp_path, words=words)
        refuse("data", "show", world.data / "wide", "--out", place / "a.png", cwd=tmp_path, words=words)
        refuse("quickstart", "--out", place, "--scale", "0.001", cwd=tmp_path, words=words)
    assert blocked.read_text() == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no right to mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_too_little_disk(tmp_path: Path, world: World, small_disk: Path) -> None:
    words = (str(small_disk), "needs", "are free", "free space there or choose another")
    refuse("data", "synth", small_disk / "data", "--count", "500", "--size", SIZE, cwd=tmp_path, words=words)
    refuse("train", config_file(tmp_path, world), "--set", f"runs={small_disk}", cwd=tmp_path, words=words)


def test_a_path_with_a_space_and_an_umlaut_works(tmp_path: Path, world: World) -> None:
    folder = tmp_path / "Öl und Wasser"
    folder.mkdir()
    succeed("data", "synth", "Bild er/äußere", "--count", "4", "--size", SIZE, cwd=folder)
    succeed("data", "show", "Bild er/äußere", "--out", "Über sicht.png", "--count", "2", cwd=folder)
    weights = Path(shutil.copytree(world.teacher, folder / "ge wichte ß"))
    done = succeed("predict", "Über sicht.png", "--weights", weights, "--out", "Vorher sage", "--input-size", SIZE,
                   cwd=folder)  # fmt: skip
    assert "1 pictures in Vorher sage" in done.out
    assert (folder / "Vorher sage" / "Über sicht.depth.png").exists()
    roles = {"labelled": {"datasets": ["Bild er/äußere"], "batch": 2, "lanes": 2}}
    file = write_config(folder / "lehrer in.yaml", run_values("teacher", "teacher", roles, steps=1))
    succeed("train", file, "--set", "runs=Läufe hier", cwd=folder)
    assert (folder / "Läufe hier" / "teacher" / "weights" / "model.safetensors").exists()
