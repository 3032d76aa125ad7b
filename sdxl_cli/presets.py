"""Presets and configurations: TOML read into frozen dataclasses, and written back.

The type hints of the dataclass are the schema: nested dataclasses are tables, tuples are arrays, ``Literal``
is a choice, and ``"none"`` stands for no value where a field may be ``None`` (TOML has no null). What
does not fit is a :class:`UsageError` that names the file or flag, the key, and the nearest names.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from sdxl_cli.errors import FileError, UsageError, unknown

T = TypeVar("T")

NONE = "none"
"""What stands for ``None`` in TOML."""

_PACKAGE = Path(__file__).resolve().parent


class _Partial(dict[str, Any]):
    """Checked values of some fields of a dataclass; a table inside is a ``_Partial`` again."""


def preset_dir() -> Path:
    """Folder of the shipped presets: inside the installed package, or beside it in a checkout."""
    packaged = _PACKAGE / "_presets"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "presets"


def names(prefix: str = "") -> list[str]:
    """Names of the shipped presets that begin with ``prefix`` (``"generate"``, ``"buckets"``), sorted."""
    return sorted(path.stem for path in preset_dir().glob(f"{prefix}*.toml"))


def load(name_or_path: str | Path, cls: type[T]) -> T:
    """Read the preset of that name, or the TOML file at that path, into ``cls``.

    A name has no ``.toml`` and no slash in it. A file may say ``extends = "other"``, then only what differs.
    Raises UsageError for an unknown name, key or value, FileError for a file that is missing or is not TOML.
    """
    path = _find(name_or_path)
    return _build(cls, _check(cls, _read(path), path.name), path.name)


def layered(
    cls: type[T],
    *,
    preset: str | Path | None = None,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> T:
    """Resolve a configuration: flag over ``--set`` over ``--config`` file over preset over the defaults.

    ``sets`` are ``a.b=value`` texts. ``flags`` maps dotted field names to values; ``None`` means "not given".
    Raises UsageError and FileError as :func:`load`.
    """
    merged = _merged(cls, preset, config, sets, flags or {})
    return _build(cls, merged, str(config or preset or cls.__name__))


def stated(
    cls: type[Any],
    *,
    preset: str | Path | None = None,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> frozenset[str]:
    """The keys of ``cls`` that any of these gives a value; arguments are those of :func:`layered`."""
    return frozenset(_merged(cls, preset, config, sets, flags or {}))


def _merged(
    cls: type[Any],
    preset: str | Path | None,
    config: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, object],
) -> _Partial:
    merged = _Partial()
    for source in (preset, config):
        if source is not None:
            path = _find(source)
            _merge(merged, _check(cls, _read(path), path.name))
    for text in sets:
        _merge(merged, _check(cls, _parse_set(text), f"--set {text}"))
    for key, value in flags.items():
        if value is not None:
            _merge(merged, _check(cls, _nest(key, value), "command line"))
    return merged


def apply_overrides(obj: T, overrides: Iterable[str]) -> T:
    """A copy of the dataclass ``obj`` with ``a.b=value`` texts applied, later ones winning.

    Values are TOML; what is not TOML is taken as plain text, so ``sampler=euler`` needs no quotes.
    """
    merged = _Partial()
    for text in overrides:
        _merge(merged, _check(type(obj), _parse_set(text), f"--set {text}"))
    return _replace(obj, merged, "--set")


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from a parsed TOML or JSON table; ``where`` names it in errors."""
    return _build(cls, _check(cls, table, where), where)


def to_toml(obj: object) -> str:
    """The dataclass ``obj`` as TOML, every field written out; reading it back gives an equal object."""
    lines: list[str] = []
    _write_table(obj, "", lines)
    return "\n".join(lines).strip("\n") + "\n"


# Reading ------------------------------------------------------------------------------------------


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        return Path(text)
    if text not in names():
        raise unknown("preset", text, names())
    return preset_dir() / f"{text}.toml"


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The table in the file, laid over the one it ``extends``."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); give an existing TOML file") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not text in UTF-8; give a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path}: is not valid TOML: {error}") from error
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UsageError(f"{path.name}: extends: expected the name of a preset, got {base!r}")
    parent = path.parent / base if base.endswith(".toml") else _find(base)
    if parent in (path, *below):
        raise UsageError(f"{path.name}: extends itself through {base!r}; remove one of the two lines")
    return _overlay(_read(parent, (path, *below)), table)


