"""The site without a browser: built whole, strict about references, every term explained."""

import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import sample_book

from cmp.errors import CmpError
from cmp.parsing import parse_yaml
from cmp.project import project_folder
from lab import chapters, figures, site
from lab.figures import runs

INDEX = 'A<span class="hidden">_</span><sub>KA</sub>'
VOID = {"img", "input", "br", "hr", "meta", "link", "col"}


class Texts(html.parser.HTMLParser):
    """The running text of a page: (text, where it links to as a term, or none)."""

    LEFT = ("h1", "h2", "h3", "h4", "pre", "code", "summary", "script", "style", "button")
    PARTS = ("katex", "outputs", "title", "neighbours", "bibliography", "glossary", "citation")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, bool, str | None]] = []
        self.inside, self.found = False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in VOID:
            return
        values = dict(attributes)
        classes = (values.get("class") or "").split()
        left, term = tag in self.LEFT or bool({*classes} & {*self.PARTS}), None
        if tag == "a":
            term = values["href"].partition("#")[2] if "term" in classes else None
            left = left or term is None
        self.inside = self.inside or tag == "article"
        self.open.append((tag, left, term))

    def handle_endtag(self, tag):
        if tag not in VOID:
            while self.open and self.open.pop()[0] != tag:
                pass
        self.inside = self.inside and tag != "article"

    def handle_data(self, data):
        if self.inside and not any(left for _, left, _ in self.open):
            terms = [term for *_, term in self.open if term]
            self.found.append((data, terms[-1] if terms else None))


def listed() -> list[str]:
    """The files that myst.yml's toc names, in order."""
    toc = parse_yaml((project_folder() / "myst.yml").read_text())["project"]["toc"]
    every = [each for entry in toc for each in (entry, *entry.get("children", ()))]
    return [each["file"] for each in every if "file" in each]


def built_page(pages: Path, file: str) -> str:
    """The HTML that was made from a file."""
    for data in pages.glob("*.json"):
        found = json.loads(data.read_text())
        if isinstance(found, dict) and found.get("location") == f"/{file}":
            name = "" if data.stem == "index" else data.stem
            text = (pages / name / "index.html").read_text()
            return re.sub(r'<span class="hidden">_</span><sub>(\w+)</sub>', r"_\1", text)
    raise AssertionError(f"no page was made from {file}")


def finder(term: str) -> re.Pattern:
    """Where a term stands by itself, also with an s; written as it is if it has capitals inside."""
    words = r"[\s-]".join(map(re.escape, re.split(r"[ -]", term)))
    flags = 0 if re.search(r"[A-Z]", term[1:]) else re.IGNORECASE
    return re.compile(rf"(?<![\w-]){words}s?(?![\w-])", flags)


@pytest.mark.parametrize("name", ["node", "npm"])
def test_what_myst_calls_is_there(name):
    path = site.node_path()
    command = [shutil.which(name, path=path), "--version"]
    environment = os.environ | {"PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.match(r"v?\d+\.", done.stdout), done.stderr


def test_every_page_of_the_contents_is_there_and_every_chapter_in_the_contents(pages):
    files = listed()
    for file in files:
        assert "<article>" in built_page(pages, file)
    chapters_listed = [Path(file).stem for file in files if file.endswith(".ipynb")]
    assert chapters_listed == [source.stem for source in chapters.select()]


def test_a_terms_first_use_in_the_book_links_to_its_definition(pages):
    glossary = built_page(pages, "book/glossary.md")
    terms = dict(re.findall(r'<dt id="(term-[^"]+)">(.+?)</dt>', glossary))
    assert len(terms) > 40
    texts = [Texts(built_page(pages, file)).found for file in listed() if file.endswith(".ipynb")]
    linked = 0
    for identity, term in terms.items():
        longer = [other for other in terms.values() if finder(term).search(other) and other != term]
        inside = re.compile("|".join(finder(other).pattern for other in longer) or "$^", re.I)
        for page in texts:
            found = [(inside.sub("", text), to) for text, to in page if to in (None, identity)]
            uses = [to for text, to in found if finder(term).search(text)]
            if uses:
                assert uses[0] == identity, f"the first use of {term!r} is no link"
                linked += 1
                break
    assert linked > 30


def test_no_link_dangles_and_nothing_is_asked_of_elsewhere(pages):
    assert site.dangling_links(pages) == []
    for page in pages.rglob("index.html"):
        assert not re.findall(r'(?:src|<link[^>]+href)="(https?:[^"]*)', page.read_text())


def test_nothing_is_left_of_what_an_earlier_edition_built(pages):
    assert "gone" not in {path.name for path in pages.rglob("*")}


def test_dangling_links_are_found(tmp_path):
    (tmp_path / "b").mkdir()
    links = ["/b", "/b#there", "/b#gone", "#here", "#nor", "/c", "x.md", "https://elsewhere.org#a"]
    links += ["/b#explorer=mixture", "/b#explorer=gone&amp;state=%7B%7D"]
    text = '<p id="here">' + "".join(f'<a href="{link}">' for link in links)
    (tmp_path / "index.html").write_text(text)
    (tmp_path / "b" / "index.html").write_text('<p id="there" data-explorer="mixture">')
    assert site.dangling_links(tmp_path) == [
        ".: /b#gone", ".: #nor", ".: /c", ".: x.md", ".: /b#explorer=gone&amp;state=%7B%7D",
    ]  # fmt: skip


def test_the_theme_shows_all_kinds_of_content(tmp_path, pages):
    folder = site.build_pages(sample_book.write(tmp_path))
    text = (folder / "index.html").read_text()
    for part in (
        '<details class="box"', 'class="katex', '<li>', '<td></td><th>two</th>',
        '<a class="sets" href="#explorer=mixture&amp;state=%7B%22heat%22%3A+%22x%22%7D">Sixty</a>',
        'id="cite-someone2024"', 'class="hljs-keyword"', 'href="#here"',
        f'<p class="caption"><strong>Figure 1.1.</strong> What {INDEX} is, beside <code>A_KA<',
        '>cmpt export run  <span class="hljs-comment"># for', '<a href="#term-base">B</a></nav>',
    ):  # fmt: skip
        assert part in text, part
    cells = (folder / "cells" / "index.html").read_text()
    for part in (
        '<pre class="stream">printed', 'href="/"',
        '<div class="answering"><figure', '<td class="words long" data-head="words: ">short</td>',
        "explorers/page.js", '<summary>Code, 20 lines', '<td>1</td>',
        '<details class="evidence"><summary><h2 id="evidence">Evidence</h2>',
    ):  # fmt: skip
        assert part in cells, part
    assert "rows ×" not in cells
    assert "The last words." in cells.partition('class="evidence"')[2].partition("</details>")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("See {ref}`nowhere` and {cite:p}`nobody2020`.", ("nowhere", "nobody2020")),
        ("See [it](missing.md).", ("missing.md",)),
        (":::{note}\nIt is shown nowhere.\n:::", ("nothing renders", "admonition")),
    ],
)
def test_what_cannot_be_shown_fails_the_build(tmp_path, pages, text, words):
    sample_book.write(tmp_path, f"# Sample\n\n{text}\n")
    with pytest.raises(CmpError, match="not built") as error:
        site.build_pages(tmp_path)
    for word in words:
        assert word in str(error.value)


