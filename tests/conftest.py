"""Shared by all tests: the built benchmark, and one thread so that two runs agree to the bit."""

import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from cmp.embedded import packed
from lab import site
from tests import options

SLOW = (
    "test_explorers.py", "test_own_options.py", "test_studies.py", "test_kill.py",
    "test_budgets.py", "test_cli.py", "test_site.py", "test_h100.py",
)  # fmt: skip
"""Files of tests that start browsers, kernels or processes."""

# How long an example takes is the machine's affair, and says nothing of what is tested.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process works on one of them alone at the
    end; the order within a file stays."""
    items.sort(key=lambda item: item.path.name not in SLOW)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Before a test's fixtures: an earlier test may have called a command that sets the threads."""
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session):
    """Before any process runs tests, the first of them writes the list that the tests of
    `stream.order=listed` follow: flags, by name."""
    if is_first(session.config):
        session.config.listed = options.write_list()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session):
    """After the last test of all processes."""
    result = yield
    if is_first(session.config):
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
    """The folder of the built site; of several processes the first that asks builds it."""
    shared = tmp_path_factory.getbasetemp()
    if not is_first(request.config):
        shared = shared.parent
    told = shared / "pages"
    with FileLock(f"{told}.lock"):
        if not told.exists():
            told.write_text(str(site.make_site()))
    return Path(told.read_text())
