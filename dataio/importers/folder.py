"""A folder of photographs, with depth maps and sky masks beside them or in a folder of their own."""

from __future__ import annotations

import fnmatch
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from pydantic import Field

from dataio.codec import DEPTH_MM
from dataio.dataset import Role
from dataio.importers.base import IMAGE_EXTENSIONS, Entry, Found, Importer, Options, as_key, image_extension
from dataio.spec import DataError
from dataio.types import AffineCode


class FolderOptions(Options):
    """`depth` and `sky` name a photograph's depth map and sky mask, relative to its own folder, where `{stem}` is its
    name without extension: "{stem}.depth.png", "../depth/{stem}.png". A depth map is a 16-bit grey PNG; metres =
    depth_scale * code, and 0 is a hole. `overrides` are (pattern, depth_scale) for photographs whose path relative to
    the source matches, the first match counting: (("tum_*", 1 / 5000),).
    """

    role: Role = "labelled"
    depth: str = "{stem}.depth.png"
    sky: str = "{stem}.sky.png"
    depth_scale: float = Field(default=DEPTH_MM.scale, gt=0, allow_inf_nan=False)
    overrides: tuple[tuple[str, float], ...] = ()


class Folder(Importer):
    """jpg, jpeg, png and webp in all sub-folders, in sorted order; hidden files and folders are passed over."""

    name: ClassVar[str] = "folder"
    definition: ClassVar[str] = "docs/data.md"
    Options: ClassVar[type[Options]] = FolderOptions

    def __init__(self, root: str, options: Any = None) -> None:
        super().__init__(root, options)
        self.opt: FolderOptions = self.options
        self.code = AffineCode(scale=self.opt.depth_scale)
        for what, pattern in (("depth", self.opt.depth), ("sky", self.opt.sky)):
            if pattern.count("{stem}") != 1 or pattern.startswith("/"):
                raise DataError(
                    f"{what} is {pattern!r}: a relative path with one {{stem}} is needed, like {{stem}}.x.png"
                )
        for pattern, scale in self.opt.overrides:
            if not 0 < scale < float("inf"):
                raise DataError(f"override {pattern!r} is {scale!r}: metres per code, a number above 0, is needed")

    @property
    def labelled(self) -> bool:
        return self.opt.role == "labelled"

    def entries(self) -> Iterator[Entry]:
        files = walk(str(self.root))
        images = self._images(files)
        if not images:
            raise DataError(
                f"{self.root}: no photographs ({', '.join(sorted(IMAGE_EXTENSIONS))}) in it or below: check the path"
            )
        for path in images:
            yield Entry(as_key(path), (path, *(beside for beside in self._beside(path) if beside in files)))

    def read(self, entry: Entry) -> Found:
        path = entry.files[0]
        image, extension = self.bytes_of(path), image_extension(path)
        depth, sky = self._beside(path)
        mask = self.bytes_of(sky) if sky in entry.files else None
        if not self.labelled:
            return Found(image=image, extension=extension, sky=mask)
        scale = next((s for pattern, s in self.opt.overrides if fnmatch.fnmatch(path, pattern)), self.opt.depth_scale)
        return Found(
            image=image,
            extension=extension,
            coded=(self.bytes_of(depth, "missing_depth"), AffineCode(scale=scale)) if depth in entry.files else None,
            sky=mask,
        )

    def _beside(self, path: str) -> list[str]:
        """The relative paths of a photograph's depth map and sky mask, whether or not they exist."""
        folder, name = posixpath.split(path)
        stem = posixpath.splitext(name)[0]
        patterns = (self.opt.depth, self.opt.sky)
        return [posixpath.normpath(posixpath.join(folder, p.replace("{stem}", stem))) for p in patterns]

    def _images(self, files: Iterable[str]) -> list[str]:
        """The photographs among `files`, sorted: what looks like one and is nobody's depth map or mask."""
        found = sorted(path for path in files if posixpath.splitext(path)[1].lower() in IMAGE_EXTENSIONS)
        targets = {target for path in found for target in self._beside(path) if target != path}
        # a depth map that lost its photograph is no photograph; a pattern with a folder cannot tell
        patterns = [p for p in (self.opt.depth, self.opt.sky) if "/" not in p and p.startswith("{stem}")]
        endings = [p.split("{stem}")[1] for p in patterns]
        endings = [ending for ending in endings if posixpath.splitext(ending)[0]]
        return [path for path in found if path not in targets and not path.endswith(tuple(endings))]


def walk(root: str) -> set[str]:
    """All files below, relative to `root`, '/' between their parts; hidden files and folders are passed over."""
    found = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)):
                found.add(posixpath.normpath(posixpath.join(inside.replace(os.sep, "/"), name)))
    return found
