"""The book as a program: parameters refused early, runs that are whole or absent, stable files."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import nbformat
import pytest
from typer.testing import CliRunner

from cmp import cli, config
from cmp.errors import CmpError
from cmp.project import build_folder
from cmp.runs import launch
from lab import analyses, chapters, run, stamps

PARAMETERS = """\
profile: str = "quick"  # quick, cpu or gpu
seeds: int = 1  # replicates of the live settings
jobs: int = 2  # worker processes
device: str = "cpu"  # cpu or cuda
rate: float = 0.5  # learning rate
live: bool = False  # draw the live runs
"""
EDITED = PARAMETERS.replace(
    "seeds: int = 1  # replicates of the live settings", "seeds: int = 2 + 1"
)
GUARD = "from lab import chapters\n\nchapters.check_injected(globals())"
WIDGET = """\
import sys
import warnings
import ipywidgets
from lab import chapters

warnings.warn(f"look at {chapters.BOOK.parent} and {sys.prefix}/lib", stacklevel=1)
print(object())
ipywidgets.VBox([ipywidgets.IntSlider(description=name) for name in "ab"])"""
DECLARED = {"profile": "quick", "seeds": 1, "jobs": 2, "device": "cpu", "rate": 0.5, "live": False}


@pytest.fixture(scope="module", autouse=True)
def book_on_path():
    """Kernels find the book's package here, too; the book's own find it beside their notebook."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(chapters.BOOK), prepend=os.pathsep)
        yield


def write(folder, name, *cells, parameters=PARAMETERS):
    """A chapter: a parameters cell and then these cells."""
    kernelspec = "".join(f"\n  {key}: {value}" for key, value in chapters.KERNELSPEC.items())
    header = f"---\nkernelspec:{kernelspec}\n---\n\n# {name}\n\n"
    code = [f":tags: [parameters]\n\n{parameters}", *cells]
    source = folder / f"{name}.md"
    source.write_text(
        header + "\n".join(f"```{{code-cell}} python\n{cell}\n```\n" for cell in code)
    )
    return source


def texts(path):
    """What an executed notebook printed."""
    outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def stale_notebooks(folder):
    """The chapters whose committed notebook is missing or was made from something else."""
    changed = run.changed_since(run.committed_tasks(folder=folder))
    return [target.stem for target, parts in changed.items() if parts]


# chapters and notebooks


def test_chapters_come_in_order_by_number(tmp_path):
    for name in ("A1_own", "10_late", "00_first", "02_second"):
        write(tmp_path, name)
    assert list(chapters.chapters(tmp_path)) == ["00", "02", "10", "A1"]
    assert [path.stem for path in chapters.select(["A1", "2"], tmp_path)] == ["02_second", "A1_own"]
    with pytest.raises(CmpError, match="no chapter 07; the chapters are 00, 02, 10, A1"):
        chapters.select(["7"], tmp_path)


def test_a_notebook_is_the_same_every_time_and_an_edit_is_local(tmp_path):
    source = write(tmp_path, "00_a", "1 + 1", "1 + 1", "2 + 2")
    first = chapters.notebook(source)
    assert nbformat.writes(first) == nbformat.writes(chapters.notebook(source))
    assert len({cell.id for cell in first.cells}) == len(first.cells)
    assert first.metadata.kernelspec == chapters.KERNELSPEC
    nbformat.validate(first)
    before = [cell.id for cell in first.cells]
    source.write_text(source.read_text().replace("2 + 2", "2 + 3"))
    after = [cell.id for cell in chapters.notebook(source).cells]
    assert after[:-1] == before[:-1] and after[-1] != before[-1]


def test_a_stamp_ignores_line_ends_only(tmp_path):
    source = write(tmp_path, "00_a", "1 + 1")
    unix = stamps.make_stamp(source)["text"]
    text = source.read_text()
    source.write_bytes(text.replace("\n", "\r\n").encode())
    assert stamps.make_stamp(source)["text"] == unix
    source.write_text(text.replace("1 + 1", "1 + 2"))
    assert stamps.make_stamp(source)["text"] != unix


# the evidence, which is folded

