"""Every task: sums, counts, groups, previews, roles; the teacher against the plain formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.batches import (
    FROZEN_PRESET,
    SIZE,
    VARIANTS,
    encoder_file,
    share,
    task_of,
    train_config,
    variant_config,
)
from tests.trainer.by_hand import Forward, expected_losses, some_disparity, without_weight
from trainer.config import ConfigError
from trainer.losses import gradient_matching_loss, regional_affine_invariant_loss, regional_least_squares_loss
from trainer.tasks import base
from trainer.tasks.base import make_task, task_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders' files."""
    made = tmp_path_factory.mktemp("encoders")
    for preset in ("tiny", FROZEN_PRESET):
        encoder_file(made, preset)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_agree_in_sums_counts_and_weights(variant: str, folder: Path) -> None:
    config = variant_config(variant, folder)
    task = task_of(config)
    module = task.build()
    batch = share(config, 0, 1)
    sums, counts = task.sums(module, batch), task.counts(batch)
    assert sums.keys() == counts.keys() == task.term_weights.keys()
    assert all(value.shape == () and value.isfinite() for value in (*sums.values(), *counts.values()))
    for term, count in counts.items():
        role = {"masked": "unlabelled", "feature": "unlabelled"}.get(term, term.removesuffix("_gradient"))
        bad = 1 if role == sorted(config.data.roles)[0] else 0  # row 1 has no weight
        bad += variant == "metric"  # row 5 has no depth in range
        assert count == config.data.roles[role].batch - bad


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_hold_every_trainable_parameter_once(variant: str, folder: Path) -> None:
    task = task_of(variant_config(variant, folder))
    module = task.build()
    groups = task.parameter_groups(module)
    named = [pair for pairs in groups.values() for pair in pairs]
    assert set(groups) == {"encoder", "decoder"} and all(groups.values())
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(named) == len(trainable)
    assert all(trainable[name] is p for name, p in named)
    assert all(name.startswith("pretrained.") for name, _ in groups["encoder"])
    assert not any(name.startswith("pretrained.") for name, _ in groups["decoder"])


def test_the_teacher_is_the_plain_formula() -> None:
    config = train_config("teacher")
    batch = without_weight(share(config, 0, 1), 5)
    forward = Forward(some_disparity(batch))
    found = task_of(config).sums(forward, batch)["labelled"]
    losses = expected_losses(batch, forward.disparity_BHW)
    assert found.item() == pytest.approx(sum(loss for i, loss in enumerate(losses) if i not in (1, 5)), rel=1e-5)
    found.backward()
    gradient_BHW = forward.disparity_BHW.grad
    assert gradient_BHW is not None
    assert not gradient_BHW[[1, 5]].any() and gradient_BHW[0].any()
    assert not gradient_BHW[batch.region_BHW == 0].any()


def test_wrong_options_of_the_teacher_and_an_unknown_task() -> None:
    with pytest.raises(ConfigError, match=r"task\.alpha: unknown key"):
        make_task(train_config("teacher", task={"kind": "teacher", "alpha": 1}))
    with pytest.raises(ConfigError, match=r"task\.loss: found 'mse'; input should be 'mad' or 'lsq'"):
        make_task(train_config("teacher", task={"kind": "teacher", "loss": "mse"}))
    with pytest.raises(ConfigError, match=r"task\.kind: found 'base'; known tasks: metric, pretext, student, teacher"):
        make_task(train_config("teacher", task={"kind": "base"}))


