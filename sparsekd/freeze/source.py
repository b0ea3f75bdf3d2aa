"""A model made ready for freezing: traced where that can be done, with the sites found in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..convert import SPARSE_TYPES
from ..nn.embedding_table import SparseTable
from .attention import join_attention
from .call import Call
from .canonical import computes_as_norm, spell_out
from .file import describe
from .kinds import LAYERS, hooked
from .lift import is_liftable, lift
from .outputs import check_no_nan, deviation
from .simplify import simplify
from .sites import Site, clone, find_eager_sites, find_sites, fused_by_torch, layers_inside, shapes_in
from .sizes import free_sizes
from .trace import METHODS, PATIENCE, Trace, batch_of, traces, with_batch


@dataclass(frozen=True)
class Source:
    """What freezing starts from. trace: None where the model cannot be traced, ``notes`` say why.

    expected: what the model computes of ``inputs``. record: what a file says about it (file.py).
    """

    model: nn.Module
    call: Call
    trace: Trace | None
    said: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    expected: Any
    sites: list[Site]
    record: dict[str, Any]

    @property
    def traced(self) -> fx.GraphModule | None:
        return None if self.trace is None else self.trace.network

    @property
    def network(self) -> nn.Module:
        """The trace, or the model: what the sites name modules of."""
        return self.model if self.trace is None else self.trace.network

    @property
    def run(self) -> Callable[..., Any]:
        """The model as a function of the tensors."""
        return self.call.calls(self.model)

    def notes(self, missing: str) -> tuple[str, ...]:
        """What a reader of the plan has to know; missing: why there are no kernels, or ""."""
        notes = list(self.said)
        named = dict(self.model.named_modules())
        sparse = [name for name, module in named.items() if type(module) in SPARSE_TYPES]
        tables = [name for name, module in named.items() if isinstance(module, SparseTable)]
        if not sparse and not tables:
            notes.append("no block-sparse layer: sparsekd.sparsify or a pruning method makes some")
        elif sparse and missing:
            notes.append(f"every layer stays dense: {missing}")
        found = {site.target for site in self.sites}
        with_hooks = [name for name, one in named.items() if name and hooked(one)]
        if with_hooks:
            notes.append(
                f"hooks of {', '.join(with_hooks)}: what they do to tensors is in the frozen network, layers that have "
                "some are left as they are; what else hooks inside the network do happened once, when it was traced"
            )
        lifted = self.trace is not None
        left = [name for name, one in named.items() if isinstance(one, LAYERS) or (lifted and is_liftable(one))]
        left = [name for name in left if name not in found]
        left = [name for name in left if name not in with_hooks]
        fused = [name for name in left if name.startswith(fused_by_torch(self.model))]
        if fused:
            notes.append(f"left to torch's own call for a whole encoder layer: {', '.join(fused)}")
        left = [name for name in left if name not in fused]
        if left:
            why = "not called, or called without a batch"
            notes.append(f"left as they are ({why}): {', '.join(left)}")
        norms = self._norms_left()
        if norms:
            notes.append(f"batch norms that no layer takes in: {', '.join(norms)}")
        return tuple(notes)

    def _norms_left(self) -> list[str]:
        folded = {site.norm for site in self.sites} | {site.target for site in self.sites}
        if self.traced is None:
            called = [name for name, one in self.model.named_modules() if computes_as_norm(one)]
        else:
            calls = [str(node.target) for node in self.traced.graph.nodes if node.op == "call_module"]
            called = [name for name in calls if computes_as_norm(self.traced.get_submodule(name))]
        return [name for name in dict.fromkeys(called) if name not in folded]


def outputs_of(model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    """What a model that `prepare` returned computes; the inputs stay as they are."""
    expected = model(*clone(inputs))
    check_no_nan(expected)
    return expected


def find_source(
    model: nn.Module,
    call: Call,
    inputs: tuple[Tensor, ...],
    expected: Any,
    tolerance: float | None,
    pools: bool,
) -> Source:
    """Trace a model, ``expected`` by `outputs_of`. tolerance: of the trace's outputs; pools: on the CPU, where pooling
    and more activations are found too."""
    run = call.calls(model)
    found, said = _trace_that_agrees(model, call, inputs, expected, tolerance)
    sites = find_eager_sites(model, run, inputs) if found is None else find_sites(found.network, inputs, pools=pools)
    free: list[list[int]] = [[] for _ in inputs]
    if found is None or found.by == METHODS[0] or (found.by == METHODS[1] and found.guards is not None):
        free = free_sizes(run, run if found is None else _rebuilt(found), inputs, tolerance)
    record = describe(model, call, found, sites, inputs, free, _sample(run, inputs))
    return Source(model, call, found, tuple(said), inputs, expected, sites, record)


def _sample(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One sample of the example, where the model takes one."""
    one = with_batch(inputs, 1)
    try:
        run(*clone(one))
    except Exception:
        return clone(inputs)
    return clone(one)


