"""Which model a name means, and where the weights that it starts from are.

Nothing here builds a network: `cmp.models` does.
"""

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import try_to_load_from_cache  # noqa: TID251 - looks into its cache only
from open_clip import factory, pretrained

from cmp import files, parsing, project
from cmp.config import STARTS, Model
from cmp.errors import CmpError, did_you_mean, explain_errors, explain_limit, first_line
from cmp.registry import entry_names, load_entry

HUB_PREFIXES = ("hf-hub:", "local-dir:")
"""Prefixes of model names that are locations of a config and weights, not names known to
open_clip."""
HUB = "hub"
"""The value of `model.start` for the weights that come with a model from a hub."""
TOKENIZER_KEYS = {"clean", "strip_sep_token", "language"}
"""The `tokenizer_kwargs` that a hub's or folder's model may have: those that open_clip reads. It
passes others on to transformers, where some let code of the folder run."""
MAX_LAYERS = 999
"""The most layers of a part of a foreign network; a config that asks for 10**9 would be built
without end."""
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "config.json")
"""Patterns of the files that transformers reads a tokenizer from."""
RECORD_FILE = "stream.json"
"""The file of a release that lists the hash of each other file."""
RELEASE_REMEDY = "; get the release again from its source"
RUN_PREFIX = "run:"
"""Prefix of `model.start` for the weights of a finished run; its id follows."""
USUAL_PROMPT = "a photo of a {}"
"""The prompt of a class for models whose family has none of its own."""
PROCESS_LOCK = threading.RLock()
"""Held while settings of the whole process are changed for a while: the level of logging, and the
state of torch's generator. Otherwise threads would restore each other's changes."""


def family_of(name: str) -> Any:
    """Return the family of a model, or None for open_clip's own models.

    Families are entry points of the group "cmp.models". They are modules with `NAMES`,
    `tokenizer(name)`, `base_path(name, start, seed)`, `find_base`, which takes the same arguments
    and raises an error if the base is missing or damaged, `read_weights(path)`, which returns
    tensors by name, and perhaps `PROMPT`, see `usual_prompt`, and `LICENCE`, the hub's name of the
    licence of the bases.
    """
    families = (load_entry("cmp.models", entry) for entry in entry_names("cmp.models"))
    return next((family for family in families if name in family.NAMES), None)


def family_names() -> list[str]:
    """Return the names of the models of all families."""
    return [x for name in entry_names("cmp.models") for x in load_entry("cmp.models", name).NAMES]


def hub_config(name: str) -> dict[str, Any]:
    """Return open_clip's config of a hub's or folder's model, downloading it if necessary: the
    network under "model_cfg", and how images are prepared, if not as usual, under "preprocess_cfg".

    Raises:
        CmpError: The config cannot be read.
    """
    try:
        if folder := model_folder(name):
            about = parsing.read_json(folder / "open_clip_config.json")
        else:
            about = _downloaded_config(name.removeprefix("hf-hub:"))
        about = {"preprocess_cfg": {}} | about
        for key in ("model_cfg", "preprocess_cfg"):
            if not isinstance(about.get(key), dict):
                raise ValueError(f"it has no keys under {key}")
        _check_model(about["model_cfg"])
    except Exception as error:  # of the network, of the hub, of a config with other keys
        raise CmpError(
            f"model.name: {name:.200}: its config cannot be read ({first_line(error):.200}); check "
            "the name, the folder, and the connection"
        ) from error
    return about


_downloaded_config = functools.cache(factory._get_hf_config)  # which asks the hub each time


def _check_model(about: dict[str, Any]) -> None:
    """Raise `ValueError` if a foreign network has too many layers, or settings of its tokenizer
    that could run code."""
    for part in about.values():
        layers = part.get("layers", 0) if isinstance(part, dict) else 0
        if max(layers if isinstance(layers, list) else [layers], default=0) > MAX_LAYERS:
            raise ValueError(f"more than {MAX_LAYERS} layers")
    given = about.get("text_cfg", {}).get("tokenizer_kwargs", {})
    if others := dict(given).keys() - TOKENIZER_KEYS:
        raise ValueError(
            f"tokenizer_kwargs: {min(others)!r:.60} is not allowed, only "
            f"{', '.join(sorted(TOKENIZER_KEYS))}"
        )


