"""The other side of bench_data.py: torch DataLoader, webdataset, PIL and torchvision, as one would write it."""

from __future__ import annotations

import argparse
import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dataio.codec import DEPTH_MM, LABEL_ZERO
from dataio.spec import Perturbation

RECIPE = Path(__file__).resolve().parent.parent / "launcher/recipes/student-v1-vits.yaml"
WINDOW = 64  # samples shuffled together
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)

Arrays = tuple[Tensor, Tensor, Tensor]  # view BCHW, disparity BHW, region BHW: labelled rows first


def perturbation() -> Perturbation:
    """Of the recipe's unlabelled role."""
    return Perturbation(**yaml.safe_load(RECIPE.read_text())["data"]["roles"]["unlabelled"]["perturbation"])


class Batches(IterableDataset):
    """Whole batches of a worker's share of the shards, for ever."""

    def __init__(self, folder: Path, batch: int, size: int) -> None:
        self.folder, self.third, self.size, self.p = folder, batch // 3, size, perturbation()

    def __iter__(self) -> Iterator[Arrays]:
        from torchvision.transforms import ColorJitter

        worker = get_worker_info()
        number = worker.id if worker else 0
        self.rng = random.Random(number)
        torch.manual_seed(number)
        self.jitter = ColorJitter(self.p.brightness, self.p.contrast, self.p.saturation, self.p.hue)
        labelled, unlabelled = self._samples("labelled", ("jpg", "depth.png")), self._labels()
        while True:
            rows = [self._labelled(*next(labelled)) for _ in range(self.third)]
            mixed = [self._unlabelled(*next(unlabelled)) for _ in range(2 * self.third)]
            view_BCHW, value_BHW, region_BHW = (torch.stack(arrays) for arrays in zip(*rows, *mixed, strict=True))
            self._cutmix(view_BCHW[self.third :], value_BHW[self.third :], region_BHW[self.third :])
            yield view_BCHW, value_BHW, region_BHW

    def _samples(self, role: str, members: tuple[str, ...]) -> Iterator[tuple[bytes, ...]]:
        import webdataset as wds

        tars = [str(path) for path in sorted((self.folder / role / "shards").glob("*.tar"))]
        shuffled = wds.shuffle(WINDOW, initial=WINDOW, rng=self.rng)
        return iter(
            wds.DataPipeline(
                wds.SimpleShardList(tars), wds.split_by_worker, wds.tarfile_to_samples(), wds.to_tuple(*members),
                shuffled,
            ).repeat()
        )  # fmt: skip

    def _labels(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Images and labels stand in the same order, so two readers side by side join them."""
        import webdataset as wds

        def joined() -> Iterator[tuple[bytes, bytes, bytes]]:
            while True:
                readers = []
                for folder, members in (("unlabelled", ("jpg",)), ("labels", ("disparity.png", "json"))):
                    tars = [str(path) for path in sorted((self.folder / folder / "shards").glob("*.tar"))]
                    readers.append(
                        wds.DataPipeline(
                            wds.SimpleShardList(tars), wds.split_by_worker, wds.tarfile_to_samples(),
                            wds.to_tuple("__key__", *members),
                        )
                    )  # fmt: skip
                for (key, jpeg), (label_key, png, meta) in zip(*readers, strict=True):
                    if key != label_key:
                        raise ValueError(f"{key} beside the label of {label_key}")
                    yield jpeg, png, meta

        return iter(wds.shuffle(WINDOW, initial=WINDOW, rng=self.rng)(joined()))

    def _labelled(self, jpeg: bytes, png: bytes) -> Arrays:
        image, code_HW = self._geometry(jpeg, png)
        depth_HW = code_HW * np.float32(DEPTH_MM.scale)
        valid_HW = code_HW > 0
        value_HW = np.divide(1, depth_HW, out=np.zeros_like(depth_HW), where=valid_HW)
        if valid_HW.any():
            low, high = value_HW[valid_HW].min(), value_HW[valid_HW].max()
            value_HW = np.where(valid_HW, (value_HW - low) / (high - low if high > low else 1), 0)
        return self._tensor(image), torch.from_numpy(value_HW), torch.from_numpy(valid_HW.astype(np.uint8))

    def _unlabelled(self, jpeg: bytes, png: bytes, meta: bytes) -> Arrays:
        image, code_HW = self._geometry(jpeg, png)
        code, valid_HW = json.loads(meta), code_HW > 0
        value_HW = np.where(valid_HW, (code_HW - LABEL_ZERO) * np.float32(code["scale"]) + np.float32(code["shift"]), 0)
        value_HW = value_HW.astype(np.float32)
        if self.rng.random() < self.p.jitter_p:
            image = self.jitter(image)
        if self.rng.random() < self.p.grayscale_p:
            image = image.convert("L").convert("RGB")
        if self.rng.random() < self.p.blur_p:
            image = image.filter(ImageFilter.GaussianBlur(self.rng.uniform(*self.p.blur_sigma)))
        return self._tensor(image), torch.from_numpy(value_HW), torch.from_numpy(valid_HW.astype(np.uint8))

    def _geometry(self, jpeg: bytes, png: bytes) -> tuple[Image.Image, np.ndarray]:
        from torchvision.transforms import functional as tv

        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        width, height = image.size
        scale = self.size / min(width, height)
        new = [max(self.size, round(height * scale)), max(self.size, round(width * scale))]
        image = tv.resize(image, new, tv.InterpolationMode.BICUBIC)
        target = tv.resize(Image.open(io.BytesIO(png)), new, tv.InterpolationMode.NEAREST)
        top, left = self.rng.randint(0, new[0] - self.size), self.rng.randint(0, new[1] - self.size)
        image, target = (tv.crop(x, top, left, self.size, self.size) for x in (image, target))
        if self.rng.random() < self.p.flip_p:
            image, target = tv.hflip(image), tv.hflip(target)
        return image, np.asarray(target).astype(np.float32)

    def _tensor(self, image: Image.Image) -> Tensor:
        from torchvision.transforms import functional as tv

        return tv.to_tensor(image).sub_(MEAN).div_(STD)

    def _cutmix(self, view_BCHW: Tensor, value_BHW: Tensor, region_BHW: Tensor) -> None:
        """UniMatch's boxes, in place; the partner is another row."""
        count = len(view_BCHW)
        before = view_BCHW.clone(), value_BHW.clone(), region_BHW.clone()
        for row in range(count):
            if count < 2 or self.rng.random() >= self.p.cutmix_p:
                continue
            ys, xs = self._box()
            source = (row + self.rng.randrange(1, count)) % count
            view_BCHW[row, :, ys, xs] = before[0][source, :, ys, xs]
            value_BHW[row, ys, xs] = before[1][source, ys, xs]
            region_BHW[row, ys, xs] = 2 * before[2][source, ys, xs]

    def _box(self) -> tuple[slice, slice]:
        area = self.rng.uniform(*self.p.cutmix_area) * self.size**2
        while True:
            aspect = self.rng.uniform(*self.p.cutmix_aspect)
            height, width = int(math.sqrt(area * aspect)), int(math.sqrt(area / aspect))
            top, left = self.rng.randrange(self.size), self.rng.randrange(self.size)
            if top + height <= self.size and left + width <= self.size:
                return slice(top, top + height), slice(left, left + width)


def theirs(arguments: argparse.Namespace, folder: Path) -> Iterator[Arrays]:
    """Batches of a DataLoader."""
    cuda = arguments.device == "cuda"
    batches = Batches(folder, arguments.batch, arguments.size)
    for arrays in DataLoader(batches, batch_size=None, num_workers=arguments.threads, pin_memory=cuda):
        view_BCHW, value_BHW, region_BHW = (x.to(arguments.device, non_blocking=True) for x in arrays)
        yield view_BCHW, value_BHW, region_BHW
