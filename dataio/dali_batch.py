"""Encoded images -> views and codes: one DALI pipeline definition for CPU and GPU.

Per row: decode; resize the window of `Geometry` to S x S (images cubic without antialiasing, by DALI's kernel with
a = -0.5 where the originals' OpenCV has -0.75: a few grey levels at edges; codes and sky masks nearest, over the same
window in relative coordinates); flip. The view "clean" is that, normalised; the view "student" has colour and blur in
between. Colours are 8-bit until normalisation. The order of the colour operations is fixed: hue and saturation (grey
is saturation 0), contrast around 128, brightness, then blur: docs/perturbations.md.

A damaged image ends a DALI pipeline object: the culprit is found, replaced, and the pipeline built anew (tens of
milliseconds); all other rows come out as they would have, since every random number is an input.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from dataio.draws import Geometry, Photometric

VIEWS = ("clean", "student")
MEAN = (0.485, 0.456, 0.406)  # ImageNet, of RGB in 0..1
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample to decode: encoded bytes, and what to do with them."""

    image: bytes
    target: bytes | None = None  # 16-bit grey PNG
    sky: bytes | None = None  # 8-bit grey PNG
    geometry: Geometry = field(default_factory=Geometry)
    photometric: Photometric = field(default_factory=Photometric)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """`views` on the device, float32 [B, 3, S, S]; `code_BHW` uint16 and `sky_BHW` uint8 in main memory.

    Rows in `bad` (row -> reason), and rows that were None, hold a placeholder's pixels.
    """

    views: dict[str, torch.Tensor]
    code_BHW: torch.Tensor | None
    sky_BHW: torch.Tensor | None
    bad: dict[int, str]


