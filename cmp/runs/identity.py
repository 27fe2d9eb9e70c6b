"""Identify runs by everything that determines their results; a run's id is the hash of that."""

import functools
import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip import factory

import cmp
from cmp import budgets, mixtures, models, registry, starts, streams
from cmp.config import STARTS, Method, Model, RunConfig
from cmp.data import Corpus, load_data, named_sources
from cmp.errors import CmpError, weights_fault
from cmp.files import cached_by_file, file_digest, tensors_digest
from cmp.models import batch_norms
from cmp.registry import Option
from cmp.sources import is_own
from cmp.training import UpdateMethod

PLACEHOLDERS = {"data": "a folder", "model.start": "file"}
"""Placeholder for a path in an id, since the content counts and not the location."""


def json_digest(tree: dict[str, Any]) -> str:
    """Return the sha256 of a tree, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def run_id_of(run_config: RunConfig, corpus: Corpus | None = None) -> str:
    """Return a run's id, the hash of `run_identity`."""
    return json_digest(run_identity(run_config, corpus))


def known_id(run_config: RunConfig, corpus: Corpus | None = None) -> str:
    """Return a run's id, or "" if its starting weights are not on this machine."""
    return run_id_of(run_config, corpus) if has_start(run_config) else ""


def run_identity(run_config: RunConfig, corpus: Corpus | None = None) -> dict[str, Any]:
    """Return everything that determines a run's result.

    Data folders and weights are identified by content, not by path, so call `fetch_start` first.

    Args:
        run_config: The run's config.
        corpus: The run's data, which are loaded if None.

    Raises:
        CmpError: The starting weights are not on this machine.
    """
    corpus = corpus or load_data(run_config.data)
    content = config_identity(run_config)
    if run_config.data not in named_sources():
        content["config"]["data"] = PLACEHOLDERS["data"]
    unused = () if run_config.mixture.pool == "substitute" else corpus.by_role("substitute")
    content["data"] = {name: x for name, x in corpus.hashes.items() if name not in unused}
    if run_config.training.budget is not None:  # a different way of counting is a different run
        content["steps"] = budgets.apply_budget(run_config).training.steps
    if run_config.stream.order != "random":  # the order counts, not its table
        order = streams.class_order(corpus, run_config.stream, run_config.seeds.stream)
        content["order"] = hashlib.sha256("\n".join(order).encode()).hexdigest()
    if run_config.mixture.select != "random":
        fitted = mixtures.fit_mixture(run_config, corpus)
        _, kept = mixtures.choose_replay(corpus, fitted.mixture, fitted.seeds.data)
        content["replay"] = hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()
    option = registry.get_option("method", run_config.method.name)
    if _holds_statistics(run_config.model.name, run_config.method, option, option.digest):
        content["batch_norm"] = "held"  # in 0.2 these statistics changed
    keeps_statistics, has_random_layers = _special_layers(run_config.model.name)
    policy = registry.get_option("merge_policy", run_config.merging.policy)
    if keeps_statistics and policy.facts["merges"]:
        content["merged_statistics"] = "weighted"  # in 0.2 each model counted alike
    if has_random_layers:
        content["random_layers"] = "seeded"  # in 0.2 no seed determined their noise
    if own := _own_datasets(corpus, unused):
        content["datasets"] = own  # a batch is drawn by the positions of images
        content["crops"] = "within range"  # in 0.2 crops that did not fit were cut to the image
    if run_config.mixture.capacity is not None and (places := _shifted_places(corpus, unused)):
        content["buffer"] = places  # a full buffer draws by the positions of images
    return content


def config_identity(run_config: RunConfig, with_start: bool = True) -> dict[str, Any]:
    """Return what a run's or update's config alone says of its result, without its data.

    Args:
        run_config: The config.
        with_start: Whether it starts from the weights that the config names.

    Raises:
        CmpError: The starting weights are not on this machine.
    """
    changes, entries = start_identity(run_config) if with_start else ({}, {})
    content = {
        "config": run_config.changes() | changes,
        "numerics": cmp.NUMERICS,
        **entries,
        **network_identity(run_config.model),
    }
    if options := run_config.option_record():  # a different definition is a different run
        content["options"] = {name: record["sha256"] for name, record in options.items()}
    return content


def _own_datasets(corpus: Corpus, unused: Collection[str]) -> list[list[str]]:
    """Return the update and name of each dataset of files, in the order of their images."""
    own = [n for n, x in corpus.datasets.items() if hasattr(x, "reader") and n not in unused]
    parts = corpus.table.loc[corpus.table["dataset"].isin(own), ["update", "dataset"]]
    return parts.drop_duplicates().to_numpy(str).tolist()


def _shifted_places(corpus: Corpus, unused: Collection[str]) -> str:
    """Return a digest of the positions and class numbers of all images that arrive; "" if no image
    of an unused dataset of files comes before them and shifts both."""
    own = [name for name in unused if hasattr(corpus.datasets[name], "reader")]
    arriving = streams.adaptation_rows(corpus)
    is_unused = corpus.table["dataset"].isin(own).to_numpy()
    if not is_unused[: arriving.max(initial=0)].any():
        return ""
    places = np.stack([arriving, streams.class_numbers(corpus)[arriving]])
    return hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()


