"""What a network is: every published Depth Anything as data, and tiny ones. No torch here.

Sources: Depth-Anything `depth_anything/dpt.py`, Depth-Anything-V2 `depth_anything_v2/dpt.py` and `dinov2.py`,
`metric_depth/depth_anything_v2/dpt.py`. V1's and V2's files have the same keys; only taps and output resize differ.
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, get_args

from model.preprocess import PATCH
from model.types import WeightsError

Four = tuple[int, int, int, int]
PositionMode = Literal["official", "exact"]
Fusion = Literal["interpolate", "even"]

# Our choice for the initial last bias of relative heads. With PyTorch's default, 5 of 16 seeds of v2-vits (and 11 of
# 20 of tiny) begin with a map that is negative everywhere: the final ReLU makes it zero, without a gradient, for good.
ALIVE = 1.0


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One network; the defaults are the official architecture."""

    name: str
    width: int  # of a token
    depth: int  # transformer blocks
    heads: int
    taps: Four  # 0-based blocks whose tokens feed the decoder
    features: int  # channels of the decoder's fusion path
    out_channels: Four  # channels of the reassembled taps, shallow to deep
    ffn: Literal["mlp", "swiglu"] = "mlp"
    grid: int = 37  # side of the stored position embedding, in patches

    head: Literal["relative", "metric"] = "relative"
    max_depth_m: float | None = None  # metric only: the sigmoid's scale, metres
    position_mode: PositionMode = "official"  # how position embeddings are resized: model/positions.py
    readout: Literal["ignore", "project"] = "ignore"  # the class token: dropped, or joined to every patch (DPT eq. 3)
    fusion: Fusion = "interpolate"  # even: every rise is x2, for grids of even sides only
    output_align_corners: bool = True  # infer_image's resize back to the photograph: False in V1, True in V2
    head_channels: int = 32  # of the head's last 3x3 convolution
    head_stride: int = 1  # the head's last convolutions run at 1/stride of the pixels, then bilinear; 1, 2, 7 or 14
    head_bias: float | None = None  # initial bias of the last convolution; None: PyTorch's random default
    fused_attention: bool = True  # scaled_dot_product_attention's kernels; False: plain matrix products and softmax

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.width % self.heads:
            raise ValueError(f"preset {self.name}: width {self.width} is not a multiple of heads {self.heads}")
        if list(self.taps) != sorted(set(self.taps)) or len(self.taps) != 4 or not 0 <= self.taps[-1] < self.depth:
            raise ValueError(f"preset {self.name}: taps {self.taps} must be 4 rising block numbers below {self.depth}")
        if self.head not in ("relative", "metric") or (self.head == "metric") != (self.max_depth_m is not None):
            raise ValueError(f"preset {self.name}: head {self.head!r} does not go with max_depth_m {self.max_depth_m}")
        if self.head_stride not in (1, 2, 7, 14):
            raise ValueError(f"preset {self.name}: head_stride {self.head_stride} must divide the patch size 14")
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"preset {self.name}: {field} is {getattr(self, field)!r}; allowed: {', '.join(allowed)}"
                )

    def _check_numbers(self) -> None:
        # config.json is written by anyone: before a comparison or a product fails in words of Python's.
        if not isinstance(self.name, str) or not self.name.isprintable():
            raise ValueError(f"preset is {self.name!r}; expected a name")
        single = ("width", "depth", "heads", "features", "grid", "head_channels", "head_stride")
        numbers = [(f, getattr(self, f), 1) for f in single]
        for field, least in (("taps", 0), ("out_channels", 1)):
            four = getattr(self, field)
            if not isinstance(four, tuple) or len(four) != 4:
                raise ValueError(f"preset {self.name}: {field} is {four!r}; expected four whole numbers")
            numbers += [(field, number, least) for number in four]
        for field, number, least in numbers:
            if type(number) is not int or not least <= number <= 1 << 16:
                raise ValueError(f"preset {self.name}: {field} is {number!r}; expected a whole number from {least}")
        depth = self.max_depth_m
        if depth is not None and (type(depth) not in (int, float) or not 0 < depth < float("inf")):
            raise ValueError(f"preset {self.name}: max_depth_m is {depth!r}; expected metres above 0")

    def config(self) -> dict[str, Any]:
        """The fields as JSON values, the name under `preset`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"preset": values.pop("name"), **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preset:
        """Inverse of `config`. Raises ValueError naming unknown, missing or contradictory fields.

        Fields with a default may be missing: they came after the file was written, and the default is what it meant.
        """
        values: dict[str, Any] = {
            "name" if k == "preset" else k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
        }
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        wrong = sorted((needed - set(values)) | (set(values) - {f.name for f in fields(cls)}))
        if wrong:
            raise ValueError(f"unknown or missing fields: {', '.join(wrong)}")
        return cls(**values)

    @property
    def multiple(self) -> int:
        """What the sides of an input must be multiples of, in pixels."""
        return PATCH if self.fusion == "interpolate" else 2 * PATCH

    def same_network(self, other: Preset) -> bool:
        """Whether the same weights compute the same map, but for how position embeddings are resized."""
        aside = ("name", "position_mode", "head_bias", "output_align_corners", "fused_attention")
        return replace(self, **{field: getattr(other, field) for field in aside}) == other


_CHOICES: dict[str, tuple[str, ...]] = {
    "ffn": ("mlp", "swiglu"),
    "position_mode": get_args(PositionMode),
    "readout": ("ignore", "project"),
    "fusion": get_args(Fusion),
}


_SHAPES: dict[str, dict[str, Any]] = {
    "vits": dict(width=384, depth=12, heads=6, features=64, out_channels=(48, 96, 192, 384)),
    "vitb": dict(width=768, depth=12, heads=12, features=128, out_channels=(96, 192, 384, 768)),
    "vitl": dict(width=1024, depth=24, heads=16, features=256, out_channels=(256, 512, 1024, 1024)),
    "vitg": dict(width=1536, depth=40, heads=24, features=384, out_channels=(1536,) * 4, ffn="swiglu"),
}
# V1 tapped the last four blocks, unintentionally as its authors say; V2 spreads them. V1 has no giant.
_TAPS: dict[str, dict[str, Four]] = {
    "v1": {"vits": (8, 9, 10, 11), "vitb": (8, 9, 10, 11), "vitl": (20, 21, 22, 23)},
    "v2": {"vits": (2, 5, 8, 11), "vitb": (2, 5, 8, 11), "vitl": (4, 11, 17, 23), "vitg": (9, 19, 29, 39)},
}

_PUBLISHED = {
    f"{version}-{size}": Preset(
        name=f"{version}-{size}",
        taps=taps,
        output_align_corners=version == "v2",
        head_bias=ALIVE,
        **_SHAPES[size],
    )
    for version, sizes in _TAPS.items()
    for size, taps in sizes.items()
}

# Our choice, for tests and the quickstart on a CPU: trained at 112 x 112, so 8 x 8 patches; the head's last
# convolutions run on 56 x 56. Attention over 65 tokens is not fused: PyTorch's CPU kernel is slow backwards in bfloat16
# (forward and backward of the whole network: 5.9 ms an image with it, 4.6 without).
_TINY = Preset(
    name="tiny", width=96, depth=4, heads=3, grid=8, taps=(0, 1, 2, 3), features=32, out_channels=(24, 32, 48, 64),
    head_channels=16, head_stride=2, head_bias=ALIVE, fused_attention=False,
)  # fmt: skip
# Five times as many parameters: what a larger student is to tiny.
_TINY_WIDE = replace(
    _TINY, name="tiny-wide", width=192, depth=8, heads=6, taps=(1, 3, 5, 7), features=48, out_channels=(32, 48, 64, 96),
    head_channels=24,
)  # fmt: skip
# The published architecture in small, with the giant's SwiGLU: what other tools' formats can hold, tiny cannot.
_TINY_SWIGLU = Preset(
    name="tiny-swiglu", width=64, depth=4, heads=2, grid=8, taps=(0, 1, 2, 3), features=16,
    out_channels=(16, 16, 24, 32), ffn="swiglu", head_bias=ALIVE,
)  # fmt: skip


def _with_metric(presets: dict[str, Preset]) -> dict[str, Preset]:
    # V1's metric model is ZoeDepth, another network; so metric variants exist for V2 and tiny.
    metric = {
        f"{name}-metric-{place}": replace(
            preset, name=f"{name}-metric-{place}", head="metric", max_depth_m=metres, head_bias=None
        )
        for name, preset in presets.items()
        if not name.startswith("v1-")
        for place, metres in (("indoor", 20.0), ("outdoor", 80.0))
    }
    return {**presets, **metric}


PRESETS: dict[str, Preset] = _with_metric(
    {**_PUBLISHED, **{preset.name: preset for preset in (_TINY, _TINY_WIDE, _TINY_SWIGLU)}}
)


def get_preset(preset: str | Preset) -> Preset:
    """The preset of this name (a Preset passes through). Raises WeightsError with the nearest names."""
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise WeightsError(f"preset is {preset!r}; expected a name or a Preset")
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=3, cutoff=0.4)
        raise WeightsError(
            f"no preset {preset!r}; {'nearest: ' if near else 'there are: '}{', '.join(near or PRESETS)}"
        )
    return PRESETS[preset]
