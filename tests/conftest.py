"""Shared by all tests: the built benchmark, and one thread so that two runs agree to the bit."""

import contextlib
import fcntl
import shutil
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from cmp import registry
from cmp.embedded import packed
from tests import options

LONGEST = (
    "test_site.py", "browser/test_explorers.py", "test_months.py", "test_book.py",
    "test_foreign.py", "test_parts.py", "test_resume.py", "test_runs.py", "browser/test_site.py",
    "test_budgets.py", "test_fast.py", "test_explorers.py", "test_studies.py", "test_kill.py",
    "test_groups.py", "test_cluster.py", "test_h100.py",
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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Select a part of the tests, and begin with the files that take longest, so that no process
    works on one of them alone at the end; the order within a file stays."""
    number, parts = map(int, config.getoption("part").split("/"))
    chosen = {*sorted(item.nodeid for item in items)[number - 1 :: parts]}
    items[:] = [item for item in items if item.nodeid in chosen]  # they were shuffled before
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Before a test's fixtures: an earlier test may have called a command that sets the threads, or
    have drawn numbers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session):
    """Before any process runs tests, the first of them writes the list that the tests of
    `stream.order=listed` follow: flags, by name. A lock says that it is in use."""
    if is_first(session.config):
        session.config.lock = open(__file__)  # noqa: SIM115 - until the last test
        fcntl.flock(session.config.lock, fcntl.LOCK_SH)
        session.config.listed = options.write_list()
    return (yield)


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


@pytest.fixture(scope="session")
def corpus():
    """The whole embedded benchmark, as `make test` built it."""
    return packed.load_embedded()


@pytest.fixture
def build(tmp_path, monkeypatch):
    """The path of a build folder of the test's own, which has no data."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    return tmp_path / "build"


@pytest.fixture
def own_options():
    """What a test registers is gone afterwards."""
    before = {kind: dict(registry.options_of(kind)) for kind in registry.KINDS}
    yield
    for kind, known in before.items():
        registry.options_of(kind).clear()
        registry.options_of(kind).update(known)


@pytest.fixture
def clean_drawing():
    """Figures drawn without a screen, without a warning, and all of them closed."""
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # garbage of other tests' kernels (event loops) may be collected while this one draws
        warnings.simplefilter("ignore", ResourceWarning)
        yield
    assert plt.get_fignums() == []


@pytest.fixture(scope="session")
def pages(tmp_path_factory, request):
    """The folder of the built site; of several processes the first that asks builds it. Its
    explorers count no network but ours, as to count the FLOPs of a ViT-B/16 takes half a minute.
    The site that a reader has built stays."""
    from lab import (
        kernel_explorers,
        site,
    )  # here, since the process that starts others needs neither

    shared = tmp_path_factory.getbasetemp()
    if not is_first(request.config):
        shared = shared.parent
    told = shared / "pages"
    with FileLock(f"{told}.lock"):
        if not told.exists():
            with pytest.MonkeyPatch.context() as patch:
                for explorer in ("budget", "planner"):
                    patch.setitem(kernel_explorers.SHEET[explorer]["site"], "model", ["small"])
                build = Path(__file__).parents[1] / "_build"
                built, kept, tested = (build / f"html{part}" for part in ("", "-kept", "-tested"))
                if built.exists() and not kept.exists():
                    built.rename(kept)
                shutil.rmtree(tested, ignore_errors=True)
                try:
                    site.make_site().rename(tested)
                finally:
                    if kept.exists():
                        shutil.rmtree(built, ignore_errors=True)
                        kept.rename(built)
                told.write_text(str(tested))
    return Path(told.read_text())


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder of three months of pictures, which no test changes."""
    import months  # here, as in `pages`

    folder = tmp_path_factory.mktemp("months") / "data"
    months.write_pictures(folder, 3)
    return folder
