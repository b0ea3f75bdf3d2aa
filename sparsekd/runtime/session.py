"""`Session`: a file of an exported network, ready to run."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

try:
    from .. import _C as native
except ImportError as error:
    raise ImportError(
        f"sparsekd.runtime: the compiled module sparsekd._C is not importable ({error}); pip install sparsekd builds it"
    ) from error

Array = np.ndarray[Any, Any]


class Tensor(NamedTuple):
    """An input or output of a network: its name, numpy dtype, and shape, in which a text such as "N" or "2N" is a
    multiple of the batch of the call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


class Session:
    """A network from a file, which several threads may run at once.

    Args:
        path: what ``FrozenModel.export`` or ``sparsekd export`` wrote. Only its owner may change the file while it is
            open: tables of embeddings are read where they lie.
        threads: of one call. Default: the processors this process may use.

    inputs, outputs: `Tensor` each. note: what a user should know, as that the file was timed on another processor.

    Raises OSError (FileNotFoundError and others) where the file cannot be read, and ValueError for one that is damaged,
    foreign, of a newer format, or asks for what this version does not know.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        try:
            threads = None if threads is None else operator.index(threads)
        except TypeError:
            raise TypeError(f"sparsekd.Session: threads must be a whole number, 1 or more, got {threads!r}") from None
        if threads is not None and threads < 1:
            raise ValueError(f"sparsekd.Session: threads must be 1 or more, got {threads}")
        self._native = native.Session(os.fspath(path), threads or _processors())
        try:
            self.inputs = tuple(_tensor(*one) for one in self._native.inputs)
            self.outputs = tuple(_tensor(*one) for one in self._native.outputs)
        except UnicodeDecodeError as error:
            raise ValueError(f"sparsekd.Session: {os.fspath(path)} is damaged: a name is no text ({error})") from error
        self.threads, self.note = self._native.threads, self._native.note
        self._names = [one.name for one in self.inputs]
        self._run = self._native.run

    def __call__(self, *inputs: Array) -> Any:
        """The output of the inputs in their order; a tuple where there are several outputs."""
        results = self._run(inputs)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, of inputs by name.

        Raises KeyError for a name that is missing or unknown, TypeError for another dtype, ValueError for another
        shape, IndexError for an id that no table has, MemoryError where the activations do not fit.
        """
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"sparsekd.Session.run: expected a mapping of names {self._names} to arrays, got "
                f"{type(inputs).__name__}; or call the session with the arrays"
            )
        if inputs.keys() != set(self._names):
            raise KeyError(f"sparsekd.Session: expected inputs named {self._names}, got {list(inputs)}")
        results = self._run([inputs[name] for name in self._names])
        return {one.name: result for one, result in zip(self.outputs, results, strict=True)}

    def __copy__(self) -> Session:
        return self  # nothing in it ever changes

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "sparsekd.Session: a session is no data for pickle; hand its file's path to the other process, and open a "
            "session there"
        )

    def __repr__(self) -> str:
        return f"Session({', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))})"


def _tensor(name: str, dtype: str, sizes: tuple[int, ...]) -> Tensor:
    return Tensor(name, dtype, tuple(size if size >= 0 else "N" if size == -1 else f"{-size}N" for size in sizes))


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


__all__ = ["Session", "Tensor"]
