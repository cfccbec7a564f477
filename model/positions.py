"""Position embeddings for another grid than the stored one, in the two ways that published weights are used with.

Sources: Depth-Anything-V2 `depth_anything_v2/dinov2.py`, `interpolate_pos_encoding` (official); Hugging Face
`modeling_dinov2.py`, the same function (exact).
Shape suffixes: g side of the stored grid, h w patches, T tokens with the class token first, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.presets import PositionMode

# DINOv2 resizes by a scale factor that aims at (patches + 0.1), against rounding down: the result differs from a
# resize to the exact size, and the published weights were trained with it.
OFFICIAL_OFFSET = 0.1
CUBIC = -0.75  # PyTorch's (and OpenCV's) bicubic kernel


def position_embedding(pos_1TD: Tensor, h: int, w: int, mode: PositionMode) -> Tensor:
    """Position embedding for a grid of h x w patches.

    Args:
        pos_1TD: the stored one, class token first, its grid square.
        h, w: patches.
        mode: "official": the patch part resized by the scale factors (h + 0.1) / g and (w + 0.1) / g; "exact": to the
            size h x w, as Hugging Face does. Both bicubic without antialiasing, in float32; both give back the
            stored one at its own grid.

    Returns:
        [1, 1 + h * w, D], float32.
    """
    pos_1TD = pos_1TD.float()
    g = round((pos_1TD.shape[1] - 1) ** 0.5)
    pos_ggD = pos_1TD[0, 1:].unflatten(0, (g, g))
    if torch.compiler.is_compiling():
        # h and w may be symbols here: no branch on them, and no scale factor that an exporter would freeze.
        pos_hwD = _resize_by_matrices(pos_ggD, h, w, mode)
    elif (h, w) == (g, g):
        return pos_1TD
    else:
        pos_1Dgg = pos_ggD.permute(2, 0, 1)[None]
        if mode == "official":
            scale = ((h + OFFICIAL_OFFSET) / g, (w + OFFICIAL_OFFSET) / g)
            pos_1Dhw = F.interpolate(pos_1Dgg, scale_factor=scale, mode="bicubic", antialias=False)
        else:
            pos_1Dhw = F.interpolate(pos_1Dgg, size=(h, w), mode="bicubic", antialias=False)
        pos_hwD = pos_1Dhw[0].permute(1, 2, 0)
    return torch.cat([pos_1TD[:, :1], pos_hwD.flatten(0, 1)[None]], dim=1)


def _resize_by_matrices(pos_ggD: Tensor, h: int, w: int, mode: PositionMode) -> Tensor:
    """The same resize as two products with sparse matrices: [g, g, D] -> [h, w, D]; equal up to rounding."""
    g = pos_ggD.shape[0]
    rows, columns = (torch.arange(n, device=pos_ggD.device, dtype=torch.float32) for n in (h, w))
    shape_2 = torch.stack([torch.ones_like(rows).sum(), torch.ones_like(columns).sum()])
    aim_2 = shape_2
    if mode == "official":
        aim_2 = shape_2 + OFFICIAL_OFFSET * (shape_2 != g).any()
    by_rows_hg, by_columns_wg = (_cubic_weights(i, g, n) for i, n in zip((rows, columns), aim_2.unbind(), strict=True))
    return torch.einsum("hg,wk,gkd->hwd", by_rows_hg, by_columns_wg, pos_ggD)


def _cubic_weights(targets_n: Tensor, g: int, aim: Tensor) -> Tensor:
    """Weights [n, g] of a cubic resize from g places to n, by the factor aim / g, the border repeated."""
    source_n = (targets_n + 0.5) * (g / aim) - 0.5
    floor_n = source_n.floor()
    t_n = source_n - floor_n
    places_g = torch.arange(g, device=targets_n.device, dtype=torch.float32)
    weights_ng = torch.zeros_like(targets_n)[:, None] * places_g
    for k in (-1, 0, 1, 2):
        d_n = (t_n - k).abs()
        if k in (0, 1):
            weight_n = ((CUBIC + 2) * d_n - (CUBIC + 3)) * d_n * d_n + 1
        else:
            weight_n = ((d_n - 5) * d_n + 8) * d_n * CUBIC - 4 * CUBIC
        hit_ng = (floor_n + k).clamp(0, g - 1)[:, None] == places_g
        weights_ng = weights_ng + weight_n[:, None] * hit_ng
    return weights_ng
