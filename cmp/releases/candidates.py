"""Find the model that one text names: an embedded base, a tag, a file, a run, a folder, a hub."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import open_clip

from cmp import config, models, starts
from cmp.errors import CmpError, did_you_mean
from cmp.files import SHORT_ID
from cmp.models import Network
from cmp.releases.release import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Release,
    is_release,
    read_release,
)
from cmp.runs import lookup
from cmp.starts import HUB, RUN_PREFIX

USUAL_START = "annealed"
"""The start of an embedded model that is named alone."""
FORMS = (
    "NAME:START (small:annealed, small:annealed:3 for base 3, ViT-B-32:laion2b_s34b_b79k, "
    "small:random, NAME:FILE.safetensors), run:ID, hf-hub:ORG/NAME, or a folder with "
    f"{WEIGHTS_FILE} and {CONFIG_FILE}"
)
"""The ways to name a model, for errors."""


class Candidate(NamedTuple):
    """A model to compare or export.

    Attributes:
        title: Its title in tables and reports.
        name: The model's name, which determines its tokenizer.
        network: The network.
    """

    title: str
    name: str
    network: Network


def split_start(text: str) -> tuple[str, str]:
    """Return the name and the start of a model from "NAME:START"; the start is "" if not given. The
    name of a model from a hub contains a colon itself."""
    if starts.is_hub(text):
        return text, HUB
    name, _, start = text.partition(":")
    return name, start


def is_run(text: str) -> bool:
    """Return whether a text has the form of a run's id, or of its first digits, with `RUN_PREFIX`
    or without."""
    return text.startswith(RUN_PREFIX) or bool(re.fullmatch(r"[0-9a-f]{4,64}", text))


def find_release(text: str) -> Release | None:
    """Return the release in a folder, with `local-dir:` before it or not, or None if the text names
    something else."""
    folder = Path(text.removeprefix("local-dir:")).expanduser()
    return read_release(folder) if is_release(folder) else None


def find_candidate(text: str) -> Candidate:
    """Return the model that a text names.

    Args:
        text: NAME:START, where START is a base of an embedded model, a pretrained tag of open_clip,
            `random` or the path of a file, and may be followed by the number of a base,
            NAME:START:SEED; `run:ID`; `hf-hub:ORG/NAME`; or a folder as open_clip writes it for the
            hub, such as a release, with `local-dir:` before it or not.

    Raises:
        CmpError: It is not a model.
    """
    text = os.path.expanduser(text)
    name, _, rest = text.partition(":")
    if text.startswith("hf-hub:"):
        return _candidate(text, text, HUB)
    if text.startswith("local-dir:"):
        return folder_candidate(Path(rest))
    if name in open_clip.list_models() or name in starts.family_names():
        found = re.fullmatch(r"(.+?)(?::(\d{1,9}))?", rest or _usual_start(name), re.DOTALL)
        assert found
        return _candidate(text, name, found[1], int(found[2] or 0))
    exists = text and Path(text).exists()
    if exists and Path(text).is_dir():
        return folder_candidate(Path(text))
    if is_run(text):
        run, network = lookup.find_model(text.removeprefix(RUN_PREFIX))
        return Candidate(f"run {run.id[:SHORT_ID]}", run.config.model.name, network)
    if exists:
        raise CmpError(
            f"{text}: a file does not say which network its weights belong to; write NAME:{text}, "
            f"such as ViT-B-32:{text}"
        )
    near = did_you_mean(name, open_clip.list_models())
    raise CmpError(
        f"there is no folder or model {text!r:.300}{near or ';'} {'G' if near else 'g'}ive {FORMS}"
    )


def _usual_start(name: str) -> str:
    if name in starts.family_names():
        return USUAL_START
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise CmpError(
        f"{name}: give the weights, as in {name}:START; START is a tag of open_clip, the path of a "
        f"file, or random; tags: {tags}"
    )


def _candidate(title: str, name: str, start: str, seed: int = 0) -> Candidate:
    tree = {"model": {"name": name, "start": start}}
    section = config.parse(tree, f"{title!r:.300}").model
    return Candidate(title, name, models.load_model(section, seed))


def folder_candidate(folder: Path) -> Candidate:
    """Return the model in a folder of open_clip's layout.

    An embedded model is recognised by its config, since open_clip would use its own tokenizer, with
    another vocabulary.

    Raises:
        CmpError: There is no such model, or a file of a release is damaged.
    """
    made = read_release(folder) if is_release(folder) else None
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CmpError(
                f"{folder}: contains no {name}; it is neither a release nor a folder written by "
                "`cmpt export --to hf` or open_clip"
            )
    if made:
        own = [x for x in made.record.files if any(map(Path(x).match, starts.TOKENIZER_FILES))]
        for name in (CONFIG_FILE, WEIGHTS_FILE, *own):
            made.path(name)  # checks its hash
    name = starts.known_name(f"local-dir:{folder}")
    if starts.family_of(name):
        return _candidate(str(folder), name, str(folder / WEIGHTS_FILE))
    return _candidate(str(folder), f"local-dir:{folder}", HUB)
