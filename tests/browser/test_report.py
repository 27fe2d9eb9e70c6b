"""The page that `cmpt compare --report` writes, in a browser: without a network, for everybody, on
a phone and by dark."""

import os

import pytest
from browser import lab
from browser import site as browser_site

from cmp.data import load_data
from cmp.releases.compare import compare
from cmp.releases.gate import Gate, Limits, apply_gate
from cmp.releases.report import write_report

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "[...document.images].filter((each) => each.complete && !each.naturalWidth).length"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if sentence := lab.missing():
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)
    folder = tmp_path_factory.mktemp("page")
    tables = compare("small:annealed:0", "small:annealed:1", load_data("embedded"), subset=100)
    lines = apply_gate(Gate(each=Limits(drop=1, lost=30)), tables)
    write_report(tables, folder / "index.html", gate=lines, notes=["Five new pictures arrived."])
    with browser_site.served(folder) as found:
        yield found


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        (1280, "light"),
        pytest.param(390, "light", marks=pytest.mark.long),
        pytest.param(1280, "dark", marks=pytest.mark.long),
    ],
)
def test_the_page_is_whole_and_for_everybody(address, width, scheme):
    with lab.browser() as browser:
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        assert page.evaluate(OVERFLOW) <= 0 and page.evaluate(BROKEN) == 0
        assert {url for url in asked if not url.startswith("data:")} <= {
            f"{address}/", f"{address}/favicon.ico"
        }  # fmt: skip
        assert browser_site.axe_finds(page) == []


def test_a_wall_shows_what_was_asked_for(address):
    with lab.browser() as browser:
        page = browser.new_page()
        page.goto(address)
        cards = page.locator("#wall-lost .card")
        count = cards.count()
        name = cards.nth(3).locator("b").inner_text()
        page.fill("#lost input", name.upper())
        shown = page.locator("#wall-lost .card:visible")
        assert 0 < shown.count() < count
        assert all(name in text for text in shown.all_inner_texts())
        page.fill("#lost input", "")
        page.select_option("#lost select", "shapes")
        assert set(page.locator("#wall-lost .card:visible .set").all_inner_texts()) == {"shapes"}


def test_the_page_is_read_without_its_script(address):
    with lab.browser() as browser:
        page = browser.new_context(java_script_enabled=False).new_page()
        page.goto(address)
        assert page.locator("#wall-lost .card").first.is_visible()
        assert not page.locator("#lost .filter").is_visible()
