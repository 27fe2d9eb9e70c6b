"""What each choice did in the stored runs, and what was not chosen, and why."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cmp.planning.evidence import Evidence
from cmp.planning.wishes import Wish

Tree = dict[str, Any]
SEEN = {1: "+", -1: "−", 0: "no difference that is seen"}


class Choice(NamedTuple):
    """A contrast of a study that shows what a choice does. when: whether a plan makes it."""

    words: str
    study: str
    setting: str
    against: str
    when: Callable[[Wish, Tree], bool]


def _policy(tree: Tree) -> str:
    return tree["merging"]["policy"]


def _method(tree: Tree) -> str:
    return tree.get("method", {}).get("name", "full")


CHOICES = (
    Choice("replay of earlier updates", "01", "thirds", "pool only",
           lambda wish, tree: tree["mixture"]["buffer"] > 0),
    Choice("replay of pretraining data", "01", "thirds", "buffer only",
           lambda wish, tree: wish.pool > 0),
    Choice("no replay at all", "01", "update only", "thirds",
           lambda wish, tree: tree["mixture"]["update"] == 1),
    Choice("half of a batch from the buffer", "07",
           "triangle, pretraining 0.25, update 0.25, buffer 0.5", "thirds",
           lambda wish, tree: tree["mixture"]["buffer"] == 0.5 and wish.pool > 0),
    Choice("moments carried across updates", "04", "cosine carried", "cosine",
           lambda wish, tree: tree.get("optimizer", {}).get("carry", False)),
    Choice("an average deployed, training goes on", "03", "policy, policy last-unrolled",
           "no merging", lambda wish, tree: _policy(tree) == "last-unrolled"),
    Choice("EMA-Merge", "03", "EMA", "no merging",
           lambda wish, tree: _policy(tree) == "ema" and wish.pool > 0 and wish.keep != "all"),
    Choice("EMA-Merge, a tenth of each update", "03", "EMA by weight, weight 0.1", "no merging",
           lambda wish, tree: wish.keep == "all"),
    Choice("EMA-Merge without replay", "03", "no replay, EMA", "no replay",
           lambda wish, tree: _policy(tree) == "ema" and wish.pool == 0),
    Choice("the image tower locked", "02", "locked-image", "full",
           lambda wish, tree: _method(tree) == "locked-image"),
)  # fmt: skip
"""What a plan may choose."""

ALTERNATIVES = (
    Choice("new data alone", "01", "update only", "thirds",
           lambda wish, tree: tree["mixture"]["update"] < 1),
    Choice("public data in place of the pretraining data", "07", "other pool", "buffer only",
           lambda wish, tree: wish.other_pool),
    Choice("a buffer drawn evenly by class", "07", "buffer: by class", "thirds",
           lambda wish, tree: tree["mixture"]["buffer"] > 0),
    Choice("half the learning rate", "03", "lower rate", "no merging",
           lambda wish, tree: True),
    Choice("a meta schedule, against a lower peak", "04", "meta-cosine", "lower cosine",
           lambda wish, tree: True),
    Choice("LoRA", "02", "lora", "full", lambda wish, tree: _method(tree) == "full"),
    Choice("the image tower locked, where looks are new, too", "02", "locked-image", "full",
           lambda wish, tree: _method(tree) == "full"),
    Choice("EMA-Merge, against deploying an average", "03", "EMA", "policy, policy last-unrolled",
           lambda wish, tree: _policy(tree) == "last-unrolled"),
    Choice("deploying an average without training from it", "03", "policy, policy last-unrolled",
           "EMA", lambda wish, tree: _policy(tree) == "ema"),
    Choice("every update from the weights before the stream", "03", "zero-all", "EMA",
           lambda wish, tree: True),
    Choice("an order of similar classes", "06", "similarity", "random",
           lambda wish, tree: True),
)  # fmt: skip
"""What a plan may reject."""

WHY = {
    "the image tower locked, where looks are new, too": (
        "it rests on looks that the model knows; ask for it by new: names"
    ),
    "EMA-Merge, against deploying an average": "ask for it by keep: most",
    "deploying an average without training from it": "what must be kept comes first here",
    "half the learning rate": "a trade, and merging makes it at a better price",
    "an order of similar classes": "arrange nothing where you replay",
}
"""What is to say beside the numbers."""


def side(row: pd.Series) -> int:
    """Which side of zero a difference lies on by its 95% interval: 1, -1, or 0 for neither."""
    return int(row["low"] > 0) - int(row["high"] < 0)


def told(row: pd.Series, numbers: bool) -> str:
    """A difference in words: with numbers, or its sign alone."""
    sign = SEEN[side(row)]
    if not numbers:
        return sign
    text = f"{row['difference']:+.1f} ({row['low']:.1f} to {row['high']:.1f})"
    return text.replace("-", "−")


def effects(wish: Wish, tree: Tree, known: Evidence, numbers: bool) -> pd.DataFrame:
    """A row a choice of the plan, largest first by what it did to the geometric mean: `A_KA` and
    `A_ZS` in words, and its `study`. numbers: whether the stored runs are of this size."""
    rows, sizes = [], []
    for choice in CHOICES:
        if choice.when(wish, tree):
            found = known.difference(choice.study, choice.setting, choice.against)
            if found is not None:
                scores = {name: told(found.loc[name], numbers) for name in ("A_KA", "A_ZS")}
                rows.append({"choice": choice.words} | scores | {"study": choice.study})
                sizes.append(abs(found.loc["GM", "difference"]))
    order = np.argsort(-np.array(sizes), kind="stable")
    return pd.DataFrame([rows[place] for place in order], columns=["choice", *NAMES])


NAMES = ("A_KA", "A_ZS", "study")


def rejected(wish: Wish, tree: Tree, known: Evidence, numbers: bool) -> dict[str, str]:
    """Alternative -> what it did in the stored runs, and why it is none; with its chapter."""
    found = {}
    for choice in ALTERNATIVES:
        if not choice.when(wish, tree):
            continue
        frame = known.difference(choice.study, choice.setting, choice.against)
        if frame is not None:
            scores = [f"{name} {told(frame.loc[name], numbers)}" for name in ("A_KA", "A_ZS", "GM")]
            why = f"; {WHY[choice.words]}" if choice.words in WHY else ""
            pair = f"{choice.setting!r} minus {choice.against!r}"
            found[choice.words] = f"{pair}: {', '.join(scores)} (chapter {choice.study}){why}"
    return found
