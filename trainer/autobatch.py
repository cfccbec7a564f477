"""How many rows a forward pass takes: as configured, or (`micro_batch: auto`) the most that fit into memory.

Before the engine exists each rank runs the task forward and backward on one and on two made-up rows, and measures the
peak. The rest is a line: rows * slope + base, held against what is free less what the engine is going to need. No
collective runs meanwhile, so a rank that runs out of memory leaves nobody waiting; at the end the smallest counts.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster import machine
from cluster.exchange import gathered
from cluster.worker import WorkerContext
from dataio.types import Batch, Target
from trainer.config import ConfigError
from trainer.config_train import EngineSection, TrainConfig
from trainer.optim import bucket_elements, effective_stage
from trainer.tasks.base import Task

SHARE_OF_FREE = 0.8  # the rest is for fragmentation, the loader's batches and what a line does not see


def micro_batch_count(
    config: TrainConfig, task: Task, module: nn.Module, context: WorkerContext, device: torch.device
) -> int:
    """Forward passes per step, the same on every rank. A collective with `auto`.

    Raises ConfigError when not even one row fits.
    """
    rows = share_of(config, context.world_size)
    size = config.engine.micro_batch
    if size == "auto":
        size = _largest(config, task, module, context, device, rows)
    return -(-rows // min(size, rows)) if size else 1


def circumstances(config: TrainConfig, world_size: int, device: torch.device) -> dict[str, Any]:
    """What the memory of a row hangs on beside task, network and data, which a run keeps: JSON values."""
    engine = config.engine
    found: dict[str, Any] = {
        "workers": world_size,
        "precision": engine.precision,
        "zero_stage": engine.zero_stage,
        "cpu_offload": engine.cpu_offload,
        "averaged": config.optim.ema_decay is not None,
        "activation_checkpointing": config.model.activation_checkpointing,
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_bytes": properties.total_memory}
    return found


def share_of(config: TrainConfig, world_size: int) -> int:
    """The most rows of a global batch that one rank gets."""
    return sum(spec.batch // spec.lanes * (-(-spec.lanes // world_size)) for spec in config.data.roles.values())


def _largest(
    config: TrainConfig, task: Task, module: nn.Module, context: WorkerContext, device: torch.device, rows: int
) -> int:
    module.train().to(device)  # before looking what is free: the weights are no longer to come
    free = free_memory(device) // (1 if device.type == "cuda" else ranks_here(context))
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    average = 4 * parameters // context.world_size if config.optim.ema_decay else 0
    section = config.engine.model_copy(update={"zero_stage": effective_stage(config.engine, context.world_size)})
    needs = engine_bytes(parameters, section, context.world_size) + average
    if device.type == "cpu":  # main memory is the device's
        needs += main_memory_bytes(parameters, section, context.world_size)
    room = int(SHARE_OF_FREE * free) - needs
    peak_bytes(task, module, config, 1, device)  # libraries and kernels take their memory at the first call
    fits = largest_that_fits(lambda n: peak_bytes(task, module, config, n, device), room, rows)
    smallest = torch.tensor(fits, device=device)
    if context.world_size > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    if not int(smallest):
        raise ConfigError(
            f"engine.micro_batch: auto: not even one row of {config.data.input_size} pixels fits into "
            f"{free / 2**30:.1f} GiB; use model.activation_checkpointing, a higher engine.zero_stage, "
            "engine.cpu_offload or a smaller network"
        )
    return int(smallest)


def largest_that_fits(measure: Callable[[int], int | None], room: int, rows: int) -> int:
    """The largest number of rows, up to `rows`, whose peak stays within `room` bytes, from 32 rows on to a sixteenth; 0
    when one row does not fit.

    `measure(n)` gives the peak of n rows, or None when memory ran out.
    """
    one = measure(1)
    if one is None or one > room:
        return 0
    two = measure(2) if rows > 1 else None
    if two is None or two > room:
        return 1
    fits, taken, fails = 2, two, rows + 1
    slope = max(two - one, 1)
    probe = min(rows, 2 + (room - two) // slope)
    while probe > fits:
        peak = measure(probe)
        if peak is not None and peak <= room:
            slope = max((peak - taken) // (probe - fits), 1)
            fits, taken = probe, peak
        else:
            fails = probe
        near = max(1, fits // 16)
        if fails > rows:  # nothing has failed: on along the line through the last two
            probe = min(rows, fits + max(near, (room - taken) // slope))
        else:
            probe = (fits + fails) // 2 if fails - fits > near else fits
    return fits


def engine_bytes(parameters: int, engine: EngineSection, world_size: int) -> int:
    """What the engine takes beside the weights and one set of gradients: two moments, the fp32 partition, its gradient.

    By ZeRO stage (arXiv 1910.02054, section 5): 0 keeps all of it on every rank, the others cut it, and gather
    gradients in a bucket, which is all that `cpu_offload` leaves on the device. Stages 2 and 3 cut gradients too, which
    the measured peak holds whole: there the estimate is on the safe side.
    """
    if engine.zero_stage == 0:
        return 8 * parameters
    bucket = 4 * bucket_elements(parameters)
    return bucket if engine.cpu_offload else 16 * -(-parameters // world_size) + bucket


def main_memory_bytes(parameters: int, engine: EngineSection, world_size: int) -> int:
    """What `cpu_offload` takes of a rank's main memory: moments, the fp32 partition, its gradient, and a buffer by
    which weights (at stage 3 gradients) travel. Stage 2 adds up there the gradients of several forward passes, too."""
    if not engine.cpu_offload:
        return 0
    return (24 if engine.zero_stage == 2 else 20) * -(-parameters // world_size)


def peak_bytes(task: Task, module: nn.Module, config: TrainConfig, rows: int, device: torch.device) -> int | None:
    """Peak memory of a forward and backward pass on `rows` made-up rows, beyond what is used now; None: it ran out."""
    module.zero_grad(set_to_none=True)  # gradients are part of every peak, or of none
    give_back_memory(device)
    try:
        batch = made_up_batch(task, config, rows, device)
        low = config.engine.precision == "bf16"
        with _peak(device) as peak, torch.autocast(device.type, torch.bfloat16, enabled=low):
            sums = task.sums(module, batch)
            torch.stack(list(sums.values())).sum().backward()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what PyTorch's CPU allocator says
            raise
        return None
    finally:
        module.zero_grad(set_to_none=True)
        give_back_memory(device)
    return peak[0]


def give_back_memory(device: torch.device) -> None:
    """Return what is free to the device or the system, so that a peak is measured from the same level each time."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # of glibc; other allocators give back by themselves
        ctypes.CDLL(None).malloc_trim(0)