EVIDENCE = """
+++ {"jp-MarkdownHeadingCollapsed": true}

## Evidence

+++

### A table

```{code-cell} python
print(seeds)
```
"""


def folded(book):
    """The cells that JupyterLab opens folded."""
    return [n for n, cell in enumerate(book.cells) if cell.metadata.get(chapters.FOLDED) is True]


@pytest.mark.long
def test_evidence_is_folded_wherever_a_chapter_is_read(tmp_path, monkeypatch):
    source = write(tmp_path, "00_a")
    assert chapters.evidence_place(chapters.notebook(source)) == len(
        chapters.notebook(source).cells
    )
    source.write_text(source.read_text() + EVIDENCE)
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    run.run_book("quick", None, {}, folder=tmp_path)
    run.commit_notebooks(folder=tmp_path)
    for path in (tmp_path / "build" / "quick" / "00_a.ipynb", tmp_path / "00_a.ipynb"):
        book = nbformat.read(path, 4)
        [place] = folded(book)
        assert book.cells[place].source == "## Evidence"
        assert chapters.evidence_place(book) == place < len(book.cells) - 2


def test_evidence_is_the_last_section_of_a_chapter():
    """Else what stands below it would be folded, too."""
    split = 0
    for source in chapters.select():
        for book in (chapters.notebook(source), nbformat.read(source.with_suffix(".ipynb"), 4)):
            texts = [cell.source if cell.cell_type == "markdown" else "" for cell in book.cells]
            places = [n for n, text in enumerate(texts) if text.startswith("## Evidence")]
            assert folded(book) == places, source.name
            assert len(places) <= 1
            split += len(places)
            for place in places:
                below = "\n".join(texts[place:]).partition("\n")[2]
                assert "\n## " not in below and "\n# " not in below, source.name
    assert split


# parameters


def test_parameters_are_what_the_cell_declares(tmp_path):
    found = chapters.parameters(write(tmp_path, "00_a"))
    assert {name: parameter.default for name, parameter in found.items()} == DECLARED
    assert str(found["seeds"]) == "seeds: int (replicates of the live settings)"


def test_given_texts_become_values(tmp_path):
    source = write(tmp_path, "00_a")
    given = {"profile": "cpu", "seeds": "5", "device": "cuda:1", "rate": "1e-3", "live": "True"}
    values = {"profile": "cpu", "seeds": 5, "device": "cuda:1", "rate": 1e-3, "live": True}
    assert chapters.check_parameters(source, given) == DECLARED | values
    assert chapters.check_parameters(source, {}) == DECLARED


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sedes", "3", "did you mean 'seeds'?"),
        ("seeds", "three", "'three' is not of type int"),
        ("seeds", "1.5", "'1.5' is not of type int"),
        ("seeds", "-1", "-1 must be at least 1"),
        ("jobs", "0", "0 must be at least 1"),
        ("rate", "fast", "'fast' is not of type float"),
        ("live", "yes", "'yes' is not of type bool"),
        ("profile", "huge", "one of quick, cpu"),
        ("device", "gpu", "cpu, cuda or cuda:N"),
    ],
)
def test_wrong_parameters_are_refused_with_the_valid_ones(tmp_path, name, text, words):
    source = write(tmp_path, "00_a")
    with pytest.raises(CmpError) as caught:
        chapters.check_parameters(source, {name: text})
    assert words in str(caught.value) and name in str(caught.value)
    for parameter in chapters.parameters(source).values():
        assert str(parameter) in str(caught.value)


@pytest.mark.defect
@pytest.mark.parametrize(
    ("number", "given", "words"),
    [
        ("03", {"weight": "5"}, ["weight: 5.0", "from 0 to 1"]),
        ("04", {"peak": "-1"}, ["peak: -1.0", "above 0"]),
        ("04", {"meta": "sometimes"}, ["meta: 'sometimes'", "meta_schedule"]),
        ("02", {"method": "lorra"}, ["method: 'lorra'", 'option_names("method")']),
        ("02", {"rank": "0"}, ["rank: 0", "at least 1"]),
        ("07", {"pool": "0.9"}, ["pool + update + buffer", "must be 1, not 1.65"]),
        ("01", {"stream_seed": "-1"}, ["stream_seed: -1", "from 0"]),
        ("A1", {"pictures": "missing"}, ["/missing'", "a folder of class folders"]),
    ],
)
def test_a_value_that_no_run_takes_is_refused_before_a_chapter_begins(number, given, words):
    [source] = chapters.select([number])
    with pytest.raises(CmpError) as caught:
        chapters.check_parameters(source, given)
    assert all(word in str(caught.value) for word in words)
    assert chapters.check_parameters(source, {})


