"""The first real experiment (`cmpt study first-real`): seven public sets that torchvision
downloads, and a page with what came out.

Each set gets a table of its images and a manifest, in a folder that `config.data` may name. Nothing
is downloaded twice, and a set is complete once its manifest is written.
"""

import collections
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from cmp.config import RunConfig
from cmp.errors import CmpError, first_line
from cmp.files import SHORT_ID, make_folder, write_atomic
from cmp.parsing import read_yaml
from cmp.project import build_folder
from cmp.runs import identity, store

STUDY = "first-real"
_FACTS = read_yaml(Path(__file__).with_suffix(".yaml"))
COUNTS: dict[str, dict[str, int]] = _FACTS["counts"]
"""Set -> its number of images by split."""
_SPLITS = {"train": "train", "trainval": "train", "val": "validation", "test": "test"}
SEND = (
    f"Send this page and the table beside it, `{STUDY}.csv`, with or without your name, as an "
    "issue, or as a pull request to `book/results/real`; we will show them beside ours."
)


class Image(NamedTuple):
    """An image of a set.

    Attributes:
        path: The file.
        label: The name of its class.
        split: "train", "validation" or "test"; "" if the set has no splits.
    """

    path: Path
    label: str
    split: str = ""


def read_pets(root: Path) -> Iterator[Image]:
    """Yield the images of Oxford-IIIT Pet: classes are in the names of files, splits in lists."""
    folder = root / "oxford-iiit-pet"
    for split in ("trainval", "test"):
        for line in _lines(folder / "annotations" / f"{split}.txt"):
            name = line.split()[0]
            label = name.rpartition("_")[0].replace("_", " ")
            yield Image(folder / "images" / f"{name}.jpg", label, _SPLITS[split])


def read_aircraft(root: Path) -> Iterator[Image]:
    """Yield the images of FGVC-Aircraft by variant, from one list per split."""
    folder = root / "fgvc-aircraft-2013b" / "data"
    for split in ("train", "val", "test"):
        for line in _lines(folder / f"images_variant_{split}.txt"):
            name, label = line.split(maxsplit=1)
            yield Image(folder / "images" / f"{name}.jpg", label, _SPLITS[split])