class DaliBatch:
    """Decodes batches of exactly `batch` rows to `size` x `size` pixels on `device`; only the `views` asked for."""

    def __init__(
        self, batch: int, size: int, *, views: Sequence[str], targets: bool, device: torch.device | str, threads: int
    ) -> None:
        unknown = set(views) - set(VIEWS)
        if unknown:
            raise ValueError(f"no such view: {', '.join(sorted(unknown))}")
        self._batch, self._size, self._targets, self._threads = batch, size, targets, threads
        self._views = tuple(view for view in VIEWS if view in views)
        self._device = torch.device(device)
        self._pipelines: dict[bool, Any] = {}  # with and without sky masks, built when needed
        self._probe: Any = None
        self.rebuilds = 0

    def run(self, rows: Sequence[Row | None]) -> Decoded:
        """Decode one batch. RuntimeError only for what no single row is to blame for."""
        if len(rows) != self._batch:
            raise ValueError(f"{len(rows)} rows for a batch of {self._batch}")
        bad: dict[int, str] = {}
        try:
            return self._run(rows, bad)
        except RuntimeError:
            self._pipelines.clear()
            self.rebuilds += 1
            bad = self._culprits(rows)
            if not bad:
                raise
        return self._run([None if i in bad else row for i, row in enumerate(rows)], bad)

    def _run(self, rows: Sequence[Row | None], bad: dict[int, str]) -> Decoded:
        sky = self._targets and any(row is not None and row.sky is not None for row in rows)
        if sky not in self._pipelines:
            self._pipelines[sky] = self._build(sky)
        pipeline = self._pipelines[sky]
        for name, data in _inputs([row or _ABSENT for row in rows], self._targets, sky, self._views).items():
            pipeline.feed_input(name, data)
        outputs = pipeline.run()
        # without a copy: each run of the dynamic executor has buffers of its own
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        if self._device.type == "cuda":  # there a batch outlives the run on another stream, which DALI cannot know
            tensors = [tensor.clone() if tensor.is_cuda else tensor for tensor in tensors]
        views = dict(zip(self._views, tensors, strict=False))
        labels = [tensor.squeeze(-1) for tensor in tensors[len(views) :]]
        return Decoded(
            views=views, code_BHW=labels[0] if self._targets else None, sky_BHW=labels[1] if sky else None, bad=bad
        )

    def _build(self, sky: bool) -> Any:
        gpu = self._device.type == "cuda"
        pipeline = _define(
            self._size,
            self._views,
            self._targets,
            sky,
            gpu,
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if gpu else None,
        )
        pipeline.build()
        return pipeline

    def _culprits(self, rows: Sequence[Row | None]) -> dict[int, str]:
        """Rows whose members do not decode on their own, with the reason."""
        bad: dict[int, str] = {}
        for i, row in enumerate(rows):
            if row is None:
                continue
            labels = [(row.target, True), (row.sky, False)] if self._targets else []
            if not self._decodes(row.image, grey16=False):
                bad[i] = "bad_image"
            elif not all(self._decodes(data, grey16=grey16) for data, grey16 in labels if data is not None):
                bad[i] = "bad_target"
        return bad

    def _decodes(self, data: bytes, *, grey16: bool) -> bool:
        if self._probe is None:
            gpu = self._device.type == "cuda"
            device_id = (self._device.index or 0) if gpu else None
            self._probe = _define_probe(gpu, batch_size=1, num_threads=1, device_id=device_id)
            self._probe.build()
        try:
            self._probe.feed_input("image", _bytes([_ABSENT.image if grey16 else data]))
            self._probe.feed_input("target", _bytes([data if grey16 else _ABSENT_CODE]))
            self._probe.run()
        except RuntimeError:
            self._probe = None
            return False
        return True


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1, enable_conditionals=True)
def _define(size: int, views: tuple[str, ...], targets: bool, sky: bool, gpu: bool) -> Any:
    start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
    end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    window = {"size": [size, size], "roi_start": start, "roi_end": end, "roi_relative": True, "antialias": False}
    image = _decode_image(gpu)
    image = fn.resize(image, interp_type=types.INTERP_CUBIC, **window)
    outputs = []
    if "clean" in views:
        outputs.append(_normalise(image, flip))
    if "student" in views:
        outputs.append(_normalise(_perturb(image, gpu), flip))
    if targets:
        outputs.append(_labels("target", types.UINT16, flip, window))
    if sky:
        outputs.append(_labels("sky", types.UINT8, flip, window))
    return tuple(outputs)


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def _define_probe(gpu: bool) -> Any:
    return _decode_image(gpu), _decode_codes("target", types.UINT16)


def _decode_image(gpu: bool) -> Any:
    encoded = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)


def _decode_codes(name: str, dtype: Any) -> Any:
    # ANY_DATA and an explicit dtype: by default DALI reduces 16 bits to 8 without a word (see self_test)
    encoded = fn.external_source(name=name, dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="cpu", output_type=types.ANY_DATA, dtype=dtype)


def _labels(name: str, dtype: Any, flip: Any, window: dict[str, Any]) -> Any:
    codes = fn.resize(_decode_codes(name, dtype), interp_type=types.INTERP_NN, **window)
    return fn.flip(codes, horizontal=flip)


# DALI rewrites the `if`s of the definition: a row whose draw says no skips the operator, and stays as it is
def _perturb(image: Any, gpu: bool) -> Any:
    colour = fn.external_source(name="colour", dtype=types.FLOAT, ndim=1)
    blur_sigma = fn.external_source(name="blur_sigma", dtype=types.FLOAT, ndim=0)
    blur_window = fn.external_source(name="blur_window", dtype=types.INT32, ndim=0)
    recolours = fn.external_source(name="recolours", dtype=types.BOOL, ndim=0)
    if recolours:
        factors = {"brightness": colour[0], "contrast": colour[1], "saturation": colour[2], "hue": colour[3]}
        if gpu:
            image = fn.color_twist(image, dtype=types.UINT8, **factors)
        else:  # the same bits, with 2 of 5 ms an image less: the CPU operator rounds slowly, the cast does not
            image = fn.cast(fn.color_twist(image, dtype=types.FLOAT, **factors), dtype=types.UINT8)
    if blur_window > 1:
        image = fn.gaussian_blur(image, sigma=blur_sigma, window_size=blur_window)
    return image


