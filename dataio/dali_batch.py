"""Encoded images -> views and codes: one DALI pipeline definition for CPU and GPU, and threads for the codes.

Per row: decode; resize and cut out S x S pixels (images cubic without antialiasing, 8-bit; codes and sky masks nearest,
`dataio.maps`); flip. The view "clean" is that, normalised; the view "student" has colour and blur in between, in
floating point, clipped once at the end. The order of the colour operations is fixed: hue and saturation (grey is
saturation 0), contrast around 128, brightness, then blur: docs/perturbations.md.

What is placed otherwise on a CPU: the cubic resize is `dataio.resize` (a = -0.75, OpenCV's), which a Python operator
calls; on a GPU it is DALI's own (a = -0.5: a few grey levels at edges).

A damaged image ends a DALI pipeline object: the culprit is found, replaced, and the pipeline built anew (tens of
milliseconds); all other rows come out as they would have, since every random number is an input.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import OperatorConcurrency
from PIL import Image

from dataio.draws import Geometry, Photometric
from dataio.maps import MapDecoder, Maps, Started
from dataio.resize import resized_window

VIEWS = ("clean", "student")
AHEAD = 2  # batches under way at once: one alone leaves threads idle where its operators cannot share them
MEAN = (0.485, 0.456, 0.406)  # ImageNet, of RGB in 0..1
STD = (0.229, 0.224, 0.225)
_NO_MEMORY = re.compile(r"out of memory|allocation failed|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample to decode: encoded bytes, and what to do with them."""

    image: bytes
    target: bytes | None = None  # 16-bit grey PNG
    sky: bytes | None = None  # 8-bit grey PNG
    geometry: Geometry | None = None  # None: the whole image, squeezed
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
        self,
        batch: int,
        size: int,
        *,
        views: Sequence[str],
        targets: bool,
        device: torch.device | str,
        threads: int,
        pinned: bool = True,
    ) -> None:
        unknown = set(views) - set(VIEWS)
        if unknown:
            raise ValueError(f"no such view: {', '.join(sorted(unknown))}")
        self._batch, self._size, self._threads = batch, size, threads
        self._views = tuple(view for view in VIEWS if view in views)
        self._device = torch.device(device)
        self._maps = MapDecoder(size, threads, pinned=pinned and self._device.type == "cuda") if targets else None
        self._pipelines: dict[int, Any] = {}  # as many as batches are under way at once; built when needed
        self._probe = Probe(self._device)
        self._started: deque[tuple[Sequence[Row | None], Started | None, int]] = deque()
        self.rebuilds = 0

    def run(self, rows: Sequence[Row | None]) -> Decoded:
        """Decode one batch. RuntimeError only for what no single row is to blame for."""
        self.start(rows)
        return self.finish()

    def start(self, rows: Sequence[Row | None]) -> None:
        """Begin to decode a batch on DALI's threads; at most `AHEAD` may be started and not finished."""
        if len(rows) != self._batch:
            raise ValueError(f"{len(rows)} rows for a batch of {self._batch}")
        if len(self._started) == AHEAD:
            raise RuntimeError(f"{AHEAD} batches are started and not finished")
        turn = next(turn for turn in range(AHEAD) if turn not in {taken for _, _, taken in self._started})
        maps = self._maps.start([self._encoded_maps(row) for row in rows]) if self._maps is not None else None
        self._schedule(turn, rows)
        self._started.append((rows, maps, turn))

    def finish(self) -> Decoded:
        """The batch that was started first. RuntimeError only for what no single row is to blame for."""
        rows, maps, turn = self._started.popleft()
        views, bad = self._views_of(rows, turn)
        code_BHW, sky_BHW, undecoded = maps.result() if maps is not None else (None, None, [])
        return Decoded(
            views=views, code_BHW=code_BHW, sky_BHW=sky_BHW, bad=dict.fromkeys(undecoded, "bad_target") | bad
        )

    def _views_of(self, rows: Sequence[Row | None], turn: int) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
        """The views of what was scheduled; and the rows that hold a placeholder, as their image does not decode."""
        try:
            return self._take(turn), {}
        except RuntimeError:
            del self._pipelines[turn]
            self.rebuilds += 1
            bad = [i for i, row in enumerate(rows) if row is not None and not self._probe.decodes(row.image)]
            if not bad:
                raise
        self._schedule(turn, [None if i in bad else row for i, row in enumerate(rows)])
        return self._take(turn), dict.fromkeys(bad, "bad_image")

    def close(self) -> None:
        """Let go of pipelines and threads; what is under way is lost."""
        self._started.clear()
        self._pipelines.clear()
        if self._maps is not None:
            self._maps.close()

    def _schedule(self, turn: int, rows: Sequence[Row | None]) -> None:
        if turn not in self._pipelines:
            self._pipelines[turn] = self._build()
        for name, data in self._inputs([row or _ABSENT for row in rows]).items():
            self._pipelines[turn].feed_input(name, data)
        self._pipelines[turn].schedule_run()

    def _take(self, turn: int) -> dict[str, torch.Tensor]:
        # without a copy: each run of the dynamic executor has buffers of its own
        tensors = [torch.from_dlpack(output.as_tensor()) for output in self._pipelines[turn].outputs()]
        if self._device.type == "cuda":  # there a batch outlives the run on another stream, which DALI cannot know
            tensors = [tensor.clone() for tensor in tensors]
            # DALI gives its buffers to the other pipeline as soon as they are let go of here
            torch.cuda.current_stream(self._device).synchronize()
        views = dict(zip(self._views, tensors, strict=True))
        if "student" in views:
            _clip(views["student"])
        return views

    def _encoded_maps(self, row: Row | None) -> Maps | None:
        return None if row is None else Maps(target=row.target, sky=row.sky, geometry=self._window(row))

    def _window(self, row: Row) -> Geometry:
        return row.geometry or Geometry(height=self._size, width=self._size)

    def _build(self) -> Any:
        gpu = self._device.type == "cuda"
        device_id = (self._device.index or 0) if gpu else None
        pipeline = _define(
            self._size, self._views, gpu, batch_size=self._batch, num_threads=self._threads, device_id=device_id
        )
        pipeline.build()
        return pipeline

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What the pipeline is fed: one array per row and input."""
        windows = [self._window(row) for row in rows]
        resized = np.array([(window.height, window.width) for window in windows], np.int32)
        corners = np.array([(window.top, window.left) for window in windows], np.int32)
        inputs: dict[str, Any] = {
            "image": as_arrays([row.image for row in rows]),
            "flip": [np.array(window.flip, np.int32) for window in windows],
        }
        if self._device.type == "cuda":
            inputs["start"] = list((corners / resized).astype(np.float32))
            inputs["end"] = list(((corners + self._size) / resized).astype(np.float32))
        else:
            inputs["window"] = list(np.concatenate([resized, corners], axis=1))
        if "student" in self._views:
            draws = [row.photometric for row in rows]
            inputs["colour"] = [_colour(draw) for draw in draws]
            inputs["recolours"] = [np.array(draw.recolours) for draw in draws]
            inputs["blur_sigma"] = [np.array(draw.blur_sigma or 1.0, np.float32) for draw in draws]
            inputs["blur_window"] = [np.array(_blur_window(draw.blur_sigma), np.int32) for draw in draws]
        return inputs


class Probe:
    """Tells of one image at a time whether DALI decodes it, on `device`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._pipeline: Any = None  # built when needed, and anew behind an image that ended it

    def decodes(self, image: bytes) -> bool:
        """Whether an encoded image becomes pixels.

        RuntimeError, never for a damaged image: for too little memory, and when a good image is not decoded either.
        """
        try:
            self._run(image)
        except RuntimeError as error:
            self._pipeline = None
            if _NO_MEMORY.search(str(error)):  # says nothing of the image
                raise
            try:
                self._run(_ABSENT.image or b"")
            except RuntimeError:
                self._pipeline = None
                raise error from None
            return False
        return True

    def _run(self, image: bytes) -> None:
        if self._pipeline is None:
            gpu = self._device.type == "cuda"
            device_id = (self._device.index or 0) if gpu else None
            self._pipeline = define_decoder(gpu, batch_size=1, num_threads=1, device_id=device_id)
            self._pipeline.build()
        self._pipeline.feed_input("image", as_arrays([image]))
        self._pipeline.run()


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1, enable_conditionals=True, concurrency=OperatorConcurrency.FULL)
def _define(size: int, views: tuple[str, ...], gpu: bool) -> Any:
    image = _decode_image(gpu)
    if gpu:
        start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
        end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
        window = {"size": [size, size], "roi_start": start, "roi_end": end, "roi_relative": True}
        image = fn.resize(image, interp_type=types.INTERP_CUBIC, antialias=False, **window)
    else:
        place = fn.external_source(name="window", dtype=types.INT32, ndim=1)
        image = fn.python_function(image, place, function=partial(resized_window, size=size), output_layouts="HWC")
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    outputs = []
    if "clean" in views:
        outputs.append(_normalise(image, flip))
    if "student" in views:
        outputs.append(_normalise(_perturb(image), flip))
    return tuple(outputs)


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def define_decoder(gpu: bool) -> Any:
    """Encoded images under the name "image" -> uint8 RGB, upright, each of its own size."""
    return _decode_image(gpu)


