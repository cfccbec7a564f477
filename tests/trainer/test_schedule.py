"""Learning-rate factors: their ends, their middle, and what they refuse."""

from __future__ import annotations

import pytest

from trainer.schedule import factor


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "poly"])
def test_ends(decay: str) -> None:
    assert factor(0, 1000, decay=decay) == 1.0
    assert factor(1000, 1000, decay=decay) == (1.0 if decay == "constant" else 0.0)
    assert factor(5000, 1000, decay=decay) == factor(1000, 1000, decay=decay)


def test_middle() -> None:
    assert factor(250, 1000) == 0.75
    assert factor(250, 1000, decay="cosine") == pytest.approx(0.853553390593)
    assert factor(250, 1000, decay="poly") == pytest.approx(0.75**0.9)
    assert factor(250, 1000, decay="poly", power=2) == 0.5625


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "poly"])
def test_warmup_rises_then_the_decay_covers_the_rest(decay: str) -> None:
    assert [factor(s, 1000, 100, decay) for s in (0, 25, 50)] == [0.0, 0.25, 0.5]
    assert factor(100, 1000, 100, decay) == 1.0
    assert factor(550, 1000, 100, decay) == pytest.approx(factor(450, 900, 0, decay))
    values = [factor(s, 1000, 100, decay) for s in range(100, 1001, 10)]
    assert values == sorted(values, reverse=True) and values[-1] >= 0


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"decay": "step"}, "constant, linear, cosine, poly, got 'step'"),
        ({"samples_seen": -1}, "samples_seen=-1"),
        ({"total": 0}, "total=0"),
        ({"warmup": 100}, "warmup=100"),
        ({"warmup": -1}, "warmup=-1"),
        ({"power": 0.0}, "power=0.0"),
    ],
)
def test_refuses(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        factor(**{"samples_seen": 0, "total": 100, **kwargs})
