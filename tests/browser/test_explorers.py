"""The explorers in a real browser: keyboard, mouse, dropdowns, buttons, and nothing else."""

import os
import re

import nbformat
import pytest
from browser import lab

from cmp.paths import build_folder

RUNS = """
import json
import pandas as pd
from cmp import config, widgets

def published(settings):
    "The metrics of one replicate of each setting, made up."
    rows = [
        {"setting": name, "replicate": replicate, "task": 8, "scope": scope, "role": role,
         "score": score + replicate, "config": json.dumps(config.parse(tree).to_dict())}
        for name, tree in settings.items()
        for replicate in range(2)
        for scope in ("subset", "full")
        for role, score in (("adapt", 33.0), ("eval", 31.5))
    ]
    return pd.DataFrame(rows)

"""
CODE = {
    "schedule": RUNS
    + """
settings = {"cosine": {}, "meta-cosine": {"schedule": {"meta": "cosine"}},
            "lower": {"schedule": {"peak": 0.0003}}}
widgets.schedule_explorer(published(settings))
""",
    "mixture": RUNS
    + """
corners = {"thirds": {}, "pool": (1, 0, 0), "update": (0, 1, 0), "buffer": (0, 0, 1)}
names = ("pretraining", "update", "buffer")
settings = {
    name: {"mixture": dict(zip(names, map(float, shares)))} if shares else {}
    for name, shares in corners.items()
}
widgets.mixture_explorer(published(settings))
""",
    "stream": RUNS
    + """
from cmp.data import corpus
settings = {"random": {}, "in turn": {"stream": {"order": "dataset"}}}
widgets.stream_explorer(corpus.load(), published(settings))
""",
    "planner": """
from cmp import widgets
widgets.planner()
""",
}
BYTES = """async image => {
    const answer = await fetch(image.src);
    return Array.from(new Uint8Array(await answer.arrayBuffer()));
}"""
SECONDS = 60


@pytest.fixture(scope="module", autouse=True)
def browser():
    """All is there; else the tests are skipped, or fail where it is required."""
    if sentence := lab.missing():
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    """(address, token) of one JupyterLab with a notebook for each explorer."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "book").mkdir()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name, code in CODE.items():
        cells = [nbformat.v4.new_code_cell(code.strip())]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / "book" / f"{name}.ipynb")
    with lab.lab(folder / "book", folder / "lab.log") as found:
        yield found


class Explorer:
    """What a reader sees and moves."""

    def __init__(self, page):
        self.page = page
        self.picture = page.locator("img.widget-image")
        self.sentence = page.locator(".widget-html-content").first
        self.below = page.locator(".widget-html-content").last
        self.picture.wait_for(timeout=1000 * SECONDS)

    def png(self) -> bytes:
        return bytes(self.picture.evaluate(BYTES))

    def handle(self, description):
        return self.page.locator(".widget-hslider", has_text=description).locator(".noUi-handle")

    def choose(self, description, option):
        box = self.page.locator(".widget-dropdown", has_text=description).locator("select")
        box.select_option(option)

    def says(self, words, below=False):
        from playwright.sync_api import expect

        place = self.below if below else self.sentence
        expect(place).to_contain_text(words, timeout=1000 * SECONDS)

    def changed(self, before: bytes) -> bytes:
        """The picture once it is another than `before`; the sentence comes just before it."""
        for _ in range(10 * SECONDS):
            if (now := self.png()) != before:
                assert now.startswith(b"\x89PNG")
                return now
            self.page.wait_for_timeout(100)
        raise AssertionError("the picture stayed the same")

    def drag(self, element, right, down):
        """By the mouse, from an element's middle, so many pixels."""
        box = element.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(*middle)
        self.page.mouse.down()
        self.page.mouse.move(middle[0] + right, middle[1] + down, steps=5)
        self.page.mouse.up()

    def keep(self, name):
        """A screenshot, to be looked at."""
        folder = build_folder() / "browser"
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}_explorer.png")


@pytest.mark.parametrize("name", CODE)
def test_an_explorer(served, name):
    with lab.executed(*served, f"{name}.ipynb") as watched:
        explorer = Explorer(watched.page)
        MOVES[name](explorer)
        explorer.keep(name)
    assert (watched.errors, watched.elsewhere) == ([], [])


