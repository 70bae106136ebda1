"""The vocabulary of the models: kinds of values, the base class of a block of keys, and a key in one line."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST = 10**9
"""Beyond this a number is a slip; and nothing behind a config has to think of an overflow."""
MOST_CHARACTERS = 4096
MOST_IN_A_NAME = 200
"""Bytes: a file system allows 255, and a run's folder appends a digest."""


class Block(BaseModel):
    """Keys that belong together; unknown ones are refused, and nothing is converted: 2.0 is no integer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def null_is_the_default(cls, node: Any) -> Any:
        """Takes out what is null, where null is no value of its own."""
        if not isinstance(node, Mapping):
            return node
        fields = cls.model_fields
        return {
            name: value
            for name, value in node.items()
            if value is not None or name not in fields or fields[name].get_default() is None
        }


def key(default: Any, meaning: str, **rest: Any) -> Any:
    """A key of a block.

    Args:
        default: where the config is silent or null; ``...`` where there must be a value.
        meaning: for the reader of a table.
        rest: ``expected`` completes "must be ..." in place of what the type says.
    """
    extra: dict[str, Any] = {"json_schema_extra": rest} if rest else {}
    return Field(default, description=meaning, **extra)


def refuse(expected: str, remedy: str = "") -> PydanticCustomError:
    """What a validator raises: completes "<key> must be ..."."""
    return PydanticCustomError("refused", "must be {expected}", {"expected": expected, "remedy": remedy})


def _text(value: str) -> str:
    if len(value) > MOST_CHARACTERS:
        raise refuse(f"at most {MOST_CHARACTERS} characters long")
    if not all(letter.isprintable() or letter in "\t\n" for letter in value):
        raise refuse("text without control characters")
    return value


def _path(value: str) -> str:
    if not value.strip() or "\n" in value:
        raise refuse("a path in one line")
    if max(len(part.encode()) for part in value.split("/")) > 255:
        raise refuse("a path whose parts have at most 255 bytes")
    return value


def _folder_name(value: str) -> str:
    if value.strip() in ("", ".", "..") or not value.isprintable():
        raise refuse("a folder's name")
    if re.search(r"[/\\]", value):
        raise refuse("a folder's name without / and \\", "set checkpoint.dir for another place")
    if len(value.encode()) > MOST_IN_A_NAME:
        raise refuse(f"at most {MOST_IN_A_NAME} bytes long")
    return value


def _plain(value: Any) -> Any:
    """Refuses what no setting can be, however deep: NaN, infinity, text with control characters."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if not isinstance(name, str):
                raise refuse(f"a block whose keys are text, not {name!r}")
            _plain(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            _plain(entry)
    elif isinstance(value, str):
        _text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise refuse("a finite number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise refuse("a number that 64 bits hold")
    elif not (value is None or isinstance(value, int | float)):
        raise refuse("text, a number, True, False, null, a list or a block")
    return value


Text = Annotated[str, AfterValidator(_text)]
Path = Annotated[Text, AfterValidator(_path), Field(json_schema_extra={"expected": "a path"})]
FolderName = Annotated[
    Text, AfterValidator(_folder_name), Field(json_schema_extra={"expected": "a folder's name"})
]
Anything = Annotated[Any, AfterValidator(_plain)]
Keywords = Annotated[dict[str, Any], AfterValidator(_plain)]
"""Keys that belong to the object they are passed to, and are checked there."""

Natural = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Width = Annotated[int, Field(ge=1, le=2**17)]
"""Units of a layer: two layers of the largest would take 64 GB."""
Pixels = Annotated[int, Field(ge=1, le=8192)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
_OF_RGB = Field(min_length=3, max_length=3, json_schema_extra={"expected": "a list of three numbers"})
Channels = Annotated[list[Number], _OF_RGB]
Deviations = Annotated[list[Positive], _OF_RGB]
Rate = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
