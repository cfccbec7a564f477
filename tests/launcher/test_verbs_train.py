"""`fathom train`: what it asks the training for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import recipes
from tests.launcher.conftest import Run
from trainer import run
from trainer.attempts import TrainOutcome

GROUP = "train"


@pytest.mark.parametrize(
    ("words", "resume"),
    [((), False), (("--resume",), True), (("--begin-or-resume",), None), (("--resume", "--begin-or-resume"), True)],
)
def test_begin_go_on_or_either(
    fathom: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], resume: bool | None
) -> None:
    (tmp_path / "teacher.yaml").write_text(recipes.read("teacher-v2-vitg"))
    asked = []

    def train(config: Any, **options: Any) -> TrainOutcome:
        asked.append(options["resume"])
        Path(config.folder).mkdir(parents=True)
        return TrainOutcome(folder=config.folder, step=1)

    monkeypatch.setattr(run, "train", train)
    assert fathom("teacher.yaml", *words)[0] == 0 and asked == [resume]
