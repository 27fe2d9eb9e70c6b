"""Files, names and records that were made to do harm, or do it by accident."""

import json
import shutil

import months
import pytest
from typer.testing import CliRunner

from cmp import cli
from cmp.errors import CmpError
from cmp.files import atomic_folder, check_held_files
from cmp.releases import exports, hugging_face, release, update, update_plan
from cmp.runs.identity import json_digest
from cmp.runs.runner import Observer

ONE_STEP = ["training.task_steps=[1]"]


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of three months, which no test changes."""
    folder = tmp_path_factory.mktemp("months") / "data"
    months.write_pictures(folder, 3)
    return folder


@pytest.fixture(scope="module")
def releases(root, tmp_path_factory):
    """Releases of the two first months, which no test changes."""
    folder = tmp_path_factory.mktemp("releases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMP_BUILD", str(folder / "build"))
        settings = [*months.SMALL, *ONE_STEP]
        plan = update_plan.plan_update(months.START, root / "z-month", settings, pool=root / "pool")
        made = update.compute_update(plan, folder / "1")
        plan = update_plan.plan_update(made, root / "y-month", ONE_STEP)
        update.compute_update(plan, folder / "2")
    return folder


@pytest.fixture
def plan(releases, root):
    """An update of one step after the second release."""
    return update_plan.plan_update(releases / "2", root / "x-month", ONE_STEP)


def invoke(*arguments):
    """Call the command line, and return its error, if any."""
    return CliRunner().invoke(cli.app, [*map(str, arguments)]).exception


def craft(source, target, change):
    """Copy a release, and change its record so that its own hash is right."""
    shutil.copytree(source, target)
    path = target / release.RECORD_FILE
    tree = json.loads(path.read_text())
    change(tree["record"])
    tree["sha256"] = json_digest(tree["record"])
    path.write_text(json.dumps(tree))
    return target


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("form", ["{0}", "../{1}", "state/../../{1}"])
def test_a_record_names_no_file_outside_the_release(releases, tmp_path, form, is_listed):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    name = form.format(victim, victim.name)

    def change(record):
        record["state"] = name
        record["files"] |= {name: "0" * 64} if is_listed else {}

    folder = craft(releases / "2", tmp_path / "r", change)
    with pytest.raises(CmpError, match=r"stream\.json: cannot be read \((state|files): '.*from"):
        release.slim(folder)
    assert victim.read_text() == "mine"


def test_slim_deletes_nothing_behind_a_link(releases, tmp_path):
    shutil.copytree(releases / "2", tmp_path / "r")
    mine = (tmp_path / "r" / "state").rename(tmp_path / "mine")
    (tmp_path / "r" / "state").symlink_to(mine)
    before = sorted(mine.iterdir())
    with pytest.raises(CmpError, match="state: is a link to another folder"):
        release.slim(tmp_path / "r")
    assert sorted(mine.iterdir()) == before


def test_a_folder_that_appears_while_an_update_trains_is_kept(plan, tmp_path):
    out = tmp_path / "r"

    def write_notes(*_):
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(CmpError, match="already exists; move it away"):
        update.compute_update(plan, out, Observer(step=write_notes))
    assert (out / "notes.txt").read_text() == "mine"
    out.rename(tmp_path / "notes")
    steps = []
    update.compute_update(plan, out, Observer(step=lambda *given: steps.append(given)))
    assert not steps and release.is_release(out)  # what was trained was not lost


def test_a_link_to_nothing_and_boards_inside_are_refused_before_training(plan, tmp_path):
    def train(*_):
        raise AssertionError

    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(CmpError, match="link: already exists"):
        update.compute_update(plan, link, Observer(step=train))
    for inside in ("r", "r/board", "x/../r/board"):
        boards = {"tensorboard": str(tmp_path / inside)}
        with pytest.raises(CmpError, match=r"--tensorboard: .* is inside"):
            update.compute_update(plan, tmp_path / "r", Observer(step=train), boards=boards)
    assert not (tmp_path / "r").exists()


def test_a_folder_is_not_replaced_where_that_is_asked(tmp_path):
    def write():
        with atomic_folder(tmp_path / "new", replace=False) as partial:
            (partial / "x").write_text("x")

    write()
    with pytest.raises(CmpError, match="new: already exists"):
        write()
    assert not list(tmp_path.glob(".*"))


def test_an_export_replaces_only_files_of_an_export(tmp_path):
    out = tmp_path / "model"
    (out / "config.json").mkdir(parents=True)
    (out / "config.json" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(CmpError, match=r"model: contains 'config\.json', which would be lost"),
        exports.export_folder(out, hugging_face.FILES),
    ):
        pass
    assert (out / "config.json" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(out)
    out.mkdir()
    (out / "config.json").symlink_to("thesis.txt")
    with pytest.raises(CmpError, match=r"contains 'config\.json'"):
        check_held_files(out, {"config.json"})
    (out / "config.json").unlink()
    with (
        pytest.raises(CmpError, match=r"contains 'thesis\.txt'"),
        exports.export_folder(out, {"x"}),
    ):
        (out / "thesis.txt").write_text("mine")
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_page_is_not_written_into_a_release(releases, tmp_path):
    made = shutil.copytree(releases / "2", tmp_path / "2")
    for name in ("report.html", "state/page.html"):
        error = invoke("compare", releases / "1", made, "--subset", 2, "--report", made / name)
        assert isinstance(error, CmpError) and "is inside the release" in str(error)
    assert release.read_release(made).path(release.REPORT_FILE)
