"""`micro_batch: auto`: the largest number of rows that fits, the same on every rank, the global batch kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.worker import WorkerContext
from tests.trainer.batches import encoder_file, task_of, train_config
from tests.trainer.ranks import run_ranks
from trainer import autobatch
from trainer.autobatch import (
    engine_bytes,
    free_memory,
    largest_that_fits,
    made_up_batch,
    main_memory_bytes,
    micro_batch_count,
    peak_bytes,
    share_of,
)
from trainer.config import ConfigError
from trainer.config_train import EngineSection


@pytest.mark.parametrize(
    ("room", "rows", "expected"),
    [
        (99, 8, 0), (100, 8, 1), (149, 8, 1), (150, 8, 2), (199, 8, 2), (200, 8, 3), (10_000, 8, 8), (10_000, 1, 1),
        (449, 64, 7),
    ],
)  # fmt: skip
def test_the_largest_that_fits_a_line(room: int, rows: int, expected: int) -> None:
    """50 bytes a row and 50 of their own."""
    asked: list[int] = []

    def measure(n: int) -> int:
        asked.append(n)
        return 50 + 50 * n

    assert largest_that_fits(measure, room, rows) == expected
    assert max(asked) <= rows


@pytest.mark.parametrize(("first", "rows"), [(2, 512), (10, 512), (10, 32), (1, 100_000)])
def test_a_first_line_that_is_too_steep_costs_few_passes(first: int, rows: int) -> None:
    """The second row took `first` times what later ones do: the next points correct the line."""
    asked: list[int] = []

    def measure(n: int) -> int:
        asked.append(n)
        return 100 + first * 50 * min(n - 1, 1) + 50 * max(n - 2, 0)

    room = measure(rows) + 10
    asked.clear()
    assert largest_that_fits(measure, room, rows) == rows
    assert len(asked) <= 5 and max(asked) <= rows


def test_where_memory_runs_out_it_takes_fewer() -> None:
    """A line promises 16 rows; from 9 on there is no memory, whatever was measured."""
    asked: list[int] = []

    def measure(n: int) -> int | None:
        asked.append(n)
        return 10 * n if n < 9 else None

    assert largest_that_fits(measure, 10_000, 16) == 8
    assert asked == [1, 2, 16, 9, 5, 7, 8]
    assert largest_that_fits(lambda n: None, 10_000, 16) == 0
    assert largest_that_fits(lambda n: 10 if n == 1 else None, 10_000, 16) == 1


def test_what_the_engine_needs_falls_with_every_stage() -> None:
    """Bytes of fp32 on 4 ranks: 10^9 parameters with a full gradient bucket, 1,000 with one of their size."""
    needs = [engine_bytes(10**9, EngineSection(zero_stage=stage), 4) for stage in (0, 1, 2, 3)]
    assert needs == [8 * 10**9, 6 * 10**9, 6 * 10**9, 6 * 10**9]
    assert engine_bytes(1000, EngineSection(zero_stage=2), 4) == 2000 + 2000 + 4000


def test_offload_leaves_the_device_a_bucket() -> None:
    """Master weights, their gradients and the moments are in main memory: 16 bytes each, and what travels."""
    for stage in (1, 2, 3):
        engine = EngineSection(zero_stage=stage, cpu_offload=True)
        assert engine_bytes(1000, engine, 4) == 4000
        assert main_memory_bytes(1000, engine, 4) == (6000 if stage == 2 else 5000)
        assert main_memory_bytes(1000, EngineSection(zero_stage=stage), 4) == 0


@pytest.mark.parametrize("kind", ["teacher", "student", "pretext"])
def test_made_up_rows_go_through_every_task_and_leave_no_gradient(tmp_path: Path, kind: str) -> None:
    config = train_config(kind, encoder_file(tmp_path, "tiny"))
    task = task_of(config)
    module = task.build()
    for rows in (1, 5, share_of(config, 1)):
        batch = made_up_batch(task, config, rows, torch.device("cpu"))
        assert len(batch) == rows == sum(count for _, count in batch.roles)
        assert batch.rows(max(task.needs)) != slice(0, 0)  # the role that costs most is there
        sums = task.sums(module, batch)
        assert torch.stack(list(sums.values())).sum().isfinite()
    peak = peak_bytes(task, module, config, 4, torch.device("cpu"))
    assert peak is not None and peak >= 0
    assert all(p.grad is None for p in module.parameters())


def test_more_rows_take_more_each_time_they_are_measured() -> None:
    """No first call in it, no gradient of an earlier one, no memory that was kept: 1, 2, 4, and 1 again."""
    config = train_config("teacher", model={"preset": "v2-vits"})
    config = config.model_copy(update={"data": replace(config.data, input_size=112)})
    task = task_of(config)
    module = task.build()
    peak_bytes(task, module, config, 1, torch.device("cpu"))
    one, two, four, again = (peak_bytes(task, module, config, n, torch.device("cpu")) for n in (1, 2, 4, 1))
    assert one and two and four and again
    assert one < two < four
    assert abs(again - one) < 0.3 * one
    assert one > 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)  # gradients are in it


def test_a_peak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB that a step takes and gives back."""
    config = train_config("teacher")
    task = task_of(config)
    module = task.build()
    real = task.sums

    def heavy(forward: Any, batch: Any) -> Any:
        torch.ones(16 << 20).sum()
        return real(forward, batch)

    monkeypatch.setattr(task, "sums", heavy)
    peak = peak_bytes(task, module, config, 1, torch.device("cpu"))
    assert peak is not None and 60 << 20 <= peak < 256 << 20  # whole pages
    assert free_memory(torch.device("cpu")) > 64 << 20


