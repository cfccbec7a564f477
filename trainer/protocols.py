"""Evaluation protocols as data: how a prediction is brought to the truth, and in which space the two are compared.

Numbers of two protocols cannot be compared with each other: one prediction has one error as disparity and another as
depth, and far pixels weigh more in the second. What trainer/evaluate_measure.py does with these fields is the
definition; `source` says where it was read, `choice` what the source does not say and is ours. Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Space = Literal["depth", "disparity"]
Floor = Literal["cap", "truth", "cap or truth"]  # what the reciprocal of an aligned disparity may reach at most


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One protocol. Disparity is 1 / depth, in 1 / metres."""

    name: str
    summary: str
    source: str
    choice: str = ""
    align: Space | None = None  # where scale and shift are fitted, over each image's valid pixels; None: not at all
    compare: Space = "depth"
    robust: bool = False  # least absolute deviations in place of least squares
    floor: Floor | float | None = None  # of an aligned disparity: 1 / this depth, or a number in 1 / metres
    fit_positive: bool = False  # the fit leaves out pixels whose prediction is not above 0
    clip: bool = False  # depths are clipped to the benchmark's limits, and raised to 1e-6 m
    flip: bool = False  # the published numbers average the predictions of the image and its mirror image
    needs_metres: bool = False  # the prediction must be a depth
    needs_cap: bool = False
    bad_pixel: bool = False  # report the fraction that is off by a factor of 1.25 or more


_PROTOCOLS = (
    Protocol(
        name="disparity",
        summary="least squares in disparity, compared as disparity: the tables of Depth Anything V1 and V2",
        source="Depth Anything V1 (arXiv 2401.10891), appendix; its author in LiheYoung/Depth-Anything issue 174",
        choice="caps, crops, masks and the average (per image) are ours: neither paper nor repository has them",
        align="disparity",
        compare="disparity",
    ),
    Protocol(
        name="depth",
        summary="least squares in disparity, compared in metres up to the cap, or to the deepest truth without one",
        source="the common core of MiDaS (arXiv 1907.01341) and MoGe (moge/test/metrics.py)",
        choice="`midas` where there is a cap, `moge` where there is none",
        align="disparity",
        floor="cap or truth",
    ),
    Protocol(
        name="depth-robust",
        summary="as depth, scale and shift by least absolute deviations: for truths with gross errors",
        source="Schlossmacher 1973 (J. Am. Stat. Assoc. 68, 857-859) for the fit",
        choice="all of it; nobody publishes numbers under it",
        align="disparity",
        floor="cap or truth",
        robust=True,
    ),
    Protocol(
        name="moge",
        summary="least squares in disparity, raised to 1 / the deepest truth, compared in metres",
        source="microsoft/MoGe, moge/test/metrics.py (disparity_affine_invariant)",
        align="disparity",
        floor="truth",
    ),
    Protocol(
        name="midas",
        summary="least squares in disparity, raised to 1 / cap, compared in metres; bad_pixel is 1 - delta1",
        source="MiDaS (arXiv 1907.01341); gist ranftlr/a1c7a24ebb24ce0e2f2ace5bce917022 (BadPixelMetric)",
        choice="metrics other than bad_pixel, which the code has alone, in per cent",
        align="disparity",
        floor="cap",
        needs_cap=True,
        bad_pixel=True,
    ),
    Protocol(
        name="marigold",
        summary="least squares in depth, clipped to the benchmark's limits; for networks that predict depth",
        source="prs-eth/Marigold, script/depth/eval.py (least_square)",
        align="depth",
        clip=True,
        needs_metres=True,
    ),
    Protocol(
        name="marigold-disparity",
        summary="least squares in disparity, raised to 0.001 / m, inverted, clipped to the benchmark's limits",
        source="prs-eth/Marigold, script/depth/eval.py (least_square_disparity)",
        align="disparity",
        floor=1e-3,
        fit_positive=True,
        clip=True,
    ),
    Protocol(
        name="metric",
        summary="metres as predicted, neither aligned nor clipped",
        source="Eigen et al. 2014 (arXiv 1406.2283), section 4",
        choice="that nothing is clipped: what is beyond the cap is an error as large as it is",
        needs_metres=True,
    ),
    Protocol(
        name="zoedepth",
        summary="metres as predicted, clipped to the benchmark's limits; mean of image and mirror image (flip: true)",
        source="ZoeDepth as in LiheYoung/Depth-Anything, metric_depth/evaluate.py and zoedepth/utils/misc.py",
        clip=True,
        flip=True,
        needs_metres=True,
        needs_cap=True,
    ),
    Protocol(
        name="pairs",
        summary="which of two points is nearer: the fraction of pairs that are in the right order",
        source="Depth Anything V2 (arXiv 2406.09414), section 6; DepthAnything/Depth-Anything-V2, DA-2K.md",
        choice="two points of one value are an error; the prediction is read at the pixel, after resizing to the image",
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}
RELATIVE_DEFAULT = ("depth", "disparity")
METRIC_DEFAULT = ("metric",)


def get_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError that names the nearest one."""
    if name not in PROTOCOLS:
        raise ValueError(f"no such protocol; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none: the nearest one, or all."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
