"""JupyterLab in a real browser: explorers that are dragged, typed into, pinned and run; beside
cells that are busy, that await or are interrupted; without a kernel."""

import os
import re
import shutil
import time

import nbformat
import pytest
from browser import cut, lab
from browser import site as browser_site
from playwright.sync_api import expect

from cmp.project import build_folder, project_folder
from lab import chapters, first_screen, reader

MIME = "[data-mime-type='application/vnd.jupyter.{}']"
SECONDS = 60
AWAKE = 30
"""Seconds until a cell that is busy, or awaits, is not any more."""
LONG = """import os
os.environ["CMP_BUILD"] = {build!r}
from cmp import config
from lab.evidence import studies
changes = ["stream.tasks=1", "training.steps=600", "training.batch=8", "evaluation.subset=1"]
grid = [config.parse(config.override(config.profile("quick"), changes))]"""
BEGIN = """import os, time, asyncio
os.environ["CMP_BUILD"] = {build!r}
from lab import explorers"""
QUICK = """from cmp.config import PROFILES
PROFILES["quick"] |= {"stream": {"tasks": 2}, "training": {"steps": 4, "batch": 8},
                      "evaluation": {"full": False, "subset": 2}}"""
BARS = """import cmp
from cmp import config
from lab import chapter_setup
cmp.run("quick")
run = config.parse(config.profile("quick") | {"seeds": {"stream": 1}})
await chapter_setup.compute_live({"a run": run}, 1, "cpu")"""
SMALL = f"""{QUICK}
PROFILES["cpu"] |= {{"training": {{"steps": 4000, "batch": 8}}}}"""
"""Sizes of runs that tests can wait for: `quick` takes seconds, `cpu` does not end by itself."""


@pytest.fixture(scope="module")
def browser():
    """All is there; else the tests are skipped, or fail where it is required."""
    if sentence := lab.missing():
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)
    with lab.browser() as found:
        yield found


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A build folder where no run is stored."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "data").symlink_to(build_folder().resolve() / "data")
    return folder


