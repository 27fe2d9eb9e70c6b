"""The blocks of a network's towers, recognised by the names of its parameters."""

import functools
import re
from collections.abc import Iterable

_BLOCK_NUMBER = re.compile(r"(.*?)\.(\d+(?:\.\d+)*)\.")
"""The first run of numbers in a name: the numbered part, and its number."""


@functools.lru_cache(maxsize=8)
def layer_depth(names: tuple[str, ...]) -> dict[str, float]:
    """Return each parameter's depth l / (L - 1) among the L blocks of its tower, from 0 to 1.

    Everything outside the blocks, such as the stem, embeddings and projections, has depth 0.
    """
    depth = dict.fromkeys(names, 0.0)
    for name, (number, count) in tower_blocks(names).items():
        depth[name] = number / max(count - 1, 1)
    return depth


def tower_blocks(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the number of each parameter's block in its tower, from 0, and how many blocks the
    tower has; only for parameters within blocks.

    The blocks of a tower are its most frequent numbered parts, in the order of their numbers: in
    "visual.trunk.stages.1.0.weight", the stack is "visual.trunk.stages" and the number (1, 0).
    "layer1" of a ResNet counts as number 1 of "layer".
    """
    blocks_of = {}
    towers: dict[bool, dict[str, dict[str, tuple[int, ...]]]] = {True: {}, False: {}}
    for name in names:
        if match := _BLOCK_NUMBER.match(re.sub(r"\blayer(?=\d)", "layer.", name)):
            stack = towers[name.startswith("visual.")].setdefault(match[1], {})
            stack[name] = tuple(map(int, match[2].split(".")))
    for stacks in towers.values():
        ordered = [stacks[stack] for stack in sorted(stacks)]
        numbers = max(ordered, key=lambda stack: len(set(stack.values())), default={})
        blocks = sorted(set(numbers.values()))
        blocks_of |= {name: (blocks.index(n), len(blocks)) for name, n in numbers.items()}
    return blocks_of
