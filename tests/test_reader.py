"""A reader's copies of the chapters: what is edited is kept, everything else follows the book."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from typer.testing import CliRunner

from cmp import cli
from cmp.errors import CmpError
from lab import chapters, explorers, reader

WORDS = "print('from the book')"


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The folder of a reader who has every chapter."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    reader.prepare_copies()
    return reader.copies_folder()


@pytest.fixture
def update(monkeypatch):
    """Makes the book's next version, in which the first code cell of every chapter is another."""

    def make(source, make_copy=reader.make_copy):
        copy = make_copy(source)
        next(cell for cell in copy.cells if cell.cell_type == "code").source = WORDS
        copy.metadata["cmp"]["copied"] = reader.cells_digest(copy)
        return copy

    return lambda: monkeypatch.setattr(reader, "make_copy", make)


def edit(path, words="# mine"):
    copy = reader.read_copy(path)
    copy.cells[-1].source += words
    nbformat.write(copy, path)


def test_every_chapter_is_copied_once_and_listed(copies):
    names = [source.stem for source in chapters.chapters().values()]
    found = {path.stem for path in copies.glob("*.ipynb")}
    assert found == {*names, "start"}
    start = (copies / reader.START).read_text()
    assert all(f"({name}.ipynb)" in start for name in names)
    assert set(reader.prepare_copies().values()) == {""}


def test_the_start_page_holds_the_first_screen_and_what_the_reader_made_of_it(copies):
    start = reader.read_copy(copies / reader.START)
    nbformat.validate(start)
    [cell] = [cell for cell in start.cells if cell.cell_type == "code"]
    [output] = cell.outputs
    [picture] = re.findall(r'<img src="([^"]+)"', output.data["text/html"])
    assert (copies / picture).exists()
    assert "first_explorer()" in cell.source
    output.data["text/html"] = "run by the reader"
    nbformat.write(start, copies / reader.START)
    reader.prepare_copies()
    assert "run by the reader" in (copies / reader.START).read_text()


def test_what_a_reader_writes_on_the_start_page_is_kept(copies):
    path = copies / reader.START
    start = reader.read_copy(path)
    start.cells.append(nbformat.v4.new_markdown_cell("my note"))
    nbformat.write(start, path)
    reader.prepare_copies()
    assert "my note" not in path.read_text()
    assert "my note" in path.with_name("start (mine).ipynb").read_text()
    path.write_text("")
    reader.prepare_copies()
    assert path.with_name("start (mine) 2.ipynb").read_text() == ""
    nbformat.validate(reader.read_copy(path))


def test_links_to_other_chapters_stand_above_what_is_folded():
    folded = 0
    for source in chapters.chapters().values():
        cells = reader.make_copy(source).cells
        [place] = [n for n, cell in enumerate(cells) if cell.id == "links"]
        below = cells[place + 1 :]
        assert not below or below[0].metadata.get(chapters.FOLDED) is True, source.name
        folded += bool(below)
    assert folded


def test_a_download_says_what_it_needs_and_holds_its_pictures():
    for source in chapters.chapters().values():
        alone = reader.make_download(source.with_suffix(".ipynb"))
        nbformat.validate(alone)
        text = "\n".join(cell.source for cell in alone.cells if cell.cell_type == "markdown")
        assert alone.cells[0].source.startswith("**To run this notebook**")
        assert not re.search(r"\{cite|\{set\}|:::|\]\(diagrams/", text), source.stem
    *_, check = [cell.source for cell in alone.cells[:2]]
    clean = [sys.executable, "-I", "-S", "-c", check]  # which knows no package of ours
    done = subprocess.run(clean, capture_output=True, text=True)
    assert "ImportError: no package cmp and lab here: see the first cell" in done.stderr


def test_links_that_set_an_explorer_become_words():
    text = 'Try {set}`60% <schedule: {"warmup": 0.6}>` of it, {set}`P <mixture: {"a": [1]}>`.'
    assert reader.plain_markdown(text) == "Try 60% of it, P."


def test_a_copy_is_valid_and_in_plain_markdown(copies):
    for path in copies.glob("[0A]*.ipynb"):
        copy = reader.read_copy(path)
        nbformat.validate(copy)
        text = "\n".join(cell.source for cell in copy.cells if cell.cell_type == "markdown")
        assert "{cite" not in text and "{value}" not in text and ":::" not in text, path.stem
        assert "[Start](start.ipynb)" in text and not re.search(r"\)=$", text, re.M)
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        assert [each for each in links if "://" not in each and not (copies / each).exists()] == []


