"""Depth Anything V1 and V2 (arXiv 2401.10891, 2406.09414), relative and metric: one network class, many presets.

Sources: Depth-Anything `depth_anything/dpt.py`, `run.py`; Depth-Anything-V2 `depth_anything_v2/dpt.py`.
Shape suffixes: B batch, C channel, H W pixels, N patch tokens (row-major), D width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import save, weights
from model.dpt import DPT
from model.preprocess import IMAGENET_MEAN, IMAGENET_STD, PATCH, lower_bound_size
from model.presets import Fusion, PositionMode, Preset, get_preset
from model.types import UNUSED, DepthPrediction, LoadReport, WeightsError
from model.vit import Encoder

NamedParameters = list[tuple[str, nn.Parameter]]


class DepthAnything(nn.Module):
    """Encoder `pretrained` and decoder `depth_head`; make one with `from_preset` or `from_pretrained`."""

    loaded: LoadReport | None = None  # of from_pretrained

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        self.pretrained = Encoder(preset)
        self.depth_head = DPT(preset)

    @classmethod
    def _empty(cls, preset: Preset) -> Self:
        # Built without memory, then NaN everywhere: a weight that nothing initialises shows.
        with torch.device("meta"):
            net = cls(preset)
        weights.materialise(net)
        return net

    @classmethod
    def from_preset(cls, preset: str | Preset, encoder_weights: str | os.PathLike[str] | None = None) -> Self:
        """A network to train: random decoder, and the encoder random or from a file.

        Under `torch.device("meta")` it has shapes and nothing else, and no file is read.

        Args:
            preset: a name out of PRESETS, or a Preset.
            encoder_weights: DINOv2's file (hub or timm names), or a whole Depth Anything's, whose decoder is ignored.

        Raises:
            WeightsError: unknown preset, or a file that does not fit.
        """
        if weights.shapes_only():
            return cls(get_preset(preset))
        net = cls._empty(get_preset(preset))
        net.pretrained.initialise()
        net.depth_head.initialise()
        if encoder_weights is not None:
            weights.load_encoder(net.pretrained, encoder_weights)
        weights.require_finite(net, str(encoder_weights or "initialisation"))
        return net

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        preset: str | Preset | None = None,
        *,
        position_mode: PositionMode | None = None,
        fusion: Fusion | None = None,
        ema: bool | None = None,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
    ) -> Self:
        """A trained network, on the CPU, float32; `loaded` says what came of the file.

        Args:
            path: the authors' .pth, a safetensors file, a folder of ours or of Hugging Face's, a training checkpoint
                (step_*), or a file with Distill-Any-Depth's or muggled_dpt's names; told apart by what is in it.
            preset: needed where the file cannot tell (V1's and V2's files have the same keys; so have metric ones).
            position_mode: how position embeddings are resized; default: as recorded, else as the file's layout does
                ("exact" for Hugging Face's and muggled_dpt's, "official" for the others).
            fusion: how the decoder's maps rise; default: as recorded, else "interpolate".
            ema: of a training checkpoint, True: the averaged weights; False: the last ones; None: the averaged ones,
                where there are any.
            allow_missing, allow_unexpected: shell patterns of official names; what is missing keeps its initial values.

        Raises:
            WeightsError: a missing, broken or ambiguous file, or one of another network; nothing is half-loaded.
        """
        source = weights.open_weights(path, ema)
        chosen = weights.choose_preset(source, preset, position_mode)
        net = cls._empty(chosen if fusion is None else replace(chosen, fusion=fusion))
        if allow_missing:
            net.pretrained.initialise()
            net.depth_head.initialise()
        net.loaded = weights.load_network(
            net, source, allow_missing=allow_missing, allow_unexpected=allow_unexpected
        )
        weights.require_finite(net, source.path)
        if not net.loaded.missing:
            weights.check_fingerprint(source, weights.official_state(net))
        return net

    def forward(self, image_BCHW: Tensor, features: bool = False) -> DepthPrediction:
        """Depth of ImageNet-normalised float images [B, 3, H, W] whose sides are multiples of 14.

        Returns:
            disparity_BHW or, with a metric head, depth_m_BHW: float32 at the input's size; and, when `features`, the
            encoder's final normalised patch tokens features_BND (N = H / 14 * W / 14) of the same pass.

        Raises:
            ValueError: another shape or dtype.
        """
        tokens = self.pretrained(image_BCHW)
        map_BHW = self.depth_head(tokens, image_BCHW.shape[2] // PATCH, image_BCHW.shape[3] // PATCH)
        features_BND = tokens.last_BND if features else None
        if self.preset.head == "metric":
            return DepthPrediction(depth_m_BHW=map_BHW, features_BND=features_BND)
        return DepthPrediction(disparity_BHW=map_BHW, features_BND=features_BND)

    @torch.inference_mode()
    def infer_image(self, image_HWC: np.ndarray, input_size: int = 518) -> np.ndarray:
        """Depth of one photograph, with the originals' pre- and post-processing.

        Args:
            image_HWC: uint8 RGB.
            input_size: lower bound of the network's input sides in pixels (see `lower_bound_size`).

        Returns:
            float32 [H, W] at the photograph's size: disparity (arbitrary unit, larger is nearer) or metres.

        Raises:
            ValueError: not a uint8 array [H, W, 3].
        """
        height, width = check_photograph(image_HWC)
        image_1CHW = normalise_photograph(image_HWC, lower_bound_size(height, width, input_size, self.preset.multiple))
        reference = self.pretrained.pos_embed
        prediction = self(image_1CHW.to(reference.device, reference.dtype))
        map_BHW = prediction.disparity_BHW if prediction.depth_m_BHW is None else prediction.depth_m_BHW
        map_B1HW = F.interpolate(
            map_BHW[:, None], (height, width), mode="bilinear", align_corners=self.preset.output_align_corners
        )
        return map_B1HW[0, 0].float().cpu().numpy()

    def encoder_parameters(self) -> NamedParameters:
        """(name, parameter) of the encoder, without the never-used `mask_token`."""
        return [(n, p) for n, p in self.named_parameters() if n.startswith("pretrained.") and n not in UNUSED]

    def decoder_parameters(self) -> NamedParameters:
        """(name, parameter) of the decoder, without the four never-used tensors of refinenet4."""
        return [(n, p) for n, p in self.named_parameters() if n.startswith("depth_head.") and n not in UNUSED]

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute each block of the encoder in the backward pass instead of keeping its activations."""
        self.pretrained.activation_checkpointing = on

    def save_pretrained(self, folder: str | os.PathLike[str], layout: str = "official") -> None:
        """Write a folder in float32 that `from_pretrained` reads back, bit for bit.

        Args:
            folder: made if absent.
            layout: "official": model.safetensors (the authors' names) and config.json (preset, taps, head, ...);
                "huggingface": what transformers' `DepthAnythingForDepthEstimation.from_pretrained` loads.

        Raises:
            WeightsError: another layout, a network that transformers has not, or one that holds NaN or infinities.
        """
        if layout == "official":
            save.save_network(self, folder)
        elif layout == "huggingface":
            save.save_huggingface(self, folder)
        else:
            raise WeightsError(f"layout is {layout!r}; a folder is official or huggingface")

    def fingerprint(self) -> str:
        """sha256 (hex) of what the network computes: see `weights.fingerprint`."""
        return weights.fingerprint(weights.official_state(self), self.preset)


def check_photograph(image_HWC: np.ndarray) -> tuple[int, int]:
    """(H, W) of a uint8 [H, W, 3] array. Raises ValueError, naming what was found, for anything else."""
    if not isinstance(image_HWC, np.ndarray) or image_HWC.dtype != np.uint8:
        raise ValueError(f"expected a uint8 RGB array, found {getattr(image_HWC, 'dtype', type(image_HWC).__name__)}")
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not image_HWC.size:
        raise ValueError(f"expected an RGB array [H, W, 3], found shape {list(image_HWC.shape)}")
    return image_HWC.shape[0], image_HWC.shape[1]


def normalise_photograph(image_HWC: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 RGB [H, W, 3] -> ImageNet-normalised float32 [1, 3, *size].

    Cubic (a = -0.75, as OpenCV) without antialiasing, which may leave 0..1; in float64, as the originals do.
    """
    image_1CHW = torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)[None].double() / 255.0
    image_1CHW = F.interpolate(image_1CHW, size, mode="bicubic", align_corners=False, antialias=False)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((image_1CHW - mean) / std).float()
