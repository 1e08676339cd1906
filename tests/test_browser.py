"""The report's page in a real browser: nothing fetched, no error, and all of it can be read, on a phone too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxzip
from fxzip.sweep import Sweep, SweepRow
from tests.fxzip.served import NETWORKS

pytest.importorskip("matplotlib", reason="the page's charts need matplotlib: pip install 'fxzip[report]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: make dev installs it")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")

WIDTHS = {"wide": 1280, "tablet": 768, "phone": 375, "narrow": 320}

FACTS = """() => {
  const lines = [];
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest("style, thead")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect(), style = getComputedStyle(parent);
    const svg = parent.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    lines.push({
      text: node.data.trim(), left: box.left, right: box.right, width: box.width,
      size: parseFloat(style.fontSize) * scale,
      colour: svg ? style.fill : style.color, behind: behind(parent),
    });
  }
  const clipped = [...document.querySelectorAll("table, td, th, .tile, .box, figure")]
    .filter(e => !e.closest("thead") && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 90));
  return {lines, clipped, width: document.documentElement.scrollWidth, inner: innerWidth,
          tables: [...document.querySelectorAll("table")].map(t => t.getBoundingClientRect().toJSON())};
}"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    make, _, size = NETWORKS["resnet18"]
    x = torch.randn(8, 3, size, size)
    zipped = fxzip.zip(make(), make(), [x], cut="layer4", names=("dogs", "birds"), refit=False, progress=False)
    rows = [
        SweepRow(method, "layer3", flops, flops, {"dogs": 70 + 9 * flops, "birds": 80 - flops})
        for method in ("zip", "permute")
        for flops in (1.0, 1.25, 1.5)
    ]
    return zipped.report.to_html(tmp_path_factory.mktemp("page") / "m.html", sweep=Sweep(tuple(rows)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = driver.chromium.launch(executable_path=BROWSER, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=WIDTHS)
def seen(request: pytest.FixtureRequest, browser: Any, html: Path) -> dict[str, Any]:
    """The page at one width, all of it opened: what it holds, and what happened while it was shown."""
    tab = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 800})
    messages: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda message: asked.append(message.url))
    tab.goto(html.as_uri(), wait_until="networkidle")
    tab.locator("summary").click()
    found: dict[str, Any] = tab.evaluate(FACTS)
    shot = tab.screenshot(full_page=True, path=html.with_name(f"{request.param}.png"))
    tab.close()
    return {**found, "messages": messages, "asked": asked, "address": html.as_uri(), "shot": shot}


def test_no_error_and_nothing_fetched(seen: dict[str, Any]) -> None:
    assert seen["messages"] == []
    assert seen["asked"] == [seen["address"]]


def test_all_of_it_is_there(seen: dict[str, Any]) -> None:
    shown = [line["text"] for line in seen["lines"]]
    for wanted in ("dogs + birds", "layer3.1", "output birds", "Matched correlation by depth", "MFLOPs on one example"):
        assert wanted in shown, wanted
    assert all(line["width"] > 0 for line in seen["lines"])


def test_nothing_is_cut_off(seen: dict[str, Any]) -> None:
    assert seen["width"] <= seen["inner"]
    assert seen["clipped"] == []
    outside = [line["text"] for line in seen["lines"] if line["left"] < -0.5 or line["right"] > seen["inner"] + 0.5]
    assert outside == []
    assert seen["tables"]
    assert all(table["left"] >= 0 and table["right"] <= seen["inner"] for table in seen["tables"])


def test_text_is_large_enough(seen: dict[str, Any]) -> None:
    limit = 12 if seen["inner"] > 320 else 11  # charts shrink a little on the narrowest phones
    assert [(line["text"], line["size"]) for line in seen["lines"] if line["size"] < limit] == []


def test_contrast(seen: dict[str, Any]) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5."""
    low = [(line["text"], line["colour"], line["behind"]) for line in seen["lines"] if ratio(line) < 4.5]
    assert low == []


def test_the_picture_is_not_empty(seen: dict[str, Any]) -> None:
    from io import BytesIO

    from PIL import Image

    picture = Image.open(BytesIO(seen["shot"])).convert("RGB")
    assert picture.width == seen["inner"]
    assert len(picture.getcolors(maxcolors=1 << 24)) > 50


def ratio(line: dict[str, Any]) -> float:
    low, high = sorted(luminance(line[key]) for key in ("colour", "behind"))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
