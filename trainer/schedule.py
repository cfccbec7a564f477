"""Learning-rate factors as pure functions of progress, measured in samples seen (so the batch size does not matter).

Depth Anything V1 (arXiv 2401.10891, section 4.1) decays linearly to 0; V2's metric code decays as (1 - progress)^0.9.
Neither states a warm-up.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Decay = Literal["constant", "linear", "cosine", "poly"]


def factor(samples_seen: int, total: int, warmup: int = 0, decay: Decay = "linear", power: float = 0.9) -> float:
    """What to multiply the base learning rate by, in [0, 1].

    Rises linearly from 0 to 1 over the first `warmup` samples, then decays over the rest, to 0 at `total` ("constant"
    stays 1) and stays there. Called with the samples consumed *before* a step, the first step of a run with warm-up has
    factor 0 and the last step of any run more than 0.

    Args:
        samples_seen: samples consumed so far, >= 0.
        total: samples of the whole run, > 0.
        warmup: samples of the warm-up, in [0, total).
        decay: "constant" | "linear" | "cosine" | "poly".
        power: the exponent of "poly", > 0.

    Raises:
        ValueError: an argument is not as above.
    """
    if decay not in get_args(Decay):
        raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}, got {decay!r}")
    if samples_seen < 0 or not 0 <= warmup < total or power <= 0:
        raise ValueError(
            "expected samples_seen >= 0, 0 <= warmup < total and power > 0, "
            f"got samples_seen={samples_seen}, warmup={warmup}, total={total}, power={power}"
        )
    if samples_seen < warmup:
        return samples_seen / warmup
    remaining = max(total - samples_seen, 0) / (total - warmup)
    if decay == "constant":
        return 1.0
    if decay == "linear":
        return remaining
    if decay == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * remaining))
    return float(remaining**power)
