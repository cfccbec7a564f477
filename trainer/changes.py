"""What a resume may change of a run's configuration, and how differences are said."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from trainer.config import ConfigError
from trainer.config_train import TrainConfig
from trainer.journal import Journal

# What a resumed run must not change: the order of samples and what is learned from them hang on it.
FIXED = ("seed", "task", "model", "data")
# What changes no result in them.
CHANGEABLE = {
    "model": frozenset({"activation_checkpointing"}),
    "data": frozenset(
        {"threads", "prefetch", "pin_memory", "max_bad_fraction", "skip_samples", "cache", "cache_bytes"}
    ),
}


def refuse_changes(before: TrainConfig, now: TrainConfig) -> None:
    """A resumed run keeps data, task, network, seed, optimizer. Raises ConfigError listing the fields that differ."""
    found = []
    for section in FIXED:
        old, new = before.model_dump(mode="json")[section], now.model_dump(mode="json")[section]
        free = CHANGEABLE.get(section, frozenset())
        old, new = ({k: v for k, v in d.items() if k not in free} if free else d for d in (old, new))
        found += differences(section, old, new)
    found += differences("optim.optimizer", before.optim.optimizer, now.optim.optimizer)
    if found:
        raise ConfigError(
            f"{listing(found, 'the run to resume has')}; use what it has, or start under another name (from its "
            "weights: model.weights)"
        )


def say_changes(folder: str, before: TrainConfig, now: TrainConfig) -> None:
    """What a resume changes, although it may: on stderr and in the journal."""
    found = differences("", before.model_dump(mode="json"), now.model_dump(mode="json"))
    lines = [f"{field[1:]}: was {old!r}, is {new!r}" for field, old, new in found]
    if lines:
        Journal(folder).write("configuration_changed", changes=lines)
        print("\n".join(f"changed on resume: {line}" for line in lines), file=sys.stderr)


def differences(where: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Path and both values of every field in which two plain configurations differ; an absent field is None."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [found for key in keys for found in differences(f"{where}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [(where, old, new)]


def listing(found: Sequence[tuple[str, Any, Any]], had: str, shown: int = 8) -> str:
    """`differences` for people, the first few of them: "FIELD: is NEW, but HAD OLD; ...; and N more"."""
    clauses = [f"{field}: is {new!r}, but {had} {old!r}" for field, old, new in found[:shown]]
    return "; ".join(clauses + ([f"and {len(found) - shown} more"] if len(found) > shown else []))
