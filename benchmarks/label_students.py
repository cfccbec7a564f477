"""Students of labels that no file holds: what a label's format does to the loss, to gradients, to training.

Formats are compared on the same batches, float32 among them, which the data plane does not read. So it gets, in place
of labels, maps that say of every pixel which pixel of which image it is: after flips, crops and CutMix they tell where
any label has to be looked up. Sixteen bits and a shift reach 2^24 addresses exactly; the images are split into several
roles, therefore.

Shape suffixes: B batch, C channel, H W pixels, N images, P parameters.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataio import header
from dataio.codec import encode_png16
from dataio.compose import TargetRule, target_values
from dataio.dataset import Dataset, DatasetInfo
from dataio.label_codec import EncodedLabel, as_png16, encode
from dataio.loader import Loader
from dataio.png16 import decode_codes
from dataio.reader import read_members
from dataio.shards import ShardWriter
from dataio.spec import DataSpec, RoleNeeds
from dataio.types import AffineCode, Batch, Target
from model import DepthAnything
from model.depth_anything import normalise_photograph
from trainer.loop import step_seed
from trainer.optim import apply_settings, decay_groups, make_optimizer
from trainer.quickstart import Request, stage_config
from trainer.schedule import factor
from trainer.tasks.base import make_task

FLOAT32, LAST_BIT = "float32", "float32, last bit"
FORMATS = ("npy", "png", "jxl")
COARSE = {"10 bits": 10, "8 bits": 8}
KINDS = (FLOAT32, LAST_BIT, *FORMATS, *COARSE)

_ADDRESSES = 2**24  # whole numbers that float32 holds
_MEASURING_SEED = 9_000_001  # of the batches that losses are compared on
_GRADIENTS = 4  # batches whose gradients are compared

Map = np.ndarray  # float32 [H, W]


@dataclass(frozen=True)
class Compared:
    """What a kind of label does to a student, against float32: shares of the loss and of the gradient's length."""

    step: int
    loss: float  # with float32 labels
    loss_spread: float  # its standard deviation from batch to batch / loss
    gradient_spread: float  # |g - g'| / |g| of two batches
    loss_off: Mapping[str, float]  # kind -> mean of |loss - loss'| / loss
    gradient_off: Mapping[str, float]  # kind -> mean of |g - g'| / |g|


def as_kind(map_HW: Map, kind: str, number: int) -> Map:
    """The label of a teacher's map as training would have it. `number` is the image's, for what is random."""
    if kind == FLOAT32:
        return map_HW
    if kind == LAST_BIT:
        up_HW = np.random.default_rng(number).random(map_HW.shape) < 0.5
        return np.nextafter(map_HW, np.where(up_HW, np.float32(np.inf), np.float32(-np.inf)))
    if kind in COARSE:
        return coarse(map_HW, COARSE[kind])
    return as_learned(encode(map_HW, kind))  # type: ignore[arg-type]


def as_learned(label: EncodedLabel) -> Map:
    """A label as the data plane hands it out: through the 16-bit codes that its decoder gets, in float32."""
    png, code = as_png16(label.extension, label.data, label.meta)
    rule = TargetRule(code=code, quantity="disparity", wanted="disparity")
    return target_values(torch.from_numpy(decode_codes(png))[None], None, [rule])[0][0].numpy()


def coarse(map_HW: Map, bits: int) -> Map:
    """A map in as many steps of its range as `bits` make."""
    low, high, steps = float(map_HW.min()), float(map_HW.max()), 2**bits - 1
    span = high - low or 1.0
    return (np.rint((map_HW.astype(np.float64) - low) / span * steps) / steps * span + low).astype(np.float32)


def photographs(dataset: Dataset) -> Iterator[tuple[str, bytes]]:
    """Key and encoded image of every sample, in order."""
    for shard in dataset.shards:
        found = read_members(shard.tar, shard.index.samples, header.EXTENSIONS)
        for entry in shard.index.samples:
            yield entry.key, next(iter(found[entry.key].values()))


@torch.inference_mode()
def label_maps(network: DepthAnything, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Map]:
    """The mean of an image's and its mirror image's disparity, at the network's input `sizes` (height, width)."""
    found = []
    for image_HWC, size in zip(images, sizes, strict=True):
        image_1CHW = normalise_photograph(image_HWC, size)
        both_2HW = network(torch.cat([image_1CHW, image_1CHW.flip(-1)])).disparity_BHW
        found.append(((both_2HW[0] + both_2HW[1].flip(-1)) / 2).numpy())
    return found


