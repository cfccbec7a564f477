"""Benchmarks as data: which pixels of which images count, and what the network sees of an image.

Nobody publishes these for the tables of Depth Anything V1 and V2; what is our choice for them is in `choice`. Where two
conventions are in use for one dataset, each is a benchmark of its own: `kitti` and `kitti-marigold`. Imports no torch.
Shape suffixes: H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.protocols import nearest

Box = tuple[int, int, int, int]  # top, left, height, width; pixels


@dataclass(frozen=True)
class Crop:
    """Rows and columns [from, to) that count: pixels, or fractions of height and width, rounded down."""

    rows: tuple[float, float]
    cols: tuple[float, float]
    relative: bool = False

    def slices(self, height: int, width: int) -> tuple[slice, slice]:
        """Of an image of height x width pixels."""
        h, w = (height, width) if self.relative else (1, 1)
        return slice(*(int(row * h) for row in self.rows)), slice(*(int(col * w) for col in self.cols))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark. Depths count strictly between the limits (metres)."""

    name: str
    title: str
    images: int | None = None  # in the published split
    min_depth_m: float = 0.0
    max_depth_m: float | None = None
    image_crop: tuple[int, int] | None = None  # the image itself is cut to this, at the bottom and in the middle
    size_hw: tuple[int, int] | None = None  # an image of another size is no image of this benchmark
    mask_crop: Crop | None = None
    keys: str = ""  # only samples whose key contains this
    source: str
    choice: str = ""

    def image_box(self, height: int, width: int) -> Box | None:
        """What the network sees of an image, or None when the image is not of this benchmark."""
        box = (0, 0, height, width)
        if self.image_crop:
            rows, cols = self.image_crop
            if height < rows or width < cols:
                return None
            box = (height - rows, (width - cols) // 2, rows, cols)
        return box if self.size_hw in (None, box[2:]) else None

    def counts(self, depth_HW: NDArray[np.floating], valid_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The valid pixels that count, of a truth that was cut to `image_box`. Depth in metres."""
        inside_HW = np.ones(valid_HW.shape, bool)
        if self.mask_crop:
            inside_HW[:] = False
            inside_HW[self.mask_crop.slices(*valid_HW.shape)] = True
        with np.errstate(invalid="ignore"):
            inside_HW &= depth_HW > self.min_depth_m
            if self.max_depth_m is not None:
                inside_HW &= depth_HW < self.max_depth_m
        return valid_HW & inside_HW


EIGEN_NYU = Crop((45, 471), (41, 601))  # BTS and all after it, for 480 x 640
GARG = Crop((0.40810811, 0.99189189), (0.03594771, 0.96405229), relative=True)  # Garg et al. 2016 (arXiv 1603.04992)
EIGEN_KITTI = Crop((0.3324324, 0.91351351), (0.0359477, 0.96405229), relative=True)  # Eigen et al. 2014
KB = (352, 1216)  # the KITTI depth benchmark's own size

_ZOE = "LiheYoung/Depth-Anything, metric_depth/zoedepth/utils/config.py"
_MARIGOLD = "prs-eth/Marigold, src/dataset/"
_NO_TABLE = "for the tables of Depth Anything V1 and V2, which publish neither: "
_MOGE = "microsoft/MoGe, moge/test/dataloader.py"
_MOGE_DATA = (
    "as MoGe's loader leaves it: warped to the target's field of view, truths above 1000 times the image's first "
    "percentile dropped; pack that, as none of it is done here"
)

_BENCHMARKS = (
    Benchmark(
        name="nyu", title="NYU Depth v2, test", images=654, min_depth_m=1e-3, max_depth_m=10, size_hw=(480, 640),
        mask_crop=EIGEN_NYU, source=f"{_ZOE}; {_MARIGOLD}nyu_dataset.py", choice=_NO_TABLE + "crop and cap",
    ),
    Benchmark(
        name="nyu-midas", title="NYU Depth v2, test, whole images", images=654, max_depth_m=10,
        source="MiDaS, gist ranftlr/a1c7a24ebb24ce0e2f2ace5bce917022",
    ),
    Benchmark(
        name="kitti", title="KITTI, Eigen split", images=652, min_depth_m=1e-3, max_depth_m=80, image_crop=KB,
        mask_crop=GARG, source=_ZOE, choice=_NO_TABLE + "crops and cap",
    ),
    Benchmark(
        name="kitti-marigold", title="KITTI, Eigen split, Eigen's crop", images=652, min_depth_m=1e-5, max_depth_m=80,
        image_crop=KB, mask_crop=EIGEN_KITTI, source=f"{_MARIGOLD}kitti_dataset.py",
    ),
    Benchmark(
        name="kitti-garg", title="KITTI, Eigen split, up to 50 m", images=697, max_depth_m=50, mask_crop=GARG,
        source="Garg et al. 2016 (arXiv 1603.04992), section 4",
        choice="truth: the paper projects lidar points (697 images); the annotated depth of 2017 exists for 652",
    ),
    Benchmark(
        name="sintel", title="MPI Sintel, training", max_depth_m=72, source="http://sintel.is.tue.mpg.de/depth",
        choice=_NO_TABLE + "final render, no crop, cap 72 m, which MiDaS is said to use",
    ),
    Benchmark(
        name="ddad", title="DDAD, validation", min_depth_m=1e-3, max_depth_m=80, source=f"{_ZOE} (limits)",
        choice=_NO_TABLE + "no crop, the limits of ZoeDepth",
    ),
    Benchmark(
        name="eth3d", title="ETH3D, high resolution, training", images=454, max_depth_m=72,
        source="https://www.eth3d.net", choice=_NO_TABLE + "no crop, cap 72 m, which MiDaS is said to use",
    ),
    Benchmark(
        name="eth3d-marigold", title="ETH3D, no cap", images=454, min_depth_m=1e-5,
        source=f"{_MARIGOLD}eth3d_dataset.py",
    ),
    Benchmark(
        name="diode", title="DIODE, validation", images=771, min_depth_m=0.6, max_depth_m=350,
        source=f"{_MARIGOLD}diode_dataset.py",
        choice=_NO_TABLE + "the limits, and that all scenes count",
    ),
    Benchmark(
        name="diode-indoor", title="DIODE, validation, indoors", images=325, min_depth_m=0.6, max_depth_m=350,
        keys="indoors", source=f"{_MARIGOLD}diode_dataset.py",
        choice=_NO_TABLE + "the limits, and that only indoor scenes count",
    ),
    Benchmark(
        name="diode-outdoor", title="DIODE, validation, outdoor", images=446, min_depth_m=0.6, max_depth_m=350,
        keys="outdoor", source=f"{_MARIGOLD}diode_dataset.py",
    ),
    Benchmark(
        name="diode-outdoor-zoedepth", title="DIODE, validation, outdoor, up to 80 m", images=446, min_depth_m=1e-3,
        max_depth_m=80, mask_crop=GARG, keys="outdoor", source=_ZOE,
    ),
    Benchmark(
        name="scannet", title="ScanNet, validation", images=800, min_depth_m=1e-3, max_depth_m=10,
        source=f"{_MARIGOLD}scannet_dataset.py",
    ),
    Benchmark(
        name="ibims", title="iBims-1", images=100, max_depth_m=10, mask_crop=EIGEN_NYU, size_hw=(480, 640), source=_ZOE,
    ),
    Benchmark(name="sunrgbd", title="SUN RGB-D, test", max_depth_m=8, mask_crop=EIGEN_NYU, source=_ZOE),
    Benchmark(
        name="hypersim", title="Hypersim, test", min_depth_m=1e-3, max_depth_m=80, mask_crop=EIGEN_NYU, source=_ZOE,
    ),
    Benchmark(
        name="vkitti2", title="Virtual KITTI 2", min_depth_m=1e-3, max_depth_m=80, image_crop=KB, mask_crop=GARG,
        source=_ZOE,
    ),
    *(
        Benchmark(name=f"{name}-moge", title=f"{title}, MoGe's data", source=_MOGE, choice=_MOGE_DATA)
        for name, title in {
            "nyu": "NYU Depth v2", "kitti": "KITTI", "eth3d": "ETH3D", "ibims": "iBims-1", "sintel": "MPI Sintel",
            "ddad": "DDAD", "diode": "DIODE", "gso": "Google Scanned Objects",
        }.items()
    ),
    Benchmark(
        name="da-2k", title="DA-2K, pairs of points", source="DepthAnything/Depth-Anything-V2, DA-2K.md",
    ),
)  # fmt: skip
BENCHMARKS = {benchmark.name: benchmark for benchmark in _BENCHMARKS}
PAIRS = "da-2k"  # has points in place of depth maps
WHOLE = Benchmark(name="", title="", source="")  # a dataset of one's own: every valid pixel counts


def get_benchmark(name: str | None) -> Benchmark:
    """The benchmark of that name, None: every valid pixel of every image. ValueError that names the nearest one."""
    if name is None:
        return WHOLE
    if name not in BENCHMARKS:
        raise ValueError(f"no such benchmark; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
