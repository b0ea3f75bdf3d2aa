"""A model as a graph: by torch.fx where that can, else by torch.export, in which no Python code is left.

torch.export takes every size for a symbol, and what a model computes from its sizes may keep it busy for many minutes.
So `freeze` has a limit to its patience; then the batch alone is a symbol, and the other sizes are the example's.

Either way the model's dense twin is what is traced, so that a block-sparse model has the graph of its dense one, and a
freshly built dense model that of the block-sparse one a file was written from. In the graph the layers are the model's.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..convert import densify
from ..nn.layer import TracedWhole, computes_as
from .call import Call

# Tracing patches nn.Module for as long as it lasts, and networks that are timed at once disturb each other: of two
# threads that freeze, one waits.
LOCK = threading.RLock()
METHODS = ("torch.fx", "torch.export", "torch.export of one size")
PATIENCE = 30.0  # seconds of processor time for torch.export with all sizes free; most models take less than 5
TENSORS = "_tensors"  # the module of a trace that holds what it reads


@dataclass(frozen=True)
class Trace:
    """network: takes the tensors of a call; its modules are the model's. by: of `METHODS`.

    rebuild: makes the model's result of the network's, or None where they are the same. guards: raises for tensors
    whose sizes take another path through the model, or None.
    """

    network: fx.GraphModule
    by: str
    rebuild: Callable[[Any], Any] | None = None
    guards: Callable[..., Any] | None = None


def traces(
    model: nn.Module, call: Call, inputs: tuple[Tensor, ...], patience: float | None = None
) -> Iterator[tuple[str, Callable[[], Trace]]]:
    """Ways to trace a model, the one with the plainest graph first; each raises whatever stops it.

    patience: seconds for torch.export with all sizes free; None: as long as it takes."""
    twin = dense_twin(model)
    if twin is None:
        return
    yield METHODS[0], lambda: by_fx(model, twin, call, inputs)
    yield METHODS[1], lambda: by_export(model, twin, call, inputs, patience)
    yield METHODS[2], lambda: by_export(model, twin, call, inputs, None, one_size=True)


def dense_twin(model: nn.Module, tables: bool = True) -> nn.Module | None:
    """The model with dense layers, and dense tables if `tables`; None of what cannot be copied, as scripted modules."""
    if isinstance(model, torch.jit.ScriptModule):
        return None
    twin = densify(copy.deepcopy(model), tables)
    return twin.requires_grad_(True) if _all_float(model) else twin


def _all_float(model: nn.Module) -> bool:
    return all(p.is_floating_point() or p.is_complex() for p in model.parameters())


# ---- torch.fx


class _Tracer(fx.Tracer):
    """Leaves alone what other threads do meanwhile: they too meet the nn.Module that fx has patched."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, TracedWhole):
            return True
        base = next((kind for kind in _LEAVES if isinstance(m, kind)), None)
        if base is not None:  # a subclass that inherits its forward is what its base is
            return computes_as(m, base)
        return super().is_leaf_module(m, module_qualified_name)


_LEAVES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm),
)


def by_fx(model: nn.Module, twin: nn.Module, call: Call, inputs: tuple[Tensor, ...]) -> Trace:
    if model._forward_hooks or model._forward_pre_hooks:
        raise TypeError("the network itself has hooks")
    names, constants = _bound(twin, call)
    with LOCK:
        tracer = _Tracer()
        # trace() annotates the module it traces and all it visits; the twin is ours
        graph = tracer.trace(twin, concrete_args=constants or None)
    _order_inputs(graph, names)
    parts: dict[str, Any] = {}
    reader = _Reader(parts)
    for node in graph.nodes:
        if node.op == "call_module":
            parts[node.target] = model.get_submodule(node.target)
        elif node.op == "get_attr":
            reader.move(node, _attribute(twin, node.target), node.target)
    return Trace(_graph_module(parts, graph), METHODS[0])


