"""The whole chain on one machine: synthetic scenes -> teacher -> pseudo-labels -> student -> evaluation -> report.

Every stage is the command a user would run, with a recipe that ships; a stage that is done is not done again, so an
interrupted quickstart goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster import storage
from cluster.lock import locked_folder
from cluster.machine import whole_cpus
from cluster.progress import Progress
from cluster.stop import StopFlag, Stopped
from trainer.changes import differences, listing
from trainer.config import ConfigError, absolute_paths, apply_override, parse_config
from trainer.config_evaluate import EvaluateConfig
from trainer.config_label import LabelConfig
from trainer.config_train import TrainConfig
from trainer.folder import RunFolder
from trainer.run import show_step, train

EVALUATION_SEED = 7_000_003  # scenes of training come from other seeds
MAX_DEPTH_M = 20.0
SECONDS = "seconds.json"  # of every stage so far
STRONG = {"jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "blur_sigma": [0.025, 0.5]}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; the defaults take four to seven minutes on 2 CPU cores."""

    labelled: int = 800
    wide: int = 4000
    evaluation: int = 300
    image: int = 112
    steps: float = 1.0  # times the recipes' steps


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked of the quickstart. `recipes` maps encoder, teacher and student to plain configurations."""

    out: str
    recipes: Mapping[str, Mapping[str, Any]]
    seed: int = 1
    ladder: bool = False
    encoder_weights: str | None = None  # a DINOv2 file; then there is no stand-in
    preset: str = "tiny"
    sizes: Sizes = Sizes()
    evaluation_seed: int = EVALUATION_SEED


@dataclass(kw_only=True)
class Results:
    """What the quickstart ends with: rows of the table, seconds of each stage, where things lie."""

    rows: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # row -> domain or protocol -> metrics
    seconds: dict[str, float] = field(default_factory=dict)
    stand_in: bool = True
    images: int = 0


def quickstart(request: Request, stop: StopFlag | None = None) -> Results:
    """Run the chain into `request.out`; writes `results.json` and `report.html` there.

    Raises Stopped after a signal, ConfigError when the folder holds another quickstart, and whatever a stage raises.
    """
    if request.encoder_weights and not storage.exists(request.encoder_weights):
        raise ConfigError(f"--encoder: {request.encoder_weights}: no such file; leave it out to train a stand-in")
    if request.seed == request.evaluation_seed:
        raise ConfigError(
            f"seed: {request.seed} is the seed of the evaluation scenes; choose another, or training would see them"
        )
    with locked_folder(request.out, "this quickstart"):
        results = Results(stand_in=request.encoder_weights is None, seconds=begin(request))
        try:
            return run_stages(request, results, stop or StopFlag())
        finally:
            storage.atomic_write(os.path.join(request.out, SECONDS), json.dumps(results.seconds, indent=1))


def begin(request: Request) -> dict[str, float]:
    """Check that what is in the folder was made by the same request; returns the seconds its stages took.

    Raises ConfigError naming what differs: the results of two requests must not mix.
    """
    path, seconds = os.path.join(request.out, "request.json"), os.path.join(request.out, SECONDS)
    now = json.loads(json.dumps(asdict(request) | {"out": None, "ladder": None}))
    if storage.exists(path):
        before = json.loads(storage.read_bytes(path))
        if found := differences("quickstart", before, now):
            told = listing(found, "the folder's has")
            raise ConfigError(f"{request.out}: holds another quickstart: {told}; choose another --out or delete it")
    storage.atomic_write(path, json.dumps(now, indent=1))
    return dict(json.loads(storage.read_bytes(seconds))) if storage.exists(seconds) else {}


def run_stages(request: Request, results: Results, stop: StopFlag) -> Results:
    """All stages in order; what is done is not done again."""
    from cluster.runtime import ray_session

    with timed(results, "data"):
        make_data(request, stop)
    names = ["encoder"] * results.stand_in + ["teacher", "student", *(LADDER if request.ladder else ())]
    todo = [name for name in names if RunFolder(os.path.join(request.out, "runs", name)).finished_step() is None]
    with ray_session(cpus=2) if todo else contextlib.nullcontext():
        if results.stand_in:
            with timed(results, "encoder"):
                train_stage(request, "encoder", stop)
        with timed(results, "teacher"):
            teacher = train_stage(request, "teacher", stop)
        with timed(results, "labels"):
            labels = label_stage(request, teacher, stop)
        runs = {"teacher": teacher}
        for name in ("student", *(LADDER if request.ladder else ())):
            with timed(results, name):
                runs[name] = train_stage(request, name, stop, labels)
    with timed(results, "evaluation"):
        for name, folder in runs.items():
            results.rows[name] = evaluate_stage(request, name, folder, stop)
            results.images = request.sizes.evaluation
    storage.atomic_write(os.path.join(request.out, "results.json"), json.dumps(asdict(results), indent=1))
    from trainer.quickstart_report import write_quickstart_report

    write_quickstart_report(request, results, runs)
    return results


# Control rows: name -> (recipe, overrides of it). All see as many images as the student does.
LADDER: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "labelled-only": ("teacher", {"data.roles.labelled.batch": 24}),
    "labelled-only-jitter": (
        "teacher",
        {"data.roles.labelled.batch": 24, "data.roles.labelled.perturbation": STRONG},
    ),
    "student-plain": (
        "student",
        {"data.roles.unlabelled.perturbation": {"flip_p": 0.5}, "task.feature_weight": 0.0}
        | {"task.labelled_weight": 0.5, "task.unlabelled_weight": 0.5},
    ),
    "student-perturbed": (
        "student",
        {"task.feature_weight": 0.0, "task.labelled_weight": 0.5, "task.unlabelled_weight": 0.5},
    ),
}


@contextlib.contextmanager
def timed(results: Results, stage: str) -> Iterator[None]:
    """Add the block's seconds to the stage's: an interrupted stage takes several attempts."""
    began = time.monotonic()
    try:
        yield
    finally:
        results.seconds[stage] = round(results.seconds.get(stage, 0.0) + time.monotonic() - began, 1)


def make_data(request: Request, stop: StopFlag) -> None:
    """Render and pack the four sets; whole shards of an interrupted call are kept."""
    from dataio.dataset import INFO_NAME
    from dataio.pack_synth import pack_synth

    sizes = request.sizes
    sets = {
        "labelled": ("labelled", request.seed, sizes.labelled, True),
        "wide": ("wide", request.seed, sizes.wide, False),
        "evaluation-wide": ("wide", request.evaluation_seed, sizes.evaluation, True),
        "evaluation-labelled": ("labelled", request.evaluation_seed, sizes.evaluation, True),
    }
    for name, (domain, seed, count, labelled) in sets.items():
        out = os.path.join(request.out, "data", name)
        if storage.exists(os.path.join(out, INFO_NAME)):
            continue
        with Progress(f"scenes: {name}", count, "images") as bar:

            def on_progress(done: int, total: int, bar: Progress = bar) -> None:
                if stop.reason:
                    raise Stopped(stop.reason)
                bar.update(done)

            pack_synth(
                domain,
                out,
                seed=seed,
                count=count,
                size=sizes.image,
                labelled=labelled,
                samples_per_shard=max(1, -(-count // 8)),
                workers=min(4, whole_cpus()),
                progress=on_progress,
            )


def stage_config(request: Request, name: str, labels: str | None = None) -> TrainConfig:
    """The configuration of one training stage: the recipe with the paths, sizes and seed of this quickstart."""
    recipe, overrides = LADDER.get(name, (name, {}))
    values: dict[str, Any] = json.loads(json.dumps(request.recipes[recipe]))
    for key, value in overrides.items():
        apply_override(values, f"{key}={json.dumps(value)}")
    values |= {"name": name, "seed": request.seed, "runs": "runs"}
    values["steps"] = max(1, round(values["steps"] * request.sizes.steps))
    values["data"]["input_size"] = request.sizes.image
    values["model"]["preset"] = request.preset
    if request.encoder_weights:
        values["model"]["encoder_weights"] = os.path.abspath(request.encoder_weights)
    for role in values["data"]["roles"].values():
        if labels and "labels" in role:
            role["labels"] = [labels]
    optim = values.get("optim", {})
    optim["warmup_samples"] = round(optim.get("warmup_samples", 0) * min(1.0, request.sizes.steps))
    return parse_config(TrainConfig, absolute_paths(values, request.out), source=f"recipe {recipe}")


def train_stage(request: Request, name: str, stop: StopFlag, labels: str | None = None) -> str:
    """Train one stage unless its journal says it is finished; returns the run's folder."""
    config = stage_config(request, name, labels)
    folder = RunFolder(config.folder)
    if folder.finished_step() is not None:
        return folder.path
    with Progress(name, config.steps, "steps") as bar:
        outcome = train(
            config,
            resume=None,
            on_progress=show_step(bar),
            stop=stop,
        )
    if outcome.stopped:
        raise Stopped(outcome.stopped)
    return outcome.folder


