"""What tests of layouts share: trees written by other means than ours, and what a packed dataset holds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataio.codec import code_of, decode_npy, decode_png16
from dataio.dataset import Dataset
from dataio.importers import get_importer
from dataio.importers.base import parse_options
from dataio.pack import pack
from dataio.shards import PackReport


class Packed:
    """A dataset as its user finds it: `report`, `info`, and per key the members, the map and KEY.json."""

    def __init__(self, folder: str, report: PackReport) -> None:
        dataset = Dataset.open(folder)
        self.report, self.info = report, dataset.info
        self.members: dict[str, dict[str, bytes]] = {}
        for shard in dataset.shards:
            for entry in shard.index.samples:
                members = {name: shard.read(entry, name) for name in entry.members}
                assert None not in members.values()
                self.members[entry.key] = members  # type: ignore[assignment]

    def meta(self, key: str) -> dict[str, Any]:
        return json.loads(self.members[key].get("json", b"{}"))

    def value(self, key: str) -> np.ndarray:
        """The map in the dataset's quantity, NaN at holes."""
        members = self.members[key]
        assert self.info.quantity is not None
        if "depth.npy" in members:
            return decode_npy(members["depth.npy"], self.info.quantity)
        code = code_of(self.meta(key), self.info.code)
        assert code is not None
        return decode_png16(members["depth.png"], code)

    def sky(self, key: str) -> np.ndarray:
        """True where the sky is."""
        return np.asarray(Image.open(io.BytesIO(self.members[key]["sky.png"]))) > 127


class Importing:
    """Packs a tree with a layout's importer, through the same function as `fathom data pack`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0

    def __call__(self, layout: str, root: Path, **options: str) -> Packed:
        self._number += 1
        out = str(self._folder / f"packed{self._number}")
        importer = get_importer(layout)
        return Packed(out, pack(importer(str(root), parse_options(importer, options)), out, name="d"))


@pytest.fixture
def importing(tmp_path_factory: pytest.TempPathFactory) -> Importing:
    return Importing(tmp_path_factory.mktemp("packed"))


def write_image(path: Path, size_wh: tuple[int, int] = (12, 8), seed: int = 0) -> bytes:
    """A noisy photograph in the format of the name's ending; returns the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size_wh[1], size_wh[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path.read_bytes()


def write_png16(path: Path, code_HW: np.ndarray) -> bytes:
    """A 16-bit grey PNG; returns the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(code_HW, np.uint16)).save(path)
    return path.read_bytes()


def ramp(size_wh: tuple[int, int] = (12, 8), low: float = 1.0, high: float = 5.0) -> np.ndarray:
    """A map that rises from low to high, float32 [H, W]: another value in every pixel."""
    width, height = size_wh
    return np.linspace(low, high, width * height, dtype=np.float32).reshape(height, width)