def test_a_path_begins_where_the_command_runs_and_not_in_the_chapter_s_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    mine = tmp_path / "mine"
    (mine / "cat").mkdir(parents=True)
    [source] = chapters.select(["A1"])
    for text in ("mine", "~/mine", str(mine)):
        assert chapters.check_parameters(source, {"pictures": text})["pictures"] == str(mine)
    (mine / "cat").rmdir()
    with pytest.raises(CmpError, match=f"pictures: '{mine}' must be a folder of class folders"):
        chapters.check_parameters(source, {"pictures": "mine"})


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("seeds = 1", "name: type = value"),
        ("seeds: list = [1]", "name: type = value"),
        ("seeds: int = 1 + len('a')", "name: type = value"),
        ("seeds: int =", "invalid syntax"),
    ],
)
def test_a_parameters_cell_that_is_not_plain_is_refused(tmp_path, cell, words):
    with pytest.raises(CmpError, match=words):
        chapters.parameters(write(tmp_path, "00_a", parameters=cell))


def test_exactly_one_cell_is_tagged(tmp_path):
    source = write(tmp_path, "00_a")
    source.write_text(source.read_text().replace("[parameters]", "[other]"))
    with pytest.raises(CmpError, match="0 cells are tagged parameters"):
        chapters.parameters(source)


# the guard


def scope(*cells, **names):
    """The globals of a kernel that ran these cells."""
    return {"In": ["", PARAMETERS, *cells], **DECLARED, "unrelated": 1, **names}


def test_the_guard_lets_pass_what_is_declared_also_when_run_again():
    chapters.check_injected(scope(GUARD))
    chapters.check_injected(
        scope("# Parameters\nseeds = 3\n", GUARD, "unrelated = 1", GUARD, seeds=3)
    )
    chapters.check_injected(scope(GUARD, "later: int = 3"))
    chapters.check_injected({"no": "IPython"})


def test_the_guard_takes_true_from_papermills_shell():
    kernel = scope('# Parameters\nlive = "true"\n', GUARD, live="true")
    chapters.check_injected(kernel)
    assert kernel["live"] is True


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (scope("# Parameters\nsedes = 3\n", sedes=3), "did you mean 'seeds'"),
        (scope(seeds="3"), "'3' is not of type int"),
        (scope(seeds=True), "True is not of type int"),
        (scope(seeds=-3), "at least 1"),
        (scope(profile="huge"), "one of quick"),
        ({"In": ["", GUARD]}, "run the parameters cell first"),
        ({"In": ["", EDITED, GUARD]}, "cell: 'seeds: int = 2 .*': write name: type = value"),
    ],
)
def test_the_guard_refuses(kernel, words):
    with pytest.raises(CmpError, match=words):
        chapters.check_injected(kernel)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """papermill from a shell on a small notebook; arguments -> finished process."""
    folder = tmp_path_factory.mktemp("hand")
    source = write(folder, "00_a", GUARD, "print('seeds', seeds)")
    nbformat.write(chapters.notebook(source), folder / "a.ipynb")

    def papermill(*arguments):
        command = [sys.executable, "-m", "papermill", "a.ipynb", "out.ipynb", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr, folder / "out.ipynb"

    return papermill


def test_papermill_by_hand_takes_what_is_declared(by_hand):
    code, _, out = by_hand("-p", "seeds", "3")
    assert code == 0 and texts(out) == "seeds 3\n"


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("sedes", "3", "did you mean 'seeds'?"), ("seeds", "three", "'three' is not of type int")],
)
def test_papermill_by_hand_is_refused(by_hand, name, value, words):
    code, errors, _ = by_hand("-p", name, value)
    assert code != 0
    assert words in errors and "seeds: int (replicates of the live settings)" in errors


# running


