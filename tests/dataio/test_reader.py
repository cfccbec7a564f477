import io
import os
import tarfile

import numpy as np
import pytest

import dataio.reader as reader_module
from cluster import storage
from dataio import header
from dataio.codec import decode_png16
from dataio.dataset import Dataset
from dataio.labels import LabelStore
from dataio.plan import RolePlan
from dataio.quarantine import REASONS, BadSample, Quarantine
from dataio.reader import LaneReader, ShardSource, read_samples
from dataio.spec import DataError, RoleNeeds
from dataio.types import AffineCode, Sample

from .fakes import jpeg, labelled, metadata, png, shards_of, smooth, unlabelled, write_dataset, write_labels

DISPARITY = RoleNeeds()
SIDECAR = RoleNeeds(sidecar=True)
IMAGES = RoleNeeds(target="none")


def sources_of(path, labels=None):
    dataset = Dataset.open(path)
    store = LabelStore.open(labels) if labels else None
    for shard in dataset.shards:
        assert len(shard.index.samples) == shard.samples  # parsed now: later damage is then met by the reader
    return [
        ShardSource(
            tar=shard.tar,
            shard=shard,
            label_tar=store.tar(shard.stem) if store else None,
            label_index=(lambda stem=shard.stem: store.index(stem)) if store else None,
            quantity=dataset.info.quantity,
            code=dataset.info.code,
        )
        for shard in dataset.shards
    ]


def test_lanes_hand_out_the_plan_s_samples(tmp_path):
    shards = shards_of([5, 1, 9], labelled)
    sources = sources_of(write_dataset(tmp_path / "d", shards))
    plan = RolePlan("labelled", [5, 1, 9], batch=4, lanes=2, window=6, seed=1)
    readers = [LaneReader(plan, lane, sources, DISPARITY) for lane in range(2)]
    consumed = 0
    while consumed < 2 * plan.samples:
        for lane, reader in enumerate(readers):
            slots = plan.slots(consumed, lane)
            for slot, sample in zip(slots, reader.read(slots), strict=True):
                if slot is None:
                    assert sample is None
                    continue
                key, members = list(shards[slot.shard].items())[slot.index]
                assert (sample.key, sample.image, sample.target) == (key, members["jpg"], members["depth.png"])
                assert (sample.code, sample.quantity, sample.problem) == (AffineCode(scale=0.001), "depth_m", None)
        consumed = plan.advance(consumed)


def test_one_range_read_per_shard_and_window(tmp_path, monkeypatch):
    sources = sources_of(write_dataset(tmp_path / "d", shards_of([8, 8], labelled)))
    plan = RolePlan("labelled", [8, 8], batch=2, lanes=1, window=8, seed=0)
    opened = []
    real = storage.open_range

    def spy(path, start, stop=None):
        opened.append((path, start, stop))
        return real(path, start, stop)

    monkeypatch.setattr(reader_module.storage, "open_range", spy)
    reader, consumed = LaneReader(plan, 0, sources, DISPARITY), 0
    while consumed < plan.samples:
        reader.read(plan.slots(consumed, 0))
        consumed = plan.advance(consumed)
    assert len(opened) == 2  # windows and shards coincide here
    # a resume in the middle of a window reads only from the first sample still needed
    opened.clear()
    LaneReader(plan, 0, sources, DISPARITY).read(plan.slots(6, 0))
    left = [s.index for s in plan.order(0, 6, 8)]
    entries = sources[plan.order(0, 6, 7)[0].shard].shard.index.samples
    assert [(start, stop) for _, start, stop in opened] == [(entries[min(left)].start, entries[max(left)].end)]


def test_targets_are_left_alone_when_not_needed(tmp_path):
    (source,) = sources_of(write_dataset(tmp_path / "d", shards_of([2], labelled)))
    assert [s.target for s in read_samples(source, [0, 1], IMAGES)] == [None, None]