FINDS = """import fs from "node:fs";
const [{ find, read }, index] = [await import(process.argv[1]), fs.readFileSync(process.argv[2])];
const queries = JSON.parse(fs.readFileSync(0, "utf-8"));
console.log(JSON.stringify(queries.map((query) => find(read(String(index)), query))));
"""
QUERIES = {
    "forgeting": "out-of-date", "replay": "data-mixtures", "papermill": "learning-rates",
    "learning rate of ViT-B": "learning-rates", "catastrofic forgetting": "out-of-date",
    "merge weights": "merging", "how long does an update take": "scaling",
    "order of classes": "order-of-updates", "buffer size": "data-mixtures",
    "use my own pictures": "a1-your-model-and-data", "LoRA": "methods",
    "what is the geometric mean": "fomo-in-flux", "replya": "data-mixtures",
    "mergeing models": "merging", "warmpu": "learning-rates",
}  # fmt: skip
"""What a reader types, some of it misspelt -> the page that must come first."""


def test_search_finds_the_right_page_first(pages):
    command = ["node", "--input-type=module", "-e", FINDS, str(pages / "search.mjs")]
    done = subprocess.run(
        [*command, str(pages / "search.json")], input=json.dumps([*QUERIES, "xyzzy"]), text=True,
        capture_output=True, env=os.environ | {"PATH": site.node_path()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *found, nothing = json.loads(done.stdout)
    first = [hits[0]["url"].partition("#")[0].strip("/") for hits in found]
    assert dict(zip(QUERIES, first, strict=True)) == QUERIES
    assert nothing == []
    for hit in found[0]:
        assert any(marked for _, marked in hit["excerpt"]) or not hit["excerpt"]


def test_parts_of_a_package_are_placed(tmp_path):
    archive = tmp_path / "thing.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for name in ("package/a.js", "package/fonts/b.woff2", "package/fonts/b.ttf"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            file.addfile(info, io.BytesIO(name.encode()))
    site.copy_parts(
        archive, {"package/a.js": "x/a.js", "package/fonts/": "x/fonts/"}, tmp_path / "theme"
    )
    found = {p.relative_to(tmp_path / "theme").as_posix() for p in tmp_path.rglob("theme/**/*.*")}
    assert found == {"x/a.js", "x/fonts/b.woff2"}


def test_figures_have_captions():
    found = site.figure_captions()
    assert found["plot_plane"].startswith("A_KA against A_ZS")
    assert all(words.endswith(".") and "\n" not in words for words in found.values())


def test_the_first_pages_picture_is_drawn_from_the_published_results(tmp_path):
    drawn = figures.write_idea(tmp_path / "idea.svg")
    assert drawn.read_bytes() == runs.IDEA.read_bytes(), "run: cmpt site --picture"
