"""DeepSpeed ZeRO behind the few verbs the loop needs: backward, step, learning rates, state by parameter name.

With engine_ops.py the only importer of deepspeed. Its configuration is generated here, never written by a user:
DeepSpeed ignores unknown top-level keys without a word. What was measured about it is in docs/log.md; the traps this
file avoids:

* ZeRO 1 and 2 link the optimizer's states to parameters after the first group only; `_link_states` does it for all.
* ZeRO's own checkpoints load at one world size only; ours are whole tensors by parameter name.
* Gradients are averaged over ranks by the engine, so the loop multiplies its loss by the world size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn

from trainer.config_train import EngineSection, OptimSection
from trainer.engine_ops import prepare_cpu_operator

MOMENTS = ("exp_avg", "exp_avg_sq")
Groups = Mapping[str, list[tuple[str, nn.Parameter]]]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """`skipped`: a non-finite gradient was found and no rank applied the update."""

    grad_norm: float
    skipped: bool


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
        self.groups = {name: list(parameters) for name, parameters in groups.items() if parameters}
        self.precision, self.device = engine.precision, device
        optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in ps], "name": name, "lr": 0.0} for name, ps in self.groups.items()],
            betas=optim.betas,
            weight_decay=optim.weight_decay,
        )
        config = deepspeed_config(optim, engine, micro_batches)
        prepare_cpu_operator()
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module.to(device), optimizer=optimizer, config=config, dist_init_required=False
        )
        self.applied_steps = 0

    @property
    def module(self) -> nn.Module:
        """The network itself, whole on every rank (ZeRO 1 and 2 keep parameters whole)."""
        network: nn.Module = self._engine.module
        return network

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
        for group in self._optimizer.optimizer.param_groups:
            group["lr"] = learning_rates[group["name"]]
        self._engine.step()
        skipped = bool(self._optimizer.overflow)
        self.applied_steps += not skipped
        norm = self._engine.get_global_grad_norm()
        return StepResult(grad_norm=float("nan") if norm is None else float(norm), skipped=skipped)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments by `moment/parameter name`, whole, fp32, on the CPU. A collective: every rank must call it."""
        if not self.applied_steps:
            return {}
        self._link_states()
        return {
            f"{moment}/{name}": safe_get_full_optimizer_state(parameter, moment).detach().cpu().clone()
            for parameters in self.groups.values()
            for name, parameter in parameters
            for moment in MOMENTS
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor], applied_steps: int) -> None:
        """Restore what `optimizer_state` gave, on any number of ranks. Raises KeyError for a missing parameter."""
        self.applied_steps = applied_steps
        if not applied_steps:
            return
        inner = self._optimizer.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:  # the state must exist before it can be set; a dummy step would move weights
                moments = {moment: torch.zeros_like(flat.data) for moment in MOMENTS}
                inner.state[flat] = {"step": torch.tensor(float(applied_steps)), **moments}
        self._link_states()
        for parameters in self.groups.values():
            for name, parameter in parameters:
                for moment in MOMENTS:
                    safe_set_full_optimizer_state(parameter, state[f"{moment}/{name}"].to(self.device), moment)

    def close(self) -> None:
        self._engine.destroy()

    def _link_states(self) -> None:
        # DeepSpeed links once, after the first group's step, so the other groups' states stay unreadable (0.19.8).
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()


def deepspeed_config(optim: OptimSection, engine: EngineSection, micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's dictionary. The micro-batch size is nominal: our loss carries its own global denominators."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": engine.zero_stage, "overlap_comm": False},
        "gradient_clipping": optim.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if engine.precision == "bf16":
        # fp32 weights under autocast; gradients are reduced in fp32, so the number of ranks costs no precision.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
