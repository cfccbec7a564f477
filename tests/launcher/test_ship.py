"""What travels with a job: the code, the folder without what is ignored, the configuration; and what is too large."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
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
    assert names == {"a.yaml", "sub/b.py", "notes/keep.md", ".fathomignore"}


SECRETS = (
    ".env", ".env.local", ".envrc", "sub/.env", ".ssh/config", ".aws/credentials", "sub/.aws/credentials", ".netrc",
    ".ray/auth_token", ".kube/config", ".docker/config.json", "server.pem", "id_rsa", "sub/id_ed25519",
    ".git-credentials",
)  # fmt: skip


def test_credentials_stay_whatever_the_folder_says(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / ".aws"
    for path in (*(here / name for name in SECRETS), here / "id_map.json", here / "environment.yaml", there / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (here / "link").symlink_to(there / "x")
    (here / ".fathomignore").write_text("".join(f"!{name}\n!{Path(name).name}\n" for name in SECRETS))
    assert set(parcel(here).files) == {"id_map.json", "environment.yaml", ".fathomignore"}
    with pytest.raises(ShipError, match="folder of credentials"):
        parcel(there)


def test_the_home_folder_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "users" / "joe"
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert parcel(home / "project").files == {}
    (tmp_path / "link").symlink_to(home)
    for folder in (home, home.parent, Path("/"), tmp_path / "link"):
        with pytest.raises(ShipError, match="is your home folder, or above it") as caught:
            parcel(folder)
        assert "--no-folder" in str(caught.value) and "\n" not in str(caught.value)


def test_ray_packs_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's packer would apply .gitignore and .rayignore once more, and leave out what it holds for rubbish."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    here, out = tmp_path / "here", tmp_path / "out"
    files(
        here, a_dot_yaml=1, notes__x_dot_md=1, notes__keep_dot_md=3, logs__a_dot_txt=1, logs__b_dot_txt=1,
        venv__x_dot_py=1,
    )  # fmt: skip
    (here / ".gitignore").write_text("notes/*\nvenv/\n")
    (here / "logs" / ".gitignore").write_text("*.txt\n")
    (here / "logs" / ".rayignore").write_text("*.txt\n")
    (here / ".fathomignore").write_text("!notes/keep.md\n!venv/\n")
    out.mkdir()
    shipped = parcel(here)
    assert set(shipped.files) == {
        "a.yaml", "notes/keep.md", "logs/a.txt", "logs/b.txt", ".fathomignore", "venv/x.py",
    }  # fmt: skip
    pack(out, shipped, None)
    monkeypatch.setenv(*ship.RAY_LEAVES_OUT)
    create_package(str(out), tmp_path / "x.zip", include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(tmp_path / "x.zip") as packed:
        names = set(packed.namelist())
    assert {name.removeprefix("here/") for name in names if name.startswith("here/")} == set(shipped.files)
    assert names >= set(ship.code())
    size = (tmp_path / "x.zip").stat().st_size
    assert size <= ship.zipped(ship.code()) + ship.zipped(shipped.files) <= size * 1.1


def test_more_than_the_server_takes_is_not_promised(tmp_path: Path) -> None:
    files(tmp_path, a=1)
    with pytest.raises(ShipError, match="--max-size 200: Ray's job server takes 100 MiB at most, the code included"):
        parcel(tmp_path, 200)
    os.truncate(tmp_path / "a", (100 << 20) - ship.zipped(ship.code()) // 2)  # too much with the code alone
    with pytest.raises(ShipError, match="MiB of code, would be shipped, 100 at most") as caught:
        parcel(tmp_path)
    assert "--no-folder" in str(caught.value) and "--max-size" not in str(caught.value)


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
    assert "4 MiB in 3 files, and" in said and "would be shipped, 2 at most" in said and "\n" not in said
    assert said.index("large (3.0 MiB)") < said.index("middle (1.0 MiB)") and ".fathomignore" in said
    assert caught.value.exit_status == 2
    assert parcel(tmp_path, most_mib=20).mib == pytest.approx(4, abs=0.01)


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
