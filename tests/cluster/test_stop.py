from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from cluster.stop import StopFlag, Stopped, exit_status


@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 75)]
)
def test_the_first_signal_sets_the_reason_once(number: signal.Signals, name: str, status: int) -> None:
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with StopFlag(grace_s=10.0) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.wait(5.0)
        assert stop.reason == name
        assert (stop.deadline is not None) == (name == "SIGTERM")
        assert stop.deadline is None or 0 < stop.deadline - time.time() <= 10
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert exit_status(name) == status
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_a_flag_nobody_has_set_survives_a_default() -> None:
    stop = StopFlag()
    assert (stop or StopFlag()) is stop


def test_it_is_a_plain_flag_elsewhere() -> None:
    stop = StopFlag()
    stop.set("PREEMPTED", deadline=1.0)
    stop.set("SIGINT")
    assert (stop.reason, stop.deadline, exit_status("PREEMPTED")) == ("PREEMPTED", 1.0, 75)
    with pytest.raises(KeyError):
        StopFlag().set("lunch")
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with StopFlag():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_work_without_signals_asks_by_itself() -> None:
    flag = StopFlag()
    flag.check()
    flag.set("PREEMPTED")
    with pytest.raises(Stopped, match="stopped by PREEMPTED") as caught:
        flag.check()
    assert caught.value.reason == "PREEMPTED"
