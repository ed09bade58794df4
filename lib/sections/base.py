"""The base class of all sections of the config, and types that they share."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Layers = Annotated[int, Field(ge=1, le=1_000)]  # more would not be built in a lifetime
Width = Annotated[int, Field(ge=1, le=2**20)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]


def _user_path(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # a manifest cannot hold such a path
        raise ValueError(
            "the path is not UTF-8; rename the file, or give the folder that contains it"
        ) from None
    if not text:
        raise ValueError("the path is empty; give a path or, where the setting is optional, null")
    if "\0" in text:
        raise ValueError("a path cannot hold a zero byte")
    return os.path.expanduser(text)


# A path or, for some settings, a name; ~ is the home folder
UserPath = Annotated[str, AfterValidator(_user_path)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
