"""What travels with a job: the code, the folder without what is ignored, the configuration; and what is too large."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import ship
from launcher.jobs import entrypoint
from launcher.ship import ShipError, pack, parcel


def files(folder: Path, **sizes: int) -> None:
    for name, size in sizes.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def test_what_is_ignored_stays(tmp_path: Path) -> None:
    files(
        tmp_path, a_dot_yaml=1, sub__b_dot_py=2, runs__x__weights_dot_bin=9, data__000000_dot_tar=9, w_dot_pth=9,
        _dot_git__HEAD=9, _dot_env=9, sub____pycache____c_dot_pyc=9, notes__x_dot_md=9, notes__keep_dot_md=3,
        models__m_dot_bin=9,
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text("# what git does not want\n/models/\nnotes/*\n")
    (tmp_path / ".fathomignore").write_text("!notes/keep.md\n")
    names = set(parcel(tmp_path).files)
    assert names == {"a.yaml", "sub/b.py", "notes/keep.md", ".gitignore", ".fathomignore"}


def test_links_and_pipes(tmp_path: Path) -> None:
    files(tmp_path, there__x_dot_txt=4)
    here = tmp_path / "here"
    here.mkdir()
    os.mkfifo(here / "pipe")
    (here / "file").symlink_to(tmp_path / "there" / "x.txt")
    (here / "folder").symlink_to(tmp_path / "there")
    (here / "nothing").symlink_to(tmp_path / "nowhere")
    assert parcel(here).files == {"file": 4}
    (tmp_path / "out").mkdir()
    pack(tmp_path / "out", parcel(here), None)
    assert (tmp_path / "out" / "here" / "file").read_bytes() == b"xxxx"
    assert not (tmp_path / "out" / "here" / "file").is_symlink()


def test_too_large_names_the_largest(tmp_path: Path) -> None:
    files(tmp_path, small=10, large=3 << 20, middle=1 << 20)
    with pytest.raises(ShipError) as caught:
        parcel(tmp_path, most_mib=2)
    said = str(caught.value)
    assert "4 MiB in 3 files would be shipped, 2 at most" in said and "\n" not in said
    assert said.index("large (3.0 MiB)") < said.index("middle (1.0 MiB)") and ".fathomignore" in said
    assert caught.value.exit_status == 2
    assert parcel(tmp_path, most_mib=5).mib == pytest.approx(4, abs=0.01)


def test_too_many_are_not_even_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "MOST_FILES", 5)
    files(tmp_path, **{f"file{i}": 1 for i in range(6)})
    with pytest.raises(ShipError, match="more than 5 files"):
        parcel(tmp_path)
    (tmp_path / "file0").unlink()
    assert len(parcel(tmp_path).files) == 5


def test_the_code_runs_where_it_arrives_even_beside_folders_of_the_same_names(tmp_path: Path) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    broken = 'raise ImportError("the folder of the user")\n'
    files(here, a_dot_yaml=1)
    for room in ("launcher", "model"):
        (here / room).mkdir()
        (here / room / "__init__.py").write_text(broken)
    out.mkdir()
    pack(out, parcel(here), "name: x\n")
    names = {path.name for path in out.iterdir()}
    assert names - {"COMMIT"} == {*ship.ROOMS, "here", "job.yaml"}
    assert (out / "here" / "a.yaml").is_file() and (out / "job.yaml").read_text() == "name: x\n"
    assert not list(out.rglob("__pycache__"))
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    for folder in (str(here), str(tmp_path / "not on the cluster")):
        command = entrypoint(["recipes", "list"], 0, folder, python=sys.executable)
        done = subprocess.run(
            ["/bin/sh", "-c", command], cwd=out, capture_output=True, text=True,
            env={**env, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert done.returncode == 0 and "teacher-v1-vitl" in done.stdout, done.stderr
