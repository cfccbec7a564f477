"""The build of DeepSpeed's operator: a killed builder's guard does not stop the next, and environments do not mix."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from trainer import engine_ops


def test_a_guard_left_by_a_killed_builder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for ever for this file to go away."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    guard = tmp_path / engine_ops.OPERATOR / "lock"
    guard.parent.mkdir()
    guard.touch()
    seen = {}

    class Builder:
        def load(self) -> None:
            seen["guard"] = guard.exists()

    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: Builder(), raising=False)
    engine_ops.prepare_cpu_operator()
    assert seen == {"guard": False}


def hold(folder: str, held: object, free: object) -> None:
    import fcntl

    with open(Path(folder) / "fathom.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        held.set()  # type: ignore[attr-defined]
        free.wait(30)  # type: ignore[attr-defined]


def test_builders_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    context = multiprocessing.get_context("fork")
    held, free = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), held, free))
    other.start()
    assert held.wait(10)
    loaded_at: list[float] = []

    class Builder:
        def load(self) -> None:
            loaded_at.append(time.monotonic())

    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: Builder(), raising=False)
    import threading

    mine = threading.Thread(target=engine_ops.prepare_cpu_operator)
    mine.start()
    time.sleep(0.5)
    assert loaded_at == []
    free.set()
    mine.join(10)
    other.join(10)
    assert len(loaded_at) == 1


def test_a_failed_build_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    class Builder:
        def load(self) -> None:
            raise RuntimeError("Ninja is required to load C++ extensions\nand more")

    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: Builder(), raising=False)
    with pytest.raises(engine_ops.CompilerMissing, match=r"Ninja is required.*fathom doctor") as caught:
        engine_ops.prepare_cpu_operator()
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_every_environment_has_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = engine_ops.build_folder()
    monkeypatch.setattr("sys.prefix", "/another")
    assert one != engine_ops.build_folder()
    assert one.parent == engine_ops.build_folder().parent == tmp_path / "fathom" / "operators"
