"""What the networks return. Shape suffixes: B batch, H W pixels, N patch tokens (row-major), D width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


# The official files hold these five tensors, which no forward pass reads and no gradient reaches.
UNUSED = frozenset(
    ["pretrained.mask_token"]
    + [f"depth_head.scratch.refinenet4.resConfUnit1.conv{c}.{kind}" for c in (1, 2) for kind in ("weight", "bias")]
)


class WeightsError(ValueError):
    """A weights file does not fit: names the file, what was found and what to do. Ends a command with status 2."""

    exit_status = 2


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What came of a file: official names of what is not simply its tensors under their names."""

    path: str
    container: str  # how the tensors were stored
    layout: str  # whose names
    preset: str
    matched: int  # tensors taken from the file
    filled: tuple[str, ...] = ()  # absent, but nothing reads them: zeros
    missing: tuple[str, ...] = ()  # absent and allowed to be: kept their initial values
    unexpected: tuple[str, ...] = ()  # in the file and allowed to be left out


class EncoderOutput(NamedTuple):
    """Tokens through the encoder's final LayerNorm; the lists run from shallow to deep."""

    taps: list[Tensor]  # patch tokens of the tapped blocks, each [B, N, D]
    classes: list[Tensor]  # class tokens of the tapped blocks, each [B, D]
    last_BND: Tensor  # patch tokens of the last block


class DepthPrediction(NamedTuple):
    """Exactly one of `disparity_BHW` (relative, >= 0, larger is nearer) and `depth_m_BHW` (metres) is set.

    A tuple, because DeepSpeed's ZeRO-3 finds tensors in no other kind of record.
    """

    disparity_BHW: Tensor | None = None
    depth_m_BHW: Tensor | None = None
    features_BND: Tensor | None = None  # final normalised patch tokens, when asked for