def _rebuilt(found: Trace) -> Callable[..., Any]:
    rebuild = found.rebuild or (lambda y: y)
    return lambda *tensors: rebuild(found.network(*tensors))


def trace_by(
    method: str, model: nn.Module, call: Call, inputs: tuple[Tensor, ...], patience: float | None = None
) -> Trace:
    """The simplified trace by one of `METHODS`; raises whatever stops it."""
    for name, make in traces(model, call, inputs, patience):
        if name == method:
            found = make()
            simplify(found.network)
            shapes = shapes_in(found.network, inputs)
            spell_out(found.network, model, shapes)
            join_attention(found.network)
            lift(found.network, shapes)
            return found
    raise TypeError("a scripted module has no Python code to trace")


def _trace_that_agrees(
    model: nn.Module, call: Call, inputs: tuple[Tensor, ...], expected: Any, tolerance: float | None
) -> tuple[Trace | None, list[str]]:
    """A trace that computes what the model does, or None, and what a reader has to know about it.

    torch.fx records ``a += b`` as ``a = a + b``, which differs where ``a`` is a view, and only one path of Python code;
    torch.export may take the batch for a constant.
    """
    reasons = []
    partial: tuple[Trace, list[str]] | None = None
    for method in METHODS:
        try:
            found = trace_by(method, model, call, inputs, PATIENCE)
        except Exception as error:  # the model has just run: whatever this is says that it cannot be traced so
            reasons.append(f"{method} cannot trace the model ({_first_line(error)})")
            continue
        wrong = _disagrees(call.calls(model), _rebuilt(found), inputs, expected, tolerance)
        if wrong:
            reasons.append(f"what {method} traces of the model {wrong}")
            continue
        inside = list(layers_inside(found.network))
        if not inside:
            return found, []
        if partial is None or len(inside) < len(partial[1]):
            partial = found, inside
    if partial is not None:
        fused = fused_by_torch(partial[0].network)
        names = ", ".join(name for name in partial[1] if not name.startswith(fused))
        alone = f"layers were chosen inside modules that no trace shows, each for itself: {names}"
        return partial[0], [f"{alone}; nothing is fused or folded there"] if names else []
    return None, [f"{'; '.join(reasons)}: layers were chosen one by one, nothing is fused or folded"]


def _disagrees(
    run: Callable[..., Any], traced: Callable[..., Any], inputs: tuple[Tensor, ...], expected: Any,
    tolerance: float | None,
) -> str:  # fmt: skip
    """What is wrong with a trace, or ""; at the example, and at another batch size where the model takes one."""
    try:
        got = traced(*clone(inputs))
    except Exception as error:
        return f"fails ({_first_line(error)})"
    if deviation(got, expected, tolerance) > 1.0:
        return "computes something else"
    batch = batch_of(inputs)
    for size in {1, batch + 1} - {batch}:
        other = with_batch(inputs, size)
        try:
            want = run(*clone(other))
        except Exception:  # the batch size is part of the model
            continue
        try:
            got = traced(*clone(other))
        except Exception as error:
            return f"has a fixed batch size ({_first_line(error)})"
        if not deviation(got, want, tolerance) <= 1.0:
            return "computes something else at another batch size"
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


@contextmanager
def in_eager_mode() -> Iterator[None]:
    """Whatever the caller is in: no autograd, no autocast of the CPU, and what names no device is on the CPU."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


__all__ = ["Source", "find_source", "in_eager_mode", "outputs_of", "trace_by"]
