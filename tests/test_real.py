"""The first real experiment, whole, on small files of the layout that torchvision unpacks."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import nbformat
import numpy as np
import pytest
from forked import await_true
from IPython.core.inputtransformer2 import TransformerManager
from pictures import picture
from scipy.io import savemat
from torchvision import datasets
from typer.testing import CliRunner

from cmp import cli, config
from cmp.data import load_data
from cmp.errors import CmpError
from cmp.parsing import read_yaml
from cmp.project import build_folder, project_folder
from cmp.runs import forecast
from lab.evidence import real, studies, verdicts
from tests import real_table

SETS = ("pets", "aircraft", "satellite", "textures", "flowers", "signs", "things")


SMALL_COUNTS = {
    "pets": {"train": 20, "test": 20}, "satellite": {"": 120}, "things": {"": 120},
    "aircraft": {"train": 30, "validation": 30, "test": 30},
    "textures": {"train": 30, "validation": 30, "test": 30},
    "flowers": {"validation": 20, "test": 30}, "signs": {"validation": 12, "test": 48},
}  # fmt: skip
"""The images of `write_sets`."""


def write_jpeg(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(crc32(str(path.name).encode()), kind="JPEG"))


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_sets(root, count=10):
    """Some classes of each set, with `count` images per class and split."""
    pets, numbers = root / "oxford-iiit-pet", range(1, count + 1)
    for split, first in (("trainval", 0), ("test", 100)):
        names = [f"{pet}_{first + n}" for pet in ("Abyssinian", "english_setter") for n in numbers]
        write_lines(pets / "annotations" / f"{split}.txt", [f"{name} 1 1 1" for name in names])
        for name in names:
            write_jpeg(pets / "images" / f"{name}.jpg")
    planes = root / "fgvc-aircraft-2013b" / "data"
    write_lines(planes / "variants.txt", ["707-320", "A300 B4", "F/A-18"])
    for place, split in enumerate(("train", "val", "test")):
        rows = [(f"{1000 * place + 100 * kind + n:07d}", name) for n in numbers
                for kind, name in enumerate(("707-320", "A300 B4", "F/A-18"))]  # fmt: skip
        write_lines(planes / f"images_variant_{split}.txt", [" ".join(row) for row in rows])
        for name, _ in rows:
            write_jpeg(planes / "images" / f"{name}.jpg")
    for label in ("AnnualCrop", "SeaLake", "River", "Highway"):
        for n in range(3 * count):
            write_jpeg(root / "eurosat" / "2750" / label / f"{label}_{n}.jpg")
    for place, split in enumerate(("train", "val", "test")):
        names = [f"{label}/{label}_{place}{n:03d}.jpg" for label in ("banded", "dotted", "woven")
                 for n in numbers]  # fmt: skip
        write_lines(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", names)
        for name in names:
            write_jpeg(root / "dtd" / "dtd" / "images" / name)
    flowers = root / "flowers-102"
    labels = np.resize([1, 54, 102], 6 * count)
    ids = np.arange(1, len(labels) + 1)
    for n in ids:
        write_jpeg(flowers / "jpg" / f"image_{n:05d}.jpg")
    savemat(flowers / "imagelabels.mat", {"labels": labels})
    ends = {"trnid": ids[:count], "valid": ids[count : 3 * count], "tstid": ids[3 * count :]}
    savemat(flowers / "setid.mat", ends)
    signs, rows = root / "gtsrb", ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for n in range(6 * count):
        place = signs / "GTSRB" / "Final_Test" / "Images" / f"{n:05d}.ppm"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(n, kind="PPM"))
        rows.append(f"{place.name};9;9;1;1;8;8;{(0, 14, 42)[n % 3]}")
    write_lines(signs / "GT-final_test.csv", rows)
    for label in ("n01440764", "n03888257"):
        for n in range(6 * count):
            write_jpeg(root / "imagenette2-320" / "train" / label / f"{label}_{n}.JPEG")
        write_jpeg(root / "imagenette2-320" / "val" / label / f"{label}_0.JPEG")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build folder with the sets unpacked in it, and nothing that downloads."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(real, "download_set", lambda name, root: None)
    monkeypatch.setattr(real, "COUNTS", SMALL_COUNTS)
    write_sets(real.data_folder())
    return tmp_path / "build"


def test_torchvision_takes_the_layout_that_the_test_writes(build, monkeypatch):
    """Else the readers would be tested on files that nobody has."""
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    root, found = str(real.data_folder()), {}
    for kind, split, arguments in (
        ("OxfordIIITPet", "test", {}), ("FGVCAircraft", "val", {}), ("DTD", "test", {}),
        ("Flowers102", "test", {}), ("GTSRB", "test", {}),
        ("Imagenette", "train", {"size": "320px"}),
    ):  # fmt: skip
        found[kind] = getattr(datasets, kind)(root, split=split, **arguments)
    found["EuroSAT"] = datasets.EuroSAT(root)
    assert {kind: len(each) for kind, each in found.items()} == {
        "OxfordIIITPet": 20, "FGVCAircraft": 30, "DTD": 30, "Flowers102": 30,
        "Imagenette": 120, "EuroSAT": 120, "GTSRB": 60,
    }  # fmt: skip
    for name, (kind, read, _) in real.READERS.items():
        mine = {str(image.path) for image in read(real.data_folder())}
        paths = ("_images", "_image_files", "_samples", "samples")
        theirs = next(getattr(found[kind], key) for key in paths if hasattr(found[kind], key))
        theirs = {str(x[0] if isinstance(x, tuple) else x) for x in theirs}
        assert theirs <= mine, name


def test_the_sets_are_read_with_the_names_and_splits_of_their_files(build):
    said = []
    corpus = load_data(str(real.prepare_data(said.append)))
    assert len(said) == 7 and sorted(corpus.datasets) == sorted(SETS)
    assert corpus.classes["pets"] == ["Abyssinian", "english setter"]
    assert corpus.classes["aircraft"] == ["707-320", "A300 B4", "F/A-18"]
    assert corpus.classes["satellite"] == ["annual crop", "highway", "river", "sea lake"]
    assert corpus.classes["flowers"] == ["blackberry lily", "pink primrose", "sunflower"]
    assert corpus.classes["signs"] == [
        "20 km/h speed limit", "end of no overtaking by trucks", "stop"
    ]  # fmt: skip
    assert corpus.classes["things"] == ["parachute", "tench"]
    assert corpus.by_role("adapt") == ["aircraft", "pets", "satellite", "textures"]
    assert corpus.by_role("eval") == ["flowers", "signs"], "two that never arrive"
    assert corpus.by_role("pool") == ["things"]
    counts = {split: len(corpus.rows(split, dataset="aircraft"))
              for split in ("train", "validation", "test")}  # fmt: skip
    assert counts == {"train": 30, "validation": 30, "test": 30}
    assert len(corpus.rows("train", dataset="satellite")) == pytest.approx(84, abs=12)
    assert "a photo of a 707-320, a type of aircraft." in corpus.texts
    monkeypatched = real.prepare_data(lambda words: pytest.fail("prepared twice"))
    assert monkeypatched == real.data_folder()


def test_what_cannot_be_downloaded_or_read_is_said_with_what_to_do(build, monkeypatch):
    (real.data_folder() / "dtd" / "dtd" / "labels" / "val1.txt").unlink()
    with pytest.raises(
        CmpError,
        match=r"Describable Textures in .*is not as torchvision unpacks.*delete the folder",
    ):
        real.prepare_data()
    done = {path.stem for path in real.data_folder().glob("*.yaml")}
    assert done == {"pets", "aircraft", "satellite"}
    monkeypatch.undo()

    def refuse(root, download, **arguments):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "DTD", refuse)
    with pytest.raises(CmpError, match=r"cannot be downloaded .*no network.*repeat the command"):
        real.download_set("textures", build)


@pytest.mark.parametrize("name", ["imagenette2-320/train", "eurosat/2750", "dtd/dtd/images"])
def test_a_set_whose_unpacking_was_stopped_is_refused(build, name):
    next((real.data_folder() / name).rglob("*.[jJ]*")).unlink()
    with pytest.raises(CmpError, match=rf"images in .*{name.split('/')[0]}, .*delete that folder"):
        real.prepare_data()


def test_a_list_with_a_path_elsewhere_is_another_layout(build):
    path = real.data_folder() / "dtd" / "dtd" / "labels" / "val1.txt"
    path.write_text("/etc/passwd\n")
    with pytest.raises(CmpError, match=r"is not as torchvision unpacks"):
        real.prepare_data()


def test_every_set_has_its_published_size():
    assert {*real.COUNTS} == {*real.READERS} == {*real._FACTS["sets"]}
    assert sum(real.COUNTS["aircraft"].values()) == 10_000
    assert len(real._FACTS["flowers"]) * 10 == real.COUNTS["flowers"]["validation"]


def test_the_study_is_written_for_a_card_and_planned_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    configs = studies.load_study(real.STUDY).configs("gpu")
    assert {run.model.name for run in configs.values()} == {"ViT-B-32"}
    assert {run.stream.tasks for run in configs.values()} == {12}
    assert {run.data for run in configs.values()} == {str(tmp_path / "real")}
    planned = CliRunner().invoke(cli.app, ["study", real.STUDY, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert f"runs: {len(configs)}" in planned.output
    assert "predicted from decoding" in planned.output and "absent: data" in planned.output


def test_a_dry_run_of_a_small_profile_writes_no_page(build, monkeypatch):
    monkeypatch.setattr(studies, "plan_study", lambda runs, device: "some runs")
    monkeypatch.setattr(real, "write_page", lambda configs: pytest.fail("a page was written"))
    command = ["study", real.STUDY, "--profile", "cpu", "--dry-run"]
    planned = CliRunner().invoke(cli.app, command)
    assert planned.exit_code == 0 and "some runs" in planned.output


@pytest.mark.parametrize("name", ["first-real", "first-h100"])
def test_the_setting_named_recipe_is_the_recipe(name):
    """So that a result that is sent is a result of what chapter 08 recommends."""
    configs = studies.load_study(name).configs("gpu")
    found = [run for (setting, _), run in configs.items() if setting.startswith("recipe")]
    assert len(found) == 2
    recipe = dict(config.flat_keys(config.recipe_tree("default")))
    for run in found:
        assert recipe.items() <= dict(config.flat_keys(run.to_dict())).items()


def test_results_that_people_send_stand_after_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(real_table, "SENT", tmp_path)
    alone = real_table.as_markdown().splitlines()
    (tmp_path / "card-2026-12.csv").write_text(
        "setting,A_KA,A_ZS,GM,seconds,run,model,device\n"
        "before,40.25,70.06,53.1,0.0,1234e567,ViT-B-32,A Card\n"
        '"recipe, peak 1e-05",52.0,69.0,59.9,600.0,12345678,ViT-B-32,A Card\n'
    )
    rows = real_table.as_markdown().splitlines()
    assert rows[: len(alone)] == alone and len(alone) == 6
    assert rows[len(alone) :] == [
        "| ViT-B-32 | A Card | before | 40.2 | 70.1 | 53.1 |",
        "| ViT-B-32 | A Card | recipe, peak 1e-05 | 52.0 | 69.0 | 59.9 |",
    ]
    for text in ("setting,A_KA\nrecipe,52\n", "model,device,setting,A_KA,A_ZS,GM\nm,d,s,1,2,x\n",
                 "model,device,setting,A_KA,A_ZS,GM\nm,d,s,1,2,300\n"):  # fmt: skip
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(CmpError, match=r"other\.csv: .*wrote it|writes it"):
            real_table.as_markdown()


def test_our_rows_are_the_published_results():
    ours = {row[2]: row[3:5] for row in real_table.our_rows()}
    run = verdicts.setting_scores("recipe", "recipe")
    assert ours["recipe"] == [f"{run[score].mean():.1f}" for score in ("A_KA", "A_ZS")]
    assert float(ours["new data alone"][1]) < float(ours["plain, with replay"][1])


def test_the_manual_has_the_table_of_results():
    page = real_table.PAGE.read_text(encoding="utf-8")
    assert real_table.with_table(page) == page, "run `python -m tests.real_table`"
    with pytest.raises(CmpError, match="expected"):
        real_table.with_table("# A page without marks")


def test_the_template_of_a_result_names_the_study():
    template = project_folder() / ".github" / "ISSUE_TEMPLATE" / "result.yml"
    assert f"cmpt study {real.STUDY}" in template.read_text(encoding="utf-8")


def test_texts_state_the_hours_that_are_predicted():
    configs = studies.load_study(real.STUDY).configs("gpu").values()

    def hours(card):
        steps = [forecast.estimate_step(run, card).seconds for run in configs]
        return sum(
            seconds * sum(run.steps) for seconds, run in zip(steps, configs, strict=True)
        ) / 3600  # fmt: skip

    study, page, notebook = (
        " ".join((studies.STUDIES / name).read_text(encoding="utf-8").replace("#", "").split())
        for name in (f"{real.STUDY}.yaml", "../manual.md", f"{real.STUDY}.ipynb")
    )
    minutes, days = f"{60 * hours('rtx-4090'):.0f} minutes", f"{hours('t4'):.0f} hours"
    assert minutes in study and minutes in page
    assert days in study and days in page and days in notebook
    assert f"{hours('l4'):.1f} hours" in notebook
    for card, texts in (("rtx-4090", (study, page)), ("l4", (notebook,))):
        by = forecast.estimate_step(next(iter(configs)), card).by
        words = re.search(r"an assumed \d+% of", by)[0]
        assert all(words in text for text in texts), words


@pytest.fixture
def install():
    """The first code cell of the study's notebook."""
    book = nbformat.read(studies.STUDIES / f"{real.STUDY}.ipynb", 4)
    [code] = [cell.source for cell in book.cells if cell.get("id") == "install"]
    return code


