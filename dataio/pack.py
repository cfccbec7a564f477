"""Making datasets: from a folder of photographs and depth maps, or from synthetic scenes.

Photographs are copied byte by byte, never encoded again. A bad file is left out, counted and named; making goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import posixpath
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageFile

from cluster import storage
from dataio import synth
from dataio.codec import DEPTH_MM, encode_png16, read_png16
from dataio.dataset import DatasetInfo, Role
from dataio.shards import SHARD_BYTES, Item, Packing, PackReport, Progress, ShardWriter
from dataio.spec import DataError
from dataio.types import AffineCode

__all__ = ["PackReport", "PackSpec", "ShardWriter", "pack_folder", "pack_synth"]

_EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
_ORIENTATION = 0x0112  # the EXIF tag
_CHUNK = 32  # scenes per message between processes


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """How a folder becomes a dataset.

    `depth` and `sky` name a photograph's depth map and sky mask, relative to its own folder, where `{stem}` is its
    name without extension: "{stem}.depth.png", "../depth/{stem}.png". A depth map is a 16-bit grey PNG; metres =
    depth_scale * code, and 0 is a hole. `overrides` are (pattern, depth_scale) for photographs whose path relative to
    the source matches, the first match counting: (("tum_*", 1 / 5000),).
    """

    name: str
    role: Role
    depth: str = "{stem}.depth.png"
    sky: str = "{stem}.sky.png"
    depth_scale: float = DEPTH_MM.scale
    overrides: tuple[tuple[str, float], ...] = ()
    shard_bytes: int = SHARD_BYTES

    def scale_of(self, path: str) -> float:
        """Metres per code for the photograph at `path`, relative to the source."""
        for pattern, scale in self.overrides:
            if fnmatch.fnmatch(path, pattern):
                return scale
        return self.depth_scale


def pack_folder(
    source: str, out: str, spec: PackSpec, *, progress: Progress | None = None, restart: bool = False
) -> PackReport:
    """Pack the photographs under the local folder `source` into the dataset `out` (folder or URL).

    Finds jpg, jpeg, png and webp in all sub-folders, in sorted order; hidden files and folders are passed over. What
    cannot be used is skipped and named in the report: unreadable_image, unreadable_depth, missing_depth,
    depth_not_16_bit, depth_size_differs, no_valid_depth, unusable_sky, rotated_by_exif (labelled only).
    The same call resumes; other arguments or other files are refused unless `restart` deletes what is there.
    Raises DataError (nothing to pack, two photographs with one key, nothing usable) and StorageError (no space).
    """
    _check_spec(spec)
    if not Path(source).is_dir():
        raise DataError(f"{source}: no such folder: name the folder that holds the photographs")
    files = _walk(source)
    images = _images(files, spec)
    if not images:
        raise DataError(f"{source}: no photographs ({', '.join(sorted(_EXTENSIONS))}) in it or below: check the path")
    keys = _keys(source, images)
    listing = hashlib.sha256(json.dumps([(path, files[path]) for path in sorted(files)]).encode()).hexdigest()
    plan = {**asdict(spec), "maker": "folder", "source": str(Path(source).resolve()), "files": listing}
    packing = Packing(out, plan, restart=restart)
    todo = images[packing.next :]
    needed = sum(files[path] + sum(files.get(beside, 0) for beside in _beside(path, spec)) for path in todo)
    storage.require_free(out, needed + needed // 50 + 4096 * len(todo), "packing")
    labelled = spec.role == "labelled"
    info = DatasetInfo(
        name=spec.name,
        role=spec.role,
        quantity="depth_m" if labelled else None,
        code=AffineCode(scale=spec.depth_scale) if labelled else None,
        samples=0,
    )
    items = (_item(source, path, keys[path], files, spec) for path in todo)
    return packing.run(items, len(images), info, {"shard_bytes": spec.shard_bytes}, progress)


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
    items = _render_all(partial(_render, domain, seed, size, labelled), todo, workers)
    limits = {"shard_samples": samples_per_shard, "shard_bytes": 1 << 62}
    return packing.run(items, count, info, limits, progress)


def _check_spec(spec: PackSpec) -> None:
    if spec.role not in get_args(Role):
        raise DataError(f"role is {spec.role!r}: allowed are {', '.join(get_args(Role))}")
    if not spec.name:
        raise DataError("name is empty: give the dataset a name")
    for what, pattern in (("depth", spec.depth), ("sky", spec.sky)):
        if pattern.count("{stem}") != 1 or pattern.startswith("/"):
            raise DataError(f"{what} is {pattern!r}: a relative path with one {{stem}} is needed, like {{stem}}.x.png")
    for what, scale in (("depth_scale", spec.depth_scale), *((f"override {p!r}", s) for p, s in spec.overrides)):
        if not 0 < scale < float("inf"):
            raise DataError(f"{what} is {scale!r}: metres per code, a number above 0, is needed")
    if spec.shard_bytes < 1:
        raise DataError(f"shard_bytes is {spec.shard_bytes}: it must be at least 1")


def _walk(source: str) -> dict[str, int]:
    """Sizes in bytes by path relative to `source`, '/' between its parts."""
    files = {}
    for folder, folders, names in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                files[path.relative_to(source).as_posix()] = path.stat().st_size
    return files


def _beside(path: str, spec: PackSpec) -> list[str]:
    """The relative paths of a photograph's depth map and sky mask, whether or not they exist."""
    folder, name = posixpath.split(path)
    stem = posixpath.splitext(name)[0]
    return [posixpath.normpath(posixpath.join(folder, p.replace("{stem}", stem))) for p in (spec.depth, spec.sky)]


