"""Settings and checks for the whole test session."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch or DeepSpeed: two test processes share two processors.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import pytest

from launcher.doctor import stale_buffers

REPOSITORY = Path(__file__).resolve().parent.parent
# The only reasons for which a test may be skipped where FATHOM_CI=1 says that everything else must run.
ALLOWED_SKIPS = (
    r"no (NVIDIA )?GPU", r"no \.\./shared/real", r"no network namespaces", r"mounting a small tmpfs needs root",
    r"no real weights", r"no IPv6",
)  # fmt: skip
# Set for a session that a test starts: other tests' buffers come and go in /dev/shm while it runs.
NESTED = "FATHOM_NESTED_TESTS"
# Python's own helper processes: they end with the interpreter.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

# What libraries leave in the temporary folder when their process ends abruptly goes with the session (pytest's own
# folders stay where they are).
_TEMPORARY = "FATHOM_TESTS_TEMPORARY"
_own_temporary = None
if _TEMPORARY not in os.environ:  # not a worker of xdist, not a session inside a session
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.gettempdir()
    os.environ[_TEMPORARY] = os.environ["TMPDIR"] = _own_temporary = tempfile.mkdtemp(prefix="ft-")
    tempfile.tempdir = None

_skips: list[tuple[str, str]] = []
_buffers_before: set[Path] = set()


# A shell that starts the session in its background has it ignore SIGINT, and every process below it: those that tests
# interrupt would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of an S3 server on loopback, as a URL."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_CONFIG_FILE", os.devnull),
        ("AWS_SHARED_CREDENTIALS_FILE", os.devnull),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        bucket = f"bucket-{secrets.token_hex(4)}"  # servers of one process share their objects
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture(scope="session")
def shared_real() -> Path:
    """A folder of real photographs and depth maps beside the checkout, where there is one."""
    folder = REPOSITORY.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("no ../shared/real")
    return folder


def left_children(patience_s: float = 5.0) -> list[psutil.Process]:
    """Child processes of this test process that do not end by themselves within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        left = [child for child in psutil.Process().children(recursive=True) if not _harmless(child)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _harmless(child: psutil.Process) -> bool:
    try:
        command = " ".join(child.cmdline())
        return child.status() == psutil.STATUS_ZOMBIE or any(helper in command for helper in HELPERS)
    except psutil.Error:
        return True


def forbidden_skips(skips: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (test, reason) pairs that may not be skipped where everything must run."""
    return [skip for skip in skips if not any(re.search(allowed, skip[1]) for allowed in ALLOWED_SKIPS)]


def _remember(nodeid: str, report: Any) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skips.append((nodeid, reason.removeprefix("Skipped: ")))


def pytest_runtest_logreport(report: Any) -> None:
    """Under xdist the controller sees every test's report."""
    _remember(report.nodeid, report)


def pytest_collectreport(report: Any) -> None:
    """A module that skips itself; under xdist only the worker sees it (see `pytest_testnodedown`)."""
    _remember(report.nodeid, report)


@pytest.hookimpl(trylast=True)  # behind the shuffling
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first (kept by `--no-loadscope-reorder`): one that begins last would run alone for minutes."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)


def pytest_sessionstart(session: pytest.Session) -> None:
    """What lies in /dev/shm already is not ours to complain about."""
    _buffers_before.update(stale_buffers())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Brings a worker's skipped modules and left processes to the controller."""
    output = getattr(node, "workeroutput", {})
    _skips.extend(tuple(skip) for skip in output.get("skips", []))
    _complaints.extend(output.get("complaints", []))


_complaints: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session that leaves processes or shared memory behind, or skipped what must run."""
    config = session.config
    worker = hasattr(config, "workerinput")
    controller = not worker and bool(getattr(config.option, "numprocesses", None))
    if not controller:
        for child in left_children():
            _complaints.append(f"left running: {child.pid} {' '.join(child.cmdline())[:150]}")
    if worker:
        config.workeroutput["complaints"] = _complaints  # type: ignore[attr-defined]
        config.workeroutput["skips"] = [skip for skip in _skips if "::" not in skip[0]]  # type: ignore[attr-defined]
        return
    for path in () if NESTED in os.environ else set(stale_buffers()) - _buffers_before:
        _complaints.append(f"left in shared memory: {path}")
    if os.environ.get("FATHOM_CI") == "1":
        for nodeid, reason in sorted(set(forbidden_skips(_skips))):
            _complaints.append(f"skipped, but must run here: {nodeid}: {reason}")
    if _complaints and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """After the last process of the session."""
    if _own_temporary:
        shutil.rmtree(_own_temporary, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says what the session left behind."""
    if _complaints:
        terminalreporter.section("the session itself failed")
        for complaint in _complaints:
            terminalreporter.line(complaint)
