"""Any CLIP model with only the rows of its vocabulary that some texts use.

Most of a small CLIP model is its token embedding, and training touches few of its 49,408 rows. A
compact model keeps the rows in use, in their order, so that the end mark stays the largest id and
id 0 stays the padding. The other rows only decay.

The embedded models need none of this: theirs is a vocabulary of its own, see
`cmp.embedded.models.vocabulary`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmp.errors import CmpError

EMBEDDING = "token_embedding.weight"
"""The tensor of an open_clip state dict that has a row per token."""
PADDING = 0


def used_ids(tokens: Tensor) -> Tensor:
    """Return the ids in tokenised texts [N, L], and the padding: int64 [n], ascending."""
    return torch.cat([tokens.flatten(), tokens.new_tensor([PADDING])]).unique()


def to_compact(tokens: Tensor, used: Tensor) -> Tensor:
    """Return the positions of ids in `used`, in the same shape.

    Raises:
        CmpError: An id is not there.
    """
    place = torch.searchsorted(used, tokens).clamp(max=len(used) - 1)
    if not torch.equal(used[place], tokens):
        absent = sorted(set(tokens[used[place] != tokens].tolist()))
        raise CmpError(
            f"a text has tokens outside the compact vocabulary ({absent[:5]} of {len(absent)}); "
            "make the vocabulary of all texts that the model will see, prompts included"
        )
    return place


def import_weights(state: Mapping[str, Tensor], used: Tensor) -> dict[str, Tensor]:
    """Return the compact form of a state dict, which shares all tensors but the embedding."""
    if EMBEDDING not in state:
        raise CmpError(f"the weights have no {EMBEDDING}: only CLIP's own text tower is supported")
    return {**state, EMBEDDING: state[EMBEDDING][used]}


def shrink(model: nn.Module, used: Tensor) -> nn.Module:
    """Replace a model's token embedding, in place, with its rows `used`; return the model."""
    rows = import_weights(model.state_dict(), used)[EMBEDDING]
    model.token_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    model.vocab_size = len(used)
    return model
