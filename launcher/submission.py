"""From a command line to what is submitted: the verb checked here, its configuration resolved, a name for the job."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.jobs import CONFIG_WORD, JobUsageError
from launcher.parsing import parsed

NOT_AS_JOBS = ("submit", "jobs", "monitor", "plan", "recipes")
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A verb to run elsewhere. In `arguments` the word CONFIG stands for the configuration, given in `config`."""

    arguments: tuple[str, ...]
    typed: tuple[str, ...]  # for people
    name: str  # the run's, or one made up
    run_folder: str | None = None
    config: str | None = None  # resolved: overrides applied, every value there, paths absolute

    @property
    def digest(self) -> str | None:
        """Of the configuration: two jobs with the same one do the same."""
        return hashlib.sha256(self.config.encode()).hexdigest()[:16] if self.config is not None else None

    def metadata(self, folder: str, run: str) -> dict[str, str]:
        """What the cluster keeps with the job: enough to go on with it from any machine."""
        known = {
            "fathom": "1",  # of this format
            "arguments": json.dumps(self.arguments),
            "typed": json.dumps(self.typed),
            "folder": folder,
            "run": run,
            "run_folder": self.run_folder,
            "config_digest": self.digest,
            "config": self.config,
            "submitted": f"{time.time():.3f}",
        }
        return {key: value for key, value in known.items() if value is not None}


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
        arguments=_without_config(arguments, str(params["config"])),
        typed=tuple(arguments),
        name=_checked(name or (config.name if verb == "train" else made_up)),
        run_folder=run_folder,
        config=dump_config(config),
    )


def again(metadata: Mapping[str, str]) -> Request:
    """The request that goes on where a job's ended. Raises JobUsageError where its verb cannot."""
    from launcher.supervisor import again as resumed

    arguments = resumed(json.loads(metadata.get("arguments", "[]")))
    if arguments is None:
        raise JobUsageError(
            "this job cannot go on; train, label run, evaluate and quickstart can, where `fathom submit` submitted them"
        )
    return Request(
        arguments=tuple(arguments),
        typed=tuple(resumed(json.loads(metadata.get("typed", "[]"))) or arguments),
        name=metadata["run"],
        run_folder=metadata.get("run_folder"),
        config=metadata.get("config"),
    )


def environment(items: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, or `NAME` for this machine's value. Raises JobUsageError, for secrets too: all could read them."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise JobUsageError(f"--env {item!r}: expected NAME=VALUE, or NAME of a variable that is set here")
        if _SECRET.search(name):
            raise JobUsageError(
                f"--env {name}: looks like a secret, and whoever sees the cluster's dashboard can read a job's "
                "variables; set it where the cluster's nodes are started"
            )
        if not equals and name not in os.environ:
            raise JobUsageError(f"--env {name}: not set here; give --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _resolved(verb: str, params: Mapping[str, Any]) -> Any:
    from trainer.config import read_config

    overrides = params.get("overrides") or []
    if verb == "train":
        from trainer.config_train import TrainConfig

        return read_config(TrainConfig, params["config"], overrides)
    from trainer.config_evaluate import EvaluateConfig

    return read_config(EvaluateConfig, params["config"], overrides)


def _without_config(arguments: Sequence[str], path: str) -> tuple[str, ...]:
    """The arguments with CONFIG for the file, and without `--set`, which is in it already."""
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word == "--set":
            next(rest)
        elif not word.startswith("--set="):
            kept.append(word)
    kept[kept.index(path)] = CONFIG_WORD
    return tuple(kept)


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise JobUsageError(
            f"--name: {name!r}; letters, digits, '.', '_' and '-', beginning with a letter or digit, 100 at most"
        )
    return name
