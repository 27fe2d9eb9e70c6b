"""`cmp.run`: a run from a notebook, looked up if it is stored."""

from typing import Any

from tqdm.auto import tqdm

from cmp import budgets, config
from cmp.data import load_corpus
from cmp.experiments import store, workers
from cmp.runner import Observer


def run(
    profile: str = "quick", device: str = "cpu", progress: bool = True, **settings: Any
) -> store.StoredRun:
    """Take a model through a stream of updates: train, evaluate, store.

    A run that is stored is looked up; one that was stopped goes on from its last checkpoint.

    Args:
        profile: "quick", "cpu" or "gpu".
        device: "cpu" or "cuda".
        progress: Whether a progress bar is shown.
        **settings: Sections of the config, as a dict or by the name of their option, or single
            keys: `method="lora"`, `schedule={"name": "wsd", "peak": 0.01}`, `peak=0.01`, `seed=1`.

    Returns:
        The finished run; its `metrics` are a DataFrame with a row per (task, scope, dataset).

    Raises:
        CmpError: A setting is unknown or impossible.
    """
    run_config = config.from_keywords(profile, settings)
    is_stored = store.is_stored(store.run_id_of(run_config, load_corpus(run_config)))
    total = run_config.stream.tasks * budgets.apply_budget(run_config).training.steps
    with tqdm(total=total, unit=" steps", disable=is_stored or not progress) as bar:
        observer = Observer(
            step=lambda task, step, loss, model: bar.update() and None,
            resumed=lambda steps: bar.update(steps) and None,
        )
        return workers.run_one(run_config, observer, device)
