"""Shrink the vocabulary of a CLIP model to the rows that its texts use.

Most of a small CLIP model is its token embedding, and training uses few of its 49,408 rows. A
compact model keeps the used rows in order, so that the end token still has the largest id and id 0
is still the padding. All other rows would only decay.

The embedded models do not need this, since they have their own vocabulary, see
`cmp.embedded.models.vocabulary`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmp.errors import CmpError

EMBEDDING = "token_embedding.weight"
"""The tensor of an open_clip state dict with one row per token."""
PADDING = 0


def used_ids(tokens: Tensor) -> Tensor:
    """Return the ids in tokenised texts [N, L], including the padding, as int64 [n], ascending."""
    return torch.cat([tokens.flatten(), tokens.new_tensor([PADDING])]).unique()


def to_compact(tokens: Tensor, used: Tensor) -> Tensor:
    """Return the positions of ids in `used`, with the same shape.

    Raises:
        CmpError: An id is not in `used`.
    """
    place = torch.searchsorted(used, tokens).clamp(max=len(used) - 1)
    if not torch.equal(used[place], tokens):
        absent = sorted(set(tokens[used[place] != tokens].tolist()))
        raise CmpError(
            f"a text has tokens outside the compact vocabulary ({absent[:5]} of {len(absent)}); "
            "build the vocabulary from all texts that the model will see, including prompts"
        )
    return place


def import_weights(state: Mapping[str, Tensor], used: Tensor) -> dict[str, Tensor]:
    """Return the compact form of a state dict, which shares all tensors except the embedding."""
    if EMBEDDING not in state:
        raise CmpError(f"the weights have no {EMBEDDING}: only CLIP's own text tower is supported")
    return {**state, EMBEDDING: state[EMBEDDING][used]}


def shrink(model: nn.Module, used: Tensor) -> nn.Module:
    """Reduce a model's token embedding to the rows `used` in place, and return the model."""
    rows = import_weights(model.state_dict(), used)[EMBEDDING]
    model.token_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    model.vocab_size = len(used)
    return model
