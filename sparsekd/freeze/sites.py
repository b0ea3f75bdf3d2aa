"""What can be frozen in a model: its trace, and in it each layer with what is computed in the same call."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import BlockSparseLayer, SparseConv2d, SparseLinear
from .pools import Window, is_flatten, window_of

CONVS = (nn.Conv2d, SparseConv2d)
LAYERS = (*CONVS, nn.Linear, SparseLinear)


@dataclass(frozen=True)
class Site:
    """One convolution, linear or pooling layer (or batch norm no layer takes in) and what is computed in the same call.

    name: in the plan and in the frozen network. target: the layer's module. nodes: its chain in the trace, from the
    layer to the last node it replaces (empty in a model that cannot be traced). norm: the BatchNorm's module.
    add: the node in the chain that adds the residual. activation: as the kernels name it. input: shape in the example.
    contiguous: the example gives this input of the network in that format. pool: "max" or "mean", its window, its dtype
    and whether pixels are no dimension of its output.
    """

    name: str
    target: str
    input: tuple[int, ...]
    nodes: tuple[str, ...] = ()
    norm: str | None = None
    add: str | None = None
    activation: str = "none"
    contiguous: bool = False
    pool: tuple[str, Window, str, bool] | None = None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BlockSparseLayer) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, num_inputs: int) -> tuple[fx.GraphModule | None, str]:
    """(the model as a graph, ""), or (None, why it has none)."""
    unused = list(inspect.signature(model.forward).parameters.values())[num_inputs:]
    defaults = {p.name: p.default for p in unused if isinstance(p.default, (bool, int, float, str, type(None)))}
    try:
        graph = _Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:  # the model has just run, so whatever this is, it says that fx cannot trace it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return None, f"torch.fx cannot trace the model ({reason})"
    _drop_defaults(graph, num_inputs)
    network = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), _NOTHING) and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _is_view_of_sizes(node) and not any(_mutates(user, _module(network, user)) for user in node.users):
            node.target = "reshape"  # the same where view works, and it works in channels_last too
    network.recompile()
    return network, ""


def _module(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_view_of_sizes(node: fx.Node) -> bool:
    reinterprets = any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))
    return node.op == "call_method" and node.target == "view" and not reinterprets


_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in eval mode


def _drop_defaults(graph: fx.Graph, num_inputs: int) -> None:
    """Arguments left at their default are constants now; fx keeps a placeholder and an assertion for each."""
    for placeholder in [node for node in graph.nodes if node.op == "placeholder"][num_inputs:]:
        checks = [node for user in placeholder.users for node in (*user.users, user)]
        if all(getattr(node.target, "__name__", "") in ("eq", "_assert", "_assert_is_none") for node in checks):
            for node in (*checks, placeholder):
                graph.erase_node(node)


class Recorder(fx.Interpreter):
    """Runs a graph and hands every tensor it computes to ``see(node, tensor)``."""

    def __init__(self, network: fx.GraphModule, see: Callable[[fx.Node, Tensor], None]) -> None:
        super().__init__(network)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.see(n, result)
        return result


Shapes = dict[fx.Node, tuple[tuple[int, ...], torch.dtype]]


def find_sites(network: fx.GraphModule, inputs: tuple[Tensor, ...], pools: bool = True) -> list[Site]:
    """The sites of a traced model, in order. Where two layers meet in an add, the larger one takes it in."""
    shapes: Shapes = {}
    Recorder(network, lambda node, x: shapes.update({node: (tuple(x.shape), x.dtype)})).run(*clone(inputs))
    finder = _SiteFinder(network, shapes)
    layers = [node for node in network.graph.nodes if finder.is_layer(node)]
    sites = {node: finder.grow(node) for node in sorted(layers, key=finder.work, reverse=True)}
    sites |= {node: finder.grow(node) for node in network.graph.nodes if finder.is_norm(node)}
    pooling = {node: finder.pool_of(node) for node in network.graph.nodes if pools}
    sites |= {node: finder.grow_pool(node, *found) for node, found in pooling.items() if found}
    contiguous = _contiguous_inputs(network, inputs)
    calls: dict[str, int] = {}
    named = []
    for node in filter(sites.__contains__, network.graph.nodes):
        site = replace(sites[node], contiguous=node.args[0] in contiguous)
        calls[site.name] = calls.get(site.name, 0) + 1
        named.append(site if calls[site.name] == 1 else replace(site, name=f"{site.name}@{calls[site.name]}"))
    return named


def _contiguous_inputs(network: fx.GraphModule, inputs: tuple[Tensor, ...]) -> set[fx.Node]:
    """Inputs of the network that are maps in no other format than contiguous."""
    nodes = [node for node in network.graph.nodes if node.op == "placeholder"]
    maps = {node: x for node, x in zip(nodes, inputs, strict=False) if x.dim() == 4 and x.is_contiguous()}
    return {node for node, x in maps.items() if not x.is_contiguous(memory_format=torch.channels_last)}


class _SiteFinder:
    """Grows sites in one graph. A chain grows only along values that nothing else reads."""

    def __init__(self, network: fx.GraphModule, shapes: Shapes) -> None:
        self.network, self.shapes = network, shapes
        self.nodes = list(network.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.read = [str(node.target) for node in self.nodes if node.op == "get_attr"]
        self.taken: set[fx.Node] = set()
        self.of_inputs: set[fx.Node] = set()  # the others have the same batch at every call
        for node in self.nodes:
            if node.op == "placeholder" or not self.of_inputs.isdisjoint(node.all_input_nodes):
                self.of_inputs.add(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return _module(self.network, node)

    def is_layer(self, node: fx.Node) -> bool:
        module = self.module(node)
        if type(module) not in LAYERS or len(node.args) != 1 or node.args[0] not in self.shapes:
            return False
        if any(name.startswith(f"{node.target}.") for name in self.read):  # the model uses its weight elsewhere too
            return False
        return type(module) not in CONVS or len(self.shapes[node.args[0]][0]) == 4  # type: ignore[index]

    def is_norm(self, node: fx.Node) -> bool:
        """A batch norm of images that no layer takes in."""
        fits = node not in self.taken and len(node.args) == 1 and node.args[0] in self.shapes
        return fits and self.is_norm_of(node, node) and len(self.shapes[node][0]) == 4

    def work(self, node: fx.Node) -> int:
        """Multiply-adds of the dense layer per sample, to within a factor that all layers of a network share."""
        return math.prod(weight_shape(self.module(node))) * math.prod(self.shapes[node][0][2:])

    def grow(self, layer: fx.Node) -> Site:
        chain, norm, add, activation = [layer], None, None, "none"
        while activation == "none":
            (user,) = chain[-1].users if len(chain[-1].users) == 1 else (None,)
            if user is None or user in self.taken or self.moves_past_a_mutation(chain[-1], user):
                break
            is_layer = type(self.module(layer)) in LAYERS
            if is_layer and norm is None and add is None and self.is_norm_of(user, layer):
                norm = str(user.target)
            elif is_layer and add is None and self.adds_a_residual(user, chain[-1]):
                add = user.name
            else:
                activation = activation_of(user, self.module(user))
                if activation == "none":
                    break
            chain.append(user)
        self.taken.update(chain)
        shape = self.shapes[layer.args[0]][0]  # type: ignore[index]
        target = str(layer.target)
        return Site(target, target, shape, tuple(node.name for node in chain), norm, add, activation)

    def pool_of(self, node: fx.Node) -> tuple[str, Window] | None:
        """Of a node that pools maps."""
        if node in self.taken or node not in self.shapes or not node.args or node.args[0] not in self.shapes:
            return None
        shape = self.shapes[node.args[0]][0]  # type: ignore[index]
        return window_of(node, self.module(node), shape[2:]) if len(shape) == 4 else None

    def grow_pool(self, pool: fx.Node, kind: str, window: Window) -> Site:
        """Takes in the `flatten` behind it where one pixel is left."""
        chain, (shape, dtype) = [pool], self.shapes[pool.args[0]]  # type: ignore[index]
        (user,) = pool.users if len(pool.users) == 1 else (None,)
        flattens = user is not None and self.shapes[pool][0][2:] == (1, 1) and is_flatten(user, self.module(user))
        if flattens and not self.moves_past_a_mutation(pool, user):  # type: ignore[arg-type]
            chain.append(user)  # type: ignore[arg-type]
        self.taken.update(chain)
        target, flat = str(pool.target) if pool.op == "call_module" else "", len(self.shapes[chain[-1]][0]) == 2
        nodes, dtype_name = tuple(node.name for node in chain), str(dtype).removeprefix("torch.")
        return Site(target or pool.name, target, shape, nodes, pool=(kind, window, dtype_name, flat))

    def is_norm_of(self, node: fx.Node, layer: fx.Node) -> bool:
        norm = self.module(node)
        images = type(self.module(layer)) in (*CONVS, nn.BatchNorm2d)
        kind, dims = (nn.BatchNorm2d, 4) if images else (nn.BatchNorm1d, 2)
        same = type(norm) is kind and len(self.shapes[layer][0]) == dims
        # Without running statistics it normalises by those of the batch, in eval mode too.
        return same and norm.running_mean is not None and not norm.training  # type: ignore[union-attr]

    def adds_a_residual(self, node: fx.Node, tail: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
            return False
        if node.kwargs or len(node.args) != 2 or not all(arg in self.shapes for arg in node.args):
            return False
        first, second = node.args
        other = second if first is tail else first
        if first is second or self.shapes[other] != self.shapes[tail]:  # type: ignore[index]
            return False
        if other in self.of_inputs and tail not in self.of_inputs:  # a residual broadcasts, a layer's output does not
            return False
        # `other += tail` also changes `other`: all right only if it is a fresh tensor that nothing else reads.
        return not (_mutates(node, None) and first is other and not self.is_private(other))

    def is_private(self, value: Any) -> bool:
        """A tensor of its own, read by one node: what that node does to it nobody else can see."""
        module = self.module(value) if isinstance(value, fx.Node) else None
        return isinstance(module, (*LAYERS, nn.BatchNorm1d, nn.BatchNorm2d)) and len(value.users) == 1

    def moves_past_a_mutation(self, start: fx.Node, end: fx.Node) -> bool:
        """Would the layer, run where ``end`` stands, read its input after something between changed it in place?"""
        between = self.nodes[self.position[start] + 1 : self.position[end]]
        return any(
            _mutates(node, self.module(node)) and not self.is_private(next(iter(node.args), None)) for node in between
        )


_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
}
_CLAMPS = (
    F.hardtanh,
    F.hardtanh_,
    torch.clamp,
    torch.clamp_,
    torch.clip,
    torch.clip_,
    "clamp",
    "clamp_",
    "clip",
    "clip_",
)
_IN_PLACE_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    operator.setitem,
)


def activation_of(node: fx.Node, module: nn.Module | None) -> str:
    """The activation that a node is, in the names of the kernels, or "none"."""
    if type(module) is nn.Hardtanh:
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else "none"
    if module is not None:
        return _ACTIVATIONS.get(type(module), "none")
    if node.op not in ("call_function", "call_method"):
        return "none"
    if node.target in _CLAMPS:
        named = [node.kwargs.get(f"{end}_val", node.kwargs.get(end)) for end in ("min", "max")]
        bounds = [*node.args[1:3], *named[len(node.args) - 1 :]]
        return "relu6" if bounds == [0, 6] else "none"
    return _ACTIVATIONS.get(node.target, "none")


def _mutates(node: fx.Node, module: nn.Module | None) -> bool:
    """May the node change a tensor it is given? Errs towards yes."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _IN_PLACE_OPERATORS or "out" in node.kwargs:
        return True
    name = node.target if isinstance(node.target, str) else node.target.__name__
    said = any(arg is True for arg in (*node.args[1:], node.kwargs.get("inplace")))  # `is`: sum(1) says no such thing
    return (name.endswith("_") and not name.endswith("__")) or said


def find_eager_sites(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Site]:
    """The layers of a model that cannot be traced, each on its own, at the one input shape it was called with."""
    seen: dict[str, set[tuple[int, ...]]] = {}

    def record(name: str, module: nn.Module, arguments: tuple) -> None:
        seen.setdefault(name, set()).add(tuple(arguments[0].shape) if arguments else ())

    layers = {name: module for name, module in model.named_modules() if type(module) in LAYERS}
    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in layers.items()]
    try:
        model(*clone(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    sites = []
    for name, module in layers.items():
        shapes = seen.get(name, set())
        if len(shapes) == 1 and (type(module) not in CONVS or len(next(iter(shapes))) == 4):
            sites.append(Site(name, name, shapes.pop()))
    return sites


def weight_shape(module: Any) -> tuple[int, ...]:
    return tuple(module.weight_shape if isinstance(module, BlockSparseLayer) else module.weight.shape)


def clone(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fresh inputs: a model may change its own in place."""
    return tuple(x.detach().clone() for x in inputs)
