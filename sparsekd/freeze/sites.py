"""What can be frozen in a model: its trace, and in it each layer with what is computed in the same call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import BlockSparseLayer
from .between import MULTIPLIES, Between, between_of
from .kinds import LAYERS, hooked, is_conv, is_transposed, kind_of
from .mutation import mutates
from .pools import Window, is_flatten, window_of
from .simplify import module_of


@dataclass(frozen=True)
class Site:
    """One convolution, linear or pooling layer (or batch norm no layer takes in, or what stands between layers), and
    what is computed in the same call.

    name: in the plan and in the frozen network. target: the layer's module. nodes: its chain in the trace, from the
    layer to the last node it replaces (empty in a model that cannot be traced). norm: the BatchNorm's module.
    add: the node in the chain that adds the residual. activation: as the kernels name it. input: shape in the example.
    contiguous: the example gives this input of the network in that format. pool: "max" or "mean", its window, its dtype
    and whether pixels are no dimension of its output. between: what it is where it is no layer. scale: path of the
    tensor [C] that the output of a linear layer is multiplied with.
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
    between: Between | None = None
    scale: str | None = None


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


def shapes_in(network: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Shapes:
    """Of every tensor that a trace computes."""
    shapes: Shapes = {}
    Recorder(network, lambda node, x: shapes.update({node: (tuple(x.shape), x.dtype)})).run(*clone(inputs))
    return shapes


def find_sites(network: fx.GraphModule, inputs: tuple[Tensor, ...], pools: bool = True) -> list[Site]:
    """The sites of a traced model, in order. Where two layers meet in an add, the larger one takes it in."""
    finder = _SiteFinder(network, shapes_in(network, inputs), pools)
    layers = [node for node in network.graph.nodes if finder.is_layer(node)]
    layers = [node for node in layers if pools or not is_transposed(finder.module(node))]
    sites = {node: finder.grow(node) for node in sorted(layers, key=finder.work, reverse=True)}
    sites |= {node: finder.grow(node) for node in network.graph.nodes if finder.is_norm(node)}
    pooling = {node: finder.pool_of(node) for node in network.graph.nodes if pools}
    sites |= {node: finder.grow_pool(node, *found) for node, found in pooling.items() if found}
    standing = {node: finder.between(node) for node in network.graph.nodes if pools}
    sites |= {node: finder.grow_between(node, found) for node, found in standing.items() if found}
    contiguous = _contiguous_inputs(network, inputs)
    calls: dict[str, int] = {}
    named = []
    for node in filter(sites.__contains__, network.graph.nodes):
        site = replace(sites[node], contiguous=any(one is node.args[0] for one in contiguous))
        calls[site.name] = calls.get(site.name, 0) + 1
        named.append(site if calls[site.name] == 1 else replace(site, name=f"{site.name}@{calls[site.name]}"))
    return [*named, *_sites_alone(network, layers_inside(network), network, inputs)] if pools else named


def layers_inside(network: fx.GraphModule) -> dict[str, nn.Module]:
    """By path, the layers inside modules that a trace calls as a whole."""
    called = dict.fromkeys(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    inside = ((path, network.get_submodule(path).named_modules()) for path in called)
    return {f"{path}.{name}": one for path, named in inside for name, one in named if name and kind_of(one)}


def fused_by_torch(module: nn.Module) -> tuple[str, ...]:
    """What the names begin with that are inside encoder layers for which torch has one call, which reads dense weights;
    with hooks on them, as while sites are looked for, it is not taken."""
    encoders = [(name, one) for name, one in module.named_modules() if isinstance(one, nn.TransformerEncoderLayer)]
    dense = [name for name, one in encoders if not any(isinstance(part, BlockSparseLayer) for part in one.modules())]
    return tuple(f"{name}." if name else "" for name in dense)


def _contiguous_inputs(network: fx.GraphModule, inputs: tuple[Tensor, ...]) -> set[fx.Node]:
    """Inputs of the network that are maps in no other format than contiguous."""
    nodes = [node for node in network.graph.nodes if node.op == "placeholder"]
    maps = {node: x for node, x in zip(nodes, inputs, strict=False) if x.dim() == 4 and x.is_contiguous()}
    return {node for node, x in maps.items() if not x.is_contiguous(memory_format=torch.channels_last)}


class _SiteFinder:
    """Grows sites in one graph. A chain grows only along values that nothing else reads."""

    def __init__(self, network: fx.GraphModule, shapes: Shapes, pools: bool) -> None:
        self.network, self.shapes, self.pools = network, shapes, pools
        self.nodes = list(network.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.taken: set[fx.Node] = set()
        self.named = {node.name: node for node in self.nodes}
        self.modules = {name for name, _ in network.named_modules()}
        self.of_inputs: set[fx.Node] = set()  # the others have the same batch at every call
        for node in self.nodes:
            if node.op == "placeholder" or not self.of_inputs.isdisjoint(node.all_input_nodes):
                self.of_inputs.add(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        return module_of(self.network, node)

    def is_layer(self, node: fx.Node) -> bool:
        module = self.module(node)
        if kind_of(module) is None or node.kwargs or len(node.args) != 1 or node.args[0] not in self.shapes:
            return False
        return not is_conv(module) or len(self.shapes[node.args[0]][0]) == 4  # type: ignore[index]

    def is_norm(self, node: fx.Node) -> bool:
        """A batch norm of images that no layer takes in."""
        fits = node not in self.taken and len(node.args) == 1 and node.args[0] in self.shapes
        return fits and self.is_norm_of(node, node) and len(self.shapes[node][0]) == 4

    def work(self, node: fx.Node) -> int:
        """Multiply-adds of the dense layer per sample, to within a factor that all layers of a network share."""
        return math.prod(weight_shape(self.module(node))) * math.prod(self.shapes[node][0][2:])

    def grow(self, layer: fx.Node) -> Site:
        scaled = self.scaled(layer)
        chain, norm, add, activation = self.chain_of(layer if scaled is None else scaled[0], layer)
        chain = chain if scaled is None else [layer, *chain]
        self.taken.update(chain)
        shape = self.shapes[layer.args[0]][0]  # type: ignore[index]
        target, nodes = str(layer.target), tuple(node.name for node in chain)
        scale = None if scaled is None else scaled[1]
        return Site(target, target, shape, nodes, norm, add, activation, scale=scale)

    def scaled(self, layer: fx.Node) -> tuple[fx.Node, str] | None:
        """(the product, the path of the factors) where a linear layer is scaled by a constant for each output."""
        (user,) = layer.users if len(layer.users) == 1 else (None,)
        module = self.module(layer)
        if user is None or user in self.taken or not self.pools or kind_of(module) is None or is_conv(module):
            return None
        shape, dtype = self.shapes[layer]
        for factor in user.args if user.target in MULTIPLIES and len(user.args) == 2 and not user.kwargs else ():
            if (
                isinstance(factor, fx.Node)
                and factor.op == "get_attr"
                and self.shapes.get(factor) == (shape[-1:], dtype)
            ):
                return user, str(factor.target)
        return None

    def chain_of(self, first: fx.Node, layer: fx.Node) -> tuple[list[fx.Node], str | None, str | None, str]:
        """(what a call of a layer computes from ``first`` on, the norm, the add and the activation among them)."""
        chain, norm, add, activation = [first], None, None, "none"
        while activation == "none":
            (user,) = chain[-1].users if len(chain[-1].users) == 1 else (None,)
            if user is None or user in self.taken or self.moves_past_a_mutation(chain[-1], user):
                break
            is_layer, is_gate = kind_of(self.module(layer)) is not None, self.module(layer) is None
            if is_layer and norm is None and add is None and self.is_norm_of(user, layer):
                norm = str(user.target)
            elif (is_layer or is_gate) and add is None and self.adds_a_residual(user, chain[-1]):
                add = user.name
            else:
                activation = activation_of(user, self.module(user))
                if activation == "none" or not (self.pools or activation in _ON_EVERY_DEVICE):
                    return chain, norm, add, "none"
            chain.append(user)
        return chain, norm, add, activation

    def pool_of(self, node: fx.Node) -> tuple[str, Window] | None:
        """Of a node that pools maps."""
        if node in self.taken or node not in self.shapes or not node.args or node.args[0] not in self.shapes:
            return None
        shape = self.shapes[node.args[0]][0]  # type: ignore[index]
        return window_of(node, self.module(node)) if len(shape) == 4 else None

    def grow_pool(self, pool: fx.Node, kind: str, window: Window) -> Site:
        """Takes in the `flatten` behind it where one pixel is left."""
        chain, (shape, dtype) = [pool], self.shapes[pool.args[0]]  # type: ignore[index]
        (user,) = pool.users if len(pool.users) == 1 else (None,)
        flattens = user is not None and self.shapes[pool][0][2:] == (1, 1) and is_flatten(user, self.module(user))
        if flattens and not self.moves_past_a_mutation(pool, user):  # type: ignore[arg-type]
            chain.append(user)  # type: ignore[arg-type]
        self.taken.update(chain)
        name, target = self.name_of(pool)
        nodes, dtype_name = tuple(node.name for node in chain), str(dtype).removeprefix("torch.")
        flat = len(self.shapes[chain[-1]][0]) == 2
        return Site(name, target, shape, nodes, pool=(kind, window, dtype_name, flat))

    def name_of(self, node: fx.Node) -> tuple[str, str]:
        """(name, target) of a site that need not be a module."""
        target = str(node.target) if node.op == "call_module" else ""
        name = target or node.name
        while not target and name in self.modules:  # a layer may have the name of a method
            name += "_"
        return name, target

    def between(self, node: fx.Node) -> Between | None:
        found = None if node in self.taken else between_of(node, self.module(node), self.shapes)
        if found is None or self.of_inputs.isdisjoint(node.all_input_nodes):
            return None
        operands = [self.named[name] for name in found.operands]
        if mutates(node, self.module(node)) and not (operands[0] is node.args[0] and self.is_private(operands[0])):
            return None
        return found if self.of_inputs.issuperset(operands) else None

    def grow_between(self, node: fx.Node, found: Between) -> Site:
        """A gate takes in the residual and the activation behind it."""
        chain, add, activation = [node], None, "none"
        if found.kind == "gate":
            chain, _, add, activation = self.chain_of(node, node)
        self.taken.update(chain)
        name, target = self.name_of(node)
        shape, nodes = self.shapes[self.named[found.operands[0]]][0], tuple(one.name for one in chain)
        return Site(name, target, shape, nodes, add=add, activation=activation, between=found)

    def is_norm_of(self, node: fx.Node, layer: fx.Node) -> bool:
        norm = self.module(node)
        first = self.module(layer)
        images = is_conv(first) or type(first) is nn.BatchNorm2d
        kind, dims = (nn.BatchNorm2d, 4) if images else (nn.BatchNorm1d, 2)
        same = type(norm) is kind and len(self.shapes[layer][0]) == dims
        # Without running statistics it normalises by those of the batch, in eval mode too.
        free = norm is not None and not hooked(norm)
        return same and free and norm.running_mean is not None and not norm.training  # type: ignore[union-attr]

    def adds_a_residual(self, node: fx.Node, tail: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or node.target not in ADDS:
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
        return not (mutates(node, None) and first is other and not self.is_private(other))

    def is_private(self, value: Any) -> bool:
        """A tensor of its own, read by one node: what that node does to it nobody else can see."""
        module = self.module(value) if isinstance(value, fx.Node) else None
        fresh = isinstance(module, (*LAYERS, nn.BatchNorm1d, nn.BatchNorm2d)) and not hooked(module)
        return fresh and len(value.users) == 1

    def moves_past_a_mutation(self, start: fx.Node, end: fx.Node) -> bool:
        """Would the layer, run where ``end`` stands, read its input after something between changed it in place?"""
        between = self.nodes[self.position[start] + 1 : self.position[end]]
        return any(
            mutates(node, self.module(node)) and not self.is_private(next(iter(node.args), None)) for node in between
        )


aten = torch.ops.aten
ADDS = (operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor, "add", "add_")
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((aten.relu.default, aten.relu_.default), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6, aten.relu6.default), "relu6"),
    **dict.fromkeys((nn.SiLU, F.silu, aten.silu.default, aten.silu_.default), "silu"),
    **dict.fromkeys((nn.Hardswish, F.hardswish, aten.hardswish.default, aten.hardswish_.default), "hardswish"),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid, aten.hardsigmoid.default), "hardsigmoid"),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", aten.sigmoid.default), "sigmoid"),
}
_ON_EVERY_DEVICE = ("relu", "relu6", "silu")  # the kernels of a GPU know no others
_GELUS = (nn.GELU, F.gelu, aten.gelu.default)
_CLAMPS = (
    *(aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default),
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


def activation_of(node: fx.Node, module: nn.Module | None) -> str:
    """The activation that a node is, in the names of the kernels, or "none"."""
    if type(module) is nn.Hardtanh:
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else "none"
    if type(module) in _GELUS or (module is None and node.target in _GELUS):
        said = node.kwargs.get("approximate", getattr(module, "approximate", "none"))
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(said), "none")
    if module is not None:
        return "none" if hooked(module) else _ACTIVATIONS.get(type(module), "none")
    if node.op not in ("call_function", "call_method"):
        return "none"
    if node.target in _CLAMPS:
        named = [node.kwargs.get(f"{end}_val", node.kwargs.get(end)) for end in ("min", "max")]
        bounds = [*node.args[1:3], *named[len(node.args) - 1 :]]
        return "relu6" if bounds == [0, 6] else "none"
    return _ACTIVATIONS.get(node.target, "none")


def find_eager_sites(model: nn.Module, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Site]:
    """The layers of a model that cannot be traced."""
    return _sites_alone(model, {name: one for name, one in model.named_modules() if kind_of(one)}, run, inputs)


def _sites_alone(
    network: nn.Module, layers: Mapping[str, nn.Module], run: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> list[Site]:
    """Layers of a network each on its own, at the one input shape that it is called with when the network runs."""
    fused = fused_by_torch(network)
    layers = {name: one for name, one in layers.items() if not name.startswith(fused) and not is_transposed(one)}
    if not layers:  # transposed ones may be called with a size
        return []
    seen: dict[str, set[tuple[int, ...]]] = {}

    def record(name: str, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        given = arguments[0] if arguments else named.get("input")
        seen.setdefault(name, set()).add(tuple(given.shape) if isinstance(given, Tensor) else ())

    hooks = [one.register_forward_pre_hook(partial(record, name), with_kwargs=True) for name, one in layers.items()]
    try:
        run(*clone(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    sites = []
    for name, module in layers.items():
        shapes = seen.get(name, set())
        if is_conv(module):
            shapes = {shape for shape in shapes if len(shape) == 4}
        elif not all(shapes):  # a call without a positional input
            shapes = set()
        if shapes:  # of several the largest is measured
            sites.append(Site(name, name, max(shapes, key=math.prod)))
    return sites


def weight_shape(module: Any) -> tuple[int, ...]:
    return tuple(module.weight_shape if isinstance(module, BlockSparseLayer) else module.weight.shape)


def clone(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fresh inputs: a model may change its own in place."""
    return tuple(x.detach().clone() for x in inputs)
