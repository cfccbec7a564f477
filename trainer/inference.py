"""One way to run a trained network on the images of a dataset: labelling and evaluation share it.

`fathom predict` shows single photographs through the network's own `infer_image`, as a notebook does.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataio.frames import Sizer
from model import DepthAnything
from model.preprocess import PATCH, lower_bound_size
from model.presets import PositionMode

OTHER_SCALE = 0.75  # of the sides, for the agreement over scales; our choice: 0.56 of a forward pass's pixels
_FLAT = 1e-6  # mean absolute deviation over mean: what float32 leaves of a map that has one value
USUAL_ASPECTS = ((1, 1), (4, 3), (3, 2), (16, 9))  # of photographs, either way up


def sizer(input_size: int, multiple: int = PATCH) -> Sizer:
    """(h, w) -> the network's input size by the originals' lower-bound rule (shorter side at least `input_size`)."""
    return functools.partial(_lower_bound, input_size=input_size, multiple=multiple)


def _lower_bound(height: int, width: int, *, input_size: int, multiple: int) -> tuple[int, int]:
    return lower_bound_size(height, width, input_size, multiple)


def usual_shapes(input_size: int, multiple: int = PATCH) -> frozenset[tuple[int, int]]:
    """Input sizes of photographs with the usual aspect ratios: a function of `input_size` alone."""
    size = sizer(input_size, multiple)
    large = 1000 * input_size  # far beyond what rounding of the photograph's own pixels would change
    shapes = {size(large * a // b, large) for a, b in USUAL_ASPECTS}
    return frozenset(shapes | {(width, height) for height, width in shapes})


def agreement(first_BHW: Tensor, other_BHW: Tensor) -> Tensor:
    """How well two predictions of the same images agree, per image: 1 when they do, float32 [B].

    1 / (1 + e), where e is the mean absolute difference of the maps after each has been brought to mean 0 and mean
    absolute deviation 1: what an affine-invariant network leaves open (scale and shift) does not count, and e = 1, a
    half, is a difference as large as the maps' own variation. A map that is flat, but for rounding, says nothing, and
    agrees with none: 0. Our choice; the papers of the family state no quality.
    """
    (first_BHW, first_B), (other_BHW, other_B) = _standard(first_BHW), _standard(other_BHW)
    agreement_B = 1 / (1 + (first_BHW - other_BHW).abs().mean((1, 2)))
    return torch.where(first_B | other_B, 0.0, agreement_B)


def _standard(value_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """(the maps with mean 0 and mean absolute deviation 1, which of them are flat: bool [B])."""
    mean_B11 = value_BHW.mean((1, 2), keepdim=True)
    centred_BHW = value_BHW - mean_B11
    deviation_B11 = centred_BHW.abs().mean((1, 2), keepdim=True)
    flat_B11 = deviation_B11 <= _FLAT * mean_B11.abs()
    return centred_BHW / deviation_B11.clamp(min=1e-30), flat_B11[:, 0, 0]


class Predictor:
    """A frozen network on a device; with `flip`, the mean of an image's and its mirror image's prediction.

    `quality`: which predictions of an image are compared, "off", "flip" or "flip+scale" (see `agreement`); what `flip`
    has predicted anyway is used. `compiled`: input sizes (H, W) that go through torch.compile; others never do.
    """

    def __init__(
        self,
        weights: str,
        *,
        preset: str | None = None,
        position_mode: PositionMode | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        flip: bool = False,
        quality: str = "off",
        compiled: Collection[tuple[int, int]] = (),
    ) -> None:
        self.device = torch.device(device)
        network = DepthAnything.from_pretrained(weights, preset=preset, position_mode=position_mode)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.precision, self.flip, self.quality = precision, flip, quality
        self.metric = self.network.preset.head == "metric"
        self.passes = 0  # forward passes so far
        self._shapes = frozenset(compiled)
        self._compiled: Callable[[Tensor], object] | None = None
        if self._shapes:
            # Each shape for itself: with symbolic sizes the last bits would depend on which shape came first.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(self._shapes))
            self._compiled = torch.compile(self.network, dynamic=False)

    @torch.inference_mode()
    def __call__(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """(disparity_BHW, or depth in metres of a metric network, float32; agreement_B or None without `quality`).

        The agreement is the worst of those that `quality` names. Both stay on the device.
        """
        image_BCHW = image_BCHW.to(self.device)
        first_BHW = value_BHW = self._forward(image_BCHW)
        agreement_B = None
        if self.flip or self.quality != "off":
            mirrored_BHW = self._forward(image_BCHW.flip(-1)).flip(-1)
            if self.quality != "off":
                agreement_B = agreement(first_BHW, mirrored_BHW)
            if self.flip:
                value_BHW = (first_BHW + mirrored_BHW) / 2
        if self.quality == "flip+scale":
            assert agreement_B is not None
            agreement_B = torch.minimum(agreement_B, agreement(first_BHW, self._at_other_scale(image_BCHW)))
        return value_BHW, agreement_B

    def _at_other_scale(self, image_BCHW: Tensor) -> Tensor:
        height, width = image_BCHW.shape[2:]
        multiple = self.network.preset.multiple
        small = [max(1, round(OTHER_SCALE * side / multiple)) * multiple for side in (height, width)]
        image_BCHW = F.interpolate(image_BCHW, small, mode="bilinear", align_corners=False, antialias=True)
        value_B1HW = self._forward(image_BCHW)[:, None]
        return F.interpolate(value_B1HW, (height, width), mode="bilinear", align_corners=False)[:, 0]

    def _forward(self, image_BCHW: Tensor) -> Tensor:
        self.passes += 1
        usual = self._compiled is not None and tuple(image_BCHW.shape[2:]) in self._shapes
        network = self._compiled if usual else self.network
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            prediction: Any = network(image_BCHW)  # type: ignore[misc]
        value_BHW = prediction.depth_m_BHW if self.metric else prediction.disparity_BHW
        assert value_BHW is not None
        return value_BHW.float()
