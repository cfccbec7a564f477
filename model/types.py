"""What the networks return. Shape suffixes: B batch, H W pixels, N patch tokens (row-major), D width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class WeightsError(ValueError):
    """A weights file does not fit: names the file, what was found and what to do. Ends a command with status 2."""

    exit_status = 2


@dataclass(frozen=True, kw_only=True)
class DepthPrediction:
    """Exactly one of `disparity_BHW` (relative, >= 0, larger is nearer) and `depth_m_BHW` (metres) is set."""

    disparity_BHW: Tensor | None = None
    depth_m_BHW: Tensor | None = None
    features_BND: Tensor | None = None  # final normalised patch tokens, when asked for