def label_stage(request: Request, teacher: str, stop: StopFlag) -> str:
    """Pseudo-label the wide images; returns the sidecar's folder."""
    from trainer.labelling import run_labelling

    config = parse_config(
        LabelConfig,
        {
            "dataset": os.path.join(request.out, "data", "wide"),
            "weights": RunFolder(teacher).weights,
            "input_size": request.sizes.image,
            "batch": 16,
            "flip": True,
            "quality": "flip",  # for nothing: the pass is made anyway
            "cluster": {"workers": min(2, whole_cpus())},
        },
    )
    with Progress("labels", None, "shards") as bar:
        outcome = run_labelling(config, on_progress=lambda now: bar.update(now.done, of=now.total), stop=stop)
    if outcome.stopped:
        raise Stopped(outcome.stopped)
    return outcome.folder


def evaluate_stage(request: Request, name: str, folder: str, stop: StopFlag) -> dict[str, dict[str, float]]:
    """Metrics of one network: wide domain in both protocols, labelled domain in depth, and the best constant."""
    out = os.path.join(request.out, "evaluation", name)
    config = parse_config(
        EvaluateConfig,
        {
            "weights": RunFolder(folder).weights,
            "datasets": [os.path.join(request.out, "data", f"evaluation-{domain}") for domain in ("wide", "labelled")],
            "input_size": request.sizes.image,
            "max_depth": MAX_DEPTH_M,
            "batch": 16,
            "out": out,
        },
    )
    from trainer.evaluate import evaluate, evaluated

    with Progress(f"evaluate {name}", None, "images") as bar:

        wide, labelled = evaluated(config) or evaluate(
            config, on_progress=lambda done, total: bar.update(done, of=total), stop=stop
        )
    return {
        "wide": wide.means["depth"],
        "wide, disparity space": wide.means["disparity"],
        "wide, best constant": wide.means["constant"],
        "labelled domain": labelled.means["depth"],
    }


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the short table: AbsRel is better low, delta1 better high."""
    header = ["row", "AbsRel", "delta1", "AbsRel (disparity)", "delta1 (disparity)", "delta1, labelled domain"]
    some = next(iter(results.rows.values()))
    constant = some["wide, best constant"]
    rows = [["best constant", f"{constant['abs_rel']:.4f}", f"{constant['delta1']:.4f}", "-", "-", "-"]]
    for name, row in results.rows.items():
        wide, disparity, labelled = row["wide"], row["wide, disparity space"], row["labelled domain"]
        rows.append(
            [
                name,
                f"{wide['abs_rel']:.4f}",
                f"{wide['delta1']:.4f}",
                f"{disparity['abs_rel']:.4f}",
                f"{disparity['delta1']:.4f}",
                f"{labelled['delta1']:.4f}",
            ]
        )
    return header, rows


def verdict(results: Results, ladder: bool) -> str:
    """What the rows show, and no more."""
    teacher, student = (results.rows[name]["wide"] for name in ("teacher", "student"))
    gain = 100 * (student["delta1"] - teacher["delta1"])
    relation = "above" if gain > 0 else "below"
    text = (
        f"On {results.images} scenes of the wide domain that neither was trained on, the student's delta1 is "
        f"{abs(gain):.1f} points {relation} its teacher's, in this one run with this one seed. "
        "That is no evidence that unlabelled images help: "
    )
    if not ladder:
        return (
            text + "a labelled-only network with the student's budget and colour jitter is the control, see --ladder."
        )
    control = results.rows["labelled-only-jitter"]["wide"]["delta1"]
    return text + (
        f"the control, a labelled-only network with the student's budget and colour jitter, reaches {control:.4f} "
        f"against the student's {student['delta1']:.4f}."
    )
