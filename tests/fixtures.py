"""What tests share: the built benchmark and site, and one thread, so two runs agree to the bit."""

import shutil
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import months
import pytest
import torch
from filelock import FileLock

from cmp import models, registry, seeds, starts
from cmp.config import Model
from cmp.embedded import packed
from lab import kernel_explorers, site
from tests.conftest import is_first


def pytest_configure(config):
    """With `--variant N`, let tests draw other weights and other data."""
    if variant := config.getoption("variant"):
        shift_seeds(variant)


def shift_seeds(by):
    """Add a number to all seeds, and to the number of the base that the default model starts from.

    What another process computes is left as it is.
    """
    digest, create, fetch = seeds.digest, models.create_fused_model, starts.fetch_weights
    usual = Model()

    class Shifted(torch.Generator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + by)

    torch.Generator = Shifted
    seeds.digest = lambda *parts: digest(*parts, by)
    models.create_fused_model = lambda name, seed=0: create(name, seed + by)
    starts.fetch_weights = lambda model, seed: fetch(model, seed + by * (model == usual))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before a test's fixtures: an earlier test may have called a command that sets the threads, or
    have drawn numbers."""
    variant = item.config.getoption("variant")
    torch.set_num_threads(1 + variant // 2 % 2)
    torch.backends.mkldnn.enabled = variant % 2 == 0
    torch.manual_seed(variant)


@pytest.fixture(autouse=True)
def tolerances_in_fp32_only():
    """Let `torch.testing.assert_close` fail in a test that has computed in bf16, whatever it
    compares: some processors' bf16 makes a small difference large, and others' hides it. Fixtures
    of a wider scope, and other ways to compare, are not checked."""
    enter, compare, entered = torch.autocast.__enter__, torch.testing.assert_close, []

    def watch(context):
        enter(context)
        entered.extend([True] * torch.is_autocast_enabled(context.device))
        return context

    def compare_in_fp32(*numbers, **tolerance):
        words = "the test computed in bf16: set training.precision=fp32, or compare bit for bit"
        assert not entered, words
        compare(*numbers, **tolerance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autocast, "__enter__", watch)
        patch.setattr(torch.testing, "assert_close", compare_in_fp32)
        yield


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
    shared = tmp_path_factory.getbasetemp()
    if not is_first(request.config):
        shared = shared.parent
    told = shared / "pages"
    with FileLock(f"{told}.lock"):
        if not told.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(kernel_explorers.SHEET["budget"]["site"], "model", ["small"])
                build = Path(__file__).parents[1] / "_build"
                built, kept, tested = (build / f"html{part}" for part in ("", "-kept", "-tested"))
                if built.exists() and not kept.exists():
                    built.rename(kept)
                left = site.THEME / "public" / "explorers", tested  # by an earlier edition
                for folder in left:
                    (folder / "gone").mkdir(parents=True, exist_ok=True)
                    (folder / "gone" / "index.html").touch()
                shutil.rmtree(tested)
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
    folder = tmp_path_factory.mktemp("months") / "data"
    months.write_pictures(folder, 3)
    return folder
