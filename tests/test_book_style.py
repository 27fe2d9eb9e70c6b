"""Chapters keep to book/STYLE.md, as far as a program can check."""

import ast
import itertools
import re

import pytest
from papermill.translators import PythonTranslator

from lab import chapters, values
from tests import prose as counted

SOURCES = chapters.select()
[SOLUTIONS] = chapters.select(["A4"])
EXERCISED = [source for source in SOURCES if source != SOLUTIONS]
MAX_LINES = 15
MAX_COLUMNS = 86
"""What a box of code shows of a line on the site, without scrolling."""
TRACKS = r"If you have an hour, .*?of your own\."
"""What to read in how much time."""
LIMITS = "What this does not show"
OPENING = 3
"""Cells of code before the story: parameters, imports, set-up."""
MAIN = [source for source in SOURCES if source.stem[0].isdigit()]
MAX_WORDS = {"01": 3000}
"""Words of a chapter's main line, where they may be more than 2,000."""


def each_chapter(function):
    return pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)(function)


def code_cells(source):
    return [cell for cell in chapters.notebook(source).cells if cell.cell_type == "code"]


def prose(source):
    """The text of a chapter without its code."""
    cells = chapters.notebook(source).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def headings(source):
    text = re.sub(r"```.*?```", "", prose(source), flags=re.DOTALL)
    return [(len(marks), words) for marks, words in re.findall(r"^(#+) (.+)$", text, re.MULTILINE)]


def own_lines(code):
    """Lines of a cell that are neither empty nor imports, which the formatter spreads out."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [line for line in lines if line.strip()]


def test_own_lines_are_counted_without_imports():
    code = "from a import (\n    b,\n    c,\n)\nimport d\n\nx = 1\nf(\n    x,\n)"
    assert own_lines(code) == ["x = 1", "f(", "    x,", ")"]


@each_chapter
def test_cells_are_short(source):
    for cell in code_cells(source):
        assert len(own_lines(cell.source)) <= MAX_LINES, cell.source


def test_lines_of_code_fit_their_boxes():
    """The API page shows signatures as the package's own code has them."""
    for page in (path for path in chapters.BOOK.glob("*.md") if path.name != "api.md"):
        for code in re.findall(r"^```(?:\{code|\w).*?^```", page.read_text("utf-8"), re.M | re.S):
            assert max(map(len, code.splitlines())) <= MAX_COLUMNS, code


