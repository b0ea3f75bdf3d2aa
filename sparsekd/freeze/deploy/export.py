"""Writing the file of a frozen network, and running it once before it is in place."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...checkpoint import write_atomically
from ..call import Call
from ..outputs import BF16_TOLERANCE, tensors
from ..plan import Plan
from ..trace import batch_of, with_batch
from .graph import CannotExport
from .lowering import BATCHES, Lowering, outside
from .plain import lower_of

_TOLERANCE = 1e-4  # of the largest number, as `freeze` allows its own network
_THREADS = (1, 2, 3)  # besides those that torch has here


def export(
    network: fx.GraphModule,
    plan: Plan,
    call: Call,
    probe: tuple[Tensor, ...],
    frozen: Any,
    path: str | os.PathLike[str],
    guards: Callable[..., Any] | None = None,
) -> None:
    """Write ``network``, the frozen graph, as a file for `sparsekd.runtime`.

    probe: a sample, as the graph takes it. frozen: the network as a function of a call, whose answers the file has to
    give. guards: of the graph, as in `Trace`. Raises CannotExport (a ValueError) that names a node the run time does
    not know, or the guard of a batch size; RuntimeError where the file would answer otherwise.
    """
    given = tuple(frozen.record["probe"])
    if guards is not None:
        _check_guards(guards, given)
    result = frozen.result_of(with_batch(given, BATCHES[0]))
    try:
        lowering = Lowering(network, probe, lower_of)
        nodes = lowering.run(names_of(call))
        _add_outputs(lowering, nodes, result)
    except CannotExport as error:
        raise CannotExport(f"sparsekd.export: {error}") from None
    structure = _structure(result, iter(range(len(nodes))))
    data = lowering.graph.encode(_plan(plan, {node["op"] for node in lowering.graph.nodes}), structure)
    _check(data, frozen, given, _TOLERANCE if plan_is_exact(frozen) else 2 * BF16_TOLERANCE)
    write_atomically(path, data)


# Batch sizes that guards are asked about: they compare the batch with numbers, or divide it by them. So either a small
# one fails, or one that is larger than whatever a model compares with.
_ANY_BATCH = (*range(1, 1025), *(2**i + more for i in range(10, 32) for more in (0, 1)))


def _check_guards(guards: Callable[..., Any], given: tuple[Tensor, ...]) -> None:
    """A file keeps no guards, and fixes every size but the batch. So the graph has to hold for any batch."""
    for batch in _ANY_BATCH:
        try:
            guards(*_resized(given, batch))
        except (RuntimeError, AssertionError) as error:
            raise CannotExport(
                "sparsekd.export: the network takes another path for some batch sizes than the one that was frozen "
                f"(for {batch}: {str(error).splitlines()[0]}), and a file answers any batch by one path; take what "
                "depends on the batch size out of the model's forward, or use FrozenModel.save, which keeps the guard"
            ) from error


def _resized(given: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Of the sizes that `with_batch` makes, without memory."""
    batch = batch_of(given)
    return tuple(
        torch.empty((size, *x.shape[1:]), dtype=x.dtype, device="meta") if x.dim() and x.shape[0] == batch else x
        for x in given
    )


def plan_is_exact(frozen: Any) -> bool:
    """Whether activations are float32 throughout."""
    layers = [one for one in frozen.network.modules() if getattr(one, "bytes", None) is not None]
    return not frozen.record.get("in_bf16") and not layers


_CHANNELS_LAST = {"depthwise", "max_pool", "mean_pool"}  # kernels that take maps in this format alone


def _plan(plan: Plan, ops: set[str]) -> dict[str, Any]:
    """What the run time goes by, and what was measured, for readers."""
    last = plan.memory_format == "channels_last" or plan.eager or bool(ops & _CHANNELS_LAST)
    layers = [{**dataclasses.asdict(one), "geometry": str(one.geometry)} for one in plan.layers]
    return {
        "memory_format": "channels_last" if last else "contiguous",
        "images": plan.images,
        "threads": plan.threads,
        "isa": plan.isa or "",
        "network_us": {name: us for name, us in plan.network_us.items() if np.isfinite(us)},
        "layers": layers,
    }


