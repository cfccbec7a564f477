"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from model.presets import PositionMode

OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. optim.encoder_lr=1e-5; repeatable."),
]
ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; `fathom recipes show NAME` prints one.")
]
PresetOption = Annotated[str | None, typer.Option("--preset", help="Needed where the file cannot tell, e.g. v2-vits.")]
PositionOption = Annotated[
    str | None,
    typer.Option("--position-mode", help="official or exact; default: as recorded, else as the format does."),
]


def position_mode(value: str | None) -> PositionMode | None:
    """Refuses anything but the two ways of resizing position embeddings."""
    if value not in (None, "official", "exact"):
        raise typer.BadParameter(f"{value!r}; official or exact", param_hint="--position-mode")
    return cast("PositionMode | None", value)
