"""`fathom report`: what training runs left on disk, as one page. Reads whatever there is: runs that never finished,
lines torn by a crash, configurations of other versions. Loads no torch.
"""

from __future__ import annotations

import glob
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from PIL import Image

from cluster import storage
from dataio.quarantine import REASONS
from trainer.config import ConfigError
from trainer.folder import RunFolder, last_end
from trainer.journal import logged_lines, read_json_lines
from trainer.report import Page
from trainer.report_time import add_time

Curves = dict[str, list[tuple[float, float]]]
Lines = list[dict[str, Any]]

_MARKS = ("config.yaml", "journal.jsonl", "metrics.jsonl")  # a run's folder has one of them
_PREVIEWS = 3  # of each run, the latest
_PICTURE_WIDTH = 1100  # pixels
_TIMELINE_ROWS = 400
_KEYS_SHOWN = 5


@dataclass(kw_only=True)
class Run:
    """What a run's folder holds. `steps` and `events` are the two kinds of lines of metrics.jsonl."""

    name: str
    folder: str
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    journal: Lines = field(default_factory=list)
    steps: Lines = field(default_factory=list)
    events: Lines = field(default_factory=list)


def write_report(folders: Sequence[str], out: str | None = None) -> str:
    """Write one page about the runs in `folders` to `out` (default: report.html in the only run); returns its path.

    Raises ConfigError for a folder that is no run, or several without `out`; StorageError when it cannot be written.
    """
    if not folders:
        raise ConfigError("RUN: name at least one run's folder")
    if out is None and len(folders) > 1:
        raise ConfigError(f"--out: missing; {len(folders)} runs make one page, name its file")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = run.folder
    page = Page(f"fathom report: {', '.join(run.name for run in runs)}")
    page.table(*summary(runs), words=True)
    add_curves(page, runs)
    add_time(page, {run.name: run.folder for run in runs})
    for run in runs:
        add_evaluations(page, run)
    for run in runs:
        add_previews(page, run)
    if len(runs) > 1:
        add_differences(page, runs)
    for run in runs:
        add_record(page, run)
    path = out or os.path.join(runs[0].folder, "report.html")
    page.write(path)
    return path


def read_run(folder: str) -> Run:
    """Whatever can be read of a run. Raises ConfigError when the folder is none."""
    folder = os.path.abspath(folder)
    if not any(os.path.exists(os.path.join(folder, mark)) for mark in _MARKS):
        found = "is no run's folder" if os.path.isdir(folder) else "no such folder"
        raise ConfigError(f"{folder}: {found}; name one that `fathom train` made ({', '.join(_MARKS)})")
    paths = RunFolder(folder)
    config_text = read_text(paths.config)
    lines = logged_lines(folder)
    return Run(
        name=os.path.basename(folder),
        folder=folder,
        config_text=config_text,
        config=mapping(config_text, yaml.safe_load),
        environment=mapping(read_text(paths.environment), json.loads),
        journal=read_json_lines(paths.journal),
        steps=[line for line in lines if "event" not in line],
        events=[line for line in lines if "event" in line],
    )


def read_text(path: str) -> str:
    """A file's text, empty when there is none."""
    return storage.read_bytes(path).decode(errors="replace") if os.path.isfile(path) else ""


