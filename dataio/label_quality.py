"""The quality of pseudo-labels as a filter of training: may a role ask for it, and what does a label say.

`quality` in KEY.json is how well the teacher agrees with itself, 1 entirely, as `labels.json` says in its
description's `quality`: "off" where nothing was measured, "flip" or "flip+scale".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataio.spec import DataError

UNMEASURED = "off"


def check_filter(field: str, min_quality: float | None, labels: Mapping[str, Mapping[str, Any]]) -> None:
    """DataError when a role asks for a quality that its `labels` (folder -> description) do not have.

    `field` names the setting: data.roles.ROLE.min_quality.
    """
    if min_quality is None:
        return
    if not 0 <= min_quality <= 1:
        raise DataError(f"{field} is {min_quality}: it must be between 0 and 1")
    if not labels:
        raise DataError(f"{field} is {min_quality}, and the role reads no pseudo-labels: remove it")
    for folder, description in labels.items():
        if description.get("quality", UNMEASURED) == UNMEASURED:
            raise DataError(
                f"{field} is {min_quality}, and {folder} says nothing of its labels' quality: label again with "
                "`fathom label run --quality flip`, or remove it"
            )


def of(meta: Mapping[str, Any]) -> float:
    """The quality that a label's KEY.json states. DataError when it is missing or no number."""
    quality = meta.get("quality")
    if isinstance(quality, bool) or not isinstance(quality, int | float) or quality != quality:
        raise DataError(f"quality is {quality!r}: a number is needed")
    return float(quality)
