"""How the tests are run: which of them, in which order, and what is there before the first."""

import contextlib
import fcntl
from pathlib import Path

import pytest
from hypothesis import settings

LONGEST = (
    "test_site.py", "test_months.py", "test_kill.py", "browser/test_site.py", "test_resume.py",
    "browser/test_explorers.py", "test_golden.py", "test_explorers.py", "test_budgets.py",
    "test_cli.py", "test_forecast.py", "test_gpu_profile.py", "test_results.py", "test_verdicts.py",
    "test_book.py", "test_foreign.py", "test_parts.py", "test_runs.py", "test_studies.py",
    "test_loader.py", "test_logs.py", "test_going_on.py", "test_planner.py", "test_steps.py",
    "test_values.py", "test_readers.py", "browser/test_report.py", "test_hostile.py",
    "test_fast.py", "test_methods.py", "test_merge_files.py", "test_groups.py", "test_compare.py",
    "test_cluster.py", "test_h100.py",
)  # fmt: skip
"""The files that take longest, in the order in which they begin. Between the two that need the site
built are others, so that no process waits for another to build it."""

# How long an example takes is the machine's affair, and says nothing of what is tested.
settings.register_profile("suite", deadline=None, max_examples=25)
settings.register_profile("deep", deadline=None, max_examples=500)
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--part", metavar="K/N", default="1/1",
        help="run a part of the tests: every N-th, from the K-th on",
    )  # fmt: skip
    parser.addoption(
        "--variant", metavar="N", type=int, default=0,
        help="add N to all seeds; odd ones compute without oneDNN, and 2, 3, 6, 7 on two threads",
    )  # fmt: skip


def pytest_configure(config):
    """Load the fixtures, and with them torch and the package, only where tests run: the process
    that starts others need not wait for them."""
    if not (is_first(config) and getattr(config.option, "numprocesses", None)):
        config.pluginmanager.import_plugin("tests.fixtures")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Select a part of the tests, and begin with the files that take longest, so that no process
    works on one of them alone at the end; the order within a file stays."""
    number, parts = map(int, config.getoption("part").split("/"))
    chosen = {*sorted(item.nodeid for item in items)[number - 1 :: parts]}
    items[:] = [item for item in items if item.nodeid in chosen]  # they were shuffled before
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session):
    """Before any process runs tests, the first of them writes the list that the tests of
    `stream.order=listed` follow: flags, by name. A lock says that it is in use."""
    result = yield  # in which the other processes start
    if is_first(session.config):
        from tests import options

        session.config.lock = open(__file__)  # noqa: SIM115 - until the last test
        fcntl.flock(session.config.lock, fcntl.LOCK_SH)
        session.config.listed = options.write_list()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session):
    """After the last test of all processes, unless another session of this checkout goes on."""
    result = yield
    if is_first(session.config):
        with session.config.lock as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            session.config.listed.unlink(missing_ok=True)
    return result


def is_first(config: pytest.Config) -> bool:
    """Whether this process started the others, if there are any."""
    return not hasattr(config, "workerinput")