@functools.cache
def _holds_statistics(name: str, method: Method, option: Option, digest: str) -> bool:
    """Return whether a method keeps running statistics that a step in training mode would change:
    those of frozen layers, or all of them during a measurement.

    Args:
        name: The name of the network.
        method: The config section.
        option: The method, which may have been redefined.
        digest: Its digest, which changes if something that it uses is redefined.
    """
    may_do_both = not is_own(option.module) or "batches" in option.settings
    if not may_do_both and getattr(option.value, "prepare", None) is UpdateMethod.prepare:
        return False  # nothing is frozen
    keeps_statistics, _ = _special_layers(name)
    if not keeps_statistics:
        return False
    if may_do_both:
        return True
    state = budgets.shape_state(name, method, models.create_on_meta(name))
    models.set_train_mode(state.model)
    return not all(layer.training for layer in batch_norms(state.model))


@functools.cache
def _special_layers(name: str) -> tuple[bool, bool]:
    """Return whether layers of a network keep running statistics, and whether layers are random in
    training."""
    model = models.create_on_meta(name)
    return bool(batch_norms(model)), models.has_random_layers(model)


def start_identity(run_config: RunConfig) -> tuple[dict[str, str], dict[str, Any]]:
    """Return how a run's starting weights appear in its id.

    Returns:
        Changes to the flat config.
        Entries of the identity: the hash of the weights, and how images are prepared if the file of
        the weights changes that. A file is identified by its content, not by its path.

    Raises:
        CmpError: The weights are not on this machine.
    """
    model, path = run_config.model, start_file(run_config)
    if model.start == "random":
        return {}, {"weights": model.start}
    if path is None:  # an id based on the name would change after the download
        raise CmpError(
            f"model.start: the weights {model.start!r} of {model.name!r} are not on this machine, "
            "and a run's id depends on their content; download them first"
        )
    is_base, is_hub = model.start in STARTS, model.start == starts.HUB
    digest, settings = _read_start(path, is_base)
    entries: dict[str, Any] = {"weights": digest}
    own = starts.hub_config(model.name)["preprocess_cfg"] if starts.is_hub(model.name) else {}
    if prepared := _other_preprocessing(settings, own):
        entries["preprocessing"] = prepared
    is_named = is_base or is_hub or starts.pretrained_tag(model.name, model.start)
    return {} if is_named else {"model.start": PLACEHOLDERS["model.start"]}, entries


def _other_preprocessing(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return those settings of preprocessing that change how a model prepares images.

    Args:
        settings: Some of open_clip's settings.
        own: Those in which the model's config differs from open_clip's defaults.
    """
    merge = open_clip.transform.merge_preprocess_dict
    before = merge(asdict(open_clip.transform.PreprocessCfg()), own)
    after = merge(before, settings)
    # the size is always the network's; JSON has lists where open_clip has tuples
    before, after = (json.loads(json.dumps(x | {"size": None})) for x in (before, after))
    return {key: x for key, x in after.items() if x != before[key]}


@cached_by_file
def _read_start(path: Path, is_base: bool) -> tuple[str, dict[str, Any]]:
    """Return the hash of starting weights and the preprocessing saved with them.

    A base is identified by its file, whose sha256 is known, and any other file by its tensors and
    its preprocessing, independent of the format.
    """
    if is_base:
        return file_digest(path), {}
    try:
        read = np.load if path.suffix == ".npz" else factory.load_state_dict  # tensors only
        digest = tensors_digest({n: torch.as_tensor(x) for n, x in read(str(path)).items()})
        return digest, models.saved_preprocessing(path)
    except Exception as error:  # readers raise all kinds of errors
        raise CmpError(
            f"{path}: cannot be read as a checkpoint that contains only tensors "
            f"({weights_fault(error):.160})"
        ) from error


def network_identity(model: Model) -> dict[str, str]:
    """Return the entry of an identity for a hub's or folder's model, whose name does not determine
    its config and tokenizer.

    It is left out for a usual config and pretrained weights, whose tensors say the rest.
    """
    if not starts.is_hub(model.name):
        return {}
    about, tokenizer = starts.hub_config(model.name), starts.tokenizer_digests(model.name)
    network, preprocessing = about["model_cfg"], about["preprocess_cfg"]
    starts.family_names()  # registers the embedded models with open_clip, always
    known: list[Any] = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    is_usual = (
        model.start != "random"
        and network in known
        # these may have the tensors of a network with another GELU, or of another image size
        and not network.get("quick_gelu")
        and "timm_model_name" not in network["vision_cfg"]
        and not _other_preprocessing(preprocessing, {})
        and not tokenizer
    )
    if is_usual:
        return {}
    return {"network": json_digest({"about": [network, preprocessing], "tokenizer": tokenizer})}


def start_file(run_config: RunConfig) -> Path | None:
    """Return the file with the weights that a run starts from, without downloading.

    Returns:
        The file, or None for random weights or if the file is not on this machine.
    """
    config = run_config.model
    if config.start == "random":
        return None
    if config.start not in STARTS:
        return starts.cached_weights(config.name, config.start)
    family = starts.family_of(config.name)
    path = family and family.base_path(config.name, config.start, run_config.seeds.init)
    return path if path and path.exists() else None


def has_start(run_config: RunConfig) -> bool:
    """Return whether the weights that a run starts from are on this machine."""
    return run_config.model.start == "random" or start_file(run_config) is not None
