"""`fathom report`: everything a run left is on the page, whatever it is called and however it ended."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.launcher.conftest import Run as Fathom
from tests.trainer.test_report import HOSTILE, Reader, assert_self_contained, strokes
from trainer.report_run import curves_of, flatten, read_run, timeline

GROUP = "report"
NOON = time.mktime((2026, 11, 20, 12, 0, 0, 0, 0, -1))
VALIDATION = ("nyu/abs_rel", "kitti/abs_rel", "nyu/delta1", "score")


def step_line(step: int, shift: float = 0.0, term: str = "labelled") -> dict[str, Any]:
    """What the recorder writes; every value has its own rhythm, so that no two curves are alike."""
    wave = [1 + 0.1 * ((step * k) % 11) + shift for k in range(1, 12)]
    return {
        "step": step, "samples": 8 * step, "loss": wave[0], "terms": {term: wave[1], "feature": wave[2]},
        "grad_norm": wave[3], "skipped": False, "lr": {"encoder": wave[4], "decoder": wave[5]}, "seconds": 0.5,
        "images_per_second": wave[6], "phases": {"data_wait": wave[7], "backward": wave[8]},
    }  # fmt: skip


def event_line(step: int) -> dict[str, Any]:
    values = {name: 0.1 * (1 + (step * k) % 7) for k, name in enumerate(VALIDATION, start=1)}
    return {"step": step, "event": "validation", "values": values}


JOURNAL: tuple[Mapping[str, Any], ...] = (
    {"event": "started", "resume": None, "workers": 2},
    *({"event": "checkpoint", "step": step, "path": f"step_{step:08d}"} for step in (10, 20, 30)),
    {"event": "step_skipped", "step": 33, "reason": "non_finite", "keys": [f"sample_{i}" for i in range(7)]},
    {"event": "failed", "error": "WorkerDied: rank 1 died"},
    {"event": "started", "resume": "step_00000030", "workers": 1},
    {"event": "checkpoint", "step": 40, "path": "step_00000040"},
    {"event": "finished", "step": 40, "reason": None},
)


def write_lines(path: Path, lines: list[Any], torn: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def make_run(folder: Path, *, shift: float = 0.0, **config: Any) -> Path:
    """A run's folder with everything in it."""
    (folder / "previews").mkdir(parents=True)
    (folder / "eval" / "last").mkdir(parents=True)
    values = {"name": folder.name, "steps": 40, "task": {"kind": "student"}, "model": {"preset": "tiny"}, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(values | config))
    (folder / "environment.json").write_text(json.dumps({"workers": 2, "packages": {"torch": "2.14.1"}}))
    died = [step_line(step, shift + 50) for step in (15, 20)]  # an attempt with rarer lines, whose steps came again
    lines = [*(step_line(s, shift) for s in range(1, 15)), *died, *(step_line(s, shift) for s in range(15, 41))]
    write_lines(folder / "metrics.jsonl", [*lines, *(event_line(step) for step in (10, 20, 30, 40))], '{"step": 41, "l')
    write_lines(folder / "journal.jsonl", [{"time": NOON + 60 * i, **line} for i, line in enumerate(JOURNAL)])
    bad = [{"key": f"k{i}", "shard": "000000.tar", "reason": "bad_image" if i else "too_large"} for i in range(3)]
    write_lines(folder / "quarantine.0.jsonl", bad)
    write_lines(folder / "quarantine.1.jsonl", bad[:2])
    colours = np.random.default_rng(0).integers(0, 255, (5, 40, 80, 3), np.uint8)
    for number, picture in enumerate(colours, start=1):
        Image.fromarray(picture).save(folder / "previews" / f"step_{number:08d}.png")
    results = {"dataset": "/data/nyu", "images": 654, "means": {"depth": {"abs_rel": 0.0712}, "disparity": {"mae": 9}}}
    evaluation = {"weights": "w", "datasets": [results, {"dataset": "/data/kitti", "images": 3, "means": {}}]}
    (folder / "eval" / "last" / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def figures(page: str) -> dict[str, str]:
    """Title above a plot -> its SVG."""
    return dict(re.findall(r"<h3>([^<]*)</h3><figure>(<svg.*?</svg>)", page, re.DOTALL))


def texts(svg: str) -> set[str]:
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_every_curve_of_a_run_is_on_its_page(fathom: Fathom, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "student")
    code, out, err = fathom("runs/student")
    assert (code, err) == (0, "")
    assert out == f"written to {run}/report.html\n"
    page = (run / "report.html").read_text()
    assert_self_contained(page)
    expected = {
        "Loss": {"loss"},
        "Loss terms": {"labelled", "feature"},
        "validation, abs_rel": {"nyu", "kitti"},
        "validation, delta1": {"nyu"},
        "validation, score": {"validation, score"},
        "Gradient norm": {"gradient norm"},
        "Throughput": {"throughput"},
        "Learning rates": {"encoder", "decoder"},
        "Phases": {"data_wait", "backward"},
    }
    found = figures(page)
    assert list(found) == list(expected)
    for title, names in expected.items():
        assert names <= texts(found[title]), title
        points = 4 if title.startswith("validation") else 40
        assert strokes(found[title]) == dict.fromkeys(["#1f77b4", "#ff7f0e"][: len(names)], points), title


def test_steps_of_a_history_that_a_resume_left_are_gone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    steps = [line["step"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()[:-1])]
    assert steps != sorted(set(steps))
    run = read_run(str(folder))
    assert [line["step"] for line in run.steps] == list(range(1, 41))
    curves = curves_of(run)
    assert curves["Loss", "loss"]["loss"] == [(float(s), step_line(s)["loss"]) for s in range(1, 41)]
    assert curves["Phases", "seconds a step"]["backward"][-1] == (40.0, step_line(40)["phases"]["backward"])
    assert curves["validation, abs_rel", "abs_rel"]["kitti"] == [
        (float(s), event_line(s)["values"]["kitti/abs_rel"]) for s in (10, 20, 30, 40)
    ]


def rows(page: str) -> list[list[str]]:
    """The cells of all tables, row by row."""
    found = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL) for row in found]