def chosen(rank: int, world_size: int, free: list[int], rows: int) -> Any:
    """What the ranks agree on when each has its own memory; the peak is a line."""
    autobatch.free_memory = lambda device: free[rank]  # type: ignore[assignment]
    autobatch.peak_bytes = lambda task, module, config, n, device: (1 << 20) * n  # type: ignore[assignment]
    config = train_config("teacher", engine={"precision": "fp32", "micro_batch": "auto"})
    task = task_of(config)
    module = task.build()
    context = WorkerContext(rank=rank, world_size=world_size)
    try:
        count = micro_batch_count(config, task, module, context, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    assert all(p.grad is None for p in module.parameters())
    return count


def test_the_rank_with_least_memory_decides_for_all(tmp_path: Path) -> None:
    """Two ranks share a machine; 8 rows are 4 a rank. The engine's own needs come off first."""
    module = task_of(train_config("teacher")).build()
    needs = engine_bytes(sum(p.numel() for p in module.parameters() if p.requires_grad), EngineSection(), 2)
    plenty, tight = 2 * (100 << 20), int(2 * (needs + (2 << 20) + 4096) / autobatch.SHARE_OF_FREE)
    assert run_ranks(chosen, 2, tmp_path / "a", [plenty, plenty], 4) == [1, 1]
    assert run_ranks(chosen, 2, tmp_path / "b", [plenty, tight], 4) == [2, 2]
    for message in run_ranks(chosen, 2, tmp_path / "c", [plenty, 1 << 20], 4):
        assert "engine.micro_batch: auto: not even one row of 28 pixels fits" in message
        assert "model.activation_checkpointing" in message and "\n" not in message


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_offload_makes_room_on_a_device_of_its_own(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where main memory is the device's memory, nothing is won by it."""
    engine = {"precision": "fp32", "micro_batch": "auto", "cpu_offload": True, "zero_stage": 2}
    config = train_config("teacher", engine=engine)
    task = task_of(config)
    module = task.build()
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    rooms = []
    monkeypatch.setattr(autobatch, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(autobatch, "peak_bytes", lambda *arguments: 1)
    monkeypatch.setattr(autobatch, "largest_that_fits", lambda measure, room, rows: rooms.append(room) or 1)
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: real(value))
    micro_batch_count(config, task, module, WorkerContext(), torch.device(device))
    taken = int(autobatch.SHARE_OF_FREE * (1 << 30)) - rooms[0]
    assert taken == 4 * parameters + (24 * parameters if device == "cpu" else 0)


@pytest.mark.parametrize(("size", "expected"), [(None, 1), (3, 3), (8, 1), (1, 8), (100, 1)])
def test_a_number_is_taken_as_it_is(size: int | None, expected: int) -> None:
    config = train_config("teacher", engine={"precision": "fp32", "micro_batch": size})
    task = task_of(config)
    assert micro_batch_count(config, task, task.build(), WorkerContext(), torch.device("cpu")) == expected
