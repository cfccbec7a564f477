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

from trainer.report import Page, curves_svg, loss_curves

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


def test_the_page_needs_no_other_file_and_no_network(page: str) -> None:
    reader = Reader(page)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("data:image/png;base64,", "#")), (name, value[:80])
        elif not name.startswith("xmlns"):
            assert "http" not in value.replace("http-equiv", ""), (name, value)
    assert not {"link", "iframe", "object", "embed", "base", "script"} & set(reader.tags)
    assert "@import" not in page and "url(http" not in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces


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


def test_a_curve_is_drawn_for_every_series() -> None:
    one = curves_svg({"a": [(0, 0), (1, 1)]}, x="step", y="loss")
    three = curves_svg({name: [(0, 0), (1, 1)] for name in ("a", "_b", "c$")}, x="step", y="loss")
    assert one.startswith("<svg") and "<!DOCTYPE" not in one
    legend = r'id="legend_1"'
    assert re.search(legend, one) and re.search(legend, three)
    drawn = [set(re.findall(r"stroke: (#[0-9a-f]{6})", svg)) for svg in (one, three)]
    assert {"#1f77b4", "#ff7f0e", "#2ca02c"} <= drawn[1]
    assert "#ff7f0e" not in drawn[0]


def test_loss_curves_average_and_take_the_later_line(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(step)} for step in range(1, 8)]
    lines += [{"step": 3, "loss": 30.0}, {"step": 8, "loss": None}]
    (tmp_path / "a").mkdir()
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 9, "lo'
    (tmp_path / "a" / "metrics.jsonl").write_text(text)
    found = loss_curves({"run": str(tmp_path / "a"), "absent": str(tmp_path / "b")}, smooth=3)
    assert found == {"run": [(3.0, 11.0), (6.0, 5.0), (7.0, 7.0)]}