def test_the_page_says_what_happened_and_what_came_out(fathom: Fathom, tmp_path: Path) -> None:
    run = make_run(tmp_path / "student", seed=77)
    assert fathom(str(run))[0] == 0
    page = (run / "report.html").read_text()
    found = rows(page)
    facts = {row[0]: row[1] for row in found[:12]}
    assert (facts["state"], facts["steps"], facts["task"], facts["attempts"]) == (
        "finished",
        "40 of 40",
        "student",
        "2",
    )
    assert (facts["skipped steps"], facts["bad samples"], facts["last loss"]) == (
        "1",
        "3",
        f"{step_line(40)['loss']:.4g}",
    )
    assert facts["images/s"] == f"{step_line(40)['images_per_second']:.4g}"
    assert found[found.index(["time", "event", "facts"]) + 1 :][:7] == [
        ["2026-11-20 12:00:00", "started", "workers: 2"],
        ["2026-11-20 12:03:00", "checkpoint", "3 of them, steps 10 to 30"],
        [
            "2026-11-20 12:04:00",
            "step_skipped",
            "step: 33; reason: non_finite; keys: sample_0, sample_1, sample_2, sample_3, sample_4 and 2 more",
        ],
        ["2026-11-20 12:05:00", "failed", "error: WorkerDied: rank 1 died"],
        ["2026-11-20 12:06:00", "started", "resume: step_00000030; workers: 1"],
        ["2026-11-20 12:07:00", "checkpoint", "step 40"],
        ["2026-11-20 12:08:00", "finished", "step: 40"],
    ]
    assert ["bad_image", "2", "the image cannot be decoded"] in found
    assert [row[:2] for row in found if row[0] == "too_large"] == [["too_large", "1"]]
    assert ["dataset (depth)", "images", "abs_rel"] in found and ["/data/nyu", "654", "0.0712"] in found
    assert ["dataset (disparity)", "images", "mae"] in found and ["/data/nyu", "654", "9"] in found
    text = Reader(page).text
    assert "seed: 77" in text and '"torch": "2.14.1"' in text and "Differences" not in text


