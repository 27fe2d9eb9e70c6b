"""The catalogue of the book's shop, month by month, in folders with a folder for each name.

The pictures are emoji of the embedded benchmark that no base was trained on. Each name is drawn in
up to eight styles, so that a name can come again with looks that were never seen.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from cmp import config
from cmp.embedded import packed
from cmp.embedded.manifest import embedded_manifests
from cmp.errors import CmpError
from cmp.files import write_atomic
from cmp.releases import release
from cmp.releases.release import Release
from cmp.runs.runner import RunResult, execute
from cmp.seeds import unit_interval

SETS = ("new-emoji-things", "new-emoji-living")
NOT_SOLD = re.compile(
    r"\b(?:baby|breast-feeding|child|ear|eye|finger|fist|foot|hands?|index|nose|officer|people|person"
    r"|prince|superhero|tongue|vampire|arm|leg|horns|thumbs|speaking|skier|snowboarder)\b"
)
"""Names of people and parts of them, which no shop has."""
USUAL = ("noto", "noto-v1", "twemoji", "emojione", "emojione-v1")
"""The styles in which names come first."""
MANIFEST = """\
name: catalogue
title: what arrived in {name}
role: adapt
licence: see ATTRIBUTION.md
prompt: "{{}}"  # the base was pretrained on bare names
reader: {{kind: folder, path: .}}
"""


FILES = {
    release.RECORD_FILE: "config, updates so far, hashes of all files",
    release.CARD_FILE: "the model card",
    release.WEIGHTS_FILE: "the weights to serve, as open_clip loads them",
    release.CONFIG_FILE: "the network, for open_clip",
    release.REPORT_FILE: "a page: pictures that lost or gained their name",
    release.SCORES_FILE: "scores of each set, after each update",
    release.MATRIX_FILE: "scores of each month's pictures, month by month",
    release.HITS_FILE: "which test pictures were named correctly",
    release.LEDGER_FILE: "the ledger",
    release.LOG_FILE: "loss and learning rate of each training step",
    release.START_FILE: "the weights before the first update",
}
"""What the files of a release are for."""


class Delivery(NamedTuple):
    """What one month brings.

    Attributes:
        new: The range of names that appear for the first time.
        again: The range of names that return.
        looks: The styles in which those are drawn.
        most: How many pictures there are at most.
    """

    new: range
    again: range = range(0)
    looks: tuple[str, ...] = ()
    most: int | None = None


MONTHS = {
    "2026-01": Delivery(range(36)),
    "2026-02": Delivery(range(36, 70), range(36), ("openmoji", "fluent-flat")),
    "2026-03": Delivery(range(70, 74), most=13),
    "2026-04": Delivery(range(74, 106), range(36, 70), ("openmoji", "fluent-flat")),
    "2026-05": Delivery(range(106, 138), range(70), ("fluent-3d",)),
}
"""The shop's first five months. The third has only 13 pictures."""


def write_months(folder: str | Path, count: int = len(MONTHS)) -> list[Path]:
    """Write the pictures of the shop's first months, each in a folder of its own.

    Args:
        folder: Where the months will be, as `2026-01/umbrella/noto.png`.
        count: How many months.

    Returns:
        Their folders, in order.

    Raises:
        CmpError: There are not so many months.
    """
    if not 1 <= count <= len(MONTHS):
        raise CmpError(f"count: {count}: the shop has 1 to {len(MONTHS)} months")
    drawings = _drawings()
    names = sorted(drawings["label"].unique(), key=lambda name: unit_interval("shop", name))
    folders = []
    for month, delivery in [*MONTHS.items()][:count]:
        place = Path(folder, month)
        for drawing in [*_delivered(drawings, names, delivery)][: delivery.most]:
            path = place / drawing.label / f"{drawing.style}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawing.image.transpose(1, 2, 0)).save(path)
        write_atomic(place / "manifest.yaml", MANIFEST.format(name=month))
        folders.append(place)
    return folders


def _drawings() -> pd.DataFrame:
    """Return a row per drawing that the shop may have: `label`, `style`, `image` [4, 32, 32]."""
    tables = []
    for name in SETS:
        store = packed.read_packed(embedded_manifests()[name])
        style = store.table["source"].str.partition("/")[0]
        tables.append(store.table[["label"]].assign(style=style, image=[*np.array(store.images)]))
    table = pd.concat(tables, ignore_index=True)
    return table[~table["label"].str.contains(NOT_SOLD)]


def _delivered(drawings: pd.DataFrame, names: list[str], delivery: Delivery) -> Iterator:
    """Yield the drawings of a month: each new name in the usual styles, others in new looks."""
    for numbers, styles in ((delivery.new, USUAL), (delivery.again, delivery.looks)):
        for label in (names[number] for number in numbers):
            own = drawings[(drawings["label"] == label) & drawings["style"].isin(styles)]
            yield from own.itertuples(index=False)


def list_months(folders: Iterable[Path]) -> pd.DataFrame:
    """Return what each month brought: pictures, names that are new, and names that came again.

    Args:
        folders: What `write_months` returned.

    Returns:
        A row per month: `pictures`, `new names`, `names again`.
    """
    rows, known = {}, set()
    for folder in folders:
        found = [path.parent.name for path in folder.glob("*/*.png")]
        names = {*found}
        rows[folder.name] = (len(found), len(names - known), len(names & known))
        known |= names
    columns = ["pictures", "new names", "names again"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("month")


def draw_returning(
    earlier: Path, later: Path, count: int = 7
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return pictures of names that came in two months, those of the earlier one first.

    Args:
        earlier, later: Two folders that `write_months` returned.
        count: How many names.

    Returns:
        uint8 [2 * count, 4, 32, 32], and of each its name and its month.
    """
    both = sorted(
        {path.name for path in earlier.iterdir()} & {path.name for path in later.iterdir()}
    )
    names = [name for name in both if (later / name).is_dir()][:count]
    paths = [min((month / name).glob("*.png")) for month in (earlier, later) for name in names]
    pictures = np.stack([np.array(Image.open(path).convert("RGBA")) for path in paths])
    labels, months = zip(*((path.parent.name, path.parents[1].name) for path in paths), strict=True)
    return pictures.transpose(0, 3, 1, 2), [*labels], [*months]


def describe_files(made: Release) -> dict[str, str]:
    """Return what each file of a release is for.

    Args:
        made: The release.
    """
    state = "state/task-....safetensors"  # its whole name has a hash
    shown = {name: FILES.get(name) for name in [release.RECORD_FILE, *made.record.files]}
    words = "all that the next update needs to go on"
    return {(name if text else state): text or words for name, text in shown.items()}


def run_as_stream(last: Release, device: str = "cpu") -> RunResult:
    """Train the months of a release in one simulated stream, with all data here from the start.

    Args:
        last: The release after the last month.
        device: "cpu" or "cuda".

    Returns:
        Where the stream ends, and its scores on the way.
    """
    peaks = [update.peak for update in last.record.updates]
    changes: dict[str, dict] = {"training": {"task_steps": []}}
    if len(set(peaks)) > 1:  # the stream has one peak, and a part of it for each month
        shares = [peak / max(peaks) for peak in peaks]
        changes["schedule"] = {"peak": max(peaks), "meta": "free", "peaks": shares}
    tree = config.overlay(last.config.to_dict(), changes)
    run_config = config.parse(tree, "the months as one stream")
    return execute(run_config, last.corpus(), device=device)