def read_satellite(root: Path) -> Iterator[Image]:
    """Yield the images of EuroSAT: one folder per class, no splits."""
    for path in sorted((root / "eurosat" / "2750").glob("*/*.jpg")):
        yield Image(path, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", path.parent.name).lower())


def read_textures(root: Path) -> Iterator[Image]:
    """Yield the images of the first partition of the Describable Textures."""
    folder = root / "dtd" / "dtd"
    for split in ("train", "val", "test"):
        for line in _lines(folder / "labels" / f"{split}1.txt"):
            yield Image(folder / "images" / line, line.partition("/")[0], _SPLITS[split])


def read_flowers(root: Path) -> Iterator[Image]:
    """Yield the images of Oxford Flowers 102 that are scored: the classes are numbers in a MATLAB
    file, and their names are in `real.yaml`."""
    from scipy.io import loadmat  # in the extra `experiments`

    folder = root / "flowers-102"
    numbers = loadmat(folder / "imagelabels.mat", squeeze_me=True)["labels"]
    splits = loadmat(folder / "setid.mat", squeeze_me=True)
    for key, split in (("valid", "validation"), ("tstid", "test")):
        for number in splits[key].tolist():
            label = _FACTS["flowers"][int(numbers[number - 1]) - 1]
            yield Image(folder / "jpg" / f"image_{number:05d}.jpg", label, split)


def read_signs(root: Path) -> Iterator[Image]:
    """Yield the test images of the German Traffic Sign Recognition Benchmark: the classes are
    numbers in a list, and their names are in `real.yaml`. Every fifth image is for validation."""
    folder = root / "gtsrb"
    rows = csv.DictReader(_lines(folder / "GT-final_test.csv"), delimiter=";")
    for number, row in enumerate(rows):
        path = folder / "GTSRB" / "Final_Test" / "Images" / row["Filename"]
        label = _FACTS["signs"][int(row["ClassId"])]
        yield Image(path, label, "test" if number % 5 else "validation")


def read_things(root: Path) -> Iterator[Image]:
    """Yield the training images of Imagenette, which are replayed."""
    for path in sorted((root / "imagenette2-320" / "train").glob("*/*.JPEG")):
        yield Image(path, _FACTS["things"][path.parent.name])


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


READERS: dict[str, tuple[str, Callable[[Path], Iterator[Image]], dict[str, str]]] = {
    "pets": ("OxfordIIITPet", read_pets, {}),
    "aircraft": ("FGVCAircraft", read_aircraft, {}),
    "satellite": ("EuroSAT", read_satellite, {}),
    "textures": ("DTD", read_textures, {}),
    "flowers": ("Flowers102", read_flowers, {}),
    "signs": ("GTSRB", read_signs, {"split": "test"}),
    "things": ("Imagenette", read_things, {"size": "320px"}),
}
"""Set -> torchvision's class, which downloads it; the function that lists its images; and further
arguments of the class."""


def data_folder() -> Path:
    """Return the folder of the sets and their manifests."""
    return build_folder().absolute() / "real"


def download_set(name: str, root: Path) -> None:
    """Download and unpack a set by torchvision, unless it is there.

    Raises:
        CmpError: It cannot be downloaded.
    """
    from torchvision import datasets

    kind, _, arguments = READERS[name]
    try:
        getattr(datasets, kind)(str(root), download=True, **arguments)
    except Exception as error:  # of the network, of archives, of torchvision
        raise CmpError(
            f"study {STUDY}: {_FACTS['sets'][name]['title']} cannot be downloaded to {root} "
            f"({first_line(error)}); repeat the command, or unpack it there by hand"
        ) from error


def prepare_data(say: Callable[[str], None] = lambda words: None) -> Path:
    """Download the sets that are missing, and write their tables and manifests.

    Args:
        say: Called with a sentence on each set that is being prepared.

    Returns:
        The folder, a valid value of `config.data`.

    Raises:
        CmpError: A set cannot be downloaded, or its files have another layout.
    """
    folder = data_folder()
    make_folder(folder)
    for name, about in _FACTS["sets"].items():
        manifest = folder / f"{name}.yaml"
        if manifest.exists():
            continue
        say(f"{about['title']}: fetching and listing images in {folder}")
        download_set(name, folder)
        try:
            images = list(READERS[name][1](folder))
            table = _table(images, folder)  # fails without images
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise CmpError(
                f"study {STUDY}: {about['title']} in {folder} is not as torchvision unpacks it "
                f"({type(error).__name__}: {error}); delete the folder and repeat the command"
            ) from error
        _check_counts(name, images, folder)
        write_atomic(folder / f"{name}.csv", table.to_csv(index=False))
        reader = {"kind": "csv", "path": f"{name}.csv", "label": "label", "caption": None}
        reader |= {"draft": "side", "resize": "torch"}  # decoding decides how long a run takes
        reader |= {"split": "split"} if images[0].split else {}
        write_atomic(manifest, json.dumps({"name": name, **about, "reader": reader}))
    return folder


def _check_counts(name: str, images: list[Image], folder: Path) -> None:
    """Raise `CmpError` unless all images of a set are there, since torchvision also accepts a set
    whose unpacking was interrupted."""
    present = collections.Counter(image.split for image in images if image.path.is_file())
    if present != COUNTS[name]:
        own = folder / images[0].path.relative_to(folder).parts[0]
        title, published = _FACTS["sets"][name]["title"], sum(COUNTS[name].values())
        raise CmpError(
            f"study {STUDY}: {title} has {present.total():,} images in {own}, {dict(present)}, but "
            f"{published:,} were published, {COUNTS[name]}; delete that folder and repeat the "
            "command"
        )


def _table(images: list[Image], folder: Path) -> pd.DataFrame:
    """Return the table of a set's images, with paths relative to the folder."""
    rows = [image._replace(path=image.path.relative_to(folder)) for image in images]
    frame = pd.DataFrame(rows, columns=["filepath", "label", "split"])
    return frame if images[0].split else frame.drop(columns="split")


def write_page(configs: dict[tuple[str, int], RunConfig]) -> Path:
    """Write a page in Markdown with the scores of the study's finished runs and the machine that
    computed them, and the same scores as a table in CSV.

    Args:
        configs: The runs by (setting, replicate).

    Returns:
        The page.
    """
    rows, machine = [], {}
    for (setting, _), run_config in configs.items():
        run = store.load_run(identity.run_id_of(run_config))
        machine = run.provenance
        before, after = (
            store.trajectory(run.metrics).query("scope == 'full'").iloc[place] for place in (0, -1)
        )
        for when, scores in (("before", before), (setting, after)):
            numbers = {key: scores[key] for key in ("A_KA", "A_ZS", "GM")}
            seconds = 0.0 if when == "before" else run.provenance["seconds"]
            facts = {"run": run.id[:SHORT_ID], "model": run_config.model.name}
            facts |= {"device": machine["device"]}
            rows.append({"setting": when, **numbers, "seconds": seconds, **facts})
    table = pd.DataFrame(rows).drop_duplicates("setting", ignore_index=True)
    page = data_folder() / f"{STUDY}.md"
    write_atomic(page.with_suffix(".csv"), table.to_csv(index=False))
    lines = ["| setting | A_KA % | A_ZS % | GM % | minutes |", "|:--|--:|--:|--:|--:|"]
    for row in table.itertuples():
        cells = (row.A_KA, row.A_ZS, row.GM, row.seconds / 60)
        lines.append(f"| {row.setting} | {' | '.join(f'{x:.1f}' for x in cells)} |")
    [model] = {(run.model.name, run.model.start) for run in configs.values()}
    tasks = {run.stream.tasks for run in configs.values()}
    keys = ("device", "torch", "open_clip", "cmp", "numerics", "processor", "threads")
    facts = [f"{key} {machine[key]}" for key in keys if key in machine]
    arriving = [about["title"] for about in _FACTS["sets"].values() if about["role"] == "adapt"]
    text = [
        "# A first number from a real CLIP",
        "",
        f"{model[0]}, {model[1]}, over {max(tasks)} updates of {', '.join(arriving)}. "
        "A_KA is what was learned, A_ZS what was kept, on sets that never arrive.",
        "",
        *lines,
        "",
        f"Computed with {', '.join(facts)}.",
        "",
        SEND,
        "",
    ]
    write_atomic(page, "\n".join(text))
    return page
