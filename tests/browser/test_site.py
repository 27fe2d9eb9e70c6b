"""The built pages in a real browser: whole, offline, for everybody, and explorers that answer."""

import json
import os
import re

import pytest
import sample_book
from browser import lab
from browser import site as browser_site
from playwright.sync_api import expect

from lab import site

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module", autouse=True)
def there():
    """All is there; else the tests are skipped, or fail where it is required."""
    if sentence := lab.missing():
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)


@pytest.fixture(scope="module")
def browser(there):
    with lab.browser() as found:
        yield found


@pytest.fixture(scope="module")
def address(there, pages):
    with browser_site.served(pages) as found:
        yield found


@pytest.fixture
def watched(browser):
    """A page at a desk's width; at its end nothing was asked of elsewhere, nothing went wrong."""
    page = browser.new_page(viewport=DESK)
    page.set_default_timeout(1000 * lab.PAGE_SECONDS)
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
    """Open a page; its explorers, once each of them is there."""
    page.goto(to)
    places = page.locator("[data-explorer]").all()
    for place in places:
        place.and_(page.locator("[data-ready]")).wait_for()
    return places


def test_every_page_is_whole_and_for_everybody(watched, address, pages):
    """No error, no request elsewhere (see `watched`), no page wider than its window, no image that
    is not there or has no place kept free; nothing that axe finds serious, by light and by dark;
    and every explorer is there and answers."""
    script, found, names = browser_site.axe(), {}, set()
    for path in paths(pages):
        watched.set_viewport_size(DESK)
        watched.emulate_media(color_scheme="light")
        for place in ready(watched, f"{address}/{path}"):
            names.add(place.get_attribute("data-explorer"))
            assert place.locator(".explorer").count() == 1
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
    tables = {path.stem for path in (pages / "explorers" / "data").iterdir()}
    assert names == tables | {"scrubber"}  # whose table is in its notebook


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


def drag(page, handle, right, down):
    """By the mouse, from the middle of a handle; the button stays down."""
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + right, y + down, steps=8)


def test_the_triangle_of_mixtures_is_dragged_without_a_kernel(watched, address, pages):
    place = page_with(watched, address, pages, "mixture")
    said, handle = place.locator(".said"), place.locator("circle.shares")
    expect(said).to_contain_text("pool P 33%, update D 33%, buffer B 33%")
    drag(watched, handle, 0, -40)
    expect(said).not_to_contain_text("pool P 33%")  # while it is dragged
    watched.mouse.up()
    place.get_by_role("button", name="thirds", exact=True).click()
    expect(said).to_contain_text("pool P 33%")
    handle.focus()
    watched.keyboard.press("ArrowUp")
    expect(said).to_contain_text("pool P 38%")  # the grid has no thirds
    place.get_by_role("button", name="no pool", exact=True).click()
    expect(said).to_contain_text("Stored, ")
    place.get_by_role("button", name="Pin to compare").click()
    place.get_by_role("button", name="thirds", exact=True).click()
    place.get_by_role("button", name="Pin to compare").click()
    expect(place.locator(".difference")).to_contain_text("stored pairs")
    place.get_by_label("Change over the updates").check()
    expect(said).to_contain_text("in the last update")
    assert place.locator("pre").text_content().startswith("cmpt run cpu")


def test_a_schedule_is_dragged_copied_and_restored_from_its_link(watched, address, pages):
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    place = page_with(watched, address, pages, "schedule")
    said = place.locator(".said")
    expect(place.get_by_label("Curve of an update")).to_have_value('"rsqrt"')  # as its cell says
    before = said.text_content()
    drag(watched, place.locator("circle.knee").first, 0, 60)
    expect(said).not_to_have_text(before)
    watched.mouse.up()
    place.get_by_role("button", name="the paper's meta cosine").click()
    place.get_by_label("Keep the mean rate").check()
    place.get_by_label("Curve of an update").select_option("wsd")
    kept = re.search(r"Mean rate ([\d.]+)", said.text_content())[1]
    place.get_by_label("Meta schedule").select_option("none")
    expect(said).to_contain_text(f"Mean rate {kept}")
    typed = place.get_by_label("Peak, as a number")
    typed.fill("7")
    typed.press("Enter")
    expect(place.locator(".warned")).to_contain_text("Peak: 7 became 0.01")
    place.get_by_label("Copy as").select_option("link")
    place.get_by_role("button", name="Copy").click()
    expect(place.get_by_role("button", name="Copied")).to_be_visible()
    link, words = watched.evaluate("navigator.clipboard.readText()"), said.text_content()
    watched.goto("about:blank")
    ready(watched, link)
    expect(said).to_have_text(words)
    place.get_by_label("Copy as").select_option("YAML")
    expect(place.locator("pre")).to_contain_text("peak: 0.01")


def test_everything_that_the_theme_shows(watched, pages, tmp_path):
    """On the sample book: tabs by keys, folded solutions, and copying."""
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
