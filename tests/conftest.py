"""Shared by all tests: the built benchmark, and one thread so that two runs agree to the bit."""

import warnings

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from cmp.book import site
from cmp.data import corpus as corpora
from cmp.data import packed, traits
from cmp.data.manifest import embedded
from cmp.streams import listed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Before a test's fixtures: an earlier test may have called a command that sets the threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imported_stream():
    """The list that the tests of `stream.order=listed` follow: flags, by name."""
    flags = packed.read(embedded()["new-flags"]).header.classes
    path = traits.write(
        listed.table([f"new-flags+++{name}" for name in flags]), "by-hand", "classes"
    )
    yield
    path.unlink()


@pytest.fixture(scope="session")
def corpus():
    """The whole embedded benchmark, as `make test` built it."""
    return corpora.load()


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
def pages():
    """The folder of the built site."""
    return site.make()