def mapping(text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """`text` parsed, or nothing where it is torn or no mapping."""
    try:
        value = parse(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- the summary ------------------------------------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and one row for each fact; a column for each run."""
    facts: dict[str, Callable[[Run], str]] = {
        "state": state,
        "steps": lambda run: f"{last_step(run)} of {run.config.get('steps') or '?'}",
        "task": lambda run: str(dict_at(run.config, "task").get("kind", "")),
        "network": lambda run: str(dict_at(run.config, "model").get("preset", "")),
        "attempts": lambda run: str(sum(line.get("event") == "started" for line in run.journal)),
        "ranks": lambda run: str(run.environment.get("workers", "")),
        "last loss": last_loss,
        "images/s": lambda run: number(run.steps[-1].get("images_per_second") if run.steps else None),
        "skipped steps": lambda run: str(sum(line.get("event") == "step_skipped" for line in run.journal)),
        "bad samples": lambda run: str(RunFolder(run.folder).quarantined().total()),
        "folder": lambda run: run.folder,
    }
    return ["", *(run.name for run in runs)], [[name, *(fact(run) for run in runs)] for name, fact in facts.items()]


def state(run: Run) -> str:
    """How the run stands, by its journal."""
    end = last_end(run.journal)
    if end:
        why = end.get("reason") or end.get("error")
        return f"{end['event']}: {cut(str(why), 300)}" if why else str(end["event"])
    if not run.journal:
        return "unknown"
    last = when(run.journal[-1])
    return "running, or ended without a word" + (f" (last entry {last})" if last else "")


def last_loss(run: Run) -> str:
    losses = [line.get("loss") for line in run.steps]
    return number(next((loss for loss in reversed(losses) if is_number(loss)), None))


def last_step(run: Run) -> int:
    """What the last attempt has reached, as far as its lines tell."""
    starts = [number for number, line in enumerate(run.journal) if line.get("event") == "started"]
    attempt = run.journal[starts[-1] :] if starts else run.journal
    marks = [line.get("step") for line in (*run.steps, *attempt)]
    return max((int(step) for step in marks if isinstance(step, int)), default=0)


def dict_at(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# -- curves -----------------------------------------------------------------------------------------------------------


def curves_of(run: Run) -> dict[tuple[str, str], Curves]:
    """Everything that metrics.jsonl holds over steps: (title, y label) -> name -> points, sorted by step."""
    found: dict[tuple[str, str], dict[str, dict[float, float]]] = {}

    def put(figure: tuple[str, str], name: str, step: float, value: object) -> None:
        if is_number(value):
            found.setdefault(figure, {}).setdefault(name, {})[float(step)] = float(value)  # type: ignore[arg-type]

    tables = {"terms": ("Loss terms", "loss"), "lr": ("Learning rates", "rate"), "phases": ("Phases", "seconds a step")}
    for line in run.steps:
        put(("Loss", "loss"), "loss", line["step"], line.get("loss"))
        put(("Gradient norm", "norm"), "gradient norm", line["step"], line.get("grad_norm"))
        put(("Throughput", "images/s"), "throughput", line["step"], line.get("images_per_second"))
        for key, figure in tables.items():
            for name, value in dict_at(line, key).items():
                put(figure, str(name), line["step"], value)
    events: list[tuple[str, str]] = []
    for line in run.events:
        for name, value in dict_at(line, "values").items():
            where, slash, metric = str(name).rpartition("/")
            figure = (f"{line['event']}, {metric}", metric)
            events.append(figure)
            put(figure, where if slash else figure[0].lower(), line["step"], value)
    order = dict.fromkeys([("Loss", "loss"), tables["terms"], *events, *found])
    placed = [figure for figure in order if figure in found]
    return {f: {name: sorted(points.items()) for name, points in found[f].items()} for f in placed}


def add_curves(page: Page, runs: Sequence[Run]) -> None:
    """One run: a figure for each kind of value. Several: one for each value, the runs beside one another."""
    page.heading("Curves")
    figures: dict[tuple[str, str], Curves] = {}
    for run in runs:
        for (title, y), curves in curves_of(run).items():
            for name, points in curves.items():
                if len(runs) == 1:
                    figures.setdefault((title, y), {})[name] = points
                else:
                    full = title if name == title.lower() else f"{title}: {name}"
                    figures.setdefault((full, y), {})[run.name] = points
    for (title, y), curves in figures.items():
        page.heading(title, level=3)
        page.curves(curves, x="step", y=y, caption="")
    if not figures:
        page.text("No step has been logged.")


# -- evaluations, previews --------------------------------------------------------------------------------------------


def add_evaluations(page: Page, run: Run) -> None:
    """The tables of RUN/evaluation.json and RUN/eval/**/evaluation.json, with the sheets beside them."""
    paths = [os.path.join(glob.escape(run.folder), "evaluation.json")]
    paths += [os.path.join(glob.escape(run.folder), "eval", "**", "evaluation.json")]
    found = sorted({path for pattern in paths for path in glob.glob(pattern, recursive=True)})
    if found:
        page.heading(f"Evaluation: {run.name}")
    for path in found:
        page.heading(os.path.relpath(path, run.folder), level=3)
        content = mapping(read_text(path), json.loads)
        for header, rows in evaluation_tables(content):
            page.table(header, rows)
        page.details("evaluation.json", json.dumps(content, indent=1) if content else read_text(path))
        sheet = os.path.join(os.path.dirname(path), "sheet.png")
        if os.path.isfile(sheet):
            add_picture(page, sheet, "sheet.png")


def evaluation_tables(content: Mapping[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """A table for each protocol: a row for each dataset, a column for each metric."""
    results = content.get("datasets")
    rows = [one for one in results if isinstance(one, dict)] if isinstance(results, list) else []
    for protocol in dict.fromkeys(name for one in rows for name in dict_at(one, "means")):
        means = [(one, dict_at(dict_at(one, "means"), protocol)) for one in rows]
        metrics = list(dict.fromkeys(name for _, values in means for name in values))
        table = [
            [str(one.get("dataset")), str(one.get("images", "")), *(number(values.get(name)) for name in metrics)]
            for one, values in means
        ]
        yield [f"dataset ({protocol})", "images", *metrics], table


def add_previews(page: Page, run: Run) -> None:
    """The latest pictures of RUN/previews."""
    folder = RunFolder(run.folder).previews
    names = sorted(name for name in os.listdir(folder) if name.endswith(".png")) if os.path.isdir(folder) else []
    if names:
        page.heading(f"Previews: {run.name}")
    for name in names[-_PREVIEWS:]:
        add_picture(page, os.path.join(folder, name), name)


def add_picture(page: Page, path: str, caption: str) -> None:
    """A picture, no wider than a page; one that cannot be read leaves a line of text."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # noqa: BLE001  Pillow raises whatever it likes on damaged files
        page.text(f"{caption}: cannot be read ({error})")
        return
    if image.width > _PICTURE_WIDTH:
        image = image.resize((_PICTURE_WIDTH, max(1, round(image.height * _PICTURE_WIDTH / image.width))))
    page.picture(image, caption, quality=88)


# -- differences, record ----------------------------------------------------------------------------------------------


def add_differences(page: Page, runs: Sequence[Run]) -> None:
    """Every field in which the configurations or environments of the runs differ."""
    page.heading("Differences")
    flat = [{**flatten(run.config), **flatten(run.environment, "environment")} for run in runs]
    fields = list(dict.fromkeys(name for values in flat for name in values))
    rows = []
    for name in fields:
        cells = [cut(plain(values[name]), 200) if name in values else "-" for values in flat]
        if len(set(cells)) > 1 and name not in ("name", "environment.time"):
            rows.append([name, *cells])
    if rows:
        page.table(["field", *(run.name for run in runs)], rows, words=True)
    else:
        page.text("Configurations and environments are the same.")


def flatten(value: Any, where: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf; an empty mapping is a leaf."""
    if not isinstance(value, dict) or not value:
        return {where: value} if where else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{where}.{key}" if where else str(key))
    return found


def add_record(page: Page, run: Run) -> None:
    """What happened to a run, what it left out, what it was made with."""
    page.heading(f"Record: {run.name}")
    if run.journal:
        rows = timeline(run.journal)
        if len(rows) > _TIMELINE_ROWS:
            page.text(f"The latest {_TIMELINE_ROWS} of {len(rows)} entries of journal.jsonl:")
        page.table(["time", "event", "facts"], rows[-_TIMELINE_ROWS:], words=True)
    else:
        page.text("The journal is empty.")
    counts = RunFolder(run.folder).quarantined()
    if counts:
        page.heading("Bad samples", level=3)
        rows = [[reason, str(count), REASONS.get(reason, "")] for reason, count in counts.most_common()]
        page.table(["reason", "samples", "meaning"], rows, words=True)
    page.details(f"configuration: {run.name}", run.config_text or "config.yaml is missing")
    page.details(f"environment: {run.name}", json.dumps(run.environment, indent=1) if run.environment else "unknown")


def timeline(journal: Lines) -> list[list[str]]:
    """A row for each entry: time, event, facts. Checkpoints in a row make one."""
    rows: list[list[str]] = []
    saved: Lines = []

    def flush() -> None:
        if saved:
            steps = [line.get("step") for line in saved]
            facts = f"step {steps[0]}" if len(saved) == 1 else f"{len(saved)} of them, steps {steps[0]} to {steps[-1]}"
            rows.append([when(saved[-1]), "checkpoint", facts])
            saved.clear()

    for line in journal:
        if line.get("event") == "checkpoint":
            saved.append(line)
            continue
        flush()
        told = {name: value for name, value in line.items() if name not in ("time", "event") and value is not None}
        facts = [f"{name}: {plain(value)}" for name, value in told.items()]
        rows.append([when(line), str(line.get("event")), cut("; ".join(facts), 1000)])
    flush()
    return rows


def plain(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        more = f" and {len(value) - _KEYS_SHOWN} more" if len(value) > _KEYS_SHOWN else ""
        return ", ".join(value[:_KEYS_SHOWN]) + more
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def when(line: Mapping[str, Any]) -> str:
    """The entry's time on this machine's clock."""
    seconds = line.get("time")
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if is_number(seconds) else ""
    except (OverflowError, ValueError, OSError):
        return ""
