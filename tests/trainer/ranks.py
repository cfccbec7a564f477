"""Runs a function on several ranks of a gloo process group, in fresh processes, and returns what each gave."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(fn: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[Any]:
    """`[fn(rank, world_size, *args) for every rank]`, each in a process of its own; `fn` is a module's function."""
    import torch.multiprocessing as mp

    folder.mkdir(parents=True, exist_ok=True)
    # DeepSpeed names its shared memory by this port; nothing listens there. Tests in parallel must not share it.
    port = str(100_000 + os.getpid())
    try:
        mp.spawn(_child, (fn, world_size, str(folder), port, args), nprocs=world_size)
    finally:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def kill_ranks(fn: Callable[..., Any], world_size: int, folder: Path, when: Callable[[], bool], *args: Any) -> None:
    """Start `fn` on every rank and kill all of them (SIGKILL) as soon as `when()`; they must not end by themselves."""
    import torch.multiprocessing as mp

    folder.mkdir(parents=True, exist_ok=True)
    port = str(100_000 + os.getpid())
    context = mp.spawn(_child, (fn, world_size, str(folder), port, args), nprocs=world_size, join=False)
    deadline = time.monotonic() + 240
    try:
        while not when():
            assert all(process.is_alive() for process in context.processes), "a rank ended before it was killed"
            assert time.monotonic() < deadline, "the moment to kill the ranks did not come"
            time.sleep(0.005)
    finally:
        for process in context.processes:
            process.kill()
        for process in context.processes:
            process.join()
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink()


def _child(rank: int, fn: Callable[..., Any], world_size: int, folder: str, port: str, args: tuple[Any, ...]) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size), CROSS_RANK="0", CROSS_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    cut_small_parameters()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    result = fn(rank, world_size, *args)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def cut_small_parameters() -> None:
    """ZeRO-3 as it is for large networks: DeepSpeed keeps parameters below 100,000 elements whole and gathers ahead."""
    import trainer.engine as module

    real = module.deepspeed_config
    eager = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")

    @functools.wraps(real)
    def config(*args: Any) -> dict[str, Any]:
        made = real(*args)
        if made["zero_optimization"]["stage"] == 3:
            made["zero_optimization"] |= {f"stage3_{name}": 0 for name in eager}
        return made

    module.deepspeed_config = config
