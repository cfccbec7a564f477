"""One training step of a student by its parts: what the losses cost beside the networks.

    .venv/bin/python benchmarks/bench_losses.py --preset v2-vits --batch 2

Network, frozen encoder, losses and optimizer as a step runs them, each timed alone with its inputs made beforehand;
losses forward and backward, down to the network's outputs. The parts take turns within every repetition. Networks are
in bfloat16 autocast, losses in float32. Half of the rows are unlabelled and carry a CutMix rectangle; a tenth of the
pixels are holes. Gradient matching and SiLog are plain PyTorch (`trainer.losses`): this table says if that is enough.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_kernels import Clock, milliseconds
from model import DepthAnything, Encoder
from trainer.losses import (
    feature_alignment_loss,
    gradient_matching_loss,
    regional_affine_invariant_loss,
    silog_loss,
)

WARM_UP = 2
Part = tuple[Callable[[], Any], Callable[[Any], Any]]  # what to prepare, what to time
LOSSES = ("affine-invariant, two regions", "feature alignment", "gradient matching", "SiLog")


def parts(arguments: argparse.Namespace) -> dict[str, Part]:
    """Each part of the step."""
    device, batch, side = arguments.device, arguments.batch, arguments.size
    g = torch.Generator().manual_seed(0)
    net = DepthAnything.from_preset(arguments.preset).to(device)
    frozen = Encoder.from_preset(arguments.preset).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-6)
    image_BCHW = torch.randn(batch, 3, side, side, generator=g).to(device)
    target_BHW = torch.rand(batch, side, side, generator=g).to(device) + 0.1
    region_BHW = torch.ones(batch, side, side, dtype=torch.uint8)
    region_BHW[batch // 2 :, side // 5 : -side // 4, side // 8 : -side // 6] = 2
    region_BHW[torch.rand(region_BHW.shape, generator=g) < 0.1] = 0
    region_BHW = region_BHW.to(device)

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16):
            prediction = net(image_BCHW, features=True)
        return prediction.disparity_BHW, prediction.features_BND

    def frozen_forward(_: Any) -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return frozen(image_BCHW[batch // 2 :]).last_BND

    with torch.no_grad():
        disparity_BHW, features_BND = (x.float() for x in forward())
    frozen_BND = frozen_forward(None).float()
    upstream = [torch.full_like(x, 1e-3) for x in forward()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)

    def backward(outputs: tuple[Tensor, Tensor]) -> None:
        torch.autograd.backward(outputs, upstream)

    def loss(function: Callable[[Tensor], Tensor], output: Tensor) -> Part:
        leaf = output.detach().requires_grad_()
        return lambda: None, lambda _: torch.autograd.grad(function(leaf).sum(), leaf)

    positive_BHW = disparity_BHW.abs() + 0.1
    losses = (
        loss(lambda x: regional_affine_invariant_loss(x, target_BHW, region_BHW, 2), disparity_BHW),
        loss(lambda x: feature_alignment_loss(x, frozen_BND, 0.85), features_BND[batch // 2 :]),
        loss(lambda x: gradient_matching_loss(x, target_BHW, region_BHW, 2), disparity_BHW),
        loss(lambda x: silog_loss(x, target_BHW, region_BHW > 0), positive_BHW),
    )
    return {
        "network, forward": (lambda: None, lambda _: forward()),
        "network, backward": (forward, backward),
        "frozen encoder": (lambda: None, frozen_forward),
        "AdamW": (lambda: None, lambda _: optimizer.step()),
        **dict(zip(LOSSES, losses, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="v2-vits")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    step, clock = parts(arguments), Clock(arguments.device)
    for _ in range(WARM_UP):
        for part in step.values():
            clock(*part)
    rounds = [{name: clock(*part) for name, part in step.items()} for _ in range(arguments.repeats)]
    seconds = {name: np.array([one[name] for one in rounds]) for name in step}
    # SiLog belongs to metric training: it is no part of this step's sum.
    whole = sum(times for name, times in seconds.items() if name != "SiLog")
    cuda = arguments.device == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    load = "" if cuda else f", load {os.getloadavg()[0]:.1f}"
    print(f"{machine}; torch {torch.__version__}{load}; {arguments.preset}, B={arguments.batch}, "
          f"{arguments.size} pixels a side; {arguments.repeats} repetitions; median [quartiles]\n")  # fmt: skip
    print("| part | ms | share of the step, % |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {milliseconds(times)} | {100 * np.median(times / whole):.2f} |")
    print(f"| all but SiLog | {milliseconds(np.asarray(whole))} | 100 |")


if __name__ == "__main__":
    main()