def test_json_overrides_the_code(tmp_path):
    shards = [{"a": {**labelled(0), "json": metadata(scale=0.5, shift=1.0, focal=3)}, "b": labelled(1)}]
    (source,) = sources_of(write_dataset(tmp_path / "d", shards))
    a, b = read_samples(source, [0, 1], DISPARITY)
    assert a.code == AffineCode(scale=0.5, shift=1.0)
    assert a.meta["focal"] == 3
    assert b.code == AffineCode(scale=0.001)


def test_labels_join_by_key(tmp_path):
    shards = shards_of([4, 3], unlabelled)
    sources = sources_of(
        write_dataset(tmp_path / "d", shards, with_depth=False), write_labels(tmp_path / "l", shards, fail=["s0_002"])
    )
    samples = read_samples(sources[0], [0, 2, 3], SIDECAR)
    assert [s.key for s in samples] == ["s0_000", "s0_002", "s0_003"]
    assert [s.problem for s in samples] == [None, "missing_target", None]
    expected = np.random.default_rng(0).uniform(0, 5, (28, 42)).astype(np.float32)
    assert samples[0].code.zero == 16
    assert np.allclose(decode_png16(samples[0].target, samples[0].code), expected, atol=5 / 4000)


def test_npy_depth_becomes_coded_disparity(tmp_path):
    depth_HW = np.linspace(0.5, 80, 48 * 56, dtype=np.float32).reshape(48, 56)
    depth_HW[0, :2] = (np.nan, 0)
    out = io.BytesIO()
    np.save(out, depth_HW)
    shards = [{"a": {"jpg": labelled(0)["jpg"], "depth.npy": out.getvalue()}, "b": {**labelled(0), "json": b"[]"}}]
    shards[0]["c"] = {"jpg": labelled(0)["jpg"], "depth.npy": b"no array"}
    (source,) = sources_of(write_dataset(tmp_path / "d", shards))
    a, b, c = read_samples(source, [0, 1, 2], DISPARITY)
    assert (a.quantity, b.problem, c.problem) == ("disparity", "bad_metadata", "bad_target")
    disparity_HW = decode_png16(a.target, a.code)
    assert np.isnan(disparity_HW[0, :2]).all()
    assert np.allclose(disparity_HW[1:], 1 / depth_HW[1:], atol=2 / 131068 + 1e-6)


def test_npy_depth_stays_metres_where_metres_are_learned(tmp_path):
    """One pixel at a centimetre must not cost the far ones their accuracy, as it would in disparity."""
    depth_HW = np.linspace(0.5, 80, 48 * 56, dtype=np.float32).reshape(48, 56)
    depth_HW[0, :3] = (np.nan, 0, 0.01)
    out = io.BytesIO()
    np.save(out, depth_HW)
    shards = [{"a": {"jpg": labelled(0)["jpg"], "depth.npy": out.getvalue()}}]
    (source,) = sources_of(write_dataset(tmp_path / "d", shards))
    (sample,) = read_samples(source, [0], RoleNeeds(target="depth_m"))
    assert sample.quantity == "depth_m"
    found_HW = decode_png16(sample.target, sample.code)
    assert np.isnan(found_HW[0, :2]).all()
    assert np.abs(found_HW[1:] - depth_HW[1:]).max() <= 80 / 131068 + 1e-5


def test_what_is_missing_has_a_reason(tmp_path):
    shards = [
        {
            "no_image": {"depth.png": labelled(0)["depth.png"]},
            "no_target": unlabelled(1),
            "bad_json": {**labelled(2), "json": b"{"},
            "bad_code": {**labelled(2), "json": metadata(scale=-1)},
            "odd": {"txt": b"nothing of ours"},
            "fine": labelled(3),
        }
    ]
    (source,) = sources_of(write_dataset(tmp_path / "d", shards))
    problems = {s.key: s.problem for s in read_samples(source, range(6), DISPARITY)}
    assert problems == {
        "no_image": "missing_image",
        "no_target": "missing_target",
        "bad_json": "bad_metadata",
        "bad_code": "bad_metadata",
        "odd": "missing_image",
        "fine": None,
    }