def tokenizer_digests(name: str) -> dict[str, str]:
    """Return the sha256 of each file of a folder's tokenizer, by name; {} if it has none, as with
    all other models.

    Raises:
        CmpError: The config of a hub's or folder's model cannot be read.
    """
    text_config = hub_config(name)["model_cfg"].get("text_cfg", {})
    folder = model_folder(name)
    if not folder or not text_config.get("hf_tokenizer_name"):
        return {}  # open_clip takes CLIP's own, or that of another model
    paths = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})
    return {path.name: files.file_digest(path) for path in paths if path.is_file()}


def known_name(name: str) -> str:
    """Return the embedded model with the config of a hub's or folder's model, or else the name
    itself.

    An embedded model needs its own tokenizer, since open_clip would use CLIP's larger vocabulary.

    Raises:
        CmpError: The config of a hub's or folder's model cannot be read.
    """
    if not is_hub(name):
        return name
    about = hub_config(name)["model_cfg"]
    return next((x for x in family_names() if open_clip.get_model_config(x) == about), name)


def is_hub(name: str) -> bool:
    """Return whether a model's name is the location of its config and weights."""
    return name.startswith(HUB_PREFIXES)


def model_folder(name: str) -> Path | None:
    """Return the folder of a model that is named by it, or None."""
    return Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None


def usual_prompt(name: str) -> str:
    """Return the class prompt that a model expects: its family's, or else CLIP's usual one.

    Args:
        name: The model.
    """
    return getattr(family_of(known_name(name)), "PROMPT", USUAL_PROMPT)


def default_device(name: str, device: str | None = None) -> str:
    """Return the given device, or by default the CPU for an embedded model and a GPU for any other.

    A run of the paper's size would take months on a CPU. An unknown model, or one whose config
    cannot be read, gets the CPU, and loading it then raises an error that names it.

    Raises:
        CmpError: This kind of device is not supported.
    """
    if device:
        check_device_name(device)
        return device
    try:
        name = known_name(name)
    except CmpError:
        return "cpu"
    others = {*open_clip.list_models()} - {*family_names()}
    return "cuda" if name in others or is_hub(name) else "cpu"


