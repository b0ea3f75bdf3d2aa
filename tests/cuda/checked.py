"""What a GPU would do silently wrong, asserted while kernels are interpreted.

The compiler believes `multiple_of`, `max_contiguous` and `max_constancy`; the interpreter only notes them. Here they
are held against the values they speak of, masked lanes included. Every lane that is not masked has to be inside one of
the kernel's tensors, and no sum or product of 32-bit integers may wrap.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from triton.runtime import interpreter

WHOLE, GROUPS, SAME = "tt.divisibility", "tt.contiguity", "tt.constancy"


class FalseHint(AssertionError):
    pass


class OutOfBounds(AssertionError):
    pass


class Wrapped(AssertionError):
    pass


@contextmanager
def checks():
    """Inside, interpreted kernels are checked. What is raised arrives as InterpreterError, which names it."""
    patch, watch = pytest.MonkeyPatch(), _Watch()
    note = interpreter.TensorHandle.set_attr
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
    compute, begin = interpreter.InterpreterBuilder.binary_op, interpreter.GridExecutor._init_args_hst

    def set_attr(handle, name, values):
        note(handle, name, values)
        watch.hint(handle, name, values)

    def create_masked_load(self, pointers, mask, *more):
        watch.access(pointers, mask)
        return load(self, pointers, mask, *more)

    def create_masked_store(self, pointers, value, mask, *more):
        watch.access(pointers, mask)
        return store(self, pointers, value, mask, *more)

    def binary_op(self, left, right, op):
        result = compute(self, left, right, op)
        if op in (np.add, np.subtract, np.multiply) and result.data.dtype == np.int32:
            wide = op(np.asarray(left.data, np.int64), np.asarray(right.data, np.int64))
            if not np.array_equal(wide, result.data):
                raise Wrapped(f"{op.__name__} leaves 32 bits: {wide.min()} to {wide.max()}")
        return result

    def init_args(self, arguments, keywords):
        hosts = begin(self, arguments, keywords)
        watch.begin([*hosts[0], *hosts[1].values()])
        return hosts

    patch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", create_masked_load)
    patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", create_masked_store)
    patch.setattr(interpreter.InterpreterBuilder, "binary_op", binary_op)
    patch.setattr(interpreter.GridExecutor, "_init_args_hst", init_args)
    try:
        yield watch
        watch.settle()
    finally:
        patch.undo()


class _Watch:
    def __init__(self) -> None:
        self.hints = self.accesses = 0
        self._pending = None  # a handle that was called a multiple, and may still be called contiguous
        self._begins = self._ends = np.empty(0, np.uint64)

    def begin(self, arguments) -> None:
        self.settle()
        ranges = sorted((x.data_ptr(), _end(x)) for x in _tensors(arguments) if x.numel())
        self._begins = np.array([begin for begin, _ in ranges], np.uint64)
        self._ends = np.array([end for _, end in ranges], np.uint64)

    def access(self, pointers, mask) -> None:
        self.accesses += 1
        kept = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # a comparison with bits gives numbers
        addresses = np.asarray(pointers.data, np.uint64)[kept]
        if not addresses.size:
            return
        bytes_each = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        place = np.searchsorted(self._begins, addresses, side="right").astype(np.int64) - 1
        if place.min() < 0 or (addresses + np.uint64(bytes_each) > self._ends[place]).any():
            raise OutOfBounds("a lane that is not masked is outside of every tensor")

    def hint(self, handle, name: str, values: list[int]) -> None:
        self.hints += 1
        if name == GROUPS and handle is self._pending:
            self._pending = None
            _check_groups(handle.data, values, handle.attr.get(WHOLE))
            return
        self.settle()
        if name == GROUPS:
            _check_groups(handle.data, values, None)
        elif name == SAME:
            for along, group in _grouped(handle.data, values):
                if (group != group[..., :1]).any():
                    raise FalseHint(f"max_constancy({values}): values differ along dimension {along}")
        else:
            self._pending = handle

    def settle(self) -> None:
        """A multiple that nobody called contiguous: every value is one."""
        handle, self._pending = self._pending, None
        if handle is not None:
            values = handle.attr[WHOLE]
            if (np.asarray(handle.data) % max(values)).any():
                raise FalseHint(f"multiple_of({values}): the values hold {np.asarray(handle.data).flat[0]}")


def _check_groups(data, lengths, multiples) -> None:
    """max_contiguous, and multiple_of of the first of each group."""
    for along, group in _grouped(data, lengths):
        if (np.diff(np.asarray(group, np.int64), axis=-1) != 1).any():
            raise FalseHint(f"max_contiguous({lengths}): values are not neighbours along dimension {along}")
        if multiples is not None and (np.asarray(group[..., 0], np.int64) % multiples[along]).any():
            raise FalseHint(f"multiple_of({multiples}): a group along dimension {along} begins elsewhere")


def _grouped(data, lengths):
    """(dimension, the values as [..., group, lengths[dimension]]) for each dimension with a length."""
    data = np.asarray(data)
    for along, length in enumerate(lengths):
        if length > 1:
            moved = np.moveaxis(data, along, -1)
            length = min(length, moved.shape[-1])
            yield along, moved.reshape(*moved.shape[:-1], -1, length)


def _end(x) -> int:
    """The address behind the last element."""
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (1 + last) * x.element_size()


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif hasattr(argument, "data_ptr"):
            yield argument
