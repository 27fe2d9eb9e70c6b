"""Recipes: how the content of packages becomes images, labels and captions.

A recipe is a function `(recipe, archives) -> Samples`; `archives` maps the short names of the
packages to their files. To add a kind of source: write such a function, add its options to
`cmp.data.manifest`, and its row here.
"""

import concurrent.futures
import multiprocessing
import os

from tqdm import tqdm

from cmp.embedded import drawn, emoji, packed, photos
from cmp.embedded import icons as icon_sets
from cmp.embedded.manifest import Dataset, load_datasets, load_packages
from cmp.embedded.packages import cache_path, fetch_package
from cmp.errors import CmpError

RECIPES = {
    "emoji": emoji.make_emoji,
    "flags": emoji.make_flags,
    "icons": icon_sets.make_icons,
    "icon-set": icon_sets.make_icon_set,
    "digits": drawn.make_digits,
    "animals": drawn.make_animals,
    "scene": drawn.make_scenes,
    "tuxpaint": photos.make_tuxpaint,
    "gcompris": photos.make_gcompris,
}


def select_datasets(names: list[str] | None = None) -> list[Dataset]:
    """The named datasets, or all that are not optional; an unknown name is a `CmpError`."""
    datasets = load_datasets()
    for name in names or []:
        if name not in datasets:
            raise CmpError(f"no dataset is called {name!r}; there are {', '.join(datasets)}")
    if names:
        return [datasets[name] for name in dict.fromkeys(names)]
    return [dataset for dataset in datasets.values() if not dataset.optional]


def make_dataset(dataset: Dataset) -> str:
    """Run a dataset's recipe on its cached packages and pack the result; returns its name."""
    packages = load_packages()
    archives = {source: cache_path(packages[source]) for source in dataset.sources}
    packed.write_packed(dataset, RECIPES[dataset.recipe.kind](dataset.recipe, archives))
    return dataset.name


def build_datasets(names: list[str] | None = None, jobs: int | None = None) -> list[str]:
    """Build every selected dataset that is not up to date, or is damaged; returns the names.

    Each dataset is written whole or not at all, so an interrupted build goes on where it was.
    """
    todo = [dataset for dataset in select_datasets(names) if not packed.is_intact(dataset)]
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
        for done in concurrent.futures.as_completed(
            pool.submit(make_dataset, d) for d in largest_first
        ):
            bar.update(size[done.result()])
    return [dataset.name for dataset in todo]


def _fetch_all(datasets: list[Dataset]) -> None:
    packages = load_packages()
    wanted = sorted({source for dataset in datasets for source in dataset.sources})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        fetches = [pool.submit(fetch_package, packages[name]) for name in wanted]
        try:
            done = concurrent.futures.as_completed(fetches)
            for each in tqdm(done, total=len(wanted), desc="fetch", unit=" packages"):
                each.result()
        except CmpError:
            pool.shutdown(cancel_futures=True)  # what one cannot have, the others cannot either
            raise
