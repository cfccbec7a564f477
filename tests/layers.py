"""Reads a module's imports and says which break the arrows of the house (docs/decisions/0001-the-house.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

# Room -> the prefixes of our own modules that it may import, at any depth of nesting.
ARROWS: dict[str, tuple[str, ...]] = {
    "launcher": ("trainer", "cluster", "dataio", "model"),
    "trainer": ("model", "dataio", "kernels", "cluster"),
    "model": (),
    "dataio": ("cluster.storage",),
    "kernels": (),
    "cluster": (),
}
# Library -> the only files that may import it.
OWNERS: dict[str, tuple[str, ...]] = {
    "ray": ("cluster/*", "launcher/jobs.py"),
    "deepspeed": ("trainer/engine*.py",),
    "nvidia.dali": ("dataio/dali_*.py",),
    "triton": ("kernels/triton_*.py",),
}
# Files that answer at once: nothing of HEAVY while they are imported.
LIGHT = (
    "launcher/*", "trainer/config*.py", "dataio/spec.py", "dataio/types.py", "kernels/__init__.py", "model/types.py",
)  # fmt: skip
HEAVY = ("torch", "torchvision", "timm", "ray", "deepspeed", "nvidia", "triton", "webdataset")
# What launcher's modules may import of the other rooms at module level; the rest inside the verb that needs it.
LIGHT_MODULES = (
    "trainer.config", "trainer.config_train", "trainer.config_label", "trainer.config_evaluate", "dataio.spec",
    "dataio.types", "model.types",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One imported module, dotted; `at_import` is False inside a function or under TYPE_CHECKING."""

    name: str
    line: int
    at_import: bool


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _named(node: ast.AST, package: list[str]) -> list[str]:
    """The modules that one statement or call imports; for `from a import b` both a and a.b count as a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{stem}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        target = ast.unparse(node.func).rsplit(".", 1)[-1]
        name = node.args[0].value
        if target in ("import_module", "__import__", "importorskip") and isinstance(name, str) and name[:1] != ".":
            return [name]
    return []


def imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a module at `path` (relative to the repository), those in functions too."""
    package = list(Path(path).parent.parts)

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for name in _named(child, package):
                yield Import(name, getattr(child, "lineno", 0), at_import)
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(child)
            yield from walk(child, at_import and not lazy)

    yield from walk(ast.parse(source, filename=path), True)


def _problems(found: Import, path: str) -> Iterator[str]:
    room = path.split("/", 1)[0]
    target = found.name.split(".", 1)[0]
    if target in ARROWS and target != room and not any(_within(found.name, allowed) for allowed in ARROWS[room]):
        yield f"{room} may not import {found.name}"
    for library, owners in OWNERS.items():
        if _within(found.name, library) and not any(fnmatch(path, owner) for owner in owners):
            yield f"only {', '.join(owners)} may import {library}"
    if not found.at_import or not any(fnmatch(path, light) for light in LIGHT):
        return
    if target in HEAVY:
        yield f"imports {target} while it is imported; import it inside the function that needs it"
    ours = target in ARROWS and target != room
    if room == "launcher" and ours and not any(_within(found.name, light) for light in LIGHT_MODULES):
        yield f"imports {found.name} while it is imported; import it inside the verb that needs it"


def violations(source: str, path: str) -> list[str]:
    """What `source`, standing at `path`, may not import: one line each, empty when the house is in order."""
    return [f"{path}:{found.line}: {problem}" for found in imports(source, path) for problem in _problems(found, path)]
