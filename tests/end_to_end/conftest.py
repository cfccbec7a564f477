"""One tiny world for the folder: two synthetic sets, a trained encoder and teacher, labels. Tests only read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bed import Bed, bed
from tests.end_to_end import cli, nodes
from tests.end_to_end.cli import SIZE, run_values, succeed, teacher_values, write_config


@dataclass(frozen=True)
class World:
    """`data` holds labelled (24 scenes) and wide (32, in 4 shards); `runs` the encoder and the teacher."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def encoder(self) -> Path:
        return self.runs / "encoder" / "weights" / "encoder.safetensors"

    @property
    def teacher(self) -> Path:
        return self.runs / "teacher" / "weights"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """A test that failed half-way leaves no command running."""
    yield
    while cli.started:
        cli.started.pop().end()


@pytest.fixture(scope="session")
def data_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The two sets: seconds."""
    world = World(tmp_path_factory.mktemp("world"))
    make_sets(world)
    return world


@pytest.fixture(scope="session")
def undisturbed(data_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `nodes.run_values`, on one machine and left alone: what any other way to its end is compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_config(folder / "teacher.yaml", nodes.run_values(data_world))
    succeed("train", "teacher.yaml", cwd=folder)
    return folder / "runs" / "teacher"


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Three machines with Ray, one processor each, and one without."""
    with bed(tmp_path_factory.mktemp("bed") / "bed", cpus=[1, 1, 1]) as made:
        yield made


def make_sets(world: World) -> None:
    """The labelled set and the wide one."""
    world.folder.mkdir(exist_ok=True)
    succeed("data", "synth", "data/labelled", "--count", "24", "--size", str(SIZE), cwd=world.folder)
    succeed(
        "data", "synth", "data/wide", "--domain", "wide", "--count", "32", "--size", str(SIZE), "--no-labels",
        "--shard-samples", "8", cwd=world.folder,
    )  # fmt: skip


@pytest.fixture(scope="session")
def world(data_world: World) -> World:
    """The sets and a teacher trained on them without interruption: one start of Ray."""
    write_config(data_world.folder / "teacher.yaml", teacher_values(data_world.data))
    succeed("train", "teacher.yaml", cwd=data_world.folder)
    return data_world


@pytest.fixture(scope="session")
def encoder_world(world: World) -> World:
    """The stand-in encoder beside the teacher: another start."""
    roles = {"unlabelled": {"datasets": [str(world.data / "wide")], "batch": 8, "lanes": 2}}
    write_config(world.folder / "encoder.yaml", run_values("encoder", "pretext", roles))
    succeed("train", "encoder.yaml", cwd=world.folder)
    return world
