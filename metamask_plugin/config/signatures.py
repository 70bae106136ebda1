"""Keywords, held against the signature of what they are passed to."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import create_model

from metamask_plugin.config.fields import Anything, Block, Number, Text, key
from metamask_plugin.config.read import read

KINDS: dict[Any, Any] = {float: Number, str: Text}
"""Other kinds than these, whole numbers and switches are left to what takes them."""


def check_keywords(
    name: str,
    given: Mapping[str, Any],
    function: Callable,
    known: type[Block] = Block,
    aside: Iterable[str] = (),
) -> None:
    """Holds a block against a signature.

    Args:
        name: the block as the user writes it.
        given: the block.
        function: what it will be passed to.
        known: types, by name, of arguments about which more is known than the signature says.
        aside: arguments that are not the user's.

    Raises:
        UserError: for an unknown argument, with the nearest one, or a value that does not fit.

    Example:
        >>> from metamask_plugin.config.methods import TaskKwargs
        >>> from metamask_plugin.tasks import SimCLR
        >>> check_keywords("task_kwargs", {"temperature": 0.1}, SimCLR, TaskKwargs, ("features_dim",))
    """
    read(model_of(function, known, tuple(aside)), given, name)


def model_of(function: Callable, known: type[Block] = Block, aside: tuple[str, ...] = ()) -> type[Block]:
    """A model with a key for each argument."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    fields: dict[str, Any] = {}
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument in aside or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        kinds = _kinds(hints.get(argument, Any))
        field: Any = known.model_fields.get(argument)
        if field is None:
            plain = next((kind for kind in kinds if kind in (int, float, bool, str)), None)
            kind, default = Anything if plain is None else KINDS.get(plain, plain), None
        else:
            kind, extra = _annotated(field), field.json_schema_extra or {}
            default = key(None, field.description, **extra)
        fields[argument] = (kind | None if type(None) in kinds else kind, default)
    return create_model("Keywords", __base__=Block, **fields)


def _annotated(field: Any) -> Any:
    annotation = field.annotation
    for constraint in field.metadata:
        annotation = typing.Annotated[annotation, constraint]
    return annotation


def _kinds(hint: Any) -> tuple[Any, ...]:
    unions = (typing.Union, types.UnionType)
    return typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)
