"""What a chapter says in its first cell, and what a kernel's interrupt leaves of a long one."""

import asyncio
import time

import pytest
from forked import small_config, small_corpus

from cmp import config, data
from cmp.errors import CmpError
from cmp.project import build_folder
from cmp.runs import checkpoints, forecast, identity, launch, store
from cmp.runs.lookup import unfinished_runs
from lab import chapter_setup, run
from lab.evidence import results, studies

PARAMETERS = {"profile": "quick", "seeds": 2, "jobs": 2, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _corpus():
    """The corpus is read while the data are in sight."""
    small_corpus()


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build folder of the test's own, with the small corpus; every run is forecast at 7 s."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(data, "load_entry", lambda group, name: small_corpus)
    monkeypatch.setattr(
        forecast, "forecast_seconds", lambda configs, device: [7.0 for _ in configs]
    )
    return tmp_path / "build"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "1 s"), (6.9, "5 s"), (7.2, "10 s"), (17, "20 s"), (40, "45 s"), (54, "1 min"),
        (3000, "45 min"), (4000, "1 h"), (20 * 3600, "20 h"), (3 * 86400, "2 days"),
    ],
)  # fmt: skip
def test_times_are_rounded_to_what_is_easily_said(seconds, words):
    assert chapter_setup.round_time(seconds) == words


def test_what_is_stored_is_told_with_what_it_took_and_what_is_missing_with_its_forecast(build):
    grid = [small_config(f"seed={seed}") for seed in range(3)]
    assert chapter_setup.run_status(grid, [], 1, "cpu") == (
        "Stored: 0 of 3 live runs. To compute: 3, about 20 s."
    )
    assert "To compute: 3, about 10 s." in chapter_setup.run_status(grid, [], 2, "cpu")
    launch.run_one(grid[0])
    twice = [*grid, grid[0]]  # two settings may come to one run
    text = chapter_setup.run_status(twice, [], 1, "cpu")
    took = store.load_record(identity.run_id_of(grid[0], small_corpus()))[0].provenance["seconds"]
    assert text == (
        f"Stored: 1 of 3 live runs, which took about {chapter_setup.round_time(took)}. "
        "To compute: 2, about 10 s."
    )
    assert chapter_setup.run_status(twice, [], 1, "cpu") == text
    assert chapter_setup.run_status(grid[:1], [], 1, "cpu").endswith("To compute: none.")
    assert (
        chapter_setup.run_status([], grid, 1, "cpu")
        == "Computed at every reading and not stored: about 20 s."
    )


def test_a_chapter_begins_with_its_parameters_checked_and_its_live_runs(build, capsys, monkeypatch):
    study, restored = studies.load_study("recipe"), []
    monkeypatch.setattr(results, "restore_runs", lambda *given: restored.append(given))
    live = chapter_setup.begin_chapter(dict(PARAMETERS), study)
    assert live == study.configs("quick", 2, live_only=True)
    words = "Profile quick, device cpu, jobs 2. Stored: 0 of 6 live runs. To compute: 6, about "
    assert capsys.readouterr().out.startswith(words)
    assert chapter_setup.begin_chapter(PARAMETERS | {"profile": "cpu"}, study) == study.configs(
        "cpu", 2
    )
    assert restored == [(study, "quick"), (study, "cpu")]  # published at the size of each
    changed = chapter_setup.begin_chapter(dict(PARAMETERS), {"half": ["schedule.peak=0.0005"]})
    assert list(changed) == [("half", 0), ("half", 1)]
    tree = config.override(config.profile("quick"), ["schedule.peak=0.0005", "seed=1"])
    assert changed["half", 1] == config.parse(tree)
    capsys.readouterr()
    assert chapter_setup.begin_chapter(dict(PARAMETERS), uncached=[small_config()]) == {}
    assert (
        "jobs 2. Computed at every reading and not stored: about 10 s." in capsys.readouterr().out
    )
    cell = "profile: str = 'quick'\nseeds: int = 2\njobs: int = 2\ndevice: str = 'cpu'"
    declared = {"In": ["", f"{cell}\npictures: str = ''\npeak: float = 0.1"]}
    chapter_setup.begin_chapter({**declared, **PARAMETERS, "pictures": "", "peak": 0.1})
    assert "Live: quick, peak=0.1." in capsys.readouterr().out  # an empty text says nothing
    with pytest.raises(CmpError, match="-1 must be at least 1"):
        chapter_setup.begin_chapter({"In": ["", cell], **PARAMETERS, "seeds": -1}, study)


SECONDS = 300
COMPUTE = """from cmp import config
from lab.evidence import studies
changes = ["stream.tasks=1", "training.steps=120", "training.batch=8", "evaluation.subset=1"]
grid = [config.parse(config.override(config.profile("quick"), changes))]
studies.compute_runs(grid)"""


async def interrupted(folder):
    """A kernel that computes a run, is interrupted in it, and asked again: what both cells sent,
    and the checkpoint between them."""
    manager = run.kernel_manager()()
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=SECONDS)

        async def stop():
            end = time.monotonic() + SECONDS
            while not list(folder.glob("*/task-0-step-0-*")) and time.monotonic() < end:
                await asyncio.sleep(0.05)
            await manager.interrupt_kernel()

        sent = []
        stopper = asyncio.create_task(stop())
        await client.execute_interactive(COMPUTE, timeout=2 * SECONDS, output_hook=sent.append)
        await stopper
        state = checkpoints.latest_checkpoint(next(folder.iterdir()))[1]
        again = []
        reply = await client.execute_interactive(
            COMPUTE, timeout=2 * SECONDS, output_hook=again.append
        )
        return sent, state, again, reply
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


@pytest.mark.long
def test_an_interrupted_cell_leaves_a_sentence_and_a_state_and_goes_on(tmp_path, monkeypatch):
    data = build_folder().resolve() / "data"
    (tmp_path / "data").symlink_to(data)
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    sent, state, again, reply = asyncio.run(interrupted(tmp_path / "runs"))
    errors = [each["content"] for each in sent if each["msg_type"] == "error"]
    assert [each["traceback"] for each in errors] == [
        [
            "stopped with 1 runs to go; repeat the command to continue; in a notebook, run the "
            "cell again"
        ]
    ]
    assert (state.progress.task, 0 <= state.progress.step < 120) == (0, True)
    assert reply["content"]["status"] == "ok"
    assert [each for each in again if each["msg_type"] == "error"] == []
    assert [store.load_run(run_id).id for run_id in store.stored_ids()] == [state.progress.run]
    assert unfinished_runs() == []


def test_a_chapter_computes_its_runs_beside_other_events(tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(build_folder().resolve() / "data")
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    runs = {("one", 0): small_config("stream.tasks=1", "training.steps=1")}
    asyncio.run(chapter_setup.compute_live(runs, 1, "cpu"))
    assert len(store.stored_ids()) == 1
