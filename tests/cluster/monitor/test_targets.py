"""What is announced and alive is to be scraped, whatever else lies in the folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.announce import write_entry
from cluster.monitor import targets as module
from cluster.monitor.targets import SILENT_S, Targets, announcing, refused

NODE = socket.gethostname()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mute() -> Iterator[str]:
    """An address that neither answers nor refuses: its queue is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield address(server)


def address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def announce(folder: Path, where: str, **labels: str) -> Path:
    return Path(write_entry(str(folder), where, {"run": "r", "role": "train", "node": NODE, **labels}))


def written(path: Path) -> list[str]:
    return [where for group in json.loads(path.read_text()) for where in group["targets"]]


def test_a_process_is_there_as_long_as_it_listens(tmp_path: Path, listener: socket.socket) -> None:
    runs, out = tmp_path / "runs", tmp_path / "targets.json"
    entry = announce(runs / "teacher" / "telemetry", address(listener), rank="1")
    targets = Targets([str(runs)], str(out))
    (found,) = targets.look().targets
    assert (found.address, found.path, found.labels["rank"]) == (address(listener), str(entry), "1")
    [group] = json.loads(out.read_text())
    assert group == {"targets": [address(listener)], "labels": {"run": "r", "role": "train", "node": NODE, "rank": "1"}}
    listener.close()  # as kill -9 does: the entry stays behind
    assert targets.look().targets == []
    assert written(out) == []
    assert entry.exists()


def test_an_entry_that_nobody_touches_is_left_out(tmp_path: Path, listener: socket.socket, clock: Clock) -> None:
    """Whatever listens there now is not what was announced, or is frozen for good."""
    runs = tmp_path / "runs"
    entry = announce(runs / "teacher" / "telemetry", address(listener))
    targets = Targets([str(runs)], None, clock)
    for touched in (True, False):
        assert len(targets.look().targets) == 1
        clock.now += SILENT_S - 1
        assert len(targets.look().targets) == 1
        if touched:
            os.utime(entry, (1, 1))  # another machine's clock may say anything: what counts is that it moves
            clock.now += 2
    clock.now += 2
    assert targets.look().targets == []
    os.utime(entry)
    assert len(targets.look().targets) == 1


def test_an_old_entry_is_nobody_s_at_first_sight(tmp_path: Path, listener: socket.socket) -> None:
    entry = announce(tmp_path / "r" / "telemetry", address(listener))
    away = announce(tmp_path / "r" / "telemetry", address(listener), node="elsewhere")
    for path in (entry, away):
        os.utime(path, (1, 1))
    seen = Targets([str(tmp_path)], None).look()
    assert seen.targets == seen.out_of_reach == []


def test_on_another_machine_loopback_is_out_of_reach(tmp_path: Path, listener: socket.socket) -> None:
    announce(tmp_path / "r" / "telemetry", address(listener), node="elsewhere")
    seen = Targets([str(tmp_path)], None).look()
    assert seen.targets == []
    assert [target.labels["node"] for target in seen.out_of_reach] == ["elsewhere"]


def test_who_does_not_answer_stays_until_it_is_silent(tmp_path: Path, mute: str, clock: Clock) -> None:
    """It is Prometheus that says `up 0` then."""
    announce(tmp_path / "r" / "telemetry", mute)
    targets = Targets([str(tmp_path)], None, clock)
    assert len(targets.look().targets) == 1
    clock.now += SILENT_S + 1
    assert targets.look().targets == []


def test_of_two_that_announce_one_address_the_later_counts(
    tmp_path: Path, listener: socket.socket, clock: Clock
) -> None:
    announce(tmp_path / "a" / "telemetry", address(listener), run="a")
    targets = Targets([str(tmp_path)], None, clock)
    targets.look()
    clock.now += 20
    announce(tmp_path / "b" / "telemetry", address(listener), run="b")
    assert [target.labels["run"] for target in targets.look().targets] == ["b"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '[{"targets": []}]', '[{"targets": ["a:1"], "labels": {}}]', '[{"targets": ["a"]}]', "null",
     *(f'[{{"targets": ["{where}"], "labels": {{"role": "train", "node": "{NODE}"}}}}]' for where in (
         "127.0.0.1:5000000000000000000000", "localhost..b:80", f"localhost{'x' * 70}:80", "127.0.0.1:99999", ":80")),
     '[{"targets": ["nowhere"], "labels": {"role": "train"}}]', "\x00\xff"],
)  # fmt: skip
def test_what_is_no_entry_is_passed_over(tmp_path: Path, listener: socket.socket, text: str) -> None:
    entry = announce(tmp_path / "r" / "telemetry", address(listener))
    entry.with_name("other.json").write_text(text)
    entry.with_name(".half.json.tmp").write_text("[")
    (entry.parent / "folder.json").mkdir()
    assert str(entry) in [target.path for target in Targets([str(tmp_path)], None).look().targets]


def test_where_entries_may_lie(tmp_path: Path) -> None:
    wanted = ["telemetry", "teacher/telemetry", "photos/labels/0123/telemetry", "data/photos/labels/0123/telemetry"]
    for name in (*wanted, "photos/shards/telemetry", "teacher/checkpoints/telemetry", ".monitor/telemetry"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "telemetry").parent.mkdir()
    (tmp_path / "a" / "telemetry").write_text("a file")
    assert sorted(announcing(str(tmp_path))) == sorted(str(tmp_path / name) for name in wanted)
    assert list(announcing(str(tmp_path / "nowhere"))) == []


def test_a_run_that_begins_later_is_found(tmp_path: Path, listener: socket.socket, clock: Clock) -> None:
    targets = Targets([str(tmp_path / "runs")], None, clock)
    assert targets.look().targets == []
    announce(tmp_path / "runs" / "late" / "telemetry", address(listener))
    clock.now += module._FOLDERS_EVERY_S
    assert len(targets.look().targets) == 1


def test_the_file_changes_when_something_does(tmp_path: Path, listener: socket.socket) -> None:
    out = tmp_path / "targets.json"
    announce(tmp_path / "r" / "telemetry", address(listener))
    targets = Targets([str(tmp_path)], str(out))
    targets.look()
    before = out.stat().st_ino
    targets.look()
    assert out.stat().st_ino == before
    out.unlink()
    targets.look()
    assert written(out) == [address(listener)]


def test_only_a_refusal_is_one(listener: socket.socket, mute: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        assert refused([address(listener), nobody, nobody, mute, "no-such-host.invalid:1"]) == {nobody}
    assert refused([]) == set()


@pytest.mark.parametrize("error", [errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ENETUNREACH])
def test_a_lost_machine_does_not_refuse(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """It is to be seen as silent."""

    class Lost(socket.socket):
        def getsockopt(self, *what: int) -> int:  # type: ignore[override]
            return error

    monkeypatch.setattr(module.socket, "socket", Lost)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert refused([address(server)]) == set()
