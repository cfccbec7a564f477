"""One self-contained HTML page: text, tables, curves (SVG) and pictures, no file beside it and no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from cluster import storage
from trainer.journal import logged_lines

Points = Sequence[tuple[float, float]]

MOST_POINTS = 400  # of a curve; more are averaged, with their range as a band: a long run's page stays small
_LEGEND_CHARS = 100  # of names beside one another
_STROKES = ("-", "--", ":")  # after ten colours the same ten come with the next one
# Text stays text, and a page is the same whenever it is made.
SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fathom"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-top: 1.6rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1b1f24; }
tbody tr + tr td { border-top: 1px solid #d8dee4; }
div.wide { overflow-x: auto; }
table.words { font-size: .9rem; } table.words th, table.words td { text-align: left; vertical-align: top; }
table.words td:first-child { white-space: nowrap; }
table.words td:nth-child(n+3) { overflow-wrap: anywhere; min-width: 12rem; }
svg text, svg tspan { font-family: "DejaVu Sans", Verdana, sans-serif !important; }
img, svg { max-width: 100%; height: auto; } figcaption { color: #57606a; font-size: .9rem; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { min-width: 36rem; }
details { margin: 1rem 0; } pre { overflow-x: auto; background: #f6f8fa; padding: .8rem; font-size: .8rem; }
"""


class Page:
    """Collects sections and writes them in one go. Text is escaped; pictures are embedded."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], *, words: bool = False) -> None:
        """Numbers come formatted; the first column is the row's name. `words`: cells hold text, not numbers."""
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        kind = ' class="words"' if words else ""
        self._parts.append(
            f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def picture(self, image: Image.Image, caption: str, *, quality: int | None = None) -> None:
        """A PNG, or with `quality` (1 to 95) a JPEG: a tenth of the bytes for photographs."""
        buffer = io.BytesIO()
        if quality is None:
            image.save(buffer, format="PNG", optimize=True)
        else:
            image.convert("RGB").save(buffer, format="JPEG", quality=quality)
        data = base64.b64encode(buffer.getvalue()).decode()
        kind = "png" if quality is None else "jpeg"
        self.figure(f'<img alt="{html.escape(caption)}" src="data:image/{kind};base64,{data}">', caption)

    def curves(self, series: Mapping[str, Points], *, x: str, y: str, caption: str) -> None:
        """Lines over a common pair of axes, as SVG."""
        self.figure(curves_svg(series, x=x, y=y), caption)

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

    def figure(self, content: str, caption: str) -> None:
        """An element that is markup already."""
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{content}{below}</figure>")


def curves_svg(series: Mapping[str, Points], *, x: str, y: str) -> str:
    """A line plot as an SVG element; a logarithmic axis where positive values span more than two decades.

    Of more than `MOST_POINTS` points the means are drawn, and what they span as a band.
    """
    from matplotlib import rc_context  # heavy: only who writes a report pays for it
    from matplotlib.figure import Figure

    with rc_context(SVG):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(series.items()):
            stroke: dict[str, Any] = {"linestyle": _STROKES[place // 10 % len(_STROKES)], "color": f"C{place % 10}"}
            means, lows, highs = thinned(points)
            at = [step for step, _ in means]
            if len(means) < len(points):
                axes.fill_between(at, lows, highs, color=stroke["color"], alpha=0.18, linewidth=0)
            marker = "o" if len(means) < 12 else ""  # a single point has no line
            axes.plot(
                at, [v for _, v in means], label=literal(name), linewidth=1.4, marker=marker, markersize=3, **stroke
            )
        values = [value for points in series.values() for _, value in points]
        if values and min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
        axes.set(xlabel=literal(x), ylabel=literal(y))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if series:
            columns = max(1, min(5, _LEGEND_CHARS // (6 + max(len(name) for name in series))))
            figure.legend(frameon=False, loc="outside upper left", ncols=columns)
        return svg_of(figure)


def svg_of(figure: Any) -> str:
    """A matplotlib Figure as an SVG element, the same whenever it is drawn; inside an `rc_context` of `SVG`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def thinned(points: Points) -> tuple[list[tuple[float, float]], list[float], list[float]]:
    """At most `MOST_POINTS` of (last x, mean y) of neighbours, with the lowest and the highest y of each."""
    size = max(1, -(-len(points) // MOST_POINTS))
    means, lows, highs = [], [], []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [value for _, value in group]
        means.append((group[-1][0], sum(values) / len(values)))
        lows.append(min(values))
        highs.append(max(values))
    return means, lows, highs


def literal(text: str) -> str:
    """Text as it stands: to matplotlib `$` starts a formula, and a leading `_` hides a label."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def loss_curves(folders: Mapping[str, str], smooth: int = 5) -> dict[str, list[tuple[float, float]]]:
    """(step, loss) of runs from their metrics.jsonl, averaged over `smooth` logged steps; empty ones are left out.

    Lines of events have no loss.
    """
    curves = {}
    for name, folder in folders.items():
        losses = {line["step"]: line["loss"] for line in logged_lines(folder) if line.get("loss") is not None}
        steps = sorted(losses)
        points = []
        for start in range(0, len(steps), smooth):
            window = steps[start : start + smooth]
            points.append((float(window[-1]), sum(losses[s] for s in window) / len(window)))
        if points:
            curves[name] = points
    return curves
