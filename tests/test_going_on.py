"""A run from the weights that another one ended in, and what becomes of one that was stopped."""

import io
import json
import os
import re
import tomllib
import warnings
from pathlib import Path
from signal import SIGTERM

import forked
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tqdm import tqdm
from typer.testing import CliRunner

from cmp import budgets, cli, config, evaluation, models, starts
from cmp.cli import computing
from cmp.embedded import packed
from cmp.errors import CmpError, Interrupted
from cmp.files import SHORT_ID
from cmp.project import project_folder
from cmp.releases import hub
from cmp.runs import checkpoints, identity, launch, logs, lookup, store
from cmp.runs.launch import from_keywords, resolve_run
from cmp.runs.lookup import unfinished_runs
from cmp.runs.runner import Observer
from cmp.scale import processes
from cmp.scale.execution import ExecutionConfig
from cmp.training import StepResult
from lab import live_runs

invoke = CliRunner().invoke
QUICK = [*forked.SETTINGS, "stream.tasks=2", "evaluation.subset=30", "evaluation.full=false"]
EMA = [*QUICK, "merging.policy=ema", "schedule.peak=0.01"]


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    """A build folder of the test's own, and data that are read at once."""
    corpus = forked.small_corpus()
    monkeypatch.setattr(packed, "load_embedded", lambda *roles: corpus)
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    return tmp_path


def computed(*settings):
    """The run of a command, its weights kept, and what the command said."""
    result = invoke(cli.app, ["run", "quick", *settings, "--keep-weights"])
    assert result.exit_code == 0, result.exception
    run_id = store.stored_ids()[-1]
    assert f"run {run_id}" in result.output
    return store.load_run(run_id)


def refused(*words):
    error = invoke(cli.app, [*words]).exception
    assert isinstance(error, CmpError), error
    return str(error)


def scores(run, task):
    rows = run.metrics[run.metrics["task"] == task]
    return rows[["scope", "dataset", "score"]].reset_index(drop=True)


def test_month_by_month_a_run_goes_on_from_the_one_before(build):
    march = computed(*EMA)
    april = computed(*QUICK, f"model.start=run:{march.id[:6]}", "seeds.stream=1")
    may = computed(*QUICK, f"model.start=run:{april.id}", "method.name=lora")
    for before, after in ((march, april), (april, may)):
        pd.testing.assert_frame_equal(scores(before, 2), scores(after, 0))
        assert after.provenance["parent"] == before.id
        assert after.config.model.start == f"run:{before.id}"
        assert after.weights != before.weights
    assert "parent" not in march.provenance
    assert invoke(cli.app, ["results", "verify", may.id[:6]]).output.count("bitwise equal") == 1
    section = config.Model("small", f"run:{april.id[:8]}")
    assert models.weights_digest(models.load_model(section, 0)) == april.weights


def test_a_parent_counts_by_its_weights_as_an_exported_file_does(build):
    parent = computed(*EMA)
    file = build / "exported.safetensors"
    assert invoke(cli.app, ["export", parent.id[:6], "-o", str(file)]).exit_code == 0
    ids = {
        identity.run_id_of(forked.small_config(f"model.start={start}"))
        for start in (f"run:{parent.id}", f"run:{parent.id[:5]}", file)
    }
    assert len(ids) == 1
    other = computed(*EMA, "seeds.data=1")
    assert identity.run_id_of(forked.small_config(f"model.start=run:{other.id}")) not in ids


def test_a_run_that_cannot_be_gone_on_from_is_refused_in_a_sentence(build):
    parent = computed(*EMA)
    start = f"model.start=run:{parent.id[:6]}"
    say = refused("run", "quick", *QUICK, start, "model.name=tiny")
    assert say.startswith(
        f"model.start: run {parent.id[:SHORT_ID]} has the model 'small', not 'tiny'"
    )
    say = refused("run", "quick", *QUICK, "model.start=run:fff0")
    assert "'fff0': no stored run with this id; `cmpt results ls`" in say
    assert "run:ID" in refused("run", "quick", *QUICK, "model.start=run:../x")
    path = store.weights_path(parent.id)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "weights.safetensors is damaged" in refused("run", "quick", *QUICK, start)
    path.unlink()
    assert "--keep-weights" in refused("run", "quick", *QUICK, start)
    planned = invoke(cli.app, ["run", "quick", *QUICK, start, "--dry-run"])
    assert planned.exit_code == 1 and "--keep-weights" in planned.output
    assert store.stored_ids() == [parent.id[:SHORT_ID]]


