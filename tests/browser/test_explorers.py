"""JupyterLab in a real browser: each chapter's explorers by keyboard, mouse, dropdowns and buttons,
all cells run twice, and a long cell that is interrupted."""

import os
import re
import time

import nbformat
import pytest
from browser import cut, lab

from cmp.config import Mixture
from cmp.experiments import planner
from cmp.files import build_folder, project_folder
from lab import analyses, chapters

PICTURE = """async image => {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    return [new TextDecoder("latin1").decode(bytes.slice(1, 4)), Array.from(hash).join(" ")];
}"""
MIME = "[data-mime-type='application/vnd.jupyter.{}']"
SECONDS = 60
LONG = """import os
os.environ["CMP_BUILD"] = {build!r}
from cmp import config
from cmp.experiments import studies
changes = ["stream.tasks=1", "training.steps=600", "training.batch=8", "evaluation.subset=1"]
grid = [config.parse(config.override(config.profile("quick"), changes))]"""


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
    """(browser, address, token): one JupyterLab with the explorers of each chapter, and `long`, in
    a folder like the checkout's `book`."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "book").mkdir()
    checkout = project_folder()
    for path in checkout.glob("[a-z_]*"):
        if path.name != "book":
            (folder / path.name).symlink_to(path)
    for path in (checkout / "book").iterdir():
        if path.suffix != ".ipynb":
            (folder / "book" / path.name).symlink_to(path)
    for number, source in chapters.chapters().items():
        nbformat.write(cut.notebook(source), folder / "book" / f"{number}.ipynb")
    cells = [LONG.format(build=str(build)), "studies.compute_runs(grid)\nprint(len(grid), 'done')"]
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    metadata = {"kernelspec": chapters.KERNELSPEC}
    long = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(long, folder / "book" / "long.ipynb")
    with lab.lab(folder / "book", folder / "lab.log") as found:
        yield browser, *found


class Explorer:
    """What a reader sees and moves in the cell of one explorer."""

    def __init__(self, page, name):
        self.page = page
        self.root = page.locator(".jp-CodeCell", has_text=f"explorers.{name}(")
        self.picture = self.root.locator("img.widget-image")
        self.sentence = self.root.locator(".widget-html-content").first
        self.below = self.root.locator(".widget-html-content").last
        self.picture.wait_for()

    def png(self) -> str:
        """The hash of the picture as it stands."""
        kind, found = self.picture.evaluate(PICTURE)
        assert kind == "PNG"
        return found

    def handle(self, description):
        return self.root.locator(".widget-hslider", has_text=description).locator(".noUi-handle")

    def box(self, description):
        return self.root.locator(".widget-dropdown", has_text=description).locator("select")

    def press(self, element, key):
        element.focus()
        self.page.keyboard.press(key)

    def says(self, words, below=False):
        from playwright.sync_api import expect

        place = self.below if below else self.sentence
        expect(place).to_contain_text(words, timeout=1000 * SECONDS)

    def changed(self, before: str) -> str:
        """The picture once it is another than `before`; the sentence comes just before it."""
        end = time.monotonic() + SECONDS
        while (now := self.png()) == before:
            assert time.monotonic() < end, "the picture stayed the same"
            self.page.wait_for_timeout(100)
        return now

    def drag(self, element, right, down):
        """By the mouse, from an element's middle, so many pixels."""
        element.scroll_into_view_if_needed()
        box = element.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(*middle)
        self.page.mouse.down()
        self.page.mouse.move(middle[0] + right, middle[1] + down, steps=5)
        self.page.mouse.up()

    def alone(self):
        """The explorer is its cell's only output, and no figure is left beside it."""
        assert self.root.locator(".jp-OutputArea-child").count() == 1
        assert self.root.locator(".jp-RenderedImage").count() == 0


def move_shares(explorer):
    explorer.says("Shares P 0.33, D 0.33, B 0.33")
    handle, picture = explorer.root.locator("circle.handle"), explorer.png()
    explorer.press(handle, "ArrowUp")
    explorer.says("Shares P 0.35, D 0.30, B 0.35")
    explorer.changed(picture)
    assert handle.get_attribute("aria-valuetext") == "Pool P 35 %, Update D 30 %, Buffer B 35 %"


