"""The `gpu` profile: its plan without data, weights or card; and `cmpt doctor`."""

import ast
import dataclasses
import importlib.metadata
import json
import multiprocessing
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from pictures import classes
from typer.testing import CliRunner

import cmp
from cmp import budgets, cli, config, mixtures
from cmp.embedded import packed
from cmp.embedded.models import base_seeds
from cmp.errors import CmpError
from cmp.project import build_folder
from cmp.releases import tuning, update
from cmp.runs import forecast, launch, paper, preflight
from cmp.runs.checkpoints import StopRequest
from cmp.scale import devices
from cmp.scale.execution import ExecutionConfig
from lab import chapter_setup, chapters, run
from lab.evidence import studies, workers
from tests import card_table

GPU = config.parse(config.profile("gpu"))
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_it_is_the_paper_s_default():
    """As in Table 4 and in the default config of the published code."""
    assert (GPU.model.name, GPU.model.start) == ("ViT-B-16", "laion2b_s34b_b88k")
    assert mixtures.batch_counts(GPU.mixture, GPU.training.batch, False) == (169, 175, 168)
    assert (GPU.schedule.name, GPU.schedule.peak, GPU.schedule.durations(1000)[0]) == (
        "cosine", 1e-5, 100,
    )  # fmt: skip
    assert (GPU.optimizer.weight_decay, GPU.optimizer.clip) == (0.2, 1.0)
    assert paper.table4_steps(GPU) == 1420


def test_its_steps_are_what_the_paper_s_budget_buys():
    step = budgets.full_cost(GPU).step
    assert GPU.training.steps == int(paper.TABLE4_TOTAL * 1e9 / paper.TABLE4_TASKS / step)
    assert budgets.apply_budget(GPU).training.steps == GPU.training.steps


def test_other_methods_get_the_same_compute_and_the_paper_s_steps_beside_theirs():
    tree = config.override(config.profile("gpu"), ["method.name=lora", "method.rank=4"])
    lora = config.parse(tree)
    assert paper.table4_steps(lora) == 1898
    assert "the paper's rule gives 1898" in preflight.describe_run(lora, lora)[0]
    assert budgets.apply_budget(lora).training.steps > GPU.training.steps
    assert paper.table4_steps(config.parse(config.override(tree, ["training.batch=256"]))) is None


@no_card
def test_its_plan_is_printed_where_nothing_of_it_is_here():
    result = CliRunner().invoke(cli.app, ["run", "gpu", "--dry-run"])
    assert result.exit_code == 1, result.output
    for words in (
        "20 tasks of 1428 steps (the paper's rule gives 1420)", "169 from the pretraining pool",
        "memory-adjusted GFLOPs", "predicted from FLOPs", "weights   to fetch",
        "Not ready: data, device. The lines above say why.",
    ):  # fmt: skip
        assert words in result.output


@pytest.mark.defect
def test_the_paper_s_steps_stand_beside_its_own_also_where_its_data_are_here(monkeypatch):
    """Its budget is then replaced by the steps that it buys."""
    monkeypatch.setattr(preflight, "check_needs", lambda *_: [preflight.Check("data", "here", "")])
    monkeypatch.setattr(preflight, "_check_batches", lambda *_: preflight.Check("-", "here", ""))
    monkeypatch.setattr(preflight, "load_run_data", lambda run: None)
    monkeypatch.setattr(budgets, "settle", lambda run, corpus: budgets.apply_budget(run))
    words = "20 tasks of 1428 steps (the paper's rule gives 1420), 28560 in total"
    for command in (["run", "gpu", "--dry-run"], ["doctor", "--profile", "gpu"]):
        said = CliRunner().invoke(cli.app, [*command, "--device", "cpu"])
        assert words in said.output
    assert f"  {words}" in preflight.describe_study({("plain", 0): GPU}, "cpu")


@no_card
def test_without_a_card_it_is_refused_before_anything_starts():
    result = CliRunner().invoke(cli.app, ["run", "gpu"])
    assert isinstance(result.exception, CmpError)
    assert "'cuda'" in str(result.exception)


