"""The built pages in a real browser: whole, offline, for everybody, and explorers that answer."""

import gzip
import json
import os
import re
import shlex
from types import SimpleNamespace
from urllib.parse import quote

import options
import pytest
import sample_book
import torch
from browser import lab
from browser import site as browser_site
from copied import computed_by
from playwright.sync_api import expect
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import cmp
from cmp import cli
from lab import chapters, explorers, site

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
NEXT_FRAME = "new Promise((next) => requestAnimationFrame(() => setTimeout(next)))"
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


@pytest.mark.parametrize("part", options.one_in(12, range(12)))
def test_every_page_is_whole_and_for_everybody(watched, address, pages, part):
    """No error, no request elsewhere (see `watched`), no page wider than its window, no image that
    is not there or has no place kept free; nothing that axe finds, by light and by dark, at a
    desk's width and at a phone's; and every explorer is there and answers."""
    found = {}
    for path in paths(pages)[part::12]:
        watched.set_viewport_size(DESK)
        watched.emulate_media(color_scheme="light")
        for place in ready(watched, f"{address}/{path}"):
            assert place.locator(".explorer").count() == 1
        assert watched.locator("h1").count() == 1
        for size in (DESK, PHONE):
            watched.set_viewport_size(size)
            watched.evaluate(NEXT_FRAME)  # in which the page hears of its size
            assert watched.evaluate(OVERFLOW) == 0, (path, size)
            for scheme, rules in (("light", []), ("dark", ["color-contrast"])):
                watched.emulate_media(color_scheme=scheme)
                if faults := browser_site.axe_finds(watched, rules):
                    found[path, size["width"], scheme] = faults
        broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert watched.evaluate(broken) == []
        unsized = "[...document.images].filter(i => !i.getAttribute('height')).map(i => i.alt)"
        assert watched.evaluate(unsized) == [], path
    assert found == {}


def test_every_table_of_an_explorer_is_on_a_page(pages):
    texts = [path.read_text("utf-8") for path in pages.rglob("index.html")]
    names = {name for text in texts for name in re.findall(r'data-explorer=\\?"(\w+)', text)}
    tables = {path.stem for path in (pages / "explorers" / "data").iterdir()}
    assert names == tables | {"scrubber", "path"}  # whose tables are in their notebooks


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
    watched.locator(".search input").fill("qzxvw blorf")
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
    header = watched.locator("header").bounding_box()
    assert chapters.first.bounding_box()["y"] >= header["y"] + header["height"]
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
    said, handle = place.locator(".said"), place.locator(".handle.shares")
    expect(said).to_contain_text("Pool P 33.3%, update D 33.3%, buffer B 33.3%")
    drag(watched, handle, 0, -40)
    expect(said).not_to_contain_text("Pool P 33.3%")  # while it is dragged
    watched.mouse.up()
    place.get_by_role("button", name="thirds", exact=True).click()
    expect(said).to_contain_text("Pool P 33.3%")
    handle.focus()
    watched.keyboard.press("ArrowUp")
    expect(said).to_contain_text("Pool P 37.5%")  # the grid has no thirds
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
    drag(watched, place.locator(".knees .handle").first, 0, 60)
    expect(said).not_to_have_text(before)
    watched.mouse.up()
    place.get_by_role("button", name="the paper's meta cosine").click()
    place.get_by_label("Keep the mean rate").check()
    place.get_by_label("Curve of an update").select_option("wsd")
    kept = re.search(r"Mean rate ([\d.]+)", said.text_content())[1]
    place.get_by_label("Meta schedule").select_option("none")
    expect(said).to_contain_text(f"Mean rate {kept}")
    typed = place.get_by_label("Peak, as a number")
    expect(typed).to_be_disabled()  # the peak follows
    place.get_by_label("Keep the mean rate").uncheck()
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


REFUSE = """copies => {
    navigator.clipboard.writeText = () => Promise.reject(new DOMException("refused"));
    if (!copies) document.execCommand = () => false;
}"""


@pytest.mark.parametrize("copies, said", [(True, "Copied"), (False, "Press Ctrl+C")])
def test_what_the_clipboard_refuses_is_copied_or_selected(watched, address, pages, copies, said):
    place = page_with(watched, address, pages, "schedule")
    watched.evaluate(REFUSE, copies)
    for shown in (place.locator(".away"), watched.locator(".code:visible").first):
        shown.scroll_into_view_if_needed()
        shown.hover()
        shown.get_by_role("button", name="Copy").click()
        expect(shown.get_by_role("button", name=said)).to_be_visible()
        text = shown.locator("pre").text_content()
        assert watched.evaluate("String(getSelection())").split() == text.split()


