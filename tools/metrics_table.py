"""Prints the table of metrics for docs/monitoring.md, or puts it there.

    .venv/bin/python tools/metrics_table.py [--write]
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from cluster.telemetry import METRICS, Metric  # noqa: E402  the checkout's, wherever this is called

PAGE = REPOSITORY / "docs" / "monitoring.md"
MARK = "<!-- metrics: made by tools/metrics_table.py -->\n"


def table() -> str:
    """Markdown: a row for each metric."""
    rows = ["| metric | kind | served by | what |", "|---|---|---|---|"]
    for name, about in METRICS.items():
        labels = f"{{{', '.join(about.labels)}}}" if about.labels else ""
        served = "all" if len(about.of) > 2 else ", ".join(about.of)
        rows.append(f"| `{name}{labels}` | {about.kind} | {served} | {said(about)} |")
    return "\n".join(rows) + "\n"


def said(about: Metric) -> str:
    """Help, known values of labels, and when there may be none."""
    values = "; ".join(f"{label}: {', '.join(known)}" for label, known in about.labels.items() if known)
    absent = f"Absent {about.absent}." if about.absent else ""
    return " ".join(part for part in (about.help, f"({values})" if values else "", absent) if part)


def page(text: str) -> str:
    """The page with the table of now behind the mark."""
    before, mark, _ = text.partition(MARK)
    return f"{before}{mark}\n{table()}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