def roles(*names: str, labels: tuple[str, ...] = ()) -> dict[str, Any]:
    role = {"datasets": ["/d"], "batch": 8, "lanes": 4}
    return {
        "input_size": SIZE,
        "roles": {name: {**role, "labels": ["/l"]} if name in labels else role for name in names},
    }


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("teacher", roles("unlabelled"), r"data\.roles: task 'teacher' needs \['labelled'\], found \['unlabelled'\]"),
        ("teacher", roles("labelled", "unlabelled"), r"data\.roles: .* found \['labelled', 'unlabelled'\]"),
        ("student", roles("labelled"), r"data\.roles: task 'student' needs \['labelled', 'unlabelled'\]"),
        ("student", roles("labelled", "unlabelled"), r"data\.roles\.unlabelled\.labels: missing"),
        ("teacher", roles("labelled", labels=("labelled",)), r"data\.roles\.labelled\.labels: .* reads no sidecar"),
    ],
)
def test_missing_and_surplus_roles(kind: str, data: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        make_task(train_config(kind, f"{folder}/tiny.safetensors", data=data))


@pytest.mark.parametrize(
    ("kind", "preset", "words"),
    [
        ("teacher", "tiny-metric-indoor", "this task learns disparity; take one such as 'v2-vits'"),
        ("student", "tiny-metric-outdoor", "this task learns disparity"),
        ("metric", "tiny", "this task learns metres; take one such as 'v2-vits-metric-indoor'"),
    ],
)
def test_a_preset_with_the_other_head_is_refused(kind: str, preset: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"model.preset: found '{preset}', but {words}"):
        make_task(train_config(kind, "/f", model={"preset": preset, "encoder_weights": "/f"}))


@pytest.mark.parametrize("loss", ["mad", "lsq"])
def test_the_teachers_terms_are_the_losses_of_its_options(loss: Any) -> None:
    """Both per image, summed over those with weight; `test_losses.py` holds the losses themselves to their formulas."""
    task = {"kind": "teacher", "loss": loss, "gradient_weight": 2.0, "gradient_scales": 2}
    config = train_config("teacher", task=task)
    teacher, batch = task_of(config), without_weight(share(config, 0, 1), 5)
    forward = Forward(some_disparity(batch))
    sums = teacher.sums(forward, batch)
    maps = (forward.disparity_BHW, batch.targets["disparity"].value_BHW, batch.region_BHW, 1)
    data_B = {"mad": regional_affine_invariant_loss, "lsq": regional_least_squares_loss}[loss](*maps)
    gradient_B = gradient_matching_loss(*maps, scales=2, normalisation=loss)
    good = [row for row in range(8) if row not in (1, 5)]
    assert sums["labelled"].item() == pytest.approx(data_B[good].sum().item(), rel=1e-5)
    assert sums["labelled_gradient"].item() == pytest.approx(gradient_B[good].sum().item(), rel=1e-5)
    assert teacher.term_weights == {"labelled": 1.0, "labelled_gradient": 2.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_previews_are_maps_of_the_input_s_size(variant: str, folder: Path) -> None:
    config = variant_config(variant, folder)
    task = task_of(config)
    batch = share(config, 0, 1)
    with torch.no_grad():
        assert task.preview(task.build(), batch.views["student"][:2]).shape == (2, SIZE, SIZE)


def test_what_pretext_exports_starts_a_teacher_and_a_student(tmp_path: Path) -> None:
    task = task_of(train_config("pretext"))
    module: Any = task.build()
    task.export(module, str(tmp_path / "weights"))
    file = str(tmp_path / "weights" / "encoder.safetensors")
    for kind in ("teacher", "student"):
        other: Any = task_of(train_config(kind, file))
        for name, tensor in other.build().pretrained.state_dict().items():
            assert torch.equal(tensor, module.pretrained.state_dict()[name])
    assert torch.equal(other.frozen.norm.weight, module.pretrained.norm.weight)


ANOTHER = '''
"""A task of its own: the mean squared error of the teacher's network."""
from trainer.tasks.teacher import TrainingTask as Teacher

class TrainingTask(Teacher):
    def sums(self, forward, batch):
        error = forward(batch.views["student"]).disparity_BHW - batch.targets["disparity"].value_BHW
        return {"labelled": (error.square().mean((1, 2)) * batch.weight_B).sum()}
'''


def test_a_task_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.tasks

    (tmp_path / "squared.py").write_text(ANOTHER)
    monkeypatch.setattr(trainer.tasks, "__path__", [*trainer.tasks.__path__, str(tmp_path)])
    assert task_names() == ["metric", "pretext", "squared", "student", "teacher"]
    config = train_config("teacher", task={"kind": "squared"})
    task = make_task(config)
    assert type(task).__module__ == "trainer.tasks.squared"
    assert isinstance(task.build(), nn.Module)
    assert task.sums(task.build(), share(config, 0, 1))["labelled"] > 0
    assert base.Task in type(task).__mro__
