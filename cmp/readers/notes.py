"""Report what makes scores misleading: duplicate images, too few images, and images that other
programs read differently."""

import collections
import os
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from cmp.evaluation import RETRIEVAL_K, chance_of_recall
from cmp.parsing import read_yaml
from cmp.readers.index import TRAITS, ImageIndex
from cmp.readers.manifest import FILE_ENDINGS, Split

READ_DIFFERENTLY: dict[str, str] = read_yaml(Path(__file__).with_name("notes.yaml"))
"""Trait, with the manifest's setting if there is one -> what a model's user must know."""
_COLUMN, _TEXTS = "give a column of names as `reader.label`", "write names into the files `.cls`"
NAME_CLASSES = {
    "folder": "rename the folders of the classes", "csv": _COLUMN, "jsonl": _COLUMN,
    "parquet": _COLUMN, "tars": _TEXTS, "pairs": _TEXTS,
}  # fmt: skip
"""`reader.kind` -> how to give names to classes that are numbers."""
HIGH_CHANCE = 0.1
"""The chance level of retrieval from which it is reported."""


def notes_on(indexes: list[ImageIndex]) -> list[str]:
    """Return the notes of `cmpt data check` on the datasets of a collection, one sentence each.

    Args:
        indexes: The datasets. Duplicates are found only among checked images.
    """
    checked = [index for index in indexes if "digest" in index.table]
    sentences = [sentence for index in checked for sentence in images_read_differently(index)]
    sentences += [sentence for index in indexes for sentence in read_elsewhere(index)]
    sentences += [
        f"{index.dataset.name}: images of several rows, whose captions were joined: {index.joined}"
        for index in indexes if index.joined
    ]  # fmt: skip
    sentences += [sentence for index in indexes for sentence in splits_of_names(index)]
    sentences += [sentence for index in indexes for sentence in numbered_classes(index)]
    sentences += [sentence for index in indexes for sentence in odd_spellings(index)]
    sentences += [sentence for index in checked for sentence in contradictory_classes(index)]
    sentences += leaked_pictures(checked)
    sentences += [sentence for index in checked for sentence in repeated_pictures(index)]
    return sentences + [sentence for index in indexes for sentence in limits_of_recall(index)]


def read_elsewhere(index: ImageIndex) -> list[str]:
    """Return a sentence if a dataset's images are outside its manifest's folder."""
    path = getattr(index.dataset.reader, "path", ".")
    if not (os.path.isabs(path) or ".." in path.split("/")):
        return []
    return [f"{index.dataset.name}: reader.path: points outside the manifest's folder, to {path}"]


def splits_of_names(index: ImageIndex) -> list[str]:
    """Return a sentence if the splits of a table or of tars are those that folders or files are
    named after."""
    reader, table = index.dataset.reader, index.table
    if (
        reader.kind not in FILE_ENDINGS
        or getattr(reader, "split", None)
        or not table["given"].any()
    ):
        return []
    given = {*table["split"][table["given"]]}
    splits = ", ".join(split for split in get_args(Split) if split in given)
    return [f"{index.dataset.name}: names of folders or files give the splits: {splits}"]


def numbered_classes(index: ImageIndex) -> list[str]:
    """Return a sentence if all classes of a dataset are called by numbers, which a model would
    learn as their names."""
    dataset, remedy = index.dataset, NAME_CLASSES.get(index.dataset.reader.kind)
    numbered = bool(index.classes) and all(map(str.isdigit, index.classes))
    if not remedy or not numbered or dataset.task != "classification":
        return []
    prompt = dataset.prompt.format(index.classes[0])
    return [
        f"{dataset.name}: all class names are numbers, as in {prompt!r:.80}; unless that is what "
        f"they are called, {remedy}"
    ]


def twin_spellings(names: Iterable[str]) -> list[str]:
    """Return the names that tokenizers may not tell apart, each with its twins: they lower the
    case, and may compose accents and join spaces. A folder's "_" is read as a space."""
    spellings = collections.defaultdict(list)
    for name in names:
        plain = unicodedata.normalize("NFC", " ".join(name.replace("_", " ").split())).casefold()
        spellings[plain].append(name)
    return [" and ".join(twins) for twins in spellings.values() if len(twins) > 1]


def odd_spellings(index: ImageIndex) -> list[str]:
    """Return sentences on the class names of a dataset that have several spellings, or underscores
    where these are not read as spaces."""
    name, sentences = index.dataset.name, []
    if index.dataset.task != "classification" or index.dataset.reader.kind == "fomo":
        return []
    if twins := twin_spellings(index.classes):
        sentences.append(
            f"{name}: class names in several spellings: {len(twins)}, such as {twins[0]}; if they "
            "are one class, give it one name"
        )
    if lines := [each for each in index.classes if "_" in each]:
        sentences.append(
            f"{name}: class names with underscores: {len(lines)}, such as {lines[0]}; write spaces "
            "instead, as the model read in pretraining, and as folders of classes are read"
        )
    return sentences