@no_card
def test_doctor_says_what_of_it_is_missing():
    result = CliRunner().invoke(cli.app, ["doctor", "--profile", "gpu"])
    assert result.exit_code == 1
    assert (result.output.count("missing"), result.output.count("to fetch")) == (2, 1)
    assert "a step needs 47 GB in bf16, and an H100 has 80 GB" in result.output
    large = CliRunner().invoke(cli.app, ["doctor", "--profile", "gpu", "training.batch=1024"])
    assert "--micro-batch 512 needs 47 GB" in large.output


def test_shared_memory_that_is_too_small_is_missing_and_what_fits_is_said(monkeypatch):
    free = {"free": 1e9}
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(**free))
    monkeypatch.setattr(preflight, "worker_count", lambda device: 15)
    found = preflight._check_shared_memory(GPU, "cuda")
    assert found.state == preflight.MISSING
    assert found.sentence == (
        "15 decoding processes need 2.3 GB in /dev/shm, which has 1.0 free: set CMP_WORKERS=6"
    )
    free["free"] = 8e9
    assert preflight._check_shared_memory(GPU, "cuda").state == preflight.PRESENT
    few = dataclasses.replace(GPU, training=dataclasses.replace(GPU.training, batch=8))
    free["free"] = 1e9  # what is scored comes in blocks of 256
    assert "need 1.2 GB" in preflight._check_shared_memory(few, "cuda").sentence


def test_cards_of_different_kinds_are_named(monkeypatch):
    names = ["NVIDIA H100", "NVIDIA A100"]
    card = SimpleNamespace(name=names[0], total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])
    found = preflight._check_card("cuda")
    assert found.state == preflight.OPTIONAL
    assert "NVIDIA A100, NVIDIA H100" in found.sentence
    names[1] = names[0]
    assert preflight._check_card("cuda").sentence == "2 times NVIDIA H100, 80 GB"


@pytest.mark.defect
def test_a_card_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.is_present("cuda:1")
    for check in (
        lambda device: preflight.check_memory(GPU, device, ExecutionConfig()),
        lambda device: preflight.check_run(GPU, device, ExecutionConfig()),
        lambda device: preflight.describe_study({("plain", 0): GPU}, device),
    ):
        with pytest.raises(CmpError, match=r"'cuda:2'.* below 2; choose"):
            check("cuda:2")


@pytest.mark.parametrize(
    ("settings", "memory", "words"),
    [
        (["model.name=RN50", "training.batch=64"], 4e9, "training.batch=16 needs 3 GB"),
        pytest.param(
            ["method.name=distillation", "training.batch=256"],
            4e9,
            "training.batch=8 needs 4",
            marks=pytest.mark.long,
        ),
        (["training.batch=256"], 4e9, "--micro-batch 16 needs 3"),
        (
            ["training.batch=256"],
            8e9,
            "--checkpoint-activations the same batch needs 4 GB",
        ),
        (
            ["training.batch=1024"],
            8e9,
            "--checkpoint-activations --micro-batch 512 needs 5 GB",
        ),
        pytest.param(
            ["training.batch=256"], 1e9, "not even a batch of 2 fits", marks=pytest.mark.long
        ),
        (["training.batch=2"], 1e9, "not even a batch of 2 fits"),
    ],
)
def test_what_is_advised_where_memory_is_short_can_be_done(monkeypatch, settings, memory, words):
    tree = config.override({"model": {"name": "ViT-B-32", "start": "openai"}}, settings)
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(memory)}
    monkeypatch.setattr(preflight.os, "sysconf", sizes.get)
    found = preflight.check_memory(config.parse(tree), "cpu", ExecutionConfig())
    assert (found.state, words in found.sentence) == (preflight.MISSING, True), found.sentence


def test_processes_share_the_memory_of_a_batch(monkeypatch):
    tree = {"model": {"name": "ViT-B-32", "start": "openai"}}

    def sentence(batch, micro_batch=None):
        run = config.parse(tree | {"training": {"batch": batch}})
        return preflight.check_memory(run, "cpu", ExecutionConfig(micro_batch)).sentence

    alone = sentence(64), sentence(64, 16)
    monkeypatch.setattr("cmp.scale.processes.world_size", lambda: 4)
    assert (sentence(254), sentence(254, 16)) == alone
    assert sentence(254, 128) == alone[0]


