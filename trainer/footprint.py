"""How much memory training takes, from shapes alone: nothing is allocated, and no weights are read.

The network is built without storage and run forward on tensors that have a shape and nothing else; what autograd would
keep for the backward pass is counted. The rest is arithmetic: ZeRO's stages (arXiv 1910.02054, section 5).

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.autobatch import engine_bytes
from trainer.config_train import TrainConfig
from trainer.optim import effective_stage
from trainer.tasks.base import make_task


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one rank. `activations`: what a forward pass of one row keeps; `weights` and the rest: once.

    Not in it: the libraries' own memory, buffers of collectives at stage 0, what a loss keeps beside the network's
    activations, and holes. `transient` is what autocast keeps of the weights in a forward pass.
    """

    parameters: int  # numbers, not bytes
    trained: int  # of them
    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    transient: int
    activations: int

    def total(self, rows: int) -> int:
        """With `rows` rows in a forward pass."""
        once = self.weights + self.gradients + self.optimizer + self.average + self.frozen + self.transient
        return once + rows * self.activations


def footprint(config: TrainConfig, workers: int) -> Footprint:
    """What each of `workers` ranks will hold. Takes seconds; raises ConfigError for what the task refuses."""
    task = make_task(config)
    task.model = config.model.model_copy(update={"weights": None, "encoder_weights": None})
    with torch.device("meta"):
        module = task.build()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in module.parameters())
    share = -(-trained // workers)
    engine = config.engine.model_copy(update={"zero_stage": effective_stage(config.engine, workers)})
    kept = _kept(module, config, (1, 2))
    each = kept[1] - kept[0]
    cut = engine.zero_stage == 3
    return Footprint(
        parameters=whole,
        trained=trained,
        weights=4 * (share + whole - trained if cut else whole),
        gradients=4 * (share if engine.zero_stage >= 2 else trained),
        optimizer=engine_bytes(trained, engine, workers),
        average=4 * share if config.optim.ema_decay else 0,
        frozen=4 * task.frozen_parameters(),
        transient=max(0, kept[0] - each),
        activations=each,
    )


def _kept(module: nn.Module, config: TrainConfig, rows: Sequence[int]) -> list[int]:
    """Bytes that autograd keeps of a forward pass of so many rows through the trained network."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    size, low = config.data.input_size, config.engine.precision == "bf16"
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = module.to_empty(device="cpu").train()
        for count in rows:
            image_BCHW = torch.empty(count, 3, size, size)
            with _counted(module) as total, torch.autocast("cpu", torch.bfloat16, enabled=low):
                module(image_BCHW)
            found.append(total[0])
    return found


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[int]]:
    """Gives a list whose one number, after the block, is what autograd kept, the module's own tensors left out."""
    own = {tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Any] = {}  # storages are held, or their numbers would come again
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total[0] = sum(storage.nbytes() for storage in kept.values())
