"""Loss operators of fathom: the affine-invariant loss, its statistics, and the cosine-margin loss.

Exports are lazy (PEP 562): importing this package imports nothing else. Other software probes whatever package happens
to be called `kernels` (Hugging Face's `transformers` reads its version and tries names from it), so importing must be
cheap, a missing name must be an AttributeError, and the version must stay outside anybody's window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.api import affine_invariant_loss as affine_invariant_loss
    from kernels.api import cosine_margin_loss as cosine_margin_loss
    from kernels.api import region_median_mad as region_median_mad

__version__ = "0.0.0"
_EXPORTS = ("affine_invariant_loss", "cosine_margin_loss", "region_median_mad")


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    from kernels import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
