"""Build datasets: download their packages, run their recipes, and pack the results.

A recipe is a function `(recipe, archives) -> Samples`, where `archives` maps short names of
packages to their files. To add a kind of source, write such a function, add its options to
`cmp.embedded.manifest`, and add it to `RECIPES`.
"""

import concurrent.futures
import math
import multiprocessing

from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from benchmark import drawn, icons
from benchmark.packages import cache_path, fetch_package
from cmp.embedded import packed
from cmp.embedded.manifest import Dataset, load_packages, select_datasets
from cmp.scale.decoding import usable_cores

RECIPES = {
    "emoji": icons.make_emoji,
    "flags": icons.make_flags,
    "icons": icons.make_icons,
    "icon-set": icons.make_icon_set,
    "digits": drawn.make_digits,
    "animals": drawn.make_animals,
    "scene": drawn.make_scenes,
}
"""`recipe.kind` -> recipe."""


def make_dataset(dataset: Dataset) -> str:
    """Run a dataset's recipe on its cached packages, and pack the result.

    Returns:
        The dataset's name.
    """
    archives = {source: cache_path(load_packages()[source]) for source in dataset.sources}
    packed.write_packed(dataset, RECIPES[dataset.recipe.kind](dataset.recipe, archives))
    return dataset.name


def build_datasets(names: list[str] | None = None, jobs: int | None = None) -> list[str]:
    """Build the datasets that are out of date or damaged.

    Each dataset is written atomically, so an interrupted build continues where it stopped.

    Args:
        names: The datasets; all by default.
        jobs: The number of processes; one per usable core by default.

    Returns:
        The names of the datasets that were built.

    Raises:
        CmpError: A package cannot be downloaded, or a recipe gives unexpected counts.
    """
    outdated = [dataset for dataset in select_datasets(names) if not packed.is_intact(dataset)]
    if not outdated:
        return []
    sources = sorted({source for dataset in outdated for source in dataset.sources})
    packages = [load_packages()[name] for name in sources]
    # if one download fails, cancel the waiting ones, which would fail as well
    thread_map(fetch_package, packages, max_workers=4, desc="fetch", unit=" packages")
    sizes = {d.name: d.counts.train + d.counts.validation + d.counts.test for d in outdated}
    workers = min(jobs or math.ceil(usable_cores()), len(outdated))
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=sum(sizes.values()), desc="pack", unit=" images", unit_scale=True) as bar,
    ):
        largest_first = sorted(outdated, key=lambda dataset: -sizes[dataset.name])
        futures = [pool.submit(make_dataset, dataset) for dataset in largest_first]
        for future in concurrent.futures.as_completed(futures):
            bar.update(sizes[future.result()])
    return [dataset.name for dataset in outdated]
