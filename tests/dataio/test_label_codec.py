"""Labels in three formats: within their bounds, the same bytes every time, and damage is an error."""

import hashlib
import io
import json
import struct
import sys
import zlib

import imagecodecs
import isal
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dataio import label_codec
from dataio.codec import encode_label, label_steps, read_png16
from dataio.label_codec import EXTENSIONS, as_png16, check_available, decode, encode, fingerprint, member_of, shares
from dataio.spec import DataError

ENCODINGS = ("png", "npy", "jxl")
RAMP_HW = (np.add.outer(np.arange(40), 3 * np.arange(50)) / 7 - 3).astype(np.float32)
HOLES_HW = np.where(np.arange(50) % 5 == 0, np.nan, RAMP_HW)

MAPS = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda shape: arrays(
        np.float32,
        shape,
        elements=st.one_of(
            st.floats(-1e4, 1e4, width=32), st.floats(0, 1, width=32), st.sampled_from([np.nan, np.inf, -np.inf])
        ),
    )
)


def codes_of(extension, data, meta):
    """The quantity of what training's decoder is given, float64 with NaN holes."""
    png, code = as_png16(extension, data, meta)
    code_HW = read_png16(png).astype(np.float64)
    return np.where(code_HW > 0, code.scale * (code_HW - code.zero) + code.shift, np.nan)


def bound(encoding, value_HW, low, high):
    span = high - low
    if encoding != "npy":
        return np.full(value_HW.shape, span / 8188)
    return np.maximum((value_HW - low) * 2.0**-11, span * 2.0**-25)


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=60, deadline=None)
@given(MAPS)
def test_a_map_comes_back_within_its_bound(encoding, disparity_HW):
    valid_HW = np.isfinite(disparity_HW)
    if not valid_HW.any():
        with pytest.raises(DataError, match="no finite value"):
            encode(disparity_HW, encoding)
        return
    label = encode(disparity_HW, encoding)
    meta = json.loads(json.dumps(label.meta))  # as it stands in KEY.json
    found_HW = decode(label.extension, label.data, meta)
    assert found_HW.dtype == np.float32 and found_HW.shape == disparity_HW.shape
    assert np.array_equal(np.isfinite(found_HW), valid_HW)
    low, high = (float(f(disparity_HW[valid_HW])) for f in (np.min, np.max))
    value_HW = np.where(valid_HW, disparity_HW, low).astype(np.float64)
    rounding = 2e-7 * max(abs(low), abs(high)) + 1e-38
    off_HW = np.where(valid_HW, np.abs(found_HW - value_HW), 0)
    assert np.all(off_HW <= bound(encoding, value_HW, low, high) * (1 + 1e-9) + rounding)
    given_HW = codes_of(label.extension, label.data, meta)
    assert np.array_equal(np.isfinite(given_HW), valid_HW)
    extra = (high - low) / 131068 if encoding == "npy" else 0
    assert np.all(np.where(valid_HW, np.abs(given_HW - found_HW), 0) <= extra + rounding)