def test_the_pages_agree_on_what_to_read():
    pages = [chapters.BOOK.parent / "README.md", chapters.BOOK / "index.md"]
    found = [re.search(TRACKS, page.read_text("utf-8"), re.S) for page in pages]
    texts = {" ".join(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", each[0]).split()) for each in found}
    assert len(texts) == 1, texts


def test_readme_and_the_site_list_every_chapter():
    root, names = chapters.BOOK.parent, [source.stem for source in SOURCES]
    link = r"^\| \w\w \| \[.+?\]\(book/(\w+)\.ipynb\)"
    table = re.findall(link, (root / "README.md").read_text("utf-8"), re.M)
    toc = re.findall(r"file: book/(\w+)\.ipynb", (root / "myst.yml").read_text("utf-8"))
    assert table == toc == names, "list each chapter in the table of README.md and in myst.yml"


def test_every_text_of_the_book_is_a_chapter_or_another_page_of_the_site():
    root, pages = chapters.BOOK.parent, {"STYLE.md"}
    pages |= set(re.findall(r"file: book/(\w+\.md)", (root / "myst.yml").read_text("utf-8")))
    numbered = {path.name for path in chapters.BOOK.glob("*.md")} - pages
    assert numbered == {source.name for source in SOURCES}, "name chapters NN_name.md"
    assert len({name.partition("_")[0] for name in numbered}) == len(numbered), "a number is twice"


@each_chapter
def test_papermill_reads_the_parameters_alike(source):
    """`papermill --help-notebook` fails on a line with a second `=`."""
    [tagged] = [c for c in code_cells(source) if "parameters" in c.metadata.get("tags", [])]
    helps = {each.name: each.help for each in PythonTranslator.inspect(tagged)}
    declared = chapters.parameters(source).values()
    assert helps == {each.name: each.help for each in declared}


@each_chapter
def test_chapters_define_no_logic(source):
    """No class and no handling of errors: those belong in a module."""
    for cell in code_cells(source):
        for node in ast.walk(ast.parse(cell.source)):
            kinds = (ast.ClassDef, ast.Try, ast.AsyncFunctionDef)
            assert not isinstance(node, kinds), cell.source


@each_chapter
def test_no_cell_changes_a_parameter(source):
    """The set-up cell checks the parameters, and must be able to run again."""
    first, *others = code_cells(source)
    parameters = {node.target.id for node in ast.parse(first.source).body}
    for cell in others:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert node.id not in parameters, cell.source


@each_chapter
def test_the_opening_is_parameters_then_what_is_stored(source):
    first, *opening = code_cells(source)[:OPENING]
    assert first.metadata.get("tags") == ["parameters"]
    assert "".join(c.source for c in opening).count("chapter_setup.begin_chapter(globals()") == 1
    assert sum("chapter_setup.begin_chapter(" in cell.source for cell in code_cells(source)) == 1


@each_chapter
def test_the_title_has_the_chapters_number(source):
    level, title = headings(source)[0]
    number = source.stem.partition("_")[0]
    assert level == 1 and re.fullmatch(rf"{number} · .+", title)
    assert [found for found, _ in headings(source)].count(1) == 1


@pytest.mark.parametrize("source", EXERCISED, ids=lambda source: source.stem)
def test_the_answer_comes_first(source):
    cells = chapters.notebook(source).cells
    before = [cell.source for cell in cells[: cells.index(code_cells(source)[0])]]
    assert "In one minute" in "\n".join(before)
    assert "**The question.**" not in prose(source)


@pytest.mark.parametrize("source", MAIN, ids=lambda source: source.stem)
def test_a_chapter_has_a_picture_before_its_results_and_something_to_do(source):
    number, text = source.stem.partition("_")[0], prose(source)
    before, found, _ = text.partition("## What we measured")
    assert "{{diagram " in (before if found else text)
    assert any("Your turn" in title for _, title in headings(source))
    assert count_words(text.partition("## Exercises")[0]) <= MAX_WORDS.get(number, 2000)


APART = re.compile(
    r"<details>.*?</details>|:{3,}.*?:{3,}|\$\$.*?\$\$"
    r"|\{\{(?:caption|diagram) (?:[^{}]|\{\{[^{}]*\}\}|\{[^{}]*\})*\}\}",
    re.S,
)
"""Folded parts, boxes, captions and displayed formulas."""


def count_words(text):
    """Words of a main line: what stands apart, and tables and quotations, do not count."""
    return len(re.sub(r"^[|>].*$", "", APART.sub("", text), flags=re.M).split())


def test_words_are_counted_without_what_stands_apart():
    text = (
        "one two\n\n| a | b |\n\nthree {{caption a: much {{n a/b}} more}}\n\n::: {note}\nno\n:::\n"
    )
    assert count_words(text + "\n$$ a b c $$ four") == 4


SPLIT = [source for source in MAIN if counted.EVIDENCE in source.read_text("utf-8")]
"""Chapters with a lesson and a folded part below it."""
LONGEST, MOST_INTERVALS, MOST_FIGURES = {"01": 2200}, 6, 3
BOOKKEEPING = r"\bno gain\b|\{\} of \{\}|\b\d+ of \d+\b|cannot be compared|settings? lie"
"""What a title says that counts rows instead of stating a lesson; {} is a value filled in."""


@pytest.mark.parametrize("source", SPLIT, ids=lambda source: source.stem)
def test_a_lesson_is_short_and_leaves_intervals_to_the_evidence(source):
    found = counted.count_chapter(source.read_text("utf-8"))
    assert found.words <= LONGEST.get(source.stem.partition("_")[0], 1600)
    assert found.intervals <= MOST_INTERVALS
    assert found.figures <= MOST_FIGURES
    assert found.evidence > 0
    lesson, _ = counted.split_lesson(prose(source))
    assert "{{verdict" not in lesson  # a sentence of a machine


def titles(source):
    """The titles that the cells of a chapter give to figures, with {} for values."""
    for cell in code_cells(source):
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            named = isinstance(node, ast.Assign | ast.AugAssign) and "title" in ast.unparse(node)
            called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("with_title")
            if named or called:
                part = node.value if named else node.args[-1]
                texts = [
                    "".join(each.value if isinstance(each, ast.Constant) else "{}"
                            for each in found.values)
                    for found in ast.walk(part) if isinstance(found, ast.JoinedStr)
                ]  # fmt: skip
                plain = [
                    each.value for each in ast.walk(part)
                    if isinstance(each, ast.Constant) and isinstance(each.value, str)
                ]  # fmt: skip
                yield from texts + plain


@pytest.mark.parametrize("source", SPLIT, ids=lambda source: source.stem)
def test_titles_state_a_lesson(source):
    found = [*titles(source)]
    assert found
    for title in found:
        assert not re.search(BOOKKEEPING, title), title
    assert "no gain" not in prose(source)


@each_chapter
def test_every_figure_that_is_referred_to_is_there(source, monkeypatch):
    monkeypatch.setattr(values, "fill_values", lambda text, source: values.MARK.sub("1", text))
    notebook = chapters.notebook(source)
    values.fill_notebook(notebook, source.stem.partition("_")[0])
    assert not any("{{ref" in cell.source for cell in notebook.cells if cell.cell_type != "code")


@pytest.mark.parametrize("source", EXERCISED, ids=lambda source: source.stem)
def test_the_end_is_limits_and_exercises(source):
    words = [title for level, title in headings(source) if level == 2 and title != "Evidence"]
    assert LIMITS in words
    assert words[-1] == "Exercises" and "Summary" not in words
    exercises = counted.split_lesson(prose(source))[0].rpartition("## Exercises")[2]
    assert exercises.startswith("\n\nPredict first, then run.\n")
    assert re.findall(r"^(\d+)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    number = source.stem.partition("_")[0]
    assert f"Solutions: [chapter A4](A4_solutions.ipynb#A4-{number})." in exercises


@pytest.mark.parametrize("source", EXERCISED, ids=lambda source: source.stem)
def test_every_exercise_has_its_solution(source):
    number = source.stem.partition("_")[0]
    section = prose(SOLUTIONS).partition(f"(A4-{number})=")[2].partition("\n(A4-")[0]
    assert section.startswith(f"\n## {number} · ")
    found = re.findall(r"(?:^\*\*|\. )(\d)\. ", section, re.MULTILINE)
    assert found == ["1", "2", "3"]


@each_chapter
def test_headings_and_labels_are_unique(source):
    titles = [title for _, title in headings(source)]
    assert len(titles) == len(set(titles))


def test_labels_begin_with_their_chapters_number_and_are_unique_in_the_book():
    found = []
    for source in SOURCES:
        labels = re.findall(r"^\(([\w-]+)\)=$|^:label: (\S+)$", prose(source), re.MULTILINE)
        names = [one or other for one, other in labels]
        number = source.stem.partition("_")[0]
        assert all(name.startswith(f"{number}-") for name in names), names
        found += names
    assert len(found) == len(set(found))


BEGINS = re.compile(r"([-+*]|\d+[.)]|#+) ")
"""How a list or a heading begins."""
PAGES = [*chapters.BOOK.glob("*.md"), *chapters.BOOK.parent.glob("*.md")]


def broken_lines(text):
    """Lines that a line break put in the wrong place: a row of a table that goes on in the next
    line or has text beside it, and a word in a sentence that begins a list or a heading."""
    text = re.sub(r"```.*?```", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL)
    lines = ["", *(re.sub(r"^(> ?)+", "", line) for line in text.splitlines())]
    broken = []
    for before, line in itertools.pairwise("" if line == ":::" else line for line in lines):
        is_row, was_row = (each.strip().startswith("|") for each in (line, before))
        begins = BEGINS.match(line) and not re.match(r"\s|\(.*\)=", before)
        is_cut = is_row and not line.rstrip().endswith("|")
        is_option, was_option = (re.match(r":\w+: ", each) for each in (line, before))
        is_beside = line and not (is_row or is_option) and (was_row or was_option)
        if is_cut or is_beside or (begins and before and not BEGINS.match(before)):
            broken.append(line)
    return broken


def test_lines_that_fall_apart_are_found():
    table = "> | a | b |\n> |:--|:--|\n"
    assert broken_lines(f"{table}> | c | d |\n>\n> Text.\n\n1. One,\n   two\n2. Three") == []
    assert broken_lines(f"{table}> | c |\n> d |\n") == ["d |"]
    assert broken_lines(f"{table}> | c | d | Text") == ["| c | d | Text"]
    assert broken_lines("a strength of\n1. A method") == ["1. A method"]
    assert broken_lines("> two\n> + three\n") == ["+ three"]
    assert broken_lines(":::{figure} a.svg\n:alt: A\n:label: b\n\nWords.\n:::") == []
    assert broken_lines(":::{figure} a.svg\n:alt: A\nbox. :label: b\n:::") == ["box. :label: b"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_falls_apart(page):
    assert broken_lines(page.read_text()) == []
