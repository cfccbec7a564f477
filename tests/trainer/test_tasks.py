"""The tasks: sums, counts and weights against the plain formulas, what is frozen, and which settings are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataio.types import Batch
from model.types import DepthPrediction
from tests.trainer.batches import SIZE, share, task_of, train_config
from trainer.checkpoint import fingerprint
from trainer.config import ConfigError
from trainer.config_train import TrainConfig
from trainer.losses import feature_alignment_loss
from trainer.tasks import base, pretext
from trainer.tasks.base import make_task, task_names

KINDS = ("teacher", "student", "pretext")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from model import DepthAnything
    from model.save import save_encoder

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(DepthAnything.from_preset("tiny").pretrained, path)
    return str(path)


def student_config(encoder: str | None, **options: Any) -> TrainConfig:
    return train_config("student", encoder, task={"kind": "student", **options})


class Forward:
    """Stands for the engine: a disparity and features given beforehand, both leaves of the graph."""

    def __init__(self, disparity_BHW: Tensor, features_BND: Tensor | None = None) -> None:
        self.disparity_BHW = disparity_BHW.requires_grad_()
        self.features_BND = None if features_BND is None else features_BND.requires_grad_()

    def __call__(self, image_BCHW: Tensor, features: bool = False) -> DepthPrediction:
        assert features == (self.features_BND is not None)
        assert image_BCHW.shape[0] == self.disparity_BHW.shape[0]
        return DepthPrediction(disparity_BHW=self.disparity_BHW, features_BND=self.features_BND)


def without_weight(batch: Batch, *rows: int) -> Batch:
    """These rows have pixels and regions but no weight."""
    weight_B = batch.weight_B.clone()
    weight_B[list(rows)] = 0
    return replace(batch, weight_B=weight_B)


def some_disparity(batch: Batch) -> Tensor:
    return torch.rand(len(batch), SIZE, SIZE, generator=torch.Generator().manual_seed(9))


def normalised(x_K: Tensor) -> Tensor:
    """Equations 2 and 3 of the paper, by hand: the lower median and the mean absolute deviation from it."""
    centred_K = x_K - x_K.sort().values[(len(x_K) - 1) // 2]
    return centred_K / centred_K.abs().mean()


def by_hand(pred_HW: Tensor, target_HW: Tensor, region_HW: Tensor) -> float:
    """Every region normalised by its own median and deviation, the image's mean over all valid pixels."""
    total, area = 0.0, 0
    for label in (1, 2):
        pixels_HW = region_HW == label
        if pixels_HW.any():
            total += float((normalised(pred_HW[pixels_HW]) - normalised(target_HW[pixels_HW])).abs().sum())
            area += int(pixels_HW.sum())
    return total / max(area, 1)


def expected_losses(batch: Batch, pred_BHW: Tensor) -> list[float]:
    target_BHW = batch.targets["disparity"].value_BHW
    return [by_hand(pred_BHW[i].detach(), target_BHW[i], batch.region_BHW[i]) for i in range(len(batch))]


@pytest.mark.parametrize("kind", KINDS)
def test_terms_agree_in_sums_counts_and_weights(kind: str, encoder: str) -> None:
    config = train_config(kind, encoder)
    task = task_of(config)
    module = task.build()
    batch = share(config, 0, 1)
    sums, counts = task.sums(module, batch), task.counts(batch)
    assert sums.keys() == counts.keys() == task.term_weights.keys()
    assert all(value.shape == () and value.isfinite() for value in (*sums.values(), *counts.values()))
    for term, count in counts.items():
        role = {"masked": "unlabelled", "feature": "unlabelled"}.get(term, term)
        bad = 1 if role == sorted(config.data.roles)[0] else 0  # row 1 has no weight
        assert count == config.data.roles[role].batch - bad


@pytest.mark.parametrize("kind", KINDS)
def test_groups_hold_every_trainable_parameter_once(kind: str, encoder: str) -> None:
    task = task_of(train_config(kind, encoder))
    module = task.build()
    groups = task.parameter_groups(module)
    named = [pair for pairs in groups.values() for pair in pairs]
    assert set(groups) == {"encoder", "decoder"} and all(groups.values())
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(named) == len(trainable)
    assert all(trainable[name] is p for name, p in named)
    assert all(name.startswith("pretrained.") for name, _ in groups["encoder"])


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


def test_the_student_normalises_every_region_of_a_mixed_image_by_itself(encoder: str) -> None:
    config = student_config(encoder, feature_weight=0)
    batch = without_weight(share(config, 0, 1), 2, 11)
    assert (batch.region_BHW == 2).flatten(1).any(1).sum() == 4
    forward = Forward(some_disparity(batch))
    sums = task_of(config).sums(forward, batch)
    losses = expected_losses(batch, forward.disparity_BHW)
    assert sums["labelled"].item() == pytest.approx(losses[0] + losses[3], rel=1e-5)
    assert sums["unlabelled"].item() == pytest.approx(sum(losses[4:11]), rel=1e-5)
    # what is pasted may have any scale and shift of its own
    pred_BHW = forward.disparity_BHW.detach()
    again = Forward(torch.where(batch.region_BHW == 2, 3 * pred_BHW + 5, pred_BHW))
    assert task_of(config).sums(again, batch)["unlabelled"].item() == pytest.approx(sum(losses[4:11]), rel=1e-4)


