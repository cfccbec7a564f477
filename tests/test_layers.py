"""The import arrows of the house hold, and the checker sees when they do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.layers import ARROWS, violations
from tools.house_map import modules

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(REPOSITORY).as_posix() for room in ARROWS for path in (REPOSITORY / room).rglob("*.py"))


def test_every_room_has_files() -> None:
    assert {path.split("/", 1)[0] for path in FILES} == set(ARROWS)


def test_the_map_has_a_sentence_for_every_module() -> None:
    found = dict(modules())
    assert found.keys() >= {path for path in FILES if not path.endswith("__init__.py")}
    assert [name for name, about in found.items() if len(about) < 20] == []


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_arrows_hold(room: str) -> None:
    found = [
        line
        for path in FILES
        if path.startswith(f"{room}/")
        for line in violations((REPOSITORY / path).read_text(encoding="utf-8"), path)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/api.py", "import model"),
        ("kernels/api.py", "def f():\n    from model import dpt"),
        ("model/dpt.py", "from dataio.types import Batch"),
        ("model/dpt.py", "from ..dataio import types"),
        ("cluster/group.py", "import trainer.run"),
        ("cluster/group.py", "import launcher"),
        ("dataio/loader.py", "from cluster import runtime"),
        ("dataio/loader.py", "import cluster"),
        ("dataio/loader.py", "import cluster.storage_of_another_kind"),
        ("trainer/loop.py", "from launcher.errors import run_main"),
        ("launcher/verbs_train.py", "def f():\n    import kernels"),
        ("dataio/loader.py", "if TYPE_CHECKING:\n    from model.types import DepthPrediction"),
        ("trainer/loop.py", "import ray"),
        ("trainer/loop.py", "def f():\n    from ray.train import report"),
        ("launcher/verbs_jobs.py", "def f():\n    import ray"),
        ("trainer/loop.py", "class A:\n    def f(self):\n        import deepspeed"),
        ("dataio/loader.py", "from nvidia import dali"),
        ("dataio/loader.py", "import nvidia.dali.fn as fn"),
        ("kernels/api.py", "import triton.language as tl"),
        ("kernels/api.py", "import importlib\ndef f():\n    importlib.import_module('triton')"),
        ("launcher/cli.py", "import torch"),
        ("launcher/cli.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("launcher/cli.py", "class A:\n    from torch import nn"),
        ("launcher/verbs_train.py", "from trainer.run import train"),
        ("trainer/config.py", "from torch import Tensor"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dataio/loader.py", "from cluster.storage import atomic_write\nfrom cluster import storage"),
        ("dataio/loader.py", "from . import plan\nfrom dataio.types import Batch\nimport torch"),
        ("dataio/dali_batch.py", "from nvidia.dali import fn"),
        ("trainer/engine_zero.py", "import deepspeed"),
        ("trainer/tasks/student.py", "from model import dpt\nfrom kernels import api\nfrom .base import Task"),
        ("cluster/deep/pool.py", "import ray"),
        ("launcher/jobs.py", "def f():\n    from ray.job_submission import JobSubmissionClient"),
        ("launcher/verbs_train.py", "from trainer.config import ConfigError\ndef f():\n    import torch, trainer.run"),
        ("trainer/config.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("model/vit.py", "import rayleigh, modeling"),
    ],
)
def test_a_right_arrow_is_no_problem(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_files_stay_readable() -> None:
    """Style: a file under 400 lines."""
    long = {path: count for path in FILES if (count := (REPOSITORY / path).read_text("utf-8").count("\n")) > 400}
    assert long == {}


def test_nothing_of_ours_unpickles_what_comes_over_a_wire_or_from_a_file() -> None:
    """`cluster/failures.py` only tries whether an error would survive the way that Ray sends it."""
    unpickles = re.compile(r"_object\(|object_list\(|pickle\.loads?\(|Unpickler\(|weights_only=False")
    found = {path for path in FILES if unpickles.search((REPOSITORY / path).read_text(encoding="utf-8"))}
    assert found == {"cluster/failures.py"}
