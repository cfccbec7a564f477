"""Prints what is where: every module of the rooms with the first sentence of its docstring.

    .venv/bin/python tools/house_map.py [ROOM ...]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("launcher", "trainer", "dataio", "model", "kernels", "cluster")


def modules(rooms: Sequence[str] = ROOMS) -> Iterator[tuple[str, str]]:
    """(path from the root, first paragraph of the docstring in one line) of every module that has code."""
    for room in rooms:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if text.strip():
                about = ast.get_docstring(ast.parse(text)) or ""
                yield path.relative_to(REPOSITORY).as_posix(), " ".join(about.split("\n\n")[0].split())


if __name__ == "__main__":
    for name, about in modules(sys.argv[1:] or ROOMS):
        print(f"{name:<36}  {about}")
