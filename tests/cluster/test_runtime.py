from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from cluster.runtime import ClusterAddressError, environment, ray_session, remove_shared_memory


def test_a_session_is_shared_inside_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    import ray

    before = dict(os.environ)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    children = set(psutil.Process().children())
    with ray_session(cpus=3) as session:
        assert session.embedded
        assert ray.cluster_resources()["CPU"] >= 3
        logs = Path(session.logs)
        assert logs.is_dir()
        with ray_session(cpus=1) as inner:
            assert inner is session
        with pytest.raises(ClusterAddressError, match=r"10\.0\.0\.1:6379: this process uses Ray on its own already"):
            ray_session("10.0.0.1:6379").__enter__()
        assert ray.is_initialized()
        started = set(psutil.Process().children(recursive=True)) - children
        assert started
        assert all(os.getpgid(child.pid) != os.getpgid(0) for child in started)
        assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    assert not ray.is_initialized()
    assert not logs.exists()
    assert not [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")


def test_an_address_nobody_answers_is_one_line() -> None:
    with (
        pytest.raises(ClusterAddressError, match=r"no Ray cluster answers at 127\.0\.0\.1:1") as caught,
        ray_session("127.0.0.1:1"),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_the_user_s_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_TEST_A", "user")
    with environment({"FATHOM_TEST_A": "ours", "FATHOM_TEST_B": "ours"}):
        assert (os.environ["FATHOM_TEST_A"], os.environ["FATHOM_TEST_B"]) == ("user", "ours")
    assert "FATHOM_TEST_B" not in os.environ
    assert os.environ["FATHOM_TEST_A"] == "user"


def test_shared_memory_is_removed_by_prefix_only() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("/dev/shm is Linux's")
    mine, other = Path(f"/dev/shm/fathom-test-{os.getpid()}_0"), Path(f"/dev/shm/fathom-tesu-{os.getpid()}_0")
    mine.touch()
    other.touch()
    try:
        remove_shared_memory(f"fathom-test-{os.getpid()}_")
        remove_shared_memory("")
        remove_shared_memory("../shm/fathom")
        assert not mine.exists()
        assert other.exists()
    finally:
        mine.unlink(missing_ok=True)
        other.unlink()
