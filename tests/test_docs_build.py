"""The site: built strictly and without network, and every link in it leads somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9"  # a proxy that nobody serves
FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href"}  # by the browser itself


class Page(HTMLParser):
    """ids: what a link can lead to;  links: of the text;  fetched: what the browser loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE,
                   "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_needs_no_network(site: Path) -> None:
    pages = {file: Page(file) for file in sorted(site.rglob("*.html"))}
    assert len(pages) > 100
    wrong = []
    for file, page in pages.items():
        remote = [url for url in page.fetched if urlsplit(url).netloc]
        wrong += [f"{file.name} loads {url}" for url in remote]
        for link in (*page.links, *page.fetched):
            address = urlsplit(link)
            if address.scheme or address.netloc or file.name == "404.html":
                continue  # that page's links begin at the root of a server
            target = file.parent.joinpath(unquote(address.path)).resolve()
            target = file if not address.path else target / "index.html" if (
                target.is_dir()) else target
            if not target.is_file():
                wrong.append(f"{file.name} links to {link}, which is not there")
            elif address.fragment and target in pages and unquote(
                    address.fragment) not in pages[target].ids:
                wrong.append(f"{file.name} links to {link}, which has no such anchor")
        if "{{ " in file.read_text(encoding="utf-8"):
            wrong.append(f"{file.name} has a marker that was not filled")
    assert not wrong


@pytest.mark.slow
def test_signatures_and_docstrings_are_in_it(site: Path) -> None:
    text = (site / "reference/python.html").read_text(encoding="utf-8")
    assert "keep_flops" in text
    assert "Find a structure, train it" in text
    rooms = Page(site / "reference/rooms.html")
    assert "rooms/searchpet.deltas.lora.html" in rooms.links
