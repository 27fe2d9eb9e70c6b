"""The identity of a run: all that decides its result, and the hash of that, its id."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import factory

import cmp
from cmp import budgets, mixtures, models, registry, streams
from cmp.config import STARTS, Method, RunConfig
from cmp.data import Corpus, load_data, named_sources
from cmp.errors import CmpError
from cmp.files import file_digest
from cmp.models import batch_norms
from cmp.registry import Option

PLACEHOLDERS = {"data": "a folder", "model.start": "file"}
"""What stands in an id for a path, whose content counts and not where it lies."""


def json_digest(tree: dict[str, Any]) -> str:
    """Return the sha256 of a tree, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def run_id_of(run_config: RunConfig, corpus: Corpus | None = None) -> str:
    """Return a run's id, the hash of `run_identity`."""
    return json_digest(run_identity(run_config, corpus))


def known_id(run_config: RunConfig) -> str:
    """Return a run's id, "" as long as the weights that it starts from are not on this machine."""
    return run_id_of(run_config) if has_start(run_config) else ""


def run_identity(run_config: RunConfig, corpus: Corpus | None = None) -> dict[str, Any]:
    """Return everything that decides a run's result.

    A folder of data counts by its content, wherever it lies, and so do weights: `fetch_start` comes
    before this.

    Args:
        run_config: The run's config.
        corpus: Its data; they are loaded where None.

    Raises:
        CmpError: The weights that it starts from are not on this machine.
    """
    corpus = corpus or load_data(run_config.data)
    start, weights = start_identity(run_config)
    is_named = run_config.data in named_sources()
    location = {} if is_named else {"data": PLACEHOLDERS["data"]}
    unused = () if run_config.mixture.pool == "substitute" else corpus.by_role("substitute")
    content = {
        "config": run_config.changes() | location | start,
        "data": {name: digest for name, digest in corpus.hashes.items() if name not in unused},
        "weights": weights,
        "numerics": cmp.NUMERICS,
    }
    if options := run_config.option_record():  # another definition is another run
        content["options"] = {name: record["sha256"] for name, record in options.items()}
    if run_config.training.budget is not None:  # another way of counting is another run
        content["steps"] = budgets.apply_budget(run_config).training.steps
    if run_config.stream.order != "random":  # the order counts, not the table that it comes from
        order = streams.class_order(corpus, run_config.stream, run_config.seeds.stream)
        content["order"] = hashlib.sha256("\n".join(order).encode()).hexdigest()
    if run_config.mixture.select != "random":
        fitted = mixtures.fit_mixture(run_config, corpus)
        _, kept = mixtures.choose_replay(corpus, fitted.mixture, fitted.seeds.data)
        content["replay"] = hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()
    option = registry.get_option("method", run_config.method.name)
    if _holds_statistics(run_config.model.name, run_config.method, option):
        content["batch_norm"] = "held"  # in 0.2 these statistics moved
    if (corpus.table["update"] != "").any():
        content["rows"] = "by arrival"  # in 0.2 sets followed each other by name
    if scaled := [n for n, x in corpus.noted.items() if "grey16" in x and n not in unused]:
        content["scaled"] = scaled  # sets of which pictures were white before they were scaled
    return content


@functools.cache
def _holds_statistics(name: str, method: Method, option: Option) -> bool:
    """Return whether a method leaves running statistics of a network alone that a step in training
    mode would move: those of what it freezes, or all of them while it measures.

    Args:
        name: The network.
        method: The config section.
        option: The method itself, which may be defined anew.
    """
    if not _has_batch_norm(name):
        return False
    if option.sources or "batches" in option.settings:  # a user's may freeze and measure anything
        return True
    state = budgets.shape_state(name, method, models.create_on_meta(name))
    models.set_train_mode(state.model)
    return not all(layer.training for layer in batch_norms(state.model))


@functools.cache
def _has_batch_norm(name: str) -> bool:
    """Return whether a network keeps running statistics."""
    return bool(batch_norms(models.create_on_meta(name)))


def start_identity(run_config: RunConfig) -> tuple[dict[str, str], str]:
    """Return how a run's starting weights enter its id.

    Returns:
        Changes to the flat config, and the hash of the weights. A file counts by its tensors,
        wherever it lies.

    Raises:
        CmpError: The weights are not on this machine.
    """
    model, path = run_config.model, start_file(run_config)
    if model.start == "random":
        return {}, model.start
    if path is None:  # an id by their name would change once they are here
        words = "are not on this machine, and a run's id counts their content"
        raise CmpError(f"model.start: the weights {model.start!r} of {model.name!r} {words}")
    is_base, is_hub = model.start in STARTS, model.start == models.HUB
    digest = _start_digest(path, is_base, path.stat().st_mtime_ns, path.stat().st_size)
    is_named = is_base or is_hub or models.pretrained_tag(model.name, model.start)
    return {} if is_named else {"model.start": PLACEHOLDERS["model.start"]}, digest


@functools.lru_cache(maxsize=64)
def _start_digest(path: Path, is_base: bool, *stamp: int) -> str:
    """Return the hash of starting weights, read once for as long as the file's stamp stays.

    A base counts by its file, which is known by its sha256. Other files count by their tensors,
    whatever the format that they are in.
    """
    if is_base:
        return file_digest(path)
    try:
        read = np.load if path.suffix == ".npz" else factory.load_state_dict  # of tensors alone
        return models.tensors_digest({n: torch.as_tensor(x) for n, x in read(str(path)).items()})
    except Exception as error:  # whatever readers raise at what is no checkpoint
        raise CmpError(f"{path}: {models.unreadable_checkpoint(error)}") from error


def start_file(run_config: RunConfig) -> Path | None:
    """Return the file of the weights that a run starts from; nothing is downloaded.

    Returns:
        The file; None for random weights, and where the file is not on this machine.
    """
    config = run_config.model
    if config.start == "random":
        return None
    if config.start not in STARTS:
        return models.cached_weights(config.name, config.start)
    family = models.family_of(config.name)
    path = family and family.base_path(config.name, config.start, run_config.seeds.init)
    return path if path and path.exists() else None


def has_start(run_config: RunConfig) -> bool:
    """Return whether the weights that a run starts from are on this machine."""
    return run_config.model.start == "random" or start_file(run_config) is not None
