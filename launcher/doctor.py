"""`fathom doctor`: what this machine has, what is missing, what to do about it.

Every check is a function that returns findings; heavy libraries are imported inside the check that needs them, and a
check that breaks is itself a finding.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher import simd

Level = Literal["ok", "warn", "fail"]
GIB = 1 << 30
ROOT = Path(__file__).resolve().parent.parent

# What `constraints.txt` is compared for: a difference in the rest is of no interest.
COMPARED = (
    "torch", "torchvision", "timm", "ray", "deepspeed", "webdataset", "numpy", "pydantic", "typer",
    "prometheus_client", "safetensors",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. `remedy` says what to do, in words or a command; empty when all is well."""

    level: Level
    subject: str
    found: str
    remedy: str = ""


def ok(subject: str, found: str) -> Finding:
    """All is well."""
    return Finding(level="ok", subject=subject, found=found)


def warn(subject: str, found: str, remedy: str) -> Finding:
    """fathom works, but less well."""
    return Finding(level="warn", subject=subject, found=found, remedy=remedy)


def fail(subject: str, found: str, remedy: str) -> Finding:
    """fathom does not work here as it is."""
    return Finding(level="fail", subject=subject, found=found, remedy=remedy)


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None when it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def tested_versions(path: Path) -> dict[str, str]:
    """Distribution -> version that the tests ran with; empty outside a checkout."""
    if not path.is_file():
        return {}
    pairs = re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "_", name).lower(): version for name, version in pairs}


def check_python(version: tuple[int, int] | None = None) -> Iterator[Finding]:
    """fathom's own range of Python versions, as in setup.py."""
    found = version or (sys.version_info.major, sys.version_info.minor)
    text = f"{found[0]}.{found[1]} ({sys.executable})"
    if (3, 11) <= found < (3, 13):
        yield ok("Python", text)
    else:
        yield fail("Python", text, "use Python 3.11 or 3.12: make install PYTHON=python3.11")


def check_packages(tested: dict[str, str] | None = None) -> Iterator[Finding]:
    """Installed versions against the set that the tests ran with."""
    tested = tested_versions(ROOT / "constraints.txt") if tested is None else tested
    for name in COMPARED:
        found = installed(name)
        if found is None:
            yield fail(name, "not installed", "make install, or pip install -c constraints.txt -e .")
            continue
        wanted = tested.get(name)
        if wanted is None or found.split("+")[0] == wanted:
            yield ok(name, found)
        else:
            yield warn(name, f"{found}, tested with {wanted}", f"pip install -c constraints.txt {name}")


def check_kernels_name() -> Iterator[Finding]:
    """Our folder `kernels` and the distribution of that name cannot both be importable."""
    found = installed("kernels")
    if found is not None:
        yield fail("package kernels", f"version {found} hides, or is hidden by, fathom's own", "pip uninstall kernels")


def check_devices() -> Iterator[Finding]:
    """GPUs as torch sees them."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            info = torch.cuda.get_device_properties(index)
            yield ok(f"GPU {index}", f"{info.name}, {info.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}")
    elif shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists():
        yield warn(
            "GPU",
            f"there is one, but torch {torch.__version__} cannot use it",
            "compare the driver's CUDA version (nvidia-smi) with torch's; a driver for CUDA 12 needs a torch for "
            "CUDA 12 and make install CUDA=12",
        )
    else:
        yield ok("GPU", "none: training runs on the processor, with gloo")


def check_dali() -> Iterator[Finding]:
    """DALI imports, and decodes 16-bit PNGs to 16 bits."""
    versions = {name: installed(name) for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130")}
    present = {name: version for name, version in versions.items() if version is not None}
    if len(present) == 2:
        yield fail("DALI", "two builds over one another", "pip uninstall both, then make install")
        return
    if not present:
        yield fail("DALI", "not installed", "pip install nvidia-dali-cuda130 (Linux x86-64; -cuda120 for CUDA 12)")
        return
    name, version = next(iter(present.items()))
    from dataio import dali_batch

    dali_batch.self_test()
    yield ok("DALI", f"{name} {version}, keeps 16 bits")


def check_pillow() -> Iterator[Finding]:
    """pillow-simd, or Pillow and why."""
    import PIL
    from PIL import features

    if "post" in PIL.__version__:
        yield ok("pillow-simd", PIL.__version__)
    else:
        reason = simd.obstacle()
        found = f"Pillow {PIL.__version__}, whose resizing is several times slower"
        if reason is None:
            yield warn("pillow-simd", found, "it can be built here: make install")
        elif reason.startswith("it needs"):  # another processor is no remedy
            yield ok("pillow-simd", f"{found}: {reason}")
        else:
            yield warn("pillow-simd", f"{found}: {reason}", "install what is missing, then make install")
    for feature, what, level in (("jpg", "JPEG", fail), ("zlib", "PNG", fail), ("webp", "WebP", warn)):
        if not features.check(feature):
            remedy = "pip install --force-reinstall -c constraints.txt pillow, then make install"
            yield level(f"PIL {what}", "cannot be read", remedy)


def check_compiler(gpu: bool | None = None) -> Iterator[Finding]:
    """DeepSpeed compiles its shared-memory operator when it first communicates on the processor."""
    if gpu is None:
        import torch

        gpu = torch.cuda.is_available()
    compiler = os.environ.get("CXX", "c++").split()[0]
    bad = warn if gpu else fail
    for program, remedy in ((compiler, "apt-get install g++"), ("ninja", "pip install ninja")):
        where = shutil.which(program)
        own = Path(sys.executable).parent / program
        if where is None and not own.exists():
            yield bad(program, "not found; DeepSpeed builds an operator with it on the processor", remedy)
        else:
            yield ok(program, where or str(own))


def check_disk(folder: Path | None = None) -> Iterator[Finding]:
    """Room for runs and datasets in the current folder."""
    folder = folder or Path.cwd()
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if free < 1:
        yield fail("disk", found, "free some, or work in another folder")
    elif free < 10:
        yield warn("disk", found, "enough for the quickstart; real datasets and checkpoints need more")
    else:
        yield ok("disk", found)


def mapped_files() -> set[str]:
    """Files under /dev/shm that some process we may look at has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found.update(re.findall(r"/dev/shm/\S+", text))
    return found