def _bound(model: nn.Module, call: Call) -> tuple[list[str], dict[str, Any]]:
    """(the parameters of forward that take the tensors of a call, in their order, what the others are)."""
    numbers = list(range(call.count))
    args, kwargs = call.build(numbers_as_inputs := [_Number(i) for i in numbers])
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    names: list[str] = [""] * call.count
    constants: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if isinstance(value, _Number):
            names[value.number] = name
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            if value:
                raise TypeError(f"the arguments in {name} have no names of their own")
            constants[name] = value
        elif _holds_inputs(value):
            raise TypeError(f"{name} holds several tensors")
        elif isinstance(value, (bool, int, float, str, type(None))):
            constants[name] = value
        # another default has to be left to fx, which takes it as it is
    assert len(numbers_as_inputs) == call.count
    return names, {name: value for name, value in constants.items() if name in _named(model)}


@dataclass(frozen=True)
class _Number:
    number: int


def _named(model: nn.Module) -> set[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, one in inspect.signature(model.forward).parameters.items() if one.kind not in kinds}


def _holds_inputs(value: Any) -> bool:
    return any(isinstance(leaf, _Number) for leaf in pytree.tree_leaves(value))


def _order_inputs(graph: fx.Graph, names: list[str]) -> None:
    """Leaves the placeholders of the tensors, in the order of a call. fx keeps one for each argument, with an assertion
    for those that are constants now."""
    found = {str(node.target).lstrip("*"): node for node in graph.nodes if node.op == "placeholder"}
    for name, node in found.items():
        if name not in names:
            _erase_with_checks(graph, node)
    ordered = [found[name] for name in names]
    for first, second in itertools.pairwise(ordered):
        first.append(second)


def _erase_with_checks(graph: fx.Graph, placeholder: fx.Node) -> None:
    checks = [node for user in placeholder.users for node in (*user.users, user)]
    if all(getattr(node.target, "__name__", "") in ("eq", "_assert", "_assert_is_none") for node in checks):
        for node in (*checks, placeholder):
            graph.erase_node(node)
    elif placeholder.users:
        raise TypeError(f"the argument {placeholder.target} is read, and has no value that a graph can hold")


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


class _Reader:
    """Gives the attributes that a graph reads names of their own: a layer of the model is replaced, what reads its
    weight besides is not."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts
        self.known: dict[str, str] = {}

    def move(self, node: fx.Node, value: Any, path: str) -> None:
        if path not in self.known:
            name = path.replace(".", "_")
            while f"{TENSORS}.{name}" in self.known.values():
                name += "_"
            self.known[path] = f"{TENSORS}.{name}"
            self.parts[self.known[path]] = value.detach() if isinstance(value, Tensor) else value
        node.target = self.known[path]
        node.meta["reads"] = path


def _graph_module(parts: dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """fx assigns by paths: no module may be assigned into another part."""
    network = fx.GraphModule(parts, graph)
    for node in network.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            module, value = network.get_submodule(owner), parts[str(node.target)]
            if isinstance(value, Tensor) and leaf not in module._buffers:
                delattr(module, leaf)
                module.register_buffer(leaf, value)
    return network


# ---- torch.export


def by_export(
    model: nn.Module,
    twin: nn.Module,
    call: Call,
    inputs: tuple[Tensor, ...],
    patience: float | None,
    one_size: bool = False,
) -> Trace:
    """Raises whatever torch.export raises, TypeError where it has fixed the batch size, and TimeoutError where it takes
    longer than ``patience`` in seconds. one_size: the batch alone may differ from the example's."""
    batch = batch_of(inputs)
    given = with_batch(inputs, max(batch, 2))  # a batch of one would be taken for a constant
    args, kwargs = call.build(given)
    dims = call.build([_free_dims(x, max(batch, 2), one_size) for x in given])
    shapes = dict(inspect.signature(twin.forward).bind(*dims[0], **dims[1]).arguments)
    # With gradients no fused path is taken that hides layers.
    with LOCK, torch.enable_grad(), warnings.catch_warnings(), _impatient(twin, patience):
        warnings.simplefilter("ignore")
        program = torch.export.export(twin, args, kwargs, dynamic_shapes=shapes, strict=False)
    graph, parts = _lifted(model, program)
    out_spec = program.call_spec.out_spec
    network = _graph_module(parts, graph)
    one = out_spec.is_leaf()
    rebuild = (lambda flat: flat[0]) if one else (lambda flat: pytree.tree_unflatten(list(flat), out_spec))
    return Trace(network, METHODS[2 if one_size else 1], rebuild, _guards(program))


