"""Whole images: the originals' resize, mixed shapes in bounded memory, exact float truth, orientation."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.dali_batch import Probe
from dataio.dali_frames import FramePipeline
from dataio.frames import Frame, batches_by_shape
from dataio.header import ImageSize, look
from dataio.types import Sample
from model.depth_anything import normalise_photograph


def png(image_HWC: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG", **options)
    return out.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size_hw", [(56, 84), (28, 28), (30, 42), (112, 70)])
def test_the_network_sees_what_infer_image_shows_it(size_hw: tuple[int, int]) -> None:
    """DALI's own cubic (a = -0.5) is off by more than 0.1 on noise."""
    images = [noise(30, 42), noise(60, 50)]
    image_BCHW, good = FramePipeline(2, 1, "cpu").run([png(image) for image in images], size_hw)
    assert good == [True, True]
    expected_BCHW = torch.cat([normalise_photograph(image, size_hw) for image in images])
    assert (image_BCHW - expected_BCHW).abs().max() < 2e-3


def test_a_damaged_image_costs_only_itself() -> None:
    pipeline = FramePipeline(3, 1, "cpu")
    images = [png(noise(20, 20)), png(noise(20, 20))[:300], png(noise(28, 28))]
    image_BCHW, good = pipeline.run(images, (28, 28))
    assert good == [True, False, True]
    assert torch.equal(image_BCHW, pipeline.run([images[0], images[2]], (28, 28))[0])


@pytest.mark.parametrize("says", ["uncorrectable ECC error encountered", "Resource temporarily unavailable"])
def test_of_a_decoder_that_decodes_nothing_no_image_is_to_blame(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, image: bytes) -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(Probe, "_run", fail)
    monkeypatch.setattr(FramePipeline, "_decode", fail)
    with pytest.raises(RuntimeError, match=says):
        FramePipeline(2, 1, "cpu").run([png(noise(20, 20)), png(noise(28, 28))], (28, 28))


def test_what_no_image_is_to_blame_for_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory is a RuntimeError too; as bad images, whole batches would go into the ledger as failed."""

    class Full:
        def feed_input(self, name: str, data: object) -> None: ...

        def run(self) -> None:
            raise RuntimeError("CUDA allocation failed")

    pipeline = FramePipeline(2, 1, "cpu")
    pipeline._pipeline = Full()
    with pytest.raises(RuntimeError, match="CUDA allocation failed"):
        pipeline.run([png(noise(20, 20)), png(noise(28, 28))], (28, 28))
    assert pipeline.run([png(noise(20, 20))], (28, 28))[1] == [True]  # with a new pipeline

    pipeline._pipeline, pipeline._probe._pipeline = Full(), Full()  # not even room for one image to look at
    with pytest.raises(RuntimeError, match="CUDA allocation failed"):
        pipeline.run([png(noise(20, 20)), png(noise(20, 20))[:300]], (28, 28))

    def too_large(*args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("dataio.dali_frames._prepare", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.run([png(noise(20, 20))], (28, 28))


def test_a_batch_of_nothing_but_damage_is_empty() -> None:
    assert FramePipeline(2, 1, "cpu").run([b"", png(noise(20, 20))[:300]], (28, 28)) == (None, [False, False])


def frame(index: int, input_hw: tuple[int, int]) -> Frame:
    return Frame(index=index, sample=Sample(key=str(index)), size_hw=input_hw, input_hw=input_hw)


def test_a_rare_shape_does_not_hold_back_the_rest_of_a_shard() -> None:
    frames = [frame(0, (14, 28)), *(frame(i, (14, 14)) for i in range(1, 1000))]
    seen = 0
    for group in batches_by_shape(frames, batch=7, hold=20):
        assert len({f.input_hw for f in group}) == 1 and len(group) <= 7
        seen += len(group)
        if group[0].index == 0:
            break
    assert seen <= 22
    everything = [f.index for group in batches_by_shape(frames, batch=7, hold=20) for f in group]
    assert sorted(everything) == list(range(1000))


def test_a_png_turned_by_exif_has_the_size_it_is_shown_with() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = png(noise(40, 80), exif=exif)
    assert look(Sample(key="a", image=turned), sidecar=False) == ImageSize(height=80, width=40)
    image_BCHW, _ = FramePipeline(1, 1, "cpu").run([turned], (80, 40))
    upright = np.rot90(noise(40, 80), -1).copy()
    assert torch.allclose(image_BCHW, normalise_photograph(upright, (80, 40)), atol=1e-5)
