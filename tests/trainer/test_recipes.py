"""The recipes of the paper hold the paper's numbers (arXiv 2401.10891), and those of UniMatch where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataio.spec import Perturbation
from launcher import recipes
from trainer.config import read_config
from trainer.config_train import TrainConfig
from trainer.tasks.base import make_task

LABELLED_IMAGES, UNLABELLED_IMAGES, TEACHER_EPOCHS = 1_500_000, 62_000_000, 20

# Written out, so that a changed default shows too.
FLIPPED = Perturbation(flip_p=0.5, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0, cutmix_p=0.0)
STRONG = Perturbation(
    flip_p=0.5,
    jitter_p=0.8,
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.25,
    grayscale_p=0.0,
    blur_p=0.5,
    blur_sigma=(0.1, 2.0),
    cutmix_p=0.5,
    cutmix_area=(0.02, 0.4),
    cutmix_aspect=(0.3, 1 / 0.3),
)


def recipe(name: str, folder: Path) -> TrainConfig:
    file = folder / f"{name}.yaml"
    file.write_text(recipes.read(name))
    return read_config(TrainConfig, file)


def check_common(config: TrainConfig, name: str) -> None:
    """What the paper says of teacher and students alike (section 4)."""
    assert config.name == name
    assert config.optim.encoder_lr == 5e-6
    assert config.optim.decoder_lr == pytest.approx(10 * config.optim.encoder_lr)
    assert config.optim.schedule == "linear"
    assert config.optim.warmup_samples == 0
    assert config.data.input_size == 518
    assert len(config.data.roles["labelled"].datasets) == 6
    assert config.data.roles["labelled"].perturbation == FLIPPED


def test_the_teacher_s_numbers(tmp_path: Path) -> None:
    config = recipe("teacher-v1-vitl", tmp_path)
    check_common(config, "teacher-v1-vitl")
    assert (config.task.kind, config.model.preset) == ("teacher", "v1-vitl")
    assert "dinov2_vitl14" in str(config.model.encoder_weights)
    assert config.steps * config.global_batch == pytest.approx(TEACHER_EPOCHS * LABELLED_IMAGES, rel=0.01)


@pytest.mark.parametrize("size", ["vits", "vitb", "vitl"])
def test_the_students_numbers(size: str, tmp_path: Path) -> None:
    config = recipe(f"student-v1-{size}", tmp_path)
    check_common(config, f"student-v1-{size}")
    assert (config.task.kind, config.model.preset) == ("student", f"v1-{size}")
    labelled, unlabelled = config.data.roles["labelled"], config.data.roles["unlabelled"]
    assert unlabelled.batch == 2 * labelled.batch
    assert config.steps * unlabelled.batch == pytest.approx(UNLABELLED_IMAGES, rel=0.01)
    assert unlabelled.perturbation == STRONG
    task = make_task(config)
    assert task.term_weights == pytest.approx({"labelled": 1 / 3, "unlabelled": 1 / 3, "feature": 1 / 3})
    assert task.options.model_dump()["alpha"] == 0.85
    assert task.files.keys() == {"model.encoder_weights", "task.frozen_encoder"}
    (encoder,) = set(task.files.values())  # the student starts from what it is held to
    assert f"dinov2_{size}14" in encoder
