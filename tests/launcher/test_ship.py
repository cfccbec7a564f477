"""What travels with a job: the code, the folder without what is ignored, the configuration; and what is too large."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

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
    ".git-credentials", "server.key", "a.p12", "a.pfx", "id_rsa_work", ".vault-token", ".npmrc", ".s3cfg", ".boto",
    "gcloud/application_default_credentials.json", ".config/gcloud/access_tokens.db", ".huggingface/token",
    ".cache/huggingface/token", "sub/.cache/huggingface/token", "kubeconfig", "sub/prod.kubeconfig", ".htpasswd",
    ".ssh/id_rsa.pub",
)  # fmt: skip


def test_credentials_stay_whatever_the_folder_says(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / ".aws"
    kept = {"id_map.json", "environment.yaml", "id_rsa.pub", "keys.json", ".fathomignore"}
    for path in (*(here / name for name in (*SECRETS, *kept)), there / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (here / "link").symlink_to(there / "x")
    (here / ".fathomignore").write_text("".join(f"!{name}\n!{Path(name).name}\n" for name in SECRETS))
    assert set(parcel(here).files) == kept
    with pytest.raises(ShipError, match="folder of credentials"):
        parcel(there)


def test_a_folder_below_one_of_environments_is_shipped(tmp_path: Path) -> None:
    project = tmp_path / ".envs" / "proj"
    files(project, a_dot_yaml=1, _dot_env=1)
    (project / "link").symlink_to(project / "a.yaml")
    assert set(parcel(project).files) == {"a.yaml", "link"}


def refused(folder: Path, *words: str) -> None:
    """As packing the folder is, in one line."""
    with pytest.raises(ShipError) as caught, ship.packed(parcel(folder), None):
        pass
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    unreadable = Path("/proc/self/mem")  # for root too
    (tmp_path / "a.bin").symlink_to(unreadable)
    refused(tmp_path, f"{tmp_path / 'a.bin'}: cannot be read", ".fathomignore")
    (tmp_path / ".fathomignore").write_text("a.bin\n")
    with ship.packed(parcel(tmp_path), "name: x\n") as made:
        assert {path.name for path in made.iterdir()} >= {"here", "job.yaml", "launcher"}
    assert not made.exists()
    (tmp_path / ".gitignore").symlink_to(unreadable)
    refused(tmp_path, f"{tmp_path / '.gitignore'}: cannot be read")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, closed__a=1, gone__b=1)

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        for name, error in (("closed", PermissionError(13, "Permission denied", path)),
                            ("gone", FileNotFoundError(2, "No such file", path))):  # fmt: skip
            if os.path.basename(path) == name:
                raise error
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    refused(tmp_path, f"{tmp_path / 'closed'}: cannot be read: Permission denied")
    (tmp_path / ".fathomignore").write_text("closed/\n")
    assert set(parcel(tmp_path).files) == {".fathomignore"}


def test_a_line_that_is_no_pattern_is_named(tmp_path: Path) -> None:
    (tmp_path / ".fathomignore").write_text("# ours\nnotes/\n!\n")
    refused(tmp_path, f"{tmp_path / '.fathomignore'}, line 3: '!' is no pattern")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.txt"
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"x")
    (tmp_path / "caf\u00e9.txt").write_bytes(b"x")
    refused(tmp_path, r"'caf\udce9.txt' is not UTF-8", "rename it")
    (tmp_path / ".fathomignore").write_bytes(name + b"\n")
    assert set(parcel(tmp_path).files) == {"caf\u00e9.txt", ".fathomignore"}


def test_what_is_deleted_meanwhile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, a=1, b=1)
    shipped = parcel(tmp_path)
    (tmp_path / "b").unlink()
    with ship.packed(shipped, None) as made:
        assert [path.name for path in (made / "here").iterdir()] == ["a"]

    def getsize(path: str) -> int:
        if os.path.basename(path) == "a":
            raise FileNotFoundError(2, "No such file", path)
        return real(path)

    real = os.path.getsize
    monkeypatch.setattr(os.path, "getsize", getsize)
    assert parcel(tmp_path).files == {}


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, a=1)

    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(28, "No space left on device", "a")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copy2", full)
        refused(tmp_path, f"{tempfile.gettempdir()}/fathom-submit-", "No space left on device", "TMPDIR")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    refused(tmp_path, "no temporary folder can be made: No space left on device", "TMPDIR")


def test_a_checkout_s_folder_travels_beside_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "CHECKOUT", tmp_path)
    files(tmp_path, launcher__a_dot_py=1, mine__model__b_dot_py=1, teacher_dot_yaml=1, _dot_git=9)
    assert set(parcel(tmp_path).files) == {"mine/model/b.py", "teacher.yaml"}
    assert set(ship.code()) == {"launcher/a.py"}


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
