"""The report page: nothing beside it, nothing from the network, text that stays text."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.report import MOST_POINTS, Page, curves_svg, loss_curves, thinned

HOSTILE = "</pre><script>alert('$x_1$')</script> & \"quoted\" --> _"


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    page = Page(f"Title {HOSTILE}")
    page.heading(f"Heading {HOSTILE}")
    page.text(f"Paragraph {HOSTILE}")
    page.table(["name", HOSTILE], [[f"row {HOSTILE}", 0.5]])
    page.picture(Image.fromarray(np.full((4, 6, 3), 77, np.uint8)), f"picture {HOSTILE}")
    page.curves({HOSTILE: [(1, 2.0), (2, 1.0)], "_hidden": [(1, 1.0), (2, 3.0)]}, x=HOSTILE, y="loss", caption=HOSTILE)
    page.details(f"more {HOSTILE}", f"yaml: {HOSTILE}")
    path = tmp_path_factory.mktemp("report") / "a folder" / "report.html"
    page.write(str(path))
    return path.read_text(encoding="utf-8")


def assert_self_contained(page: str) -> Reader:
    """Nothing beside the page, nothing from the network, no script. Gives the page, parsed."""
    reader = Reader(page)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")), (name, value[:80])
        elif not name.startswith("xmlns"):
            assert "http" not in value.replace("http-equiv", ""), (name, value)
    assert not {"link", "iframe", "object", "embed", "base", "script"} & set(reader.tags)
    assert "@import" not in page and "url(http" not in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces
    return reader


def test_the_page_needs_no_other_file_and_no_network(page: str) -> None:
    assert_self_contained(page)


def test_text_is_escaped(page: str) -> None:
    reader = Reader(page)
    assert "script" not in reader.tags
    for label in ("Title", "Heading", "Paragraph", "row", "picture", "more", "yaml:"):
        assert f"{label} {HOSTILE}" in reader.text
    assert [value for name, value in reader.attributes if name == "alt"] == [f"picture {HOSTILE}"]


def test_pictures_are_embedded_as_they_are(page: str) -> None:
    data = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert data is not None
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))))
    assert image.shape == (4, 6, 3) and (image == 77).all()


def test_the_page_is_well_formed(page: str) -> None:
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    for tag in ("table", "figure", "details", "pre", "svg", "p", "h2"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>") >= 1


def strokes(svg: str) -> dict[str, int]:
    """Colour of every drawn line -> number of its points; the legend's are left out."""
    line = r'<path d="([^"]*)"[^>]*style="fill: none; stroke: (#[0-9a-f]{6}); stroke-width: 1.4'
    found = re.findall(line, svg.partition('id="legend_1"')[0])
    return {colour: len(re.findall("[ML]", path)) for path, colour in found}


def test_a_curve_is_drawn_for_every_series_and_named() -> None:
    bent = [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5), (3.0, 2.0)]
    one = curves_svg({"a": bent}, x="step", y="loss")
    three = curves_svg(dict.fromkeys(("a", "_b", "c$x$"), bent), x="step", y="loss")
    assert one.startswith("<svg") and "<!DOCTYPE" not in one
    assert re.search(r'id="legend_1"', one) and re.search(r'id="legend_1"', three)
    assert strokes(one) == {"#1f77b4": 4}
    assert strokes(three) == {"#1f77b4": 4, "#ff7f0e": 4, "#2ca02c": 4}
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", three)
    assert {"step", "loss", "a", "\u200b_b", "c$x$"} <= set(texts)
    assert curves_svg({"a": bent}, x="step", y="loss") == one  # nothing random, no date


def test_curves_without_points_make_an_empty_plot() -> None:
    assert curves_svg({}, x="step", y="loss").startswith("<svg")
    assert strokes(curves_svg({"a": [], "b": [(1.0, 2.0)]}, x="step", y="loss")) == {"#ff7f0e": 1}


def test_ten_colours_come_again_with_another_stroke() -> None:
    many = {str(i): [(0.0, i), (1.0, i + 1.0), (2.0, i)] for i in range(11)}
    svg = curves_svg(many, x="step", y="loss")
    first = [style for style in re.findall(r'style="([^"]*stroke: #1f77b4[^"]*)"', svg) if "stroke-width: 1.4" in style]
    assert any("stroke-dasharray" in style for style in first)
    assert any("stroke-dasharray" not in style for style in first)


def test_values_over_decades_have_a_logarithmic_axis() -> None:
    wide = curves_svg({"a": [(0, 0.01), (1, 5.0), (2, 1.0)]}, x="step", y="norm")
    narrow = curves_svg({"a": [(0, 0.1), (1, 5.0), (2, 1.0)]}, x="step", y="norm")
    negative = curves_svg({"a": [(0, -1.0), (1, 500.0), (2, 0.001)]}, x="step", y="norm")
    powers = [">−</tspan>" in svg for svg in (wide, narrow, negative)]  # the exponent of a tick at 0.01
    assert powers == [True, False, False]


def test_a_long_curve_is_drawn_as_means_in_a_band() -> None:
    points = [(float(step), float(step % 7)) for step in range(10 * MOST_POINTS + 3)]
    means, lows, highs = thinned(points)
    assert len(means) == len(lows) == len(highs) <= MOST_POINTS
    assert means[0] == (10.0, sum(step % 7 for step in range(11)) / 11)
    assert means[-1][0] == points[-1][0]
    assert (lows[3], highs[3]) == (0.0, 6.0)
    svg = curves_svg({"a": points}, x="step", y="loss")
    assert strokes(svg)["#1f77b4"] <= MOST_POINTS and "fill-opacity: 0.18" in svg
    assert len(svg) < 60_000
    short = curves_svg({"a": points[:MOST_POINTS]}, x="step", y="loss")
    assert "fill-opacity: 0.18" not in short


def test_a_photograph_may_be_a_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    page = Page("x")
    page.picture(Image.fromarray(noise), "x", quality=80)
    assert 'src="data:image/jpeg;base64,' in page._parts[0]


def test_loss_curves_average_and_take_the_last_history(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(step)} for step in range(1, 8)]
    lines += [{"step": 3, "loss": 30.0}, {"step": 8, "loss": None}, {"step": 8, "event": "validation", "values": {}}]
    (tmp_path / "a").mkdir()
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 9, "lo'
    (tmp_path / "a" / "metrics.jsonl").write_text(text)
    found = loss_curves({"run": str(tmp_path / "a"), "absent": str(tmp_path / "b")}, smooth=3)
    assert found == {"run": [(3.0, 11.0)]}  # steps 4 to 7 were of a history that a resume left
