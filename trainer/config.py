"""One way to read a configuration: YAML file, `--set a.b=c` overrides, strict types, errors that say what to change.

The sections themselves are in config_train.py, config_label.py and config_evaluate.py.
Imports no torch: `fathom train --help` and submitting a job must answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

# Keys whose values are paths, wherever they stand; a task's own option that names a file belongs here too.
PATHS = frozenset({"runs", "encoder_weights", "weights", "dataset", "out", "frozen_encoder", "cache", "telemetry"})
PATH_LISTS = frozenset({"datasets", "labels"})


# Types of pydantic's errors.
UNKNOWN_KEY = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
MISSING = frozenset({"missing", "missing_keyword_only_argument"})


class ConfigError(ValueError):
    """The configuration is wrong: names the field, what was found and what is allowed. Ends a command with status 2."""

    exit_status = 2


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Finding(NamedTuple):
    """What is wrong with several fields together: the line, and the fields that it is read from."""

    says: str
    reads: tuple[str, ...]


def complain(findings: Iterable[Finding], info: ValidationInfo) -> None:
    """For validators: an error, or, where the context is a list of all that is wrong (salvage.py), some more of it."""
    found = list(findings)
    if isinstance(info.context, list):
        info.context.extend(found)
    elif found:
        raise ValueError("; ".join(finding.says for finding in found))


C = TypeVar("C", bound=BaseModel)


def parse_config(cls: type[C], values: Mapping[str, Any], *, source: str = "configuration", prefix: str = "") -> C:
    """Validate plain values as `cls`. Raises ConfigError with every mistake, one clause each, in a single line.

    `prefix` stands before every field's name, for values that are a part of a larger configuration.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        clauses = [prefix + clause(cls, item) for item in errors_of(error, values)]
        raise ConfigError(f"{source}: " + "; ".join(clauses)) from None


def read_config(cls: type[C], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply `a.b=c` overrides, validate. Local paths become absolute.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, an unknown key or a wrong value.
    """
    values = read_values(path)
    for override in overrides:
        apply_override(values, override)
    return parse_config(cls, absolute_paths(values), source=str(path))


def read_values(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file's mapping, as it stands there. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such configuration file; `fathom recipes list` names complete ones to copy")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: found {type(values).__name__}, expected a mapping of sections such as `task:`, `data:`"
        )
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; c is read as YAML, so that `[1, 2]`, `null` and `1e-4` mean what they say."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, for example optim.encoder_lr=1e-5")
    node: Any = values
    *parents, leaf = key.split(".")
    for number, parent in enumerate(parents, start=1):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            whole = f"{'.'.join(parents[:number])}={'[...]' if isinstance(node, list) else 'VALUE'}"
            raise ConfigError(
                f"--set {override!r}: {parent!r} is a value, not a section; edit the file, or give all of it as YAML: "
                f"--set '{whole}'"
            )
    try:
        node[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: not valid YAML: {' '.join(str(error).split())}") from None


def absolute_paths(values: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """Make the local paths of a configuration absolute (relative to `base`, default the current folder): workers on a
    cluster have another one."""
    base = base or os.getcwd()

    def fix(path: Any) -> Any:
        return os.path.normpath(os.path.join(base, os.path.expanduser(path))) if _is_local(path) else path

    def entry(item: Any) -> Any:  # a path, or a mapping with one
        return {k: fix(v) if k == "path" else v for k, v in item.items()} if isinstance(item, dict) else fix(item)

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {k: walk(v, k) for k, v in node.items()}
        if key in PATH_LISTS and isinstance(node, list | tuple):
            return [entry(item) for item in node]
        return fix(node) if key in PATHS else node

    result = walk(dict(values), "")
    assert isinstance(result, dict)
    return result


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML: what goes into runs/NAME/config.yaml and reads back to the same values."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _is_local(path: Any) -> bool:
    return isinstance(path, str) and bool(path) and "://" not in path


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number (YAML 1.1 wants 1.0e-4), and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def errors_of(error: ValidationError, values: Any) -> list[Any]:
    """pydantic's errors; what it says of one value as each member of a union is put together, at the value's place."""
    found: list[Any] = []
    of_unions: dict[tuple[Any, ...], Any] = {}
    for item in error.errors(include_url=False):
        place = existing(values, item["loc"])
        if item["type"] in MISSING | UNKNOWN_KEY or place in ((), item["loc"]):
            found.append(item)
        elif place in of_unions:
            of_unions[place]["msg"] += f", or {item['msg'][:1].lower()}{item['msg'][1:]}"
        else:
            of_unions[place] = {**item, "loc": place}
            found.append(of_unions[place])
    return found


def existing(values: Any, location: Sequence[Any]) -> tuple[Any, ...]:
    """The part of a location that leads to something: pydantic adds the names of a union's members."""
    path: list[Any] = []
    for part in location:
        here = isinstance(values, dict) and part in values
        if not here and not (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            break
        path.append(part)
        values = values[part]
    return tuple(path)


def clause(cls: type[BaseModel], item: Any) -> str:
    """One of pydantic's errors: field, what was found, what is allowed."""
    location = [part for part in item["loc"] if part != "__root__"]
    where = ".".join(str(part) for part in location) or "configuration"
    if item["type"] in UNKNOWN_KEY:
        close = close_key(cls, location)
        hint = f"did you mean {close!r}?" if close else f"known keys: {', '.join(_keys_at(cls, location[:-1]))}"
        return f"{where}: unknown key; {hint}"
    if item["type"] in MISSING:
        return f"{where}: missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and not location:
        return message
    found = repr(item["input"])
    return f"{where}: found {found if len(found) < 200 else found[:200] + '...'}; {message[:1].lower()}{message[1:]}"


def close_key(cls: type[BaseModel], location: Sequence[Any]) -> str | None:
    """The key that an unknown one, at the end of the location, is close to."""
    close = difflib.get_close_matches(str(location[-1]), _keys_at(cls, location[:-1]), n=1)
    return close[0] if close else None


def _keys_at(cls: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Field names of the section at `location`, following models, dataclasses and mappings by their annotations."""
    from typing import get_args, get_type_hints

    node: Any = cls
    for part in location:
        hints = get_type_hints(node) if isinstance(node, type) else {}
        if part in hints:
            node = hints[part]
        elif get_args(node):  # dict[str, X] or X | None: descend into the last class among the arguments
            node = next((a for a in reversed(get_args(node)) if isinstance(a, type)), node)
    if dataclasses.is_dataclass(node):
        return [f.name for f in dataclasses.fields(node)]
    return list(getattr(node, "model_fields", {}))