def test_a_trial_that_is_stopped_earlier_has_failed(monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("stopped after 0 tasks and 7 steps", SIGTERM)

    monkeypatch.setattr(launch, "compute", stopped)
    with pytest.raises(Interrupted, match="7 steps"):
        invoke(cli.app, ["run", "quick", *EMA, "--stop-after", "1"])


def test_a_trial_stops_after_some_updates_is_listed_and_goes_on():
    whole = computed(*EMA)
    name = whole.id[:SHORT_ID]
    assert invoke(cli.app, ["results", "rm", name]).exit_code == 0
    trial = invoke(cli.app, ["run", "quick", *EMA, "--keep-weights", "--stop-after", "1"])
    assert trial.exit_code == 0 and "the same command without --stop-after" in trial.output
    again = invoke(cli.app, ["run", "quick", *EMA, "--keep-weights", "--stop-after", "1"])
    assert again.exit_code == 0 and "after update" not in again.output
    listed = invoke(cli.app, ["results", "ls"], env={"COLUMNS": "200"}).output
    last = live_runs.scores_on_way(whole).loc[1]
    assert re.search(rf"{name} +1 of 2 updates +subset", listed)
    assert all(f"{value:.1f}" in listed for value in last)
    shown = invoke(cli.app, ["results", "show", name[:6]]).output
    assert "stream.tasks: 2" in shown and "final weights" not in shown
    assert computed(*EMA).weights == whole.weights


def test_a_finished_run_of_0_3_is_read_and_an_unfinished_one_refused(build, monkeypatch):
    """0.3 kept checkpoints and logs in two other folders, each with one of a run's name."""
    finished, log = computed(*QUICK), logs.log_path(store.stored_ids()[0])
    (build / "logs").mkdir()
    log.rename(build / "logs" / f"{log.parent.name}.jsonl")
    assert {path.name for path in log.parent.iterdir()} <= {*store.FILES}
    invoke(cli.app, ["run", "quick", *EMA, "--stop-after", "1"])
    [progress] = unfinished_runs()
    name = progress.run[:SHORT_ID]
    (build / "checkpoints").mkdir()
    checkpoints.run_folder(name).rename(build / "checkpoints" / name)
    for options in ((), ("--dry-run",)):
        say = refused("run", "quick", *EMA, *options)
        assert say.startswith(
            f"{build / 'checkpoints' / name}: version 0.3 left this run unfinished"
        )
        assert say.endswith("finish it with 0.3, or delete this folder to start again")
    monkeypatch.setattr(launch, "execute", pytest.fail)
    assert computed(*QUICK).weights == finished.weights
    listed = invoke(cli.app, ["results", "ls"], env={"COLUMNS": "200"}).output
    assert finished.id[:SHORT_ID] in listed and name not in listed
    assert invoke(cli.app, ["results", "show", finished.id[:6]]).exit_code == 0


def test_a_file_of_settings_is_run_from_python_and_its_stream_shown(build):
    (build / "plan.yaml").write_text("stream: {tasks: 3}\nschedule: {peak: 0.001}\n")
    finished = launch.run(
        build / "plan.yaml", steps=1, batch=9, full=False, subset=1, progress=False
    )
    assert finished.config.stream.tasks == 3
    path = str(build / "plan.yaml")
    plan = from_keywords(path, {"steps": 7})
    assert (plan.stream.tasks, plan.schedule.peak, plan.training.steps) == (3, 0.001, 7)
    shown = invoke(cli.app, ["stream", "show", "--profile", path, *forked.SETTINGS])
    assert shown.exit_code == 0, shown.exception


def test_an_unfinished_run_does_not_hide_a_stored_one():
    parent = computed(*QUICK)
    name = parent.id[:4] + "0" * 8
    folder = checkpoints.run_folder(name)
    folder.mkdir(parents=True)
    (folder / f"task-0-step-1-{'c' * 64}.safetensors").touch()
    section = config.Model("small", f"run:{parent.id[:4]}")
    assert lookup.find_parent(config.RunConfig(model=section)).id == parent.id


def test_keywords_mean_the_same_in_any_order():
    """A whole section does not undo a key of it that is given by itself."""
    settings = {"peak": 0.01, "schedule": config.Schedule("wsd")}
    for order in (settings, dict(reversed(settings.items()))):
        schedule = from_keywords("quick", order).schedule
        assert (schedule.name, schedule.peak) == ("wsd", 0.01)
    with pytest.raises(CmpError, match=r"seed: seeds=cmp\.Seeds"):
        from_keywords("quick", {"seed": 7, "seeds": config.Seeds(stream=3)})


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"steps": np.int64(4)}, {"steps": 4}),
        ({"peak": np.float32(0.5)}, {"peak": 0.5}),
        ({"evaluation": {"full": np.bool_(True)}}, {"evaluation": {"full": True}}),
        ({"training": {"passes": np.float32(2)}}, {"training": {"passes": 2.0}}),
        ({"data": Path("pictures")}, {"data": "pictures"}),
        ({"model": {"start": Path("a/b.npz")}}, {"model": {"start": "a/b.npz"}}),
    ],
)
def test_numbers_of_numpy_and_paths_are_taken_for_their_plain_values(given, plain):
    assert from_keywords("quick", given) == from_keywords("quick", plain)