def move_mixture(explorer):
    """Beside stored runs."""
    found = analyses.surface(analyses.published_settings(*analyses.MIXTURES), "thirds")
    thirds = f"A_KA {found.predict(Mixture()).loc['A_KA', 'mean']:.1f}%"
    explorer.says(thirds, below=True)
    move_shares(explorer)
    handle, picture = explorer.root.locator("circle.handle"), explorer.png()

    explorer.drag(handle, 400, 400)  # beyond the corner of the buffer
    explorer.says("Shares P 0.00, D 0.00, B 1.00")
    picture = explorer.changed(picture)
    explorer.says("mixture.buffer=1.0", below=True)

    explorer.root.locator("circle.stored").nth(found.names.index("thirds")).click()
    explorer.says("Shares P 0.33, D 0.33, B 0.33")
    picture = explorer.changed(picture)

    explorer.press(explorer.handle("Batch"), "ArrowRight")
    explorer.says("No prediction: the stored runs are of training.batch=64", below=True)
    explorer.changed(picture)
    explorer.press(explorer.handle("Batch"), "ArrowLeft")
    explorer.says(thirds, below=True)


def move_rate(explorer):
    explorer.says("of the peak 0.001, over 8 tasks x 40 steps")
    picture = explorer.png()
    explorer.press(explorer.handle("Tasks T"), "ArrowLeft")
    explorer.says("over 7 tasks x 40 steps")
    picture = explorer.changed(picture)
    explorer.press(explorer.handle("Tasks T"), "ArrowRight")
    explorer.says("over 8 tasks x 40 steps")
    explorer.changed(picture)


def move_schedule(explorer):
    """Beside stored runs."""
    explorer.says("The nearest stored runs", below=True)
    move_rate(explorer)
    picture = explorer.png()

    explorer.drag(explorer.handle("Peak").first, 40, 0)
    explorer.says(re.compile(r"of the peak 0\.00[2-9]"))
    picture = explorer.changed(picture)

    explorer.root.get_by_role("button", name="Hold this one").click()
    picture = explorer.changed(picture)
    explorer.box("Meta schedule").select_option("cosine")
    explorer.says(re.compile(r"= 0\.1\d of the peak"))
    picture = explorer.changed(picture)
    explorer.says("schedule.meta=cosine", below=True)

    explorer.box("Meta schedule").select_option("rsqrt-recovered")
    explorer.says("meta 'rsqrt-recovered' goes with 'rsqrt', not with 'cosine'")
    assert explorer.png() == picture

    explorer.box("Meta schedule").select_option("cosine")
    explorer.says(re.compile(r"= 0\.1\d of the peak"))


def move_budget(explorer):
    explorer.says("320 steps of full fine-tuning, over 8 updates of small at batch 64: 40.0")
    picture = explorer.png()
    explorer.press(explorer.handle("Updates T"), "ArrowLeft")
    explorer.says("over 7 updates of small at batch 64: 45.7")
    picture = explorer.changed(picture)
    explorer.press(explorer.root.locator("select[multiple]"), "Home")
    explorer.changed(picture)


def move_path(explorer):
    explorer.says("0.50 of the fine-tuned weights, by interpolation: A_KA")
    picture = explorer.png()
    explorer.press(explorer.handle("Share"), "ArrowRight")
    explorer.says("0.55 of the fine-tuned weights, by interpolation: A_KA")
    picture = explorer.changed(picture)
    explorer.box("Rule").select_option(index=1)
    explorer.says("0.55 of the fine-tuned weights, by slerp: A_KA")
    explorer.changed(picture)


def move_stream(explorer):
    explorer.says("522 classes in 8 tasks")
    explorer.says("Stored runs of this stream", below=True)
    picture = explorer.png()

    explorer.box("Order").select_option("dataset")
    explorer.says("Datasets a task: 1 to 4")
    explorer.says("Stored runs of this stream", below=True)
    picture = explorer.changed(picture)

    explorer.root.get_by_role("button", name="images").click()
    explorer.says("1.0 times as many")
    explorer.says("equal images, order dataset", below=True)
    picture = explorer.changed(picture)

    explorer.root.get_by_label("Reversed").check()
    picture = explorer.changed(picture)
    explorer.says("stream.reverse=true", below=True)
    explorer.press(explorer.handle("Tasks T"), "ArrowLeft")
    explorer.says("522 classes in 7 tasks")
    explorer.says("No stored run follows this stream", below=True)
    explorer.changed(picture)