def test_recomputed_activations_are_counted_where_memory_is_checked(monkeypatch):
    run = config.parse({"model": {"name": "ViT-B-32", "start": "openai"},
                        "training": {"batch": 256, "precision": "bf16"}})  # fmt: skip
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(8e9)}
    monkeypatch.setattr(preflight.os, "sysconf", sizes.get)
    states = [preflight.check_memory(run, "cpu", ExecutionConfig(checkpoint_activations=each))
              for each in (False, True)]  # fmt: skip
    assert [check.state for check in states] == [preflight.MISSING, preflight.PRESENT]
    fixed, _, sample = card_table.step_parts("ViT-B-32")
    needed = forecast.step_memory(run, recomputed=True)
    assert needed == pytest.approx(fixed + 256 * sample, rel=0.02)
    assert forecast.recomputed_activations(dataclasses.replace(
        run, model=dataclasses.replace(run.model, name="RN50")
    )) is None  # fmt: skip


def test_a_pool_that_is_not_there_is_missing(corpus, monkeypatch):
    few = {name: each for name, each in corpus.datasets.items() if each.role != "substitute"}
    monkeypatch.setattr(
        preflight, "load_run_data", lambda run: dataclasses.replace(corpus, datasets=few)
    )
    tree = config.override({}, ["mixture.pool=substitute"])
    found = preflight._check_data(config.parse(tree))
    assert (found.state, "these data have no such pool" in found.sentence) == (
        preflight.MISSING,
        True,
    )
    assert preflight._check_data(config.parse({})).state == preflight.PRESENT


def test_doctor_finds_the_embedded_set_up(corpus):
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert f"{len(base_seeds('small'))} of small" in result.output
    result = CliRunner().invoke(cli.app, ["doctor", "--profile", "quick"])
    assert result.exit_code == 0, result.output


def test_doctor_misses_data_and_packages(monkeypatch):
    def nothing(*_):
        raise CmpError("run `cmpt data build`")

    required = ["torch>=2", "numpy>=99", "no_such_thing>=1,<2", 'no_extra>=1; extra == "ray"']
    monkeypatch.setattr(packed, "load_embedded", nothing)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    found = {check.what: check for check in preflight.check_setup()}
    assert found["data"].state == found["packages"].state == preflight.MISSING
    assert "cmpt data build" in found["data"].sentence
    assert found["packages"].sentence.startswith("numpy>=99, no_such_thing<2,>=1: ")


def test_weights_that_are_nowhere_are_missing_in_words():
    def state(*settings):
        [found] = [
            check
            for check in preflight.check_run(
                config.parse(config.override({}, settings)), "cpu", ExecutionConfig()
            )[0]
            if check.what == "weights"
        ]
        return found

    assert state().state == preflight.PRESENT
    assert "cmpt pretrain small" in state("seeds.init=99").sentence
    assert "neither a file nor a tag" in state("model.start=x.pt").sentence


@pytest.mark.parametrize(
    ("card", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("Tesla T4", "t4"),
        ("a card of another kind", None),
    ],
)
def test_a_card_is_found_in_the_table_by_its_name(monkeypatch, card, device):
    monkeypatch.setattr(devices, "device_name", lambda device: card)
    assert devices.find_device("cuda") == devices.DEVICES.get(device)


