"""fathom doctor: each check on a machine that has the fault and on one that has not."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import doctor, simd
from launcher.doctor import Finding, fail, ok, run_checks, warn


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_python_range() -> None:
    assert levels(doctor.check_python((3, 11))) == ["ok"]
    assert levels(doctor.check_python((3, 10))) == ["fail"]
    assert levels(doctor.check_python((3, 14))) == ["fail"]


def test_versions_against_the_tested_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested\ntorch==2.0.0\nRay==9.9.9\nprometheus-client==1.0\n")
    monkeypatch.setattr(doctor, "installed", {"torch": "2.0.0+cpu", "ray": "1.0", "prometheus_client": "1.0"}.get)
    found = {finding.subject: finding for finding in doctor.check_packages(doctor.tested_versions(constraints))}
    assert found["torch"].level == "ok"
    assert found["prometheus_client"].level == "ok"
    assert found["ray"].level == "warn"
    assert "tested with 9.9.9" in found["ray"].found
    assert found["timm"].level == "fail"
    assert found["timm"].remedy


def test_the_distribution_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(doctor.check_kernels_name()) == []
    monkeypatch.setattr(doctor, "installed", {"kernels": "0.10.1"}.get)
    assert levels(doctor.check_kernels_name()) == ["fail"]


def test_two_dali_builds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: "2.4.0")
    assert levels(doctor.check_dali()) == ["fail"]
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert levels(doctor.check_dali()) == ["fail"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert next(doctor.check_compiler(gpu=False)).level == "fail"
    assert next(doctor.check_compiler(gpu=True)).level == "warn"


@pytest.mark.parametrize(("free", "level"), [(0.5, "fail"), (5, "warn"), (50, "ok")])
def test_disk(free: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": free * doctor.GIB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert levels(doctor.check_disk()) == [level]


def test_stale_buffers_are_those_nobody_maps(tmp_path: Path) -> None:
    stale, used = tmp_path / "deepspeed_allreduce_buffer_a", tmp_path / "deepspeed_allreduce_buffer_b"
    for path in (stale, used, tmp_path / "other"):
        path.write_bytes(bytes(4096))
    assert doctor.stale_buffers(tmp_path) == [stale, used]
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        return
    mine = shared / f"deepspeed_allreduce_buffer_test_{os.getpid()}"
    try:
        with mine.open("wb+") as file:
            file.write(bytes(4096))
            file.flush()
            with mmap.mmap(file.fileno(), 4096):
                assert mine not in doctor.stale_buffers()
        assert mine in doctor.stale_buffers()
    finally:
        mine.unlink()


def test_loopback_and_processors() -> None:
    assert levels(doctor.check_loopback()) == ["ok"]
    assert levels(doctor.check_prometheus()) == ["ok"]
    assert levels(doctor.check_cpus())[0] in ("ok", "warn")


def test_pillow_is_found() -> None:
    assert "fail" not in levels(doctor.check_pillow())


def test_no_header_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(simd, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(simd.shutil, "which", lambda program: program)
    monkeypatch.setattr(simd, "compiles", lambda header, library: header != "zlib.h")
    assert "apt-get install zlib1g-dev" in (simd.obstacle() or "")
    monkeypatch.setattr(simd, "cpu_flags", set)
    assert "AVX2" in (simd.obstacle() or "")


def test_a_check_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check_something() -> Iterator[Finding]:
        yield ok("first", "fine")
        raise OSError("libnothing.so: cannot open\nand more")

    findings = run_checks([check_something])
    assert [finding.level for finding in findings] == ["ok", "fail"]
    assert findings[1].found == "OSError: libnothing.so: cannot open"
    monkeypatch.setattr(doctor, "run_checks", lambda: findings)
    assert doctor.doctor_command() == 1
    assert "1 ok, 0 warn, 1 fail" in capsys.readouterr().out


def test_output_and_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda: [ok("a", "1"), warn("b", "2", "do this")])
    assert doctor.doctor_command() == 0
    assert "-> do this" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "run_checks", lambda: [fail("a", "1", "do that")])
    assert doctor.doctor_command() == 1


def test_without_prometheus_the_doctor_says_who_would_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = doctor.check_prometheus()
    assert found.level == "ok" and "fathom monitor up needs it" in found.found
