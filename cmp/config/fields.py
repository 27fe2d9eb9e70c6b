"""Kinds of values that a config holds."""

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
MOST = 2**31 - 1
"""The largest count."""
Count = Annotated[int, Field(ge=1, le=MOST)]
Steps = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
Data = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,1000}$")]
"""A collection that comes with the package, or the path of a folder of manifests."""
ModelName = Annotated[
    str,
    Field(
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,99}|(hf-hub|local-dir):[A-Za-z0-9._~/+@-]{1,500})$"
    ),
]
"""A name of open_clip's, or where a model lies."""
Start = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,1000}$")]
"""A base, a pretrained tag of the model, or a file's path."""