# what edition 0.2 got wrong, a test for each


def copied(place):
    """The texts of an explorer's forms, by name."""
    kind = place.get_by_label("Copy as")
    texts = {}
    for name in kind.locator("option").all_text_contents():
        kind.select_option(name)
        texts[name] = place.locator("pre").text_content()
    return texts


RSQRT = {"schedule.name": "rsqrt", "schedule.meta": "rsqrt", "schedule.peak": 1.6e-3}
HALVES = {"mixture.pretraining": 0.5, "mixture.update": 0.5, "mixture.buffer": 0.0}
HARD_FIRST = {"stream.order": "easy-accuracy", "stream.reverse": True}
CHOSEN = {
    "schedule": ("meta rsqrt, tuned", RSQRT), "mixture": ("no buffer", HALVES),
    "stream": ("hard first", HARD_FIRST), "path": (None, None),
    "budget": ("our runs", None),
}  # fmt: skip
"""Of each explorer a preset and the changes that it means, where the forms are those of a run."""


LATER = ("schedule", "mixture", "budget")
"""The forms of two are those of a run, as the stream's; the third counts every method's cost."""


@pytest.mark.parametrize(
    "explorer", [pytest.param(n, marks=[pytest.mark.long] * (n in LATER)) for n in CHOSEN]
)
def test_roundtrip_of_every_copied_form_in_the_page(watched, address, pages, explorer, tmp_path):
    """Each form in the page computes what the page shows; the link shows the same forms again."""
    place = page_with(watched, address, pages, explorer)
    preset, changes = CHOSEN[explorer]
    if preset:
        place.get_by_role("button", name=preset, exact=True).click()
        watched.evaluate(NEXT_FRAME)
    expect(place.locator("pre")).not_to_be_empty()
    texts = copied(place)
    forms = {name: text for name, text in texts.items() if name != "link"}
    if changes is not None:
        wanted = explorers.changed_run("cpu", changes)
        [source] = chapters.select(["04" if explorer == "schedule" else "07"])
        for form, text in forms.items():
            assert computed_by(form, text, "cpu", tmp_path, source) == wanted, text
    else:
        {"budget": check_budget, "path": check_path}[explorer](place, forms, tmp_path)
    watched.goto("about:blank")
    ready(watched, texts["link"])
    expect(place.locator("pre")).not_to_be_empty()
    assert copied(place) == texts


def output_of(command):
    """What a `cmpt` command prints."""
    [program, *words] = shlex.split(command)
    assert program == "cmpt"
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    return done.stdout


def check_budget(place, forms, _):
    """The command prints as many steps and samples of full fine-tuning as the page."""
    [command] = forms.values()
    row = place.locator("tbody tr", has_text="full fine-tuning").locator("td").all_text_contents()
    lines = [line.split() for line in output_of(command).splitlines()]
    assert [line[-2:] for line in lines if line[:1] == ["full"]] == [row[-2:]]


def check_path(_, forms, folder):
    """The command merges files as the call merges weights."""
    tuned, before = ({"a": torch.full((2, 2), value)} for value in (1.0, 3.0))
    for name, weights in (("tuned", tuned), ("before", before)):
        save_file(weights, folder / f"{name}.safetensors")
    command = re.sub(r"\w+\.safetensors", lambda found: f"{folder}/{found[0]}", forms["command"])
    output_of(command)
    merged = eval(forms["Python"], {"cmp": SimpleNamespace(merge=cmp.merge)} | locals())
    assert load_file(folder / "merged.safetensors")["a"].equal(merged["a"])
    assert merged["a"].unique().tolist() == [2.0]


def test_shares_that_are_typed_sum_to_one(watched, address, pages):
    place = page_with(watched, address, pages, "mixture")
    typing = ("pool P", "45", "45%"), ("update D", "101", "100%"), ("buffer B", "-3", "0%")
    for name, text, share in (*typing, ("pool P", "x", "0%")):
        typed = place.get_by_label(f"Share of {name}, as a number")
        typed.fill(text)
        typed.press("Enter")
        expect(typed).to_have_value(share)
        watched.evaluate(NEXT_FRAME)
        shares = re.findall(r"([\d.]+)%", place.locator(".said").text_content())[:3]
        assert f"{float(share[:-1]):g}" in [f"{float(each):g}" for each in shares]
        assert sum(map(float, shares)) == pytest.approx(100, abs=0.15)
        expect(place.locator(".warned")).not_to_be_empty() if text != "45" else None


