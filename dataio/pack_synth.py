"""Datasets of synthetic scenes."""

from __future__ import annotations

import io
import json
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from cluster import storage
from dataio import synth
from dataio.codec import DEPTH_MM, encode_png16
from dataio.dataset import DatasetInfo
from dataio.processes import in_processes
from dataio.shards import Item, Packing, PackReport, Progress
from dataio.spec import DataError

_CHUNK = 32  # scenes per message between processes


def pack_synth(
    domain: str,
    out: str,
    *,
    seed: int,
    count: int,
    size: int,
    start: int = 0,
    labelled: bool = True,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
    restart: bool = False,
) -> PackReport:
    """Render scenes `start` .. `start + count - 1` of a synthetic domain, `size` x `size` pixels, into a dataset.

    KEY.jpg at quality 95; when labelled also KEY.depth.png (millimetres), KEY.sky.png (8-bit, 255 is sky) and
    KEY.json {focal_px}. The content does not depend on `workers`, the number of processes; more than one needs a
    caller whose main module can be imported. DataError for a domain, count, size or shard size that cannot be.
    """
    for what, number in (("count", count), ("size", size), ("samples_per_shard", samples_per_shard)):
        if number < 1:
            raise DataError(f"{what} is {number}: it must be at least 1")
    if domain not in synth.DOMAINS:
        raise DataError(f"domain is {domain!r}: allowed are {', '.join(synth.DOMAINS)}")
    plan = {"maker": "synth", "domain": domain, "seed": seed, "start": start, "count": count, "size": size}
    plan |= {"labelled": labelled, "samples_per_shard": samples_per_shard}
    packing = Packing(out, plan, restart=restart)
    todo = range(start + packing.next, start + count)
    storage.require_free(out, len(todo) * (size * size * 3 + 8192), "packing")
    info = DatasetInfo(
        name=f"synth-{domain}",
        role="labelled" if labelled else "unlabelled",
        quantity="depth_m" if labelled else None,
        code=DEPTH_MM if labelled else None,
        samples=0,
    )
    items = in_processes(partial(_render, domain, seed, size, labelled), todo, workers, _CHUNK)
    limits = {"shard_samples": samples_per_shard, "shard_bytes": 1 << 62}
    return packing.run(items, count, info, limits, progress)


def _render(domain: str, seed: int, size: int, labelled: bool, index: int) -> Item:
    scene = synth.render(domain, seed, index, size)
    picture = io.BytesIO()
    Image.fromarray(scene.image_HWC).save(picture, format="JPEG", quality=95)
    members: dict[str, Any] = {"jpg": picture.getvalue()}
    if labelled:
        depth_m_HW = np.where(scene.sky_HW, np.nan, scene.depth_m_HW)
        members["depth.png"], _ = encode_png16(depth_m_HW, DEPTH_MM)
        sky = io.BytesIO()
        Image.fromarray(scene.sky_HW.astype(np.uint8) * 255).save(sky, format="PNG")
        members["sky.png"] = sky.getvalue()
        members["json"] = json.dumps({"focal_px": round(float(scene.focal_px), 4)}).encode()
    name = f"{domain}_{index:06d}"
    return Item(name=name, key=name, members=members)