def test_jxl_holds_the_codes_of_the_png():
    png, jxl = encode(HOLES_HW, "png"), encode(HOLES_HW, "jxl")
    assert {k: jxl.meta[k] for k in png.meta} == dict(png.meta)
    assert np.array_equal(read_png16(png.data), read_png16(as_png16(jxl.extension, jxl.data, jxl.meta)[0]))
    assert np.array_equal(imagecodecs.jpegxl_decode(jxl.data), read_png16(png.data) // 16)


def test_png_is_that_of_encode_label_and_is_handed_on_as_it_is():
    label = encode(HOLES_HW, "png")
    data, code = encode_label(HOLES_HW)
    assert (label.data, label.meta["scale"], label.meta["shift"]) == (data, code.scale, code.shift)
    assert as_png16(label.extension, label.data, label.meta) == (label.data, code)
    code_HW = read_png16(data)
    assert code_HW.min() == 0 and code_HW[code_HW > 0].min() == 16 and code_HW.max() == 65520
    assert not np.any(code_HW & 15)


def test_npy_is_what_numpy_and_dali_read():
    label = encode(HOLES_HW, "npy")
    value_HW = np.load(io.BytesIO(label.data))
    assert label.data[6:8] == b"\1\0"  # version 1.0, the only one that DALI takes
    assert value_HW.dtype == np.float16 and np.array_equal(np.isnan(value_HW), np.isnan(HOLES_HW))
    assert np.nanmin(value_HW) == 0 and np.nanmax(value_HW) == 1
    assert label.meta["scale"] == pytest.approx(np.nanmax(HOLES_HW) - np.nanmin(HOLES_HW))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_bytes_do_not_depend_on_how_the_map_lies_in_memory_nor_on_what_is_in_a_hole(encoding):
    first = encode(HOLES_HW, encoding)
    encode(np.random.default_rng(0).random((99, 99)), encoding)
    wide_HW = np.zeros((80, 50), np.float64)
    wide_HW[::2] = np.where(np.isnan(HOLES_HW), np.inf, HOLES_HW)
    for same_HW in (np.asfortranarray(HOLES_HW), wide_HW[::2], np.where(np.isnan(HOLES_HW), -np.nan, HOLES_HW)):
        assert encode(same_HW, encoding) == first


@pytest.mark.parametrize(
    ("encoding", "library", "expected"),
    [
        ("png", isal.ISAL_VERSION == "2.32.1", "30d6ae461fb576aa"),
        ("npy", True, "86eb31bb6981bf03"),
        ("jxl", imagecodecs.jpegxl_version() == "libjxl 0.11.2", "481f6863fea98058"),
    ],
)
def test_the_bytes_are_those_that_other_processors_wrote(encoding, library, expected):
    """Seen on a processor with AVX-512 and, emulated, on one with AVX2 and one with SSE4.2 alone."""
    if not library:
        pytest.skip("another version of the library than the one that was looked at")
    assert fingerprint(encoding) == expected


def test_a_fingerprint_is_that_of_the_bytes(monkeypatch):
    before = fingerprint("png")
    monkeypatch.setattr(label_codec, "write_dense_png16", lambda code_HW: b"other")
    assert fingerprint.__wrapped__("png") == hashlib.sha256(b"other").hexdigest()[:16] != before


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [0.0, 7.5, -1e4, 1e30])
def test_a_flat_map_comes_back(encoding, value):
    label = encode(np.full((3, 4), value), encoding)
    assert np.array_equal(decode(label.extension, label.data, label.meta), np.full((3, 4), value, np.float32))
    assert (label.meta["saturated"], label.meta["constant"]) == (1.0, 1.0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_range_that_float32_does_not_hold(encoding):
    tiny = encode(np.array([[0, 1e-42]], np.float32), encoding)  # 65504 steps of it are below the smallest float32
    assert np.all(decode(tiny.extension, tiny.data, tiny.meta) <= 1e-42)
    with pytest.raises(DataError, match="too large for float32"):
        encode(np.array([[-3e38, 3e38]]), encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zero_has_no_sign(encoding):
    labels = [encode(np.array([[first, second, 1.0]]), encoding) for first in (0.0, -0.0) for second in (0.0, -0.0)]
    assert {json.dumps(dict(label.meta)) for label in labels} == {json.dumps(dict(labels[0].meta))}
    assert {label.data for label in labels} == {labels[0].data}


@pytest.mark.parametrize("shape", [(5,), (1, 2, 2)])
def test_only_maps_are_taken(shape):
    with pytest.raises(ValueError, match="needs a map"):
        encode(np.zeros(shape), "png")


def test_shares_by_hand():
    step_HW = np.array([[1, 1, 4095], [1, 7, 7], [1, 7, 0]], np.uint16)
    # eight valid pixels, five at an end; of the four with both neighbours (0, 0) and (1, 1) have their code in both
    assert shares(step_HW) == {"saturated": 0.625, "constant": 0.5}
    assert shares(np.zeros((2, 2), np.uint16)) == {"saturated": 0.0, "constant": 0.0}
    assert shares(np.array([[5, 5, 5]], np.uint16)) == {"saturated": 0.0, "constant": 0.0}  # nothing below
    hollow_HW = np.array([[0, 0], [0, 3]], np.uint16)  # holes are no constant
    assert shares(hollow_HW) == {"saturated": 0.0, "constant": 0.0}


def test_every_format_notes_the_same_shares():
    clipped_HW = np.clip(RAMP_HW, -1, 2)
    found = [{k: encode(clipped_HW, enc).meta[k] for k in ("saturated", "constant")} for enc in ENCODINGS]
    assert found[0] == found[1] == found[2] == shares(label_steps(clipped_HW)[0])
    assert 0.5 < found[0]["saturated"] < 1
    assert encode(RAMP_HW, "png").meta["saturated"] == 2 / RAMP_HW.size


# --- damage


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_flipped_bit_is_found(encoding):
    label = encode(HOLES_HW[:8, :9], encoding)
    for bit in range(8 * len(label.data)):
        damaged = bytearray(label.data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataError):
            decode(label.extension, bytes(damaged), label.meta)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_cut_is_found(encoding):
    label = encode(HOLES_HW[:8, :9], encoding)
    for length in range(len(label.data)):
        with pytest.raises(DataError):
            decode(label.extension, label.data[:length], label.meta)


def summed(encoding, data):
    """A member that is not what was written, but whose KEY.json says so."""
    return EXTENSIONS[encoding], data, {"scale": 1.0, "shift": 0.0, "crc32": zlib.crc32(data)}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ENCODINGS), st.integers(0, 10**6), st.integers(0, 255), st.integers(1, 40))