def made_up_batch(task: Task, config: TrainConfig, rows: int, device: torch.device) -> Batch:
    """Rows as a rank would get them, the last roles first: those cost a student its frozen encoder as well."""
    size = config.data.input_size
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    counts, left = [], rows
    for role in sorted(task.needs, reverse=True):
        taken = min(left, config.data.roles[role].batch)
        counts.append((role, taken))
        left -= taken
    last, taken = counts[0]
    counts[0] = (last, taken + left)
    region_BHW = torch.ones(rows, size, size, dtype=torch.uint8, device=device)
    if last == "unlabelled":  # as CutMix would
        region_BHW[-counts[0][1] :, size // 4 : size // 2, size // 4 :] = 2
    return Batch(
        views={name: rand(rows, 3, size, size) for name in task.views},
        targets={
            "disparity": Target(value_BHW=rand(rows, size, size), quantity="disparity"),
            "depth_m": Target(value_BHW=rand(rows, size, size) + 1, quantity="depth_m"),
        },
        region_BHW=region_BHW,
        weight_B=torch.ones(rows, device=device),
        roles=tuple(reversed(counts)),
        keys=tuple(f"made_up_{i}" for i in range(rows)),
        cursor=dict.fromkeys(task.needs, 0),
    )


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Gives a list whose one number, after the block, is the block's peak in bytes beyond what was used before."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is used now
    before = _status("VmRSS")
    yield peak
    peak[0] = max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now, of the GPU or of main memory."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else machine.free_memory()


def ranks_here(context: WorkerContext) -> int:
    """Ranks that share this machine's memory. A collective."""
    return gathered(socket.gethostname()).count(socket.gethostname())
