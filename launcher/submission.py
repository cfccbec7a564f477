"""From a command line to what is submitted: the verb checked here, its configuration resolved, a name for the job."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.credentials import is_secret_name, secret_in
from launcher.jobs import CONFIG_WORD, GRACE_S, GRACE_VARIABLE, JobUsageError, seconds_of, words_of
from launcher.parsing import parsed
from launcher.supervisor import RESTARTS
from launcher.supervisor import again as resumed

NOT_AS_JOBS = ("submit", "jobs", "monitor", "plan", "recipes")
RESERVED = (GRACE_VARIABLE, "FATHOM_JOB", "FATHOM_SUBMITTED")  # variables of every job
_READABLE = "and whoever sees the cluster's dashboard can read it; credentials belong into its nodes' environment"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A verb to run elsewhere. In `arguments` CONFIG_WORD stands for the configuration, given in `config`."""

    arguments: tuple[str, ...]
    typed: tuple[str, ...]  # for people
    name: str  # the run's, or one made up
    run_folder: str | None = None
    config: str | None = None  # resolved: overrides applied, every value there, paths absolute

    @property
    def digest(self) -> str | None:
        """Of the configuration: two jobs with the same one do the same."""
        return hashlib.sha256(self.config.encode()).hexdigest()[:16] if self.config is not None else None

    def metadata(self, run: str) -> dict[str, str]:
        """What the cluster keeps with the job, beside the terms: enough to go on with it from any machine."""
        known = {
            "fathom": "1",  # of this format
            "arguments": json.dumps(self.arguments),
            "typed": json.dumps(self.typed),
            "run": run,
            "run_folder": self.run_folder,
            "config_digest": self.digest,
            "config": self.config,
            "submitted": f"{time.time():.3f}",
        }
        return {key: value for key, value in known.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a job is submitted with, beside its verb. `folder`: where it was typed; the job runs there if it can."""

    folder: str
    grace_s: float = GRACE_S
    restarts: int = RESTARTS
    python: str = "python"
    env: Mapping[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """What the cluster keeps of it."""
        return {
            "folder": self.folder,
            "grace": f"{self.grace_s:.0f}",
            "restarts": str(self.restarts),
            "python": self.python,
            "env": json.dumps([f"{name}={value}" for name, value in self.env.items()]),
        }

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Terms:
        """Those of a job that we submitted. Raises JobUsageError where they are damaged."""
        restarts, env = metadata.get("restarts", ""), metadata.get("env", "[]")
        if not metadata.get("folder") or not restarts.isdecimal() or (env != "[]" and not words_of(env)):
            raise JobUsageError("this job's metadata are damaged: submit it anew, with the verb's own --resume")
        return cls(
            folder=metadata["folder"],
            grace_s=seconds_of(metadata.get("grace"), GRACE_S),
            restarts=int(restarts),
            python=metadata.get("python", "python"),
            env=environment(words_of(env)),
        )


def request(arguments: Sequence[str], name: str | None) -> Request:
    """Check a command line as the verb itself would, and resolve its configuration.

    Raises what the verb raises for a wrong command line or configuration; JobUsageError for a verb that is no job.
    """
    words, params = parsed(arguments, NOT_AS_JOBS)
    verb = words[0]
    made_up = f"{'-'.join(words)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if verb not in ("train", "evaluate"):
        return Request(arguments=tuple(arguments), typed=tuple(arguments), name=_checked(name or made_up))
    config = _resolved(verb, params)
    from trainer.config import dump_config

    run_folder = config.folder if verb == "train" else None
    return Request(
        arguments=_without_config(arguments, params["config"]),
        typed=tuple(arguments),
        name=_checked(name or (config.name if verb == "train" else made_up)),
        run_folder=run_folder,
        config=dump_config(config),
    )


def again(metadata: Mapping[str, str]) -> Request:
    """The request that goes on where a job's ended. Raises JobUsageError where its verb cannot."""
    arguments = resumed(words_of(metadata.get("arguments")))
    if arguments is None or "run" not in metadata:
        raise JobUsageError(
            "this job cannot go on; train, label run, label retry, evaluate and quickstart can, where `fathom submit` "
            "submitted them"
        )
    return Request(
        arguments=tuple(arguments),
        typed=tuple(resumed(words_of(metadata.get("typed"))) or arguments),
        name=metadata["run"],
        run_folder=metadata.get("run_folder"),
        config=metadata.get("config"),
    )


def refuse_secrets(asked: Request, terms: Terms) -> None:
    """Raises JobUsageError for credentials in what the cluster keeps and shows: which word or field."""
    for place, text in _texts(asked, terms):
        if what := secret_in(text):
            raise JobUsageError(f"{place}: holds {what}, {_READABLE}")


def _texts(asked: Request, terms: Terms) -> Iterator[tuple[str, str]]:
    import yaml

    if asked.config is not None:
        yield from _leaves(yaml.safe_load(asked.config), "")
    for number, word in enumerate(asked.typed, 1):
        yield f"VERB, word {number} ({word.partition('://')[0].partition('?')[0]}...)", word
    for word in asked.arguments:
        yield "VERB", word
    yield "--python", terms.python
    yield "the folder's name", terms.folder


def _leaves(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """(dotted place, text) of every text in a configuration, keys too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}.{index}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield place or "the configuration", str(key)
            yield from _leaves(inner, f"{place}.{key}".lstrip("."))


def environment(items: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, or `NAME` for this machine's value. Raises JobUsageError, for secrets too: all could read them."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise JobUsageError(f"--env {item!r}: expected NAME=VALUE, or NAME of a variable that is set here")
        if name in RESERVED:
            raise JobUsageError(f"--env {name}: fathom sets it itself; --grace is the time to save in")
        if is_secret_name(name):
            raise JobUsageError(f"--env {name}: looks like a secret, {_READABLE}")
        if not equals and name not in os.environ:
            raise JobUsageError(f"--env {name}: not set here; give --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
        if what := secret_in(found[name]):
            raise JobUsageError(f"--env {name}: holds {what}, {_READABLE}")
    return found


def _resolved(verb: str, params: Mapping[str, Any]) -> Any:
    from trainer.config import read_config

    overrides = params.get("overrides") or []
    if verb == "train":
        from trainer.config_train import TrainConfig

        return read_config(TrainConfig, params["config"], overrides)
    from trainer.config_evaluate import EvaluateConfig

    return read_config(EvaluateConfig, params["config"], overrides)


def _without_config(arguments: Sequence[str], path: Path) -> tuple[str, ...]:
    """The arguments with CONFIG_WORD for the file, and without `--set`, which is in it already."""
    place = _place(arguments, path)
    kept: list[str] = []
    rest = iter(enumerate(arguments))
    for index, word in rest:
        if index == place:
            kept.append(CONFIG_WORD)
        elif word == "--set":
            next(rest)
        elif not word.startswith("--set="):
            kept.append(word)
    return tuple(kept)


def _place(arguments: Sequence[str], path: Path) -> int:
    """Which of the words is the configuration: a verb, or an option's value, may read the same."""
    candidates = [index for index, word in enumerate(arguments) if Path(word) == path]
    other = f"config-{secrets.token_hex(8)}"
    for index in candidates[:-1]:
        try:
            _, params = parsed([*arguments[:index], other, *arguments[index + 1 :]], NOT_AS_JOBS)
        except Exception:  # noqa: BLE001  it was the verb, or an option's value
            continue
        if params.get("config") == Path(other):
            return index
    return candidates[-1]


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise JobUsageError(
            f"--name: {name!r}; letters, digits, '.', '_' and '-', beginning with a letter or digit, 100 at most"
        )
    return name
