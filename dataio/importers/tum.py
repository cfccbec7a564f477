"""TUM RGB-D sequences: rgb.txt and depth.txt list timestamps and files; frames are joined by the nearest time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from dataio.importers.base import Entry, Found, Importer, Options, as_key, image_extension
from dataio.spec import DataError
from dataio.types import AffineCode

# Of the Kinect that recorded each group of sequences, from the dataset's calibration page.
_FOCAL_PX = {"freiburg1": 517.3, "freiburg2": 520.9, "freiburg3": 535.4}


class TumOptions(Options):
    """`max_difference` is the longest time between a photograph and its depth map, in seconds."""

    max_difference: float = Field(default=0.02, ge=0)


class Tum(Importer):
    """TUM RGB-D: one sequence, or a folder of them; 16-bit PNG, metres = code / 5000."""

    name: ClassVar[str] = "tum"
    definition: ClassVar[str] = "https://cvg.cit.tum.de/data/datasets/rgbd-dataset/file_formats"
    Options: ClassVar[type[Options]] = TumOptions
    code = AffineCode(scale=1 / 5000)

    def entries(self) -> Iterator[Entry]:
        sequences = sorted(path.parent for path in self.root.glob("**/rgb.txt"))
        if not sequences:
            raise DataError(f"{self.root}: no rgb.txt in it or below: name a sequence of TUM RGB-D, or their folder")
        for folder in sequences:
            depths = sorted(_listing(folder / "depth.txt"))
            for time, path in _listing(folder / "rgb.txt"):
                nearest = self._nearest(depths, time)
                files = [path] if nearest is None else [path, nearest]
                inside = folder.relative_to(self.root)
                yield Entry(as_key(str(inside / path)), tuple(str(inside / file) for file in files))

    def read(self, entry: Entry) -> Found:
        image, *depth = entry.files
        name = str(self.root.resolve() / image)
        focal = next((px for camera, px in _FOCAL_PX.items() if camera in name), None)
        meta: dict[str, Any] = {} if focal is None else {"focal_px": focal}
        return Found(
            image=self.bytes_of(image),
            extension=image_extension(image),
            coded=(self.bytes_of(depth[0], "missing_depth"), self.code) if depth else None,
            meta=meta,
        )

    def _nearest(self, depths: list[tuple[float, str]], time: float) -> str | None:
        at = bisect_left(depths, (time, ""))
        near = [(abs(stamp - time), path) for stamp, path in depths[max(0, at - 1) : at + 1]]
        difference, path = min(near, default=(float("inf"), ""))
        return path if difference <= self.options.max_difference else None


def _listing(path: Path) -> list[tuple[float, str]]:
    """(timestamp, file) of each line that is no comment. DataError."""
    try:
        lines = path.read_text().splitlines()
        return [(float(line.split()[0]), line.split()[1]) for line in lines if line.strip() and line[0] != "#"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing: a sequence has rgb.txt and depth.txt") from error
    except (ValueError, IndexError) as error:
        raise DataError(f"{path}: lines must be 'timestamp file', {error}") from error