def _overlay(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    both = {
        k: _overlay(low[k], v)
        for k, v in high.items()
        if isinstance(v, dict) and isinstance(low.get(k), dict)
    }
    return {**low, **high, **both}


def _parse_set(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in key.strip().split(".")):
        raise UsageError(f"--set {text}: expected KEY=VALUE, for example --set a.b=3")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return _nest(key.strip(), parsed["value"] if parsed.keys() == {"value"} else value.strip())


def _nest(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


# Checking against the type hints ------------------------------------------------------------------


def _check(cls: type[Any], table: Mapping[str, Any], where: str) -> _Partial:
    """The table's values converted to the types of the fields of ``cls``."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    for key in table:
        if key not in fields:
            raise UsageError(f"{where}: {unknown('key', key, fields)}")
    return _Partial({key: _convert(fields[key], value, f"{where}: {key}") for key, value in table.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise UsageError(f"{where}: {unknown('value', str(value), map(str, args))}")
        return value
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(where, "a table", value)
        return {str(key): _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise _wrong_type(where, "a table", value)
        return _check(hint, value, where)
    return _convert_scalar(hint, value, where)


_SCALARS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is Path:
        if isinstance(value, str | Path):
            return Path(value).expanduser()
        raise _wrong_type(where, "a path", value)
    if hint not in _SCALARS:
        raise TypeError(f"{where}: a field of type {hint} cannot be read from TOML")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _wrong_type(where, _SCALARS[hint], value)
    return value


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in args and (value is None or value == NONE):
        return None
    choices = [arg for arg in args if arg is not type(None)]
    errors = []
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except UsageError as error:
            errors.append(error)
    raise errors[0] if len(errors) == 1 else _wrong_type(where, " or ".join(map(_describe, choices)), value)


def _convert_sequence(origin: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong_type(where, "a list", value)
    open_ended = origin is list or (len(args) == 2 and args[1] is Ellipsis)
    hints = [args[0]] * len(value) if open_ended else list(args)
    if len(hints) != len(value):
        raise _wrong_type(where, f"a list of {len(hints)} values", value)
    items = []
    for i, (hint, item) in enumerate(zip(hints, value, strict=True)):
        converted = _convert(hint, item, f"{where}[{i}]")
        items.append(
            _build(hint, converted, f"{where}[{i}]") if isinstance(converted, _Partial) else converted
        )
    return origin(items)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return _SCALARS.get(hint, "a list" if typing.get_origin(hint) in (tuple, list) else "a table")


def _wrong_type(where: str, expected: str, value: object) -> UsageError:
    return UsageError(f"{where}: expected {expected}, got {value!r}")


# Building -----------------------------------------------------------------------------------------


def _merge(low: _Partial, high: _Partial) -> None:
    """Lay ``high`` over ``low``, table by table; arrays are replaced whole."""
    for key, value in high.items():
        below = low.get(key)
        if isinstance(value, _Partial) and isinstance(below, _Partial):
            _merge(below, value)
        elif isinstance(value, dict) and isinstance(below, dict):
            low[key] = below | value  # a table of free names
        else:
            low[key] = value


def _build(cls: type[T], partial: _Partial, where: str) -> T:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    missing = []
    for spec in dataclasses.fields(cls):  # type: ignore[arg-type]
        if spec.name not in partial:
            if (
                spec.init
                and spec.default is dataclasses.MISSING
                and spec.default_factory is dataclasses.MISSING
            ):
                missing.append(spec.name)
            continue
        value = partial[spec.name]
        if isinstance(value, _Partial):
            value = _build_table(spec, hints[spec.name], value, f"{where}: {spec.name}")
        values[spec.name] = value
    if missing:
        raise UsageError(f"{where}: missing key {', '.join(missing)}")
    return _construct(cls, values, where)


def _build_table(spec: dataclasses.Field[Any], hint: Any, partial: _Partial, where: str) -> Any:
    """A table changes what the field has by default, rather than starting from the defaults of its class."""
    default = spec.default
    if spec.default_factory is not dataclasses.MISSING:
        default = spec.default_factory()
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return _replace(default, partial, where)
    return _build(_dataclass_in(hint), partial, where)


def _replace(obj: T, partial: _Partial, where: str) -> T:
    hints = typing.get_type_hints(type(obj))
    values = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if f.init}  # type: ignore[arg-type]
    for key, value in partial.items():
        if isinstance(value, _Partial):
            now = values[key]
            inner = f"{where}: {key}"
            value = (
                _build(_dataclass_in(hints[key]), value, inner)
                if now is None
                else _replace(now, value, inner)
            )
        values[key] = value
    return _construct(type(obj), values, where)


def _construct(cls: type[T], values: dict[str, Any], where: str) -> T:
    try:
        return cls(**values)
    except ValueError as error:  # what a __post_init__ says about values that do not go together
        raise UsageError(f"{where}: {error}") from error


def _dataclass_in(hint: Any) -> type[Any]:
    candidates = [arg for arg in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arg)]
    assert len(candidates) == 1, f"{hint} is not one dataclass"
    assert isinstance(candidates[0], type)
    return candidates[0]


# Writing ------------------------------------------------------------------------------------------


def _write_table(obj: Any, prefix: str, lines: list[str]) -> None:
    tables: list[tuple[str, Any]] = []
    for spec in dataclasses.fields(obj):
        if not spec.init:
            continue
        value = getattr(obj, spec.name)
        if dataclasses.is_dataclass(value) or _is_array_of_tables(value):
            tables.append((spec.name, value))
        else:
            lines.append(f"{spec.name} = {_format(value)}")
    for name, value in tables:
        path = f"{prefix}{name}"
        for item in value if isinstance(value, tuple | list) else [value]:
            lines += ["", f"[[{path}]]" if isinstance(value, tuple | list) else f"[{path}]"]
            _write_table(item, f"{path}.", lines)


def _is_array_of_tables(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and bool(value)
        and all(dataclasses.is_dataclass(item) for item in value)
    )


def _format(value: Any) -> str:
    if value is None:
        return _quote(NONE)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _quote(str(value))
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_format, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quote(str(key))} = {_format(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"{type(value).__name__} cannot be written as TOML")


def _quote(text: str) -> str:
    """A TOML basic string: its escapes are a subset of JSON's, except that DEL must be escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
