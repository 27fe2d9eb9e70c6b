"""The schedule explorer in a real browser: keyboard, mouse, dropdown, buttons, and nothing else."""

import os
import re

import nbformat
import pytest
from browser import lab

from cmp.paths import build_folder

CODE = """
import json
import pandas as pd
from cmp import config, widgets

settings = {"cosine": {}, "meta-cosine": {"meta": "cosine"}, "lower": {"peak": 0.0003}}
rows = [
    {"setting": name, "replicate": 0, "task": 8, "scope": "full", "role": role, "score": score,
     "config": json.dumps(config.parse({"schedule": change}).to_dict())}
    for name, change in settings.items()
    for role, score in (("adapt", 33.0), ("eval", 31.5))
]
widgets.schedule_explorer(pd.DataFrame(rows))
"""
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


class Explorer:
    """What a reader sees and moves."""

    def __init__(self, page):
        self.page = page
        self.picture = page.locator("img.widget-image")
        self.sentence = page.locator(".widget-html-content").first
        self.picture.wait_for(timeout=1000 * SECONDS)

    def png(self) -> bytes:
        return bytes(self.picture.evaluate(BYTES))

    def handle(self, description):
        return self.page.locator(".widget-hslider", has_text=description).locator(".noUi-handle")

    def choose(self, description, option):
        box = self.page.locator(".widget-dropdown", has_text=description).locator("select")
        box.select_option(option)

    def says(self, words):
        from playwright.sync_api import expect

        expect(self.sentence).to_contain_text(words, timeout=1000 * SECONDS)

    def changed(self, before: bytes) -> bytes:
        """The picture once it is another than `before`; the sentence comes just before it."""
        for _ in range(10 * SECONDS):
            if (now := self.png()) != before:
                assert now.startswith(b"\x89PNG")
                return now
            self.page.wait_for_timeout(100)
        raise AssertionError("the picture stayed the same")


def test_the_schedule_explorer(tmp_path):
    cells = [nbformat.v4.new_code_cell(CODE.strip())]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    folder = tmp_path / "book"
    folder.mkdir()
    nbformat.write(notebook, folder / "explorer.ipynb")
    with lab.lab(folder, tmp_path / "lab.log") as (address, token):
        with lab.executed(address, token, "explorer.ipynb") as watched:
            move(Explorer(watched.page))
        assert (watched.errors, watched.elsewhere) == ([], [])


def move(explorer):
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

    handle = explorer.handle("Peak").first
    box = handle.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1], steps=5)
    page.mouse.up()
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
    folder = build_folder() / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "schedule_explorer.png")
