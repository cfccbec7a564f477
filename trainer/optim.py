"""Parameter groups and their hyper-parameters, by name: the same after every load, whatever DeepSpeed made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from trainer.config_train import EngineSection, OptimSection

# Elements of weights that stage 3 holds gathered at a time: three or four blocks of the largest encoder. By DeepSpeed's
# own limits, 10^9, any smaller network stays gathered from the forward to the backward pass, and nothing is saved.
GATHERED = 100_000_000
SMALL = 100_000  # elements; parameters up to here stay whole on every rank: DeepSpeed's default

Named = list[tuple[str, nn.Parameter]]
Groups = Mapping[str, Named]

NOT_DECAYED = ".not_decayed"
# Embeddings are no matrices of a layer: timm's vision transformers leave the same ones out.
EMBEDDINGS = ("pos_embed", "cls_token", "mask_token")


def decay_groups(groups: Groups, optim: OptimSection) -> dict[str, Named]:
    """The task's groups without empty ones; with `decay_norms_and_biases: false` each is split in two.

    Vectors (biases, norms, LayerScale) and embeddings of group X then form `X.not_decayed`.
    """
    if optim.decay_norms_and_biases:
        return {name: list(named) for name, named in groups.items() if named}
    split: dict[str, Named] = {}
    for name, named in groups.items():
        for parameter_name, parameter in named:
            bare = parameter.ndim <= 1 or parameter_name.rsplit(".", 1)[-1] in EMBEDDINGS
            split.setdefault(f"{name}{NOT_DECAYED}" if bare else name, []).append((parameter_name, parameter))
    return split


def rate_name(group: str) -> str:
    """Which learning rate a group has: encoder or decoder."""
    return group.removesuffix(NOT_DECAYED)


def settings_of(group: str, optim: OptimSection) -> dict[str, Any]:
    """What a group's entry in the optimizer must hold besides its parameters and learning rate."""
    decay = 0.0 if group.endswith(NOT_DECAYED) else optim.weight_decay
    return {"weight_decay": decay, "betas": optim.betas, "eps": optim.eps}


def make_optimizer(groups: Groups, optim: OptimSection) -> torch.optim.Optimizer:
    """Adam or AdamW (arXiv 1412.6980, 1711.05101) over named groups; the learning rates come with every step.

    PyTorch's fused kernels: one pass over memory instead of a dozen, on CPUs as on GPUs.
    """
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.optimizer]
    entries = [
        {"params": [p for _, p in named], "name": name, "lr": 0.0, **settings_of(name, optim)}
        for name, named in groups.items()
    ]
    return kind(entries, fused=True)


def apply_settings(entries: Iterable[dict[str, Any]], optim: OptimSection, rates: Mapping[str, float]) -> None:
    """Set every hyper-parameter of every group again, by the group's name. KeyError for a group nobody declared."""
    for entry in entries:
        entry.update(settings_of(entry["name"], optim), lr=rates[rate_name(entry["name"])])


def bucket_elements(parameters: int) -> int:
    """Size of ZeRO's gradient bucket: DeepSpeed's default, 2 GB of fp32, or the network where that is smaller."""
    return max(1, min(500_000_000, parameters))


def stage3_limits() -> dict[str, int]:
    """What DeepSpeed is told of how much of the weights may be gathered."""
    return {
        "stage3_max_live_parameters": GATHERED,
        "stage3_max_reuse_distance": GATHERED,
        "stage3_param_persistence_threshold": SMALL,
    }


def gathered_elements(sizes: Iterable[int]) -> int:
    """How much that is at most, of parameters of these sizes: the small ones and as many of the others as may be."""
    sizes = list(sizes)
    small = sum(size for size in sizes if size <= SMALL)
    return small + min(GATHERED, sum(sizes) - small)


def effective_stage(engine: EngineSection, world_size: int) -> int:
    """The ZeRO stage that makes sense: on one rank there is nothing to cut, and flat copies of everything cost memory
    and time. With `cpu_offload` the stage stays, as only ZeRO offloads."""
    return engine.zero_stage if world_size > 1 or engine.cpu_offload else 0
