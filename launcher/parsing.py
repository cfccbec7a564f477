"""A command line that is looked at, not run: for the verbs that are about other verbs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


class NotAVerb(ValueError):
    """The words are none of fathom's verbs, or none that are allowed here."""

    exit_status = 2


def parsed(arguments: Sequence[str], refused: Collection[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """A verb's words and its parameters, as its own parser reads them.

    Raises NotAVerb, and what the parser raises for a wrong command line. `refused`: first words that are not allowed.
    """
    import typer.main

    from launcher.cli import build_app

    command: Any = typer.main.get_command(build_app())
    context: Any = None
    words: list[str] = []
    rest = list(arguments)
    while True:
        name = words[-1] if words else "fathom"
        group = hasattr(command, "get_command")
        extra: dict[str, Any] = {"allow_extra_args": True} if group else {}
        context = command.make_context(name, list(rest), parent=context, **extra)
        if not group:
            return words, dict(context.params)
        word = rest[0] if rest else ""
        found = command.get_command(context, word)
        if found is None or (not words and word in refused):
            known = [one for one in command.list_commands(context) if words or one not in refused]
            raise NotAVerb(f"VERB: {' '.join([*words, word])!r} is none that can be used here; {', '.join(known)}")
        words, rest, command = [*words, word], rest[1:], found
