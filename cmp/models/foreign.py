"""Weights that others made: open_clip's pretrained tags, files, and folders and hubs of models.

What is asked for by tag or from a hub is fetched by open_clip into its own cache, once; nothing
else here reaches for the network.
"""

import contextlib
import logging
import re
from pathlib import Path

import open_clip
from open_clip import factory, pretrained
from torch import Tensor, nn

from cmp.errors import CmpError
from cmp.models.attention import is_split

HUBS = ("hf-hub:", "local-dir:")
"""Where a model's name may lead that is not open_clip's own: its config and weights lie there."""
HUB = "hub"
"""The start of a run whose model comes with weights of its own."""
SHOWN = 3  # tensors that an error names


def is_hub(name: str) -> bool:
    """Whether a model's name says where its config and its weights lie."""
    return name.startswith(HUBS)


def tag(name: str, start: str) -> dict:
    """What open_clip knows of a pretrained tag of a model; empty where that has no such tag."""
    return {} if is_hub(name) else open_clip.get_pretrained_cfg(name, start)


def locate(name: str, start: str) -> Path:
    """The file of the weights that a run starts from, fetched where it is a tag or a hub's.

    `CmpError` where it cannot be had: no such tag and no such file, or no network.
    """
    if is_hub(name) and start != HUB:
        raise CmpError(own_weights(name))
    if start == HUB and not is_hub(name):
        raise CmpError(f"model.start: {HUB!r}: {name!r} is none of a hub's, which begin {HUBS}")
    try:
        with quiet():
            return _locate(name, start)
    except (OSError, RuntimeError, ValueError) as error:  # urllib's and the hub's are among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CmpError(
            f"model.start: the weights {start!r} of {name!r} are not here and cannot be fetched "
            f"({reason:.200}); fetch them where there is a network, or give a file's path"
        ) from error


def own_weights(name: str) -> str:
    """The sentence for a hub's model that is asked to start from anything but its weights."""
    return f"model.name: {name!r} comes with its own weights: set model.start={HUB}"


def _locate(name: str, start: str) -> Path:
    """As `locate`, with whatever errors the network has."""
    known = tag(name, start)
    if known:
        check_activation(name, start, known)
    if start == HUB or known.get("hf_hub"):
        if here := cached(name, start):
            return here
        if name.startswith("local-dir:"):
            raise CmpError(f"model.name: {name!r}: there are no weights in that folder")
        if is_hub(name):
            return Path(pretrained.download_pretrained_from_hf(name.partition(":")[2]))
    return Path(pretrained.download_pretrained(known)) if known else file(name, start)


def file(name: str, start: str) -> Path:
    """The file that a start names; `CmpError` where it is none, with the model's tags."""
    if path := cached(name, start):
        return path
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise CmpError(
        f"model.start: {start!r}: neither a file nor a pretrained tag of {name!r}; open_clip has "
        f"for it: {tags}"
    )


def check_activation(name: str, start: str, known: dict) -> None:
    """`CmpError` where a tag's weights were trained with another activation than the model has."""
    quick = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
    if known.get("quick_gelu", False) != quick:
        other = name.removesuffix("-quickgelu") + ("" if quick else "-quickgelu")
        raise CmpError(
            f"model.name: the weights {start!r} are of the other kind of GELU than {name!r}; use "
            f"model.name={other}"
        )


def cached(name: str, start: str) -> Path | None:
    """The file of these weights if it is on this machine already; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    if name.startswith("local-dir:"):
        found = factory._find_checkpoint_in_dir(Path(name.partition(":")[2]))
        return Path(found) if found else None
    known = tag(name, start)
    if not known and start != HUB:
        path = Path(start).expanduser()
        return path if path.is_file() else None
    if not (known.get("hf_hub") or is_hub(name)):  # by its address, in open_clip's folder
        path = Path("~/.cache/clip").expanduser() / Path(known["url"]).name
        return path if path.is_file() else None
    repository, last = name.partition(":")[2], ""
    if known:
        repository, _, last = known["hf_hub"].rpartition("/")
    name = last or pretrained.HF_WEIGHTS_NAME
    files = [*pretrained._get_safe_alternatives(name), name]
    found = (try_to_load_from_cache(repository, each) for each in files)
    return next((Path(each) for each in found if isinstance(each, str)), None)


@contextlib.contextmanager
def quiet():
    """open_clip warns at each creation that weights are random, which is meant; and the hub of
    every attempt to reach it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def load(fused: nn.Module, path: Path) -> None:
    """Read a checkpoint into a network as open_clip makes it, by open_clip's own reader, with its
    conversions of others' layouts: safetensors, or a state dict of torch's, read as tensors alone.

    `CmpError` names the file and the first tensors that are not this network's.
    """
    try:
        factory.load_checkpoint(fused, str(path))
    except Exception as error:  # whatever readers and converters raise on what is no checkpoint
        raise CmpError(f"{path}: {_why(fused, path, error)}") from error


def _why(fused: nn.Module, path: Path, error: Exception) -> str:
    """What is wrong with a checkpoint, in one sentence."""
    try:
        there = tensors(path)
        apart = differing(fused.state_dict(), there)
    except Exception:  # it cannot be read at all, as the first error says
        there, apart = {}, []
    if apart and there:
        more = f" and {len(apart) - SHOWN} more" if len(apart) > SHOWN else ""
        return f"the weights of another architecture: {'; '.join(apart[:SHOWN])}{more}"
    reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return f"no checkpoint that could be read as tensors alone ({reason:.160})"


def tensors(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, without the prefix "module." of a parallel training's."""
    return factory.load_state_dict(str(path), weights_only=True)


def has_split_layout(fused: nn.Module, path: Path) -> bool:
    """Whether a safetensors file holds attention as this package splits it."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as opened:
            return is_split(dict.fromkeys(opened.keys()), fused)
    except (OSError, SafetensorError):
        return False  # whoever reads it next says why


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Where two sets of tensors differ in names or shapes, in the order of ours."""
    found = []
    for name, x in ours.items():
        there = theirs.get(name)
        if there is None:
            found.append(f"{name} {list(x.shape)} is missing there")
        elif there.shape != x.shape:
            found.append(f"{name} is {list(there.shape)} there, {list(x.shape)} in the model")
    return found + [f"{name} is there only" for name in theirs if name not in ours]
