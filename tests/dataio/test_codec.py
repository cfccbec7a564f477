"""16-bit codes: exact where promised, bounded elsewhere, holes stay holes."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dataio.codec import (
    DEPTH_MM,
    code_of,
    decode_npy,
    decode_png16,
    encode_label,
    encode_map,
    encode_png16,
    label_code,
    read_png16,
)
from dataio.spec import DataError
from dataio.types import AffineCode

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


@settings(max_examples=60, deadline=None)
@given(SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=st.floats(-1, 80, width=32))))
def test_depth_keeps_holes_and_is_within_half_a_code(depth_HW):
    data, clipped = encode_png16(depth_HW, DEPTH_MM)
    again_HW = decode_png16(data, DEPTH_MM)
    valid_HW = depth_HW > 0
    assert np.array_equal(np.isfinite(again_HW), valid_HW)
    inside_HW = valid_HW & (depth_HW >= 0.001) & (depth_HW <= 65.535)
    assert np.all(np.abs(again_HW - depth_HW)[inside_HW] <= 0.0005 + 1e-5)
    assert clipped == np.count_nonzero(depth_HW.astype(np.float64) > 65.5355)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES.flatmap(
        lambda shape: arrays(np.float32, shape, elements=st.one_of(st.just(np.nan), st.floats(-1e4, 1e4, width=32)))
    )
)
def test_label_error_low_bits_and_holes(disparity_HW):
    valid_HW = np.isfinite(disparity_HW)
    if not valid_HW.any():
        with pytest.raises(DataError, match="no finite value"):
            encode_label(disparity_HW)
        return
    data, code = encode_label(disparity_HW)
    code_HW = read_png16(data)
    assert not np.any(code_HW & 15)
    assert np.array_equal(code_HW > 0, valid_HW)
    again_HW = decode_png16(data, code)
    low, high = disparity_HW[valid_HW].min(), disparity_HW[valid_HW].max()
    bound = (float(high) - float(low)) / 8188 * 1.001 + 1e-6 * max(abs(low), abs(high))
    assert np.all(np.abs(again_HW - disparity_HW)[valid_HW] <= bound)
    assert np.all(again_HW[disparity_HW == low] == low)


def test_label_spans_all_codes_and_zero_is_exact():
    disparity_HW = np.linspace(0, 7.3, 64 * 64, dtype=np.float32).reshape(64, 64)
    data, code = encode_label(disparity_HW)
    code_HW = read_png16(data)
    assert (code_HW.min(), code_HW.max()) == (16, 65520)
    assert code == AffineCode(scale=code.scale, shift=0.0, zero=16)
    assert decode_png16(data, code)[0, 0] == 0.0
    assert decode_png16(data, code)[-1, -1] == pytest.approx(7.3, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30, 1e-40])
def test_a_flat_label(value):
    data, code = encode_label(np.full((3, 4), value))
    assert np.all(decode_png16(data, code) == np.float32(value))


def test_disparity_codes_of_a_dataset_hold_zero():
    code = AffineCode(scale=1e-4, shift=0.0, zero=1)
    data, clipped = encode_png16([[0.0, 1.0, np.nan, 9.0]], code)
    again_HW = decode_png16(data, code)
    assert again_HW[0, 0] == 0
    assert again_HW[0, 1] == pytest.approx(1)
    assert np.isnan(again_HW[0, 2])
    assert clipped == 1
    assert again_HW[0, 3] == pytest.approx(6.5534)


@pytest.mark.parametrize(("value", "code"), [(np.zeros(3), DEPTH_MM), (np.zeros((2, 2)), AffineCode(scale=0.0))])
def test_encode_refuses(value, code):
    with pytest.raises(ValueError, match="map"):
        encode_png16(value, code)


def test_encode_label_refuses_a_stack():
    with pytest.raises(ValueError, match="map"):
        encode_label(np.zeros((1, 2, 2)))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_other_pngs_are_refused(mode):
    with pytest.raises(DataError, match=f"16-bit grey.*{mode}"):
        read_png16(png(Image.new(mode, (4, 4))))


def test_a_cut_png_is_refused():
    data, _ = encode_png16(np.random.default_rng(0).uniform(1, 60, (64, 64)), DEPTH_MM)
    for length in (0, 30, len(data) // 2):
        with pytest.raises(DataError, match="unreadable"):
            read_png16(data[:length])


def npy(value: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, value)
    return out.getvalue()


def test_npy_holes():
    data = npy(np.array([[1.5, 0.0, -1.0, np.nan, np.inf]], np.float16))
    assert np.array_equal(np.isnan(decode_npy(data, "depth_m")), [[False, True, True, True, True]])
    assert np.array_equal(np.isnan(decode_npy(data, "disparity")), [[False, False, False, True, True]])
    assert decode_npy(data, "depth_m").dtype == np.float32


@pytest.mark.parametrize("data", [b"", b"junk", npy(np.zeros((2, 2), np.int16)), npy(np.zeros(3, np.float32))])
def test_npy_refused(data):
    with pytest.raises(DataError, match="npy"):
        decode_npy(data, "depth_m")


def test_a_samples_own_code_comes_first():
    assert code_of({}, DEPTH_MM) is DEPTH_MM
    assert code_of({"focal_px": 3}, None) is None
    assert code_of({"scale": 0.0002}, DEPTH_MM) == AffineCode(scale=0.0002)
    assert code_of({"shift": 1, "zero": 4}, DEPTH_MM) == AffineCode(scale=0.001, shift=1.0, zero=4)


@pytest.mark.parametrize("meta", [{"scale": 0}, {"scale": "1"}, {"scale": True}, {"scale": np.nan}, {"shift": 1.0}])
def test_a_wrong_code_is_refused(meta):
    with pytest.raises(DataError):
        code_of(meta, None)


def test_label_code():
    assert label_code({"scale": 0.5, "shift": -1.0, "quality": 0.9}) == AffineCode(scale=0.5, shift=-1.0, zero=16)
    for meta in ({}, {"scale": 1.0}, {"shift": 1.0}):
        with pytest.raises(DataError):
            label_code(meta)


# --- maps of any range


@pytest.mark.parametrize(("low", "high", "extension"), [(1.0, 64.0, "depth.png"), (0.4, 900.0, "depth.npy")])
def test_a_depth_map_is_nowhere_coarser_than_half_precision(low, high, extension):
    depth_HW = np.geomspace(low, high, 20 * 30).reshape(20, 30)
    depth_HW[3, 4], depth_HW[0, 1], depth_HW[5, 6] = np.nan, -1.0, np.inf
    name, data, code = encode_map(depth_HW, "depth_m")
    assert name == extension
    found_HW = decode_png16(data, code) if code else decode_npy(data, "depth_m")
    assert np.argwhere(np.isnan(found_HW)).tolist() == [[0, 1], [3, 4], [5, 6]]
    valid_HW = ~np.isnan(found_HW)
    assert (np.abs(found_HW - depth_HW)[valid_HW] <= 2.0**-11 * 1.0001 * depth_HW[valid_HW]).all()


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1e6), (1e-8, 1.0)])
def test_what_half_precision_does_not_reach_becomes_float32(low, high):
    depth_HW = np.geomspace(low, high, 12).reshape(3, 4)
    name, data, code = encode_map(depth_HW, "depth_m")
    assert (name, code) == ("depth.npy", None)
    np.testing.assert_allclose(decode_npy(data, "depth_m"), depth_HW, rtol=1e-7)


def test_a_disparity_map_keeps_zero_and_below_as_values():
    disparity_HW = np.linspace(-2, 30, 40).reshape(5, 8)
    disparity_HW[0, 0] = np.nan
    name, data, code = encode_map(disparity_HW, "disparity")
    assert name == "depth.png"
    found_HW = decode_png16(data, code)
    assert np.isnan(found_HW[0, 0]) and np.isfinite(found_HW).sum() == 39
    assert np.nanmax(np.abs(found_HW - disparity_HW)) <= 32 / 131068 * 1.01


def test_a_flat_map_and_one_without_a_value():
    for quantity in ("depth_m", "disparity"):
        _, data, code = encode_map(np.full((3, 4), 2.5), quantity)
        np.testing.assert_allclose(decode_png16(data, code), 2.5, rtol=1e-6)
        with pytest.raises(DataError, match="no valid value"):
            encode_map(np.full((3, 4), np.nan), quantity)
    with pytest.raises(ValueError, match="needs a map"):
        encode_map(np.zeros(3), "depth_m")


# --- the PNG writer


UNIT = AffineCode(scale=1.0)


def filters(png):
    """The filter of every row, by Pillow's own account of the file's chunks."""
    height = int.from_bytes(png[20:24], "big")
    at = png.index(b"IDAT")
    raw = zlib.decompress(png[at + 4 : at + 4 + int.from_bytes(png[at - 4 : at], "big")])
    return [raw[row * (len(raw) // height)] for row in range(height)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 33)])
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_code_is_read_back_whatever_the_rows_look_like(shape, level, order):
    rng = np.random.default_rng(0)
    noise_HW = rng.integers(0, 65536, shape)
    ramp_HW = np.add.outer(300 * np.arange(shape[0]), 257 * np.arange(shape[1])) + 60000
    sparse_HW = noise_HW * (rng.random(shape) < 0.05)
    for code_HW in (noise_HW, ramp_HW % 65536, sparse_HW, np.full(shape, 65535), np.zeros(shape)):
        png, clipped = encode_png16(np.asarray(code_HW, np.float64, order=order), UNIT, level=level)
        assert not clipped
        assert Image.open(io.BytesIO(png)).verify() is None
        assert np.array_equal(read_png16(png), code_HW)


def test_dense_rows_are_stored_as_differences_and_sparse_ones_as_they_are():
    rng = np.random.default_rng(0)
    ramp_HW = np.add.outer(40 * np.arange(64), 11 * np.arange(64))
    sparse_HW = rng.integers(1, 65536, (64, 64)) * (rng.random((64, 64)) < 0.05)
    for dense_HW in (20000 + ramp_HW, 20000 - ramp_HW):
        assert filters(encode_png16(dense_HW, UNIT)[0])[1:] == [2] * 63
    assert filters(encode_png16(sparse_HW, UNIT)[0]).count(0) > 48


def test_an_empty_map_is_refused():
    with pytest.raises(ValueError, match="shape"):
        encode_png16(np.zeros((0, 4)), UNIT)