def test_a_full_run_is_forecast_without_computing(monkeypatch):
    monkeypatch.setattr(forecast, "_measure_step", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [seconds] = forecast.forecast_seconds([GPU], "cuda")
    assert seconds == pytest.approx(20 * 1428 * forecast.estimate_step(GPU, "h100").seconds)


@pytest.mark.parametrize(
    "chapter", ["methods", "merging", "rates", "scaling", "orders", "mixtures", "recipe"]
)
def test_a_study_s_live_settings_are_told_in_the_profile_s_terms(chapter):
    study = studies.load_study(chapter)
    live = study.configs("gpu", 1, live_only=True)
    assert live
    for (name, _), run_config in live.items():
        assert run_config.model == GPU.model
        assert run_config.training.batch == GPU.training.batch
        cpu = study.configs("cpu", 1)[name, 0]
        ratio = run_config.schedule.peak / GPU.schedule.peak
        usual = config.profile("cpu")["schedule"]["peak"]
        assert ratio == pytest.approx(cpu.schedule.peak / usual, rel=0.01)
        steps = run_config.training.steps / GPU.training.steps
        assert steps == pytest.approx(cpu.training.steps / 40, rel=0.01)


def test_a_study_written_for_a_card_keeps_its_values_and_plans_all_its_runs():
    configs = studies.load_study("first-h100").configs("gpu")
    assert configs["plain, fresh, peak 3e-06", 0].schedule.peak == 3e-6
    assert configs["recipe, peak 1e-05", 0].training.steps == GPU.training.steps
    result = CliRunner().invoke(cli.app, ["study", "first-h100", "--dry-run"])
    assert result.exit_code == 0
    assert f"runs: {len(configs)}" in result.output
    mixed = CliRunner().invoke(cli.app, ["study", "first-h100", "front", "--dry-run"])
    assert isinstance(mixed.exception, CmpError) and "--profile" in str(mixed.exception)


def test_a_profile_that_sets_no_steps_and_no_tasks_has_the_default_ones(monkeypatch):
    own = {"model": config.PROFILES["gpu"]["model"], "schedule": {"peak": 1e-4}}
    monkeypatch.setitem(config.PROFILES, "more", own)
    monkeypatch.setattr(studies, "FOREIGN_MODEL_PROFILES", ("more",))
    changes = {"schedule.peak": 0.00126, "training.steps": 80, "stream.tasks": 10}
    scaled = {"schedule.peak": 2e-4, "training.steps": 80, "stream.tasks": 4}
    assert studies.translate_changes(changes, "more") == scaled


def test_other_profiles_take_a_study_as_it_is():
    changes = {"schedule.peak": 0.1234567, "training.steps": 7, "model.name": "tiny-vit"}
    assert studies.translate_changes(changes, "cpu") is changes
    assert studies.is_translatable(changes, "quick")
    assert not studies.is_translatable(changes, "gpu")


@no_card
def test_a_chapter_of_profile_gpu_needs_a_card(capsys):
    given = {"profile": "gpu", "seeds": 1, "jobs": 2, "device": "cpu"}
    with pytest.raises(CmpError, match="profile gpu: needs a GPU; choose quick or cpu"):
        chapter_setup.begin_chapter(scope := dict(given), studies.load_study("rates"))
    assert scope == given
    assert capsys.readouterr().out == ""


def test_the_profile_decides_where_runs_are_computed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "check_device", lambda device: None)
    given = {"profile": "gpu", "seeds": 1, "jobs": 2, "device": "cpu"}
    scope = dict(given)
    for _ in range(2):  # the cell is run again
        chapter_setup.begin_chapter(scope)
        assert (scope["device"], scope["jobs"]) == ("cuda", 4)


@no_card
def test_the_library_refuses_a_device_before_it_reads_or_downloads(monkeypatch, tmp_path):
    def forbidden(*given, **named):
        pytest.fail("read or downloaded")

    for place, name in ((launch, "resolve_run"), (update, "plan_update"), (tuning, "plan_update")):
        monkeypatch.setattr(place, name, forbidden)
    for start in (
        lambda: cmp.run("gpu"),
        lambda: cmp.update("ViT-B-16:openai", tmp_path, tmp_path / "out"),
        lambda: cmp.tune("small", tmp_path, folder=tmp_path, device="cuda"),
        lambda: cmp.compare(("ViT-B-16", None), ("small", None), None),
    ):
        with pytest.raises(CmpError, match="device 'cuda': cannot be used here"):
            start()


class PretendedWorker:
    """A worker without a process; it answers as soon as it is asked, or dies once on card 2."""

    made: ClassVar[list] = []

    def __init__(self, device, jobs):
        self.device, self.jobs = device, jobs
        self.signal, self.process = lambda number: False, SimpleNamespace(kill=lambda: None)
        self.pipe, theirs = multiprocessing.Pipe()
        self.pipe.send, is_first = self.ask, device not in {w.device for w in self.made}
        self.theirs, self.dies = theirs, device == "cuda:2" and is_first
        self.made.append(self)

    def ask(self, run_config):
        if self.dies:
            self.theirs.close()
        else:
            self.theirs.send(None)

    def death(self):
        return "killed"


