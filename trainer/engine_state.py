"""Where ZeRO keeps weights and optimizer moments, as named parts: which stretch of which parameter is this rank's.

A part is the flat stretch [start, stop) of one parameter that this rank alone is responsible for. Over all ranks the
parts of a parameter make it whole. So a checkpoint, a moving average and a fingerprint need to know no stage.

* stage 0: every rank holds everything; parameters are dealt out whole.
* stages 1, 2: weights are whole everywhere, moments and fp32 master weights lie in flat partitions.
* stage 3: weights lie in partitions too, frozen ones included.

Private names of DeepSpeed 0.19.8 are used where it has no public ones; tests/trainer/test_engine.py guards each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.exchange import gathered
from trainer.optim import Groups

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 1 << 26  # elements that travel together when parts are joined: 256 MiB of fp32


@dataclass(frozen=True, kw_only=True)
class Span:
    """A flat stretch of one parameter; empty when start == stop."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class State(Protocol):
    """One ZeRO stage's view. Tensors are flat views on the engine's own memory: read them before the next step."""

    spans: dict[str, Span]  # of this rank, by parameter name

    def weight(self, name: str) -> Tensor: ...

    def moment(self, moment: str, name: str) -> Tensor: ...

    def set_moment(self, moment: str, name: str, value: Tensor) -> None: ...

    def create(self, applied_steps: int) -> None:
        """Make the optimizer's states (zeros, and the step count) without a step, which would move weights."""

    def steps(self) -> set[int]:
        """The step counts that the optimizer holds."""


class WholeState:
    """Stage 0: plain PyTorch on every rank."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Groups, rank: int, world_size: int) -> None:
        self._optimizer = optimizer
        self._parameters = {name: parameter for named in groups.values() for name, parameter in named}
        loads, self.spans = [0] * world_size, {}
        for name, parameter in sorted(self._parameters.items(), key=lambda item: -item[1].numel()):
            owner = loads.index(min(loads))
            loads[owner] += parameter.numel()
            self.spans[name] = Span(start=0, stop=parameter.numel() if owner == rank else 0)

    def weight(self, name: str) -> Tensor:
        return self._parameters[name].detach().reshape(-1)[: self.spans[name].stop]

    def moment(self, moment: str, name: str) -> Tensor:
        value: Tensor = self._optimizer.state[self._parameters[name]][moment]
        return value.reshape(-1)[: self.spans[name].stop]

    def set_moment(self, moment: str, name: str, value: Tensor) -> None:
        """`value` is whole: at this stage every rank needs all of it."""
        self._optimizer.state[self._parameters[name]][moment].reshape(-1).copy_(value)

    def create(self, applied_steps: int) -> None:
        _create(self._optimizer, self._parameters.values(), applied_steps)

    def steps(self) -> set[int]:
        return _steps(self._optimizer)


class FragmentState:
    """Stages 1 and 2: a parameter's moments are a fragment of the rank's flat partition of its group, or absent."""

    def __init__(self, zero: Any, groups: Groups) -> None:
        self._zero = zero
        self._parameters = {name: parameter for named in groups.values() for name, parameter in named}
        self.spans = {name: self._span(parameter) for name, parameter in self._parameters.items()}

    @staticmethod
    def _span(parameter: Any) -> Span:
        if parameter._hp_mapping is None:
            return Span(start=0, stop=0)
        address = parameter._hp_mapping.lp_fragment_address
        return Span(start=address.start, stop=address.start + address.numel)

    def weight(self, name: str) -> Tensor:
        span = self.spans[name]
        return self._parameters[name].detach().reshape(-1)[span.start : span.stop]

    def moment(self, moment: str, name: str) -> Tensor:
        mapping: Any = self._parameters[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.empty(0)
        value: Tensor = mapping.get_hp_fragment(moment)
        return value

    def set_moment(self, moment: str, name: str, value: Tensor) -> None:
        self.moment(moment, name).copy_(value)

    def create(self, applied_steps: int) -> None:
        flat = [p for entry in self._zero.optimizer.param_groups for p in entry["params"]]
        _create(self._zero.optimizer, flat, applied_steps)
        self.link()

    def link(self) -> None:
        """DeepSpeed links states to parameters once, after the first group's step: the other groups stay unreadable."""
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def steps(self) -> set[int]:
        return _steps(self._zero.optimizer)


