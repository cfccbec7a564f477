"""DeepSpeed ZeRO behind the few verbs the loop needs: backward, step, learning rates, state by parameter name.

With engine_ops.py the only importer of deepspeed. Its configuration is generated here, never written by a user:
DeepSpeed ignores unknown top-level keys without a word. What was measured about it is in docs/log.md; the traps this
file avoids:

* ZeRO's own checkpoints load at one world size only, its universal ones forget frozen parameters and, at stage 3, the
  groups' hyper-parameters; ours are named parts (engine_state.py), and every step sets the hyper-parameters again.
* Stage 0 in fp32 applies a non-finite gradient without a word: the norm is ours there, and such a step is dropped.
* Gradients are averaged over ranks by the engine, so the loop multiplies its loss by the world size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from trainer.config_train import EngineSection, OptimSection
from trainer.engine_ops import prepare_cpu_operator
from trainer.engine_state import MOMENTS, FragmentState, Joiner, PartitionState, Span, State, WholeState
from trainer.optim import (
    Groups,
    apply_settings,
    bucket_elements,
    decay_groups,
    effective_stage,
    make_optimizer,
    stage3_limits,
)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """`skipped`: a non-finite gradient was found and no rank applied the update."""

    grad_norm: float
    skipped: bool


class Parts(Protocol):
    """Where parts of named tensors come from when a state is loaded: a checkpoint's reader."""

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat tensor, on the CPU. KeyError when there is none of that name."""


class Engine:
    """One trainable network under ZeRO. Call `backward` for each micro-batch, then `step` once.

    Args:
        module: fp32, on the CPU or the device; frozen parameters stay as they are.
        groups: named trainable parameters by group name.
        micro_batches: number of `backward` calls per step, the same on every rank.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        *,
        optim: OptimSection,
        engine: EngineSection,
        micro_batches: int,
        device: torch.device,
    ) -> None:
        self.groups = decay_groups(groups, optim)
        self.rank = dist.get_rank()
        self.precision, self.device = engine.precision, device
        self.stage = effective_stage(engine, dist.get_world_size())
        self._optim = optim
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        prepare_cpu_operator()
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module.to(device),
            optimizer=make_optimizer(self.groups, optim),
            config=deepspeed_config(
                optim,
                engine.model_copy(update={"zero_stage": self.stage}),
                micro_batches,
                sum(p.numel() for p in self.trained.values()),
            ),
            dist_init_required=False,
        )
        if self.stage == 0 and dist.get_world_size() == 1:
            self._engine.enable_backward_allreduce = False  # it would flatten and copy every gradient for nobody
        self.applied_steps = 0
        self._state = self._make_state()
        self._joiner = Joiner(self.spans, self._shapes, dist.get_world_size())

    def _make_state(self) -> State:
        if self.stage == 0:
            return WholeState(self._optimizer, self.groups, self.rank, dist.get_world_size())
        if self.stage == 3:
            return PartitionState(self._optimizer, self.module, self.rank)
        return FragmentState(self._optimizer, self.groups)

    @property
    def module(self) -> nn.Module:
        """The network itself; at stage 3 its parameters are partitioned, and its forward pass is a collective."""
        network: nn.Module = self._engine.module
        return network

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the order of the groups."""
        return {name: parameter for named in self.groups.values() for name, parameter in named}

    def shape_of(self, name: str) -> torch.Size:
        """The whole shape of a parameter, frozen ones included, whatever part of it is here."""
        return self._shapes[name]

    @property
    def spans(self) -> dict[str, Span]:
        """Which stretch of each parameter this rank answers for."""
        return self._state.spans

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass, for what runs beside the network: frozen encoders."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the step's last micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # advances DeepSpeed's micro-step counter; no update before the boundary

    def step(self, learning_rates: Mapping[str, float]) -> StepResult:
        """Clip, update, clear gradients: on all ranks or, when any gradient is not finite, on none."""
        apply_settings(self.param_groups, self._optim, learning_rates)
        result = self._plain_step() if self.stage == 0 else self._zero_step()
        self.applied_steps += not result.skipped
        return result

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups, with their hyper-parameters as the next step will use them."""
        inner = self._optimizer if self.stage == 0 else self._optimizer.optimizer
        groups: list[dict[str, Any]] = inner.param_groups
        return groups

    def _zero_step(self) -> StepResult:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepResult(grad_norm=float(norm), skipped=bool(self._optimizer.overflow))

    def _plain_step(self) -> StepResult:
        parameters = list(self.trained.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        grad_norm = float(norm)  # the gradients are all-reduced: every rank decides the same
        skipped = not math.isfinite(grad_norm)
        if skipped:
            for parameter in parameters:
                parameter.grad = None  # the optimizer leaves parameters without a gradient alone
        elif self._optim.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._optim.clip, norm)
        self._engine.step()
        return StepResult(grad_norm=grad_norm, skipped=skipped)

    # What a checkpoint holds.

    def weight_part(self, name: str) -> Tensor:
        """This rank's stretch of a trainable parameter as it is now: a flat view."""
        return self._state.weight(name)

    def whole(self, parts: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
        """Whole tensors out of all ranks' parts (see `spans`), on rank 0 or everywhere. A collective."""
        return self._joiner.whole(parts, everywhere=everywhere)

    def whole_weights(self, *, everywhere: bool = False) -> dict[str, Tensor]:
        """The network's whole state dict, fp32, on the device. A collective at stage 3; {} where it was not asked."""
        if self.stage < 3:
            return dict(self.module.state_dict())
        parts = {name: self.weight_part(name) for name in self.spans}
        joined = self.whole(parts, everywhere=everywhere)
        if not joined:
            return {}
        return joined | {name: buffer for name, buffer in self.module.state_dict().items() if name not in joined}

    def moment_parts(self) -> dict[str, Tensor]:
        """This rank's stretches of the moments by `moment/parameter name`: flat views; {} before the first update."""
        if not self.applied_steps:
            return {}
        if isinstance(self._state, FragmentState):
            self._state.link()
        return {
            f"{moment}/{name}": self._state.moment(moment, name)
            for name in self.trained
            for moment in MOMENTS
            if len(self.spans[name])
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments by `moment/parameter name`, whole, on every rank's CPU: for tests and checks. A collective."""
        parts = self.moment_parts()
        found: dict[str, Tensor] = {}
        for moment in MOMENTS if self.applied_steps else ():
            empty = torch.empty(0, device=self.device)
            named = {name: parts.get(f"{moment}/{name}", empty).to(self.device) for name in self.trained}
            whole = self.whole(named, everywhere=True)
            found |= {f"{moment}/{name}": whole[name].cpu() for name in self.trained}
        return found

    def load_optimizer_state(self, moments: Parts, applied_steps: int) -> None:
        """Restore moments, on any number of ranks and at any stage. Raises KeyError for a missing parameter."""
        self.applied_steps = applied_steps
        if not applied_steps:
            return
        self._state.create(applied_steps)
        for name, parameter in self._shapes.items():
            if name not in self.trained:
                continue
            span = Span(start=0, stop=parameter.numel()) if self.stage == 0 else self.spans[name]
            for moment in MOMENTS if len(span) else ():
                value = moments.part(f"{moment}/{name}", span.start, span.stop)
                self._state.set_moment(moment, name, value.to(self.device))

    def optimizer_steps(self) -> set[int]:
        """The update counts that the optimizer's states hold: one number, `applied_steps`, or none before the first."""
        return self._state.steps()

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by name between the last `backward` and `step`. A collective; for tests and checks."""
        found = {name: safe_get_full_grad(parameter) for name, parameter in self.trained.items()}
        return {name: gradient.detach().clone() for name, gradient in found.items() if gradient is not None}

    def close(self) -> None:
        self._engine.destroy()


def deepspeed_config(optim: OptimSection, engine: EngineSection, micro_batches: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, for so many trained parameters. The micro-batch size is nominal: our loss carries its own
    global denominators."""
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket_elements(parameters),
    }
    if engine.zero_stage == 3:
        zero |= stage3_limits()
    if engine.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": zero,
        "gradient_clipping": optim.clip if engine.zero_stage else 0.0,  # at stage 0 the engine clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if engine.precision == "bf16":
        # fp32 weights under autocast; gradients are reduced in fp32, so the number of ranks costs no precision.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
