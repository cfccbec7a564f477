"""16-bit codes and sky masks: every way a PNG may be written, and every way it may be damaged."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataio import codec, maps, png16
from dataio.draws import Geometry
from dataio.maps import MapDecoder, Maps
from dataio.png16 import decode_codes
from dataio.types import AffineCode

from .fakes import png

SMOOTH_HW = (np.add.outer(np.arange(40), 3 * np.arange(50)) * 97 % 65536).astype(np.uint16)
WHOLE = Geometry(height=40, width=50)


def written(code_HW, filters=(0,), *, interlace=0, split=0, extra=b""):
    """A 16-bit grey PNG by hand: rows of the filters, taking turns; pixels in chunks of `split` bytes."""
    height, width = code_HW.shape
    plain_HN = code_HW.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    rows = []
    for y in range(height):
        kind = filters[y % len(filters)]
        above = plain_HN[y - 1] if y else 0 * plain_HN[0]
        left, corner = (np.concatenate([[0, 0], line[:-2]]) for line in (plain_HN[y], above))
        predicted = {0: 0 * above, 1: left, 2: above, 3: (left + above) // 2, 4: _paeth(left, above, corner)}[kind]
        rows.append(bytes([kind]) + ((plain_HN[y] - predicted) % 256).astype(np.uint8).tobytes())
    data = zlib.compress(b"".join(rows))
    pieces = [data[i : i + split] for i in range(0, len(data), split)] if split else [data]
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, interlace)
    chunks = [(b"IHDR", header), *([(b"tEXt", extra)] if extra else []), *((b"IDAT", piece) for piece in pieces)]
    return png16.SIGNATURE + b"".join(_chunk(*chunk) for chunk in [*chunks, (b"IEND", b"")])


def _paeth(a, b, c):
    p = a + b - c
    pa, pb, pc = abs(p - a), abs(p - b), abs(p - c)
    return np.where((pa <= pb) & (pa <= pc), a, np.where(pb <= pc, b, c))


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("filters", [(0,), (2,), (0, 2), (2, 2, 0), (1,), (3,), (4,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("split", [0, 7, 1000])
def test_every_row_filter(filters, split):
    data = written(SMOOTH_HW, filters, split=split, extra=b"Comment\0IDAT")
    assert np.array_equal(decode_codes(data), SMOOTH_HW)
    assert (png16.decode_plain(data) is not None) == (set(filters) <= {0, 2})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_what_this_program_and_pillow_write(height, width, seed):
    code_HW = np.random.default_rng(seed).integers(0, 65536, (height, width)).astype(np.uint16)
    assert np.array_equal(decode_codes(png(code_HW)), code_HW)
    ours, _ = codec.encode_png16(np.where(code_HW, code_HW, np.nan), AffineCode(scale=1.0))
    assert png16.decode_plain(ours) is not None
    assert np.array_equal(decode_codes(ours), code_HW)


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda data: b"",
        "no png": lambda data: b"x" * 100,
        "header only": lambda data: data[:33],
        "cut in a chunk's head": lambda data: data[:36],
        "cut in the pixels": lambda data: data[:-60],
        "no end": lambda data: data[:-12],
        "a stream without its checksum": lambda data: with_pixels(lambda packed: packed[:-4]),
        "a stream with half its checksum": lambda data: with_pixels(lambda packed: packed[:-2]),
        "a stream with another checksum": lambda data: with_pixels(lambda packed: packed[:-1] + b"x"),
        "a changed byte": lambda data: data[:80] + bytes([data[80] ^ 1]) + data[81:],
        "fewer rows than claimed": lambda data: data[:20] + struct.pack(">I", 41) + data[24:],
        "more rows than claimed": lambda data: data[:20] + struct.pack(">I", 39) + data[24:],
        "a filter there is not": lambda data: written_with_filter(9),
    }.items(),
    ids=lambda item: item[0],
)
def test_damage_is_an_error(damage):
    data = damage[1](written(SMOOTH_HW, (2,)))
    with pytest.raises(Exception, match=r"."):
        decode_codes(data)
    good = Maps(target=written(SMOOTH_HW), sky=None, geometry=WHOLE)
    decoder = MapDecoder(40, 2, pinned=False)
    code_BHW, sky_BHW, bad = decoder.start([good, Maps(target=data, sky=None, geometry=WHOLE), None, good]).result()
    assert bad == [1]
    assert sky_BHW is None
    assert not code_BHW[1:3].numpy().any()
    assert np.array_equal(code_BHW[3].numpy(), SMOOTH_HW[:, :40])


def with_pixels(change):
    """As `written`, the compressed pixels changed, in a chunk that is whole."""
    rows = np.zeros((40, 101), np.uint8)
    rows[:, 1:] = SMOOTH_HW.astype(">u2").view(np.uint8)
    header = struct.pack(">IIBBBBB", 50, 40, 16, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", change(zlib.compress(rows.tobytes()))), (b"IEND", b""))
    return png16.SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks)


def test_too_little_memory_is_nobodys_fault(monkeypatch):
    assert np.array_equal(decode_codes(with_pixels(lambda packed: packed)), SMOOTH_HW)

    def fail(png):
        raise MemoryError

    monkeypatch.setattr(maps, "decode_codes", fail)
    started = MapDecoder(40, 1, pinned=False).start([Maps(target=b"", sky=None, geometry=WHOLE)])
    with pytest.raises(MemoryError):
        started.result()


def written_with_filter(kind):
    rows = bytes([kind, 0, 0]) * 2
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 2, 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return png16.SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks)


def test_a_bomb_is_not_inflated():
    """A header of 2 x 2 pixels before 64 MiB of zeros."""
    header = struct.pack(">IIBBBBB", 2, 2, 16, 0, 0, 0, 0)
    packer = zlib.compressobj()
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    data = png16.SIGNATURE + b"".join(_chunk(*c) for c in ((b"IHDR", header), (b"IDAT", bomb), (b"IEND", b"")))
    with pytest.raises(ValueError, match="11 bytes of pixels, not 10"):
        decode_codes(data)


def test_interlaced_files_go_to_pillow():
    """Pillow cannot write one; that it is asked is enough."""
    data = written(SMOOTH_HW, interlace=1)
    assert png16.decode_plain(data) is None


def test_sky_masks_and_flips():
    sky_HW = (SMOOTH_HW % 256).astype(np.uint8)
    rows = [
        Maps(target=None, sky=png(sky_HW), geometry=Geometry(height=80, width=100, top=3, left=5, flip=flip))
        for flip in (False, True)
    ]
    code_BHW, sky_BHW, bad = MapDecoder(20, 1, pinned=False).start(rows).result()
    assert not bad
    assert not code_BHW.numpy().any()
    expected_HW = sky_HW[np.ix_((3 + np.arange(20)) // 2, (5 + np.arange(20)) // 2)]
    assert np.array_equal(sky_BHW[0].numpy(), expected_HW)
    assert np.array_equal(sky_BHW[1].numpy(), expected_HW[:, ::-1])


def test_a_bad_sky_mask_is_a_bad_row():
    row = Maps(target=written(SMOOTH_HW), sky=b"y", geometry=WHOLE)
    code_BHW, sky_BHW, bad = MapDecoder(40, 1, pinned=False).start([row]).result()
    assert bad == [0]
    assert not code_BHW.numpy().any()
    assert not sky_BHW.numpy().any()


def test_pillow_reads_what_is_written_here():
    for filters in ((0,), (2,), (4,), (0, 1, 2, 3, 4)):
        with Image.open(io.BytesIO(written(SMOOTH_HW, filters))) as image:
            assert np.array_equal(np.asarray(image), SMOOTH_HW)


def test_another_signature_is_no_png():
    with pytest.raises(Exception, match=r"."):
        decode_codes(b"\0" + written(SMOOTH_HW)[1:])


@pytest.mark.parametrize("filters", [(0, 2), (4,)])
def test_codes_are_in_this_machines_order(filters):
    assert decode_codes(written(SMOOTH_HW, filters)).dtype.str == np.dtype(np.uint16).str


def test_rows_are_decoded_side_by_side(monkeypatch):
    both = threading.Barrier(2)
    monkeypatch.setattr(maps, "decode_codes", lambda png: (both.wait(10), SMOOTH_HW)[1])
    rows = [Maps(target=b"", sky=None, geometry=WHOLE)] * 2
    assert not MapDecoder(40, 2, pinned=False).start(rows).result()[2]


def test_a_second_header_does_not_get_round_the_limit():
    """Pillow, which `dataio.header` asks, takes the last one."""
    data = written(SMOOTH_HW)
    large = _chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="60000 x 60000 pixels"):
        decode_codes(data[:8] + large + data[8:])