def stale_buffers(folder: Path = Path("/dev/shm")) -> list[Path]:
    """DeepSpeed's shared buffers of this user that no process uses any more: a killed run leaves them."""
    try:
        buffers = [path for path in folder.glob("deepspeed_*") if path.stat().st_uid == os.getuid()]
    except OSError:  # one went away while we looked
        buffers = []
    in_use = mapped_files() if buffers else set()
    return sorted(path for path in buffers if str(path) not in in_use)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Ray's object store and DeepSpeed's buffers live in /dev/shm."""
    if not folder.is_dir():
        yield warn("shared memory", f"no {folder}", "Ray falls back to files in /tmp and is slower")
        return
    free = shutil.disk_usage(folder).free / GIB
    if free < 1:
        yield warn("shared memory", f"{free:.2f} GiB free in {folder}", "in a container: --shm-size=2g or more")
    else:
        yield ok("shared memory", f"{free:.1f} GiB free in {folder}")
    stale = stale_buffers(folder)
    if stale:
        size = sum(path.stat().st_size for path in stale) / (1 << 20)
        remedy = f"with no run going: rm {folder}/deepspeed_*"
        yield warn("stale buffers", f"{len(stale)} of DeepSpeed, {size:.0f} MiB", remedy)


def check_loopback() -> Iterator[Finding]:
    """Ray, gloo and the metrics server talk over loopback."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5):
                connection, _ = server.accept()
                connection.close()
    except OSError as error:
        yield fail("loopback", f"no port on 127.0.0.1 can be used: {error}", "ip link set lo up, or the firewall")
        return
    yield ok("loopback", "ports on 127.0.0.1 open")


def check_cpus() -> Iterator[Finding]:
    """The quickstart's two ranks want a processor each."""
    from cluster.machine import usable_cpus

    count = usable_cpus()
    found = f"{count:g} usable ({platform.machine()})"
    yield ok("processors", found) if count >= 2 else warn("processors", found, "2 or more; fewer take twice the time")


def check_prometheus() -> Iterator[Finding]:
    """Only `fathom monitor up` needs it."""
    yield ok("Prometheus", shutil.which("prometheus") or "none: fathom monitor up needs it (apt install prometheus)")


CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    check_python,
    check_packages,
    check_kernels_name,
    check_devices,
    check_dali,
    check_pillow,
    check_compiler,
    check_cpus,
    check_disk,
    check_shared_memory,
    check_loopback,
    check_prometheus,
)


def run_checks(checks: Iterable[Callable[[], Iterable[Finding]]] = CHECKS) -> list[Finding]:
    """All findings, in order. A check that raises becomes a failure that says what it raised."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # noqa: BLE001 - what a broken installation raises cannot be foreseen
            subject = check.__name__.removeprefix("check_").replace("_", " ")
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            findings.append(fail(subject, message, "make install; if it stays, FATHOM_DEBUG=1 fathom doctor"))
            if os.environ.get("FATHOM_DEBUG") == "1":
                import traceback

                traceback.print_exception(error)
    return findings


def print_findings(findings: list[Finding]) -> None:
    """One line a finding, its remedy below it, and a count."""
    width = max((len(finding.subject) for finding in findings), default=0)
    for finding in findings:
        print(f"{finding.level:<4}  {finding.subject:<{width}}  {finding.found}")
        if finding.remedy:
            indent = " " * (width + 8)
            print(textwrap.fill(finding.remedy, 118, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   "))
    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warn", "fail")}
    print(", ".join(f"{count} {level}" for level, count in counts.items()))


def report(findings: list[Finding], as_json: bool = False) -> int:
    """Prints findings, for people or as a JSON list; returns 1 when something fails, else 0."""
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print_findings(findings)
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def doctor_command(as_json: bool = False) -> int:
    """The verb: prints every finding; 1 when something fails."""
    return report(run_checks(), as_json)
