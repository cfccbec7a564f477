"""How much memory training takes, from shapes alone: nothing is allocated, and no weights are read.

The network is built without storage and run forward on tensors that have a shape and nothing else; what autograd would
keep for the backward pass is counted. The rest is arithmetic: ZeRO's stages (arXiv 1910.02054, section 5).

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.autobatch import engine_bytes, main_memory_bytes
from trainer.config_train import TrainConfig
from trainer.optim import effective_stage, gathered_elements
from trainer.tasks.base import Task, make_task


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one rank. `activations`: what a forward pass of one row keeps; `weights` and the rest: once.

    Not in it: the libraries' own memory, buffers of collectives at stage 0 and of one parameter with offload, what a
    loss keeps beside the network's activations, and holes. `transient` is what autocast keeps of the weights in a
    forward pass, `gathered` what stage 3 holds whole beside its part of them. `main_memory` is beside the device's.
    """

    parameters: int  # numbers, not bytes
    trained: int  # of them
    weights: int
    gathered: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    transient: int
    activations: int
    main_memory: int

    def total(self, rows: int) -> int:
        """On the device, with `rows` rows in a forward pass."""
        engine = self.weights + self.gathered + self.gradients + self.optimizer + self.average
        return engine + self.frozen + self.transient + rows * self.activations


def footprint(config: TrainConfig, workers: int, task: Task | None = None) -> Footprint:
    """What each of `workers` ranks will hold. Takes seconds; raises ConfigError for what the task refuses."""
    task = task or make_task(config)
    task.model = config.model.model_copy(update={"weights": None, "encoder_weights": None})
    with torch.device("meta"):
        module = task.build()
    sizes = [p.numel() for p in module.parameters()]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    engine = config.engine.model_copy(update={"zero_stage": effective_stage(config.engine, workers)})
    kept = _kept(module, config, (1, 2))
    each = kept[1] - kept[0]
    cut = engine.zero_stage == 3
    return Footprint(
        parameters=sum(sizes),
        trained=trained,
        weights=4 * (-(-sum(sizes) // workers) if cut else sum(sizes)),  # of the frozen ones a part, too
        gathered=4 * gathered_elements(sizes) if cut else 0,
        gradients=_gradient_bytes(trained, engine.zero_stage, workers, offload=engine.cpu_offload),
        optimizer=engine_bytes(trained, engine, workers),
        average=4 * -(-trained // workers) if config.optim.ema_decay else 0,
        frozen=4 * task.frozen_parameters(),
        transient=max(0, kept[0] - each),
        activations=each,
        main_memory=main_memory_bytes(trained, engine, workers),
    )


def _gradient_bytes(trained: int, stage: int, workers: int, *, offload: bool) -> int:
    if stage < 2:
        return 4 * trained
    return 0 if offload else 4 * -(-trained // workers)


def _kept(module: nn.Module, config: TrainConfig, rows: Sequence[int]) -> list[int]:
    """Bytes alive at the end of a forward pass of so many rows through the trained network: what autograd keeps of it,
    and autocast's copies of weights."""
    size, low = config.data.input_size, config.engine.precision == "bf16"
    found = []
    with fake_network(module) as fake:
        for count in rows:
            image_BCHW = torch.empty(count, 3, size, size)
            with _counted(fake.train()) as total, torch.autocast("cpu", torch.bfloat16, enabled=low):
                fake(image_BCHW)
            found.append(total[0])
    return found


@contextmanager
def fake_network(module: nn.Module) -> Iterator[nn.Module]:
    """The network with tensors that have a shape and nothing else; so has every tensor that is made in the block."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield module.to_empty(device="cpu")


class _Watch(TorchDispatchMode):
    """Tells of every operator's inputs and output."""

    def __init__(self, seen: Callable[[tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._seen(args, out)
        return out


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[int]]:
    """Gives a list whose one number, after the block, is what autograd and autocast kept, the module's own tensors left
    out.

    Autocast casts a weight once, and lets go of the copy when it ends, whether or not autograd has saved it: with
    activation checkpointing, autograd saves hardly any.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]}
    trained = {p.untyped_storage()._cdata for p in module.parameters() if p.requires_grad}  # autocast keeps these only
    kept: dict[int, Any] = {}  # storages are held, or their numbers would come again
    total = [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def see(args: tuple[Any, ...], out: Any) -> None:
        given = args[0] if args else None
        if not isinstance(out, Tensor) or not isinstance(given, Tensor) or out.dtype == given.dtype:
            return
        if given.untyped_storage()._cdata in trained:
            keep(out)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _Watch(see):
        yield total
    total[0] = sum(storage.nbytes() for storage in kept.values())


def forward_peak(module: nn.Module, *, rows: int, size: int, low: bool) -> int:
    """Bytes alive at a time, at most, in a forward pass of `rows` square images without gradients; without the weights.

    `module` is one without storage, and is used up.
    """
    alive: dict[int, int] = {}
    peak = 0

    def see(args: tuple[Any, ...], out: Any) -> None:
        nonlocal peak
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in alive:
                alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, alive.pop, storage._cdata)
        peak = max(peak, sum(alive.values()))

    with fake_network(module.requires_grad_(False).eval()) as fake:
        own = {tensor.untyped_storage()._cdata for tensor in [*fake.parameters(), *fake.buffers()]}
        with _Watch(see), torch.autocast("cpu", torch.bfloat16, enabled=low), torch.no_grad():
            fake(torch.empty(rows, 3, size, size))
    return peak
