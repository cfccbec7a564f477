"""Small values between ranks: the same on all, of any size, and never as objects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cluster.exchange import first_rank_s, gathered
from tests.trainer.ranks import run_ranks

AWKWARD = {"text": "größer\n\ud800", "none": None, "many": [1, 2.5, [True]], "far": math.inf, "exact": 0.1 + 0.2}


def test_alone_it_is_a_list_of_one() -> None:
    assert gathered((1, "a")) == [[1, "a"]]
    assert first_rank_s(AWKWARD) == AWKWARD
    assert math.isnan(gathered(math.nan)[0])


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        gathered(Path("x"))


def exchange(rank: int, world_size: int) -> tuple[list[Any], Any, Any]:
    dist.all_gather_object = dist.broadcast_object_list = None  # type: ignore[assignment]
    return gathered({"rank": rank, "text": "x" * (1000 * rank)}), first_rank_s(AWKWARD if rank == 0 else 1), gathered(
        None
    )


def test_all_ranks_get_all(tmp_path: Path) -> None:
    for all_of_them, firsts, nothing in run_ranks(exchange, 3, tmp_path):
        assert all_of_them == [{"rank": rank, "text": "x" * (1000 * rank)} for rank in range(3)]
        assert firsts == AWKWARD
        assert nothing == [None] * 3
