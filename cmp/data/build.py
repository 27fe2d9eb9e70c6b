"""`cmp data build`: fetch what is missing, make what is stale, in parallel, with a forecast."""

import concurrent.futures
import multiprocessing
import os

from tqdm import tqdm

from cmp.data import packed
from cmp.data.fetch import cache_path, fetch
from cmp.data.manifest import Dataset, load_datasets, load_packages
from cmp.data.recipes import RECIPES
from cmp.errors import CmpError


def select(names: list[str] | None = None) -> list[Dataset]:
    """The named datasets, or all that are not optional; an unknown name is a `CmpError`."""
    datasets = load_datasets()
    for name in names or []:
        if name not in datasets:
            raise CmpError(f"no dataset is called {name!r}; there are {', '.join(datasets)}")
    if names:
        return [datasets[name] for name in dict.fromkeys(names)]
    return [dataset for dataset in datasets.values() if not dataset.optional]


def make(dataset: Dataset) -> str:
    """Run a dataset's recipe on its cached packages and pack the result; returns its name."""
    packages = load_packages()
    archives = {source: cache_path(packages[source]) for source in dataset.sources}
    packed.write(dataset, RECIPES[dataset.recipe.kind](dataset.recipe, archives))
    return dataset.name


def build(names: list[str] | None = None, jobs: int | None = None) -> list[str]:
    """Build every selected dataset that is not up to date, or is damaged; returns the names.

    Each dataset is written whole or not at all, so an interrupted build goes on where it was.
    """
    todo = [dataset for dataset in select(names) if not packed.is_intact(dataset)]
    if not todo:
        return []
    _fetch_all(todo)
    size = {d.name: d.counts.train + d.counts.validation + d.counts.test for d in todo}
    workers = min(jobs or os.cpu_count() or 1, len(todo))
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=sum(size.values()), desc="pack", unit=" images", unit_scale=True) as bar,
    ):
        largest_first = sorted(todo, key=lambda dataset: -size[dataset.name])
        for done in concurrent.futures.as_completed(pool.submit(make, d) for d in largest_first):
            bar.update(size[done.result()])
    return [dataset.name for dataset in todo]


def _fetch_all(datasets: list[Dataset]) -> None:
    packages = load_packages()
    wanted = sorted({source for dataset in datasets for source in dataset.sources})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        fetches = [pool.submit(fetch, packages[name]) for name in wanted]
        try:
            done = concurrent.futures.as_completed(fetches)
            for each in tqdm(done, total=len(wanted), desc="fetch", unit=" packages"):
                each.result()
        except CmpError:
            pool.shutdown(cancel_futures=True)  # what one cannot have, the others cannot either
            raise
