"""The process that a submitted job consists of: it runs a verb, and runs it again when it was killed or preempted.

    python -m launcher.supervisor [--restarts N] -- VERB ARGUMENTS

A driver that is killed (out of memory, `kill -9`) cannot start itself again. Only verbs that go on where they stopped
are started again. Signals are passed on to the verb, and it is waited for: whoever stops the job decides how long.
Where this process itself is killed, the verb gets SIGTERM from the kernel: it saves and ends, and no driver is left of
a job that Ray calls failed. Standard library only, since this must start where nothing else does.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

BEGIN_OR_RESUME = "--begin-or-resume"
TRY_AGAIN = 75  # preempted, with a checkpoint
RESTARTS = 5  # in a row, each sooner than STEADY_S
STEADY_S = 600.0  # a verb that ran so long got somewhere
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


def again(arguments: Sequence[str]) -> list[str] | None:
    """The command line that goes on where this one was cut off, or None where there is none."""
    first = list(arguments[:2])
    if first[:1] == ["train"]:
        # it may have been cut off before there was a run
        return [*arguments] if {"--resume", BEGIN_OR_RESUME} & {*arguments} else [*arguments, BEGIN_OR_RESUME]
    if first in (["label", "run"], ["label", "retry"]) or first[:1] in (["quickstart"], ["evaluate"]):
        return list(arguments)
    return None


def worth_another(status: int, stopping: bool) -> bool:
    """Whether a verb that ended with `status` (-n: killed by signal n) was cut off, rather than done or refused."""
    return not stopping and (status == TRY_AGAIN or (status < 0 and -status != signal.SIGINT))


class Supervisor:
    """Runs one verb to its end. `run` is called in the main thread."""

    def __init__(
        self, arguments: Sequence[str], restarts: int = RESTARTS, program: Sequence[str] | None = None
    ) -> None:
        self._arguments, self._restarts = list(arguments), restarts
        self._program = list(program or (sys.executable, "-m", "launcher.cli"))
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def run(self) -> int:
        """The exit status: the verb's own, 128 + n when signal n killed it for good."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        arguments, left = self._arguments, self._restarts
        while True:
            began = time.monotonic()
            status = self._once(arguments)
            after = again(self._arguments)
            if not worth_another(status, self._stopping.is_set()) or after is None:
                return status if status >= 0 else 128 - status
            if time.monotonic() - began >= STEADY_S:
                left = self._restarts
            if not left:
                print(f"supervisor: {said(status)}, {self._restarts + 1} times in a row; giving up", file=sys.stderr)
                return status if status >= 0 else 128 - status
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self._restarts - left))
            left -= 1
            print(f"supervisor: {said(status)}; going on in {wait_s:.0f} s", file=sys.stderr, flush=True)
            if self._stopping.wait(wait_s):
                return TRY_AGAIN
            arguments = after

    def _once(self, arguments: Sequence[str]) -> int:
        from cluster.tied import tied

        # A process group of its own: when Ray's part of the job dies, Ray kills ours with SIGKILL, and the verb is to
        # save then. Ray's stop signals every process by its number, so that the verb gets SIGTERM twice, group or
        # not; cluster/stop.py does not mind.
        self._child = subprocess.Popen(tied([*self._program, *arguments]), process_group=0)
        if self._stopping.is_set():  # it came while there was no child
            self._child.send_signal(signal.SIGTERM)
        try:
            return self._child.wait()
        finally:
            self._child = None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()
        child = self._child
        if child is not None and child.returncode is None:
            child.send_signal(number)


def said(status: int) -> str:
    """What became of the verb."""
    return "preempted" if status == TRY_AGAIN else f"killed by {signal.Signals(-status).name}"


def main(argv: Sequence[str]) -> int:
    """The module's command line."""
    options, dashes, arguments = list(argv), "--", []
    if dashes in options:
        place = options.index(dashes)
        options, arguments = options[:place], options[place + 1 :]
    restarts = RESTARTS
    if options[:1] == ["--restarts"] and len(options) == 2 and options[1].isdecimal():
        restarts, options = int(options[1]), []
    if options or not arguments:
        print("usage: python -m launcher.supervisor [--restarts N] -- VERB ARGUMENTS", file=sys.stderr)
        return 2
    return Supervisor(arguments, restarts).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