@pytest.mark.parametrize("value", [{1}, b"4", object(), np.array([4, 5]), 4j])
def test_what_no_setting_can_hold_is_refused_in_words(value):
    with pytest.raises(CmpError, match=r"run 'quick': .*: give a number, a text, a list or a map"):
        from_keywords("quick", {"steps": value})


@pytest.mark.parametrize("profile", config.PROFILES)
def test_the_shell_and_the_library_keep_the_rest_of_a_section(profile):
    usual = config.parse(config.profile(profile)).to_dict()
    for section, keys in usual.items():
        if isinstance(keys, dict):
            for given in ({}, *({key: value} for key, value in keys.items())):
                tree = config.override(config.profile(profile), [f"{section}={json.dumps(given)}"])
                parsed = config.parse(tree)
                assert parsed == from_keywords(profile, {section: given})
                assert parsed.to_dict() == usual


def stopped(*settings, step=6):
    """A run that is stopped after so many steps, of four in a task."""
    seen = []

    def after(task, number, loss, model):
        seen.append((task, number))
        if len(seen) == step:
            os.kill(os.getpid(), SIGTERM)

    tree = config.override(config.profile("quick"), [*QUICK, *settings])
    with pytest.raises(Interrupted):
        launch.run_one(config.parse(tree), Observer(step=after), keep=True)
    [progress] = unfinished_runs()
    return progress


@pytest.mark.parametrize("policy", ["none", "last-all"])
def test_of_a_stopped_run_the_model_after_its_last_task_is_exported(build, policy):
    """What was deployed, whatever training went on from."""
    settings = [f"merging.policy={policy}", "schedule.peak=0.01"]
    progress = stopped(*settings)
    out = ["-o", str(build / "part.safetensors")]
    said = invoke(cli.app, ["export", progress.run[:6], *out]).output
    assert f"run {progress.run[:SHORT_ID]} is not finished: this is its model after 1 of 2" in said
    model = models.load_from_file("small", build / "part.safetensors")
    scored = evaluation.evaluate(model, "small", forked.small_corpus(), subset=30)
    rows = {row["dataset"]: row["score"] for row in progress.metrics if row["task"] == 1}
    assert scored.datasets["score"].to_dict() == rows
    hub = invoke(cli.app, ["export", progress.run[:6], "-o", str(build / "hub"), "--to", "hf"])
    assert hub.exit_code == 0, hub.exception
    assert "# small, after 1 updates" in (build / "hub" / "README.md").read_text()
    [file] = (build / "runs").glob("*/model-1-*")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "damaged" in refused("export", progress.run[:6], *out)
    launch.run_one(config.parse(progress.config), keep=True)
    assert invoke(cli.app, ["export", progress.run[:6], *out]).exit_code == 0


def test_an_export_names_the_package_of_its_model(build, monkeypatch):
    """Which any package may bring."""
    monkeypatch.setattr(starts.family_of("small"), "__name__", "theirs.networks")
    said = invoke(cli.app, ["export", "small:annealed", "-o", str(build / "x.safetensors")]).output
    assert "import theirs.networks first, so that open_clip knows this model" in said
    run = stored(config.parse({"stream": {"tasks": 1}}), 1)
    text = hub.model_card(run, forked.small_corpus())
    assert "from theirs.networks import tokenizer as own_tokenizer" in text