class Addressed:
    """The quickstart's unlabelled images with addresses for labels, in roles of at most 2^24 pixels."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.request, self.folder = request, folder
        self.pixels = request.sizes.image**2
        count, batch = request.sizes.wide, stage_config(request, "student", "-").data.roles["unlabelled"].batch
        most = (_ADDRESSES - 1) // self.pixels
        self.roles = next(n for n in range(1, batch + 1) if batch % n == 0 and count / n <= most)
        self.each = -(-count // self.roles)

    def write(self) -> None:
        """Make the datasets, one a role."""
        if (self.folder / str(self.roles - 1) / "dataset.json").exists():
            return
        dataset = Dataset.open(os.path.join(self.request.out, "data", "wide"))
        ramp_HW = 1.0 + np.arange(self.pixels, dtype=np.float64).reshape(self.request.sizes.image, -1)
        png, _ = encode_png16(ramp_HW, AffineCode(scale=1.0))
        images = list(photographs(dataset))
        for role in range(self.roles):
            part = images[role * self.each : (role + 1) * self.each]
            with ShardWriter(str(self.folder / str(role) / "shards")) as writer:
                for place, (key, image) in enumerate(part):
                    shift = json.dumps({"shift": float(place * self.pixels)}).encode()
                    writer.write(key, {"jpg": image, "depth.png": png, "json": shift})
            info = DatasetInfo(
                name="addresses", role="labelled", quantity="depth_m", code=AffineCode(scale=1.0), samples=len(part)
            )
            info.write(str(self.folder / str(role)))

    def batches(self, seed: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """The student's batches, without end, and for every pixel of the unlabelled rows its image and its place there.

        The labels of those rows are still missing (`with_labels`).
        """
        config = stage_config(self.request, "student", "-")
        spec = config.data.roles["unlabelled"]
        batch = spec.batch // self.roles
        roles, needs = {"labelled": config.data.roles["labelled"]}, {"labelled": RoleNeeds()}
        for role in range(self.roles):
            roles[f"unlabelled{role}"] = replace(
                spec, datasets=(str(self.folder / str(role)),), labels=(), batch=batch, lanes=2 if batch % 4 == 0 else 1
            )
            needs[f"unlabelled{role}"] = RoleNeeds(target="depth_m")
        data = DataSpec(roles=roles, input_size=config.data.input_size, shuffle_window=config.data.shuffle_window)
        with Loader(data, needs, views=("student",), seed=seed) as loader:
            for made in loader:
                first = made.rows("unlabelled0").start
                base_B11 = torch.arange(self.roles).repeat_interleave(batch)[:, None, None] * self.each * self.pixels
                address_BHW = made.targets["depth_m"].value_BHW[first:].long() - 1 + base_B11
                counts = (("labelled", first), ("unlabelled", len(made) - first))
                yield replace(made, roles=counts), address_BHW // self.pixels, address_BHW % self.pixels


def with_labels(batch: Batch, image_BHW: Tensor, place_BHW: Tensor, maps_NHW: np.ndarray, kind: str) -> Batch:
    """The batch with the labels of the unlabelled rows looked up."""
    rows = batch.rows("unlabelled")
    valid_BHW = batch.region_BHW[rows] > 0
    image_BHW = torch.where(valid_BHW, image_BHW, image_BHW[valid_BHW][0] if valid_BHW.any() else 0)
    numbers, which_BHW = torch.unique(image_BHW, return_inverse=True)
    table = np.stack([as_kind(maps_NHW[number], kind, number).ravel() for number in numbers.tolist()])
    found_BHW = torch.from_numpy(table)[which_BHW, torch.where(valid_BHW, place_BHW, 0)]
    value_BHW = batch.targets["disparity"].value_BHW.clone()
    value_BHW[rows] = torch.where(valid_BHW, found_BHW, 0.0)
    return replace(batch, targets={"disparity": Target(value_BHW=value_BHW, quantity="disparity")})


class Student:
    """The quickstart's student, trained by one process, on labels of a kind."""

    def __init__(self, request: Request, addressed: Addressed, maps_NHW: np.ndarray, kind: str) -> None:
        self.config = stage_config(request, "student", "-")
        self.task, self.kind = make_task(self.config), kind
        self.addressed, self.maps_NHW = addressed, maps_NHW
        torch.manual_seed(self.config.seed)
        self.module = self.task.build().train()
        self.task.prepare(torch.device("cpu"))
        self.optimizer = make_optimizer(
            decay_groups(self.task.parameter_groups(self.module), self.config.optim), self.config.optim
        )

    def train(self, stages: Sequence[int], measured: int) -> list[Compared]:
        """All steps; before those of `stages`, and at the end, losses are compared on `measured` batches."""
        found, batches = [], self.addressed.batches(self.config.seed)
        for step in range(self.config.steps):
            if step in stages:
                found.append(self.compare(step, measured))
            self._step(step, with_labels(*next(batches), self.maps_NHW, self.kind))
        batches.close()
        return [*found, self.compare(self.config.steps, measured)] if stages else found

    def _step(self, step: int, batch: Batch) -> None:
        torch.manual_seed(step_seed(self.config.seed, step, 0))
        optim, size = self.config.optim, self.config.global_batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.engine.precision == "bf16"):
            sums, counts = self.task.sums(self.module, batch), self.task.counts(batch)
            weights = self.task.term_weights
            loss = torch.stack([weights[name] * sums[name] / counts[name].clamp(min=1) for name in counts]).sum()
        loss.backward()
        scale = factor(step * size, self.config.steps * size, optim.warmup_samples, optim.schedule, optim.power)
        rates = {"encoder": optim.encoder_lr * scale, "decoder": optim.decoder_lr * scale}
        apply_settings(self.optimizer.param_groups, optim, rates)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def compare(self, step: int, measured: int) -> Compared:
        """The loss of the pseudo-labelled images and its gradient, in float32, with every kind of label."""
        (term,) = (loss for loss in self.task.losses if loss.role == "unlabelled")
        parameters = [p for named in self.task.parameter_groups(self.module).values() for _, p in named]
        followed = min(_GRADIENTS, measured)
        losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
        gradients: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for number, one in zip(range(measured), batches := self.addressed.batches(_MEASURING_SEED), strict=False):
            with torch.set_grad_enabled(number < followed):
                pred_BHW = self.module(one[0].views["student"]).disparity_BHW
            for kind in KINDS:
                batch = with_labels(*one, self.maps_NHW, kind)
                loss = term.sums(pred_BHW, batch)["unlabelled"] / term.counts(batch)["unlabelled"].clamp(min=1)
                losses[kind].append(loss.item())
                if number < followed:
                    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    gradients[kind].append(torch.cat([part.flatten() for part in parts if part is not None]))
        batches.close()
        exact = np.array(losses[FLOAT32])
        lengths = [float(g_P.norm()) for g_P in gradients[FLOAT32]]
        return Compared(
            step=step,
            loss=float(exact.mean()),
            loss_spread=float(exact.std(ddof=1) / exact.mean()),
            gradient_spread=_apart(gradients[FLOAT32], gradients[FLOAT32][1:] + gradients[FLOAT32][:1], lengths),
            loss_off={kind: float(np.abs(losses[kind] - exact).mean() / exact.mean()) for kind in KINDS[1:]},
            gradient_off={kind: _apart(gradients[kind], gradients[FLOAT32], lengths) for kind in KINDS[1:]},
        )


def _apart(first: Sequence[Tensor], second: Sequence[Tensor], lengths: Sequence[float]) -> float:
    """The mean distance of gradients, each over its length."""
    pairs = zip(first, second, lengths, strict=True)
    return float(np.mean([float((a_P - b_P).norm()) / length for a_P, b_P, length in pairs]))


def train_student(
    request: Request, addressed: str, maps: str, kind: str, out: str, stages: Sequence[int], measured: int
) -> tuple[list[Compared], float]:
    """Train one student in this process, on one thread, and save it below `out`. What was compared, and seconds."""
    torch.set_num_threads(1)
    began = time.monotonic()
    student = Student(request, Addressed(request, Path(addressed)), np.load(maps, mmap_mode="r"), kind)
    found = student.train(stages, measured)
    assert isinstance(student.module, nn.Module)
    student.task.export(student.module, os.path.join(out, "weights"))
    return found, time.monotonic() - began
