"""The pretext: its masks, and what it is scored on.

Shape suffixes: B batch, C channel, H W pixels, N tokens, P pixels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.trainer.batches import SIZE, share, task_of, train_config
from trainer.tasks import pretext


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
