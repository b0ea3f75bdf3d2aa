"""How a network is called: positional and keyword arguments, and tensors inside lists, tuples and dicts of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


Example = Tensor | Sequence[Any] | Mapping[str, Any]


def call_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an example: a tensor is the only one, a mapping is keywords."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Iterable) and not isinstance(example, str):
        return tuple(example), {}
    raise TypeError(f"sparsekd: example_inputs must be a tensor or several, got {type(example).__name__}")


class Call:
    """The structure of one call. Its tensors are numbered in the order in which they are met; what else is in it stays
    what it was.

    args, kwargs: patterns made of ``{"input": i}``, ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"dict": {...}}`` and
    ``{"value": x}``, ready for a file. names: of the positional arguments, which may be given by keyword too.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> None:
        self.args, self.kwargs, self.names = list(args), dict(kwargs), list(names)
        self.count = sum(map(_count, (*self.args, *self.kwargs.values())))
        self._flat = not self.kwargs and self.args == [{"input": i} for i in range(len(self.args))]

    @classmethod
    def of(cls, forward: Callable[..., Any] | None, example: Any) -> tuple[Call, tuple[Tensor, ...]]:
        """The call that ``example_inputs`` describes, and its tensors. A mapping is keyword arguments."""
        args, kwargs = call_arguments(example)
        tensors: list[Tensor] = []
        patterns = [_pattern(one, tensors) for one in args]
        named = {name: _pattern(one, tensors) for name, one in kwargs.items()}
        if not tensors:
            got = ", ".join(type(one).__name__ for one in (*args, *kwargs.values())) or "nothing"
            raise TypeError(f"sparsekd: example_inputs must be a tensor or several, got {got}")
        return cls(patterns, named, _names(forward, len(patterns))), tuple(tensors)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of a call like the example's. Raises TypeError for another one."""
        if self._flat and not kwargs:
            if len(args) != self.count:
                raise TypeError(f"sparsekd.FrozenModel: expected {self.count} input tensors, got {len(args)}")
            return tuple(args)
        given = list(args)
        rest = dict(kwargs)
        for name in self.names[len(given) : len(self.args)]:
            if name in rest:
                given.append(rest.pop(name))
        if len(given) != len(self.args) or rest.keys() != self.kwargs.keys():
            raise TypeError(
                f"sparsekd.FrozenModel: expected {len(self.args)} positional arguments and "
                f"{sorted(self.kwargs) or 'no keywords'}, got {len(args)} and {sorted(kwargs)}"
            )
        found: list[Any] = [None] * self.count
        for pattern, value in zip(self.args, given, strict=True):
            _match(pattern, value, found)
        for name, pattern in self.kwargs.items():
            _match(pattern, rest[name], found)
        return tuple(found)

    def build(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of a call with these tensors."""
        args = tuple(_build(one, tensors) for one in self.args)
        return args, {name: _build(one, tensors) for name, one in self.kwargs.items()}

    def example(self, tensors: Sequence[Tensor]) -> Example:
        """Of these tensors what `of` took, which is arguments of one kind."""
        args, kwargs = self.build(tensors)
        return kwargs or args

    def calls(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """``model`` as a function of the tensors alone."""
        if self._flat:
            return model

        def call(*tensors: Tensor) -> Any:
            args, kwargs = self.build(tensors)
            return model(*args, **kwargs)

        return call

    def to_dict(self) -> dict[str, Any]:
        return {"args": self.args, "kwargs": self.kwargs, "names": self.names}

    @classmethod
    def from_dict(cls, fields: Any) -> Call:
        """Raises ValueError for anything but what `to_dict` gives."""
        _expect(isinstance(fields, dict) and fields.keys() == {"args", "kwargs", "names"}, fields)
        args, kwargs, names = fields["args"], fields["kwargs"], fields["names"]
        _expect(isinstance(args, list) and isinstance(kwargs, dict) and isinstance(names, list), fields)
        _expect(all(isinstance(name, str) for name in (*kwargs, *names)) and len(names) <= len(args), fields)
        numbers: list[int] = []
        for one in (*args, *kwargs.values()):
            _check(one, numbers, 0)
        _expect(numbers == list(range(len(numbers))) and bool(numbers), fields)
        return cls(args, kwargs, names)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and mappings, in order; what else there is is passed by."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(one)


def _pattern(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"input": len(tensors) - 1}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_pattern(one, tensors) for one in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _pattern(one, tensors) for key, one in value.items()}}
    if isinstance(value, _PLAIN):
        return {"value": value}
    raise TypeError(
        f"sparsekd: example_inputs must be a tensor or several, in lists, tuples and dicts, got {type(value).__name__}"
    )


def _match(pattern: Any, value: Any, found: list[Any]) -> None:
    ((kind, content),) = pattern.items()
    if kind == "input":
        found[content] = value
    elif kind == "value":
        if type(value) is not type(content) or value != content:
            raise TypeError(
                f"sparsekd.FrozenModel: frozen with {content!r}, got {value!r}; freeze again with this value"
            )
    elif kind == "dict":
        if not isinstance(value, Mapping) or value.keys() != content.keys():
            raise TypeError(f"sparsekd.FrozenModel: expected a dict of {sorted(content)}, got {_shown(value)}")
        for key, one in content.items():
            _match(one, value[key], found)
    else:
        if not isinstance(value, (list, tuple)) or len(value) != len(content):
            raise TypeError(f"sparsekd.FrozenModel: expected a {kind} of {len(content)}, got {_shown(value)}")
        for one, given in zip(content, value, strict=True):
            _match(one, given, found)


def _shown(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple, dict)) else type(value).__name__


def _build(pattern: Any, tensors: Sequence[Any]) -> Any:
    ((kind, content),) = pattern.items()
    if kind == "input":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _build(one, tensors) for key, one in content.items()}
    built = [_build(one, tensors) for one in content]
    return tuple(built) if kind == "tuple" else built


def _count(pattern: Any) -> int:
    ((kind, content),) = pattern.items()
    if kind in ("input", "value"):
        return int(kind == "input")
    return sum(map(_count, content.values() if kind == "dict" else content))


def _check(pattern: Any, numbers: list[int], depth: int) -> None:
    """Of a pattern in a file; numbers: of the inputs that were met."""
    _expect(isinstance(pattern, dict) and len(pattern) == 1 and depth < 50, pattern)
    ((kind, content),) = pattern.items()
    if kind == "input":
        _expect(type(content) is int, pattern)
        numbers.append(content)
    elif kind == "value":
        _expect(isinstance(content, _PLAIN), pattern)
    elif kind == "dict":
        _expect(isinstance(content, dict) and all(isinstance(key, str) for key in content), pattern)
        for one in content.values():
            _check(one, numbers, depth + 1)
    else:
        _expect(kind in ("list", "tuple") and isinstance(content, list), pattern)
        for one in content:
            _check(one, numbers, depth + 1)


def _expect(right: bool, got: Any) -> None:
    if not right:
        raise ValueError(f"expected the structure of a call, got {str(got)[:80]}")


def _names(forward: Callable[..., Any] | None, count: int) -> list[str]:
    """Of the first parameters of a forward, as far as they may be given by keyword."""
    try:
        parameters = inspect.signature(forward).parameters.values() if forward is not None else ()
    except (TypeError, ValueError):  # of a scripted module
        return []
    by_name = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    return by_name[:count] if len(by_name) >= count else []


__all__ = ["Call", "Example", "call_arguments", "tensors_in"]
