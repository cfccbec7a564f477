"""`fathom plan`: a table or JSON, problems on stderr a line each, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from launcher import recipes
from tests.dataio.fakes import shards_of, unlabelled, write_dataset
from tests.launcher.conftest import Run
from tests.trainer.test_labelling import save_network

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
        assert sum(f"datasets: {tmp_path / path}: no such folder" in line for line in err.splitlines()) == 1
    assert "global batch" in out and "memory of a rank" in out and "MiB" in out and "Traceback" not in err


def test_the_same_as_json(fathom: Run, tmp_path: Path) -> None:
    write(tmp_path)
    status, out, err = fathom("train", "run.yaml", "--set", "model.preset=tiny", "--rate", "100", "--json")
    found = json.loads(out)
    assert status == 2 and err == "" and len(found["problems"]) > 1
    assert found["sections"]["run"]["global_batch_samples"] > 0
    assert isinstance(found["sections"]["memory_of_a_rank"]["weights_bytes"], int)


def test_a_wrong_configuration_is_told_whole_and_as_json_too(fathom: Run, tmp_path: Path) -> None:
    """Misspelt, against each other, not there: one round."""
    roles = "{labelled: {datasets: [/no/data], batch: 7, lanes: 4}}"
    (tmp_path / "bad.yaml").write_text(
        f"name: x\nstepz: 3\ntask: {{kind: teacher}}\nmodel: {{preset: tiny, encoder_weights: /no/encoder}}\n"
        f"data: {{input_size: 28, roles: {roles}}}\ncluster: {{workers: 9}}\n"
    )
    status, _, err = fathom("train", "bad.yaml")
    assert status == 2
    for said in (
        "stepz: unknown key",
        "lanes may be 1, 7",
        "cannot feed 9",
        "error: data.roles.labelled.datasets: /no/data: no such",
        "/no/encoder: no such",
    ):
        assert sum(said in line for line in err.splitlines()) == 1, (said, err)
    assert len(err.splitlines()) == 5
    status, out, again = fathom("train", "bad.yaml", "--json")
    assert status == 2 and again == ""
    assert [f"error: {line}" for line in json.loads(out)["problems"]] == err.splitlines()
    status, out, _ = fathom("train", "none.yaml", "--json")
    assert status == 2 and "no such configuration file" in json.loads(out)["problems"][0]
    status, out, _ = fathom("label", "run", "/no/data", "--weights", "/no/w", "--precision", "fp64", "--json")
    assert status == 2 and len(json.loads(out)["problems"]) == 3


def test_an_evaluation_is_looked_at(fathom: Run, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("weights: w\ndatasets: [a, b]\nbatch: 0\n")
    status, out, err = fathom("evaluate", "e.yaml")
    assert status == 2 and len(err.splitlines()) == 4 and "forward pass images" in out
    status, out, _ = fathom("evaluate", "e.yaml", "--set", "batch=1", "--json")
    assert status == 2 and len(json.loads(out)["problems"]) == 3


def test_labelling_is_laid_out(fathom: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "photos", shards_of([4, 3], unlabelled), with_depth=False)
    save_network(tmp_path / "teacher", 3)
    arguments = ("label", "run", "photos", "--weights", "teacher", "--input-size", "28")
    status, out, err = fathom(*arguments, "--quality", "flip+scale", "--workers", "2", "--rate", "0.01")
    assert (status, err) == (0, "")
    said = [line.split() for line in out.splitlines()]
    for words in (
        "actors 2", "forward pass images 1", "forward passes of an image 2.56", "shards 2", "samples 7",
        "labels to come ?", "images per second 0.01", "measured by --rate", "left 0 h 12 min",
    ):  # fmt: skip
        assert words.split() in said, (words, out)
    status, out, _ = fathom(*arguments, "--flip", "--quality", "flip", "--batch", "3", "--encoding", "npy", "--json")
    found = json.loads(out)["sections"]
    assert status == 0 and found["work"]["forward_passes_of_an_image"] == 2
    assert found["work"]["forward_pass_images"] == 3 and found["work"]["actors"] >= 1
    assert Path(found["disk"]["folder"]).parent == tmp_path / "photos" / "labels"
    status, out, err = fathom(*arguments, "--quality", "good", "--encoding", "jpg", "--workers", "9")
    assert status == 2 and err.splitlines() == [
        "error: quality: found 'good'; input should be 'off', 'flip' or 'flip+scale'",
        "error: encoding: found 'jpg'; input should be 'png', 'npy' or 'jxl'",
        "error: workers: is 9, but the dataset has 2 shards, and an actor takes a whole one; use as many at most, or "
        "pack smaller shards",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "teacher"]
    assert not (tmp_path / "photos" / "labels").exists()


def test_other_verbs_are_refused(fathom: Run, tmp_path: Path) -> None:
    write(tmp_path)
    for words, said in (
        (("label", "retry", "x"), "'label retry' is none that can be planned; train, label run, evaluate"),
        (("label", "status", "x"), "'label status' is none that can be planned; train, label run, evaluate"),
        (("label",), "'label' is none that can be planned; train, label run, evaluate"),
        (("frobnicate", "run.yaml"), "'frobnicate' is none that can be planned; train, label run, evaluate\n"),
        (("--rate", "nan", "train", "run.yaml"), "--rate: nan; a number above 0"),
        (("--rate", "inf", "train", "run.yaml"), "--rate: inf; a number above 0"),
        (("--rate", "0", "train", "run.yaml"), "--rate: 0; a number above 0"),
        (("train", "run.yaml", "--rate", "-1"), "--rate: -1; a number above 0"),
    ):
        status, _, err = fathom(*words)
        assert status == 2 and said in err, err