def check_device_name(device: str) -> None:
    """Raise `CmpError` for a device that is neither the CPU nor a CUDA card."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", device):
        raise CmpError(f"device {device!r:.60}: choose cpu, or cuda for an NVIDIA card")


def check_name(name: str) -> None:
    """Raise `CmpError` if a model is neither known to open_clip nor at a hub."""
    embedded = ", ".join(family_names())  # importing a family registers its models with open_clip
    if name not in (names := open_clip.list_models()) and not is_hub(name):
        raise CmpError(
            f"model.name: {name!r} is not an open_clip model; the embedded models are "
            f"{embedded}{did_you_mean(name, names)}"
        )


def check_start(name: str, start: str) -> None:
    """Raise `CmpError` for a start that no model of this kind can have, whatever files exist."""
    if start == HUB and not is_hub(name):
        begin = " or ".join(HUB_PREFIXES)
        raise CmpError(
            f"model.start: {HUB!r} is for models from a hub, whose names begin with {begin}, not "
            f"for {name!r}; give a pretrained tag, the path of a file, or random"
        )
    if is_hub(name) and start in STARTS and start != "random":
        raise CmpError(
            f"model.start: {start!r} is a base of an embedded model, and {name!r} has none; set "
            f"model.start={HUB}, or give the path of a file, or random"
        )


def fetch_weights(config: Model, seed: int) -> Path | None:
    """Return the file with the weights that a run starts from, downloading it if necessary.

    Args:
        config: The config section.
        seed: The number of a shipped base.

    Returns:
        The file; None for random weights.

    Raises:
        CmpError: The weights are missing and cannot be downloaded, or belong to another kind of
            model.
    """
    name, start = config.name, config.start
    if start == "random":
        return None
    check_start(name, start)
    if start not in STARTS:
        return locate_weights(name, start)
    if family := family_of(name):
        return family.find_base(name, start, seed)
    check_name(name)
    raise CmpError(
        f"model.start: {start!r}: {name!r} has no bases; give a pretrained tag, the path of a "
        "file, or random"
    )


def locate_weights(name: str, start: str) -> Path:
    """Return the file of pretrained weights, downloading it if necessary.

    Args:
        name: The model.
        start: The path of a file, an open_clip pretrained tag, `HUB`, or `RUN_PREFIX` and an id.

    Raises:
        CmpError: There is no such file or tag, its weights belong to another model, or they cannot
            be downloaded; or they are a release's, and damaged.
    """
    tag, location = pretrained_tag(name, start), hub_location(name, start)
    if tag:
        quick = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
        if tag.get("quick_gelu", False) != quick:
            other = name.removesuffix("-quickgelu") + ("" if quick else "-quickgelu")
            raise CmpError(
                f"model.name: the weights {start!r} were not trained with the GELU of {name!r}"
                f"; use model.name={other}"
            )
    try:
        with quiet_logging():
            if path := cached_weights(name, start):
                check_recorded(path)
                return path
            if tag or location:
                return Path(pretrained.download_pretrained(tag or {"hf_hub": location}))
    except (OSError, RuntimeError, ValueError) as error:  # including those of urllib and the hub
        if explain_limit(error):
            raise
        reason = first_line(error)
        raise CmpError(
            f"model.start: the weights {start!r} of {name!r} are not on this machine and cannot "
            f"be downloaded ({reason:.200}); download them on a machine with network access, or "
            "give the path of a file"
        ) from error
    if start == HUB:
        raise CmpError(f"model.name: {name!r}: no weights in that folder")
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise CmpError(
        f"model.start: {start!r}: not a file, a finished run or a pretrained tag of {name!r}; "
        f"open_clip's tags for it: {tags}"
    )


def cached_weights(name: str, start: str) -> Path | None:
    """Return the file of pretrained weights if it is on this machine, without downloading.

    Args:
        name: The model.
        start: As in `locate_weights`.
    """
    if (run := start.removeprefix(RUN_PREFIX)) != start and run.isalnum():
        stored = project.build_folder() / "runs"
        paths = [*map(str, stored.glob(f"{run[: files.SHORT_ID]}*/{files.WEIGHTS}"))]
        if len(paths) > 1:
            raise CmpError(f"model.start: {start!r}: {len(paths)} runs; give more digits of its id")
    elif start == HUB and (folder := model_folder(name)):
        paths = [factory._find_checkpoint_in_dir(folder)]
    elif location := hub_location(name, start):
        repository, _, file = location.rpartition("/")
        file = file or pretrained.HF_WEIGHTS_NAME
        names = [*pretrained._get_safe_alternatives(file), file]
        try:
            paths = [try_to_load_from_cache(repository, file) for file in names]
        except ValueError as error:
            raise CmpError(f"model.name: {name!r:.200}: {error}") from error
    else:
        paths = [start]
    candidates = (Path(path).expanduser() for path in paths if isinstance(path, str))
    return next((path for path in candidates if path.is_file()), None)


def hub_location(name: str, start: str) -> str:
    """Return where on the hub pretrained weights are: the repository, "/" and perhaps the file.

    Args:
        name: The model.
        start: As in `locate_weights`.

    Returns:
        "" for weights from elsewhere.
    """
    if start == HUB and name.startswith("hf-hub:"):
        return f"{name.removeprefix('hf-hub:')}/"
    return pretrained_tag(name, start).get("hf_hub", "")


def check_recorded(path: Path) -> None:
    """Raise `CmpError` if a file belongs to a release, whose record is beside it or a folder above,
    and has another hash than the record lists."""
    for record in (folder / RECORD_FILE for folder in path.absolute().parents[:2]):
        if not record.is_file():
            continue
        with explain_errors(f"{record}: cannot be read", RELEASE_REMEDY, LookupError, TypeError):
            tree = parsing.read_json(record)
            # a list of that name is a stream of the reference
            digests = dict(tree["record"]["files"]) if isinstance(tree, dict) else {}
        name = path.absolute().relative_to(record.parent).as_posix()
        if name in digests and _digest_at(path) != digests[name]:
            raise CmpError(
                f"{path}: damaged: its hash differs from the one in {RECORD_FILE}{RELEASE_REMEDY}"
            )


_digest_at = files.cached_by_file(files.file_digest)


def pretrained_tag(name: str, start: str) -> dict[str, Any]:
    """Return open_clip's entry for a pretrained tag of a model, or {} if there is none."""
    return {} if is_hub(name) else open_clip.get_pretrained_cfg(name, start)


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Silence warnings while open_clip works.

    It warns that weights are random, which is intended here, and hubs warn about each failed
    attempt.
    """
    with PROCESS_LOCK:
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
