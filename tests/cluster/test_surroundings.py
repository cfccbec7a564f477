"""How many workers fit on a machine."""

from __future__ import annotations

import pytest

from cluster.surroundings import workers_on


@pytest.mark.parametrize(
    ("resources", "threads", "use_gpu", "workers"),
    [
        ({"CPU": 8.0}, 1, False, 8),
        ({"CPU": 8.0}, 3, False, 2),
        ({"CPU": 8.0, "GPU": 4.0}, 1, True, 4),
        ({"CPU": 8.0, "GPU": 4.0}, 4, True, 2),
        ({"CPU": 8.0, "GPU": 0.5}, 1, True, 0),
        ({"CPU": 8.0}, 1, True, 0),
        ({}, 1, False, 0),
    ],
)
def test_workers_are_as_many_as_the_scarcer_of_both_allows(
    resources: dict[str, float], threads: int, use_gpu: bool, workers: int
) -> None:
    assert workers_on(resources, threads, use_gpu) == workers