def features_of(task: Any, batch: Batch, view: str = "student") -> Tensor:
    """What the frozen encoder says of every row."""
    features_BND: Tensor = task.frozen(batch.views[view]).last_BND
    return features_BND.detach().clone()


@pytest.mark.parametrize("view", ["student", "clean"])
def test_the_feature_term_is_the_mean_over_the_kept_tokens_of_unlabelled_rows(encoder: str, view: str) -> None:
    config = student_config(encoder, frozen_view=view, alpha=0.85)
    task = task_of(config)
    assert task.views == (("student",) if view == "student" else ("student", "clean"))
    batch = without_weight(share(config, 0, 1), 6)
    frozen_BND = features_of(task, batch, view)
    noise_BND = torch.randn(frozen_BND.shape, generator=torch.Generator().manual_seed(1))
    features_BND = frozen_BND + noise_BND * torch.linspace(0, 1.5, len(batch))[:, None, None]
    forward = Forward(some_disparity(batch), features_BND.clone())
    cos_BN = F.cosine_similarity(features_BND, frozen_BND, dim=-1)
    assert (cos_BN[4:] > 0.85).any() and (cos_BN[4:] < 0.85).any()
    expected = 0.0
    for row in (4, 5, *range(7, 12)):
        kept = [1 - float(c) for c in cos_BN[row] if c <= 0.85]
        expected += sum(kept) / max(len(kept), 1)
    found = task.sums(forward, batch)["feature"]
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    gradient_BND = forward.features_BND.grad  # type: ignore[union-attr]
    touched_BN = gradient_BND.abs().amax(-1) > 0  # type: ignore[union-attr]
    wanted_BN = cos_BN <= 0.85
    wanted_BN[[0, 1, 2, 3, 6]] = False
    assert torch.equal(touched_BN, wanted_BN)


def test_an_image_whose_tokens_are_all_close_has_no_loss() -> None:
    close_BND = torch.ones(1, 4, 8).requires_grad_()
    loss_B = feature_alignment_loss(close_BND, torch.ones(1, 4, 8), 0.85)
    loss_B.sum().backward()
    assert loss_B.tolist() == [0.0]
    assert close_BND.grad is not None and not close_BND.grad.any()


def test_a_micro_batch_without_unlabelled_rows_has_terms_too(encoder: str) -> None:
    config = student_config(encoder)
    task = task_of(config)
    module = task.build()
    (micro, *_) = share(config, 0, 1).split(2)
    sums = task.sums(module, micro)
    assert sums["unlabelled"].item() == sums["feature"].item() == 0
    sum(sums.values()).backward()  # type: ignore[union-attr]


def test_the_frozen_encoder_is_no_part_of_what_is_trained(encoder: str) -> None:
    config = student_config(encoder)
    task: Any = task_of(config)
    module = task.build()
    before = {name: tensor.clone() for name, tensor in task.frozen.state_dict().items()}
    batch = share(config, 0, 1)
    sum(task.sums(module, batch).values()).backward()
    assert not task.frozen.training
    assert all(p.grad is None and not p.requires_grad for p in task.frozen.parameters())
    own = {id(p) for named in task.parameter_groups(module).values() for _, p in named}
    storages = {p.data_ptr() for p in module.parameters()}
    assert not any(id(p) in own or p.data_ptr() in storages for p in task.frozen.parameters())
    assert any(p.grad is not None and p.grad.any() for p in module.pretrained.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.frozen.state_dict().items())
    assert task.frozen_fingerprint() == f"{fingerprint(task.frozen.state_dict())}-official"


@pytest.mark.parametrize("dropped", ["labelled", "unlabelled", "feature"])
def test_a_weight_of_0_drops_its_term(encoder: str, dropped: str) -> None:
    config = student_config(encoder, **{f"{dropped}_weight": 0})
    task: Any = task_of(config)
    kept = {"labelled", "unlabelled", "feature"} - {dropped}
    batch = share(config, 0, 1)
    assert set(task.term_weights) == set(task.counts(batch)) == set(task.sums(task.build(), batch)) == kept
    assert (task.frozen is None) == (dropped == "feature")


def test_without_a_feature_term_no_file_and_no_clean_view_is_needed() -> None:
    task = make_task(student_config(None, feature_weight=0, frozen_view="clean", frozen_encoder="/f"))
    assert task.views == ("student",)
    assert task.files == {}
    assert task.frozen_fingerprint() is None


