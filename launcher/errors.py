"""How a command ends: one line on stderr and the exit status of docs/decisions/0001 (see `run_main`)."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


def carrier(error: BaseException) -> BaseException | None:
    """The exception in `error`'s chain that carries an `exit_status`, the innermost one, or None.

    An error raised in a worker arrives wrapped, with the original in `cause` or `__cause__`; the original's message
    is the one line to show.
    """
    found: BaseException | None = None
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(getattr(current, "exit_status", None), int):
            found = current
        inner = getattr(current, "cause", None)
        current = inner if isinstance(inner, BaseException) else current.__cause__
    return found


def _say(text: str) -> None:
    """Every line of `text` is one thing that is wrong."""
    for line in text.splitlines() or [""]:
        if line.strip():
            print(f"error: {line.strip()}", file=sys.stderr)


def _usage(error: Any) -> int:
    """A command line that the parser refused. Typer's exception classes have moved between versions: duck-typed."""
    message = error.format_message()
    if "\n" in message:  # a group called without a verb shows its help
        error.show()
        return int(error.exit_code)
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    _say(f"{message.rstrip('.')}{hint}")
    return int(error.exit_code)


def _quiet_pipe() -> None:
    """Nobody reads stdout any more: keep the interpreter's last flush from complaining."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(sink, stream.fileno())
        except (OSError, ValueError):  # a stream without a descriptor has nothing to flush there
            continue
    os.close(sink)


def status_of(error: BaseException) -> int:
    """Says what `error` means to a user and returns the exit status for it."""
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _quiet_pipe()
        return BROKEN_PIPE
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _usage(error)
    known = carrier(error)
    if known is None or os.environ.get("FATHOM_DEBUG") == "1":
        traceback.print_exception(error)
    if known is None:
        _say(f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    _say(str(known) or type(known).__name__)
    return int(known.exit_status)  # type: ignore[attr-defined]


def run_main(app: Callable[..., Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a Typer app and exits.

    0 success (or the integer that the verb returned), 2 the user's input is wrong, 1 the work failed, 130 Ctrl-C. An
    exception with an `exit_status` prints as one line; FATHOM_DEBUG=1 adds its traceback. Anything else is a bug of
    ours and always shows its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        try:
            result = app(args=arguments, prog_name="fathom", standalone_mode=False)
            status = result if isinstance(result, int) and not isinstance(result, bool) else 0
        except Exception as error:  # noqa: BLE001 - the last handler of the process
            status = status_of(error)
        except KeyboardInterrupt as error:
            status = status_of(error)
        sys.stdout.flush()
    except BrokenPipeError as error:
        status = status_of(error)
    sys.exit(status)