def test_the_notebook_says_at_once_that_it_needs_an_address(install, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("cloned"))
    with pytest.raises(AssertionError, match="set `repository`"):
        exec(TransformerManager().transform_cell(install), {})


def test_the_notebook_clones_once_however_often_its_cell_is_run(install, tmp_path, monkeypatch):
    def clone(command, check):
        Path(command[-1], "data_manifests").mkdir(parents=True)

    def run_magic(name, line):
        if name == "cd":
            os.chdir(line)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", clone)
    code = TransformerManager().transform_cell(install.replace('= ""', '= "address"'))
    for _ in range(2):
        exec(code, {"get_ipython": lambda: SimpleNamespace(run_line_magic=run_magic)})
        assert Path.cwd() == tmp_path / "project"


SCRIPT = """
import os, sys
from pathlib import Path
from cmp import cli
from cmp.runs import forecast
from lab.evidence import real, studies, verdicts
studies.STUDIES = Path(os.environ["CMP_BUILD"])
real.COUNTS = SMALL
real.download_set = lambda name, root: None
sys.argv = ["cmp", "study", "first-real", "--device", "cpu", "--jobs", "1"]
if __name__ == "__main__":
    cli.main()
"""


@pytest.mark.long
def test_the_whole_study_from_files_to_a_page_killed_and_resumed(build):
    """With the settings of the study, a tiny network and short updates."""
    tree = read_yaml(studies.STUDIES / f"{real.STUDY}.yaml")
    small = {"model.name": "tiny", "model.start": "random", "training.steps": 3}
    small |= {"training.batch": 6, "evaluation.subset": 2, "training.precision": "fp32"}
    small |= {"optimizer.weight_decay": 0.1}
    tree["common"] |= small
    (build / f"{real.STUDY}.yaml").write_text(json.dumps(tree))
    (build / "study.py").write_text(SCRIPT.replace("SMALL", str(SMALL_COUNTS)))
    own = {"PYTHONPATH": str(project_folder()), "OMP_NUM_THREADS": "1", "CMP_WORKERS": "0"}

    def start():
        with (build / "said.txt").open("ab") as file:
            return subprocess.Popen(
                [sys.executable, str(build / "study.py")], env=os.environ | own, stdout=file,
                stderr=file, start_new_session=True,
            )  # fmt: skip

    process = start()
    logs = lambda: [*build.glob("runs/*/log.jsonl")]  # noqa: E731
    await_true(lambda: len(logs()) > 1 or process.poll() is not None, "a second run")
    assert process.poll() is None, (build / "said.txt").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    stored = set(build.glob("runs/*/run.json"))
    assert stored, "the first run was finished"
    times = {path: path.stat().st_mtime_ns for path in stored}
    again = start()
    assert again.wait(400) == 0, (build / "said.txt").read_text()
    assert times == {path: path.stat().st_mtime_ns for path in stored}, "it was not computed again"
    page = (real.data_folder() / "first-real.md").read_text()
    configs = studies.load_study(real.STUDY).settings
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if "| " in line]
    assert rows == ["setting", "before", *configs]
    assert "tiny, random, over 12 updates" in page and "book/results/real" in page
    assert page in (build / "said.txt").read_text()
    table = (real.data_folder() / "first-real.csv").read_text().splitlines()
    assert len(table) == 2 + len(configs)
    rows = real_table.sent_rows(real.data_folder() / "first-real.csv")
    assert [row[:3] for row in rows] == [["tiny", "cpu", name] for name in ("before", *configs)]
    assert build_folder() == build
