"""How long training waits for a checkpoint, beside one copy of the same bytes: at v2-vitl's size on two ranks.

    .venv/bin/python benchmarks/bench_checkpoint.py --preset v2-vitl --ranks 2

Every rank takes a step on a tiny image, so that all optimizer states exist, then saves several times: `stall` is what
the training thread waited in all (copies, and completing the checkpoint once it is written), `written` when the
checkpoint was whole. The first save makes the buffers that later ones use again. `copy` is one plain copy of a rank's
bytes into memory that is already there, in the same process; it is what cannot be avoided. In brackets: the seconds of
processor time, which a busy machine does not stretch.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import command_line, hardware
from tests.trainer.ranks import run_ranks

GIB = 2**30


def clocks() -> np.ndarray:
    """Wall and this thread's processor time, seconds."""
    return np.array([time.perf_counter(), time.thread_time()])


def shown(pairs: list[np.ndarray]) -> str:
    """Medians of both clocks."""
    wall, processor = np.median(np.array(pairs), axis=0)
    return f"{wall:.2f} ({processor:.2f})"


def saves(rank: int, world_size: int, folder: str, preset: str, stage: int, repeats: int) -> dict[str, Any]:
    """Seconds of each save on one rank, and of one copy of the bytes that it takes."""
    import torch
    import torch.distributed as dist

    from model import DepthAnything
    from trainer.checkpoint import About, TrainState
    from trainer.config_train import EngineSection, OptimSection
    from trainer.engine import Engine
    from trainer.saver import Keep, Saved, Saver
    from trainer.tasks.base import encoder_decoder_groups

    torch.manual_seed(0)
    network = DepthAnything.from_preset(preset)
    engine = Engine(
        network,
        encoder_decoder_groups(network),
        optim=OptimSection(),
        engine=EngineSection(zero_stage=stage, precision="fp32"),
        micro_batches=1,
        device=torch.device("cpu"),
    )
    image_BCHW = torch.randn(1, 3, 28, 28)
    engine.backward(engine(image_BCHW).disparity_BHW.mean(), last=True)
    engine.step({"encoder": 1e-6, "decoder": 1e-6})
    told: list[Saved] = []
    saver = Saver(folder, engine, None, Keep(newest=1), told.append)
    begun = []
    for step in range(1, repeats + 1):
        dist.barrier()
        began = clocks()
        saver.begin(TrainState(step=step, applied_steps=1, cursor={}), About())
        begun.append(clocks() - began)
        assert saver._pending is not None
        saver._pending.writing.result()  # the training would go on meanwhile
        dist.barrier()
        saver.finish()
    tensors = [*engine.moment_parts().values(), *(engine.module.state_dict().values() if rank == 0 else ())]
    buffers = [torch.empty_like(t).copy_(t) for t in tensors]
    copies = []
    for _ in range(repeats):
        began = clocks()
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        copies.append(clocks() - began)
    saver.close()
    engine.close()
    assert all(saved.error is None for saved in told)
    return {
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "begin": begun,
        "stall": [saved.stall_s for saved in told],
        "written": [saved.seconds for saved in told],
        "copy": copies,
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--preset", default="v2-vitl")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--folder", help="where the checkpoints go; default: a temporary folder")
    arguments = parser.parse_args()
    print(f"{hardware('cpu')}; {arguments.preset}, {arguments.ranks} ranks, one thread each; seconds\n")
    print("| ZeRO stage | rank | GiB | first begin | later begins | one copy | later stalls | written |")
    print("|---|---|---|---|---|---|---|---|")
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            root = Path(folder)
            rest = (arguments.preset, stage, arguments.repeats)
            found = run_ranks(saves, arguments.ranks, root / "ranks", str(root / "checkpoints"), *rest)
        for rank, one in enumerate(found):
            stall, written = (f"{np.median(one[name][1:]):.2f}" for name in ("stall", "written"))
            cells = [shown(one["begin"][:1]), shown(one["begin"][1:]), shown(one["copy"]), stall, written]
            print(f"| {stage} | {rank} | {one['bytes'] / GIB:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