def move_planner(explorer):
    page = explorer.page
    explorer.says("tiny: 8 updates of")
    page.get_by_text("What was rejected").wait_for()
    picture = explorer.png()

    explorer.press(explorer.handle("Updates"), "ArrowLeft")
    explorer.says("tiny: 7 updates of")

    explorer.box("Must be kept").select_option(f"all: {planner.KEEP['all']}")
    explorer.says("EMA-Merge")
    picture = explorer.changed(picture)
    explorer.says("policy: ema", below=True)

    explorer.box("To replay").select_option("public data instead")
    explorer.says("Refused: nothing may be lost, and nothing that the model learned from")
    assert explorer.png() == picture

    explorer.box("Must be kept").select_option(f"balance: {planner.KEEP['balance']}")
    explorer.says("batches of 0% pretraining data")
    explorer.says("public data in place of the pretraining data", below=True)
    picture = explorer.changed(picture)
    explorer.drag(explorer.handle("Hours on it").first, -400, 0)
    explorer.says("Refused: this compute buys no step in each of 7 updates of tiny")
    assert explorer.png() == picture


MOVES = {
    "02": {"budget_calculator": move_budget},
    "03": {"path_explorer": move_path},
    "04": {"schedule_explorer": move_schedule},
    "05": {"budget_calculator": move_budget},
    "06": {"stream_explorer": move_stream},
    "07": {"mixture_explorer": move_mixture},
    "08": {"planner_explorer": move_planner},
}
"""What is moved in each chapter, in the order of its explorers."""


def test_every_explorer_of_the_book_is_moved():
    shown = {number: cut.explorers(source) for number, source in chapters.chapters().items()}
    assert {number: list(moves) for number, moves in MOVES.items()} == {
        number: names for number, names in shown.items() if names
    }


@pytest.mark.parametrize("number", MOVES)
def test_the_explorers_of_a_chapter(served, number):
    """They answer, and the same again when all cells are run a second time."""
    with lab.opened(*served, f"{number}.ipynb") as watched:
        page, first = watched.page, {}
        watched.command("notebook:run-all-cells")
        figures = page.locator(".jp-RenderedImage").count()
        for name, move in MOVES[number].items():
            explorer = Explorer(page, name)
            first[name] = explorer.sentence.inner_text()
            move(explorer)
            keep(explorer, number)
        watched.command("notebook:run-all-cells")
        for name in MOVES[number]:
            explorer = Explorer(page, name)
            explorer.says(first[name])
            explorer.alone()
        assert page.locator(".jp-RenderedImage").count() == figures
        assert page.locator(f"{MIME.format('stderr')}, {MIME.format('error')}").count() == 0
        assert page.get_by_text("Profile quick, device cpu, jobs 2. Stored: ").count() == 1
    assert (watched.errors, watched.elsewhere) == ([], [])


def keep(explorer, number):
    """A screenshot, to be looked at."""
    folder = build_folder() / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    explorer.root.scroll_into_view_if_needed()
    explorer.page.screenshot(path=folder / f"{number}.png")


def test_a_long_cell_shows_progress_is_interrupted_and_goes_on(served, build):
    from playwright.sync_api import expect

    with lab.opened(*served, "long.ipynb") as watched:
        page, others = watched.page, set((build / "logs").glob("*"))
        watched.begin("notebook:run-all-cells")
        expect(page.get_by_text("runs:").first).to_be_visible(timeout=1000 * SECONDS)
        wait_for_steps(build / "logs", others)
        watched.command("notebook:interrupt-kernel")
        stopped = page.locator(".jp-OutputArea-output", has_text="stopped")
        words = (
            "stopped with 1 runs to go; the same command goes on; in a notebook, run the cell again"
        )
        expect(stopped).to_have_text(words, timeout=1000 * SECONDS)
        assert list((build / "checkpoints").glob("*/task-0-step-*"))
        watched.idle()
        watched.command("notebook:run-all-cells")
        expect(page.get_by_text("1 done")).to_be_visible(timeout=1000 * SECONDS)
        assert stopped.count() == 0
    assert watched.elsewhere == []


def wait_for_steps(logs, others):
    """Until a run that is not among the others has noted steps."""
    end = time.monotonic() + SECONDS
    while not any(log.stat().st_size for log in set(logs.glob("*")) - others):
        assert time.monotonic() < end, f"no run notes its steps in {logs}"
        time.sleep(0.1)
