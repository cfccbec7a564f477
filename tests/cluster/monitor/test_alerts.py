"""Every alert, tried by Prometheus' own test tool on what happens to runs; and the runbook."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from cluster.monitor.alerts import ALERTS, Alert, rules
from cluster.monitor.boards import BOARDS
from launcher.cli import build_app
from tests.cluster.monitor.alert_cases import STRAGGLER, TRAINING, Case, Fired, written
from tests.cluster.monitor.alert_cases_faults import FAULTS
from tests.cluster.monitor.alert_cases_label import LABEL, RUNS
from trainer.config_label import LabelConfig
from trainer.config_train import TrainConfig

RUNBOOK = Path(__file__).resolve().parents[3] / "docs" / "runbook.md"
CASES = (*TRAINING, *FAULTS, *LABEL, *RUNS)
BY_NAME = {alert.name: alert for alert in ALERTS}


def promtool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed")
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=250, check=False)


def asked(case: Case) -> dict[str, Any]:
    """A case as promtool takes it, in a file of its own."""
    tests = [
        {
            "eval_time": f"{round(when)}s",
            "alertname": name,
            "exp_alerts": [expected(BY_NAME[name], one) for one in found],
        }
        for when, found in sorted(case.at.items())
        for name in case.alerts
    ]
    series = [{"series": name, "values": written(parts, case.every)} for name, parts in case.series.items()]
    return {
        "rule_files": [f"{'all' if len(case.alerts) > 1 else case.alerts[0]}.rules.yml"],
        "evaluation_interval": f"{case.every}s",
        "tests": [{"name": case.name, "interval": f"{case.every}s", "input_series": series, "alert_rule_test": tests}],
    }


def expected(alert: Alert, fired: Fired) -> dict[str, Any]:
    return {
        "exp_labels": {**fired.labels, "severity": alert.severity},
        "exp_annotations": {"summary": fired.summary, "runbook": f"docs/runbook.md#{alert.name.lower()}"},
    }


def failures(cases: Sequence[Case], folder: Path, alerts: tuple[Alert, ...] = ALERTS) -> dict[str, str]:
    """What promtool says of the cases that fail, by name; one run for all."""
    for alert in alerts:
        (folder / f"{alert.name}.rules.yml").write_text(rules((alert,)), encoding="utf-8")
    (folder / "all.rules.yml").write_text(rules(alerts), encoding="utf-8")
    files = [f"{number:03d}.yml" for number in range(len(cases))]
    for file, case in zip(files, cases, strict=True):
        (folder / file).write_text(json.dumps(asked(case)), encoding="utf-8")  # YAML, but quicker
    done = promtool("test", "rules", *files, folder=folder)
    found = {told.partition("\n")[0].rstrip(","): told for told in re.split(r"^\s*name: ", done.stderr, flags=re.M)[1:]}
    assert (done.returncode == 0) == (not found) and found.keys() <= {case.name for case in cases}, done.stderr
    assert done.stdout.count("SUCCESS") == len(cases) - len(found), done.stdout
    return found


def test_promtool_finds_the_rules_in_order(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(rules(), encoding="utf-8")
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_what_fires_and_what_does_not(tmp_path: Path) -> None:
    found = failures(CASES, tmp_path)
    assert not found, "\n".join(found.values())


@pytest.mark.parametrize("name", BY_NAME)
def test_every_alert_is_seen_to_fire_and_to_be_silent(name: str) -> None:
    own = [case for case in CASES if case.alerts == (name,)]
    assert {case.fires for case in own} == {True, False}


def test_names_of_cases_are_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and all(name in run.alerts for run in RUNS for name in BY_NAME)


def test_a_wrong_expectation_is_found_and_named(tmp_path: Path) -> None:
    right, quiet = STRAGGLER[:2]
    (when, (fired,)), before = next((when, found) for when, found in right.at.items() if found), min(right.at)
    wrong = {
        "what people read": {when: (dataclasses.replace(fired, summary=f"{fired.summary}!"),)},
        "a label": {when: (dataclasses.replace(fired, labels={**fired.labels, "rank": "0"}),)},
        "it fires": {when: ()},
        "it does not yet": {before: (fired,)},
        "another one, too": {when: (fired, dataclasses.replace(fired, labels={"run": "other"}))},
    }
    cases = [dataclasses.replace(right, name=name, at=at) for name, at in wrong.items()]
    found = failures([right, *cases, quiet], tmp_path)
    assert found.keys() == wrong.keys()
    assert fired.summary in found["it fires"]


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## (.+)$", RUNBOOK.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_runbook_has_a_short_section_for_every_alert_in_their_order() -> None:
    found = sections()
    assert list(found) == list(BY_NAME)
    lengths = {name: len(text.strip().splitlines()) for name, text in found.items()}
    assert {name: length for name, length in lengths.items() if not 6 <= length <= 15} == {}
    assert [name for name, text in found.items() if "\n* Look: " not in text] == []
    assert {alert.section for alert in ALERTS} == {f"docs/runbook.md#{name.lower()}" for name in found}


def test_links_of_the_runbook_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]*)\)", RUNBOOK.read_text(encoding="utf-8"))
    known = {f"#{name.lower()}" for name in sections()}
    assert links and [link for link in links if link not in known and not (RUNBOOK.parent / link).is_file()] == []


def test_panels_that_the_runbook_names_exist() -> None:
    named = re.findall(r"(?<!\*)\*(?=[^\s*])([^*\n]+)\*", RUNBOOK.read_text(encoding="utf-8"))
    known = {f"{key}: {panel.title}" for key, board in BOARDS.items() for panel in board.panels().values()}
    assert len(named) > 40 and sorted(set(named) - known) == []


def unknown(words: Sequence[str], command: Any) -> list[str]:
    """Of a command line's words, the verbs and options that do not exist; `submit` and `plan` have a verb inside."""
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            return [words[0]]
        command, words = command.commands[words[0]], words[1:]
    options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    if command.name in ("submit", "plan"):
        inner = next((n for n, word in enumerate(words) if word in ROOT.commands), len(words))
        return [*unknown(words[:inner], command), *unknown(words[inner:], ROOT)] if inner < len(words) else []
    return [word for word in words if word.startswith("-") and word not in options]


