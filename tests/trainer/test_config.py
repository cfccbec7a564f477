"""Configurations: every mistake is refused in one line that names the field, what was found and what is allowed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import recipes
from trainer.config import ConfigError, absolute_paths, apply_override, dump_config, parse_config, read_config
from trainer.config_evaluate import EvaluateConfig
from trainer.config_label import LabelConfig
from trainer.config_train import TrainConfig
from trainer.tasks.base import make_task

VALUES: dict[str, Any] = {
    "name": "run",
    "steps": 100,
    "task": {"kind": "teacher"},
    "model": {"preset": "tiny"},
    "data": {
        "input_size": 56,
        "roles": {"labelled": {"datasets": ["/d"], "batch": 8, "lanes": 4, "perturbation": {"flip_p": 0.5}}},
    },
}
ROLE = "data.roles.labelled"


def values(**changes: Any) -> dict[str, Any]:
    """VALUES with changes at dotted paths (dots as __)."""
    result = copy.deepcopy(VALUES)
    for key, value in changes.items():
        node: Any = result
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return result


def refusal(cls: type[Any] = TrainConfig, given: dict[str, Any] | None = None, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(cls, values(**changes) if given is None else given, source="run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("run.yaml: ")
    assert caught.value.exit_status == 2
    return message


@pytest.mark.parametrize(
    ("change", "where", "near"),
    [
        ({"stepz": 1}, "stepz", "'steps'"),
        ({"model__preest": "tiny"}, "model.preest", "'preset'"),
        ({"optim__encoder_rl": 1}, "optim.encoder_rl", "'encoder_lr'"),
        ({"data__inputsize": 1}, "data.inputsize", "'input_size'"),
        ({"data__roles__labelled__lane": 1}, f"{ROLE}.lane", "'lanes'"),
        ({"data__roles__labelled__perturbation__flipp": 1}, f"{ROLE}.perturbation.flipp", "'flip_p'"),
        ({"data__roles__labelled__perturbation__cutmix_pp": 1}, f"{ROLE}.perturbation.cutmix_pp", "'cutmix_p'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(change: dict[str, Any], where: str, near: str) -> None:
    assert f"{where}: unknown key; did you mean {near}?" in refusal(**change)


def test_an_unknown_key_that_resembles_none_lists_them() -> None:
    message = refusal(checkpoint__zzz=1)
    assert "checkpoint.zzz: unknown key; known keys: every, every_minutes, keep, keep_best" in message


def test_every_mistake_is_named_at_once() -> None:
    message = refusal(stepz=1, steps=0, optim__clip=-1)
    assert all(part in message for part in ("stepz", "steps: found 0", "optim.clip: found -1"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "many"}, "steps: found 'many'; input should be a valid integer"),
        ({"steps": 0}, "steps: found 0; input should be greater than or equal to 1"),
        ({"seed": -1}, "seed: found -1"),
        ({"name": "a b"}, "name: found 'a b'"),
        ({"name": "../up"}, "name: found '../up'"),
        ({"engine__precision": "fp16"}, "engine.precision: found 'fp16'; input should be 'bf16' or 'fp32'"),
        ({"engine__zero_stage": 4}, "engine.zero_stage: found 4; input should be 0, 1, 2 or 3"),
        ({"optim__schedule": "step"}, "optim.schedule: found 'step'; input should be 'constant', 'linear'"),
        ({"optim__betas": [0.9, 1.0]}, "optim.betas.1: found 1.0; input should be less than 1"),
        ({"optim__betas": [0.9]}, "optim.betas.1: missing"),
        ({"optim__encoder_lr": float("inf")}, "optim.encoder_lr: found inf; input should be a finite number"),
        ({"optim__encoder_lr": float("nan")}, "optim.encoder_lr: found nan"),
        ({"optim__warmup_samples": 800}, "optim.warmup_samples: 800 must be less than the run's 800"),
        ({"cluster__workers": 0}, "cluster.workers: found 0"),
        ({"checkpoint__keep": 0}, "checkpoint.keep: found 0"),
        ({"data__input_size": 100}, "data.input_size: found 100; input should be a multiple of 14"),
        ({"data__input_size": 0}, "data.input_size: found 0"),
        ({"data__threads": 0}, "data.threads: found 0; input should be greater than or equal to 1"),
        ({"data__prefetch": 0}, "data.prefetch: found 0"),
        ({"data__shuffle_window": 0}, "data.shuffle_window: found 0"),
        ({"data__max_bad_fraction": 1.5}, "data.max_bad_fraction: found 1.5; input should be less than or equal to 1"),
        ({"data__roles": {}}, "data.roles: is empty"),
        ({"data__roles__labelled__datasets": []}, f"{ROLE}.datasets: is empty"),
        ({"data__roles__labelled__datasets": "/d"}, f"{ROLE}.datasets: found '/d'; input should be a valid tuple"),
        ({"data__roles__labelled__labels": ["/a", "/b"]}, f"{ROLE}.labels: 2 folders for 1 datasets"),
        ({"data__roles__labelled__batch": 0}, f"{ROLE}.batch: found 0"),
        ({"data__roles__labelled__lanes": 3}, f"{ROLE}.lanes: lanes is 3 and batch 8: lanes must divide batch; lanes"),
        ({"data__roles__labelled__lanes": 0}, f"{ROLE}.lanes: found 0"),
        ({"cluster__workers": 5}, f"{ROLE}.lanes: 4 cannot feed 5 cluster.workers"),
    ],
)
def test_a_wrong_value_names_field_value_and_what_is_allowed(change: dict[str, Any], words: str) -> None:
    assert words in refusal(**change)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip_p", 2),
        ("jitter_p", -0.1),
        ("grayscale_p", 1.01),
        ("blur_p", "often"),
        ("cutmix_p", 1.5),
        ("brightness", -1),
        ("contrast", float("inf")),
        ("saturation", float("nan")),
        ("hue", 0.6),
        ("blur_sigma", [2.0, 0.1]),
        ("blur_sigma", [-1.0, 0.1]),
        ("cutmix_area", [0.0, 0.4]),
        ("cutmix_area", [0.02, 1.4]),
        ("cutmix_area", [0.4, 0.02]),
        ("cutmix_aspect", [0, 1]),
        ("cutmix_aspect", [3, 0.3]),
    ],
)
def test_perturbations_have_bounds(field: str, value: Any) -> None:
    assert f"{ROLE}.perturbation.{field}" in refusal(data__roles__labelled__perturbation={field: value})


def test_cutmix_needs_two_samples_per_lane() -> None:
    message = refusal(data__roles__labelled__perturbation={"cutmix_p": 0.5}, data__roles__labelled__lanes=8)
    assert f"{ROLE}.lanes" in message and "CutMix needs at least 2 samples per lane; lanes may be 1, 2, 4" in message


@pytest.mark.parametrize("missing", ["name", "task", "model", "data"])
def test_a_missing_section_is_named(missing: str) -> None:
    given = values()
    del given[missing]
    assert f"{missing}: missing" in refusal(given=given)


def test_a_missing_field_inside_a_role_is_named() -> None:
    assert f"{ROLE}.datasets: missing" in refusal(data__roles={"labelled": {"batch": 8}})


def test_long_values_are_cut() -> None:
    assert len(refusal(steps="x" * 5000)) < 400


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("optim.encoder_lr=1e-4", ("optim", "encoder_lr"), 1e-4),
        ("optim.encoder_lr=-2.5E-3", ("optim", "encoder_lr"), -2.5e-3),
        ("data.roles.labelled.datasets=[/a, /b]", ("data", "roles", "labelled", "datasets"), ["/a", "/b"]),
        ("model.encoder_weights=null", ("model", "encoder_weights"), None),
        ("model.encoder_weights=", ("model", "encoder_weights"), None),
        ("cluster.use_gpu=true", ("cluster", "use_gpu"), True),
        ("runs=a=b", ("runs",), "a=b"),
        ("name=nan", ("name",), "nan"),
        ("name=infinity", ("name",), "infinity"),
        ("new.deep.key=1", ("new", "deep", "key"), 1),
    ],
)
def test_overrides(override: str, path: tuple[str, ...], expected: Any) -> None:
    node: Any = values()
    apply_override(node, override)
    for key in path:
        node = node[key]
    assert node == expected and type(node) is type(expected)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("data..threads=3", "expected KEY=VALUE"),
        ("data.=3", "expected KEY=VALUE"),
        ("steps.x=1", "'steps' is a value, not a section"),
        ("data.roles.labelled.datasets.0=/x", "'datasets' is a value, not a section"),
        ("steps=[1,", "not valid YAML"),
    ],
)
def test_wrong_overrides_are_quoted(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set '") as caught:
        apply_override(values(), override)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_of_an_unknown_key_is_refused_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values()))
    assert read_config(TrainConfig, file, ["optim.encoder_lr=1e-4"]).optim.encoder_lr == 1e-4
    with pytest.raises(ConfigError, match=r"optim\.encoder_rl: unknown key; did you mean 'encoder_lr'"):
        read_config(TrainConfig, file, ["optim.encoder_rl=1e-4"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found NoneType, expected a mapping"),
        (b"- a\n- b\n", "found list, expected a mapping"),
        (b"steps: [1\n", "not valid YAML"),
        (b"name: \xff\xfe\n", "not valid YAML"),
        (b"a: 1\nb: 2\na: 3\n", "'a' stands twice"),
        (b"optim:\n  clip: 1\n  clip: 2\n", "'clip' stands twice"),
        (b"!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"1: 2\n", "1: "),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a file.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(TrainConfig, file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and words in message and "\n" not in message


def test_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no such configuration file"):
            read_config(TrainConfig, path)


def test_yaml_merge_keys_are_no_doubles(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: &b {a: 1, c: 1}\nx: {<<: *b, a: 2}\n")
    with pytest.raises(ConfigError, match="base: unknown key"):
        read_config(TrainConfig, file)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = values(
        runs="out/../runs",
        model__encoder_weights="~/e.pth",
        model__weights=None,
        task={"kind": "student", "frozen_encoder": "f.pth"},
        data__roles__labelled__datasets=["d", "s3://bucket/d", "/abs"],
        data__roles__labelled__labels=("l",),
    )
    fixed = absolute_paths(given)
    assert fixed["runs"] == str(tmp_path / "runs")
    assert fixed["model"] == {"preset": "tiny", "encoder_weights": os.path.expanduser("~/e.pth"), "weights": None}
    assert fixed["task"]["frozen_encoder"] == str(tmp_path / "f.pth")
    assert fixed["data"]["roles"]["labelled"]["datasets"] == [str(tmp_path / "d"), "s3://bucket/d", "/abs"]
    assert fixed["data"]["roles"]["labelled"]["labels"] == [str(tmp_path / "l")]
    assert given["runs"] == "out/../runs"
    assert absolute_paths(given, "/base")["runs"] == "/base/runs"


def test_what_is_written_reads_back_to_the_same(tmp_path: Path) -> None:
    given = values(
        optim={"encoder_lr": 1e-5, "betas": [0.8, 0.99]},
        task={"kind": "teacher"},
        data__roles__labelled__perturbation={"cutmix_p": 0.5, "blur_sigma": [0.025, 0.5]},
    )
    config = parse_config(TrainConfig, given)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    again = read_config(TrainConfig, file)
    assert again.model_dump(exclude={"runs"}) == config.model_dump(exclude={"runs"})
    assert again.data == config.data and again.optim.betas == (0.8, 0.99)


def test_a_task_s_options_survive_the_round_trip(tmp_path: Path) -> None:
    config = parse_config(TrainConfig, values(task={"kind": "student", "alpha": 0.5, "frozen_encoder": "/f"}))
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert read_config(TrainConfig, file).task.options == {"alpha": 0.5, "frozen_encoder": "/f"}


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_a_configuration_of_a_known_task(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(recipes.read(name))
    config = read_config(TrainConfig, file)
    task = make_task(config)
    assert set(task.term_weights)
    assert all(os.path.isabs(path) for path in task.files.values())


def test_there_are_recipes() -> None:
    assert {"quickstart-teacher", "quickstart-student", "quickstart-encoder", "teacher-v1-vitl"} <= set(recipes.names())


def test_other_commands_are_checked_too() -> None:
    label = {"dataset": "/d", "weights": "/w"}
    assert "input_size: found 100; input should be a multiple of 14" in refusal(
        LabelConfig, {**label, "input_size": 100}
    )
    assert "batch: found 0" in refusal(LabelConfig, {**label, "batch": 0})
    assert "weights: missing" in refusal(LabelConfig, {"dataset": "/d"})
    assert "datasets: found ()" in refusal(EvaluateConfig, {"weights": "/w", "datasets": ()})
    assert "max_depth: found 0" in refusal(EvaluateConfig, {"weights": "/w", "datasets": ["/d"], "max_depth": 0})


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer.config as c, trainer.config_train as t\n"
        f"c.parse_config(t.TrainConfig, {VALUES!r})\n"
        "print([m for m in ('torch', 'ray', 'deepspeed', 'nvidia', 'webdataset') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": None}, "steps: found None"),
        ({"passes": {"labelled": 1}}, "steps: give steps or passes; both are given"),
        ({"passes": {"labelled": 0}}, "passes.labelled: found 0; input should be greater than 0"),
        ({"engine__cpu_offload": True, "engine__zero_stage": 0}, "engine.cpu_offload: needs engine.zero_stage 1, 2"),
        ({"engine__micro_batch": "largest"}, "engine.micro_batch"),
        ({"checkpoint__every": None}, "checkpoint.every: null needs checkpoint.every_minutes"),
        ({"checkpoint__keep_best": 1}, "checkpoint.keep_best: needs validation.datasets"),
        ({"optim__ema_decay": 1.0}, "optim.ema_decay: found 1.0"),
        ({"optim__optimizer": "sgd"}, "optim.optimizer: found 'sgd'; input should be 'adamw' or 'adam'"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], words: str) -> None:
    assert words in refusal(**change)


def test_the_length_is_steps_or_passes_of_one_role() -> None:
    given = values()
    del given["steps"]
    assert "steps: give steps or passes; neither is given" in refusal(given=given)
    assert "passes: found" in refusal(given=given | {"passes": {"labelled": 1.0, "other": 1.0}})
    assert "name one of the roles ['labelled']" in refusal(given=given | {"passes": {"other": 1.0}})
    config = parse_config(TrainConfig, given | {"passes": {"labelled": 20}})
    assert (config.steps, config.passes) == (0, {"labelled": 20.0})