def test_an_update_replaces_what_nobody_edited(copies, update):
    update()
    assert set(reader.prepare_copies().values()) == {""}
    for path in copies.glob("[0A]*.ipynb"):
        assert WORDS in (cell.source for cell in reader.read_copy(path).cells)


def test_outputs_of_a_reader_survive_until_the_book_changes(copies, update):
    path = next(copies.glob("04*.ipynb"))
    copy = reader.read_copy(path)
    cell = next(cell for cell in copy.cells if cell.cell_type == "code")
    cell.outputs = [nbformat.v4.new_output("stream", text="my own run\n")]
    nbformat.write(copy, path)
    reader.prepare_copies()
    assert "my own run" in path.read_text()
    update()
    reader.prepare_copies()
    assert "my own run" not in path.read_text()


def test_an_edited_copy_survives_an_update_and_can_be_compared_and_reset(copies, update):
    [path] = copies.glob("04*.ipynb")
    edit(path)
    assert reader.prepare_copies()[path.stem] == "edited by you"
    update()
    assert "kept, but the book has another version" in reader.prepare_copies()[path.stem]
    assert "another version" in (copies / reader.START).read_text()
    assert "# mine" in path.read_text() and WORDS not in path.read_text()
    difference = reader.diff_chapter("04")
    assert f"-{WORDS}" in difference and "# mine" in difference
    kept = reader.reset_chapter("04")
    assert kept.name == f"{path.stem} (mine).ipynb" and "# mine" in kept.read_text()
    assert WORDS in path.read_text()
    edit(path)
    assert reader.reset_chapter("04").name == f"{path.stem} (mine) 2.ipynb"
    assert reader.diff_chapter("04") == ""


def test_a_damaged_copy_is_set_aside_and_a_missing_one_is_named(copies):
    [path] = copies.glob("04*.ipynb")
    kept = path.with_name(f"{path.stem} (mine).ipynb")
    path.write_text("{")
    with pytest.raises(CmpError, match=r"04_learning_rates\.ipynb: cannot be read as a notebook"):
        reader.diff_chapter("04")
    note = f"your copy was damaged and is now {kept.name}"
    assert (
        reader.prepare_copies()[path.stem] == note and note in (copies / reader.START).read_text()
    )
    assert kept.read_text() == "{" and reader.diff_chapter("04") == ""
    path.unlink()
    with pytest.raises(CmpError, match="you have no copy"):
        reader.diff_chapter("04")


@pytest.mark.defect
@pytest.mark.long
def test_lab_fetches_what_explorers_need_or_says_how_to_get_it(copies, monkeypatch):
    """Without a network, the copies are made all the same."""
    asked = []

    def refuse(command, **_):
        asked.append(command)
        raise OSError("no network")

    monkeypatch.setattr(explorers, "script", explorers.script.__wrapped__)  # not cached
    monkeypatch.setattr(subprocess, "run", refuse)
    said = CliRunner().invoke(cli.app, ["lab", "--prepare"])
    assert ["d3@7.9.0" in command for command in asked] == [True]
    words = "d3 7.9.0 (npm) cannot be downloaded (no network); connect this machine to the network "
    words += f"and run `cmpt lab`, or copy the file d3-7.9.0.tgz to {copies.parent / 'packages'}"
    assert said.exit_code == 0 and f"explorers: {words}\nthe copies: {copies}" in said.output
    with pytest.raises(CmpError, match=re.escape(words)):
        explorers.script("d3")


def test_jupyterlab_ends_when_it_is_asked_through_the_command(tmp_path):
    """It is a module here that tells its number and waits for a signal."""
    told = tmp_path / "number"
    (tmp_path / "jupyterlab.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'part')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'part')!r}, {str(told)!r})\n"
        "time.sleep(60)\n"
    )
    code = "import sys; from lab import reader; sys.exit(-reader.open_lab([]))"
    paths = [tmp_path, *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment |= {"CMP_BUILD": str(tmp_path / "build")}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    try:
        until = time.monotonic() + 60
        while not told.exists() and time.monotonic() < until:
            time.sleep(0.05)
        lab = int(told.read_text())
        process.terminate()
        assert process.wait(30) == signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(lab, 0)
    finally:
        process.kill()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(told.read_text()), signal.SIGKILL)