def test_a_study_s_runs_are_placed_on_all_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(workers, "_Worker", PretendedWorker)
    PretendedWorker.made = []
    runs = [config.parse(config.override(GPU.to_dict(), [f"seed={n}"])) for n in range(4)]
    assert workers.default_jobs("cuda") == 4
    done = []
    assert workers.run_locally(runs, 4, "cuda", done.append, StopRequest()) == {}
    assert sorted(done, key=lambda run: run.seeds.init) == runs
    assert [worker.device for worker in PretendedWorker.made[:4]] == [
        "cuda:0", "cuda:1", "cuda:2", "cuda:3",
    ]  # fmt: skip
    assert [worker.device for worker in PretendedWorker.made[4:]] in ([], ["cuda:2"])
    assert {worker.jobs for worker in PretendedWorker.made} == {4}
    assert workers.default_jobs("cpu") == 2
    assert workers.list_devices("cpu") == ["cpu"]


FOUR_CARDS = '''
import multiprocessing
from types import SimpleNamespace
import torch
from cmp import config, training
from cmp.runs import forecast
from lab.evidence import workers
from cmp.scale import devices

made = []


class Worker:
    """It has no process, notes its runs, and says at once that they are done."""

    def __init__(self, device, jobs):
        self.device, self.runs = device, []
        self.signal, self.process = lambda number: False, SimpleNamespace(kill=lambda: None)
        self.pipe, self.theirs = multiprocessing.Pipe()
        self.pipe.send = lambda run: (self.runs.append(run), self.theirs.send(None))
        made.append(self)


def forbidden(*arguments, **named):
    raise AssertionError("computed in the notebook's own process")


workers._Worker = Worker
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 4
torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
devices.check_device = lambda device: None
training.train_step = forecast._measure_step = forbidden
config.PROFILES["gpu"] |= {"data": DATA}
config.PROFILES["gpu"]["model"] = {"name": "ViT-B-16", "start": "random"}
config.PROFILES["gpu"]["stream"] = {"tasks": 2}
'''


@pytest.mark.long
def test_a_headless_chapter_places_its_runs_on_all_cards(tmp_path, monkeypatch):
    """Through papermill: four replicates of each setting, a worker per card, nothing computed."""
    import nbformat
    import papermill

    for place, role in enumerate(("adapt", "pool", "eval")):
        names = [f"{word} {place}" for word in ("fox", "owl", "oak", "elm")]
        classes(tmp_path / role, names, 400 if role == "pool" else 150)
        about = {"name": role, "title": role, "role": role, "licence": "own",
                 "reader": {"kind": "folder", "path": role}}  # fmt: skip
        (tmp_path / f"{role}.yaml").write_text(json.dumps(about))
    [source] = chapters.select(["04"])
    notebook = chapters.notebook(source)
    last = next(n for n, c in enumerate(notebook.cells) if "compute_live(" in c.source)
    cells = [c for c in notebook.cells[: last + 1] if c.cell_type == "code"]
    cells = [*cells[:3], cells[-1]]  # its beginning, and what its runs are computed by
    cells[-1].source = next(x for x in cells[-1].source.splitlines() if "compute_live(" in x)
    mocked = nbformat.v4.new_code_cell(FOUR_CARDS.replace("DATA", repr(str(tmp_path))))
    placed = nbformat.v4.new_code_cell("print(sorted((w.device, len(w.runs)) for w in made))")
    notebook.cells = [cells[0], mocked, *cells[1:], placed]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(notebook, path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "data").symlink_to((build_folder() / "data").resolve())
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    given = {"profile": "gpu", "seeds": 4, "jobs": 2, "device": "cpu"}
    done = papermill.execute_notebook(
        str(path), str(path), given, progress_bar=False, kernel_manager_class=run.kernel_manager(),
        resources={"metadata": {"path": str(source.parent)}},
    )  # fmt: skip
    said = done.cells[-1].outputs[-1]["text"]
    assert [device for device, _ in ast.literal_eval(said)] == [f"cuda:{n}" for n in range(4)]
    live = studies.load_study("rates").live
    assert sum(count for _, count in ast.literal_eval(said)) == 4 * len(live)
