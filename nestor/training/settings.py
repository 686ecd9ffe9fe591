"""Dataclasses from plain values and back: TOML files, `--key value` overrides, errors that name the key."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from nestor.errors import ConfigError, FileFormatError, suggest

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: there is no such file.
        FileFormatError: it is not TOML; the message has the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not a TOML file: {error}") from error


def write_toml(values: Mapping[str, Any]) -> str:
    """`values` as TOML text that reads back equal. None is left out, as TOML has no such value."""
    lines: list[str] = []
    _write_table(values, (), lines)
    return "\n".join(lines).strip() + "\n"


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of a dataclass from plain values, nested dataclasses from nested mappings.

    Args:
        path: dotted name of `values`, for messages.

    Raises:
        ConfigError: a key is unknown (the nearest is suggested) or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or cls.__name__} is {values!r}; it is a table of settings")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(unknown_key(_join(path, key), [_join(path, name) for name in known]))
    return cls(**{key: _convert(hints[key], value, _join(path, key)) for key, value in values.items()})


def plain(value: Any) -> Any:
    """The inverse of `build`: dataclasses as dicts and tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested tables as one dict with dotted keys. Lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = _join(path, key)
        flat |= flatten(value, name) if isinstance(value, Mapping) and value else {name: value}
    return flat


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """`["--optimizer.lr", "1e-3", "--run.compile"]` as `[("optimizer.lr", 0.001), ("run.compile", True)]`.

    A value is read as TOML or JSON (`[1, 2]`, `true`, `{"a": 1}`), else as text. `--key=value` works too.

    Raises:
        ConfigError: an argument is not of this form.
    """
    overrides: list[tuple[str, Any]] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            raise ConfigError(
                f"{argument!r} is no setting; write --key value, for example --optimizer.lr 1e-3"
            )
        key, given, text = argument[2:].partition("=")
        if not given:
            text = queue.pop(0) if queue and not queue[0].startswith("--") else "true"
        overrides.append((key.replace("-", "_"), parse_value(text)))
    return overrides


def parse_value(text: str) -> Any:
    """A number, truth value, list or table if `text` reads as one in TOML or JSON, else `text` itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return float(text)  # TOML wants a digit on both sides of the point
    except ValueError:
        return text


def apply_overrides(
    values: dict[str, Any], overrides: Iterable[tuple[str, Any]], cls: type
) -> dict[str, Any]:
    """`values` with dotted keys replaced; numbers index lists (`data.sources.0.weight`).

    Raises:
        ConfigError: a key does not exist in `cls`; the nearest of all keys is suggested.
    """
    result = plain(values)
    for key, value in overrides:
        _check_key(cls, key)
        *parents, last = key.split(".")
        place: Any = result
        for depth, parent in enumerate(parents):
            if isinstance(place, list):
                place = place[_index(place, parent, ".".join(parents[:depth]))]
            else:
                place = place.setdefault(parent, {})
        if isinstance(place, list):
            place[_index(place, last, ".".join(parents))] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise ConfigError(f"{key} cannot be set: {'.'.join(parents)} is {place!r}, which has no parts")
    return result


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that does not exist."""
    known = list(known)
    hint = suggest(key, known) or f"There are {', '.join(known)}."
    return f"there is no setting {key!r}. {hint}"


def dotted_keys(cls: type, path: str = "") -> list[str]:
    """All keys of a dataclass and the dataclasses in it."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        full = _join(path, name)
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        keys += dotted_keys(hint, full) if nested else [full]
    return keys


def _check_key(cls: type, key: str) -> None:
    """Follow `key` down to where the type no longer says what is allowed (a dict, or a part of a list)."""
    hint: Any = cls
    for part in key.split("."):
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            if _is_open(hint):
                return
            raise ConfigError(unknown_key(key, dotted_keys(cls)))
        hints = typing.get_type_hints(hint)
        if part not in hints:
            # A bare last name such as `lr` is the likeliest slip of all.
            full = [name for name in dotted_keys(cls) if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
            if full:
                raise ConfigError(f"there is no setting {key!r}. Did you mean {full[0]!r}?")
            raise ConfigError(unknown_key(key, dotted_keys(cls)))
        hint = hints[part]


def _is_open(hint: Any) -> bool:
    return typing.get_origin(hint) in (dict, tuple, list)


def _index(items: list[Any], part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{path} has {len(items)} entries, numbered from 0; {part!r} is none of them")
    return int(part)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise ConfigError(
                f"{path} is {value!r}; it is one of {choices}. {suggest(value, arguments)}".rstrip()
            )
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(one for one in arguments if one is not type(None)), value, path)
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(arguments) == 2 and arguments[1] is not Ellipsis and len(items) != 2:
            raise ConfigError(f"{path} is {value!r}; it is a pair")
        return tuple(_convert(arguments[0], item, f"{path}.{i}") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; it is a table of settings")
        return dict(value)
    return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        hint, hint.__name__
    )
    raise ConfigError(f"{path} is {value!r}; it must be {wanted}")


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lists = {key: value for key, value in table.items() if _is_tables(value)}
    for key, value in table.items():
        if key not in nested and key not in lists and value is not None:
            lines.append(f"{_key(key)} = {_inline(value)}")
    for key, value in nested.items():
        if value:
            name = (*path, _key(key))
            lines += ["", f"[{'.'.join(name)}]"]
            _write_table(value, name, lines)
    for key, value in lists.items():
        name = (*path, _key(key))
        for item in value:
            lines += ["", f"[[{'.'.join(name)}]]"]
            _write_table(item, name, lines)


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_inline(item)}" for key, item in value.items() if item is not None)
        return f"{{{inner}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