def images_read_differently(index: ImageIndex) -> list[str]:
    """Report images of a dataset that other programs may read differently from training.

    Args:
        index: The checked dataset.
    """
    traits, noted = index.table["traits"].to_numpy(), index.noted()
    if not noted:
        return []
    names = {
        name: index.table["source"].iloc[int((traits >> i & 1).argmax())]
        for i, name in enumerate(TRAITS)
    }
    return describe_differences({index.dataset.name: noted}, names)


def describe_differences(
    noted: dict[str, dict[str, Any]], names: Mapping[str, str] | None = None
) -> list[str]:
    """Report images of a run's data that open_clip's own transform reads differently.

    Args:
        noted: Counts by dataset, see `index.ImageIndex.noted`.
        names: For each trait, the name of an image that has it.

    Returns:
        One sentence for each dataset and trait.
    """
    sentences = []
    for dataset, found in noted.items():
        for trait in [name for name in TRAITS if name in found]:
            keys = [trait, f"{trait}: {found['transparency']}", f"{trait}: {found['exif']}"]
            words = next(READ_DIFFERENTLY[key] for key in keys if key in READ_DIFFERENTLY)
            such = f", such as {names[trait]}" if names else ""
            what, _, then = words.partition("; ")
            sentences.append(f"{dataset}: {what}: {found[trait]}{such}; {then}")
    return sentences


def leaked_pictures(indexes: list[ImageIndex]) -> list[str]:
    """Report images that are both scored and trained on or replayed.

    Images are equal if their pixels are, since a model gets the same from both files.

    Args:
        indexes: All checked datasets of a collection.

    Returns:
        One sentence for each pair of datasets that share such images, or for a dataset and itself.
    """
    if not indexes:
        return []
    table = pd.concat([index.table.assign(set=index.dataset.name) for index in indexes])
    trained = table.loc[table["split"] == "train"].drop_duplicates(["set", "pixels"])
    scored = table.loc[table["split"] != "train"]
    shared = scored.merge(trained, on="pixels", suffixes=("", "_trained"))
    return [
        f"{name}: held-out images that are also training images of {other}: {len(part)}, such as "
        f"{part['source'].iloc[0]} and {part['source_trained'].iloc[0]}; they test memorisation, "
        "so remove them from one of the two"
        for (name, other), part in shared.groupby(["set", "set_trained"], sort=False)
    ]


def contradictory_classes(index: ImageIndex) -> list[str]:
    """Report images that a dataset contains in several classes, trained on or scored.

    Args:
        index: The checked dataset.

    Returns:
        One sentence, or none.
    """
    by_pixels = index.table.groupby("pixels", sort=False)["label"]
    part = index.table.loc[by_pixels.transform("nunique") > 1]
    if part.empty:
        return []
    same = part.loc[part["pixels"] == part["pixels"].iloc[0]].drop_duplicates("label")
    one, other = (f"{row.source} ({row.label})" for row in same.iloc[:2].itertuples())
    count = part["pixels"].nunique()
    return [
        f"{index.dataset.name}: images in several classes: {count}, such as {one} and {other}; "
        "each class counts, so remove the wrong ones"
    ]


def repeated_pictures(index: ImageIndex) -> list[str]:
    """Report training images that a dataset contains again under another file name.

    Args:
        index: The checked dataset.

    Returns:
        One sentence, or none.
    """
    table = index.table.loc[index.table["split"] == "train"].drop_duplicates(["pixels", "source"])
    part = table.loc[table["pixels"].duplicated(keep=False)].sort_values("pixels", kind="stable")
    if part.empty:
        return []
    by_pixels = part.groupby("pixels")
    return [
        f"{index.dataset.name}: training images with several file names: {by_pixels.ngroups}, "
        f"such as {part['source'].iloc[0]} and {part['source'].iloc[1]}; each is drawn once per "
        "file name"
    ]


def limits_of_recall(index: ImageIndex) -> list[str]:
    """Report if R@5 of a retrieval dataset is high by chance or cannot reach 100%.

    Every model ranks equal images or captions equally high.

    Args:
        index: The dataset. Duplicates are found only if it was checked.

    Returns:
        One sentence for each limit.
    """
    rows = index.table.loc[index.table["split"] == "test"].reset_index(drop=True)
    if index.dataset.task != "retrieval" or rows.empty:
        return []
    questions = rows.assign(owner=rows.index).explode("captions")
    chance = chance_of_recall(questions["owner"].to_numpy())
    keys = [key for key in ("pixels", "captions") if key in questions]
    equal = [questions.groupby(key)["owner"].transform("nunique") for key in keys]
    ceiling = (RETRIEVAL_K / pd.concat(equal, axis=1).max(axis=1)).clip(upper=1).mean()
    what, sentences = f"{index.dataset.name}: R@{RETRIEVAL_K} of {len(rows)} test images is", []
    if chance >= HIGH_CHANCE:
        sentences.append(
            f"{what} {100 * chance:.0f}% by chance; more of them would make it more informative"
        )
    if ceiling < 1:
        sentences.append(
            f"{what} about {100 * ceiling:.0f}% at best, as more than {RETRIEVAL_K} of them share "
            "a caption or are equal"
        )
    return sentences