def test_files_are_named_by_their_field(encoder: str) -> None:
    task = make_task(student_config(encoder, frozen_encoder="/f"))
    assert task.files == {"model.encoder_weights": encoder, "task.frozen_encoder": "/f"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "task.frozen_encoder: missing"),
        ({"feature_weight": 0, "labelled_weight": 0, "unlabelled_weight": 0}, "task: every weight is 0"),
        ({"feature_weight": -1}, "task.feature_weight: found -1"),
        ({"alpha": 1.5}, "task.alpha: found 1.5; input should be less than or equal to 1"),
        ({"alpah": 0.5}, "task.alpah: unknown key; did you mean 'alpha'?"),
        ({"frozen_view": "left"}, "task.frozen_view: found 'left'; input should be 'student' or 'clean'"),
    ],
)
def test_wrong_options_of_the_student(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(student_config(None, **options))
    assert words in str(caught.value)


def test_a_teacher_takes_no_options_and_an_unknown_task_none() -> None:
    with pytest.raises(ConfigError, match=r"task\.alpha: unknown key"):
        make_task(train_config("teacher", task={"kind": "teacher", "alpha": 1}))
    with pytest.raises(ConfigError, match=r"task\.kind: found 'base'; known tasks: pretext, student, teacher"):
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
def test_missing_and_surplus_roles(kind: str, data: dict[str, Any], words: str, encoder: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_task(train_config(kind, encoder, data=data))


def test_masks_depend_on_key_and_place_alone() -> None:
    batch = share(train_config("pretext"), 0, 1)
    mask_BN = pretext.draw_masks(batch, 64, 0.4)
    assert mask_BN.shape == (8, 64)
    assert mask_BN.sum(1).tolist() == [26.0] * 8
    assert set(mask_BN.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask_BN, pretext.draw_masks(batch, 64, 0.4))
    pieces = [pretext.draw_masks(micro, 64, 0.4) for micro in batch.split(3)]
    assert torch.equal(mask_BN, torch.cat(pieces))
    assert len({tuple(row.tolist()) for row in mask_BN}) == 8
    later = pretext.draw_masks(replace(batch, cursor={"unlabelled": 1000}), 64, 0.4)
    assert not any(torch.equal(a, b) for a, b in zip(mask_BN, later, strict=True))
    assert pretext.draw_masks(batch, 4, 0.01).sum(1).tolist() == [1.0] * 8


def test_masks_are_spread_evenly() -> None:
    batch = share(train_config("pretext"), 0, 1)
    batch = replace(batch, keys=tuple(f"k{i}" for i in range(2000)))
    share_N = pretext.draw_masks(batch, 16, 0.5).mean(0)
    assert (share_N - 0.5).abs().max() < 0.06


def test_pretext_sees_no_blanked_patch_and_is_scored_only_there() -> None:
    config = train_config("pretext")
    task = task_of(config)
    batch = share(config, 0, 1)
    tokens = (SIZE // 14) ** 2
    mask_BN = pretext.draw_masks(batch, tokens, 0.5)
    seen: list[Tensor] = []
    pred_BNP = torch.randn(8, tokens, 196, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def forward(image_BCHW: Tensor) -> Tensor:
        seen.append(image_BCHW)
        return pred_BNP

    found = task.sums(forward, batch)["masked"]
    target_BNP = torch.stack([by_hand_patches(image) for image in batch.views["clean"]])
    error_BN = (pred_BNP.detach() - target_BNP).square().mean(-1)
    rows = [float(error_BN[i][mask_BN[i] > 0].mean()) for i in range(8) if i != 1]
    assert found.item() == pytest.approx(sum(rows), rel=1e-4)
    for i, image_CHW in enumerate(seen[0]):
        patches = image_CHW.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).flatten(0, 1)
        original = batch.views["student"][i].unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).flatten(0, 1)
        for token in range(tokens):
            assert torch.equal(patches[token], original[token] * (1 - mask_BN[i, token]))
    found.backward()
    assert pred_BNP.grad is not None
    assert not pred_BNP.grad[mask_BN == 0].any() and not pred_BNP.grad[1].any()


def by_hand_patches(image_CHW: Tensor) -> Tensor:
    luma_HW = 0.299 * image_CHW[0] + 0.587 * image_CHW[1] + 0.114 * image_CHW[2]
    patches = []
    for top in range(0, SIZE, 14):
        for left in range(0, SIZE, 14):
            patch_P = luma_HW[top : top + 14, left : left + 14].flatten()
            patch_P = patch_P - patch_P.mean()
            patches.append(patch_P / (patch_P.square().mean() + 1e-3).sqrt())
    return torch.stack(patches)


@pytest.mark.parametrize("kind", KINDS)
def test_previews_are_maps_of_the_input_s_size(kind: str, encoder: str) -> None:
    config = train_config(kind, encoder)
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
    assert task_names() == ["pretext", "squared", "student", "teacher"]
    config = train_config("teacher", task={"kind": "squared"})
    task = make_task(config)
    assert type(task).__module__ == "trainer.tasks.squared"
    assert isinstance(task.build(), nn.Module)
    assert task.sums(task.build(), share(config, 0, 1))["labelled"] > 0
    assert base.Task in type(task).__mro__
