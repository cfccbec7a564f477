"""The student: its terms against the plain formulas, its frozen encoder, the projection, refused options."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.spec import RoleNeeds
from dataio.types import Batch
from model import DepthAnything, get_preset
from tests.trainer.batches import FROZEN_PRESET, SIZE, encoder_file, share, task_of, train_config, variant_config
from tests.trainer.by_hand import Forward, checkpoint_of, expected_losses, normalised, some_disparity, without_weight
from trainer.checkpoint import fingerprint, load_checkpoint, load_weights
from trainer.config import ConfigError
from trainer.config_train import TrainConfig
from trainer.losses import feature_alignment_loss, gradient_matching_loss
from trainer.tasks.base import make_task


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoder_file(tmp_path_factory.mktemp("encoder"))


def student_config(encoder: str | None, **options: Any) -> TrainConfig:
    return train_config("student", encoder, task={"kind": "student", **options})


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
    assert set(task.needs) == {"labelled", "unlabelled"} - ({dropped} if dropped == "labelled" else set())
    assert task.needs["unlabelled"].target == ("none" if dropped == "unlabelled" else "disparity")
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
        ({"trim": 1.0}, "task.trim: found 1.0; input should be less than 1"),
        (
            {"trim": 0.1, "loss": "lsq", "feature_weight": 0},
            "task.trim: found 0.1 with task.loss 'lsq'; use 0, or loss",
        ),
        ({"frozen_preset": "v3", "frozen_encoder": "/f"}, "task.frozen_preset: no preset 'v3'"),
        ({"frozen_view": "left"}, "task.frozen_view: found 'left'; input should be 'student' or 'clean'"),
    ],
)
def test_wrong_options_of_the_student(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(student_config(None, **options))
    assert words in str(caught.value)


def test_the_weights_of_another_preset_must_be_named(encoder: str) -> None:
    with pytest.raises(
        ConfigError, match=r"task.frozen_encoder: missing; name the weights of task.frozen_preset 'tiny-s"
    ):
        make_task(student_config(encoder, frozen_preset=FROZEN_PRESET))


def trimmed_by_hand(pred_K: Tensor, target_K: Tensor, trim: float) -> float:
    """Mean residual of a region without its largest floor(trim K), in float64."""
    kept = len(pred_K) - math.floor(trim * len(pred_K))
    residual_K = (normalised(pred_K.double()) - normalised(target_K.double())).abs()
    return float(residual_K.sort().values[:kept].mean())


def test_only_pseudo_labels_are_trimmed_and_every_region_by_itself(encoder: str) -> None:
    config = student_config(encoder, feature_weight=0, trim=0.1, gradient_weight=2.0)
    batch = without_weight(share(config, 0, 1), 2)
    pred_BHW, target_BHW = some_disparity(batch), batch.targets["disparity"].value_BHW
    sums = task_of(config).sums(Forward(pred_BHW), batch)
    expected = 0.0
    for row in range(4, 12):
        region_HW, total = batch.region_BHW[row], 0.0
        for label in (1, 2):
            inside_HW = region_HW == label
            if inside_HW.any():
                maps = (pred_BHW[row][inside_HW].detach(), target_BHW[row][inside_HW])
                total += float(inside_HW.sum()) * trimmed_by_hand(*maps, trim=0.1)
        expected += total / float((region_HW > 0).sum())
    assert sums["unlabelled"].item() == pytest.approx(expected, rel=1e-5)
    whole = expected_losses(batch, pred_BHW)
    assert sums["labelled"].item() == pytest.approx(whole[0] + whole[3], rel=1e-5)
    assert sums["unlabelled"].item() < sum(whole[4:]) * 0.95
    gradient_B = gradient_matching_loss(pred_BHW, target_BHW, batch.region_BHW, 2)
    assert sums["labelled_gradient"].item() == pytest.approx(gradient_B[[0, 3]].sum().item(), rel=1e-5)
    assert sums["unlabelled_gradient"].item() == pytest.approx(gradient_B[4:].sum().item(), rel=1e-5)


def test_v2_learns_from_pseudo_labels_alone(encoder: str) -> None:
    config = train_config("student-v2", encoder)
    task = task_of(config)
    assert dict(task.needs) == {"unlabelled": RoleNeeds(sidecar=True)}
    assert task.term_weights == {"unlabelled": 1.0, "unlabelled_gradient": 2.0, "feature": 1.0}
    values = {"datasets": ["/d"], "batch": 8, "lanes": 4}
    data = {"input_size": SIZE, "roles": {"labelled": values, "unlabelled": {**values, "labels": ["/l"]}}}
    with pytest.raises(ConfigError, match=r"needs \['unlabelled'\], found \['labelled', 'unlabelled'\]"):
        make_task(train_config("student-v2", encoder, data=data))


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of encoders for `variant_config`."""
    folder = tmp_path_factory.mktemp("projected")
    for preset in ("tiny", FROZEN_PRESET):
        encoder_file(folder, preset)
    return folder


