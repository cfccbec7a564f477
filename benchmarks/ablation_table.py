"""The ablation's tables: the rows in the form of the paper's table 9, and paired differences seed by seed.

What a difference is worth is said by the rule that was fixed before measuring: docs/decisions/0006-the-ablation.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Protocol

Measured = Mapping[int, Mapping[str, Mapping[str, Mapping[str, float]]]]  # seed -> row -> domain -> metric -> value
WIDE = "wide"
COLUMNS = (
    ("AbsRel", WIDE, "abs_rel"),
    ("delta1", WIDE, "delta1"),
    ("delta1, disparity space", "wide, disparity space", "delta1"),
    ("delta1, labelled domain", "labelled domain", "delta1"),
)
MARKS = (("L_l", "l"), ("+ L_u", "u"), ("+ S", "s"), ("+ L_feat", "f"))
# What each row is compared with: the step before it, and the controls.
COMPARISONS = (
    ("student-plain", "teacher"),
    ("student-perturbed", "teacher"),
    ("student", "teacher"),
    ("student-perturbed", "student-plain"),
    ("student", "student-perturbed"),
    ("labelled-only", "teacher"),
    ("student-plain", "labelled-only"),
    ("student-perturbed", "labelled-only"),
    ("student", "labelled-only"),
    ("labelled-only-jitter", "labelled-only"),
    ("student-perturbed", "labelled-only-jitter"),
    ("student", "labelled-only-jitter"),
    ("jittered-student", "labelled-only-jitter"),
    ("jittered-student", "labelled-only-jitter-long"),
    ("jittered-student", "jittered-self"),
    ("jittered-self", "labelled-only-jitter"),
    ("oracle", "labelled-only-jitter"),
    ("scarce-student", "scarce-control"),
    ("more-student", "labelled-only-jitter-long"),
    ("larger-control", "labelled-only-jitter"),
    ("larger-student", "labelled-only-jitter"),
    ("larger-student", "larger-control"),
    ("larger-both", "larger-control"),
)


class Marked(Protocol):
    """A row's entry in the design."""

    @property
    def marks(self) -> str: ...


def spread(values: list[float]) -> str:
    """Mean and, of several values, their standard deviation."""
    text = f"{statistics.mean(values):.4f}"
    return f"{text} +- {statistics.stdev(values):.4f}" if len(values) > 1 else text


def mean_rise(values: list[float]) -> str:
    """Mean with its sign and, of several values, its standard error."""
    text = f"{statistics.mean(values):+.4f}"
    return f"{text} +- {standard_error(values):.4f}" if len(values) > 1 else text


def standard_error(values: list[float]) -> float:
    """Of the mean of several values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def verdict(delta1: list[float], abs_rel: list[float]) -> str:
    """One of "helps", "not shown", "no" and "one seed", from the paired differences of every seed."""
    if len(delta1) < 2:
        return "one seed"
    mean = statistics.mean(delta1)
    everywhere = all(value > 0 for value in delta1) and all(value < 0 for value in abs_rel)
    if everywhere and mean > 2 * standard_error(delta1):
        return "helps"
    return "not shown" if mean > 0 else "no"


def tables(measured: Measured, design: Mapping[str, Marked]) -> list[str]:
    """Lines of both Markdown tables."""
    if not measured:
        return ["nothing measured yet"]
    return [*rows_table(measured, design), "", *differences_table(measured)]


def rows_table(measured: Measured, design: Mapping[str, Marked]) -> list[str]:
    """One line a row, mean +- SD over the seeds that have it."""
    titles = [*(mark for mark, _ in MARKS), "row", *(title for title, *_ in COLUMNS), "seeds"]
    lines = [line(titles), line(["---"] * len(titles))]
    constant = [next(iter(rows.values()))["wide, best constant"] for rows in measured.values()]
    floor = [spread([one[metric] for one in constant]) for metric in ("abs_rel", "delta1")]
    lines.append(line([*[""] * len(MARKS), "best constant", *floor, "-", "-", len(constant)]))
    for name, row in design.items():
        found = [rows[name] for rows in measured.values() if name in rows]
        if found:
            marks = ["x" if letter in row.marks else "" for _, letter in MARKS]
            cells = [spread([one[domain][metric] for one in found]) for _, domain, metric in COLUMNS]
            lines.append(line([*marks, name, *cells, len(found)]))
    return lines


def differences_table(measured: Measured) -> list[str]:
    """One line a comparison: delta1 of the wide domain (better high) by seed, AbsRel (better low), and the verdict."""
    seeds = "delta1, seeds " + ", ".join(map(str, measured))
    titles = ["row", "less", seeds, "delta1, mean +- SE", "AbsRel, mean +- SE", "verdict"]
    lines = [line(titles), line(["---"] * len(titles))]
    for row, other in COMPARISONS:
        pairs = [(rows[row], rows[other]) for rows in measured.values() if row in rows and other in rows]
        if pairs:
            delta, error = (
                [one[WIDE][metric] - two[WIDE][metric] for one, two in pairs] for metric in ("delta1", "abs_rel")
            )
            each = ", ".join(f"{value:+.4f}" for value in delta)
            lines.append(line([row, other, each, mean_rise(delta), mean_rise(error), verdict(delta, error)]))
    return lines


def line(cells: Iterable[object]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
