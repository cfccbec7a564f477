"""Runs on several machines: what the tests of that share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from tests.bed import Bed
from tests.end_to_end.cli import REPOSITORY, TIMEOUT_S, Done, json_lines, teacher_values
from trainer.journal import logged_lines

if TYPE_CHECKING:
    from tests.end_to_end.conftest import World

STEPS = 120
QUICK = {"silence_s": 5.0, "hang_shortest_s": 5.0, "max_failures": 3}
WITH_RAY = ("head", "node1", "node2")


def run_values(world: World, **other: Any) -> dict[str, Any]:
    """A run that takes some ten seconds, saved every ten steps."""
    return teacher_values(world.data, steps=STEPS, preview_every=1000) | {
        "checkpoint": {"every": 10}, "recovery": QUICK, "log_every": 1, **other,
    }  # fmt: skip


def fathom(machines: Bed, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run a verb on the machine outside of the cluster."""
    where = {"PYTHONPATH": str(REPOSITORY), "RAY_API_SERVER_ADDRESS": machines.dashboard}
    done = machines.outside.run(
        sys.executable, "-m", "launcher.cli", *words, cwd=cwd, env={**where, **(env or {})}, timeout_s=TIMEOUT_S
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def with_ranks(machines: Bed, names: Sequence[str] = WITH_RAY) -> list[str]:
    """The machines on which ranks run."""
    return [name for name in names if machines.machines[name].processes("RayTrainWorker")]


def same_weights(run: Path, other: Path) -> bool:
    """Whether two runs have exported the same bits."""
    found, expected = (load_file(folder / "weights" / "model.safetensors") for folder in (run, other))
    return found.keys() == expected.keys() and all(bool((found[name] == expected[name]).all()) for name in found)


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every logged step: of the same samples, each once, where they are the same."""
    return [(line["step"], line["loss"]) for line in logged_lines(str(run))]


def told(run: Path) -> list[dict[str, Any]]:
    """The journal, less checkpoints and what comes sooner or later, or not at all, by the machine's speed."""
    passing = ("checkpoint", "running", "pending", "straggler")
    return [line for line in json_lines(run / "journal.jsonl") if line["event"] not in passing]


def seconds_to_progress(run: Path, since: float) -> float:
    """From `since` (seconds since the epoch) to the first checkpoint of the attempt that was started after it."""
    lines = [line for line in json_lines(run / "journal.jsonl") if line["time"] > since]
    started = min((line["time"] for line in lines if line["event"] == "started"), default=float("nan"))
    saved = (line["time"] for line in lines if line["event"] == "checkpoint" and line["time"] > started)
    return min((at - since for at in saved), default=float("nan"))
