"""Processors and memory as a container's limits leave them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import machine


@pytest.mark.parametrize(
    ("limit", "cpus", "whole"), [("150000 100000", 1.5, 1), ("20000 100000", 0.2, 1), ("max 100000", None, None)]
)
def test_a_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, cpus: float | None, whole: int | None
) -> None:
    everything = len(os.sched_getaffinity(0))
    if cpus is not None and everything < cpus:
        pytest.skip("one processor")
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert machine.usable_cpus() == everything  # no group at all
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert machine.usable_cpus() == (cpus or everything)
    assert machine.whole_cpus() == (whole or everything)


def test_a_group_s_memory_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    free = machine.free_memory()
    assert free > 64 << 20
    (tmp_path / "memory.current").write_text("3000\n")
    for limit, left in (("5000", 2000), ("2000", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert machine.free_memory() == left
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory() > 64 << 20
