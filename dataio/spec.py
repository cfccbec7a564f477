"""What a run asks of the data room: plain, typed, free of torch.

Every class is a standard dataclass that a configuration can embed: where it stands as a field of a pydantic model,
unknown keys are refused and the bounds below are checked; built by hand, nothing is. Numbers of `Perturbation` follow
the one published implementation by the Depth Anything author (UniMatch, dataset/semi.py and dataset/transform.py);
Depth Anything (arXiv 2401.10891, section 3.2) names the operations but not their strengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field


def _rising(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the first number must not be above the second")
    return limits


Fraction = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Rising = AfterValidator(_rising)

_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}


class DataError(ValueError):
    """The user's data is wrong: names the file, what was found and what to do. Ends a command with status 2."""

    exit_status = 2


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Random transforms of one role's samples; the defaults only flip and crop, which is V1's labelled recipe."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    flip_p: Fraction = 0.5
    jitter_p: Fraction = 0.0
    brightness: Strength = 0.5
    contrast: Strength = 0.5
    saturation: Strength = 0.5
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.25  # in turns: 0.25 is +-90 degrees, torchvision's unit
    grayscale_p: Fraction = 0.0
    blur_p: Fraction = 0.0
    blur_sigma: Annotated[tuple[Strength, Strength], _Rising] = (0.1, 2.0)  # pixels of the network's input
    cutmix_p: Fraction = 0.0
    cutmix_area: Annotated[tuple[_Share, _Share], _Rising] = (0.02, 0.4)  # fraction of the image
    cutmix_aspect: Annotated[tuple[_Positive, _Positive], _Rising] = (0.3, 1 / 0.3)  # height / width


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """One role of a batch: which datasets feed it and how many samples of every global batch are its own."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    datasets: tuple[str, ...]  # folders or URLs of datasets
    labels: tuple[str, ...] = ()  # label sidecars, one per dataset, or none
    weights: tuple[_Positive, ...] = ()  # one per dataset: drawn in these proportions; none: concatenated
    batch: Count = 8  # samples per global batch
    lanes: Count = 2  # independent sequential readers; divides batch; bounds the number of ranks
    perturbation: Perturbation = field(default_factory=Perturbation)
    min_quality: Fraction | None = None  # of pseudo-labels, which keep their slots with weight 0 below it


@dataclass(frozen=True, kw_only=True)
class RoleNeeds:
    """What a task requires of a role: declared in code, never in a recipe."""

    target: Literal["disparity", "depth_m", "none"] = "disparity"
    sidecar: bool = False  # the target comes from a label sidecar, not from the dataset itself

    def __post_init__(self) -> None:
        if self.sidecar and self.target == "depth_m":
            raise ValueError("a label sidecar holds disparity, which has no metres")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The `data:` section of a training configuration."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    roles: dict[str, RoleSpec]
    input_size: Annotated[int, Field(gt=0, multiple_of=14)] = 518  # pixels, square crop, a multiple of the patch size
    shuffle_window: Count = 512  # samples shuffled together; also what a resume may have to re-read
    max_bad_fraction: Fraction = 0.01  # of the samples seen so far; past it the run stops
    threads: Count = 1  # of DALI, for each of the two batches that it works on; as many for targets; per rank
    prefetch: Count = 2  # finished batches that wait for the trainer, per rank; three more are under way
    pin_memory: bool = True  # targets on their way to a GPU, which then copies them without waiting
    cache: str | None = None  # local folder for copies of shards that lie behind URLs
    cache_bytes: Count = 100 << 30  # of all copies together
    # Stretches [from, to) of the run's samples, counted over all roles in the order of the plan, that are passed over.
    skip_samples: tuple[tuple[int, int], ...] = ()