def names_of(call: Call) -> list[str]:
    """Of the tensors of a call: those of the arguments, where each is a tensor alone."""
    names = [f"input_{i}" for i in range(call.count)]
    known = [*zip(call.names, call.args, strict=False), *call.kwargs.items()]
    for name, pattern in known:
        if "input" in pattern:
            names[pattern["input"]] = name
    return names if len(set(names)) == len(names) else [f"input_{i}" for i in range(call.count)]


def _add_outputs(lowering: Lowering, nodes: list[fx.Node], result: Any) -> None:
    found = tensors(result)
    if not nodes or len(found) != len(nodes):
        raise CannotExport(f"its result holds {len(found)} tensors where the graph makes {len(nodes)}")
    for node, name in zip(nodes, _result_names(result, len(nodes)), strict=True):
        value = lowering.cast(node, lowering.value(node), outside(lowering.graph.dtype(lowering.value(node))))
        lowering.graph.outputs.append({"name": name, "value": value})


def _result_names(result: Any, count: int) -> list[str]:
    if isinstance(result, Mapping) and all(isinstance(one, Tensor) for one in result.values()):
        return [str(key) for key in result]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _structure(result: Any, numbers: Any) -> Any:
    """Of the model's result, so that `load_frozen` gives the same: {"output": i}, {"tuple": [...]}, {"dict": {...}}."""
    if isinstance(result, Tensor):
        return {"output": next(numbers)}
    if isinstance(result, Mapping):
        return {"dict": {str(key): _structure(one, numbers) for key, one in result.items()}}
    if isinstance(result, (tuple, list)):
        return {"tuple": [_structure(one, numbers) for one in result]}
    raise CannotExport(
        f"sparsekd.export: the network returns a {type(result).__name__}; return tensors, tuples or dicts"
    )


def _check(data: bytes, frozen: Any, given: tuple[Tensor, ...], tolerance: float) -> None:
    """Raise RuntimeError unless the file answers as the frozen network does, for several batches and any threads.

    Threads share a layer in other pieces than one does, so that a layer which reads what it has written over may be
    right on one thread alone."""
    from ...runtime import Session  # here, because it needs the compiled module, and `freeze` does not

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.skd"
        path.write_bytes(data)
        asked = [with_batch(given, batch) for batch in (1, *BATCHES)]
        wanted = [tensors(frozen.result_of(inputs)) for inputs in asked]
        for threads in sorted({*_THREADS, max(1, torch.get_num_threads())}):
            try:
                session = Session(path, threads=threads)
            except ValueError as error:  # which names the node, and a file that nobody else knows
                if " the node " not in str(error):
                    raise
                what = str(error).removeprefix(f"sparsekd.Session: {path}: ")
                raise CannotExport(
                    f"sparsekd.export: {what}; leave that out of the network and compute it around the session"
                ) from error
            for inputs, wants in zip(asked, wanted, strict=True):
                got = session._run([x.contiguous().numpy() for x in inputs])
                for port, y, want in zip(session.outputs, got, wants, strict=True):
                    want = want.float() if want.dtype == torch.bfloat16 else want
                    _compare(f"{port.name} with threads={threads}", y, want, tolerance)


def _compare(name: str, got: np.ndarray[Any, Any], want: Tensor, tolerance: float) -> None:
    expected, wrong = want.detach().numpy(), ""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        wrong = f"{got.dtype} {list(got.shape)} where it gives {expected.dtype} {list(expected.shape)}"
    elif expected.dtype.kind == "f":  # integers are places: others are as right where numbers are nearly equal
        scale = max(float(np.abs(expected).max(initial=0, where=np.isfinite(expected))), 1e-30)
        if not np.allclose(got, expected, rtol=0, atol=tolerance * scale, equal_nan=True):
            wrong = f"up to {np.nanmax(np.abs(got - expected))}, largest {scale:.3g}"
    if wrong:
        raise RuntimeError(
            f"sparsekd.export: the file answers otherwise than the frozen network for {name}: {wrong}; a network that "
            "is random or keeps a state cannot be exported, else report this"
        )


__all__ = ["export", "names_of"]
