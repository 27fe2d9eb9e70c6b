"""The built pages in a real browser: whole, offline, for everybody, and explorers that answer."""

import json
import os
import re

import pytest
import sample_book
from browser import lab
from browser import site as browser_site

from lab import site

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PAPER = "getComputedStyle(document.body).backgroundColor"
MILLISECONDS = 60_000


@pytest.fixture(scope="module", autouse=True)
def there():
    """All is there; else the tests are skipped, or fail where it is required."""
    if sentence := lab.missing():
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)


@pytest.fixture(scope="module")
def browser(there):
    with browser_site.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(there, pages):
    with browser_site.served(pages) as found:
        yield found


@pytest.fixture
def watched(browser):
    """A page at a desk's width; at its end nothing was asked of elsewhere, nothing went wrong."""
    page = browser.new_page(viewport=DESK)
    page.set_default_timeout(MILLISECONDS)
    found = lab.Watched(page)
    page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else 0)
    yield page
    page.close()
    assert (found.errors, found.elsewhere) == ([], [])


def paths(pages):
    """Every page's path, from what MyST says it built."""
    project = json.loads((pages / "config.json").read_text())["projects"][0]
    return ["", *(each["slug"] for each in project["pages"] if each.get("slug"))]


def ready(page, to):
    page.goto(to)
    for place in page.locator("[data-explorer]").all():
        place.and_(page.locator("[data-ready]")).wait_for()


def test_every_page_is_whole_and_for_everybody(watched, address, pages):
    """No error, no request elsewhere (see `watched`), no page wider than its window, no image that
    is not there or has no place kept free; nothing that axe finds serious, by light and by dark."""
    script, found = browser_site.axe(), {}
    for path in paths(pages):
        watched.set_viewport_size(DESK)
        watched.emulate_media(color_scheme="light")
        ready(watched, f"{address}/{path}")
        assert watched.locator("h1").count() == 1
        watched.evaluate(script)
        for scheme, rules in (("light", []), ("dark", ["color-contrast"])):
            watched.emulate_media(color_scheme=scheme)
            if serious := watched.evaluate(browser_site.RUN_AXE, rules):
                found[path, scheme] = serious
        assert watched.evaluate(OVERFLOW) == 0, path
        watched.set_viewport_size(PHONE)
        assert watched.evaluate(OVERFLOW) == 0, f"{path} on a phone"
        broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert watched.evaluate(broken) == []
        unsized = "[...document.images].filter(i => !i.getAttribute('height')).map(i => i.alt)"
        assert watched.evaluate(unsized) == [], path
    assert found == {}


def test_search_finds(watched, address):
    watched.goto(f"{address}/")
    watched.keyboard.press("/")
    watched.keyboard.type("reservoir buffer")
    first = watched.locator(".found a").first
    first.wait_for()
    assert {"reservoir", "buffer"} & {
        each.lower() for each in watched.locator(".found mark").all_text_contents()
    }
    watched.keyboard.press("ArrowDown")
    assert first.evaluate("each => each === document.activeElement")
    with watched.expect_navigation():
        watched.keyboard.press("Enter")
    assert watched.locator("h1").count() == 1
    watched.locator(".search input").fill("no such word anywhere")
    watched.get_by_text("Nothing found").wait_for()


def test_dark_and_light_are_kept(watched, address):
    watched.emulate_media(color_scheme="light")
    watched.goto(f"{address}/")
    light = watched.evaluate(PAPER)
    watched.get_by_role("button", name="Dark or light").click()
    dark = watched.evaluate(PAPER)
    assert dark != light
    watched.goto(f"{address}/glossary")
    assert watched.evaluate(PAPER) == dark
    watched.get_by_role("button", name="Dark or light").click()
    assert watched.evaluate(PAPER) == light


def test_chapters_are_a_menu_on_a_phone(watched, address, pages):
    watched.set_viewport_size(PHONE)
    watched.goto(f"{address}/")
    menu, chapters = (
        watched.get_by_role("button", name="Chapters"),
        watched.locator("nav.chapters a"),
    )
    assert not chapters.first.is_visible()
    menu.click()
    assert chapters.count() == len(paths(pages)) and chapters.first.is_visible()
    watched.keyboard.press("Escape")
    assert not chapters.first.is_visible() and menu.get_attribute("aria-expanded") == "false"
    for each in ("next", "prev"):
        watched.locator(f".neighbours a[rel={each}]").click()
    assert watched.url == f"{address}/"


