"""Values read from a file turned into dataclasses, with every type checked: only what was written passes."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def dataclass_of(kind: type[T], fields: Any, where: str) -> T:
    """An instance of a dataclass from its fields. Raises ValueError that says ``where`` something else was found."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} is {_shown(fields)}, expected a dict")
    hints = _hints(kind)  # type: ignore[arg-type]
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if list(fields) != known:
        raise ValueError(f"{where} has the entries {_shown(list(fields))}, expected {known}")
    return kind(**{name: value_of(hints[name], fields[name], f"{where}.{name}") for name in known})


_hints = functools.cache(typing.get_type_hints)


def value_of(hint: Any, value: Any, where: str) -> Any:
    """``value`` as its type hint says: numbers are finite and not negative, lists and tuples are one."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return value_of(next(one for one in inner if one is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return dataclass_of(hint, value, where)  # type: ignore[arg-type]
    if kind is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {_shown(value)}, expected a list")
        hints = [inner[0]] * len(value) if inner[-1] is ... else inner
        if len(hints) != len(value):
            raise ValueError(f"{where} is {_shown(value)}, expected {len(hints)} entries")
        return tuple(value_of(one, x, f"{where}[{i}]") for i, (one, x) in enumerate(zip(hints, value, strict=True)))
    if kind is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where} is {_shown(value)}, expected a dict")
        return {key: value_of(inner[1], x, f"{where}.{key}") for key, x in value.items()}
    wanted = (int, float) if hint is float else hint
    right = isinstance(value, wanted) and (hint is bool or not isinstance(value, bool))
    if not right or (isinstance(value, (int, float)) and not (math.isfinite(value) and 0 <= value < 2**62)):
        raise ValueError(f"{where} is {_shown(value)}, expected {getattr(hint, '__name__', hint)}")
    return value


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError for anything but numbers, strings, None, and lists, tuples and dicts of them."""
    if depth > 50:
        raise ValueError(f"{where} is nested without end")
    if isinstance(value, dict):
        for key, one in value.items():
            check_plain(key, where, depth + 1)
            check_plain(one, where, depth + 1)
    elif isinstance(value, (list, tuple)):
        for one in value:
            check_plain(one, where, depth + 1)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise ValueError(f"{where} holds a {type(value).__name__}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


__all__ = ["check_plain", "dataclass_of", "value_of"]