def test_features_of_another_width_go_through_a_trained_projection(projected: Path) -> None:
    config = variant_config("student-projected", projected)
    task: Any = task_of(config)
    module, batch = task.build(), share(config, 0, 1)
    own = get_preset("tiny").width
    assert module.projection.weight.shape == (task.frozen.preset.width, own) and task.frozen.preset.width != own
    features_BND = module(batch.views["student"], features=True).features_BND
    plain_BND = module.plain()(batch.views["student"], features=True).features_BND
    torch.testing.assert_close(features_BND, F.linear(plain_BND, module.projection.weight, module.projection.bias))
    assert module(batch.views["student"]).features_BND is None
    loss_B = feature_alignment_loss(features_BND[4:], features_of(task, batch, "clean")[4:], 0.85)
    assert task.sums(module, batch)["feature"].item() == pytest.approx(loss_B.sum().item(), rel=1e-5)
    task.sums(module, batch)["feature"].backward()
    assert module.projection.weight.grad.any() and module.pretrained.patch_embed.proj.weight.grad.any()
    decoder = dict(task.parameter_groups(module)["decoder"])
    assert {"projection.weight", "projection.bias"} <= decoder.keys()
    assert not any("frozen" in name for name in module.state_dict())


def test_the_projection_is_saved_and_resumed_but_no_part_of_the_network(projected: Path, tmp_path: Path) -> None:
    task = task_of(variant_config("student-projected", projected))
    module: Any = task.build()
    saved = checkpoint_of(tmp_path, module, task.network_record(module))
    again: Any = task.build()
    assert not torch.equal(again.projection.weight, module.projection.weight)
    load_weights(again, load_checkpoint(saved))
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in again.state_dict().items())
    task.export(module, str(tmp_path / "weights"))
    for path in (saved, tmp_path / "weights"):
        network = DepthAnything.from_pretrained(path)
        assert type(network) is DepthAnything and network.fingerprint() == module.plain().fingerprint()
        assert network.state_dict().keys() == module.state_dict().keys() - {"projection.weight", "projection.bias"}


def test_an_encoder_of_the_same_width_needs_no_projection(projected: Path) -> None:
    options = {"frozen_preset": "tiny", "frozen_encoder": f"{projected}/tiny.safetensors"}
    assert type(task_of(student_config(None, **options)).build()) is DepthAnything
    options = {"frozen_preset": FROZEN_PRESET, "frozen_encoder": "/nowhere", "feature_weight": 0}
    assert type(task_of(student_config(None, **options)).build()) is DepthAnything


@pytest.mark.parametrize("frozen_preset", [None, FROZEN_PRESET])
@pytest.mark.parametrize("mode", ["official", "exact"])
def test_the_frozen_encoder_s_positions_are_resized_as_the_student_s(
    projected: Path, mode: str, frozen_preset: str | None
) -> None:
    """Tokens of one pixel would otherwise know two places."""
    own = f"{projected}/tiny.safetensors"
    frozen = {"frozen_preset": frozen_preset, "frozen_encoder": f"{projected}/{frozen_preset or 'tiny'}.safetensors"}
    model = {"preset": "tiny", "encoder_weights": own, "position_mode": mode}
    task: Any = task_of(train_config("student", own, task={"kind": "student", **frozen}, model=model))
    assert task.build().preset.position_mode == task.frozen.preset.position_mode == mode
    assert task.frozen_fingerprint().endswith(f"-{mode}")


def test_the_frozen_encoder_follows_the_mode_of_the_weights_that_a_student_starts_from(
    projected: Path, tmp_path: Path
) -> None:
    DepthAnything.from_preset(replace(get_preset("tiny"), position_mode="exact")).save_pretrained(str(tmp_path))
    options = {"kind": "student", "frozen_preset": FROZEN_PRESET}
    options["frozen_encoder"] = f"{projected}/{FROZEN_PRESET}.safetensors"
    config = train_config("student", None, task=options, model={"preset": "tiny", "weights": str(tmp_path)})
    task: Any = make_task(config)
    task.build()
    task.prepare(torch.device("cpu"))
    assert task.frozen.preset.position_mode == "exact"