def test_a_number_typed_before_the_page_is_drawn_again_replaces_the_old_one(
    watched, address, pages
):
    """On a busy machine, a reader's Enter and Tab come before the next drawing."""
    place = page_with(watched, address, pages, "mixture")
    first, second = (
        place.get_by_label(f"Share of {name}, as a number") for name in ("pool P", "update D")
    )
    first.fill("45")
    second.evaluate(
        """async (second, first) => {
            first.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", cancelable: true }));
            second.select();
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        }""",
        first.element_handle(),
    )
    expect(second).to_have_value("27.5%")
    watched.keyboard.insert_text("101")
    second.press("Enter")
    expect(place.locator(".warned")).to_contain_text("101 became 100")


TEXTS = """async place => {
    const texts = new Set();
    for (let left = 30; left; left--) {
        await new Promise((next) => requestAnimationFrame(next));
        texts.add(place.textContent);
    }
    return [...texts];
}"""
"""What a place says in the next half second."""
LONELY = re.compile("^cosine, meta cosine, peak 0.004:")
"""The name of a stored setting near which no other one ended."""


def test_a_dot_that_the_pointer_passes_leaves_what_is_typed_alone(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    typed, said = place.get_by_label("Peak, as a number"), place.locator(".said")
    place.get_by_role("button", name="infinite", exact=True).click()
    typed.fill("0.00")
    before = said.text_content()
    place.get_by_role("button", name=LONELY).hover()
    expect(said).not_to_have_text(before)
    assert len(said.evaluate(TEXTS)) == 1  # what shows where it ended does not hide it
    expect(typed).to_be_focused()
    expect(typed).to_have_value("0.00")


def test_choices_are_undone_one_by_one_and_a_slider_moved_by_keys_as_one(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    place.get_by_role("button", name="plain, tuned").click()
    curve, warmup = (
        place.get_by_label("Curve of an update"),
        place.get_by_label("Warmup, as a number"),
    )
    for name in ("cosine", "rsqrt"):
        curve.select_option(name)
    watched.evaluate(NEXT_FRAME)  # in which the form gets the fields of this curve
    place.get_by_label("Warmup", exact=True).focus()
    for _ in range(3):
        watched.keyboard.press("ArrowRight")
    expect(warmup).to_have_value("17.5%")
    for text in ("50%", "60%"):
        warmup.fill(text)
        warmup.press("Enter")
    for value in ("50%", "17.5%", "10%"):
        watched.keyboard.press("Shift+Tab")  # where the keys of Undo are not those of a text
        watched.keyboard.press("Control+z")
        expect(warmup).to_have_value(value)
        warmup.focus()
    expect(curve).to_have_value('"rsqrt"')
    for value in ("cosine", "wsd"):
        place.get_by_role("button", name="Undo", exact=True).click()
        expect(curve).to_have_value(f'"{value}"')


def test_arrow_keys_move_a_whole_number_from_its_smallest_value(watched, address, pages):
    place = page_with(watched, address, pages, "budget")
    label = "Budget, in steps of full fine-tuning"
    typed, slider = (
        place.get_by_label(f"{label}, as a number"),
        place.get_by_label(label, exact=True),
    )
    typed.fill("10")
    typed.press("Enter")
    slider.focus()
    for key, value in (("ArrowRight", "11"), ("ArrowLeft", "10")):
        for _ in range(5):
            watched.keyboard.press(key)
            watched.evaluate(NEXT_FRAME)
        expect(typed).to_have_value(value)


def test_a_schedule_that_cannot_be_run_is_not_handed_out(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    place.get_by_role("button", name="plain, tuned").click()
    place.get_by_label("Meta schedule").select_option("geometric")
    decay = place.get_by_label("Decay per update, as a number")
    decay.fill("0")
    decay.press("Enter")
    words = "This cannot be run: update 2 would train at a learning rate of 0"
    expect(place.locator(".said")).to_contain_text(words)
    expect(place.locator("pre")).to_contain_text(words)
    expect(place.get_by_role("button", name="Copy")).to_be_disabled()
    place.get_by_label("Meta schedule").select_option("free")
    expect(place.locator("pre")).to_contain_text("schedule.peaks=")
    expect(place.get_by_role("button", name="Copy")).to_be_enabled()


@pytest.mark.parametrize(
    "explorer, state, field, value",
    [
        ("schedule", '{"peak":7}', "Curve of an update", '"wsd"'),
        ("budget", '{"model":7}', "Model", '"small"'),
    ],
)
def test_a_malformed_link_says_so_and_shows_the_defaults(
    watched, address, pages, explorer, state, field, value
):
    """`tests/js/state.test.mjs` has all forms of such links."""
    place = page_with(watched, address, pages, explorer)
    page = watched.url.split("#")[0]
    watched.goto("about:blank")
    watched.goto(f"{page}#explorer={explorer}&state={quote(state)}")
    expect(place.locator(".warned")).to_contain_text("This link cannot be read")
    expect(place.get_by_label(field)).to_have_value(value)


def test_an_explorer_that_fails_leaves_its_still(browser, address):
    page = browser.new_page(viewport=DESK)
    page.route("**/data/budget.json", lambda route: route.fulfill(json={}))
    with page.expect_event("pageerror"):
        page.goto(f"{address}/methods")
    expect(page.locator('[data-explorer="budget"]')).to_contain_text("This is a still picture")
    page.close()


def test_the_address_of_a_page_that_is_gone_leads_on(watched, address):
    watched.goto(f"{address}/atlas/")
    watched.wait_for_url(f"{address}/the-guide/")


@pytest.mark.parametrize("path", ["learning-rates", "glossary"])
def test_a_link_to_an_explorer_that_a_page_lacks_says_so(watched, address, path):
    watched.goto(f"{address}/{path}#explorer=schedul&state={{}}")
    words = watched.get_by_text("this page has no explorer “schedul”")
    expect(words).to_be_in_viewport()
    watched.evaluate("location.hash = ''")
    expect(words).to_have_count(0)


BEGIN = """async start => {
    const { explore } = await import("/explorers/schedule.js");
    const table = await (await fetch("/explorers/data/schedule.json")).json();
    const made = document.createElement("div");
    made.id = "made";
    document.querySelector("article").prepend(made);
    explore(made, { table, kernel: null, start });
}"""


@pytest.mark.parametrize(
    "size, command, said",
    [("quick", "cmpt run quick", ""), ("huge", "cmpt run cpu", 'size cannot be "huge"')],
)
def test_a_cell_says_the_size_of_runs(watched, address, size, command, said):
    watched.goto(f"{address}/glossary")
    watched.evaluate(BEGIN, {"size": size, "peak": 0.001})
    made = watched.locator("#made")
    expect(made.locator("pre")).to_contain_text(command)
    expect(made.locator(".warned")).to_contain_text(said)


def test_a_pin_that_is_not_made_says_why_and_others_keep_their_colours(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    pin, warned = place.get_by_role("button", name="Pin to compare"), place.locator(".warned")
    names, colour = place.locator(".pins tbody .name"), "all => all.map((x) => x.style.borderColor)"
    pin.click()
    expect(warned).to_be_empty()
    pin.click()
    expect(warned).to_contain_text("already pinned")
    for preset in ("plain, tuned", "infinite", "twin of meta rsqrt"):
        place.get_by_role("button", name=preset, exact=True).click()
        pin.click()
    expect(warned).to_be_empty()
    place.get_by_role("button", name="the paper's meta cosine").click()
    pin.click()
    expect(warned).to_contain_text("At most 4 pins are compared: unpin one first.")
    colours = names.evaluate_all(colour)
    place.get_by_role("button", name="Unpin").first.click()
    expect(names).to_have_count(3)
    assert len(set(colours)) == 4 and names.evaluate_all(colour) == colours[1:]


def test_a_link_lands_at_its_explorer_and_the_address_follows(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    assert "#" not in watched.url
    place.get_by_role("button", name="infinite", exact=True).click()
    watched.wait_for_function("location.hash.includes('infinite')")
    link = watched.url
    place.get_by_role("button", name="Undo", exact=True).click()
    watched.wait_for_function("!location.hash.includes('infinite')")
    watched.goto("about:blank")
    ready(watched, link)
    expect(place.get_by_label("Curve of an update")).to_have_value('"infinite"')
    seen = "each => Math.abs(each.getBoundingClientRect().top) < innerHeight / 2"
    watched.wait_for_function(f"({seen})(document.querySelector('[data-explorer=schedule]'))")
    # a link in the text of the same page; its pins take the place of those that are here
    watched.evaluate("location.hash = 'explorer=schedule&state={\"warmup\":0.6}'")
    expect(place.get_by_label("Warmup, as a number")).to_have_value("60%")
    place.get_by_role("button", name="Pin to compare").click()
    watched.evaluate('location.hash = \'explorer=schedule&pins=[{"peak":0.002},{"peak":0.003}]\'')
    names = place.locator(".pins tbody .name")
    expect(names).to_have_text(["wsd, peak 0.002", "wsd, peak 0.003"])
    names.last.focus()
    watched.keyboard.press("Enter")
    expect(place.get_by_label("Peak, as a number")).to_have_value("0.003")
    watched.evaluate(NEXT_FRAME)
    expect(names.last).to_be_focused()


@pytest.fixture
def phone(browser, address):
    """A page of a phone that is touched."""
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.set_default_timeout(1000 * lab.PAGE_SECONDS)
    found = lab.Watched(page)
    yield page
    context.close()
    assert (found.errors, found.elsewhere) == ([], [])


ENDS = """chart => [[".ends text", "y", 4], [".dots circle[r='4.5']", "cy", 0]].map(
    ([which, key, down]) => [...chart.querySelectorAll(which)].map(
        (each) => +each.getAttribute(key) - down))"""
"""Where the lines of the first screen's chart end, and their points after the last update."""


def test_the_first_screen_saves_pictures_by_replay(watched, address, pages):
    """The number and the end of the chart's line are one score; nothing begins by itself."""
    ready(watched, f"{address}/")
    place = watched.locator('[data-explorer="first"]')
    told, mark = place.locator(".told"), place.locator(".handle.mark")
    wrong = place.locator(".tiles > :first-child li.wrong")
    right, new = place.locator("li.right"), place.locator(".tiles > :last-child li.right")
    assert place.bounding_box()["y"] < 300  # it is the first thing that a reader meets
    expect(right).to_have_count(24)
    slider = place.get_by_label("Share of replay in each batch")
    watched.wait_for_timeout(1000)
    expect(place.get_by_text("Before the updates", exact=True)).to_be_visible()
    assert "#" not in watched.url
    slider.focus()
    watched.keyboard.press("ArrowRight")  # who chooses sees where it ends
    watched.keyboard.press("ArrowLeft")
    expect(wrong).to_have_count(24)
    place.locator("li").first.hover()
    expect(told).to_contain_text("but the right name is “hot dog”")
    for way, words in (("0%, gently", "gentle"), ("the recipe", "The recipe")):
        place.get_by_role("button", name=way, exact=True).click()
        expect(place.locator(".said")).to_contain_text(words)
        [old, _] = re.findall(r"(\d+)%\s*on all", place.locator(".scores").inner_text())
        assert mark.get_attribute("aria-valuetext") == f"After update 5: {old}%"
        [ends, tops] = place.locator(".chart").evaluate(ENDS)
        assert ends == pytest.approx(tops, abs=0.1)
    assert right.count() - new.count() > 12 and new.count() >= 4
    mark.focus()
    watched.keyboard.press("ArrowLeft")
    watched.keyboard.press("Home")
    expect(right).to_have_count(24)
    place.get_by_role("button", name="Play").click()
    expect(place.get_by_text("After update 5", exact=True)).to_be_visible()
    watched.wait_for_function("location.hash.includes('explorer=first')")
    place.get_by_role("button", name="0%, gently", exact=True).click()
    place.get_by_role("button", name="Undo").click()
    expect(place.locator(".said")).to_contain_text("The recipe")
    place.get_by_role("button", name="Reset").click()
    expect(place.get_by_text("Before the updates", exact=True)).to_be_visible()
    expect(place.get_by_role("button", name="Undo")).to_be_enabled()


@pytest.mark.defect
def test_the_start_page_prints_its_pictures(watched, address):
    """They are backgrounds, which browsers leave out of what they print."""
    ready(watched, f"{address}/")
    assert re.search(rb"/Subtype\s*/Image", watched.pdf())


def test_the_start_page_is_small(watched, address, pages):
    """All that it loads, gzipped, is at most 600 kB."""
    loaded = []
    watched.on("response", lambda answer: loaded.append(answer.body()) if answer.ok else None)
    ready(watched, f"{address}/")
    assert sum(len(gzip.compress(body)) for body in loaded) < 600_000


HANDLED = [
    ("schedule", ".handle.peak", (0, 60)), ("mixture", ".handle.shares", (0, -50)),
    ("first", ".handle.mark", (90, 0)),
]  # fmt: skip
ALIKE = [
    ("schedule", ".handle.warmup", (30, 0)), ("schedule", ".handle.update-1", (0, 60)),
    ("scrubber", ".handle.mark", (90, 0)), ("path", ".handle.share", (90, 0)),
]  # fmt: skip
"""What is dragged by the same code as one of `HANDLED`."""


@pytest.mark.parametrize(
    "explorer, handle, way",
    [*HANDLED, *(pytest.param(*each, marks=pytest.mark.long) for each in ALIKE)],
)
def test_touch_drags_to_where_the_finger_goes(phone, address, pages, explorer, handle, way):
    place = page_with(phone, address, pages, explorer)
    handle = place.locator(handle).first
    handle.scroll_into_view_if_needed()
    before, scrolled = handle.bounding_box(), phone.evaluate("scrollY")
    lift = browser_site.finger(phone, handle, *way)
    phone.wait_for_timeout(300)  # longer than a drawing at rest waits
    after = handle.bounding_box()
    lift()
    assert phone.evaluate("scrollY") == scrolled  # the page stays where it is
    side, wanted = ("x", way[0]) if way[0] else ("y", way[1])
    assert after[side] - before[side] == pytest.approx(wanted, abs=25)
    assert min(before["width"], before["height"]) >= 24


STOPS = """place => [...place.querySelectorAll('*')].filter((each) => each.tabIndex >= 0
    && !each.disabled && each.checkVisibility()).length"""


@pytest.mark.parametrize(
    "explorer",
    options.one_in(3, ["schedule", "mixture", "stream", "budget"]),
)
def test_an_explorer_has_few_stops_of_the_tab_key(watched, address, pages, explorer):
    place = page_with(watched, address, pages, explorer)
    assert place.evaluate(STOPS) <= 32


def test_stored_settings_are_walked_through_by_arrow_keys(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    place.locator(".place[tabindex='0']").focus()
    watched.keyboard.press("ArrowRight")
    name = watched.evaluate("document.activeElement.getAttribute('aria-label')")
    watched.keyboard.press("Enter")
    scores = re.search(r"A_KA [\d.]+", name)[0]
    expect(place.locator(".said")).to_contain_text(scores)


def middle(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_guess_gives_nothing_away_and_is_revealed_scored_and_remembered(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    ask = place.locator(".asks")
    stored = [middle(each) for each in place.locator(".place circle").all()]
    place.get_by_role("button", name="Pin to compare").click()
    ask.click()
    expect(place.locator(".said")).not_to_contain_text("Stored")
    for hidden in (".stored", ".pins table"):
        expect(place.locator(hidden)).to_be_hidden()
    ring, reveal = place.locator(".handle.mine .knob"), place.get_by_role("button", name="Reveal")
    x, y = middle(ring)
    assert min(abs(x - a) + abs(y - b) for a, b in stored) > 25
    expect(reveal).to_be_disabled()
    plane = place.locator(".plane svg").bounding_box()
    watched.mouse.click(plane["x"] + 150, plane["y"] + 150)
    place.locator(".handle.mine").focus()
    watched.keyboard.press("ArrowUp")
    reveal.click()
    words = place.locator(".guesses")
    expect(words).to_contain_text(re.compile(r"It ended [1-9][\d.]* points away"))
    expect(place.locator(".said")).to_contain_text("Stored")
    expect(place.locator(".plane .key")).to_contain_text("the answer to your guess")
    dot, frame = (
        middle(place.locator(".walker circle")),
        place.locator(".plane .axes").bounding_box(),
    )
    assert frame["x"] <= dot[0] <= frame["x"] + frame["width"] and frame["y"] <= dot[1]
    gaps = "all => all.some((each) => parseFloat(getComputedStyle(each).paddingLeft))"
    assert not words.locator(".hidden").evaluate_all(gaps)  # or A_KA falls apart
    expect(ask).to_have_text("Guess again")
    watched.wait_for_function("sessionStorage.getItem('guesses schedule')?.length > 2")
    watched.reload()
    place.and_(watched.locator("[data-ready]")).wait_for()
    ask.click()
    place.locator(".plane svg").scroll_into_view_if_needed()
    plane = place.locator(".plane svg").bounding_box()
    watched.mouse.click(plane["x"] + 150, plane["y"] + 150)
    reveal.click()
    expect(words).to_contain_text("Only the first guess at a setting counts.")
    drag(watched, place.locator(".knees .handle").first, 0, 60)
    watched.mouse.up()
    expect(words).not_to_contain_text("You guessed")
    expect(place.locator(".stored")).to_be_visible()  # the guess is over
    ask.click()
    watched.mouse.click(plane["x"] + 150, plane["y"] + 150)
    reveal.click()
    expect(words).to_contain_text("this setting was not run")
    expect(words).not_to_contain_text("It ended")
    for way_out in ("infinite", "Reset"):
        ask.click()
        expect(place.locator(".stored")).to_be_hidden()
        place.get_by_role("button", name=way_out, exact=True).click()
        expect(place.locator(".stored")).to_be_visible()
    expect(place.locator(".pins")).to_be_empty()  # after Reset


ENDS_TOGETHER = """plane => {
    const place = (which) => plane.querySelector(which).getBoundingClientRect();
    const [dot, way] = [place(".walker circle"), place(".guess path")];
    return Math.abs(dot.x + dot.width / 2 - way.right) < 2;
}"""
"""Whether the dot that walked is at the end of its way, which leads to the right."""


def test_a_guess_and_its_answer_stay_where_they_are(watched, address, pages):
    """When the ring is let go, when the pointer passes a dot, and when the plane gets narrower."""
    place = page_with(watched, address, pages, "schedule")
    plane = place.locator(".plane svg")
    dot = place.get_by_role("button", name=LONELY)
    place.locator(".asks").click()
    plane.scroll_into_view_if_needed()
    box, ring = plane.bounding_box(), place.locator(".handle.mine .knob")
    watched.mouse.click(box["x"] + 60, box["y"] + 150)
    watched.evaluate(NEXT_FRAME)
    x, y = middle(ring)
    watched.mouse.move(x + 6, y + 6)  # not at its middle
    watched.mouse.down()
    watched.mouse.move(x + 26, y + 6, steps=4)
    watched.evaluate(NEXT_FRAME)
    moved = middle(ring)
    assert moved == pytest.approx((x + 20, y), abs=1)
    watched.mouse.up()
    watched.evaluate(NEXT_FRAME)
    assert middle(ring) == pytest.approx(moved, abs=1)
    place.get_by_role("button", name="Reveal").click()
    way, said = place.locator(".guess path"), place.locator(".said")
    revealed, words = way.get_attribute("d"), said.text_content()
    dot.hover()
    expect(said).not_to_have_text(words)
    expect(way).to_have_attribute("d", revealed)
    watched.set_viewport_size({"width": 700, "height": 900})
    expect(plane).not_to_have_attribute("width", str(box["width"]))
    watched.wait_for_function(
        f"plane => ({ENDS_TOGETHER})(plane)", arg=plane.element_handle(), timeout=5000
    )


def test_a_guess_that_nothing_can_check_shows_no_other_setting(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    peak = place.get_by_label("Peak, as a number")
    peak.fill("0.00001")
    peak.press("Enter")
    place.locator(".asks").click()
    expect(place.locator(".guesses")).to_contain_text("No stored run is near")
    said = place.locator(".said")
    words = said.text_content()
    place.get_by_role("button", name=LONELY).hover()
    assert said.evaluate(TEXTS) == [words]
    expect(place.locator(".stored")).to_be_visible()


def test_the_axis_of_rates_stays_and_pairs_are_compared(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    peak = place.locator(".knees .handle.peak")
    peak.scroll_into_view_if_needed()
    before = peak.bounding_box()
    drag(watched, peak, 0, 60)
    watched.mouse.up()
    watched.wait_for_timeout(300)  # until all is drawn anew
    assert peak.bounding_box()["y"] - before["y"] == pytest.approx(60, abs=3)
    place.get_by_role("button", name="Compare with its constant twin").click()
    difference = place.locator(".difference")
    expect(difference).to_contain_text("Too close to tell: no stored run separates these two")
    watched.wait_for_function("location.hash.includes('pins')")
    before_the_pair = watched.url
    difference.get_by_role("button").click()
    expect(difference).not_to_contain_text("Too close to tell")
    cells = difference.locator("tbody td").all_text_contents()
    assert cells[-1] == "20 stored pairs"
    assert cells[3] == "−0.8 (−1.5 to −0.1)"  # the claim of chapter 04
    # the link, which follows a moment later, has the pins, too; what it shows cannot be undone
    watched.wait_for_function("before => location.href !== before", arg=before_the_pair)
    link = watched.url
    watched.goto("about:blank")
    ready(watched, link)
    expect(difference.locator("tbody td")).to_have_text(cells)
    expect(place.get_by_role("button", name="Undo")).to_be_disabled()
    warmup, cooldown = (
        place.get_by_label(f"{name}, as a number") for name in ("Warmup", "Cooldown")
    )
    warmup.fill("90%")
    warmup.press("Enter")
    expect(place.locator(".warned")).to_contain_text("the cooldown, which became 10%")
    peak.focus()
    watched.keyboard.press("Control+z")
    expect(cooldown).to_have_value("25%")


def test_mixtures_that_change_are_told_apart_from_stored_ones(watched, address, pages):
    place = page_with(watched, address, pages, "mixture")
    said, varies = place.locator(".said"), place.get_by_label("Change over the updates")
    for preset in place.locator(".presets button").all():
        label = preset.text_content()
        if label in ("Undo", "Reset"):
            continue
        preset.click()
        expect(said).to_contain_text("No prediction" if "(not run)" in label else "Stored, mean of")
    place.get_by_role("button", name="the recipe's shares", exact=True).click()
    expect(said).to_contain_text("Stored, mean of 5 runs")
    varies.check()
    expect(place.locator(".handles .knob")).to_have_count(2)
    ends = [middle(each) for each in place.locator(".handles .knob").all()]
    assert abs(ends[0][1] - ends[1][1]) > 20  # two circles, each with its name
    assert place.locator(".tags text").all_text_contents() == ["last update", "first update"]
    drag(watched, place.locator(".handle.last"), ends[1][0] - ends[0][0], ends[1][1] - ends[0][1])
    watched.mouse.up()
    expect(said).to_contain_text("Stored, mean of 5 runs")
    varies.uncheck()
    corner = middle(place.locator(".rim path"))
    watched.mouse.click(corner[0] + 5, corner[1] + 5)
    expect(said).not_to_contain_text("Stored, mean of 5 runs")
    place.locator(".asks").click()
    expect(place.locator(".heat")).to_be_hidden()
    expect(place.locator(".contours")).to_be_hidden()


def test_a_reader_finds_the_explorer_and_comes_back_to_where_she_was(watched, address, pages):
    place = page_with(watched, address, pages, "schedule")
    watched.keyboard.press("Tab")
    watched.keyboard.press("Enter")  # to the text, which stays as it is
    plain = "getComputedStyle(document.querySelector('main')).backgroundColor"
    assert watched.evaluate(plain) == "rgba(0, 0, 0, 0)"
    outline = watched.locator(".outline")
    expect(outline).to_be_visible()
    watched.locator(".try").click()
    expect(place.locator("svg").first).to_be_in_viewport()
    expect(outline).to_be_hidden()  # the explorer lies over it
    place.get_by_role("button", name="infinite", exact=True).click()
    watched.wait_for_function("location.hash.includes('infinite')")
    watched.locator(".neighbours").scroll_into_view_if_needed()
    read = watched.evaluate("scrollY")
    watched.goto(f"{address}/glossary")
    watched.go_back()
    place.and_(watched.locator("[data-ready]")).wait_for()
    watched.wait_for_timeout(500)
    assert watched.evaluate("scrollY") == pytest.approx(read, abs=150)


@pytest.mark.long
def test_evidence_is_folded_until_a_link_lands_in_it_or_it_is_printed(watched, pages, tmp_path):
    with browser_site.served(site.build_pages(sample_book.write(tmp_path))) as address:
        last = watched.get_by_text("The last words.")
        in_view = "each => Math.abs(each.getBoundingClientRect().top) < innerHeight"
        watched.goto(f"{address}/cells")
        assert not last.is_visible()
        watched.get_by_text("Intervals, controls and tables").click()
        assert last.is_visible()
        watched.goto("about:blank")
        watched.goto(f"{address}/cells#a-table")
        assert last.is_visible() and last.evaluate(in_view)
        watched.goto("about:blank")
        watched.goto(f"{address}/cells")
        link = watched.locator(".outline a", has_text="A table")
        for _ in range(2):  # the second time, the address is the same
            assert not last.is_visible()
            watched.evaluate("scrollTo(0, 0)")  # where no explorer lies over the outline
            link.click()
            expect(last).to_be_visible()
            assert last.evaluate(in_view)
            watched.get_by_text("Intervals, controls and tables").click()
        watched.locator(".search input").fill("last words")
        watched.locator(".found a").first.click()
        expect(last).to_be_visible()
        watched.goto("about:blank")
        watched.goto(f"{address}/cells")
        watched.pdf()
        assert last.is_visible()
        assert browser_site.axe_finds(watched) == []


def test_everything_that_the_theme_shows(watched, pages, tmp_path):
    """On the sample book: boxes that fold, and copying."""
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with browser_site.served(site.build_pages(sample_book.write(tmp_path))) as address:
        watched.goto(f"{address}/")
        assert not watched.get_by_text("Folded.").is_visible()
        watched.get_by_text("Not yet").click()
        assert watched.get_by_text("Folded.").is_visible()
        watched.locator(".code", has_text="def f(x)").hover()
        watched.locator(".code", has_text="def f(x)").get_by_role("button", name="Copy").click()
        assert watched.evaluate("navigator.clipboard.readText()").startswith("def f(x):")
        assert browser_site.axe_finds(watched) == []
