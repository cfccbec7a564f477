"""Every published number of every recipe, each with where it was published; what is not published is marked "choice",
and has its value here and on the page.

Sources: V1 = arXiv 2401.10891; V2 = arXiv 2406.09414; "V2 code" = Depth-Anything-V2's repository, metric_depth/;
"V1#n", "V2#n" = what an author says in issue n of the repository; UniMatch = the V1 author's repository of that name,
which he names as the source of CutMix (V1#240).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import recipes
from trainer.config import read_config
from trainer.config_train import TrainConfig
from trainer.tasks.base import make_task

Published = Mapping[str, tuple[Any, str]]  # path in the resolved configuration -> value, source

RATES: Published = {
    "optim.encoder_lr": (5e-6, "V1 section 4; V2 section 7.1; V2 code, dist_train.sh"),
    "optim.decoder_lr": (5e-5, "ten times the encoder's: V1 section 4; V2 section 7.1; V2 code, train.py:100-102"),
    "data.input_size": (
        518,
        "shorter side to 518 and crops of 518: V1 section 4; V2 section 7.1; V2 code, dist_train.sh",
    ),
}
LABELLED_V1 = ["blendedmvs", "diml", "hrwsi", "irs", "megadepth", "tartanair"]  # V1 table 1
LABELLED_V2 = ["blendedmvs", "hypersim", "irs", "tartanair", "vkitti2"]  # V2 table 7
ONLY_FLIPPED: Published = {
    "data.roles.labelled.perturbation.jitter_p": (0.0, "labelled images are only flipped: V1 section 4"),
    "data.roles.labelled.perturbation.grayscale_p": (0.0, "likewise"),
    "data.roles.labelled.perturbation.blur_p": (0.0, "likewise"),
    "data.roles.labelled.perturbation.cutmix_p": (0.0, "likewise"),
    "data.roles.labelled.weights": ([], "concatenated without re-sampling: V1 section 4"),
}
V1: Published = {
    **RATES,
    **ONLY_FLIPPED,
    "optim.optimizer": ("adamw", "V1 section 4"),
    "optim.schedule": ("linear", "V1 section 4"),
    "data.roles.labelled.datasets": ([f"data/{name}" for name in LABELLED_V1], "V1 table 1"),
    "task.loss": ("mad", "V1 equations 1 to 3"),
    "task.gradient_weight": (0.0, "V1 section 3 has no gradient matching"),
}
V2: Published = {
    **RATES,
    "optim.optimizer": ("adam", "V2 section 7.1"),
    "task.loss": ("mad", "V2 section 5.2: the losses of V1 and gradient matching; V1#198"),
    "task.gradient_weight": (2.0, "V2 section 7.1 and appendix B.7"),
}
CUTMIX: Published = {
    "data.roles.unlabelled.perturbation.cutmix_p": (0.5, "V1 section 3.2"),
    "data.roles.unlabelled.perturbation.cutmix_area": ([0.02, 0.4], "UniMatch, dataset/transform.py:66-84"),
    "data.roles.unlabelled.perturbation.cutmix_aspect": ([0.3, 1 / 0.3], "UniMatch, dataset/transform.py:66-84"),
}
FEATURES: Published = {"task.alpha": (0.85, "V1 section 3.3 and table 12")}
AVERAGE = (1 / 3, "the total is the average of the three: V1 section 4")


def students(version: str, size: str) -> Published:
    own = f"weights/dinov2_{size}14_pretrain.pth"
    common: Published = {
        **FEATURES,
        **CUTMIX,
        "task.kind": ("student", "V1 section 3.2"),
        "task.frozen_encoder": (own, "the same size as the student's: V1#224"),
        "model.encoder_weights": (own, "from DINOv2, not from the teacher: V1 section 3.2"),
        "model.preset": (f"{version}-{size}", ""),
    }
    if version == "v1":
        return {
            **V1,
            **common,
            "passes.unlabelled": (1, "one pass over all unlabelled images: V1 section 4, V1#175"),
            "task.labelled_weight": AVERAGE,
            "task.unlabelled_weight": AVERAGE,
            "task.feature_weight": AVERAGE,
            "data.roles.unlabelled.batch": (128, "twice the labelled: V1 section 4"),
        }
    return {
        **V2,
        **common,
        "steps": (480_000, "V2 section 7.1"),
        "data.roles.unlabelled.batch": (192, "V2 section 7.1"),
        "task.labelled_weight": (0.0, "purely on pseudo-labelled images: V2 section 5 and table 5"),
        "task.trim": (0.1, "the tenth with the largest loss: V2 section 5.2, V2#108"),
    }


def metric(place: str, metres: int, train: str, validation: str) -> Published:
    return {
        **RATES,
        "passes.labelled": (120, "V2 code, dist_train.sh"),
        "task.kind": ("metric", "V2 code"),
        "task.min_depth": (0.001, "V2 code, dist_train.sh"),
        "task.mean_weight": (0.5, "V2 code, util/loss.py:5-16"),
        "model.preset": (f"v2-vitl-metric-{place}", f"up to {metres} m: V2 code, dist_train.sh"),
        "model.encoder_weights": ("weights/depth_anything_v2_vitl.pth", "keys with `pretrained`: V2 code, train.py:90"),
        "data.roles.labelled.datasets": ([f"data/{train}"], "V2 code, README"),
        "data.roles.labelled.batch": (32, "4 on each of 8 GPUs: V2 code, dist_train.sh"),
        "data.roles.labelled.perturbation.flip_p": (0.5, "V2 code, train.py:126-129"),
        "data.roles.labelled.perturbation.jitter_p": (0.0, "nothing but the flip: V2 code, dataset/"),
        "data.roles.labelled.perturbation.grayscale_p": (0.0, "likewise"),
        "data.roles.labelled.perturbation.blur_p": (0.0, "likewise"),
        "data.roles.labelled.perturbation.cutmix_p": (0.0, "likewise"),
        "optim.optimizer": ("adamw", "V2 code, train.py:100-102"),
        "optim.betas": ([0.9, 0.999], "V2 code, train.py:100-102"),
        "optim.weight_decay": (0.01, "V2 code, train.py:100-102"),
        "optim.decay_norms_and_biases": (True, "two groups, both decayed whole: V2 code, train.py:100-102"),
        "optim.schedule": ("poly", "V2 code, train.py:140-145"),
        "optim.power": (0.9, "V2 code, train.py:140-145"),
        "optim.warmup_samples": (0, "V2 code, train.py:140-145"),
        "optim.clip": (0.0, "no clipping: V2 code, train.py"),
        "optim.ema_decay": (None, "no average: V2 code, train.py"),
        "engine.precision": ("fp32", "no AMP: V2 code, train.py"),
        "engine.micro_batch": (4, "V2 code, dist_train.sh"),
        "cluster.workers": (8, "V2 code, dist_train.sh"),
        "validation.datasets": ([f"data/{validation}"], "V2 code, train.py"),
        "validation.max_depth": (metres, "V2 code, dist_train.sh"),
    }


PUBLISHED: Mapping[str, Published] = {
    "teacher-v1-vitl": {
        **V1,
        "passes.labelled": (20, "20 epochs: V1 section 4"),
        "task.kind": ("teacher", "V1 section 3.1"),
        "model.preset": ("v1-vitl", "V1 section 4"),
        "model.encoder_weights": ("weights/dinov2_vitl14_pretrain.pth", "V1 section 3.1"),
    },
    "teacher-v2-vitg": {
        **V2,
        "data.roles.labelled.weights": ([], "concatenated, unbalanced: V2 section 7.1"),
        "steps": (160_000, "V2 section 7.1"),
        "task.kind": ("teacher", "V2 section 5.1"),
        "model.preset": ("v2-vitg", "V2 section 5.1"),
        "model.encoder_weights": ("weights/dinov2_vitg14_pretrain.pth", "without registers: V2 table 13"),
        "data.roles.labelled.datasets": ([f"data/{name}" for name in LABELLED_V2], "V2 table 7"),
        "data.roles.labelled.batch": (64, "V2 section 7.1"),
    },
    **{f"student-v1-{size}": students("v1", size) for size in ("vits", "vitb", "vitl")},
    **{f"student-v2-{size}": students("v2", size) for size in ("vits", "vitb", "vitl", "vitg")},
    "metric-indoor": metric("indoor", 20, "hypersim", "hypersim-val"),
    "metric-outdoor": metric("outdoor", 80, "vkitti2", "kitti-val"),
}
# The strengths that V1's author used in UniMatch (dataset/semi.py:51-55, dataset/transform.py:59-84).
UNIMATCH = {
    "jitter_p": 0.8, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.25, "grayscale_p": 0.2,
    "blur_p": 0.5, "blur_sigma": [0.1, 2.0], "cutmix_p": 0.5, "cutmix_area": [0.02, 0.4],
    "cutmix_aspect": [0.3, 1 / 0.3],
}  # fmt: skip

# What nobody published and we chose: path -> value, by the families of the page's table.
Choices = Mapping[str, Any]
EVERYWHERE: Choices = {"seed": 0, "data.shuffle_window": 512, "optim.eps": 1e-8}
RELATIVE: Choices = {
    **EVERYWHERE, "engine.precision": "bf16", "optim.betas": [0.9, 0.999], "optim.clip": 0.0,
    "optim.decay_norms_and_biases": True, "optim.ema_decay": None, "optim.warmup_samples": 0,
}  # fmt: skip
OF_V1: Choices = {
    **RELATIVE, "optim.weight_decay": 0.01, "data.roles.labelled.batch": 64,
    "data.roles.labelled.perturbation.flip_p": 0.5,
}  # fmt: skip
OF_V2: Choices = {**RELATIVE, "optim.weight_decay": 0.0, "optim.schedule": "linear", "task.gradient_scales": 4}
OF_STUDENTS: Choices = {
    "task.frozen_view": "student",
    **{
        f"data.roles.unlabelled.perturbation.{key}": value
        for key, value in {
            "flip_p": 0.5, "jitter_p": 0.8, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.25,
            "grayscale_p": 0.0, "blur_p": 0.5, "blur_sigma": [0.1, 2.0],
        }.items()
    },
}  # fmt: skip
CHOICES: Mapping[str, Choices] = {
    "teacher-v1": {**OF_V1, "data.roles.labelled.lanes": 64},
    "student-v1": {
        **OF_V1, **OF_STUDENTS, "task.trim": 0.0, "data.roles.labelled.lanes": 32, "data.roles.unlabelled.lanes": 32,
    },
    "teacher-v2": {
        **OF_V2, "data.roles.labelled.lanes": 64, "data.roles.labelled.perturbation.flip_p": 0.5,
        "data.roles.labelled.perturbation.jitter_p": 0.0, "data.roles.labelled.perturbation.grayscale_p": 0.0,
        "data.roles.labelled.perturbation.blur_p": 0.0, "data.roles.labelled.perturbation.cutmix_p": 0.0,
    },
    "student-v2": {
        **OF_V2, **OF_STUDENTS, "task.unlabelled_weight": 1.0, "task.feature_weight": 1.0,
        "data.roles.unlabelled.lanes": 64,
    },
    "metric": {
        **EVERYWHERE, "data.roles.labelled.lanes": 32, "validation.every": 2000, "validation.metric": "abs_rel",
    },
}  # fmt: skip
# What no result depends on: the machine, names of files, when to save.
FREE = re.compile(
    r"name|model\.activation_checkpointing|data\.threads|data\.roles\.unlabelled\.(datasets|labels)|checkpoint\..*|"
    r"engine\.(zero_stage|micro_batch)|cluster\..*"
)


def values_of(name: str) -> dict[str, Any]:
    """The recipe as it reads, without defaults."""
    values: dict[str, Any] = yaml.safe_load(recipes.read(name))
    return values


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that is no mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def marked(name: str) -> set[str]:
    """Paths of the lines of a recipe whose comment has the word "choice"."""
    found, stack = set(), []
    for line in recipes.read(name).splitlines():
        if match := re.match(r"^( *)([a-z_]+):", line):
            depth = len(match[1]) // 2
            stack = [*stack[:depth], match[2]]
            if re.search(r"#.*\bchoice\b", line):
                found.add(".".join(stack))
    return found


def resolved_of(name: str) -> dict[str, Any]:
    """The recipe with all defaults, by path."""
    return dict(leaves(TrainConfig.model_validate(values_of(name)).model_dump(mode="json")))


def wrong_numbers(resolved: Mapping[str, Any], published: Published) -> list[str]:
    """What a configuration has otherwise than it was published."""
    return [
        f"{path}: {resolved.get(path)!r}, published as {value!r} ({source})"
        for path, (value, source) in published.items()
        if resolved.get(path) != value
    ]


def test_every_recipe_but_the_quickstart_s_has_its_published_numbers_here() -> None:
    assert set(PUBLISHED) == {name for name in recipes.names() if not name.startswith("quickstart-")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_was_published_is_what_a_recipe_says(name: str) -> None:
    values = values_of(name)
    assert values["name"] == name
    assert wrong_numbers(resolved_of(name), PUBLISHED[name]) == []
    unsaid = PUBLISHED[name].keys() - dict(leaves(values)).keys()
    assert unsaid <= {"data.roles.labelled.weights"}, "a published value is left to a default"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_was_not_published_is_marked_as_a_choice(name: str) -> None:
    choices = marked(name)
    for path, _ in leaves(values_of(name)):
        known = path in PUBLISHED[name] or FREE.fullmatch(path) is not None
        if path != "task.mean_weight":  # the number is published, that the mean is an image's is a choice
            assert known != (path in choices), path
    everything = {path for path, _ in leaves(values_of(name))}
    assert choices <= everything


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_choice_has_the_value_that_was_chosen(name: str) -> None:
    (choices,) = (found for family, found in CHOICES.items() if name.startswith(family))
    resolved = resolved_of(name)
    assert marked(name) - {"task.mean_weight"} == choices.keys()
    assert {path: resolved[path] for path in choices} == choices


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("student")])
def test_perturbations_are_those_of_unimatch_but_for_grey(name: str) -> None:
    found = resolved_of(name)
    strengths = {key: found[f"data.roles.unlabelled.perturbation.{key}"] for key in UNIMATCH}
    assert strengths == {**UNIMATCH, "grayscale_p": 0.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_mistyped_number_is_found(name: str) -> None:
    resolved = resolved_of(name)
    for path, (value, _) in PUBLISHED[name].items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(type(number) in (int, float) for number in numbers):
            continue
        moved = [number + 1 if isinstance(number, int) else number * 0.9 or 0.1 for number in numbers]
        mistyped = {**resolved, path: moved if isinstance(value, list) else moved[0]}
        assert [line.split(":")[0] for line in wrong_numbers(mistyped, PUBLISHED[name])] == [path]


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_whole(name: str, tmp_path: Path) -> None:
    """It reads, its task takes its options and roles, and its head and labels fit; nothing but data is missing."""
    file = tmp_path / f"{name}.yaml"
    file.write_text(recipes.read(name))
    config = read_config(TrainConfig, file)
    task = make_task(config)
    assert task.term_weights and set(task.needs) == set(config.data.roles)
    assert all(len(line) <= 120 for line in recipes.read(name).splitlines())


@pytest.mark.parametrize("size", ["vits", "vitb", "vitl"])
def test_a_v1_student_sees_one_labelled_image_for_two_others(size: str) -> None:
    roles = values_of(f"student-v1-{size}")["data"]["roles"]
    assert roles["unlabelled"]["batch"] == 2 * roles["labelled"]["batch"]  # V1 section 4


def test_recipes_of_one_family_differ_by_their_size_alone() -> None:
    for family in ("student-v1", "student-v2"):
        names = [name for name in PUBLISHED if name.startswith(family)]
        plain = []
        for name in names:
            text = recipes.read(name).replace(name.rsplit("-", 1)[1], "SIZE")
            plain.append({path: value for path, value in leaves(yaml.safe_load(text)) if not FREE.fullmatch(path)})
        assert all(one == plain[0] for one in plain)


PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_names_every_recipe_and_every_choice() -> None:
    page = PAGE.read_text()
    for name in recipes.names():
        assert f"`{name}`" in page, name
    reasons = page.split("## What is our choice, and why")[1].split("## The values chosen")[0]
    for path in {path for name in PUBLISHED for path in marked(name)}:
        assert f"`{path.split('.')[-1]}`" in reasons, path


def test_the_page_has_the_values_that_were_chosen() -> None:
    """One line a choice, one column a family; an empty cell is no choice there."""
    section = PAGE.read_text().split("## The values chosen")[1].split("\n## ")[0]
    header, _, *rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    families = [cell.strip().strip("`") for cell in header[1:]]
    found: dict[str, dict[str, Any]] = {family: {} for family in families}
    for path, *cells in rows:
        for family, cell in zip(families, cells, strict=True):
            if cell.strip():
                found[family][path.strip().strip("`")] = yaml.safe_load(cell)
    assert found == CHOICES
    assert f"UniMatch has {UNIMATCH['grayscale_p']}" in section