@pytest.mark.long
def test_execute_writes_a_whole_notebook(tmp_path, capfd):
    source = write(
        tmp_path, "00_a", "import os\nprint(seeds, os.getcwd(), os.environ['PYTHONHASHSEED'])"
    )
    target = tmp_path / "out {seeds}" / "00_a.ipynb"
    target.parent.mkdir()
    target.with_suffix(".failed.ipynb").write_text("of an earlier run")
    values = chapters.check_parameters(source, {"seeds": "4"})
    run.execute_chapter(run.Task(source, target, values))
    assert texts(target) == f"4 {tmp_path} 0\n"
    made = run.run_record(target)
    assert made.pop("seconds") > 0
    assert made.pop("stamp").items() >= stamps.make_stamp(source).items()
    assert made == {"parameters": DECLARED | {"seeds": 4}, "ends": {}}
    assert [path.name for path in target.parent.iterdir()] == ["00_a.ipynb"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("print('so far')\n1 / 0", ["print('so far')", "ZeroDivisionError: division by zero"]),
        ("import os\nos._exit(1)", ["import os", "Kernel died"]),
    ],
)
def test_a_failing_chapter_leaves_the_target_as_it_was(tmp_path, cell, words):
    source = write(tmp_path, "00_a", "ok = 1", cell)
    target = tmp_path / "out" / "00_a.ipynb"
    target.parent.mkdir()
    target.write_text("as it was")
    with pytest.raises(CmpError) as caught:
        run.execute_chapter(run.Task(source, target, DECLARED))
    failed = target.with_suffix(".failed.ipynb")
    for word in ["00_a: cell [3]", str(failed), *words]:
        assert word in str(caught.value)
    assert target.read_text() == "as it was"
    assert {path.name for path in target.parent.iterdir()} == {target.name, failed.name}
    assert len(nbformat.read(failed, 4).cells) >= 4