@pytest.mark.parametrize("cut_at", [0, 3, 7])
def test_a_cut_shard_loses_only_what_is_behind_the_cut(tmp_path, cut_at):
    (source,) = sources_of(write_dataset(tmp_path / "d", shards_of([8], labelled)))
    entries = source.shard.index.samples
    with open(source.tar, "r+b") as file:
        file.truncate(entries[cut_at].start + 700)
    problems = [s.problem for s in _read(source, entries)]
    assert problems == [None] * cut_at + ["unreadable_member"] * (8 - cut_at)


def test_a_damaged_header_loses_one_sample(tmp_path):
    (source,) = sources_of(write_dataset(tmp_path / "d", shards_of([8], labelled)))
    entries = source.shard.index.samples
    with open(source.tar, "r+b") as file:
        file.seek(entries[3].start)
        file.write(os.urandom(512))
    problems = [s.problem for s in _read(source, entries)]
    assert problems == [None] * 3 + ["unreadable_member"] + [None] * 4


def _read(source, entries):
    """Past the cache of parsed indexes, which would notice the damage."""

    class Opened:
        index = type("Index", (), {"samples": entries, "bad_keys": {}})

    return read_samples(
        ShardSource(tar=source.tar, shard=Opened, quantity=source.quantity, code=source.code),
        range(len(entries)),
        DISPARITY,
    )


def test_long_names_keep_their_own_header(tmp_path):
    names = ["x" * 120 + str(i) for i in range(3)]
    folder = tmp_path / "d"
    write_dataset(folder, [{"t": labelled(0), "u": labelled(1), "v": labelled(2)}])
    tar = folder / "shards" / "000000.tar"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as out:
        for i, name in enumerate(names):
            for extension, data in labelled(i).items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    (source,) = sources_of(str(folder))
    assert [s.key for s in read_samples(source, [1, 2], DISPARITY)] == names[1:]
    assert all(s.problem is None for s in read_samples(source, [1, 2], DISPARITY))


def test_a_missing_shard_is_the_user_s_error(tmp_path):
    (source,) = sources_of(write_dataset(tmp_path / "d", shards_of([2], labelled)))
    entries = source.shard.index.samples
    os.unlink(source.tar)
    with pytest.raises(DataError, match=r"000000\.tar: missing"):
        _read(source, entries)


def _orientated(orientation):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(smooth(0, 48, 56), exif=exif)


GREY16 = png(np.ones((48, 56), np.uint16))


@pytest.mark.parametrize(
    ("sample", "sidecar", "expected"),
    [
        (Sample(key="k", image=jpeg(smooth(0, 48, 56)), target=GREY16), False, header.ImageSize(48, 56)),
        (Sample(key="k", image=_orientated(6)), False, header.ImageSize(56, 48)),
        (Sample(key="k", image=_orientated(6)), True, header.ImageSize(56, 48)),
        *[(Sample(key="k", image=_orientated(n), target=GREY16), False, "rotated_by_exif") for n in range(2, 9)],
        *[(Sample(key="k", image=_orientated(n), target=GREY16), False, header.ImageSize(48, 56)) for n in (0, 1, 9)],
        (Sample(key="k", image=_orientated(6), target=GREY16), True, header.ImageSize(56, 48)),
        (Sample(key="k", image=_orientated(3), target=b"npy", quantity="depth_m"), False, "rotated_by_exif"),
        (Sample(key="k", image=_orientated(1), target=b"npy", quantity="depth_m"), False, header.ImageSize(48, 56)),
        (Sample(key="k", image=jpeg(smooth(0, 40, 56)), target=GREY16), False, "size_mismatch"),
        (Sample(key="k", image=jpeg(smooth(0, 40, 56)), target=GREY16), True, header.ImageSize(40, 56)),
        (Sample(key="k", image=jpeg(smooth(0, 48, 56)), target=png(np.ones((48, 56), np.uint8))), False, "bad_target"),
        (Sample(key="k", image=jpeg(smooth(0, 48, 56)), target=b"x"), False, "bad_target"),
        (Sample(key="k", image=jpeg(smooth(0, 48, 56)), sky=GREY16), False, "bad_target"),
        (Sample(key="k", image=jpeg(smooth(0, 48, 56)), sky=png(np.ones((9, 9), np.uint8))), False, "size_mismatch"),
        (Sample(key="k", image=b""), False, "bad_image"),
        (Sample(key="k", image=b"GIF89a"), False, "bad_image"),
    ],
)
def test_headers_tell_what_cannot_work(sample, sidecar, expected):
    assert header.look(sample, sidecar=sidecar) == expected