def _free_dims(x: Tensor, batch: int, one_size: bool) -> dict[int, Any]:
    if one_size:
        return {0: torch.export.Dim.AUTO} if x.dim() and x.shape[0] == batch else {}
    return {i: torch.export.Dim.AUTO for i in range(x.dim())}


@contextmanager
def _impatient(model: nn.Module, seconds: float | None) -> Iterator[None]:
    """TimeoutError from the first call of a module after so much time of this thread's."""
    began = time.thread_time()

    def look(*_: Any) -> None:
        if seconds is not None and time.thread_time() - began > seconds:
            raise TimeoutError(f"it takes longer than {seconds:g} s with all sizes free")

    hooks = [one.register_forward_pre_hook(look) for one in model.modules()] if seconds is not None else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _guards(program: torch.export.ExportedProgram) -> Callable[..., None] | None:
    """A function of the tensors that raises where their sizes take another path than the example's.

    A batch of one is asked about as one of two: torch.export takes it for a constant, while the operations of a graph
    look at the sizes that come.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = program.module()
    node = next((one for one in module.graph.nodes if one.op == "call_module" and one.target == "_guards_fn"), None)
    if node is None:
        return None
    placeholders = [one for one in module.graph.nodes if one.op == "placeholder"]
    tensors = [isinstance(one.meta.get("val"), Tensor) for one in placeholders]
    check: Any = module.get_submodule("_guards_fn")

    def guards(*inputs: Tensor) -> None:
        batch = batch_of(inputs)
        given = iter([_of_size(x, max(batch, 2), batch) for x in inputs])
        values = [next(given) if tensor else None for tensor in tensors]
        check(*(values[placeholders.index(one)] if isinstance(one, fx.Node) else one for one in node.args))

    return guards


def _of_size(x: Tensor, size: int, batch: int) -> Tensor:
    """Something of the size that ``x`` has with another batch."""
    if not x.dim() or x.shape[0] != batch or batch == size:
        return x
    return torch.empty((size, *x.shape[1:]), dtype=x.dtype, device="meta")


def batch_of(inputs: tuple[Tensor, ...]) -> int:
    return inputs[0].shape[0] if inputs[0].dim() else 1


def with_batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """The inputs with samples repeated or left out; what has no batch of the first input's size stays."""
    batch = batch_of(inputs)
    if size == batch or batch < 1:
        return inputs
    rows = torch.arange(size, device=inputs[0].device)

    def resized(x: Tensor) -> Tensor:
        # A row of integers may be where bags begin, which must go on rising: torch reads anything where they fall.
        rising = x.dim() == 1 and not x.is_floating_point()
        return x[rows.clamp(max=batch - 1) if rising else rows % batch].contiguous()

    return tuple(resized(x) if x.dim() and x.shape[0] == batch else x for x in inputs)


def _lifted(model: nn.Module, program: torch.export.ExportedProgram) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph with attributes in the place of lifted placeholders, and what it reads."""
    signature = program.graph_signature
    attributes = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    attributes |= signature.inputs_to_lifted_tensor_constants
    users = set(signature.user_inputs)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    parts: dict[str, Any] = {}
    reader = _Reader(parts)
    values = {**program.constants, **program.state_dict}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in attributes:
                path = attributes[node.name]
                copies[node] = new = graph.create_node("get_attr", path, name=node.name)
                reader.move(new, values[path], path)
            elif node.name in users and isinstance(node.meta.get("val"), Tensor):
                copies[node] = graph.placeholder(node.name)
            elif node.users:
                raise TypeError(f"{node.name} is an input that is no tensor")
        elif node.op == "output":
            flat = tuple(fx.node.map_arg(node.args[0], copies.__getitem__))
            graph.output(flat)
        elif node.op == "get_attr":
            copies[node] = new = graph.create_node("get_attr", node.target, name=node.name)
            reader.move(new, _attribute(program.graph_module, node.target), node.target)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    return graph, parts
