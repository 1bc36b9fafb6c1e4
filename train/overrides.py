"""Changes of a configuration: `--set key=value` with the types of the fields, and reading it back from JSON."""

import json
import types
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

ConfigT = TypeVar("ConfigT")


def override(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """Apply assignments such as "optimizer.learning_rate=2e-4", in order. The result is checked once, after the last.

    Keys are names of fields, separated by dots; an element of a tuple is addressed by its index, as in
    "data.sources.0.path=/data". Values have the type of the field. "none" unsets an optional field. A tuple is a list
    of comma-separated values; a dataclass or a tuple of dataclasses is JSON.

    Raises:
        ValueError: an assignment without "=", an unknown key, or a value of another type. The message names the key,
            the value and what is possible.
    """
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment} has no '='; write --set key=value, such as --set steps=1000.")
        config = _assign(config, key.strip().split("."), value.strip(), key.strip())
    return _checked(config)


def changed_fields(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Descriptions of all fields that differ between two results of `TrainConfig.to_dict`."""
    changes = []
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_fields(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} was {old}, is {new}")
    return sorted(changes)


def _checked(node: Any) -> Any:
    """A copy of a configuration whose dataclasses have checked their fields."""
    if isinstance(node, tuple):
        return tuple(_checked(part) for part in node)
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{f.name: _checked(getattr(node, f.name)) for f in fields(node)})
    return node


def _assign(node: Any, path: list[str], text: str, key: str) -> Any:
    """A copy of `node` in which the value at `path` is replaced; its dataclasses do not check their fields, because
    further assignments may follow."""
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise ValueError(f"--set {key}: {name!r} is not an index of a tuple of {len(node)} elements.")
        index = int(name)
        value = _assign(node[index], rest, text, key) if rest else _parse(type(node[index]), text, key)
        return (*node[:index], value, *node[index + 1 :])
    known = [f.name for f in fields(node)] if is_dataclass(node) else []
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        where = f"{type(node).__name__} has {', '.join(known)}" if known else f"{key} does not have fields"
        raise ValueError(f"--set {key}: there is no field {name!r};{hint} {where}.")
    current: Any = node
    if rest:
        value = _assign(getattr(current, name), rest, text, key)
    else:
        value = _parse(get_type_hints(type(current))[name], text, key)
    changed = copy(current)
    object.__setattr__(changed, name, value)
    return changed


def _parse(kind: Any, text: str, key: str) -> Any:
    """Convert the text of an assignment to a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null") and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return _parse(kind, text, key)
    if origin is Literal:
        if text not in args:
            raise ValueError(f"--set {key}={text}: use one of {', '.join(map(str, args))}.")
        return text
    if is_dataclass(kind) or (origin is tuple and is_dataclass(args[0])):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--set {key}={text} is not JSON ({error}).") from error
        return from_json(kind, value, key)
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        kinds = [args[0]] * len(parts) if args[-1] is Ellipsis else list(args)
        if len(parts) != len(kinds):
            raise ValueError(f"--set {key}={text}: give {len(kinds)} comma-separated values, not {len(parts)}.")
        return tuple(_parse(part_kind, part, key) for part_kind, part in zip(kinds, parts, strict=True))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--set {key}={text}: use true or false.")
        return text.lower() == "true"
    if kind is Path and not text:
        raise ValueError(f"--set {key}= is empty; give a path.")
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"--set {key}={text}: the value must be of type {kind.__name__}.") from error


def from_json(kind: Any, value: Any, key: str) -> Any:
    """Build a configuration of type `kind` from JSON values; the inverse of `TrainConfig.to_dict`.

    Raises:
        ValueError: an unknown or missing field, or a value of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return from_json(kind, value, key)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{key} is {value!r}; it must be a JSON object.")
        hints = get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()):
            raise ValueError(f"{key}: there is no field {unknown[0]!r}; the fields are {', '.join(hints)}.")
        values = {name: from_json(hints[name], item, f"{key}.{name}") for name, item in value.items()}
        try:
            return cast(Callable, kind)(**values)
        except TypeError as error:  # a required field is missing
            raise ValueError(f"{key}: {error}.") from error
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{key} is {value!r}; it must be a JSON list.")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(value) != len(kinds):
            raise ValueError(f"{key} is {value!r}; it must be a list of {len(kinds)} values.")
        parts = zip(kinds, value, strict=True)
        return tuple(from_json(part, item, f"{key}.{i}") for i, (part, item) in enumerate(parts))
    if origin is Literal:
        return _parse(kind, str(value), key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{key} is {value!r}; it must be a path.")
        return Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{key} is {value!r}; it must be of type {kind.__name__}.")
    return value
