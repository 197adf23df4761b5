"""Errors the user can act on, and strict parsing of specs: JSON to frozen dataclasses and back.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class PatchwordError(ValueError):
    """An error the user can act on. Its message is one line: the cause, and the next step."""


class UsageError(PatchwordError):
    """The user asked for something that does not exist or does not fit; exit code 2."""


class Interrupted(Exception):
    """A signal ended the run, after a step and a checkpoint."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def nearest(name: str, options: Iterable[str], count: int = 3) -> str:
    """`"; did you mean A, B?"` for the closest `options` to `name`, or the first few of them."""
    options = list(options)
    folded: dict[str, list[str]] = {}
    for option in options:
        folded.setdefault(option.casefold(), []).append(option)
    close = difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=0.5)
    if close:
        found = [option for key in close for option in folded[key]]
        return "; did you mean " + ", ".join(found[:count]) + "?"
    return "; valid: " + ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def parse(cls: type[T], data: Any, where: str = "") -> T:
    """A `cls` from parsed JSON. Raises `UsageError` on unknown or missing keys and on values of
    the wrong type, naming the key."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where or cls.__name__} must be an object, not {data!r:.40}")
    hints = _hints(cls)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    values: dict[str, Any] = {}
    for key, value in typing.cast(Mapping[str, Any], data).items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise UsageError(f"unknown key {path!r}{nearest(key, known)}")
        values[key] = _value(hints[key], value, path)
    for name, spec_field in known.items():
        required = spec_field.default is spec_field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UsageError(f"missing key {where + '.' if where else ''}{name}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(Any, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        return _value(rest[0], value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is Literal and isinstance(value, str):
        raise UsageError(f"{where} is {value!r}{nearest(value, map(str, arguments))}")
    if origin is tuple and arguments[-1] is ... and type(value) is int:
        value = [value]  # image_size=224
    if origin is tuple and isinstance(value, (list, tuple)):
        items = list(typing.cast("Iterable[Any]", value))
        kinds = [arguments[0]] * len(items) if arguments[-1] is ... else list(arguments)
        if len(kinds) == len(items):
            return tuple(
                _value(kind, item, f"{where}[{i}]")
                for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
            )
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise UsageError(f"{where} must be {name}, not {value!r:.40}")


def to_dict(spec: Any) -> dict[str, Any]:
    """The JSON form of a spec; `parse(type(spec), to_dict(spec)) == spec`."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in typing.cast("tuple[Any, ...]", value)]
        return value

    return plain(spec)


def changed(spec: T, **changes: Any) -> T:
    """`spec` with some fields changed, found by name in it or in its groups:
    `changed(spec, lr=0.01, steps=100)`. Raises `UsageError` on unknown names and bad values."""
    values = to_dict(spec)
    places: dict[str, dict[str, Any]] = dict.fromkeys(values, values)
    for group in list(values.values()):
        if isinstance(group, dict):
            group = typing.cast("dict[str, Any]", group)
            places |= dict.fromkeys(group, group)
    for name, value in changes.items():
        if name not in places:
            raise UsageError(f"unknown setting {name!r}{nearest(name, places)}")
        places[name][name] = value
    return parse(type(spec), values)


def differences(ours: Any, theirs: Any, *, free: bool = True, prefix: str = "") -> list[str]:
    """Dotted names of the fields that differ. With `free=False`, fields that cannot change the
    result of a run are left out."""
    found: list[str] = []
    for f in dataclasses.fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if not free and f.metadata.get("free"):
            continue
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            found += differences(a, b, free=free, prefix=f"{prefix}{f.name}.")
        elif a != b:
            found.append(prefix + f.name)
    return found


def at_least(name: str, value: float | None, least: int) -> None:
    """Raises `UsageError` if a number that was given, called `name`, is below the least that makes
    sense."""
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}; use {least} or more")
