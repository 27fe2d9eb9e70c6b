"""The blocks of a network's towers, recognised by the names of its parameters."""

import functools
import re
from collections.abc import Iterable

from torch import nn

_BLOCK_NUMBER = re.compile(r"(.*?)\.(\d+(?:\.\d+)*)\.")
"""The first run of numbers in a name: the numbered part, and its number."""
_LAST = ("ln_post", "ln_final", "proj", "text_projection", "logit_scale", "logit_bias", "norm")
_LAST += ("head", "fc_norm", "attn_pool", "attnpool", "pooler", "final_norm")
"""Names of what follows the blocks of a tower, in open_clip and timm."""
_TOWERS = ("visual", "trunk", "text", "transformer")
"""Names of towers, as prefixes of their parts."""
_IMAGE_TOWER = re.compile(r"((module|_orig_mod)\.)*(visual|vision_model)\.")
"""How names of the image tower begin in open_clip and transformers; torch's wrappers of networks
put their own names before them."""


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
            stack = towers[_is_image(name)].setdefault(match[1], {})
            stack[name] = tuple(map(int, match[2].split(".")))
    for stacks in towers.values():
        ordered = [stacks[stack] for stack in sorted(stacks)]
        numbers = max(ordered, key=lambda stack: len(set(stack.values())), default={})
        blocks = sorted(set(numbers.values()))
        blocks_of |= {name: (blocks.index(n), len(blocks)) for name, n in numbers.items()}
    return blocks_of


def layers_from_top(model: nn.Module) -> dict[str, int]:
    """Return how far below the output of its tower each parameter is.

    Everything after the blocks, such as a projection, is 0. Of L blocks, the last is 1 and the
    first is L. The stem and embeddings are L + 1.
    """
    names = [name for name, _ in model.named_parameters()]
    blocks, distances = tower_blocks(names), {}
    counts = {_is_image(name): count for name, (_, count) in blocks.items()}
    for name in names:
        parts = [part for part in name.split(".") if part not in _TOWERS]
        if name in blocks:
            number, count = blocks[name]
            distances[name] = count - number
        else:
            is_last = parts[0] in _LAST
            distances[name] = 0 if is_last else counts.get(_is_image(name), 0) + 1
    return distances


def _is_image(name: str) -> bool:
    """Return whether a parameter belongs to the image tower."""
    return bool(_IMAGE_TOWER.match(name))
