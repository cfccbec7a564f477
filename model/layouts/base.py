"""How one file format names the tensors: pairs of patterns, read in both directions.

A pattern is a name with `{i}`, `{j}` for numbers and `{p}` for weight or bias. The official names (Depth-Anything's
`pretrained.` and `depth_head.`, DINOv2's own inside) are the language that all formats are translated to and from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.presets import PositionMode, Preset

Tensors = dict[str, Tensor]

_FIELDS = {"{i}": r"(?P<i>\d+)", "{j}": r"(?P<j>\d+)", "{p}": r"(?P<p>weight|bias)"}


@dataclass(frozen=True)
class Pattern:
    """A name with fields in it."""

    text: str

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts = re.split(r"(\{[ijp]\})", self.text)
        return re.compile("".join(_FIELDS.get(part, re.escape(part)) for part in parts))

    def match(self, name: str) -> dict[str, str] | None:
        found = self._regex.fullmatch(name)
        return found.groupdict() if found else None

    def fill(self, fields: Mapping[str, str]) -> str:
        return self.text.format(**fields)


@dataclass(frozen=True)
class Join:
    """One official tensor that a format keeps in pieces along `dim`: equal ones, or of the given first sizes."""

    official: Pattern
    pieces: tuple[Pattern, ...]
    dim: int = 0
    first: int | None = None  # size of the first of two pieces; None: equal pieces

    def fits(self, pieces: tuple[Tensor, ...]) -> bool:
        """Whether these are such pieces by their shapes."""
        if any(piece.ndim <= self.dim for piece in pieces):
            return False
        rest = {(*piece.shape[: self.dim], *piece.shape[self.dim + 1 :]) for piece in pieces}
        along = [piece.shape[self.dim] for piece in pieces]
        return len(rest) == 1 and (len(set(along)) == 1 if self.first is None else along[0] == self.first)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self.first is None:
            return tensor.chunk(len(self.pieces), self.dim)
        return tensor.split([self.first, tensor.shape[self.dim] - self.first], self.dim)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A format: how to recognise it, its names, and what the networks that it holds are taken for."""

    name: str
    title: str  # for people
    recognise: Callable[[Collection[str]], bool]
    names: tuple[tuple[Pattern, Pattern], ...]  # (official, here)
    joins: tuple[Join, ...] = ()
    drops: frozenset[str] = frozenset()  # official names that the format does not keep
    encoder_only: bool = False
    position_mode: PositionMode = "official"
    holds: Callable[[Preset], bool] = lambda preset: True  # which presets a file of this format can be

    def to_official(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Names here -> official names; names that mean nothing here stay as they are, for the caller to refuse."""
        rest = dict(tensors)
        out: Tensors = {}
        for join in self.joins:
            for name in list(rest):
                fields = join.pieces[0].match(name)
                pieces = [p.fill(fields) for p in join.pieces] if fields is not None else []
                if fields is not None and all(p in rest for p in pieces) and join.fits(tuple(rest[p] for p in pieces)):
                    out[join.official.fill(fields)] = torch.cat([rest.pop(p) for p in pieces], join.dim)
        for name, tensor in rest.items():
            official = _translate(name, ((here, official) for official, here in self.names)) or name
            out[f"{official} (twice)" if official in out else official] = tensor
        return out

    def from_official(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Official names -> names here. Raises KeyError for a tensor that the format has no place for."""
        out: Tensors = {}
        for name, tensor in tensors.items():
            if name in self.drops or (self.encoder_only and not name.startswith("pretrained.")):
                continue
            for join in self.joins:
                fields = join.official.match(name)
                if fields is not None:
                    filled = [p.fill(fields) for p in join.pieces]
                    out.update(zip(filled, join.split(tensor), strict=True))
                    break
            else:
                here = _translate(name, self.names)
                if here is None:
                    raise KeyError(name)
                out[here] = tensor
        return out


def _translate(name: str, pairs: object) -> str | None:
    for source, target in pairs:  # type: ignore[attr-defined]
        fields = source.match(name)
        if fields is not None:
            return target.fill(fields)
    return None


def pairs(table: str) -> tuple[tuple[Pattern, Pattern], ...]:
    """A table of lines 'official here', as patterns."""
    rows = (line.split() for line in table.strip().splitlines())
    return tuple((Pattern(official), Pattern(here)) for official, here in rows)


def join(official: str, *pieces: str, dim: int = 0, first: int | None = None) -> Join:
    """A Join from plain text."""
    return Join(Pattern(official), tuple(Pattern(p) for p in pieces), dim, first)