@pytest.mark.parametrize(
    ("height", "width", "fits"),
    [
        (10_000, 10_000, True),
        (10_001, 10_001, False),
        (20_000, 20_000, False),
        (1, 10_000, True),
        (1, 10_001, False),
        (20_001, 2, False),
        (5_000_000, 1, False),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_absurd_sizes_are_refused_before_decoding(height, width, fits):
    import struct
    import zlib

    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    image += struct.pack(">I", 100) + b"IDAT" + bytes(104)
    expected = header.ImageSize(height, width) if fits else "too_large"
    assert header.look(Sample(key="k", image=image), sidecar=False) == expected


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_displayed_as_exif_says(orientation, extension):
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(smooth(0, 48, 56)).save(file, extension, exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = header.displayed(file.getvalue())
    assert np.array_equal(found, expected)
    assert header.is_turned(file.getvalue()) == (orientation in range(2, 9))
    size = header.look(Sample(key="k", image=file.getvalue()), sidecar=False)
    assert size == header.ImageSize(*found.shape[:2])


def test_the_orientation_is_the_one_that_dali_sees():
    """EXIF behind a PNG's pixels counts, XMP in a JPEG does not."""
    from PIL import Image

    from dataio.dali_frames import FramePipeline

    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(smooth(0, 48, 56)).save(file, "PNG", exif=exif)
    early = file.getvalue()
    start = early.index(b"eXIf") - 4
    chunk = early[start : start + 12 + int.from_bytes(early[start : start + 4], "big")]
    late = early.replace(chunk, b"")
    late = late[:-12] + chunk + late[-12:]
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    noted = jpeg(smooth(0, 48, 56), xmp=xmp)
    for image, turned in ((early, True), (late, True), (noted, False)):
        size = header.look(Sample(key="k", image=image), sidecar=False)
        assert size == (header.ImageSize(56, 48) if turned else header.ImageSize(48, 56))
        shown = FramePipeline(1, 1, "cpu").run([image], (size.height, size.width))[0][0].mean(0).numpy()
        plain = header.displayed(image).mean(-1)
        assert np.corrcoef(shown.ravel(), plain.ravel())[0, 1] > 0.99


def test_sixteen_bits_of_grey_are_not_clipped():
    grey_HW = smooth(0, 48, 56)[..., 0]
    assert np.array_equal(header.displayed(png(grey_HW.astype(np.uint16) * 257)), np.repeat(grey_HW[..., None], 3, -1))


def test_quarantine_names_once_and_stops_past_the_fraction(tmp_path):
    path = str(tmp_path / "quarantine.jsonl")
    bad = BadSample("k", "000000.tar", "bad_image")
    quarantine = Quarantine(path, 0.01)
    quarantine.record(150, [bad, bad])  # too few seen to judge
    quarantine.record(40, [bad])
    assert quarantine.counts == {"bad_image": 3}
    with pytest.raises(DataError, match=r"4 of 290 samples are bad: 4 bad_image .* k in 000000.tar.*max_bad_fraction"):
        quarantine.record(100, [bad])
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert lines == ['{"key": "k", "shard": "000000.tar", "reason": "bad_image"}']
    again = Quarantine(path, 0.5)
    again.record(10, [bad, BadSample("l", "000000.tar", "bad_target")])
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2
    with pytest.raises(DataError):
        Quarantine(None, 0.1).record(5, [bad], end_of_pass=True)
    with pytest.raises(ValueError, match="unknown reason"):
        Quarantine(None, 0.1).record(5, [BadSample("k", "t", "because")])
    assert all(reason == reason.lower() and text for reason, text in REASONS.items())