def test_a_card_says_which_distribution_it_needs_and_whose_weights_are_its_base():
    """The package `cmp` of PyPI is somebody else's."""
    project = tomllib.loads((project_folder() / "pyproject.toml").read_text())["project"]
    corpus = forked.small_corpus()
    run = stored(config.parse({"stream": {"tasks": 1}, "seeds": {"init": 3}}), 1)
    text = hub.model_card(run, corpus)
    about = yaml.safe_load(text.split("---\n")[1])
    assert about["license"] == project["license"].lower()
    assert about["base_model"] == "small-s3-annealed" and about["library_name"] == "open_clip"
    for each in text.split("```")[:2]:  # in words, and in the code
        assert project["name"] in each and "`pip install .`" in each


@pytest.mark.parametrize(
    ("name", "start", "base"),
    [
        ("ViT-B-16", "laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        ("ViT-B-16-quickgelu", "openai", "timm/vit_base_patch16_clip_224.openai"),
        ("hf-hub:org/net", "hub", "org/net"),
        ("small", "random", None),
        ("small", "ours.safetensors", None),
    ],
)
def test_a_card_invents_neither_a_licence_nor_a_base(name, start, base, monkeypatch):
    run_config = config.parse({"model": {"name": name, "start": start}})
    monkeypatch.setattr(starts, "hub_config", lambda name: {"model_cfg": {}})  # not to be fetched
    text = hub.model_card(stored(run_config, 1), forked.small_corpus())
    _, head, said = text.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about.get("base_model") == base and "license" not in about
    assert "No licence is known for the weights that training started from" in said


def stored(run_config, tasks):
    """A stored run whose scores are all 1."""
    about = {"scope": "subset", "dataset": "a", "role": "adapt", "score": 1.0}
    metrics = pd.DataFrame([about | {"task": task} for task in range(tasks + 1)])
    provenance = {"seconds": 1.0} | dict.fromkeys(("device", "torch", "open_clip"), "-")
    return store.StoredRun("a", run_config, provenance, metrics, "w")


@pytest.mark.defect
@pytest.mark.parametrize(
    ("setting", "done", "words"),
    [
        ("training.task_steps=[3, 5]", 2, "2 updates of 3 to 5 steps"),
        ("training.task_steps=[3, 5]", 1, "1 updates of 3 steps"),  # it is not finished
        ("training.budget=2", 2, "2 updates of 8 steps"),
        ("training.passes=2", 2, None),  # its number depends on the data
    ],
)
def test_a_model_card_says_how_many_steps_were_computed(setting, done, words):
    run_config = config.parse(config.override(config.profile("quick"), [*QUICK, setting]))
    corpus = forked.small_corpus()
    if words is None:
        first, second = budgets.settle(run_config, corpus).steps
        words = f"2 updates of {min(first, second)} to {max(first, second)} steps"
        assert first != second
    run = stored(run_config, done)
    assert words in " ".join(hub.model_card(run, corpus).split())


def test_a_run_none_of_whose_tasks_is_finished_exports_nothing(build):
    progress = stopped(step=2)
    say = refused("export", progress.run[:6], "-o", str(build / "x.safetensors"))
    assert "no task is finished; repeat the command" in say
    say = refused("export", "fff0", "-o", str(build / "x.safetensors"))
    assert "no stored run with this id" in say


def test_an_id_that_a_stored_and_an_unfinished_run_begin_with_is_refused(build):
    """The stored one was taken."""
    progress = stopped(step=6)
    same = progress.run[:3]
    stored = build / "runs" / (same + "0" * (SHORT_ID - 3))
    stored.mkdir(parents=True)
    (stored / "run.json").write_text("{}")
    for find in (lookup.find_any_run, lookup.find_model):
        with pytest.raises(CmpError, match=f"'{same}': several runs have an id that starts so; "):
            find(same)
        assert find(progress.run)
    stored.joinpath("run.json").rename(checkpoints.run_folder(progress.run) / "run.json")
    assert lookup._progress_of(same) is None  # some of its checkpoints are left


def test_the_options_of_a_run_that_goes_on_are_those_given_now(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(computing, "progress_observer", lambda *_: Observer(step=stop_at_second))
        with pytest.raises(Interrupted, match="the same command continues"):
            invoke(cli.app, ["run", "quick", *QUICK, "--micro-batch", "2"])
    [progress] = unfinished_runs()
    with pytest.warns(match="micro-batches of 4"):
        result = invoke(cli.app, ["run", "quick", *QUICK, "--micro-batch", "4", "--keep-weights"])
    assert result.exit_code == 0, result.exception
    run = store.load_run(progress.run)
    assert run.provenance["execution"] == "micro-batches of 4"
    assert run.provenance["began"]["execution"] == "micro-batches of 2"
    assert store.weights_path(run.id).exists()


def stop_at_second(task, step, loss, model):
    if step == 1:
        os.kill(os.getpid(), SIGTERM)


def test_a_process_that_is_not_the_first_resumes_too_and_prints_nothing(build, monkeypatch, capsys):
    progress = stopped()
    run_config = config.parse(progress.config)
    saved = checkpoints.latest_checkpoint(checkpoints.run_folder(progress.run))
    launch.run_one(run_config, keep=True)  # as the first one does meanwhile
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(processes, "local_slice", lambda count: slice(0, count))
    monkeypatch.setattr(checkpoints, "latest", lambda manager: saved[1])
    capsys.readouterr()
    computing.compute_run(resolve_run(run_config), "cpu", ExecutionConfig(), True, None)
    assert capsys.readouterr() == ("", "")


def test_the_first_of_several_processes_says_that_they_were_stopped(monkeypatch, capfd):
    def stop():
        raise Interrupted("stopped", SIGTERM)

    monkeypatch.setattr(cli, "app", stop)
    monkeypatch.setattr(warnings, "showwarning", None)  # so that it is put back after the test
    for number, said in enumerate(("cmpt: stopped\n", "")):
        monkeypatch.setattr(processes, "rank", lambda number=number: number)
        with pytest.raises(SystemExit, match="143"):
            cli.main()
        assert capfd.readouterr().err == said


def test_a_run_is_removed_and_what_it_freed_is_said(build):
    run = computed(*QUICK)
    with launch.CheckpointManager(run.id):
        assert "another process" in refused("results", "rm", run.id[:6])
    assert "the closest is" in refused("results", "rm", other_end(run.id))
    said = invoke(cli.app, ["results", "rm", run.id]).output
    freed = re.fullmatch(rf"run {run.id[:SHORT_ID]}: deleted, ([\d.]+) MB freed\n", said)
    assert float(freed[1]) > 4  # the weights of 1.2 million parameters
    assert [path for path in build.rglob("*") if run.id[:SHORT_ID] in path.name] == []
    for name in (run.id[:6], "../x"):
        assert "runs have this id" in refused("results", "rm", name)
    progress = stopped(step=6)
    assert "no stored run with this id" in refused("results", "rm", other_end(progress.run))
    assert unfinished_runs() == [progress]
    assert invoke(cli.app, ["results", "rm", progress.run]).exit_code == 0
    assert unfinished_runs() == []


def other_end(run_id):
    """An id of the same first digits, which name the folder."""
    return run_id[:-1] + ("0" if run_id[-1] != "0" else "1")


def test_a_dry_run_counts_what_there_is_and_ends_with_1_where_nothing_could_start(build):
    result = invoke(cli.app, ["run", "quick", *QUICK, "--dry-run"])
    assert result.exit_code == 0, result.exception
    said = " ".join(result.output.split())
    assert re.search(r"new-flags adapt 96 [\d,]+ [\d,]+ [\d,]+", said)
    for words in (
        "the machine has",
        "GB free at",
        "images replayed from the pool",
        "to be computed",
    ):
        assert words in said
    result = invoke(cli.app, ["run", "quick", *QUICK, "seeds.init=77", "--dry-run"])
    assert result.exit_code == 1
    assert "cmpt pretrain small --seed 77" in result.output
    assert result.output.endswith("Not ready: weights. The lines above say why.\n")
    assert not (build / "runs").exists()


def test_progress_is_told_in_pictures_per_second(build):
    bar = tqdm(total=40, file=io.StringIO())
    observer = computing.progress_observer(bar)
    result = StepResult(torch.tensor(1.5), torch.tensor(1.0), 1e-3, samples=64)
    for step in (0, 20):  # a loss is shown when the next is there
        observer.step(0, step, result, torch.nn.Identity())
    assert re.fullmatch(r"[\d,]+ images/s, loss 1\.500", bar.postfix)
    silent = tqdm(total=40, disable=True)
    computing.progress_observer(silent).step(0, 0, result, torch.nn.Identity())
