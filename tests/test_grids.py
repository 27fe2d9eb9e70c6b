"""A chapter over a grid of its parameters: a notebook per point, skipped once it is there."""

import itertools
import json

import pytest
import test_book

from cmp.errors import CmpError
from cmp.project import build_folder
from lab import chapters, grids, run
from lab.evidence import results, studies

PARAMETERS = """\
profile: str = "quick"  # quick, cpu or gpu
peak: float = 0.5  # learning rate
stream_seed: int = 0  # its stream
"""
RUNS = """\
from cmp.runs import store
runs = {"thirds": store.load_run(RUN_IDS[stream_seed])}
if stream_seed == 1:
    raise ValueError("no such stream")"""

book_on_path = test_book.book_on_path


@pytest.fixture(autouse=True)
def own_build(tmp_path, monkeypatch):
    data = build_folder().resolve() / "data"
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    build_folder().mkdir()
    (build_folder() / "data").symlink_to(data)


KINDS = {"peak": "float", "stream_seed": "int", "name": "str"}
VALID = {name: chapters.Parameter(name, kind, 7, "") for name, kind in KINDS.items()}


def test_a_grid_is_the_product_of_its_lists():
    points = grids.expand_grid({"peak": "0.1,0.2", "name": "1,1.0"}, 3, VALID)
    assert len(points) == 12
    pairs = {(point["peak"], point["stream_seed"]) for point in points}
    assert pairs == set(itertools.product(("0.1", "0.2"), ("7", "8", "9")))
    assert {point["name"] for point in points} == {"1", "1.0"}


@pytest.mark.parametrize(
    ("given", "seeds", "words"),
    [
        ({"peak": "1,1"}, 1, "-P peak: a value is given twice"),
        ({"peak": "1e-3,0.001"}, 1, "-P peak: a value is given twice"),
        ({"stream_seed": "1, 1"}, 1, "-P stream_seed: a value is given twice"),
        ({"stream_seed": "1,2"}, 2, "-P stream_seed already gives the seeds"),
        ({"a": ",".join(map(str, range(201)))}, 1, "201 points; use at most 200"),
    ],
)
def test_an_impossible_grid_is_refused(given, seeds, words):
    with pytest.raises(CmpError, match=words):
        grids.expand_grid(given, seeds, VALID)


@pytest.mark.long
def test_a_point_that_fails_leaves_the_others_and_is_listed(tmp_path):
    results.restore_runs(studies.load_study("mixtures"), "cpu")
    ids = [run.id for run in results.published_runs("mixtures")[:2]]
    runs = RUNS.replace("RUN_IDS", str(ids))
    source = test_book.write(tmp_path, "04_rates", runs, parameters=PARAMETERS)
    given = {"peak": "0.1"}
    with pytest.raises(CmpError, match="no such stream"):
        grids.run_grid("quick", "04", given, seeds=2, jobs=2, folder=tmp_path)
    folder = build_folder() / "grids" / f"{source.stem}, quick"
    index = (folder / "index.md").read_text()
    done, failed = index.split("## Failed")
    assert done.count("| 0.1 |") == 1 and "peak 0.1, stream_seed 1" in failed
    assert (folder / "ends.svg").stat().st_size > 1000
    record = run.run_record(folder / "peak 0.1, stream_seed 0.ipynb")
    gained, kept = record["ends"]["thirds"]
    assert f"| thirds | {gained:.1f} | {kept:.1f} |" in index
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*0.ipynb")}
    with pytest.raises(CmpError, match="1 of the chapters failed"):
        grids.run_grid("quick", "04", given, seeds=2, folder=tmp_path)
    assert made == {path.name: path.stat().st_mtime_ns for path in folder.glob("*0.ipynb")} != {}


def test_the_notebook_of_a_path_is_in_the_folder_of_the_grid(tmp_path):
    for path in ("../../elsewhere", "/home/me"):
        assert "/" not in grids.point_name({"pictures": path})
    parameters = PARAMETERS + 'pictures: str = ""  # a folder\n'
    test_book.write(tmp_path, "04_rates", RUNS, parameters=parameters)
    with pytest.raises(CmpError, match=r"-P: .*one name"):
        grids.run_grid("quick", "04", {"pictures": "a/b,a_b"}, dry_run=True, folder=tmp_path)


def test_nothing_starts_where_a_parameter_is_wrong(tmp_path):
    test_book.write(tmp_path, "04_rates", RUNS, parameters=PARAMETERS)
    with pytest.raises(CmpError, match="peak"):
        grids.run_grid("quick", "04", {"peak": "0.1,high"}, folder=tmp_path)
    test_book.write(tmp_path, "05_more", RUNS, parameters='profile: str = "quick"  # quick\n')
    with pytest.raises(CmpError, match="05_more has no runs of its own"):
        grids.run_grid("quick", "05", {}, seeds=2, folder=tmp_path)
    assert not (build_folder() / "grids").exists()


def test_a_point_that_fails_now_does_not_show_what_it_scored_before(tmp_path):
    targets = {tmp_path / f"peak {peak}.ipynb": {"peak": peak} for peak in ("0.1", "0.2")}
    for number, target in enumerate(targets):
        about = {"cmp": {"ends": {"thirds": [41.5 + number, 50.0]}}}
        target.write_text(json.dumps({"metadata": about}))
    grids.write_index(tmp_path / "index.md", tmp_path / "04.md", targets, [*targets][:1])
    index = (tmp_path / "index.md").read_text()
    assert "| 0.2 | thirds | 42.5 |" in index and "41.5" not in index
    assert "## Failed" in index and "peak 0.1" in index


def test_the_notebooks_of_a_grid_find_the_diagrams_that_they_show(tmp_path, monkeypatch):
    test_book.write(tmp_path, "04_rates", RUNS, parameters=PARAMETERS)
    monkeypatch.setattr(run, "execute_chapter", lambda task: None)
    index = grids.run_grid("quick", "04", {"peak": "0.1,0.2"}, folder=tmp_path)
    assert (index.parent / "diagrams" / "hills.svg").is_file()


def test_a_grid_stamps_its_chapter_once(tmp_path, monkeypatch):
    test_book.write(tmp_path, "04_rates", RUNS, parameters=PARAMETERS)
    stamped = []
    monkeypatch.setattr(run.stamps, "make_stamp", lambda source: stamped.append(1) or {})
    grids.run_grid("quick", "04", {"peak": "0.1,0.2"}, dry_run=True, folder=tmp_path)
    assert stamped == [1]
