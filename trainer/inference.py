"""One way to run a trained network on the images of a dataset: labelling and evaluation share it.

`fathom predict` shows single photographs through the network's own `infer_image`, as a notebook does.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dataio.frames import Sizer
from model import DepthAnything
from model.preprocess import PATCH, lower_bound_size
from model.presets import PositionMode


def sizer(input_size: int, multiple: int = PATCH) -> Sizer:
    """(h, w) -> the network's input size by the originals' lower-bound rule (shorter side at least `input_size`)."""
    return functools.partial(_lower_bound, input_size=input_size, multiple=multiple)


def _lower_bound(height: int, width: int, *, input_size: int, multiple: int) -> tuple[int, int]:
    return lower_bound_size(height, width, input_size, multiple)


class Predictor:
    """A frozen network on a device; with `flip`, the mean of an image's and its mirror image's prediction."""

    def __init__(
        self,
        weights: str,
        *,
        preset: str | None = None,
        position_mode: PositionMode | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        flip: bool = False,
    ) -> None:
        self.device = torch.device(device)
        network = DepthAnything.from_pretrained(weights, preset=preset, position_mode=position_mode)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.precision, self.flip = precision, flip
        self.metric = self.network.preset.head == "metric"

    @torch.inference_mode()
    def __call__(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """(disparity_BHW, or depth in metres of a metric network, float32; per-image flip agreement or None).

        The agreement is 1 / (1 + e), e the mean absolute difference of the two predictions over their mean absolute
        deviation: 1 when they agree, 1/2 when they differ by as much as the map itself varies.
        """
        first_BHW = self._forward(image_BCHW)
        if not self.flip:
            return first_BHW, None
        mirrored_BHW = self._forward(image_BCHW.flip(-1)).flip(-1)
        mean_BHW = (first_BHW + mirrored_BHW) / 2
        deviation_B = (mean_BHW - mean_BHW.mean((1, 2), keepdim=True)).abs().mean((1, 2))
        error_B = (first_BHW - mirrored_BHW).abs().mean((1, 2))
        return mean_BHW, 1 / (1 + error_B / deviation_B.clamp(min=1e-12))

    def _forward(self, image_BCHW: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            prediction = self.network(image_BCHW.to(self.device))
        value_BHW = prediction.depth_m_BHW if self.metric else prediction.disparity_BHW
        assert value_BHW is not None
        return value_BHW.float()
