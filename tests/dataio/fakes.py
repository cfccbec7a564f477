"""Small datasets for the tests of this room, written with webdataset.TarWriter."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from dataio.dataset import DatasetInfo
from dataio.labels import LabelSample, LabelStore
from dataio.types import AffineCode


def jpeg(image_HWC: np.ndarray, quality: int = 95, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "JPEG", quality=quality, subsampling=0, **options)
    return out.getvalue()


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """A photograph-like image: low frequencies only, uint8 [H, W, 3]."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def labelled(seed: int, height: int = 48, width: int = 56) -> dict[str, bytes]:
    """Members of a good sample: depths 1 to 65 m in millimetres, with a hole."""
    code_HW = np.random.default_rng(seed + 1000).integers(1000, 65000, (height, width)).astype(np.uint16)
    code_HW[:3, :3] = 0
    return {"depth.png": png(code_HW), "jpg": jpeg(smooth(seed, height, width))}


def unlabelled(seed: int, height: int = 48, width: int = 56) -> dict[str, bytes]:
    return {"jpg": jpeg(smooth(seed, height, width))}


Shards = Sequence[Mapping[str, Mapping[str, bytes]]]  # per shard: key -> members


def write_dataset(folder: Path, shards: Shards, *, with_depth: bool = True, **info: object) -> str:
    (folder / "shards").mkdir(parents=True)
    for number, samples in enumerate(shards):
        with TarWriter(str(folder / "shards" / f"{number:06d}.tar"), encoder=False) as tar:
            for key, members in samples.items():
                tar.write({"__key__": key, **members})
    facts = {
        "name": folder.name,
        "role": "labelled" if with_depth else "unlabelled",
        "quantity": "depth_m" if with_depth else None,
        "code": AffineCode(scale=0.001) if with_depth else None,
        "samples": sum(len(samples) for samples in shards),
    }
    DatasetInfo(**{**facts, **info}).write(str(folder))
    return str(folder)


def shards_of(sizes: Sequence[int], make: object, prefix: str = "s") -> list[dict[str, dict[str, bytes]]]:
    """Shards of these sizes with samples made by `make(seed)`; keys tell shard and place."""
    seeds = iter(range(sum(sizes)))
    return [
        {f"{prefix}{shard}_{i:03d}": make(next(seeds)) for i in range(size)}  # type: ignore[operator]
        for shard, size in enumerate(sizes)
    ]


def write_labels(folder: Path, shards: Shards, height: int = 28, width: int = 42, fail: Sequence[str] = ()) -> str:
    store = LabelStore.create(str(folder), {"teacher": "test"})
    for number, samples in enumerate(shards):
        rng = np.random.default_rng(number)
        store.commit(
            f"{number:06d}",
            [
                LabelSample.failed(key, "teacher_failed")
                if key in fail
                else LabelSample.encoded(key, rng.uniform(0, 5, (height, width)).astype(np.float32), {"quality": 1.0})
                for key in samples
            ],
            keys=list(samples),
        )
    return str(folder)


def metadata(**values: object) -> bytes:
    return json.dumps(values).encode()
