"""The paper's ablation (arXiv 2401.10891, table 9) in small, and a search for a regime in which unlabelled images help.

    .venv/bin/python benchmarks/ablation.py --out ablation --seeds 11 12 13 --regime paper jittered

Every seed makes its own scenes, stand-in encoder, networks, labels and evaluation scenes. The design below was fixed
before anything was measured (docs/decisions/0006-the-ablation.md). What is finished is not done again: the same command
goes on after a stop or a kill. `--table` prints what is there and trains nothing. Tables go to OUT/ablation.md, every
figure to OUT/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.ablation_table import tables
from benchmarks.common import command_line
from cluster import storage
from cluster.lock import locked_folder
from cluster.progress import Progress
from cluster.runtime import ray_session
from cluster.stop import StopFlag, Stopped, exit_status
from dataio.dataset import INFO_NAME
from dataio.pack_synth import pack_synth
from launcher import recipes
from trainer.changes import differences, listing
from trainer.config import ConfigError, apply_override
from trainer.config_label import LabelConfig
from trainer.config_train import TrainConfig
from trainer.labelling import run_labelling
from trainer.quickstart import (
    LADDER,
    MAX_DEPTH_M,
    STRONG,
    Request,
    Results,
    Sizes,
    evaluate_stage,
    stage_config,
    timed,
    train_stage,
)
from trainer.tasks.base import make_task

SEEDS = (11, 12, 13)  # the quickstart's trials used 1 to 3
FRESH_EVALUATION = 61_000_000  # plus the seed; nothing in this repository was chosen on these scenes
EVALUATION_SCENES = 500  # of each domain
FILE = "rows.json"  # of a seed: what was measured so far


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network of the tables: a recipe of the quickstart with overrides, and whose labels of which images it learns.

    `marks`: the paper's columns; l labelled, u pseudo-labelled, s strong perturbation of those, f feature alignment.
    """

    recipe: str
    marks: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    images: str = "wide"
    preset: str = "tiny"
    encoder: str = "encoder"  # the stand-in that it starts from


JITTER = {"data.roles.labelled.perturbation": STRONG}
CONTROL = LADDER["labelled-only-jitter"][1]
STUDENT = {**LADDER["student-perturbed"][1], **JITTER}  # no alignment; its labelled half jittered too
LONG = {"steps": 1600}  # the recipes': 800

# Table 9 and its controls are the quickstart's own rows. All students and controls see 24 images a step.
PAPER = {
    "teacher": Row(recipe="teacher", marks="l"),
    "student-plain": Row(recipe="student-plain", marks="lu", teacher="teacher"),
    "student-perturbed": Row(recipe="student-perturbed", marks="lus", teacher="teacher"),
    "student": Row(recipe="student", marks="lusf", teacher="teacher"),
    "labelled-only": Row(recipe="labelled-only", marks="l"),
    "labelled-only-jitter": Row(recipe="labelled-only-jitter", marks="l"),
}
# The regimes: the teacher is always the labelled-only control of the student's own budget.
JITTERED = {
    "jittered-student": Row(recipe="student", marks="lus", overrides=STUDENT, teacher="labelled-only-jitter"),
    "labelled-only-jitter-long": Row(recipe="teacher", marks="l", overrides={**CONTROL, **LONG}),
    "jittered-self": Row(
        recipe="student",
        marks="lus",
        overrides={**STUDENT, "data.roles.unlabelled.datasets": ["data/labelled"]},
        teacher="labelled-only-jitter",
        images="labelled",
    ),
    "oracle": Row(
        recipe="teacher",
        marks="l",
        overrides={
            **CONTROL,
            "data.roles.labelled.datasets": ["data/labelled", "data/wide-true"],
            "data.roles.labelled.weights": [1, 2],
        },
    ),
}
SCARCE = {
    "scarce-control": Row(
        recipe="teacher", marks="l", overrides={**CONTROL, "data.roles.labelled.datasets": ["data/scarce"]}
    ),
    "scarce-student": Row(
        recipe="student",
        marks="lus",
        overrides={**STUDENT, "data.roles.labelled.datasets": ["data/scarce"]},
        teacher="scarce-control",
    ),
}
MORE = {
    "more-student": Row(
        recipe="student",
        marks="lus",
        overrides={**STUDENT, **LONG, "data.roles.unlabelled.datasets": ["data/wide-more"]},
        teacher="labelled-only-jitter-long",
        images="wide-more",
    ),
}
LARGE = {"preset": "tiny-wide", "encoder": "encoder-larger"}  # with a stand-in of its size
LARGER = {
    "larger-control": Row(recipe="teacher", marks="l", overrides=CONTROL, **LARGE),
    "larger-student": Row(recipe="student", marks="lus", overrides=STUDENT, teacher="labelled-only-jitter", **LARGE),
    "larger-both": Row(recipe="student", marks="lus", overrides=STUDENT, teacher="larger-control", **LARGE),
}
REGIMES: Mapping[str, Mapping[str, Row]] = {
    "paper": PAPER, "jittered": JITTERED, "scarce": SCARCE, "more": MORE, "larger": LARGER,
}  # fmt: skip
ROWS = {name: row for regime in REGIMES.values() for name, row in regime.items()}


