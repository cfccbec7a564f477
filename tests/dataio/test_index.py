"""The index against DALI's own tool, and everything that can be wrong with a tar."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest

from dataio.index import ShardIndex, index_path, read_member, split_name
from dataio.spec import DataError

LONG = "k" * 130


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def samples(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{ext}", f"{key}{ext}".encode() * 150) for key in keys for ext in ("depth.png", "jpg")]


def wds2idx(tar: str, out: Path) -> bytes:
    subprocess.run([sys.executable, "-m", "wds2idx", tar, str(out)], check=True, capture_output=True)
    return out.read_bytes()


PLAIN = [
    *samples("a", "b/c", "d"),
    ("e.json", b""),
    ("e.webp", b"x" * 512),
    (".hidden.jpg", b"h"),
    ("f.jpg", b"y" * 513),
]


@pytest.mark.parametrize(
    ("members", "format"),
    [
        (PLAIN, tarfile.PAX_FORMAT),
        (PLAIN, tarfile.GNU_FORMAT),
        (PLAIN, tarfile.USTAR_FORMAT),
        (samples("first", LONG, "last"), tarfile.PAX_FORMAT),
        (samples("dir" * 30 + "/" + "k" * 60, "last"), tarfile.USTAR_FORMAT),
        (samples("schön"), tarfile.PAX_FORMAT),
    ],
)
def test_equals_dalis_tool_byte_for_byte(tmp_path, members, format):
    tar = write_tar(tmp_path / "000000.tar", members, format)
    ShardIndex.open(tar)
    assert Path(index_path(tar)).read_bytes() == wds2idx(tar, tmp_path / "theirs.idx")


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_ranges_begin_at_the_header_that_carries_a_long_name(tmp_path, format):
    members = samples("first", LONG, LONG + "2", "last")
    tar = write_tar(tmp_path / "000000.tar", members, format)
    index = ShardIndex.open(tar)
    assert [entry.key for entry in index.samples] == ["first", LONG, LONG + "2", "last"]
    assert len(index) == 4
    whole = Path(tar).read_bytes()
    for entry in index.samples:
        # a reader is given these bytes alone
        with tarfile.open(fileobj=io.BytesIO(whole[entry.start : entry.end] + bytes(1024))) as archive:
            names = archive.getnames()
        assert names == [f"{entry.key}.{ext}" for ext in entry.members]
        for ext in entry.members:
            assert read_member(tar, entry, ext) == dict(members)[f"{entry.key}.{ext}"]
        assert read_member(tar, entry, "json") is None
    assert index.samples[0].start == 0
    assert index.samples[-1].end == index.end


def test_an_index_of_gnu_long_names_by_dalis_tool_points_at_the_name_and_is_replaced(tmp_path):
    tar = write_tar(tmp_path / "000000.tar", samples("a", LONG), tarfile.GNU_FORMAT)
    theirs = wds2idx(tar, tmp_path / "000000.idx").decode()
    index = ShardIndex.open(tar)
    assert index.text != theirs
    assert read_member(tar, index.samples[1], "jpg") == f"{LONG}jpg".encode() * 150


def test_folders_and_links_are_passed_over(tmp_path):
    path = tmp_path / "000000.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("sub", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("sub/a.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"abc"))
    assert [entry.key for entry in ShardIndex.open(str(path)).samples] == ["sub/a"]


def test_a_sound_index_is_not_scanned_again(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "000000.tar", samples("a"))
    text = ShardIndex.open(tar).text
    monkeypatch.setattr(ShardIndex, "build", lambda tar: pytest.fail("scanned"))
    assert ShardIndex.open(tar).text == text


def test_rebuilt_when_older_than_the_tar(tmp_path):
    tar = write_tar(tmp_path / "000000.tar", samples("a"))
    ShardIndex.open(tar)
    write_tar(tmp_path / "000000.tar", samples("b"))
    os.utime(index_path(tar), ns=(0, 0))
    assert ShardIndex.open(tar).samples[0].key == "b"


@pytest.mark.parametrize("more", [1, 40])  # inside the last record, and beyond it
def test_rebuilt_when_it_does_not_cover_the_tar(tmp_path, more):
    tar = write_tar(tmp_path / "000000.tar", samples("a"))
    ShardIndex.open(tar)
    write_tar(tmp_path / "000000.tar", samples("a", *[f"b{i}" for i in range(more)]))
    os.utime(index_path(tar), (2e9, 2e9))
    assert len(ShardIndex.open(tar)) == 1 + more


@pytest.mark.parametrize(
    "text", ["", "v1.1 1\njpg 512 3 a.jpg\n", "v1.2 2\njpg 512 3 a.jpg\n", "v1.2 1\njpg x y\n", "\xff"]
)
def test_rebuilt_when_unreadable(tmp_path, text):
    tar = write_tar(tmp_path / "000000.tar", samples("a", "b"))
    Path(index_path(tar)).write_bytes(text.encode("latin-1"))
    assert len(ShardIndex.open(tar)) == 2
    assert Path(index_path(tar)).read_text().startswith("v1.2 2\n")


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    from cluster import storage

    def refuse(path: str, data: bytes | str) -> None:
        raise storage.StorageError(f"{path}: read-only")

    tar = write_tar(tmp_path / "000000.tar", samples("a"))
    monkeypatch.setattr(storage, "atomic_write", refuse)
    assert len(ShardIndex.open(tar)) == 1
    assert not Path(index_path(tar)).exists()


@pytest.mark.parametrize("with_index", ["newer", "older", "none"])
@pytest.mark.parametrize("where", ["data", "header", "between samples", "padding"])
def test_a_cut_tar_is_refused_unless_an_index_tells_what_it_held(tmp_path, where, with_index):
    tar = write_tar(tmp_path / "000000.tar", samples("a", "b", "c"))
    last = ShardIndex.open(tar).samples[-1]
    offset, size = last.members["jpg"]
    length = {"data": offset + 10, "header": last.start + 100, "between samples": last.start, "padding": offset + size}
    before = ShardIndex.open(tar)
    os.truncate(tar, length[where])
    if with_index != "none":
        then = 2e9 if with_index == "newer" else 1e9
        os.utime(index_path(tar), (then, then))
        index = ShardIndex.open(tar)
        assert index == before and index.is_cut(length[where]) and not index.is_cut(10**6)
        assert (before.lost, index.lost) == (0, 0 if where == "padding" else 1)
        return
    os.remove(index_path(tar))
    with pytest.raises(DataError, match=rf"000000\.tar: {length[where]} bytes found, at least \d+ expected: .*copy it"):
        ShardIndex.open(tar)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("README", b"x")], "holds no samples, but 'README'"),
        ([("a b.jpg", b"x")], "white space"),
    ],
)
def test_what_an_index_cannot_hold(tmp_path, members, says):
    tar = write_tar(tmp_path / "000000.tar", members)
    with pytest.raises(DataError, match=says) as caught:
        ShardIndex.open(tar)
    assert "\n" not in str(caught.value)
    assert tar in str(caught.value)


@pytest.mark.parametrize(("data", "says"), [(b"", "0 bytes found"), (b"no tar at all" * 100, "not a tar file")])
def test_not_a_tar(tmp_path, data, says):
    (tmp_path / "000000.tar").write_bytes(data)
    with pytest.raises(DataError, match=says):
        ShardIndex.open(str(tmp_path / "000000.tar"))


def test_damage_in_the_middle(tmp_path):
    tar = write_tar(tmp_path / "000000.tar", samples("a", "b"))
    start = ShardIndex.open(tar).samples[1].start
    with open(tar, "r+b") as file:
        file.seek(start)
        file.write(b"\xee" * 512)
    os.utime(index_path(tar), ns=(0, 0))
    with pytest.raises(DataError, match="no tar header"):
        ShardIndex.open(tar)


def test_missing(tmp_path):
    with pytest.raises(DataError, match="missing"):
        ShardIndex.open(str(tmp_path / "000000.tar"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.jpg", ("a", "jpg")), ("x.y/a.depth.png", ("x.y/a", "depth.png")), ("x/.a.jpg", None), ("x/a", None)],
)
def test_split_name(name, parts):
    assert split_name(name) == parts


def test_over_a_url(tmp_path):
    tar = write_tar(tmp_path / "000000.tar", samples("a", LONG))
    fsspec.filesystem("memory").pipe_file("/index-test/000000.tar", Path(tar).read_bytes())
    url = "memory://index-test/000000.tar"
    index = ShardIndex.open(url)
    assert index.text == ShardIndex.build(tar).text
    assert ShardIndex.open(url).text == index.text
    assert read_member(url, index.samples[0], "jpg") == b"ajpg" * 150


@pytest.mark.parametrize(
    ("names", "bad"),
    [
        (["a.jpg", "b.jpg", "a.png"], {"a": "duplicate_key"}),
        (["a.jpg", "a.jpg", "b.jpg"], {"a": "duplicate_key"}),
        (["a.jpg", "a.png", "b.jpg"], {}),
        (["../a.jpg", "b/../../c.jpg", "/d.jpg", "e/f..g.jpg"],
         {"../a": "unsafe_name", "b/../../c": "unsafe_name", "/d": "unsafe_name"}),
    ],
)  # fmt: skip
def test_keys_that_no_sample_may_have(tmp_path, names, bad):
    tar = write_tar(tmp_path / "000000.tar", [(name, b"x") for name in names])
    index = ShardIndex.open(tar)
    assert index.bad_keys == bad
    assert sum(len(sample.members) for sample in index.samples) == len(names)
