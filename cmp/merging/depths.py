"""How deep a parameter lies in its tower, read off the names alone."""

import re
from collections.abc import Iterable

BLOCK = re.compile(r"(.*?)\.(\d+(?:\.\d+)*)\.")
"""The first run of numbers in a name: what is numbered, and which one of it."""


def block_of(name: str) -> tuple[str, str, tuple[int, ...]] | None:
    """(tower, what is numbered, number) of a parameter; none if nothing in its name is numbered.

    "visual.trunk.stages.1.0.weight" -> ("visual", "visual.trunk.stages", (1, 0)). ResNets' "layer1"
    counts as number 1 of "layer".
    """
    match = BLOCK.match(re.sub(r"\blayer(?=\d)", "layer.", name))
    if not match:
        return None
    tower = "visual" if name.startswith("visual.") else "text"
    return tower, match[1], tuple(map(int, match[2].split(".")))


def depths(names: Iterable[str]) -> dict[str, float]:
    """Each parameter's place among the L blocks of its tower, from 0 to 1: l / (L - 1), l from 0.

    The blocks of a tower are what it has the most of, in the order of their numbers. All else, such
    as stem, embeddings, and projections, has depth 0, as have all where nothing is numbered.
    """
    found = {name: block_of(name) for name in names}
    stacks: dict[str, dict[str, set]] = {}
    for block in filter(None, found.values()):
        stacks.setdefault(block[0], {}).setdefault(block[1], set()).add(block[2])
    blocks = {tower: max(sorted(kinds.items()), key=lambda x: len(x[1])) for tower, kinds in
              stacks.items()}  # fmt: skip
    result = {}
    for name, block in found.items():
        stack, numbers = blocks[block[0]] if block else ("", ())
        inside = block and block[1] == stack and len(numbers) > 1
        result[name] = sorted(numbers).index(block[2]) / (len(numbers) - 1) if inside else 0.0
    return result