TABLES = {"02": "merging.parquet", "07": "mixtures.parquet", "A2": "merging.parquet"}
"""The results that a chapter is said to have read, for this test."""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what stamps are made from, to be edited, and a notebook of each chapter that was
    made from it as it is."""
    root = tmp_path / "project"
    ignored = shutil.ignore_patterns("_theme", "_lab", "__pycache__", "weights", "js")
    for folder in stamps.FOLDERS:
        shutil.copytree(stamps.ROOT / folder, root / folder, ignore=ignored)
    monkeypatch.setattr(stamps, "ROOT", root)
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    (tmp_path / "quick").mkdir()
    for source in chapters.select():
        read = [TABLES.get(source.stem[:2], "orders.parquet"), "claims-*.yaml", "later.parquet"]
        about = {
            "parameters": chapters.check_parameters(source, {"profile": "quick"}),
            "stamp": stamps.make_stamp(source) | stamps.digest_files(read),
        }
        target = tmp_path / "quick" / f"{source.stem}.ipynb"
        target.write_text(json.dumps({"metadata": {"cmp": about}}))
    return root


def stale_chapters():
    """The numbers of the chapters that a dry run calls stale -> why."""
    printed = CliRunner().invoke(cli.app, ["book", "--dry-run"], catch_exceptions=False).output
    return dict(re.findall(r"^(\w\w)_\w+: stale \((.*) changed\)$", printed, re.M))


def edit(path, *changes):
    """Replace texts in a file, each given with what takes its place."""
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)


def chapters_with(pattern):
    return {path.stem[:2] for path in chapters.select() if re.search(pattern, path.read_text())}


def test_a_chapter_is_stale_when_code_words_it_anew_and_no_other(project):
    assert stale_chapters() == {}
    edit(
        project / "book" / "lab" / "evidence" / "verdicts.py",
        ("points of spread", "points of width"),
    )
    judged = chapters_with(r"judged_claims|boxes\.|\{\{verdict ")
    assert 5 < len(judged) < 11
    assert stale_chapters() == dict.fromkeys(judged, "lab.evidence.verdicts")


@pytest.mark.defect
def test_a_chapter_is_stale_when_the_benchmark_s_recipe_that_it_shows_changes(project):
    recipe = project / "book" / "benchmark" / "pretraining.py"
    edit(recipe, ('[f"model.name={name}", *PRETRAINING_OF', '["model.name=tiny", *PRETRAINING_OF'))
    shown = chapters_with(r"analyses\.regime_table")
    assert stale_chapters() == dict.fromkeys(shown, "benchmark.pretraining") != {}


def test_a_chapter_is_stale_when_a_file_that_it_read_changes_and_no_other(project):
    results = project / "book" / "results"
    table = (results / "merging.parquet").read_bytes()
    (results / "merging.parquet").write_bytes(table[:-1] + bytes([table[-1] ^ 1]))
    assert stale_chapters() == dict.fromkeys(["02", "A2"], "merging.parquet")
    (results / "merging.parquet").write_bytes(table)
    edit(project / "book" / "advice.yaml", ("Methods that penalise", "Methods that punish"))
    edit(project / "book" / "lab" / "evidence" / "planner.yaml", ("update", "month"))
    advised, planned = chapters_with(r"boxes\."), chapters_with(r"planner\.")
    reasons = dict.fromkeys(planned, "planner.yaml") | dict.fromkeys(advised, "advice.yaml")
    assert stale_chapters() == reasons | dict.fromkeys(
        advised & planned, "advice.yaml, planner.yaml"
    )


def test_a_chapter_is_stale_when_a_file_appears_that_it_looked_for(project):
    (project / "book" / "results" / "later.parquet").write_bytes(b"")
    assert {*stale_chapters().values()} == {"later.parquet"}
    (project / "book" / "claims-77.yaml").write_text("claims: []")
    assert {*stale_chapters().values()} == {"claims-*.yaml, later.parquet"}


def test_what_shows_nothing_makes_no_chapter_stale(project):
    """Comments, docstrings, other quotes and lines, the order of definitions, and moved files."""
    code, results = project / "book" / "lab" / "evidence", project / "book" / "results"
    lines = ("claim: Claim,", "claim: Claim,\n    # and\n    ")
    edit(code / "verdicts.py", ('"""Return', '"""Give'), ('"helps"', "'helps'"), lines)
    edit(code / "claims.py", ("MATTERS = 1.0\n", ""), ("GAINS = ", "MATTERS = 1.0\nGAINS = "))
    edit(project / "book" / "advice.yaml", ("guidelines:", "# all of them\nguidelines:\n"))
    (results / "old").mkdir()
    (results / "orders.parquet").rename(results / "old" / "orders.parquet")
    (project / "cmp" / "releases" / "index.py").rename(code / "gallery.py")
    for path in project.rglob("*.py"):
        text = path.read_text().replace("cmp.releases.index", "lab.evidence.gallery")
        path.write_text(text)
    assert stale_chapters() == {}


def test_a_chapter_is_stale_with_numerics_its_text_and_its_parameters(project, tmp_path):
    edit(project / "cmp" / "__init__.py", ("NUMERICS = ", "NUMERICS = 1"))
    assert {*stale_chapters().values()} == {"cmp"} and len(stale_chapters()) == 14
    source, target = write(tmp_path, "00_a"), tmp_path / "00_a.ipynb"
    made = {"parameters": DECLARED, "stamp": stamps.make_stamp(source)}
    target.write_text(json.dumps({"metadata": {"cmp": made}}))

    def changed(**other):
        return run.changed_since([run.Task(source, target, DECLARED | other)])[target]

    assert changed() == [] and changed(seeds=2) == ["parameters"]
    source.write_text(source.read_text() + "\nmore\n")
    assert changed() == ["text"]
    target.write_text(target.read_text()[:-9])
    assert "parameters" in changed()


def test_code_has_one_digest_in_all_versions_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "ROOT", tmp_path)
    (tmp_path / "book" / "lab").mkdir(parents=True)
    (tmp_path / "book" / "lab" / "code.py").write_text(CODE)
    source = write(tmp_path, "00_a", "from lab import code\nawait code.Kind(1).show()")
    assert stamps.digest_code(source) == {"lab.code": "fed970e848a3ca58"}


CODE = '''
import numpy as np


class Kind:
    """A kind."""

    limit: int | None = None

    async def show(self, *names: str, size=2.50, **more):
        first, *rest = names or ("a" "b",)
        match rest:
            case [{"x": 1}, *_] if size > -1:
                return f"{size!r:>{size}} {{0}} {first=}" f'{more["x"]:.1f}' "..."
        with open(first) as file, open(rest[0]) as other:
            return (lambda x, /: x[::2, ...])(file), b"1", 1j, 10_000, np.pi, not other
'''


def test_a_notebook_records_what_its_chapter_read_and_looked_for(tmp_path):
    source = write(tmp_path, "00_a", READS)
    target = tmp_path / "out.ipynb"
    run.execute_chapter(run.Task(source, target, DECLARED))
    stamp = run.run_record(target)["stamp"]
    tables = {name for name in stamp if name.endswith(".parquet")}
    assert tables == {"orders.parquet", "missing.parquet"}
    assert {"advice.yaml", "orders.yaml"} <= stamp.keys() and "claims.yaml" not in stamp


READS = """\
from lab.evidence import guidelines, results
results.published_metrics("orders")
results.is_published("missing")
guidelines.load_guidelines()"""


@pytest.mark.long
def test_a_book_goes_on_after_a_failure_and_skips_what_is_current(tmp_path, capsys, monkeypatch):
    write(tmp_path, "00_a", "1 / 0")
    write(tmp_path, "01_b", "print(hash('a'), profile, seeds)")

    def run_all(jobs, build, numbers=None):
        monkeypatch.setenv("CMP_BUILD", str(tmp_path / build))
        run.run_book("cpu", numbers, {"seeds": "2"}, jobs, folder=tmp_path)

    for jobs in (1, 2):
        with pytest.raises(CmpError, match=r"1 of the chapters failed\n00_a: cell \[3\]"):
            run_all(jobs, f"out{jobs}")
    first, second = (tmp_path / f"out{jobs}" / "cpu" / "01_b.ipynb" for jobs in (1, 2))
    assert texts(first).endswith(" cpu 2\n")
    assert texts(first) == texts(second)
    capsys.readouterr()
    before = first.stat().st_mtime_ns
    run_all(1, "out1", ["1"])
    printed = capsys.readouterr().out
    assert first.stat().st_mtime_ns == before
    assert "01_b: current, skipped" in printed and "0 of 1 chapters to write" in printed
    assert str(first.parent) in printed


def test_nothing_starts_where_a_parameter_is_wrong_or_the_run_is_dry(tmp_path, capsys, monkeypatch):
    write(tmp_path, "00_a", "print(seeds)")
    write(tmp_path, "01_b", parameters='profile: str = "quick"  # quick, cpu or gpu')
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    with pytest.raises(CmpError, match="01_b: no parameter is called 'seeds'"):
        run.run_book("quick", None, {"seeds": "2"}, folder=tmp_path)
    with pytest.raises(CmpError, match="00_a: profile: 'huge' must be one of quick"):
        run.run_book("huge", None, {}, folder=tmp_path)
    run.run_book("quick", None, {}, dry_run=True, folder=tmp_path)
    assert "2 of 2 chapters to write" in capsys.readouterr().out
    assert not (tmp_path / "build").exists()


# the committed notebooks


@pytest.mark.long
def test_what_is_published_is_stable_and_goes_stale(tmp_path, monkeypatch):
    source = write(tmp_path, "00_a", WIDGET, GUARD)
    assert stale_notebooks(tmp_path) == ["00_a"]
    written, path = [], tmp_path / "00_a.ipynb"
    for build in ("one", "two"):
        monkeypatch.setenv("CMP_BUILD", str(tmp_path / build))
        path.unlink(missing_ok=True)
        run.commit_notebooks(folder=tmp_path)
        written.append(path.read_text())
    assert written[0] == written[1] and stale_notebooks(tmp_path) == []
    nbformat.validate(nbformat.read(path, 4))
    for machine in (
        "ipykernel_",
        "papermill",
        str(chapters.BOOK.parent),
        sys.prefix,
        sys.version.split()[0],
    ):
        assert machine not in written[0]
    assert "look at . and <python>/lib" in written[0]
    assert "application/vnd.jupyter.widget" not in written[0]  # without a kernel it says nothing
    ours, theirs = nbformat.read(path, 4), chapters.notebook(source)
    assert [cell.source for cell in ours.cells] == [cell.source for cell in theirs.cells]
    assert "jupytext" not in ours.metadata  # it would write the source anew, values filled in
    source.write_text(source.read_text() + "\nmore\n")
    assert stale_notebooks(tmp_path) == ["00_a"]


def test_a_new_sentence_is_filled_in_without_running_the_chapter(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    source, path = write(tmp_path, "00_a", "print(2)", "1 / 0"), tmp_path / "00_a.ipynb"
    book, made = chapters.notebook(source), stamps.make_stamp(source)
    shown = nbformat.v4.new_output("stream", text="as it was")
    book.cells[-1] |= {"execution_count": 3, "outputs": [shown]}
    made |= stamps.digest_files(["merging.parquet"])
    book.metadata["cmp"] = {"stamp": made, "parameters": DECLARED}
    nbformat.write(book, path)
    assert run.check_committed(folder=tmp_path)
    source.write_text(source.read_text() + "\nIn Paris {cite:p}`roth2024practitioner`.\n")
    assert not run.check_committed(folder=tmp_path)
    assert "00_a: stale (text changed); only its text is written again" in capsys.readouterr().out
    run.commit_notebooks(folder=tmp_path)
    *_, last, added = nbformat.read(path, 4).cells
    assert last.outputs == [shown] and last.execution_count == 3
    assert added.source.startswith("In Paris ([Roth et al., 2024](http")
    assert {"merging.parquet", "references.bib"} <= run.run_record(path)["stamp"].keys()
    assert run.check_committed(folder=tmp_path)
    edit(source, ("print(2)", "print(3)"))
    capsys.readouterr()
    assert not run.check_committed(folder=tmp_path)
    assert "00_a: stale (text changed)\n" in capsys.readouterr().out


def test_a_notebook_that_says_nothing_of_its_making_is_named_with_the_way_out(tmp_path, capsys):
    for number, content in enumerate(["{}", '{"metadata": {"cmp": {"stamp": 3}}}', '{"meta']):
        write(tmp_path, f"0{number}_a").with_suffix(".ipynb").write_text(content)
    (tmp_path / "07_b.ipynb").write_text("{}")
    assert not run.check_committed(folder=tmp_path)
    printed = capsys.readouterr().out
    for number in range(3):
        assert f"0{number}_a: to run, since its stamp cannot be read" in printed
    assert "cmpt book --publish --chapter 00 --chapter 01 --chapter 02" in printed
    assert f"07_b: there is no 07_b.md; delete it: git rm {tmp_path / '07_b.ipynb'}" in printed


def test_every_chapter_of_the_book_declares_its_parameters():
    for source in chapters.select():
        assert {"profile", "seeds", "jobs", "device"} <= set(chapters.parameters(source))


ON_A_DEVICE = ("cmp.update", "cmp.tune", "cmp.compare", "launch.run_one", "verify.verify_run",
               "shop.run_as_stream", "chapter_setup.compute_live")  # fmt: skip


def test_chapters_train_and_compare_on_the_device_that_a_reader_chose():
    for source in chapters.select():
        cells = [c.source for c in chapters.notebook(source).cells if c.cell_type == "code"]
        trees = [ast.parse(cell.replace("await ", "")) for cell in cells]
        for node in (node for tree in trees for node in ast.walk(tree)):
            words = ast.unparse(node) if isinstance(node, ast.Call | ast.List) else ""
            if words.startswith(ON_A_DEVICE) or "--threads" in words:
                assert "device" in words, f"{source.name}: {words}"


def test_a_name_that_other_cells_use_is_given_in_one_cell_of_its_chapter():
    """So that cells can be run again in any order."""
    for source in chapters.select():
        given, used = Counter(), set()
        for cell in (c for c in chapters.notebook(source).cells if c.cell_type == "code"):
            tree = ast.parse(cell.source.replace("await ", ""))
            names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
            own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
            used |= {node.id for node in names} - own
            given.update({*re.findall(r"^(\w+) = ", cell.source, re.M)})
        assert [name for name in used if given[name] > 1] == [], source.name


def strange_cells(source):
    """The cells of a committed notebook that differ from its chapter's by more than what was filled
    in. If the stamp says that the text has changed, there are none: then `make published` names
    the notebook."""
    target = source.with_suffix(".ipynb")
    if run.run_record(target)["stamp"]["text"] != stamps.digest_text(source):
        return []
    pairs = zip(nbformat.read(target, 4).cells, chapters.notebook(source).cells, strict=True)
    return [cell.source for cell, origin in pairs if not is_filled(cell, origin)]


FILLED_IN = {
    r"\{\{(?!caption)[^{}]+\}\}|\{cite:p\}`[^`]+`": "\0",
    r"\{\{caption [\w-]+: ([^{}]+)\}\}": "\0 \\1",
}
"""What stands for any text in a chapter -> NUL, with what is left of it."""


def is_filled(cell, origin):
    text = origin.source
    if cell.cell_type == "markdown":
        for pattern, left in FILLED_IN.items():
            text = re.sub(pattern, left, text)
    typed = map(re.escape, text.split("\0"))
    return cell.cell_type == origin.cell_type and bool(
        re.fullmatch("(?s:.+?)".join(typed), cell.source)
    )


def test_a_committed_notebook_says_what_its_chapter_says():
    for source in chapters.select():
        assert strange_cells(source) == [], source.name


@pytest.mark.parametrize("kind", ["markdown", "code"])
def test_a_sentence_that_a_chapter_lacks_is_found_in_its_committed_notebook(tmp_path, kind):
    source = write(tmp_path, "00_a", "print(seeds)")
    book = chapters.notebook(source)
    book.metadata["cmp"] = {"stamp": stamps.make_stamp(source)}
    last = [cell for cell in book.cells if cell.cell_type == kind][-1]
    last.source += " # a line"
    nbformat.write(book, source.with_suffix(".ipynb"))
    assert strange_cells(source) == [last.source]
    source.write_text(source.read_text() + "\na line\n")
    assert strange_cells(source) == []  # which is stale now


def test_the_site_can_show_what_committed_notebooks_hold():
    """It knows pictures, HTML and plain text; of other kinds it would show the object's name."""
    for source in chapters.chapters().values():
        book = nbformat.read(source.with_suffix(".ipynb"), 4)
        for output in (each for cell in book.cells for each in cell.get("outputs", [])):
            kinds = set(output.get("data", {}))
            known = [kind for kind in kinds if kind == "text/html" or kind.startswith("image/")]
            assert known or kinds <= {"text/plain"}, (source.name, kinds)


