"""`fathom plan`: a table or JSON, problems on stderr a line each, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from launcher import recipes
from tests.launcher.conftest import Run

GROUP = "plan"


def write(folder: Path, name: str = "teacher-v2-vitg") -> None:
    (folder / "run.yaml").write_text(recipes.read(name))


def test_a_recipe_is_laid_out_and_what_is_missing_is_named(fathom: Run, tmp_path: Path) -> None:
    write(tmp_path)
    status, out, err = fathom("train", "run.yaml", "--set", "model.preset=tiny", "--set", "steps=100")
    assert status == 2
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    datasets = [path for role in values["data"]["roles"].values() for path in role["datasets"]]
    for path in datasets:
        assert sum(line.startswith(f"error: {tmp_path / path}: no such folder") for line in err.splitlines()) == 1
    assert "global batch" in out and "memory of a rank" in out and "Traceback" not in err


def test_the_same_as_json(fathom: Run, tmp_path: Path) -> None:
    write(tmp_path)
    status, out, err = fathom("train", "run.yaml", "--set", "model.preset=tiny", "--rate", "100", "--json")
    found = json.loads(out)
    assert status == 2 and err == "" and len(found["problems"]) > 1
    assert found["sections"]["run"]["global batch"] > 0


def test_other_verbs_are_refused(fathom: Run, tmp_path: Path) -> None:
    write(tmp_path)
    for words, said in (
        (("label", "status", "x"), "'label status' is none that can be planned; train, label run"),
        (("frobnicate", "run.yaml"), "'frobnicate' is none"),
    ):
        status, _, err = fathom(*words)
        assert status == 2 and said in err, err
