"""As much of a configuration as can be read, and all that is wrong with it: for who wants to hear it at once.

Imports no torch, as config.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from trainer.config import (
    MISSING,
    UNKNOWN_KEY,
    ConfigError,
    Finding,
    absolute_paths,
    apply_override,
    clause,
    close_key,
    errors_of,
    existing,
    read_values,
)

C = TypeVar("C", bound=BaseModel)

ROUNDS = 20  # of mending; each takes away at least one thing that is wrong
# What stands for a missing value, by the key's name, so that the rest can be looked at.
STAND_INS: Mapping[str, Any] = {
    "name": "unnamed", "task": {"kind": "unknown"}, "kind": "unknown", "model": {}, "data": {"roles": {}}, "roles": {},
    "datasets": [], "project": "unnamed", "weights": "", "dataset": "unknown", "path": "unknown",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Salvaged(Generic[C]):
    """`config` is None where nothing can be read. `wrong`: the fields whose values in it are not the user's."""

    config: C | None
    problems: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


def salvage_file(cls: type[C], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Salvaged[C]:
    """`trainer.config.read_config` for what may be wrong in several places."""
    problems = []
    try:
        values = read_values(path)
    except ConfigError as error:
        return Salvaged(config=None, problems=(str(error),))
    for override in overrides:
        try:
            apply_override(values, override)
        except ConfigError as error:
            problems.append(str(error))
    found = salvage(cls, absolute_paths(values))
    return Salvaged(config=found.config, problems=(*problems, *found.problems), wrong=found.wrong)


def salvage(cls: type[C], values: Mapping[str, Any], prefix: str = "") -> Salvaged[C]:
    """Takes away what is wrong, or supposes what was meant, until the rest is valid; a line for each thing.

    A misspelt key counts as the one it is close to, a wrong value as its default. What several fields say together is
    looked at last, and passed over where one of them is wrong by itself.
    """
    left, problems, wrong = copy.deepcopy(dict(values)), dict[str, None](), dict[str, None]()
    for _ in range(ROUNDS):
        together: list[Finding] = []
        try:
            config = cls.model_validate(left, context=together)
        except ValidationError as error:
            told = errors_of(error, left)
            meant = _meant(cls, left, told)
            items = [item for item in told if item["loc"] not in meant.values()]
            news = [item for item in items if not covered(_field(left, item), wrong)]
            problems |= dict.fromkeys(prefix + clause(cls, item) for item in news)
            wrong |= dict.fromkeys(_field(left, item) for item in news if item["type"] not in UNKNOWN_KEY)
            if not _mend(left, items, meant):
                return Salvaged(config=None, problems=tuple(problems), wrong=tuple(wrong))
            continue
        said = [finding.says for finding in together if not any(covered(field, wrong) for field in finding.reads)]
        return Salvaged(config=config, problems=(*problems, *said), wrong=tuple(prefix + field for field in wrong))
    return Salvaged(config=None, problems=tuple(problems), wrong=tuple(wrong))


def without_consequences(lines: Iterable[str], wrong: Iterable[str]) -> list[str]:
    """Problems, each beginning with its field, without those that a stand-in has caused."""
    return [line for line in lines if not covered(line.partition(":")[0], wrong)]


def covered(field: str, wrong: Iterable[str]) -> bool:
    """Whether a field is wrong, a part of one that is, or the section that one is missing from."""
    return any(field == one or field.startswith(f"{one}.") or one.rpartition(".")[0] == field for one in wrong)


def _field(values: Mapping[str, Any], item: Any) -> str:
    """Which field an error is of: dotted, up to the first place in a list, without the names of a union's members."""
    location = item["loc"]
    names: list[str] = []
    for part in location if item["type"] in MISSING else existing(values, location):
        if isinstance(part, int):
            break
        names.append(part)
    return ".".join(names)


def _meant(cls: type[BaseModel], values: Mapping[str, Any], items: Sequence[Any]) -> dict[Any, Any]:
    """Where a misspelt key stands: where the one stands that it is close to, unless that is there, too."""
    found = {}
    for item in items:
        if item["type"] in UNKNOWN_KEY:
            *section, key = item["loc"]
            close = close_key(cls, item["loc"])
            if close and key in _at(values, section) and close not in _at(values, section):
                found[item["loc"]] = (*section, close)
    return found


def _mend(values: dict[str, Any], items: Sequence[Any], meant: Mapping[Any, Any]) -> bool:
    """Takes away every wrong value, or puts one that is meant or stands in its place. False: nothing could be done."""
    removed: set[tuple[Any, ...]] = set()
    mended = False
    for item in items:
        path = existing(values, item["loc"])
        rest = item["loc"][len(path) :]
        node = _at(values, path)
        if item["type"] in MISSING and len(rest) == 1 and isinstance(node, dict) and rest[0] in STAND_INS:
            node[rest[0]] = copy.deepcopy(STAND_INS[rest[0]])
            mended = True
            continue
        removed.add(path)
    for misspelt, right in meant.items():
        section = _at(values, right[:-1])
        section.setdefault(right[-1], section[misspelt[-1]])
    # the deepest and last first: the places of others stay
    for path in sorted(removed - {()}, key=_depth, reverse=True):
        del _at(values, path[:-1])[path[-1]]
        mended = True
    return mended


def _depth(path: tuple[Any, ...]) -> tuple[int, list[tuple[int, str]]]:
    return len(path), [(part, "") if isinstance(part, int) else (0, part) for part in path]


def _at(values: Any, path: Sequence[Any]) -> Any:
    for part in path:
        values = values[part]
    return values