def page_with(watched, address, pages, explorer):
    """Open the last page that has an explorer."""
    with_it = [
        path for path in paths(pages)
        if f'data-explorer="{explorer}"' in (pages / path / "index.html").read_text()
    ]  # fmt: skip
    ready(watched, f"{address}/{with_it[-1]}")
    return watched.locator(f'[data-explorer="{explorer}"]')


def test_the_mixture_triangle_answers_without_a_kernel(watched, address, pages):
    place = page_with(watched, address, pages, "mixture")
    said, handle = place.locator("output"), place.locator("circle.handle")
    assert "Shares P 0.33, D 0.33, B 0.33" in said.text_content()
    handle.focus()
    watched.keyboard.press("ArrowUp")
    assert "Shares P 0.35, D 0.30, B 0.35" in said.text_content()
    between = re.search(r"A_KA [\d.]+% \([\d.]+ to [\d.]+\), A_ZS [\d.]+%", said.text_content())
    for _ in range(4):
        watched.keyboard.press("ArrowRight")
    assert "Shares P 0.35, D 0.10, B 0.55" in said.text_content()
    assert between[0] not in said.text_content()
    place.locator("circle.stored").nth(1).click()
    assert place.locator("tbody tr").first.locator("td").nth(4).text_content() == "0.00"
    place.locator("pre", has_text="cmpt run cpu").wait_for()


def test_the_schedule_explorer_answers_without_a_kernel(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    said, lines = place.locator("output"), place.locator("polyline")
    assert "of the peak 0.001, over 8 tasks" in said.text_content()
    before = lines.last.get_attribute("points")
    place.get_by_role("button", name="Hold this one").press("Enter")
    place.get_by_label("Meta schedule").select_option("cosine")
    assert lines.count() == 2 and lines.last.get_attribute("points") != before
    assert re.search(r"= 0\.1\d of the peak", said.text_content())
    assert place.locator("tbody tr").first.locator("td").first.text_content() == "meta-cosine"
    place.get_by_label("Peak").focus()
    watched.keyboard.press("ArrowLeft")
    assert "of the peak 0.00079" in said.text_content()
    place.get_by_role("combobox", name="Tasks").select_option("16")
    assert "over 16 tasks" in said.text_content()


def test_other_explorers_show_a_still_and_how_to_run_it(watched, address, pages):
    for path in paths(pages):
        if 'class="how"' in (pages / path / "index.html").read_text():
            ready(watched, f"{address}/{path}")
            for still in watched.locator(".still:has(.how)").all():
                assert (
                    still.locator("img").evaluate(
                        "each => each.decode().then(() => each.naturalWidth)"
                    )
                    > 300
                )
                assert "make lab" in still.locator(".how").text_content()


def test_everything_that_the_theme_shows(watched, pages, tmp_path):
    """On the sample book: tabs by keys, folded solutions, copying, and widgets from their state."""
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with browser_site.served(site.build_pages(sample_book.write(tmp_path))) as address:
        watched.goto(f"{address}/")
        watched.get_by_role("tab", name="First").focus()
        watched.keyboard.press("ArrowRight")
        assert watched.get_by_text("The second panel.").is_visible()
        assert not watched.get_by_text("The first panel.").is_visible()
        assert not watched.get_by_text("Two.").is_visible()
        watched.locator("details.solution summary").click()
        assert watched.get_by_text("Two.").is_visible()
        watched.locator(".code", has_text="def f(x)").hover()
        watched.locator(".code", has_text="def f(x)").get_by_role("button", name="Copy").click()
        assert watched.evaluate("navigator.clipboard.readText()").startswith("def f(x):")
        watched.evaluate(browser_site.axe())
        assert watched.evaluate(browser_site.RUN_AXE, []) == []
        watched.goto(f"{address}/cells")
        watched.locator(".live .noUi-handle").focus()
        watched.keyboard.press("ArrowRight")
        watched.locator(".live .widget-readout", has_text="4").wait_for()
        watched.locator(".live circle.handle").wait_for()
        watched.evaluate(browser_site.axe())
        assert watched.evaluate(browser_site.RUN_AXE, []) == []
