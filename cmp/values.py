"""Types for the values of settings, with their bounds."""

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MAX_COUNT = 2**31 - 1
MAX_COMPUTE = 1e15
"""Upper bound on GPU hours or memory-adjusted GFLOPs, more than exist."""
Positive = Annotated[float, Field(gt=0)]
Multiple = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Steps = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
Location = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,1000}$")]
_PLACE = (
    r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,99}|hf-hub:[A-Za-z0-9._~/+@-]{1,500}"
    r"|local-dir:[^\x00-\x1f]{1,500})$"
)
ModelName = Annotated[str, Field(pattern=_PLACE)]
