"""What a configuration says about the network reaches it, its frozen companion, and what is written about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import DepthAnything, get_preset
from model.save import save_encoder
from tests.trainer.by_hand import checkpoint_of
from trainer.checkpoint import load_checkpoint
from trainer.config import ConfigError
from trainer.config_train import ModelSection
from trainer.tasks.student import TrainingTask as StudentTask
from trainer.tasks.teacher import TrainingTask as TeacherTask


def teacher(**model: Any) -> TeacherTask:
    return TeacherTask(TeacherTask.Options(), ModelSection(**{"preset": "tiny-swiglu", **model}))


def student(tmp_path: Path, **model: Any) -> StudentTask:
    torch.manual_seed(0)
    save_encoder(DepthAnything.from_preset("tiny-swiglu").pretrained, tmp_path / "encoder")
    options = StudentTask.Options(feature_weight=1.0, frozen_encoder=str(tmp_path / "encoder"))
    return StudentTask(options, ModelSection(**{"preset": "tiny-swiglu", **model}))


@pytest.mark.parametrize(
    "wanted",
    [{"position_mode": "exact"}, {"readout": "project"}, {"fusion": "even"}, {"activation_checkpointing": True}],
)
def test_a_fresh_network_is_what_the_configuration_says(wanted: dict[str, Any]) -> None:
    network = teacher(**wanted).build()
    assert isinstance(network, DepthAnything)
    found = {"activation_checkpointing": network.pretrained.activation_checkpointing, **network.preset.config()}
    assert {k: found[k] for k in wanted} == wanted
    plain = teacher().build()
    assert plain.preset == get_preset("tiny-swiglu") and not plain.pretrained.activation_checkpointing


def test_weights_keep_their_position_mode_unless_told(tmp_path: Path) -> None:
    exact = replace(get_preset("tiny-swiglu"), position_mode="exact")
    DepthAnything.from_preset(exact).save_pretrained(tmp_path / "w")
    weights = str(tmp_path / "w")
    assert teacher(weights=weights).build().preset.position_mode == "exact"
    assert teacher(weights=weights, position_mode="official", fusion="even").build().preset.fusion == "even"
    assert teacher(weights=weights, position_mode="official").build().preset.position_mode == "official"
    with pytest.raises(ConfigError, match=r"model.readout: is 'project', but .* has 'ignore'"):
        teacher(weights=weights, readout="project").build()


def test_the_frozen_encoder_resizes_positions_as_the_student_does(tmp_path: Path) -> None:
    DepthAnything.from_preset("tiny-swiglu").save_pretrained(tmp_path / "hf", layout="huggingface")
    theirs = tmp_path / "hf" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(load_file(theirs), theirs, metadata={"format": "pt"})  # as a folder that is not ours: no facts of ours
    prints = []
    for model in ({}, {"weights": str(tmp_path / "hf")}):
        task = student(tmp_path, **model)
        network = task.build()
        task.prepare(torch.device("cpu"))
        assert task.frozen.preset.position_mode == network.preset.position_mode
        prints.append(task.frozen_fingerprint())
    assert task.frozen.preset.position_mode == "exact" and prints[0] != prints[1]


def test_a_checkpoint_says_what_its_network_is(tmp_path: Path) -> None:
    task = teacher(position_mode="exact")
    network = task.build()
    record = task.network_record(network)
    path = checkpoint_of(tmp_path, network, record)
    assert json.loads((Path(path) / "manifest.json").read_text())["network"]["position_mode"] == "exact"
    assert load_checkpoint(path).about.network == record
    again = DepthAnything.from_pretrained(path)
    assert again.preset == network.preset and again.fingerprint() == network.fingerprint()
