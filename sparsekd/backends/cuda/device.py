"""The device under an op: which one is current, what a CUDA graph forbids, and memory that must outlive a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_NOTHING: AbstractContextManager = nullcontext()


def on(device: torch.device) -> AbstractContextManager:
    """Make ``device`` the current one; costs nothing where it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def on_that_of(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` the current one; costs nothing where it is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_capture(x: Tensor) -> None:
    if is_capturing(x):
        raise RuntimeError(
            "sparsekd: this layer's mask is new, and its tables cannot be built while a CUDA graph is captured; "
            "run the model once before capturing"
        )


def build_to_keep(build: Callable[[], T], like: Tensor) -> T:
    """What ``build()`` returns, for keeping: finished for every stream, and in memory that belongs to no graph.

    The warm-up of ``torch.compile(mode="reduce-overhead")`` sends what its thread allocates to the pool of the graph,
    which is written over later; so the building is done in a thread of its own. It has a stream of its own, which
    waits for the caller's work, and which the host waits for: the tables need a number from the device anyway.
    """
    refuse_capture(like)
    if not like.is_cuda:
        return build()
    stream = side_stream(like.device)
    stream.wait_stream(torch.cuda.current_stream(like.device))

    def run() -> T:
        with torch.no_grad(), torch.cuda.device(like.device), torch.cuda.stream(stream):
            built = build()
            stream.synchronize()
        return built

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


@lru_cache(maxsize=16)
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def cudnn_searches() -> Iterator[None]:
    """cuDNN times its own kernels for each new shape, here and on every thread, until the end of the block."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def aligned(x: Tensor) -> Tensor:
    """``x``, copied where its memory does not begin at a multiple of 16 bytes: the kernels read 16 at a time.

    A view that begins in the middle of a buffer is such a tensor; what torch allocates is not.
    """
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.preserve_format)
