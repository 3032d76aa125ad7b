"""Values of a request's fields as text: what ``--sweep``, prompt files and the prompt loop are made of.

Nothing here knows which fields there are; they and their types are read from the request's dataclass.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeVar, Union

from sdxl_cli import presets
from sdxl_cli.errors import UsageError, unknown

Request = TypeVar("Request")

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def hints(cls: type[Any]) -> dict[str, Any]:
    """Field name -> type of a request's dataclass."""
    known = typing.get_type_hints(cls)
    return {field.name: known[field.name] for field in dataclasses.fields(cls)}


def field_name(cls: type[Any], name: str, aliases: Mapping[str, str], where: str) -> str:
    """The field meant by ``cfg-scale``, ``cfg_scale``, ``--cfg-scale`` or an alias such as ``guidance-scale``.

    Args:
        cls: the request's class.
        name: as typed.
        aliases: other names, with dashes, of fields.
        where: what to call the place in the error.

    Raises:
        UsageError: there is no such field; names the nearest.
    """
    key = name.strip().lstrip("-")
    found = aliases.get(key.replace("_", "-"), key.replace("-", "_"))
    if found not in hints(cls):
        long = (alias for alias in aliases if len(alias) > 2)
        known = [*(field.replace("_", "-") for field in hints(cls)), *long]
        raise UsageError(f"{where}: {unknown('setting', key, known)}")
    return found


def typed(cls: type[Any], field: str, text: str, where: str) -> Any:
    """``text`` as a value of the field: a number where the field is one, a list of one where it is a list.

    Raises:
        UsageError: it is not such a value.
    """
    if text.strip() == presets.NONE and type(None) in typing.get_args(hints(cls)[field]):
        return None
    for hint in _choices(hints(cls)[field]):
        if typing.get_origin(hint) in (tuple, list):
            return [_scalar(typing.get_args(hint)[0], text, f"{where}: {field}")]
        return _scalar(hint, text, f"{where}: {field}")
    raise AssertionError(f"{field} has no type")


def is_number(cls: type[Any], field: str) -> bool:
    """Whether the field holds a whole number or a float."""
    return any(hint in (int, float) for hint in _choices(hints(cls)[field]))


def is_flag(cls: type[Any], field: str) -> bool:
    """Whether the field is true or false."""
    return bool in _choices(hints(cls)[field])


def is_list(cls: type[Any], field: str) -> bool:
    """Whether the field holds several values."""
    return any(typing.get_origin(hint) in (tuple, list) for hint in _choices(hints(cls)[field]))


def changed(request: Request, changes: Mapping[str, Any], where: str) -> Request:
    """The request with other values of some fields, checked as those of a preset are.

    A new ``size`` takes the place of a width and height that were asked for before.

    Raises:
        UsageError: an unknown field or a wrong value; the text begins with ``where``.
    """
    before = asdict(request)  # type: ignore[call-overload]
    if "size" in changes:
        before |= {"width": None, "height": None}
    return presets.from_table(type(request), before | dict(changes), where)


def _choices(hint: Any) -> list[Any]:
    """The types a value may have, without None."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return [hint]


def _scalar(hint: Any, text: str, where: str) -> Any:
    text = text.strip()
    if hint is bool:
        if text.lower() not in _TRUTH:
            raise UsageError(f"{where}: expected true or false, got {text!r}")
        return _TRUTH[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UsageError(f"{where}: expected {kind}, got {text!r}") from None
    if typing.get_origin(hint) is Literal and text not in typing.get_args(hint):
        raise UsageError(f"{where}: {unknown('value', text, typing.get_args(hint))}")
    return text
