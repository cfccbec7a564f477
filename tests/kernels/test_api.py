"""What the package promises to importers and how it refuses wrong input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import affine_invariant_loss, cosine_margin_loss, region_median_mad

ROOT = Path(__file__).parents[2]

PROBE = """
import importlib.util, sys
before = set(sys.modules)
assert importlib.util.find_spec("kernels") is not None
import kernels
assert kernels.__file__ == {init!r}, kernels.__file__
assert getattr(kernels, "__version__", "N/A") == "0.0.0"
try:
    from kernels import Device, LayerRepository, register_kernel_mapping
except ImportError:
    pass
else:
    raise SystemExit("names of the other package were found")
assert not hasattr(kernels, "get_kernel")
new = set(sys.modules) - before
heavy = [name for name in new if name.split(".")[0] in ("torch", "numpy", "triton") or name.startswith("kernels.")]
assert not heavy, heavy
"""


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_import_is_light_and_survives_a_probe_for_the_other_kernels_package() -> None:
    run_python(PROBE.format(init=str(ROOT / "kernels" / "__init__.py")))


def test_the_version_is_outside_any_window() -> None:
    assert kernels.__version__ == "0.0.0"


def test_transformers_depth_anything_imports_from_the_repository_root() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: its probe of `kernels` was not tried")
    run_python("import transformers.models.depth_anything.modeling_depth_anything")


def test_lazy_names() -> None:
    assert {"affine_invariant_loss", "cosine_margin_loss", "region_median_mad", "__version__"} <= set(dir(kernels))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = kernels.nothing_like_it  # type: ignore[attr-defined]


X = torch.rand(2, 3, 4)
LABELS = torch.ones(2, 3, 4, dtype=torch.uint8)
STAT = torch.ones(2, 1)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"target_BHW": X[:1]}, r"pred_BHW \(2, 3, 4\) torch.float32 .*target_BHW \(1, 3, 4\)"),
        ({"pred_BHW": X[0], "target_BHW": X[0]}, r"\[B, H, W\]"),
        ({"pred_BHW": X.int()}, "floating-point.*torch.int32"),
        ({"target_BHW": X.to("meta")}, "one device"),
        ({"region_BHW": LABELS[:1]}, r"region_BHW must be .*\(2, 3, 4\).*got .*\(1, 3, 4\)"),
        ({"region_BHW": LABELS.long()}, "torch.uint8.*got torch.int64"),
        ({"region_BHW": LABELS * 2}, "label 2, but num_regions is 1"),
        ({"num_regions": 0}, "num_regions must be in 1..255, got 0"),
        ({"num_regions": 256}, "got 256"),
        ({"trim": 1.0}, r"trim must be in \[0, 1\), got 1.0"),
        ({"trim": -0.1}, "trim"),
        ({"trim": float("nan")}, "trim"),
        ({"target_stats": (STAT, STAT.T)}, r"mad_BG must be .*\(2, 1\).*got .*\(1, 2\)"),
        ({"target_stats": (STAT.int(), STAT)}, "median_BG must be floating point"),
        ({"target_stats": (STAT,)}, "got 1 values"),
        ({"backend": "triton"}, "'triton' cannot do this: the tensors are on cpu, not on a GPU; use 'auto'"),
        ({"backend": "cpu", "num_regions": 9}, "'cpu' cannot do this: num_regions is 9, at most 8"),
        ({"backend": "gpu"}, "backend is 'gpu'; there are 'auto', 'triton', 'cpu', 'reference'"),
    ],
)
def test_affine_invariant_loss_refuses(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        affine_invariant_loss(**{"pred_BHW": X, "target_BHW": X, **kwargs})


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"x_BHW": X.int()}, "x_BHW .*torch.int32"),
        ({"region_BHW": LABELS * 3, "num_regions": 2}, "label 3"),
        ({"backend": "triton"}, "not on a GPU"),
    ],
)
def test_region_median_mad_refuses(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        region_median_mad(**{"x_BHW": X, **kwargs})


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"frozen_BND": X[:, :2]}, r"one shape \[B, N, D\]"),
        ({"student_BND": X.int()}, "floating-point"),
        ({"alpha": -1.0}, r"alpha must be in \(-1, 1\], got -1.0"),
        ({"alpha": 1.01}, "alpha"),
        ({"token_mask_BN": torch.ones(2, 4, dtype=torch.bool)}, r"token_mask_BN .*\(2, 3\).*\(2, 4\)"),
        ({"token_mask_BN": torch.ones(2, 3)}, "torch.bool.*got torch.float32"),
        ({"reduction": "sum"}, "'mean' or 'sum_count', got 'sum'"),
        ({"backend": "numpy"}, "there are 'auto'"),
    ],
)
def test_cosine_margin_loss_refuses(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cosine_margin_loss(**{"student_BND": X, "frozen_BND": X, **kwargs})


def test_auto_chooses_by_device_and_falls_back_to_the_reference() -> None:
    y = X.flip(0)
    assert torch.equal(affine_invariant_loss(X, y), affine_invariant_loss(X, y, backend="cpu"))
    assert torch.equal(region_median_mad(X)[1], region_median_mad(X, backend="cpu")[1])
    assert torch.equal(cosine_margin_loss(X, y), cosine_margin_loss(X, y, backend="cpu"))
    many = {"region_BHW": LABELS, "num_regions": 9}
    assert torch.equal(affine_invariant_loss(X, y, **many), affine_invariant_loss(X, y, **many, backend="reference"))
