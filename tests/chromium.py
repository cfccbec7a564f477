"""Pages in a headless Chromium, the one that is installed, and what can be read on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

_START_S = 60.0
# Every piece of text that can be seen: its lines' boxes, cut where an element around it cuts it, and its size.
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("option, noscript") || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const matrix = parent instanceof SVGElement ? parent.getScreenCTM() : { a: 1, b: 0 };
    const scale = Math.hypot(matrix.a, matrix.b);
    const size = parseFloat(getComputedStyle(parent).fontSize) * scale;
    for (const box of range.getClientRects()) {
      let [left, top, right, bottom] = [box.left, box.top, box.right, box.bottom];
      for (let around = parent; around; around = around.parentElement) {
        if (getComputedStyle(around).overflowY === "visible" || around === document.documentElement) continue;
        const cut = around.getBoundingClientRect();
        [left, top, right, bottom] =
          [Math.max(left, cut.left), Math.max(top, cut.top), Math.min(right, cut.right), Math.min(bottom, cut.bottom)];
      }
      if (right > left && bottom > top) found.push({ node: node.data, size, left, top, right, bottom });
    }
  }
  return found;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=_START_S * 1000
        )
        yield started
        started.close()


def overlapping(texts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of lines of which one covers more than a pixel of the other in both directions."""
    found = []
    texts = sorted(texts, key=lambda text: text["top"])
    for number, one in enumerate(texts):
        for other in texts[number + 1 :]:
            if other["top"] >= one["bottom"] - 1:
                break
            if min(one["right"], other["right"]) - max(one["left"], other["left"]) > 1:
                found.append((one["node"], other["node"]))
    return found