RUN = """
from cmp import config
from lab.evidence import studies
from lab import analyses
settings = ["stream.tasks=2", "training.steps=3", "training.batch=12", "evaluation.subset=8"]
run_config = config.parse(config.override(config.profile("quick"), settings))
studies.compute_runs([run_config])
frame = analyses.collect_metrics({("it", 0): run_config})
print(frame["run"][0], repr(float(frame["score"].sum())))
"""


@pytest.mark.long
def test_a_chapter_the_shell_and_the_library_make_the_same_run(corpus, tmp_path, monkeypatch):
    """The same config through papermill, `cmpt run` and Python: one id, the same numbers."""
    found = {}
    settings = ["stream.tasks=2", "training.steps=3", "training.batch=12", "evaluation.subset=8"]
    run_config = config.parse(config.override(config.profile("quick"), settings))
    data = build_folder() / "data"
    for way in ("chapter", "shell", "library"):
        folder = tmp_path / way
        folder.mkdir()
        (folder / "data").symlink_to(data)
        monkeypatch.setenv("CMP_BUILD", str(folder))
        if way == "chapter":
            source = write(tmp_path, "00_a", RUN)
            run.execute_chapter(run.Task(source, tmp_path / "00_a.ipynb", DECLARED))
            printed = texts(tmp_path / "00_a.ipynb").splitlines()[-1]
        elif way == "shell":
            CliRunner().invoke(cli.app, ["run", "quick", *settings])
        else:
            launch.run_one(run_config)
        frame = analyses.collect_metrics({("it", 0): run_config})
        found[way] = f"{frame['run'][0]} {float(frame['score'].sum())!r}"
    assert found["chapter"] == found["shell"] == found["library"] == printed
