"""A run's page in headless Chromium: no error, figures seen, phone, print, dark.

Slow: `.ci/full` runs it.  Needs a Chromium: that of the system, or of `playwright install`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from searchpet import cli, report
from tests.commands import workplace

pytestmark = pytest.mark.slow
WRITE = report.write
JOB = ["search", "--model", "tiny", "--task", "films", "--budget", "5%", "--space", "wide",
       "--keep-flops", "60%", "--steps", "20", "--batch-size", "8", "--max-length", "16", "--full",
       "--quiet", "--out", "run"]
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        path = found or driver.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium here: install one, or run playwright install chromium")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """The page of a search with controls, full fine-tuning and pruning."""
    folder = tmp_path_factory.mktemp("browser")
    with workplace(folder, tiny_folder) as patch:
        patch.setattr(report, "write", WRITE)
        patch.setattr(sys, "argv", ["searchpet", *JOB])
        assert cli.main(JOB) == 0
        yield folder / "run" / "report.html"


def opened(browser: Any, file: Path, **context: Any) -> tuple[Any, list[str], list[str]]:
    """A page, what the console complains of, and every request beside the file's own."""
    page = browser.new_context(**context).new_page()
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(file.as_uri())
    return page, errors, [url for url in asked if url != file.as_uri()]


@pytest.mark.parametrize("scripts", [True, False])
def test_it_opens_without_errors_and_asks_for_nothing(
        browser: Any, page_file: Path, scripts: bool) -> None:
    page, errors, asked = opened(browser, page_file, java_script_enabled=scripts)
    assert (errors, asked) == ([], [])
    figures = page.locator("figure > svg")
    assert figures.count() == 6
    for i in range(6):
        box = figures.nth(i).bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100


def test_texts_of_figures_can_be_read(browser: Any, page_file: Path) -> None:
    page, _, _ = opened(browser, page_file)
    assert page.get_by_text("attention.query").first.is_visible()
    sizes = page.eval_on_selector_all(
        "figure svg text", "all => all.map(t => t.getBoundingClientRect().height)")
    assert min(size for size in sizes if size) > 6


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_a_page_never_scrolls_sideways(browser: Any, page_file: Path, width: int) -> None:
    page, errors, _ = opened(browser, page_file, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []


def test_it_prints(browser: Any, page_file: Path) -> None:
    page, errors, _ = opened(browser, page_file)
    content = page.pdf(format="A4", print_background=True)
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") >= 2
    page.emulate_media(media="print")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.viewport_size["width"]
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_are_both_legible(browser: Any, page_file: Path, scheme: str) -> None:
    page, _, _ = opened(browser, page_file, color_scheme=scheme)

    def bright(selector: str, what: str) -> float:
        text = page.eval_on_selector(selector, f"e => getComputedStyle(e).{what}")
        return sum(float(v) for v in text[text.index("(") + 1:-1].split(",")[:3]) / 3

    ink, paper = bright("body", "color"), bright("body", "backgroundColor")
    assert (paper < 64) == (scheme == "dark")
    assert abs(ink - paper) > 160
    assert bright("figure", "backgroundColor") > 240  # figures are ink on white in both