def test_the_latest_previews_are_embedded(fathom: Fathom, tmp_path: Path) -> None:
    run = make_run(tmp_path / "student")
    Image.fromarray(np.full((100, 2200, 3), 200, np.uint8)).save(run / "previews" / "step_00000009.png")
    (run / "previews" / "step_00000010.png").write_bytes(b"torn")
    assert fathom(str(run))[0] == 0
    page = (run / "report.html").read_text()
    assert re.findall(r"<figcaption>(step_\d+\.png)", page) == ["step_00000005.png", "step_00000009.png"]
    assert "step_00000010.png: cannot be read" in page
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    ]
    saved = np.asarray(Image.open(run / "previews" / "step_00000005.png")).astype(int)
    assert abs(pictures[0].mean((0, 1)) - saved.mean((0, 1))).max() < 5
    assert pictures[1].shape == (50, 1100, 3)  # no wider than a page


def test_runs_lie_over_one_another_and_their_differences_are_listed(fathom: Fathom, tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", optim={"encoder_lr": 5e-6, "betas": [0.9, 0.999]}, seed=1)
    second = make_run(tmp_path / "b", shift=1.0, optim={"encoder_lr": 1e-5, "betas": [0.9, 0.999]}, data={"x": {}})
    code, out, _ = fathom(str(first), str(second), "--out", "both.html")
    assert (code, out) == (0, "written to both.html\n")
    assert not (first / "report.html").exists()
    page = (tmp_path / "both.html").read_text()
    assert_self_contained(page)
    found = figures(page)
    assert list(found) == [
        "Loss", "Loss terms: labelled", "Loss terms: feature", "validation, abs_rel: nyu", "validation, abs_rel: kitti",
        "validation, delta1: nyu", "validation, score", "Gradient norm", "Throughput", "Learning rates: encoder",
        "Learning rates: decoder", "Phases: data_wait", "Phases: backward",
    ]  # fmt: skip
    for title, svg in found.items():
        assert {"a", "b"} <= texts(svg), title
        assert len(strokes(svg)) == 2, title
    cells = rows(page)
    differences = cells[cells.index(["field", "a", "b"]) + 1 :][:3]
    assert sorted(differences) == [
        ["data.x", "-", "{}"],
        ["optim.encoder_lr", "5e-06", "1e-05"],
        ["seed", "1", "0"],
    ]
    assert "betas" not in [row[0] for row in cells]


def test_runs_of_one_name_are_told_apart_by_their_folders(fathom: Fathom, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / where / "student") for where in ("x", "y")]
    assert fathom(*map(str, runs), "--out", "both.html")[0] == 0
    page = (tmp_path / "both.html").read_text()
    assert {str(run) for run in runs} <= texts(figures(page)["Loss"])
    assert "Configurations and environments are the same." in page


def test_hostile_names_stay_text(fathom: Fathom, tmp_path: Path) -> None:
    hostile = "[ab]" + HOSTILE.replace("/", "")  # a folder's name has no slash
    run = make_run(tmp_path / hostile, task={"kind": HOSTILE, HOSTILE: HOSTILE})
    lines = [step_line(step, term=HOSTILE) for step in range(1, 4)]
    write_lines(run / "metrics.jsonl", [*lines, {"step": 3, "event": HOSTILE, "values": {HOSTILE: 1.0}}])
    write_lines(run / "journal.jsonl", [{"time": HOSTILE, "event": HOSTILE, HOSTILE: HOSTILE, "keys": [HOSTILE] * 2}])
    write_lines(run / "quarantine.0.jsonl", [{"key": HOSTILE, "shard": HOSTILE, "reason": HOSTILE}])
    (run / "environment.json").write_text(json.dumps({"commit": HOSTILE}))
    results = {"dataset": HOSTILE, "images": HOSTILE, "means": {HOSTILE: {HOSTILE: 0.5}}}
    (run / "eval" / "last" / "evaluation.json").write_text(json.dumps({"datasets": [results, HOSTILE]}))
    (run / "previews" / f"z{hostile}.png").write_bytes(b"torn")
    other = make_run(tmp_path / "other")
    for runs in ([run], [run, other]):
        assert fathom(*map(str, runs), "--out", "page.html")[0] == 0
        reader = assert_self_contained((tmp_path / "page.html").read_text())
        assert reader.text.count("alert('$x_1$')") > 10
        assert f"z{hostile}.png: cannot be read" in reader.text
        assert HOSTILE in reader.text and f"dataset ({HOSTILE})" in reader.text
        assert {"h1", "h2", "h3", "svg", "table", "details"} <= set(reader.tags)