ROOT: Any = typer.main.get_command(build_app())


def test_commands_that_the_runbook_names_exist() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    named = re.findall(r"`fathom ([^`]+)`", text)
    assert len(named) > 20 and {line: wrong for line in named if (wrong := unknown(line.split(), ROOT))} == {}
    assert [option for option in re.findall(r"`(--[a-z-]+)`", text) if unknown(["label", "run", option], ROOT)] == []
    assert unknown(["plan", "train", "C", "--rat"], ROOT) == ["--rat"] and unknown(["jobs", "end"], ROOT) == ["end"]


def fields(cls: Any, at: str = "") -> Iterator[str]:
    """Dotted names of a configuration's fields; `*` stands for any key of a mapping."""
    for each in typing.get_args(cls):
        yield from fields(each, f"{at}*." if typing.get_origin(cls) is dict else at)
    if isinstance(cls, type) and (issubclass(cls, BaseModel) or dataclasses.is_dataclass(cls)):
        for name, kind in typing.get_type_hints(cls).items():
            yield f"{at}{name}"
            yield from fields(kind, f"{at}{name}.")


def test_fields_and_files_that_the_runbook_names_exist() -> None:
    named = set(re.findall(r"`([a-z_]+(?:\.(?:[a-z_]+|\*|R))+)`", RUNBOOK.read_text(encoding="utf-8")))
    files = {name for name in named if name.endswith((".jsonl", ".json", ".yaml"))}
    known = {*fields(TrainConfig), *fields(LabelConfig)}
    assert "data.roles.*.min_quality" in known and "track.wandb.mode" in known
    assert len(named - files) > 25 and sorted(named - files - known) == []
    written_down = (RUNBOOK.parent / "training.md").read_text(encoding="utf-8")
    assert files and [name for name in files if f"runs/NAME/{name}" not in written_down] == []
