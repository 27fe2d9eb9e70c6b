"""What keeps the scores of some sets from saying what they seem to: equal pictures, few of them,
and pictures that another program would see in another way."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cmp.evaluation import RETRIEVAL_K, chance_of_recall
from cmp.files import read_yaml
from cmp.readers.index import TRAITS, ImageIndex

SEEN_OTHERWISE: dict[str, str] = read_yaml(Path(__file__).with_name("notes.yaml"))
"""Trait, and how the manifest says to see it where it may -> what a model's user must know."""
HIGH_CHANCE = 0.1
"""The chance level of retrieval from which on it is told."""


def notes_on(indexes: list[ImageIndex]) -> list[str]:
    """Return what `cmpt data check` notes of the sets of a collection, sentence by sentence.

    Args:
        indexes: The sets; equal pictures are looked for among those that were checked.
    """
    checked = [index for index in indexes if "digest" in index.table]
    sentences = [sentence for index in checked for sentence in seen_otherwise(index)]
    sentences += [sentence for index in indexes for sentence in read_elsewhere(index)]
    sentences += leaked_pictures(checked)
    sentences += [sentence for index in checked for sentence in repeated_pictures(index)]
    return sentences + [sentence for index in indexes for sentence in limits_of_recall(index)]


def read_elsewhere(index: ImageIndex) -> list[str]:
    """Say that a set's pictures lie outside of its manifest's folder, where its path says so."""
    path = getattr(index.dataset.reader, "path", ".")
    if not (os.path.isabs(path) or ".." in path.split("/")):
        return []
    return [f"{index.dataset.name}: reader.path: leads out of the manifest's folder, to {path}"]


def seen_otherwise(index: ImageIndex) -> list[str]:
    """Say which pictures of a set another program may see in another way than training does.

    Args:
        index: The set, checked.
    """
    traits, noted = index.table["traits"].to_numpy(), index.noted()
    if not noted:
        return []
    names = {
        name: index.table["source"].iloc[int((traits >> i & 1).argmax())]
        for i, name in enumerate(TRAITS)
    }
    return served_otherwise({index.dataset.name: noted}, names)


def served_otherwise(
    noted: dict[str, dict[str, Any]], names: Mapping[str, str] | None = None
) -> list[str]:
    """Say which pictures of a run's data open_clip's own transform sees in another way.

    Args:
        noted: By dataset, see `index.ImageIndex.noted`.
        names: Of each trait a picture that has it, to be named.

    Returns:
        A sentence for each set and trait.
    """
    sentences = []
    for dataset, found in noted.items():
        for trait in [name for name in TRAITS if name in found]:
            keys = [trait, f"{trait}: {found['transparency']}", f"{trait}: {found['exif']}"]
            words = next(SEEN_OTHERWISE[key] for key in keys if key in SEEN_OTHERWISE)
            such = f", such as {names[trait]}" if names else ""
            what, _, then = words.partition("; ")
            sentences.append(f"{dataset}: {what}: {found[trait]}{such}; {then}")
    return sentences


def leaked_pictures(indexes: list[ImageIndex]) -> list[str]:
    """Say which pictures are both trained on, or replayed, and scored.

    Pictures are equal if their files are, byte for byte.

    Args:
        indexes: All sets of a collection, checked.

    Returns:
        A sentence for each two sets that share such pictures, or a set and itself.
    """
    if not indexes:
        return []
    table = pd.concat([index.table.assign(set=index.dataset.name) for index in indexes])
    trained = table.loc[table["split"] == "train"].drop_duplicates(["set", "digest"])
    scored = table.loc[table["split"] != "train"]
    shared = scored.merge(trained, on="digest", suffixes=("", "_trained"))
    return [
        f"{name}: pictures to score that are training pictures of {other}, too: {len(part)}, such "
        f"as {part['source'].iloc[0]} and {part['source_trained'].iloc[0]}; they test what was "
        "learned by heart, so take them out of one of the two"
        for (name, other), part in shared.groupby(["set", "set_trained"], sort=False)
    ]


def repeated_pictures(index: ImageIndex) -> list[str]:
    """Say which training pictures are in a set again under another name.

    Args:
        index: The set, checked.

    Returns:
        A sentence, or none.
    """
    table = index.table.loc[index.table["split"] == "train"].drop_duplicates(["digest", "source"])
    part = table.loc[table["digest"].duplicated(keep=False)].sort_values("digest", kind="stable")
    if part.empty:
        return []
    by_digest = part.groupby("digest")
    torn = int((by_digest["label"].nunique() > 1).sum())
    classes = f", {torn} of them in several classes" if torn else ""
    return [
        f"{index.dataset.name}: training pictures with several names: {by_digest.ngroups}{classes}"
        f", such as {part['source'].iloc[0]} and {part['source'].iloc[1]}; each name is drawn as "
        "often as any other"
    ]


def limits_of_recall(index: ImageIndex) -> list[str]:
    """Say where R@5 of a set for retrieval is high by chance, or cannot be 100 %.

    Of pictures or captions that are equal, any model ranks one as high as the other.

    Args:
        index: The set; equal pictures are found only if it was checked.

    Returns:
        A sentence for each limit.
    """
    rows = index.table.loc[index.table["split"] == "test"].reset_index(drop=True)
    if index.dataset.task != "retrieval" or rows.empty:
        return []
    questions = rows.assign(owner=rows.index).explode("captions")
    chance = chance_of_recall(questions["owner"].to_numpy())
    keys = [key for key in ("digest", "captions") if key in questions]
    equal = [questions.groupby(key)["owner"].transform("nunique") for key in keys]
    ceiling = (RETRIEVAL_K / pd.concat(equal, axis=1).max(axis=1)).clip(upper=1).mean()
    what, sentences = f"{index.dataset.name}: R@{RETRIEVAL_K} of {len(rows)} test pictures is", []
    if chance >= HIGH_CHANCE:
        sentences.append(f"{what} {100 * chance:.0f} % by chance; with more of them it tells more")
    if ceiling < 1:
        sentences.append(
            f"{what} about {100 * ceiling:.0f} % at best, as more than {RETRIEVAL_K} of them share "
            "a caption or are equal"
        )
    return sentences
