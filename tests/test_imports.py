"""Our top-level names live among those of other packages: what importing them loads, and what they must not break."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers import ARROWS, LIGHT_MODULES, imports

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "ray", "deepspeed", "nvidia.dali", "triton", "timm")
# Import name -> distribution, where the two differ.
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "prometheus_client": "prometheus-client", "nvidia": "nvidia-dali"}
# Comes with a declared package and in the version that this one wants.
BROUGHT_ALONG = {"triton": "torch", "pydantic_core": "pydantic", "huggingface_hub": "timm"}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter at the repository's root."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)


def loaded_by(*modules: str) -> list[str]:
    """Which heavy libraries importing `modules` loads."""
    code = f"import sys\nimport {', '.join(modules)}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_rooms_load_nothing_heavy() -> None:
    assert loaded_by(*ARROWS) == []


def test_light_modules_load_nothing_heavy() -> None:
    present = [name for name in LIGHT_MODULES if importlib.util.find_spec(name) is not None]
    launcher = [f"launcher.{path.stem}" for path in (REPOSITORY / "launcher").glob("*.py") if path.stem != "__init__"]
    assert loaded_by(*present, *launcher) == []


def test_kernels_keeps_out_of_transformers_way() -> None:
    done = run_python("import kernels; print(kernels.__version__)")
    assert done.stdout.strip() == "0.0.0", done.stderr


def test_transformers_works_from_a_checkout() -> None:
    """It probes any package named `kernels`; a wrong answer breaks every one of its models."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    name = "transformers.models.depth_anything.modeling_depth_anything"
    done = run_python(f"import kernels, {name} as m; print(m.__name__)")
    assert done.returncode == 0, done.stderr
    assert "modeling_depth_anything" in done.stdout


def test_rooms_shadow_no_installed_distribution() -> None:
    owners = importlib.metadata.packages_distributions()
    others = {room: set(owners.get(room, [])) - {"fathom-depth"} for room in ARROWS}
    assert {room: dists for room, dists in others.items() if dists} == {}


def test_version_stays_below_transformers_window() -> None:
    found = re.search(r'version="(\d+)\.(\d+)\.', (REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    assert (int(found[1]), int(found[2])) < (0, 9)


def declared() -> set[str]:
    """The distributions that setup.py names, extras too."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = (re.match(r"([A-Za-z0-9._-]+?)(\[[\w,]+\])?[<>=]=?\d", text) for text in texts)
    return {re.sub(r"-cuda1[23]0$", "", match[1].lower()) for match in found if match}


def test_every_third_party_import_is_declared() -> None:
    known = declared()
    assert {"torch", "ray", "nvidia-dali"} <= known
    missing = set()
    for room in ARROWS:
        for path in (REPOSITORY / room).rglob("*.py"):
            relative = path.relative_to(REPOSITORY).as_posix()
            for found in imports(path.read_text(encoding="utf-8"), relative):
                top = found.name.split(".", 1)[0]
                if top in ARROWS or top in sys.stdlib_module_names or top == "__future__":
                    continue
                name = BROUGHT_ALONG.get(top, DISTRIBUTIONS.get(top, top))
                if name.lower() not in known:
                    missing.add(f"{relative}:{found.line}: {top}")
    assert sorted(missing) == []