def test_damage_that_its_checksum_does_not_show_is_an_error_or_another_map(encoding, place, value, count):
    data = bytearray(encode(HOLES_HW, encoding).data)
    place %= len(data)
    data[place : place + count] = bytes([value]) * min(count, len(data) - place)
    member = summed(encoding, bytes(data))
    try:
        found_HW = decode(*member)
    except DataError:
        if encoding != "png":
            with pytest.raises(DataError):
                as_png16(*member)
    else:
        assert found_HW.ndim == 2 and found_HW.dtype == np.float32
        assert codes_of(*member).shape == found_HW.shape


def npy(array, version=(1, 0)):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), version=version)
    return out.getvalue()


def npy_header(text):
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def jxl(array, **options):
    return imagecodecs.jpegxl_encode(np.asarray(array), level=0, lossless=True, effort=2, numthreads=1, **options)


def bare(boxed):
    """The codestream of a container, which the library makes of more than 12 bits."""
    return boxed[boxed.index(b"jxlc") + 4 :]


def picture(mode):
    out = io.BytesIO()
    Image.new(mode, (4, 4)).save(out, "PNG")
    return out.getvalue()


GREY_HW = np.full((4, 4), 9, np.uint16)


@pytest.mark.parametrize(
    ("encoding", "data", "says"),
    [
        ("png", b"", "cut short"),
        ("png", picture("L"), "16-bit grey PNG is needed"),
        ("png", picture("RGB"), "16-bit grey PNG is needed"),
        ("png", b"\x93NUMPY" + bytes(100), "unreadable PNG"),
        ("npy", b"", "unreadable .npy"),
        ("npy", npy(np.zeros((4, 4), np.float32)), "float16"),
        ("npy", npy(np.zeros((4, 4, 1), np.float16)), "float16"),
        ("npy", npy(np.zeros((0, 4), np.float16)), "float16"),
        ("npy", npy(np.asfortranarray(np.zeros((4, 5), np.float16))), "float16"),
        ("npy", npy(np.zeros((4, 4), np.float16), (2, 0)), "another version"),
        ("npy", npy(np.full((4, 4), 1.5, np.float16)), "0 to 1"),
        ("npy", npy(np.full((4, 4), np.inf, np.float16)), "0 to 1"),
        ("npy", npy(np.full((4, 4), -0.1, np.float16)), "0 to 1"),
        ("npy", npy(np.zeros((4, 4), np.float16)) + b"x", "bytes of values"),
        ("npy", npy_header("{'descr': '<f2', 'fortran_order': False, 'shape': (8000, 8000), }"), "bytes of values"),
        ("npy", npy_header("{'descr': '<f2', 'fortran_order': False, 'shape': (10**9, 10**9), }"), "unreadable"),
        ("npy", npy_header(f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({10**9}, {10**9}), }}"), "float16"),
        ("npy", npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }"), "float16"),
        ("jxl", b"", "no codestream"),
        ("jxl", b"\xff\x0a", "no codestream"),
        ("jxl", picture("L"), "no codestream"),
        ("jxl", jxl(GREY_HW, bitspersample=12, usecontainer=True), "no codestream"),
        ("jxl", jxl(GREY_HW.astype(np.uint8)), "12-bit grey"),
        ("jxl", jxl(np.zeros((4, 4, 3), np.uint16), bitspersample=12), "12-bit grey"),
        ("jxl", bare(jxl(np.full((4, 4), 5000, np.uint16), bitspersample=13)), "12-bit grey"),
        # 2^30 pixels a side, by a header of its own
        ("jxl", b"\xff\x0a" + (0b110 | (2**30 - 1) << 3).to_bytes(12, "little"), "JPEG XL .*pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind_of_member_is_refused(encoding, data, says):
    with pytest.raises(DataError, match=says):
        decode(*summed(encoding, bytes(data)))


@pytest.mark.parametrize(
    "shape", [(8, 8), (256, 256), (40, 30), (9, 12), (1, 1), (300, 1), (1, 5000), (518, 686), (16, 9)]
)
def test_the_size_is_read_from_a_codestream(shape):
    assert label_codec._jxl_size(encode(np.arange(shape[0] * shape[1]).reshape(shape), "jxl").data) == shape


def test_an_absurd_png_is_not_inflated():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(2**16))), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(text)) + name + text + struct.pack(">I", zlib.crc32(name + text)) for name, text in chunks
    )
    with pytest.raises(DataError, match="60000 x 60000"):
        decode(*summed("png", data))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("change", [{"scale": None}, {"scale": 0}, {"shift": None}, {"shift": "1"}])
