"""The file formats that networks come in, told apart by the names of their tensors, never by a file's name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from model.layouts.base import Layout, Tensors
from model.layouts.huggingface import HUGGINGFACE, HUGGINGFACE_5, HUGGINGFACE_DINOV2, HUGGINGFACE_DINOV2_5
from model.layouts.muggled import MUGGLED_V1, MUGGLED_V2
from model.layouts.official import DINOV2, DISTILL, OFFICIAL, TIMM, unpack_swiglu

__all__ = ["LAYOUTS", "Layout", "Tensors", "recognise", "to_official"]

# Bare encoders last: their names are parts of the others'.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        OFFICIAL, DISTILL, HUGGINGFACE, HUGGINGFACE_5, MUGGLED_V1, MUGGLED_V2, HUGGINGFACE_DINOV2,
        HUGGINGFACE_DINOV2_5, DINOV2, TIMM,
    )
}  # fmt: skip

_CHUNK = re.compile(r"\bblocks\.\d+\.(\d+\.)")  # DINOv2 with block_chunks: the second number counts over all chunks


def recognise(names: Mapping[str, Tensor]) -> Layout | None:
    """The layout of these names, or None."""
    return next((layout for layout in LAYOUTS.values() if layout.recognise(names.keys())), None)


def to_official(tensors: Mapping[str, Tensor], layout: Layout) -> Tensors:
    """Official names; chunked blocks in a row; a SwiGLU under DINOv2's names."""
    if not layout.name.startswith("muggled"):
        in_a_row = {_CHUNK.sub(r"blocks.\1", name): tensor for name, tensor in tensors.items()}
        tensors = in_a_row if len(in_a_row) == len(tensors) else tensors
    return unpack_swiglu(layout.to_official(tensors))