def _decode_image(gpu: bool) -> Any:
    encoded = fn.external_source(name="image", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)


# DALI rewrites the `if`s of the definition: a row whose draw says no skips the operator, and stays as it is
def _perturb(image: Any) -> Any:
    colour = fn.external_source(name="colour", dtype=types.FLOAT, ndim=1)
    blur_sigma = fn.external_source(name="blur_sigma", dtype=types.FLOAT, ndim=0)
    blur_window = fn.external_source(name="blur_window", dtype=types.INT32, ndim=0)
    recolours = fn.external_source(name="recolours", dtype=types.BOOL, ndim=0)
    # not rounded and not clipped between the steps: more exact, and on a CPU rounding takes longer than the steps
    if recolours:
        factors = {"brightness": colour[0], "contrast": colour[1], "saturation": colour[2], "hue": colour[3]}
        image = fn.color_twist(image, dtype=types.FLOAT, **factors)
    else:
        image = fn.cast(image, dtype=types.FLOAT)
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


def _clip(view_BCHW: torch.Tensor) -> None:
    """Black and white are the ends of what a camera writes: in place, as there are no levels any more."""
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        view_BCHW[:, channel].clamp_(-mean / std, (1 - mean) / std)


def _colour(draw: Photometric) -> Any:
    # one operator for both: without saturation the hue no longer matters, and grey commutes with the other two
    saturation = 0.0 if draw.grayscale else draw.saturation
    return np.array([draw.brightness, draw.contrast, saturation, draw.hue_degrees], np.float32)