@pytest.fixture(scope="module")
def served(browser, build, tmp_path_factory):
    """(context, address, token): one JupyterLab with the explorers of the chapters, and `long`, in
    a folder like the checkout's `book`; pages of one context load its scripts once."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "book").mkdir()
    checkout = project_folder()
    for path in checkout.glob("[a-z_]*"):
        if path.name != "book":
            (folder / path.name).symlink_to(path)
    for path in (checkout / "book").iterdir():
        if path == first_screen.PICTURE:
            shutil.copy(path, folder / "book")  # the server hands out no picture that is a link
        elif path.suffix != ".ipynb":
            (folder / "book" / path.name).symlink_to(path)
    shown = [BEGIN.format(build=str(build)), "explorers.schedule_explorer()", SMALL]
    runs = "studies.compute_runs(grid)\nprint(len(grid), 'done')"
    notebooks = {name: chapter_cells(numbers) for name, numbers in NOTEBOOKS.items()} | {
        "long": [LONG.format(build=str(build)), runs],
        "small": shown,
        "busy": [*shown, f"print('begun')\ntime.sleep({AWAKE})\nprint('awake')"],
        "gone": [
            *shown,
            "from lab import kernel_explorers",
            "kernel_explorers.budget_explorer()",
        ],
        "bars": [BEGIN.format(build=str(build)), QUICK, BARS],
        "await": [*shown, f"print('begun')\nawait asyncio.sleep({AWAKE})\nprint('awake')"],
    }
    for name, cells in notebooks.items():
        nbformat.write(cut.notebook(cells), folder / "book" / f"{name}.ipynb")
    nbformat.write(reader.start_page(dict.fromkeys(SOURCES, "")), folder / "book" / "start.ipynb")
    with lab.lab(folder / "book", folder / "lab.log") as found:
        yield browser.new_context(viewport={"width": 1400, "height": 1600}), *found


class Explorer:
    """What a reader sees and moves in the cell of one explorer."""

    def __init__(self, page, name):
        self.page, self.root = page, page.locator(".jp-CodeCell", has_text=f"{name}(")
        self.place = self.root.locator(".explorer[data-ready]")
        self.place.wait_for()
        self.said = self.place.locator(".said")
        self.runs = self.place.locator(".runs .list")

    def press(self, name):
        self.place.get_by_role("button", name=name, exact=True).click()

    def drag(self, handle, right, down):
        """By the mouse, from the middle of a handle; the button stays down."""
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + right, y + down, steps=8)

    def run(self, size="quick"):
        self.place.get_by_label("Size of a run").select_option(size)
        self.press("Run this")

    def shows(self, words, seconds=SECONDS):
        expect(self.runs).to_contain_text(words, timeout=1000 * seconds)


SOURCES = [source.stem for source in chapters.chapters().values()]
SHOWN = {number: cut.explorers(source) for number, source in chapters.chapters().items()}


def test_the_book_has_its_explorers():
    assert {name for names in SHOWN.values() for name in names} == {
        "budget_explorer", "mixture_explorer", "path_explorer",
        "schedule_explorer", "scrubber_explorer", "stream_explorer",
    }  # fmt: skip


CELLS = {number: cut.cells(source) for number, source in chapters.chapters().items()}
FIRST = {tuple(names): number for number, names in reversed(SHOWN.items()) if names}
"""The first chapter that shows some explorers."""
OWN = [number for number in FIRST.values() if any("begin_chapter(" in x for x in CELLS[number])]
"""Chapters whose explorers show what the chapter computes."""
OTHERS = [number for number in FIRST.values() if number not in OWN]
NOTEBOOKS = {number: [number] for number in OWN} | {"others": OTHERS}


def chapter_cells(numbers):
    """The cells of the explorers of chapters, with runs that take no longer than a test may."""
    parameters, *_ = CELLS[numbers[0]]
    cells = [cell for number in numbers for cell in CELLS[number][1:]]
    small = [f"{QUICK}\n{cell}" if "task_end_weights(" in cell else cell for cell in cells]
    return [parameters, *small]


@pytest.mark.long
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_explorers_of_chapters(served, notebook):
    """They are there, and nothing complains; where no cell trains, again when all cells are run a
    second time."""
    with lab.opened(*served, f"{notebook}.ipynb") as watched:
        page = watched.page
        for _ in range(2 if notebook == "others" else 1):
            watched.command("notebook:run-all-cells")
            for number in NOTEBOOKS[notebook]:
                for name in SHOWN[number]:
                    keep(Explorer(page, name), f"{number}-{name}")
        assert page.locator(f"{MIME.format('stderr')}, {MIME.format('error')}").count() == 0
        assert browser_site.axe_finds(page, within=".explorer") == []
    assert (watched.errors, watched.elsewhere) == ([], [])


def keep(explorer, name):
    """A screenshot, to be looked at."""
    folder = build_folder() / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    explorer.root.scroll_into_view_if_needed()
    explorer.page.screenshot(path=folder / f"{name}.png")


@pytest.fixture
def small(served):
    with lab.opened(*served, "small.ipynb") as watched:
        watched.command("notebook:run-all-cells")
        yield watched, Explorer(watched.page, "schedule_explorer")
    assert (watched.errors, watched.elsewhere) == ([], [])


@pytest.mark.long
def test_a_schedule_is_moved_by_mouse_keyboard_and_typing(small):
    watched, explorer = small
    before, knee = explorer.said.text_content(), explorer.place.locator(".knees .handle").first
    explorer.drag(knee, 0, 60)
    expect(explorer.said).not_to_have_text(before)  # while it is dragged
    watched.page.mouse.up()
    dragged = explorer.said.text_content()
    knee.focus()
    watched.page.keyboard.press("ArrowUp")
    expect(explorer.said).not_to_have_text(dragged)
    typed = explorer.place.get_by_label("Peak, as a number")
    typed.fill("7")
    typed.press("Enter")
    expect(explorer.place.locator(".warned")).to_contain_text("Peak: 7 became 0.01")
    explorer.place.get_by_label("Copy as").select_option("Python")
    expect(explorer.place.locator("pre")).to_contain_text('schedule={"peak": 0.01}')


@pytest.mark.long
def test_a_schedule_is_dragged_by_touch_on_a_phone(served, browser):
    """In JupyterLab as on the site: the handle goes where the finger goes, and the page stays."""
    _, address, token = served
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    try:
        with lab.opened(context, address, token, "small.ipynb") as watched:
            page = watched.page
            watched.command("application:toggle-left-area")  # else there is no room
            watched.command("notebook:run-all-cells")
            explorer = Explorer(page, "schedule_explorer")
            handle = explorer.place.locator(".knees .handle.peak")
            handle.scroll_into_view_if_needed()
            before, words = handle.bounding_box(), explorer.said.text_content()
            lift = browser_site.finger(page, handle, 0, 60)
            expect(explorer.said).not_to_have_text(words)  # while it is dragged
            page.wait_for_timeout(300)  # longer than a drawing at rest waits
            after = handle.bounding_box()
            lift()
            assert after["y"] - before["y"] == pytest.approx(60, abs=25)
            keep(explorer, "phone")
        assert (watched.errors, watched.elsewhere) == ([], [])
    finally:
        context.close()


@pytest.mark.long
def test_the_start_page_shows_the_first_screen_and_runs_it(served):
    with lab.opened(*served, "start.ipynb") as watched:
        page = watched.page
        still = page.locator("img[alt^='Twelve small pictures']")
        expect(still).to_be_visible()
        page.wait_for_function("document.querySelector('img[alt^=Twelve]').naturalWidth > 0")
        expect(page.get_by_role("link", name="See it forget")).to_be_visible()
        watched.command("notebook:run-all-cells")
        explorer = Explorer(page, "first_explorer")
        explorer.press("the recipe")
        expect(explorer.place.get_by_text("After update 5", exact=True)).to_be_visible()
        keep(explorer, "start")
    assert (watched.errors, watched.elsewhere) == ([], [])


@pytest.mark.long
def test_a_meta_schedule_runs_beside_its_constant_twin(small):
    """Without a line of code: preset, twin, both runs, the difference among stored ones."""
    _, explorer = small
    explorer.press("meta rsqrt, tuned")
    explorer.press("Compare with its constant twin")
    expect(explorer.place.locator(".pins tbody tr")).to_have_count(2)
    expect(explorer.place.locator(".difference")).to_contain_text("stored pairs")
    explorer.place.get_by_label("Size of a run").select_option("quick")
    explorer.press("Run the first two pins")
    expect(explorer.runs.locator(".run", has_text="done")).to_have_count(2, timeout=2000 * SECONDS)
    expect(explorer.place.locator(".difference")).to_contain_text("your two runs")
    expect(explorer.place.locator(".difference")).to_contain_text("too small to test")
    assert explorer.place.locator(".own circle").count() >= 4
    keep(explorer, "twin")


@pytest.mark.long
def test_two_clicks_make_one_run_and_runs_have_their_own_numbers(small):
    """A pin shows its own run: of two schedules that differ in the warmup alone, one is trained."""
    _, explorer = small
    explorer.press("meta rsqrt, tuned")
    explorer.press("Pin to compare")
    warmup = explorer.place.get_by_label("Warmup, as a number")
    warmup.fill("60")
    warmup.press("Enter")
    explorer.press("Pin to compare")
    explorer.place.get_by_label("Size of a run").select_option("quick")
    explorer.place.get_by_role("button", name="Run this").dblclick()
    explorer.shows("warmup 60% (quick): done", 2 * SECONDS)
    assert explorer.runs.locator(".run").count() == 1
    rows = explorer.place.locator(".pins tbody tr")
    expect(rows.nth(0).locator("td").nth(4)).to_have_text("–")
    expect(rows.nth(1).locator("td").nth(4)).to_contain_text(",")
    text = explorer.place.locator("pre")
    expect(text).to_contain_text("cmpt run quick")
    expect(text).to_contain_text("schedule.warmup=0.6")
    explorer.place.get_by_label("Copy as").select_option("link")
    expect(text).to_contain_text('warmup=0.6, size="quick")')


@pytest.mark.long
def test_a_pin_is_unpinned_while_a_run_trains(small):
    """However slow the click."""
    watched, explorer = small
    explorer.run("cpu")
    explorer.press("Pin to compare")
    name = explorer.place.locator(".pins tbody .name")
    explorer.shows("step", 2 * SECONDS)
    explorer.place.get_by_role("button", name="Unpin").hover()
    watched.page.mouse.down()
    words = explorer.runs.text_content()
    expect(explorer.runs).not_to_have_text(words)  # the kernel told of the run
    watched.page.mouse.up()
    expect(name).to_have_count(0)
    explorer.runs.get_by_role("button", name="Stop").click()
    explorer.shows("stopped")


@pytest.mark.long
def test_reopen_with_a_kernel_finds_state_pins_and_runs(served):
    with lab.opened(*served, "small.ipynb") as watched:
        page = watched.page
        watched.command("notebook:run-all-cells")
        explorer = Explorer(page, "schedule_explorer")
        explorer.press("infinite")
        explorer.press("Pin to compare")
        explorer.run()
        explorer.shows("done", 2 * SECONDS)
        explorer.press("the paper's meta cosine")
        page.wait_for_timeout(1000)  # until the kernel has it
        words = explorer.said.text_content()
        watched.command("docmanager:save")
        page.goto(page.url)
        watched.idle()
        again = Explorer(page, "schedule_explorer")
        expect(again.said).to_have_text(words)
        expect(again.place.locator(".pins tbody tr")).to_have_count(1)
        expect(again.place.locator(".pins tbody tr")).to_contain_text("infinite")
        again.shows("done")
        again.press("infinite")  # and it still answers
        expect(again.said).not_to_have_text(words)
    assert watched.elsewhere == []


LIVE = [pytest.param(each, marks=pytest.mark.long) for each in NOTEBOOKS]


@pytest.mark.parametrize("notebook", ["small", "bars", *LIVE])
def test_a_second_visit_without_the_kernel_shows_a_picture_of_each_explorer(served, notebook):
    """And each bar is a line of text; nothing is missing."""
    shown = [name for number in NOTEBOOKS.get(notebook, ()) for name in SHOWN[number]]
    names = ["schedule_explorer"] if notebook == "small" else shown
    with lab.opened(*served, f"{notebook}.ipynb") as watched:
        watched.command("notebook:run-all-cells")
        for name in names:
            Explorer(watched.page, name)
        bars = watched.page.locator(".widget-hprogress").count()
        watched.command("docmanager:save")
    with lab.opened(*served, f"{notebook}.ipynb") as watched:  # which begins another kernel
        page = watched.page
        for name in names:
            cell = page.locator(".jp-CodeCell", has_text=f"{name}(")
            expect(cell.locator(".answering")).to_contain_text("This is a still picture")
            expect(cell.locator("img")).to_have_count(1)
            assert cell.locator("img").evaluate("each => each.naturalWidth") > 300
        expect(page.get_by_text("[progress bar").nth(bars - 1)).to_be_visible() if bars else None
        missing = page.get_by_text(re.compile("Error displaying widget|model not found"))
        assert missing.count() == 0
    assert bars or notebook != "bars"
    assert watched.elsewhere == []


@pytest.mark.long
def test_a_run_stops_and_a_third_waits(small):
    _, explorer = small
    explorer.run("cpu")
    explorer.press("meta rsqrt, tuned")
    explorer.run("cpu")
    explorer.shows(re.compile("step .*step", re.S), 2 * SECONDS)
    explorer.press("infinite")
    explorer.run("cpu")
    explorer.shows("two runs are in progress")
    for row in range(3):
        explorer.runs.get_by_role("button", name="Stop").first.click()
        expect(explorer.runs.locator(".run", has_text="stopped")).to_have_count(row + 1)
    explorer.runs.get_by_role("button", name="Remove").first.click()
    expect(explorer.runs.locator(".run")).to_have_count(2)


def beside_last_cell(watched):
    """The explorer, once the cell after it runs."""
    watched.page.locator(".jp-CodeCell").last.locator(".cm-content").click()
    watched.command("notebook:run-all-above")
    explorer = Explorer(watched.page, "schedule_explorer")
    watched.begin("notebook:run-cell")
    expect(watched.page.get_by_text("begun", exact=True)).to_be_visible()
    return explorer


@pytest.mark.long
def test_beside_a_busy_cell_a_run_begins_or_waits_and_can_be_cancelled(served):
    with lab.opened(*served, "busy.ipynb") as watched:
        explorer = beside_last_cell(watched)
        explorer.run()
        explorer.shows(re.compile("busy or gone|queued|starting|step|done"), AWAKE - 10)
        before = explorer.said.text_content()
        explorer.press("infinite")  # what needs no kernel goes on
        expect(explorer.said).not_to_have_text(before, timeout=10_000)
        if "busy or gone" not in explorer.runs.text_content():
            explorer.shows("done")  # the kernel answers beside a busy cell, by a subshell
            return
        explorer.runs.get_by_role("button", name="Cancel").click()
        explorer.shows("cancelled")
        expect(watched.page.get_by_text(re.compile(r"begun\s+awake"))).to_be_visible(
            timeout=2000 * AWAKE
        )
        watched.page.wait_for_timeout(2000)
        assert explorer.runs.locator(".run", has_text="cancelled").count() == 1
    assert watched.elsewhere == []


@pytest.mark.long
def test_a_cell_that_awaits_lets_a_run_begin_and_an_interrupt_leaves_it_alone(served):
    with lab.opened(*served, "await.ipynb") as watched:
        explorer = beside_last_cell(watched)
        explorer.press("meta rsqrt, tuned")
        explorer.run()
        explorer.shows(re.compile("starting|step|done"), AWAKE - 10)
        watched.command("notebook:interrupt-kernel")
        explorer.shows("done", 2 * SECONDS)


GONE = """async said => {
    await window.jupyterapp.shell.currentWidget.sessionContext.shutdown();
    const begun = performance.now();
    const says = (each) => each.textContent.includes("busy or gone");
    while (![...document.querySelectorAll(said)].every(says) && performance.now() - begun < 10_000)
        await new Promise((next) => setTimeout(next, 10));
    return performance.now() - begun;
}"""
"""Shuts the kernel down; the milliseconds until some places of the page say so."""


@pytest.mark.long
def test_a_kernel_that_is_gone_is_said_within_a_second_by_every_explorer(served):
    """By those from which nothing is awaited, and by those that train or compute."""
    with lab.opened(*served, "gone.ipynb") as watched:
        page = watched.page
        watched.command("notebook:run-all-cells")
        schedule, budget = (Explorer(page, f"{name}_explorer") for name in ("schedule", "budget"))
        page.wait_for_timeout(3000)
        expect(page.locator(".gone", has_text="gone")).to_have_count(0)
        asks = page.evaluate(GONE, ".explorer .gone")
        assert asks < 1500  # a second, and half for a machine that is loaded
        assert page.locator(".explorer .gone").count() == 2
        budget.place.get_by_label("Model").select_option("ViT-L-14")
        expect(budget.place.locator(".waiting")).to_contain_text("kernel busy or gone: queued")
        schedule.run()
        schedule.shows("kernel busy or gone")
        keep(schedule, "gone")
        before = schedule.said.text_content()
        schedule.press("infinite")
        expect(schedule.said).not_to_have_text(before)
        schedule.runs.get_by_role("button").click()
    assert watched.elsewhere == []


@pytest.mark.long
def test_a_kernel_that_is_gone_while_it_trains_is_said_of_the_run(served):
    with lab.opened(*served, "small.ipynb") as watched:
        watched.command("notebook:run-all-cells")
        explorer = Explorer(watched.page, "schedule_explorer")
        explorer.run("cpu")
        explorer.shows("step", 2 * SECONDS)
        assert watched.page.evaluate(GONE, ".explorer .gone") < 1500
        explorer.shows("kernel busy or gone, last: ")


@pytest.mark.long
def test_a_long_cell_shows_progress_is_interrupted_and_goes_on(served, build):
    with lab.opened(*served, "long.ipynb") as watched:
        page, others = watched.page, set(build.glob("runs/*/log.jsonl"))
        watched.begin("notebook:run-all-cells")
        expect(page.get_by_text("runs:").first).to_be_visible()
        wait_for_steps(build, others)
        watched.command("notebook:interrupt-kernel")
        stopped = page.locator(".jp-OutputArea-output", has_text="stopped")
        words = (
            "stopped with 1 runs to go; repeat the command to continue; in a notebook, run the "
            "cell again"
        )
        expect(stopped).to_have_text(words)
        assert list(build.glob("runs/*/task-0-step-*"))
        watched.idle()
        watched.command("notebook:run-all-cells")
        expect(page.get_by_text("1 done")).to_be_visible()
        assert stopped.count() == 0
    assert watched.elsewhere == []


def wait_for_steps(build, others):
    """Until a run whose log is not among the others has noted steps."""
    end = time.monotonic() + SECONDS
    while not any(log.stat().st_size for log in set(build.glob("runs/*/log.jsonl")) - others):
        assert time.monotonic() < end, f"no run notes its steps in {build}"
        time.sleep(0.1)