def data_sets(request: Request) -> dict[str, tuple[str, int, int, bool]]:
    """Sets of scenes: domain, seed, number, whether depth is kept. A larger set begins with the smaller one."""
    sizes, seed, fresh = request.sizes, request.seed, request.evaluation_seed
    return {
        "labelled": ("labelled", seed, sizes.labelled, True),
        "scarce": ("labelled", seed, max(8, sizes.labelled // 8), True),
        "wide": ("wide", seed, sizes.wide, False),
        "wide-true": ("wide", seed, sizes.wide, True),
        "wide-more": ("wide", seed, 2 * sizes.wide, False),
        "evaluation-wide": ("wide", fresh, sizes.evaluation, True),
        "evaluation-labelled": ("labelled", fresh, sizes.evaluation, True),
    }


def make_request(out: Path, seed: int, scale: float) -> Request:
    """One seed's request; `scale` shrinks images and steps alike, for trying the program out."""
    plain = {name: yaml.safe_load(recipes.read(f"quickstart-{name}")) for name in ("encoder", "teacher", "student")}
    for name, row in ROWS.items():
        if name != row.recipe:
            values = json.loads(json.dumps(plain[row.recipe]))
            for key, value in row.overrides.items():
                apply_override(values, f"{key}={json.dumps(value)}")
            plain[name] = values
        if row.encoder != "encoder":
            plain[row.encoder] = plain["encoder"]
            plain[name]["model"]["encoder_weights"] = f"runs/{row.encoder}/weights/encoder.safetensors"
    counts = {"labelled": 800, "wide": 4000, "evaluation": EVALUATION_SCENES}
    sizes = Sizes(steps=scale, **{name: max(48, round(count * scale)) for name, count in counts.items()})
    return Request(out=str(out), recipes=plain, seed=seed, evaluation_seed=FRESH_EVALUATION + seed, sizes=sizes)


def of_network(request: Request, name: str) -> Request:
    """The request for a row or a stand-in, whose network may be of another size."""
    presets = {row.encoder: row.preset for row in ROWS.values()} | {name: row.preset for name, row in ROWS.items()}
    return replace(request, preset=presets[name])


class Chain:
    """One seed's networks, each made when it is first asked for, after what it is made of."""

    def __init__(self, request: Request, stop: StopFlag) -> None:
        self.request, self.stop = request, stop
        self.done = read_rows(request)

    def measure(self, name: str) -> None:
        """Train and evaluate one row unless its figures are there."""
        if name in self.done.rows:
            return
        folder = self.trained(name)
        for domain in ("wide", "labelled"):
            self.pack(f"evaluation-{domain}")
        with self.timed("evaluation"):
            self.done.rows[name] = evaluate_stage(self.request, name, folder, self.stop)
        self.write()

    def trained(self, name: str) -> str:
        """The run's folder."""
        row = ROWS.get(name)
        if row:
            self.trained(row.encoder)
        labels = self.labels(row.teacher, row.images) if row and row.teacher else None
        values = self.request.recipes.get(name) or self.request.recipes[LADDER[name][0]]
        for role in values["data"]["roles"].values():
            for folder in role["datasets"]:
                self.pack(os.path.basename(folder))
        with self.timed(name):
            return train_stage(of_network(self.request, name), name, self.stop, labels)

    def labels(self, teacher: str, images: str) -> str:
        """The sidecar of a teacher's labels."""
        weights = os.path.join(self.trained(teacher), "weights")
        self.pack(images)
        values = {"dataset": self.folder("data", images), "weights": weights, "batch": 16, "cluster": {"workers": 2},
                  "flip": True, "quality": "flip"}  # fmt: skip
        config = LabelConfig(**values, input_size=self.request.sizes.image)
        with self.timed(f"labels of {teacher}"), Progress(f"labels of {teacher}", None, "shards") as bar:
            outcome = run_labelling(config, on_progress=lambda now: bar.update(now.done, of=now.total), stop=self.stop)
        if outcome.stopped:
            raise Stopped(outcome.stopped)
        return outcome.folder

    def pack(self, name: str) -> None:
        """Render one set of scenes."""
        out, (domain, seed, count, labelled) = self.folder("data", name), data_sets(self.request)[name]
        if storage.exists(os.path.join(out, INFO_NAME)):
            return

        def on_progress(done: int, total: int) -> None:
            self.stop.check()
            bar.update(done)

        options = {"size": self.request.sizes.image, "samples_per_shard": max(1, -(-count // 8)), "workers": 2}
        with self.timed("scenes"), Progress(f"scenes: {name}", count, "images") as bar:
            pack_synth(domain, out, seed=seed, count=count, labelled=labelled, progress=on_progress, **options)

    def folder(self, *parts: str) -> str:
        """A path below the seed's folder."""
        return os.path.join(self.request.out, *parts)

    def timed(self, stage: str) -> Any:
        """The block's seconds go to the stage's."""
        return timed(self.done, stage)

    def write(self) -> None:
        """Keep the figures."""
        storage.atomic_write(self.folder(FILE), json.dumps({**asdict(self.done), "design": design(self.request)}))


def design(request: Request) -> dict[str, Any]:
    """What the figures of one folder have in common: numbers, scenes, networks; scenes and networks may be added."""
    return {
        "seed": request.seed,
        "evaluation_seed": request.evaluation_seed,
        "sizes": asdict(request.sizes),
        "max_depth_m": MAX_DEPTH_M,
        "scenes": {name: list(scenes) for name, scenes in data_sets(request).items()},
        "networks": networks(request),
    }


def networks(request: Request) -> dict[str, Any]:
    """Every network's configuration, by name, and whose labels of which images it learns."""
    anywhere = replace(request, out="/")
    names = [*{row.encoder: None for row in ROWS.values()}, *ROWS]
    found = {name: resolved(stage_config(of_network(anywhere, name), name, "LABELS")) for name in names}
    for name, row in ROWS.items():
        found[name] |= {"teacher": row.teacher, "images": row.images}
    return found


def resolved(config: TrainConfig) -> dict[str, Any]:
    """A configuration with all defaults, the task's too, wherever the seed's folder lies and its labels in it."""
    values = config.model_dump(mode="json")
    values["task"] = {"kind": config.task.kind, **make_task(config).options.model_dump(mode="json")}
    for role in values["data"]["roles"].values():
        role["labels"] = ["LABELS"] * len(role["labels"])
    out = os.path.dirname(config.runs)
    return dict(json.loads(json.dumps(values).replace(f'"{out.rstrip("/")}/', '"/')))


def read_rows(request: Request) -> Results:
    """What was measured for this seed. ConfigError when the folder holds another design."""
    path = os.path.join(request.out, FILE)
    if not storage.exists(path):
        return Results(images=request.sizes.evaluation)
    content = json.loads(storage.read_bytes(path))
    before, now = content.pop("design"), json.loads(json.dumps(design(request)))
    for kind in ("scenes", "networks"):
        now[kind] = {name: one for name, one in now[kind].items() if name in before.get(kind, ())}
    if found := differences("design", before, now):
        raise ConfigError(f"{path}: {listing(found, 'its figures are of')}; choose another --out")
    return Results(**content)


def trained_by(request: Request, name: str) -> str | None:
    """The commit that trained a row, or that went on with it last."""
    path = os.path.join(request.out, "runs", name, "environment.json")
    return json.loads(storage.read_bytes(path))["commit"] if storage.exists(path) else None


def run_regime(request: Request, names: Sequence[str], stop: StopFlag) -> None:
    """One seed's rows of one regime."""
    with locked_folder(request.out, "this seed"):
        chain = Chain(request, stop)
        if set(names) <= set(chain.done.rows):
            return
        try:
            for name in names:
                chain.measure(name)
                print(f"seed {request.seed}: {name} measured at {time.strftime('%H:%M:%S')}", flush=True)
        finally:
            chain.write()


def run(requests: Mapping[int, Request], regimes: Sequence[str], rows: Sequence[str]) -> None:
    """Regime by regime, seed by seed; Ray is started once."""
    with StopFlag() as stop, ray_session(cpus=2):
        for regime in regimes:
            names = [name for name in REGIMES[regime] if name in rows]
            for request in requests.values():
                run_regime(request, names, stop)


def report(out: Path, requests: Mapping[int, Request]) -> None:
    """Print the tables of what is there, and write them."""
    found = {seed: read_rows(request) for seed, request in requests.items()}
    lines = tables({seed: results.rows for seed, results in found.items() if results.rows}, ROWS)
    print("\n".join(lines))
    content = {
        "commits": {
            seed: {name: trained_by(requests[seed], name) for name in results.rows} for seed, results in found.items()
        },
        "designs": {seed: design(request) for seed, request in requests.items()},
        "rows": {seed: results.rows for seed, results in found.items()},
        "seconds": {seed: results.seconds for seed, results in found.items()},
    }
    storage.atomic_write(str(out / "ablation.json"), json.dumps(content, indent=1))
    storage.atomic_write(str(out / "ablation.md"), "\n".join([*lines, ""]))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="only these (and what they are made of)")
    parser.add_argument("--scale", type=float, default=1.0, help="times all images and steps; results mean nothing")
    parser.add_argument("--table", action="store_true", help="print what was measured so far")
    return parser.parse_args()


def main() -> None:
    """Measure, then print."""
    arguments = parse()
    out = arguments.out.resolve()
    requests = {seed: make_request(out / f"seed{seed}", seed, arguments.scale) for seed in arguments.seeds}
    out.mkdir(parents=True, exist_ok=True)
    try:
        if not arguments.table:
            run(requests, arguments.regime, arguments.rows or list(ROWS))
    except Stopped as stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(exit_status(stopped.reason))
    report(out, requests)


def command() -> None:
    """`main`; a wrong input is one line."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    command()
