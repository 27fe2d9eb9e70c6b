"""What a config says of the network; `cmp.models` makes it."""

from pydantic.dataclasses import dataclass

from cmp.config.fields import STRICT, ModelName, Start

STARTS = ("annealed", "unannealed", "cosine", "random")
"""What `model.start` may be without any file of the reader's: a base of an embedded model, or
random weights. A `cosine` base is of another pretraining schedule; it does not ship, `cmp pretrain`
makes it."""


@dataclass(frozen=True, config=STRICT)
class Model:
    """Which network, and the weights it starts from.

    name: an embedded model, an open_clip name, or where a model lies, such as "hf-hub:ORG/NAME".
    start: one of `STARTS`; a pretrained tag that open_clip has for the name; the path of a
    safetensors file or of an open_clip checkpoint; "hub", the weights that lie beside a model of a
    hub.
    """

    name: ModelName = "tiny"
    start: Start = "annealed"