def move_schedule(explorer):
    page = explorer.page
    explorer.says("of the peak 0.001, over 8 tasks x 40 steps")
    assert page.get_by_text("meta-cosine", exact=True).count() == 1
    picture = explorer.png()

    explorer.handle("Tasks T").focus()
    page.keyboard.press("ArrowLeft")
    explorer.says("over 7 tasks x 40 steps")
    picture = explorer.changed(picture)
    page.keyboard.press("ArrowRight")
    explorer.says("over 8 tasks x 40 steps")
    picture = explorer.changed(picture)

    explorer.drag(explorer.handle("Peak").first, 40, 0)
    explorer.says(re.compile(r"of the peak 0\.00[2-9]"))
    picture = explorer.changed(picture)

    page.get_by_role("button", name="Hold this one").click()
    picture = explorer.changed(picture)
    explorer.choose("Meta schedule", "cosine")
    explorer.says(re.compile(r"= 0\.1\d of the peak"))
    picture = explorer.changed(picture)
    page.get_by_text("schedule.meta=cosine").wait_for()

    explorer.choose("Meta schedule", "rsqrt-recovered")
    explorer.says("Refused: meta 'rsqrt-recovered' changes 'rsqrt', not 'cosine'")
    assert explorer.png() == picture

    explorer.choose("Meta schedule", "cosine")
    explorer.says(re.compile(r"= 0\.1\d of the peak"))


def move_mixture(explorer):
    page = explorer.page
    explorer.says("Shares P 0.33, D 0.33, B 0.33")
    explorer.says("A_KA 33.5%", below=True)
    handle, picture = page.locator("circle.handle"), explorer.png()

    handle.focus()
    page.keyboard.press("ArrowUp")
    explorer.says("Shares P 0.35, D 0.30, B 0.35")
    picture = explorer.changed(picture)
    page.keyboard.press("ArrowLeft")
    explorer.says("Shares P 0.35, D 0.35, B 0.30")
    picture = explorer.changed(picture)
    assert handle.get_attribute("aria-valuetext") == "Pool P 35 %, Update D 35 %, Buffer B 30 %"

    explorer.drag(handle, 400, 400)  # beyond the corner of the buffer
    explorer.says("Shares P 0.00, D 0.00, B 1.00")
    picture = explorer.changed(picture)
    page.get_by_text("mixture.buffer=1.0").wait_for()

    page.locator("circle.stored").first.click()  # thirds
    explorer.says("Shares P 0.33, D 0.33, B 0.33")
    picture = explorer.changed(picture)

    explorer.handle("Batch").focus()
    page.keyboard.press("ArrowRight")
    explorer.says("No prediction: the stored runs are of training.batch=64", below=True)
    explorer.changed(picture)
    page.keyboard.press("ArrowLeft")
    explorer.says("A_KA 33.5%", below=True)


def move_stream(explorer):
    page = explorer.page
    explorer.says("522 classes in 8 tasks")
    picture = explorer.png()

    explorer.choose("Order", "dataset")
    explorer.says("Datasets a task: 1 to 4")
    explorer.says("in turn", below=True)
    picture = explorer.changed(picture)

    page.get_by_role("button", name="images").click()
    explorer.says("1.0 times as many")
    explorer.says("No stored run follows this stream", below=True)
    picture = explorer.changed(picture)

    page.get_by_label("Reversed").check()
    picture = explorer.changed(picture)
    explorer.says("stream.reverse=true", below=True)
    explorer.handle("Tasks T").focus()
    page.keyboard.press("ArrowLeft")
    explorer.says("522 classes in 7 tasks")
    explorer.changed(picture)


def move_planner(explorer):
    page = explorer.page
    explorer.says("tiny: 8 updates of")
    page.get_by_text("What was rejected").wait_for()
    picture = explorer.png()

    explorer.handle("Updates").focus()
    page.keyboard.press("ArrowLeft")
    explorer.says("tiny: 7 updates of")

    explorer.choose("Must be kept", "all: nothing that it knows, whatever is not learned for it")
    explorer.says("EMA-Merge")
    picture = explorer.changed(picture)
    explorer.says("policy: ema", below=True)

    explorer.choose("To replay", "public data instead")
    explorer.says("Refused: nothing may be lost, and nothing that the model learned from")
    assert explorer.png() == picture

    explorer.choose("Must be kept", "balance: as much of both as can be had")
    explorer.says("batches of 0% pretraining data")
    explorer.says("public data in place of the pretraining data", below=True)
    picture = explorer.changed(picture)
    explorer.drag(explorer.handle("Hours on it").first, -400, 0)
    explorer.says("Refused: this compute buys no step in each of 7 updates of tiny")
    assert explorer.png() == picture


MOVES = {
    "schedule": move_schedule,
    "mixture": move_mixture,
    "stream": move_stream,
    "planner": move_planner,
}
