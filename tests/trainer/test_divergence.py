"""A spike is a row of losses far above those before; noise, trends and single outliers are none."""

from __future__ import annotations

import math
import pickle
import random

import pytest

from trainer.divergence import SpikeDetector, TrainingDiverged


def detector(**other: float) -> SpikeDetector:
    return SpikeDetector(**({"factor": 8.0, "steps": 4, "window": 40} | other))  # type: ignore[arg-type]


def course(count: int, seed: int = 0, level: float = 1.0, trend: float = 0.0) -> list[float]:
    draw = random.Random(seed)
    return [level + trend * i + 0.1 * draw.gauss(0, 1) for i in range(count)]


def fed(made: SpikeDetector, losses: list[float]) -> list[int]:
    """The steps at which it cries, the last loss at most."""
    return [step for step, loss in enumerate(losses, 1) if made.see(step, loss)]


def test_a_row_of_high_losses_is_a_spike_and_its_beginning_is_known() -> None:
    made = detector()
    assert fed(made, [*course(100), 5.0, 5.0, 5.0, 5.0]) == [104]
    assert made.first == 101
    assert list(made.losses) == list(range(85, 105)) and made.losses[104] == 5.0


def test_fewer_are_none() -> None:
    assert fed(detector(), [*course(100), 5.0, 5.0, 5.0, *course(100, 1), 5.0, 5.0, 5.0]) == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_trends_are_none(seed: int) -> None:
    """Heavy tails, too: 5 % of the losses ten times as far off."""
    draw = random.Random(seed)
    losses = [3.0 * math.exp(-i / 500) + 0.1 * draw.gauss(0, 10 if draw.random() < 0.05 else 1) for i in range(2000)]
    assert fed(detector(), losses) == []


def test_a_loss_that_hardly_moves_may_move_a_little() -> None:
    assert fed(detector(), [1.0] * 50 + [1.1] * 20) == []
    assert fed(detector(), [1.0] * 50 + [1.2] * 4) == [54]


def test_nothing_is_said_before_enough_is_known() -> None:
    assert fed(detector(), [1.0] * 9 + [9.0] * 4) == []
    assert fed(detector(), [1.0] * 10 + [9.0] * 4) == [14]


def test_a_new_level_that_it_lived_through_becomes_usual() -> None:
    """Three high, one low, again and again: after a while that is what losses are here."""
    made = detector()
    assert fed(made, [*course(60), *([3.0, 3.0, 3.0, 1.0] * 20), *([3.0] * 10)]) == []


def test_losses_that_are_not_finite_count_nowhere() -> None:
    made = detector()
    assert fed(made, [*course(60), 5.0, math.nan, 5.0, math.inf, 5.0, 5.0]) == [66]
    assert math.nan not in made.losses.values()


def test_the_error_travels_with_what_it_knows() -> None:
    error = TrainingDiverged("step 3: so").about("spike", 3, 9, (24, 72), {8: 1.0, 9: 7.0})
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "step 3: so" and copy.exit_status == 1
    assert (copy.what, copy.first_step, copy.step, copy.skip) == ("spike", 3, 9, (24, 72))
    assert copy.losses == {8: 1.0, 9: 7.0}
