"""What flows through the data room: shard files -> Sample -> Batch.

Shape suffixes: B batch, C channel, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Quantity = Literal["depth_m", "disparity"]


@dataclass(frozen=True, kw_only=True)
class AffineCode:
    """A 16-bit code: quantity = scale * (code - zero) + shift; code 0 is no measurement, whatever `zero` is."""

    scale: float
    shift: float = 0.0
    zero: int = 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as read: encoded members and what is needed to decode them. `problem` is set when it is unusable."""

    key: str
    image: bytes = b""
    target: bytes | None = None  # 16-bit grey PNG; with `code` None and `quantity` set, a float .npy
    code: AffineCode | None = None
    quantity: Quantity | None = None
    sky: bytes | None = None  # 8-bit grey PNG, >127 is sky: disparity 0, no depth
    meta: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None  # a reason from dataio.quarantine.REASONS


@dataclass(frozen=True, kw_only=True)
class Target:
    """A dense target of the batch; its unit is in `quantity`.

    Undefined where `Batch.region_BHW` is 0, and in the rows of roles that need another quantity or none.
    """

    value_BHW: Tensor
    quantity: Quantity


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of one global batch, on the device. Rows of one role are contiguous, see `rows`.

    `views` hold ImageNet-normalised images: "student" is perturbed and mixed; "clean" has the same geometry and the
    same mixing but untouched colours. `region_BHW` is uint8: 0 invalid, 1 the image itself, 2 what CutMix pasted.
    `weight_B` is 0 for a slot whose sample was bad or absent (the last batch of a pass), else 1.
    `cursor` is, per role, the number of samples consumed once this batch has been used: the state to save.
    """

    views: Mapping[str, Tensor]
    targets: Mapping[str, Target]
    region_BHW: Tensor
    weight_B: Tensor
    roles: tuple[tuple[str, int], ...]  # (role, number of its rows), in row order
    keys: tuple[str, ...]
    meta: Mapping[str, Tensor] = field(default_factory=dict)
    cursor: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, role: str) -> slice:
        """Rows of `role`: an empty slice when this (micro-)batch has none."""
        start = 0
        for name, count in self.roles:
            if name == role:
                return slice(start, start + count)
            start += count
        return slice(0, 0)

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches of at most `size` rows (views on the same storage)."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            roles, offset = [], 0
            for name, count in self.roles:
                overlap = min(stop, offset + count) - max(start, offset)
                if overlap > 0:
                    roles.append((name, overlap))
                offset += count
            cut = slice(start, stop)
            yield replace(
                self,
                views={k: v[cut] for k, v in self.views.items()},
                targets={k: replace(t, value_BHW=t.value_BHW[cut]) for k, t in self.targets.items()},
                region_BHW=self.region_BHW[cut],
                weight_B=self.weight_B[cut],
                roles=tuple(roles),
                keys=self.keys[cut],
                meta={k: v[cut] for k, v in self.meta.items()},
            )
