"""One self-contained HTML page: text, tables, curves (SVG) and pictures, no file beside it and no network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence

from PIL import Image

from cluster import storage
from trainer.journal import read_json_lines

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1b1f24; }
tbody tr + tr td { border-top: 1px solid #d8dee4; }
img, svg { max-width: 100%; height: auto; } figcaption { color: #57606a; font-size: .9rem; } figure { margin: 1rem 0; }
details { margin: 1rem 0; } pre { overflow-x: auto; background: #f6f8fa; padding: .8rem; font-size: .8rem; }
"""


class Page:
    """Collects sections and writes them in one go. Text is escaped; pictures are embedded."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Numbers come formatted; the first column is the row's name."""
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, image: Image.Image, caption: str) -> None:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        self._figure(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">', caption)

    def curves(self, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, caption: str) -> None:
        """Lines over a common pair of axes, as SVG."""
        self._figure(curves_svg(series, x=x, y=y), caption)

    def details(self, summary: str, text: str) -> None:
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
        )

    def write(self, path: str) -> None:
        """Write the page atomically. Raises StorageError."""
        title = html.escape(self.title)
        storage.atomic_write(
            path,
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
            f"<body><h1>{title}</h1>{''.join(self._parts)}</body></html>\n",
        )

    def _figure(self, content: str, caption: str) -> None:
        self._parts.append(f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>")


def curves_svg(series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """A line plot as an SVG element."""
    from matplotlib.figure import Figure  # heavy: only who writes a report pays for it

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=literal(name), linewidth=1.4)
    axes.set(xlabel=literal(x), ylabel=literal(y))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def literal(text: str) -> str:
    """Text as it stands: to matplotlib `$` starts a formula, and a leading `_` hides a label."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def loss_curves(folders: Mapping[str, str], smooth: int = 5) -> dict[str, list[tuple[float, float]]]:
    """(step, loss) of runs from their metrics.jsonl, averaged over `smooth` logged steps; empty ones are left out.

    After a resume a step may stand twice; the later line counts.
    """
    curves = {}
    for name, folder in folders.items():
        lines = read_json_lines(os.path.join(folder, "metrics.jsonl"))
        losses = {line["step"]: line["loss"] for line in lines if line["loss"] is not None}
        steps = sorted(losses)
        points = []
        for start in range(0, len(steps), smooth):
            window = steps[start : start + smooth]
            points.append((float(window[-1]), sum(losses[s] for s in window) / len(window)))
        if points:
            curves[name] = points
    return curves