@pytest.mark.parametrize("mark", ["config.yaml", "journal.jsonl", "metrics.jsonl"])
def test_little_or_torn_is_enough(fathom: Fathom, tmp_path: Path, mark: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / mark).write_text('{"step": 1, "lo')
    assert fathom("run")[0] == 0
    page = (run / "report.html").read_text()
    assert_self_contained(page)
    assert "No step has been logged." in page


def test_wrong_types_are_left_out(fathom: Fathom, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    wrong = [
        {"step": "one", "loss": 1.0}, {"loss": 2.0}, {"step": True, "loss": 3.0}, {"step": 4, "loss": "low"},
        {"step": 5, "loss": None, "terms": [1], "lr": 3, "phases": None}, {"step": 6, "event": ["x"], "values": 3},
        {"step": 7, "loss": 1.5, "terms": {"a": None, "b": True}}, {"step": 8, "event": "v", "values": {"m": "n"}},
    ]  # fmt: skip
    write_lines(run / "metrics.jsonl", wrong, '{"step": 9, "loss": NaN}\n{"step": 10, "loss": Infinity}\n')
    write_lines(run / "journal.jsonl", [{"time": 1e300, "event": "started"}, {"step": "x"}, {"event": "checkpoint"}])
    (run / "config.yaml").write_text("- a list\n")
    (run / "environment.json").write_text("[]")
    (run / "evaluation.json").write_text(json.dumps({"datasets": {"no": "list"}}))
    assert fathom("run")[0] == 0
    page = (run / "report.html").read_text()
    assert {title: strokes(svg) for title, svg in figures(page).items()} == {"Loss": {"#1f77b4": 1}}
    assert ["last loss", "1.5"] in rows(page)
    assert "running, or ended without a word" in page


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"event": "stopped", "reason": "SIGTERM"}, "stopped: SIGTERM"),
        ({"event": "failed", "error": "disk full"}, "failed: disk full"),
        ({"event": "started"}, "running, or ended without a word (last entry 2026-11-20 12:00:00)"),
        ({"event": "checkpoint", "step": 3}, "running, or ended without a word (last entry 2026-11-20 12:00:00)"),
    ],
)
def test_how_a_run_stands(fathom: Fathom, tmp_path: Path, last: dict[str, Any], says: str) -> None:
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "journal.jsonl", [{"event": "failed"}, {"event": "started"}, {"time": NOON, **last}])
    assert fathom("run")[0] == 0
    assert ["state", says] in rows((tmp_path / "run" / "report.html").read_text())


def test_a_long_journal_shows_its_end(fathom: Fathom, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    entries = [{"time": NOON, "event": "step_skipped", "step": step} for step in range(1000)]
    write_lines(tmp_path / "run" / "journal.jsonl", entries)
    assert len(timeline(entries)) == 1000
    assert fathom("run")[0] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The latest 400 of 1000 entries of journal.jsonl:" in page
    steps = [row[2] for row in rows(page) if row[1:2] == ["step_skipped"]]
    assert (len(steps), steps[0], steps[-1]) == (400, "step: 600", "step: 999")


def test_what_is_no_run_is_refused_in_one_line(fathom: Fathom, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        (("empty",), f"{tmp_path}/empty: is no run's folder; name one that `fathom train` made"),
        (("absent",), f"{tmp_path}/absent: no such folder; name one that `fathom train` made"),
        ((str(run), "empty", "--out", "x.html"), f"{tmp_path}/empty: is no run's folder"),
        ((str(run), str(run)), "--out: missing; 2 runs make one page, name its file"),
        ((), "RUN"),
    ):
        code, out, err = fathom(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["empty", "run"] and "report.html" not in os.listdir(run)


def test_a_page_that_cannot_be_written_is_one_line(fathom: Fathom, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    code, _, err = fathom(str(run), "--out", "file/page.html")
    assert code == 2 and len(err.splitlines()) == 1 and "file/page.html" in err


def test_leaves_of_a_configuration() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}
    assert flatten({}) == {}
    assert flatten({}, "environment") == {"environment": {}}


def test_a_report_loads_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys\nfrom trainer.report_run import write_report\n"
        f"write_report([{str(run)!r}])\nprint(*[m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules])"
    )
    where = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