def _blur_window(sigma: float) -> int:
    return 2 * math.ceil(3 * sigma) + 1  # 3 sigma on either side; 1, nothing, for 0


def as_arrays(encoded: Sequence[bytes]) -> list[Any]:
    """As `feed_input` takes them."""
    return [np.frombuffer(data, np.uint8) for data in encoded]


def _png(values: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


_ABSENT = Row(image=_png(np.zeros((1, 1, 3), np.uint8)))


def self_test(device: torch.device | str = "cpu") -> None:
    """Raise RuntimeError unless images and 16-bit codes are decoded exactly, in place. Takes a fraction of a second."""
    size = 16
    code_HW = (np.arange(size * size, dtype=np.uint32) * 257 % 65536).astype(np.uint16).reshape(size, size)
    image_HWC = np.repeat((code_HW >> 8).astype(np.uint8)[..., None], 3, axis=2)
    sky_HW = (code_HW > 32768).astype(np.uint8) * 255
    window = Geometry(height=size, width=size, flip=True)
    row = Row(image=_png(image_HWC), target=_png(code_HW), sky=_png(sky_HW), geometry=window)
    decoded = DaliBatch(1, size, views=("clean",), targets=True, device=device, threads=1).run([row])
    for found_BHW, written_HW in ((decoded.code_BHW, code_HW), (decoded.sky_BHW, sky_HW)):
        if found_BHW is None or not np.array_equal(found_BHW[0].numpy(), written_HW[:, ::-1]):
            raise RuntimeError("PNGs of 8 or 16 bits are not decoded exactly: is Pillow what setup.py asks for?")
    red_HW = decoded.views["clean"][0, 0].cpu().numpy() * STD[0] + MEAN[0]
    if not np.allclose(red_HW * 255, image_HWC[:, ::-1, 0], atol=0.01):
        raise RuntimeError("DALI does not place or scale pixels as expected: use nvidia-dali 2.4")
