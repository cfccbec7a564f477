"""What has to be as it was when a checkpoint was made, for a run to go on: refused with what has changed."""

from __future__ import annotations

from torch import nn

from dataio.loader import Loader
from trainer.changes import differences, listing
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.engine import Engine
from trainer.tasks.base import Task


def require_same_network(checkpoint: Checkpoint, task: Task, module: nn.Module) -> None:
    """The file that `model.weights` names may have changed since: same tensors, another function. CheckpointError."""
    saved, built = checkpoint.about.network, task.network_record(module)
    if saved is None or built is None:
        return
    if found := differences("network", dict(saved), built):
        raise CheckpointError(
            f"{checkpoint.path}: is of another network: {listing(found, 'was')}; restore what model.preset and "
            "model.weights named"
        )


def require_same_frozen(checkpoint: Checkpoint, task: Task) -> None:
    """CheckpointError when the networks beside the trained one are others."""
    if checkpoint.about.frozen != task.frozen_fingerprint():
        raise CheckpointError(
            f"{checkpoint.path}: was trained with another frozen encoder than the file named now "
            "(task.frozen_encoder or model.encoder_weights); restore that file"
        )


def require_same_groups(checkpoint: Checkpoint, engine: Engine) -> None:
    """CheckpointError when parameters are in other groups, or others are trained."""
    expected = {name: [n for n, _ in ps] for name, ps in engine.groups.items()}
    if dict(checkpoint.state.groups) != expected:
        both = (checkpoint.state.groups, expected)
        sizes = [{name: len(names) for name, names in groups.items()} for groups in both]
        raise CheckpointError(
            f"{checkpoint.path}: its parameter groups differ from this network's: parameters by group were "
            f"{sizes[0]} and are {sizes[1]}; check task, model and optim.decay_norms_and_biases"
        )


def require_same_data(checkpoint: Checkpoint, loader: Loader) -> None:
    """CheckpointError when the order of samples is another one."""
    if found := differences("data", dict(checkpoint.state.data), loader.describe()):
        raise CheckpointError(
            f"{checkpoint.path}: was made with other data (its shards, labels or their order changed): "
            f"{listing(found, 'was')}; restore what it was, or start a new run from its weights with model.weights"
        )