def _normalise(image: Any, flip: Any) -> Any:
    return fn.crop_mirror_normalize(
        image,
        mirror=flip,
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        output_layout="CHW",
        dtype=types.FLOAT,
    )


def _inputs(rows: Sequence[Row], targets: bool, sky: bool, views: tuple[str, ...]) -> dict[str, Any]:
    """What the pipeline is fed: one array per row and input."""
    inputs: dict[str, Any] = {
        "image": _bytes([row.image for row in rows]),
        "start": [np.array([row.geometry.top, row.geometry.left], np.float32) for row in rows],
        "end": [np.array([row.geometry.bottom, row.geometry.right], np.float32) for row in rows],
        "flip": [np.array(row.geometry.flip, np.int32) for row in rows],
    }
    if targets:
        inputs["target"] = _bytes([row.target or _ABSENT_CODE for row in rows])
    if sky:
        inputs["sky"] = _bytes([row.sky or _ABSENT_SKY for row in rows])
    if "student" in views:
        draws = [row.photometric for row in rows]
        inputs["colour"] = [_colour(draw) for draw in draws]
        inputs["recolours"] = [np.array(draw.recolours) for draw in draws]
        inputs["blur_sigma"] = [np.array(draw.blur_sigma or 1.0, np.float32) for draw in draws]
        inputs["blur_window"] = [np.array(_blur_window(draw.blur_sigma), np.int32) for draw in draws]
    return inputs


def _colour(draw: Photometric) -> Any:
    # one operator for both: without saturation the hue no longer matters, and grey commutes with the other two
    saturation = 0.0 if draw.grayscale else draw.saturation
    return np.array([draw.brightness, draw.contrast, saturation, draw.hue_degrees], np.float32)


def _blur_window(sigma: float) -> int:
    return 2 * math.ceil(3 * sigma) + 1  # 3 sigma on either side; 1, nothing, for 0


def _bytes(encoded: Sequence[bytes]) -> list[Any]:
    return [np.frombuffer(data, np.uint8) for data in encoded]


def _png(values: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


_ABSENT_CODE = _png(np.zeros((1, 1), np.uint16))
_ABSENT_SKY = _png(np.zeros((1, 1), np.uint8))
_ABSENT = Row(image=_png(np.zeros((1, 1, 3), np.uint8)))


def self_test(device: torch.device | str = "cpu") -> None:
    """Raise RuntimeError unless this DALI decodes 16-bit codes exactly and in place. Takes a fraction of a second."""
    size = 16
    code_HW = (np.arange(size * size, dtype=np.uint32) * 257 % 65536).astype(np.uint16).reshape(size, size)
    image_HWC = np.repeat((code_HW >> 8).astype(np.uint8)[..., None], 3, axis=2)
    sky_HW = (code_HW > 32768).astype(np.uint8) * 255
    row = Row(image=_png(image_HWC), target=_png(code_HW), sky=_png(sky_HW), geometry=Geometry(flip=True))
    decoded = DaliBatch(1, size, views=("clean",), targets=True, device=device, threads=1).run([row])
    assert decoded.code_BHW is not None
    assert decoded.sky_BHW is not None
    if not np.array_equal(decoded.code_BHW[0].numpy(), code_HW[:, ::-1]):
        raise RuntimeError("DALI does not decode 16-bit PNGs exactly: use nvidia-dali 2.4, with which this was tested")
    if not np.array_equal(decoded.sky_BHW[0].numpy(), sky_HW[:, ::-1]):
        raise RuntimeError("DALI does not decode 8-bit PNGs exactly: use nvidia-dali 2.4, with which this was tested")
    red_HW = decoded.views["clean"][0, 0].cpu().numpy() * STD[0] + MEAN[0]
    if not np.allclose(red_HW * 255, image_HWC[:, ::-1, 0], atol=0.01):
        raise RuntimeError("DALI does not place or scale pixels as expected: use nvidia-dali 2.4")