class PartitionState:
    """Stage 3: rank r holds elements [r * n, (r + 1) * n) of every parameter, the last ones padded."""

    def __init__(self, zero: Any, module: nn.Module, rank: int) -> None:
        self._zero = zero
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self.spans = {}
        for name, parameter in self._parameters.items():
            size, share = parameter.ds_numel, parameter.ds_tensor.numel()
            self.spans[name] = Span(start=min(rank * share, size), stop=min((rank + 1) * share, size))

    def weight(self, name: str) -> Tensor:
        partition: Tensor = self._parameters[name].ds_tensor
        return partition.detach().reshape(-1)[: len(self.spans[name])]

    def moment(self, moment: str, name: str) -> Tensor:
        return self._partition(moment, name)[: len(self.spans[name])]

    def set_moment(self, moment: str, name: str, value: Tensor) -> None:
        self._partition(moment, name)[: len(self.spans[name])].copy_(value)

    def _partition(self, moment: str, name: str) -> Tensor:
        value: Tensor
        value, _ = self._zero._get_fp32_opt_state_partition(self._parameters[name], True, moment)
        return value

    def create(self, applied_steps: int) -> None:
        _create(self._zero.optimizer, self._zero.fp32_partitioned_groups_flat, applied_steps)

    def steps(self) -> set[int]:
        return _steps(self._zero.optimizer)


def _create(optimizer: torch.optim.Optimizer, flat: Iterable[Tensor], applied_steps: int) -> None:
    for parameter in flat:
        moments = {moment: torch.zeros_like(parameter.data) for moment in MOMENTS}
        step = torch.tensor(float(applied_steps), device=parameter.device)  # where the fused kernels look for it
        optimizer.state[parameter] = {"step": step, **moments}


def _steps(optimizer: torch.optim.Optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values() if "step" in state}


class Joiner:
    """Makes whole tensors out of all ranks' parts. Every method is a collective."""

    def __init__(self, spans: Mapping[str, Span], shapes: Mapping[str, torch.Size], world_size: int) -> None:
        self._shapes = dict(shapes)
        told = gathered({name: [span.start, span.stop] for name, span in spans.items()})
        self._spans = [{name: Span(start=span[0], stop=span[1]) for name, span in spans.items()} for spans in told]

    def whole(self, parts: Mapping[str, Tensor], *, everywhere: bool) -> dict[str, Tensor]:
        """Whole tensors by name, on rank 0 or `everywhere`; {} on the others. Every bit travels."""
        joined: dict[str, Tensor] = {}
        for bucket in self._buckets(parts):
            joined.update(self._bucket({name: parts[name] for name in bucket}, everywhere))
        return joined

    def _buckets(self, names: Iterable[str]) -> Iterable[list[str]]:
        bucket: list[str] = []
        size = 0
        for name in names:
            bucket.append(name)
            size += self._shapes[name].numel()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _bucket(self, parts: Mapping[str, Tensor], everywhere: bool) -> dict[str, Tensor]:
        flat = torch.cat([part.reshape(-1) for part in parts.values()])
        if len(self._spans) == 1:
            return {name: part.reshape(self._shapes[name]).clone() for name, part in parts.items()}
        sizes = [sum(len(spans[name]) for name in parts) for spans in self._spans]
        sent = torch.zeros(max(sizes), dtype=flat.dtype, device=flat.device)
        sent[: len(flat)] = flat
        receives = everywhere or dist.get_rank() == 0
        received = [torch.empty_like(sent) for _ in sizes] if receives else []
        if everywhere:
            dist.all_gather(received, sent)
        else:
            dist.gather(sent, received if receives else None, dst=0)
        return self._cut(list(parts), received) if receives else {}

    def _cut(self, names: list[str], received: list[Tensor]) -> dict[str, Tensor]:
        whole = {
            name: torch.empty(self._shapes[name].numel(), dtype=received[0].dtype, device=received[0].device)
            for name in names
        }
        for spans, flat in zip(self._spans, received, strict=True):
            at = 0
            for name in names:
                span = spans[name]
                whole[name][span.start : span.stop] = flat[at : at + len(span)]
                at += len(span)
        return {name: tensor.reshape(self._shapes[name]) for name, tensor in whole.items()}