def _images(files: Iterable[str], spec: PackSpec) -> list[str]:
    """The photographs among `files`, sorted: what looks like one and is nobody's depth map or mask."""
    found = sorted(path for path in files if posixpath.splitext(path)[1].lower() in _EXTENSIONS)
    targets = {target for path in found for target in _beside(path, spec) if target != path}
    # a depth map that lost its photograph is no photograph; a pattern with a folder cannot tell
    endings = [p.split("{stem}")[1] for p in (spec.depth, spec.sky) if "/" not in p and p.startswith("{stem}")]
    endings = [ending for ending in endings if posixpath.splitext(ending)[0]]
    return [path for path in found if path not in targets and not path.endswith(tuple(endings))]


def _keys(source: str, images: list[str]) -> dict[str, str]:
    """A key for every photograph: its path without extension; letters, digits, - and _ stay, the rest becomes _."""
    keys: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path in images:
        stem = posixpath.splitext(path)[0]
        key = "".join(c if c.isalnum() or c in "-_/" else "_" for c in stem)
        if key in owners:
            raise DataError(f"{source}: {owners[key]!r} and {path!r} would both have the key {key!r}: rename one")
        keys[path], owners[key] = key, path
    return keys


def _item(source: str, path: str, key: str, files: dict[str, int], spec: PackSpec) -> Item:
    data = _bytes(source, path)
    size, rotated = _look(data)
    if size is None:
        return Item(name=path, problem="unreadable_image")
    members = {_EXTENSIONS[posixpath.splitext(path)[1].lower()]: data}
    if spec.role == "labelled":
        # decoders turn such a picture, and nobody turns its depth map
        problem = "rotated_by_exif" if rotated else _add_labels(members, source, path, size, files, spec)
        if problem:
            return Item(name=path, problem=problem)
    return Item(name=path, key=key, members=members)


def _add_labels(
    members: dict[str, bytes], source: str, path: str, size: tuple[int, int], files: dict[str, int], spec: PackSpec
) -> str | None:
    """Add depth map, sky mask and, where it differs, the code. Returns what is wrong with them, if anything."""
    depth, sky = _beside(path, spec)
    if depth not in files:
        return "missing_depth"
    members["depth.png"] = _bytes(source, depth)
    depth_size, _ = _look(members["depth.png"])
    if depth_size is None:
        return "unreadable_depth"
    try:
        code_HW = read_png16(members["depth.png"])
    except DataError:
        return "depth_not_16_bit"
    if depth_size != size:
        return "depth_size_differs"
    if not code_HW.any():
        return "no_valid_depth"
    if sky in files:
        members["sky.png"] = _bytes(source, sky)
        if _look(members["sky.png"])[0] != size:
            return "unusable_sky"
    scale = spec.scale_of(path)
    if scale != spec.depth_scale:
        members["json"] = json.dumps({"scale": scale}).encode()
    return None


def _bytes(source: str, path: str) -> bytes:
    return Path(source, path).read_bytes()


def _look(data: bytes) -> tuple[tuple[int, int] | None, bool]:
    """((width, height), whether EXIF rotates it) after decoding all of it; (None, False) when that fails."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            size, rotated = image.size, image.getexif().get(_ORIENTATION, 1) not in (0, 1)
            if isinstance(image, ImageFile.ImageFile):
                image.draft("RGB", (1, 1))  # JPEG: an eighth of the size, yet every byte is read
            image.load()
            return size, rotated
    except Exception:  # noqa: BLE001  (Pillow's plug-ins raise whatever they like on damaged files)
        return None, False


def _render_all(render: partial[Item], indexes: range, workers: int) -> Iterator[Item]:
    if workers <= 1 or len(indexes) <= _CHUNK:
        yield from map(render, indexes)
        return
    # spawn: a forked child of a process that has threads (torch's, Ray's) may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = (indexes[i : i + _CHUNK] for i in range(0, len(indexes), _CHUNK))
        # the pool computes all that it is given: this bounds what waits in memory
        with _deaf_children():
            waiting = deque(pool.submit(_render_chunk, render, chunk) for chunk in islice(chunks, 2 * workers))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(_render_chunk, render, chunk) for chunk in islice(chunks, 1))


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started in the block never see SIGINT and SIGTERM, which a terminal and `timeout` send to a whole
    process group: the parent decides. They end with it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _render_chunk(render: partial[Item], indexes: range) -> list[Item]:
    return [render(index) for index in indexes]


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
