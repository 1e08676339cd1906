"""The docs in a real browser, wide and on a phone, light and dark: kept as pictures, and nothing of them is cut off.

The pictures lie in build/screenshots, to be looked at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: make dev installs it")
pytest.importorskip("material", reason="the site is made by mkdocs-material: pip install 'fxzip[docs]'")

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]
WIDTHS = (1280, 400)
GUIDES = sorted(p.stem for p in (ROOT / "docs" / "examples").glob("*.py") if p.stem not in ("digits", "run"))
PAGES = [
    "",
    "how/",
    "results/",
    "zoo/",
    "security/",
    "api/",
    "api/prepared/",
    "api/measuring/",
    *(f"guides/{name}/" for name in GUIDES),
]
DARK = ("", "results/", "guides/report_and_drawing/")

FACTS = """() => ({
  width: document.documentElement.scrollWidth, inner: innerWidth,
  cut: [...document.querySelectorAll(".md-typeset__scrollwrap, .md-content img")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 1)
    .filter(e => innerWidth > 800 || !["auto", "scroll"].includes(getComputedStyle(e).overflowX))
    .map(e => e.textContent.trim().slice(0, 60) || e.getAttribute("src")),
  pictures: [...document.querySelectorAll(".md-content img")].map(e => [e.getAttribute("src"), e.naturalWidth,
    e.getBoundingClientRect().width, e.closest(".md-content").getBoundingClientRect().width]),
  links: [...document.querySelectorAll(".md-nav--primary a.md-nav__link")].map(e => e.getAttribute("href"))
    .filter(e => !e.startsWith("#")),
})"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    KEPT.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = driver.chromium.launch(executable_path=BROWSER, args=arguments)
        yield opened
        opened.close()


def look(browser: Any, site: Path, page: str, width: int, scheme: str = "light") -> dict[str, Any]:
    """Show a page, keep a picture of it, and tell what is on it."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((site / page / "index.html").as_uri(), wait_until="load")
    found: dict[str, Any] = tab.evaluate(FACTS)
    name = page.strip("/").replace("/", "_") or "index"
    tab.screenshot(full_page=True, path=KEPT / f"{name}_{width}_{scheme}.png")
    tab.close()
    return {**found, "errors": errors}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page or "index")
def test_nothing_is_cut_off(browser: Any, site: Path, page: str, width: int) -> None:
    found = look(browser, site, page, width)
    assert found["errors"] == []
    assert found["width"] <= found["inner"]
    assert found["cut"] == []
    for source, natural, shown, column in found["pictures"]:
        assert natural > 0, f"{source} is not there"
        assert shown > 0.45 * column, f"{source} is small"
    assert len(found["links"]) == len(set(found["links"])), "a page stands twice in the navigation"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", DARK, ids=lambda page: page or "index")
def test_in_the_dark(browser: Any, site: Path, page: str, width: int) -> None:
    from PIL import Image

    for kind in ("light", "dark"):
        assert look(browser, site, page, width, kind)["errors"] == []
    name = page.strip("/").replace("/", "_") or "index"
    light, dark = (Image.open(KEPT / f"{name}_{width}_{kind}.png").convert("L") for kind in ("light", "dark"))
    middle = [sum(picture.resize((16, 16)).get_flattened_data()) / 256 for picture in (light, dark)]
    assert middle[1] < 128 < middle[0]