def test_key_json_must_say_what_decodes_it(encoding, change):
    label = encode(RAMP_HW, encoding)
    meta = {k: v for k, v in {**label.meta, **change}.items() if v is not None}
    for read in (decode, as_png16):
        with pytest.raises(DataError, match=r"scale|shift"):
            read(label.extension, label.data, meta)


@pytest.mark.parametrize("encoding", ["npy", "jxl"])
@pytest.mark.parametrize("crc32", [None, 1, "x"])
def test_a_checksum_that_is_missing_or_wrong_is_damage(encoding, crc32):
    label = encode(RAMP_HW, encoding)
    for read in (decode, as_png16):
        with pytest.raises(DataError, match="CRC-32"):
            read(label.extension, label.data, {**label.meta, "crc32": crc32})


def test_an_extension_of_no_label_is_refused():
    with pytest.raises(DataError, match=r"disparity\.png, .*found disparity\.exr"):
        decode("disparity.exr", b"", {"scale": 1.0, "shift": 0.0})


def test_the_label_among_the_members():
    assert member_of({"json": b"", "disparity.jxl": b""}) == "disparity.jxl"
    assert member_of({"jpg": b"", "json": b""}) is None


def test_without_imagecodecs_jxl_says_what_to_install(monkeypatch):
    label = encode(RAMP_HW, "jxl")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    says = r"pip install 'fathom-depth\[labels\]', or choose png or npy"
    with pytest.raises(DataError, match=says):
        encode(RAMP_HW, "jxl")
    for read in (decode, as_png16):
        with pytest.raises(DataError, match=says):
            read(label.extension, label.data, label.meta)
    with pytest.raises(DataError, match=says):
        check_available(label.extension)
    for encoding in ("png", "npy"):
        check_available(EXTENSIONS[encoding])
        encode(RAMP_HW, encoding)
