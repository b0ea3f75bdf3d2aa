"""Layers and norms that a trace spells otherwise become calls of torch's modules, which is what sites.py looks for.

F.batch_norm on buffers, a batch norm of another class, ``x * scale + shift`` with a number for each channel; F.linear
and F.conv2d on a weight that is always the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import BlockSparseLayer
from ..nn.layer import computes_as
from .simplify import arguments_of, drop_unread, module_of

aten = torch.ops.aten

NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}  # by dimensions of what they normalise
_NORM_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN_BATCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn")
_LINEAR = ("input", "weight", "bias")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_MULTIPLIES = (operator.mul, torch.mul, aten.mul.Tensor, "mul")
_ADDS = (operator.add, torch.add, aten.add.Tensor, "add")

_SIDES: dict[Any, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CONVS: dict[Any, Any] = {
    **dict.fromkeys((F.conv1d, torch.conv1d, aten.conv1d.default, aten.conv1d.padding), nn.Conv1d),
    **dict.fromkeys((F.conv2d, torch.conv2d, aten.conv2d.default, aten.conv2d.padding), nn.Conv2d),
    **dict.fromkeys((F.conv3d, torch.conv3d, aten.conv3d.default, aten.conv3d.padding), nn.Conv3d),
}

Shapes = dict[fx.Node, tuple[tuple[int, ...], torch.dtype]]


def spell_out(network: fx.GraphModule, model: nn.Module, shapes: Shapes) -> None:
    """Changes the trace in place. shapes: of what each node computes."""
    writer = _Writer(network, model, shapes)
    for node in list(network.graph.nodes):
        writer.layer(node) or writer.batch_norm(node) or writer.scale(node)
    drop_unread(network.graph)
    network.graph.lint()
    network.recompile()


class _Writer:
    def __init__(self, network: fx.GraphModule, model: nn.Module, shapes: Shapes) -> None:
        self.network, self.model, self.shapes = network, model, shapes

    def layer(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        if node.target in (F.linear, aten.linear.default):
            return self._linear(node, arguments_of(node, _LINEAR))
        if node.target in _CONVS:
            return self._conv(node, arguments_of(node, _CONV), _CONVS[node.target])
        if node.target in (F.layer_norm, torch.layer_norm, aten.layer_norm.default):
            return self._layer_norm(node, arguments_of(node, _LAYER_NORM))
        return False

    def _linear(self, node: fx.Node, given: dict[str, Any]) -> bool:
        tensors = self._weight_and_bias(given)
        if tensors is None or tensors[0].dim() != 2:
            return False
        weight, bias = tensors
        owner = self._owner(given, nn.Linear)
        if owner is None:
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            owner = self._add(given["weight"], node, _with_tensors(dense, weight, bias))
        return self._call(node, owner, given["input"])

    def _layer_norm(self, node: fx.Node, given: dict[str, Any]) -> bool:
        shape, x = given.get("normalized_shape"), given.get("input")
        weight, bias = (self._tensor(given.get(name)) for name in ("weight", "bias"))
        known = [tensor is None for tensor in (weight, bias)] == [
            given.get(name) is None for name in ("weight", "bias")
        ]
        whole = isinstance(shape, (list, tuple)) and len(shape) == 1 and isinstance(shape[0], int)
        if not known or not whole or not isinstance(x, fx.Node) or (weight is None and bias is not None):
            return False
        affine = weight is not None
        norm: Any = nn.LayerNorm(shape[0], given.get("eps", 1e-5), affine, bias is not None, device="meta")  # type: ignore
        reads = str(given["weight"].meta.get("reads", "")) if affine else ""
        name = self._free(reads.rpartition(".")[0] or node.name)
        _add_module(self.network, name, norm.eval() if weight is None else _with_tensors(norm, weight, bias).eval())
        return self._call(node, name, x)

    def _conv(self, node: fx.Node, given: dict[str, Any], kind: Any) -> bool:
        tensors = self._weight_and_bias(given)
        sides = _SIDES[kind]
        if tensors is None or not isinstance(given.get("input"), fx.Node) or self._dims(given["input"]) != sides + 2:
            return False
        weight, bias = tensors
        groups = given.get("groups", 1)
        options: dict[str, Any] = {name: _sides(given.get(name, 1), sides) for name in ("stride", "dilation")}
        padding = given.get("padding", 0)
        options["padding"] = padding if isinstance(padding, str) else _sides(padding, sides)
        if None in options.values() or not isinstance(groups, int):
            return False
        owner = self._owner(given, kind)
        if owner is not None:
            conv: Any = self.model.get_submodule(owner)
            same = {name: getattr(conv, name) for name in options} == options and conv.groups == groups
            if not same or conv.padding_mode != "zeros":
                owner = None
        if owner is None:
            sizes = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
            dense = kind(*sizes, **options, groups=groups, bias=bias is not None, device="meta")
            owner = self._add(given["weight"], node, _with_tensors(dense, weight, bias))
        return self._call(node, owner, given["input"])

    def _weight_and_bias(self, given: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        weight, bias = self._tensor(given.get("weight")), self._tensor(given.get("bias"))
        if weight is None or (bias is None) is not (given.get("bias") is None):
            return None
        return weight, bias

    def _owner(self, given: dict[str, Any], kind: type[nn.Module]) -> str | None:
        """The layer of the model that this is a call of."""
        owner, _, leaf = str(given["weight"].meta.get("reads", "")).rpartition(".")
        if leaf != "weight" or not owner:
            return None
        try:
            module: Any = self.model.get_submodule(owner)
        except AttributeError:
            return None
        if not (isinstance(module, BlockSparseLayer) and module.dense_type is kind) and not computes_as(module, kind):
            return None
        bias = given.get("bias")
        if (module.bias is None) is not (bias is None) or module._forward_hooks or module._forward_pre_hooks:
            return None
        if bias is not None and bias.meta.get("reads") != f"{owner}.bias":
            return None
        if _lookup(self.network, owner) is None:
            _add_module(self.network, owner, module)
        return owner if _lookup(self.network, owner) is module else None

    def batch_norm(self, node: fx.Node) -> bool:
        module = module_of(self.network, node)
        if module is not None:
            if not computes_as_norm(module) or node.kwargs or len(node.args) != 1:
                return False
            norm: Any = module
            dims = self._dims(node)
            if norm.running_mean is None or norm.training or dims not in NORMS or type(norm) is NORMS[dims]:
                return False
            return self._norm(node, node.args[0], norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        if node.op != "call_function":
            return False
        if node.target in (F.batch_norm, torch.batch_norm):
            given = arguments_of(node, _BATCH_NORM if node.target is F.batch_norm else _ATEN_BATCH_NORM)
        elif node.target is aten.batch_norm.default:
            given = arguments_of(node, _ATEN_BATCH_NORM)
        else:
            return False
        tensors = [self._tensor(given.get(name)) for name in ("running_mean", "running_var", "weight", "bias")]
        read = [given.get(name) is None for name in ("running_mean", "running_var", "weight", "bias")]
        if given.get("training", False) is not False or read != [x is None for x in tensors] or any(read[:2]):
            return False
        mean, var, weight, bias = tensors
        return self._norm(node, given["input"], mean, var, weight, bias, given.get("eps", 1e-5))

    def scale(self, node: fx.Node) -> bool:
        """x * scale + shift"""
        product = node
        scale = self._per_channel(node, _MULTIPLIES)
        if scale is None:
            return False
        x, factor = scale
        shift = torch.zeros_like(factor)
        (user,) = node.users if len(node.users) == 1 else (None,)
        added = self._per_channel(user, _ADDS) if user is not None else None
        if added is not None and added[0] is node:
            product, shift = user, added[1]  # type: ignore[assignment]
        elif self._dims(node) is None:
            return False
        mean, one = torch.zeros_like(factor), torch.ones_like(factor)
        replaced = self._norm(product, x, mean, one, factor, shift, 0.0)
        if replaced and product is not node:
            self.network.graph.erase_node(node)  # or the product would still be computed, for nobody
        return replaced

    def _per_channel(self, node: fx.Node, targets: tuple[Any, ...]) -> tuple[fx.Node, Tensor] | None:
        """(x, [C]) of a product or sum of a map and a constant for each of its channels."""
        if node.target not in targets or len(node.args) != 2 or node.kwargs or self._dims(node) not in (4, 5):
            return None
        for x, other in (node.args, node.args[::-1]):
            constant = self._tensor(other)
            if not isinstance(x, fx.Node) or constant is None or self.shapes.get(x) != self.shapes[node]:
                continue
            shape = self.shapes[node][0]
            wanted = (shape[1], *(1,) * (len(shape) - 2))
            if tuple(constant.shape) in (wanted, (1, *wanted)) and constant.dtype == self.shapes[node][1]:
                return x, constant.flatten()
        return None

    def _norm(self, node: fx.Node, x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> bool:
        dims = self._dims(node)
        if dims not in NORMS or not isinstance(x, fx.Node) or not mean.is_floating_point():
            return False
        if mean.dim() != 1:
            return False
        module: Any = NORMS[dims](mean.numel(), eps=eps, device=mean.device, dtype=mean.dtype)
        with torch.no_grad():
            module.running_mean.copy_(mean)
            module.running_var.copy_(var)
            if weight is not None:
                module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
        module.eval()
        if node.op == "call_module":
            name = str(node.target)
            self.network.set_submodule(name, module)
            return self._call(node, name, x)
        name = node.name
        reads = next((one.meta["reads"] for one in node.all_input_nodes if "reads" in one.meta), "")
        if "." in reads:
            name = reads.rpartition(".")[0]
        name = self._free(name)
        _add_module(self.network, name, module)
        return self._call(node, name, x)

    def _add(self, weight: fx.Node, node: fx.Node, module: nn.Module) -> str:
        reads = str(weight.meta.get("reads", ""))
        name = self._free(reads.removesuffix(".weight").replace(".", "_") if reads else node.name)
        _add_module(self.network, name, module.eval())
        return name

    def _free(self, name: str) -> str:
        """A path in the trace that is not in use, or only by what is replaced."""
        wanted, count = name, 1
        while _lookup(self.network, wanted) is not None:
            count += 1
            wanted = f"{name}_{count}"
        return wanted

    def _call(self, node: fx.Node, name: str, x: Any) -> bool:
        with self.network.graph.inserting_before(node):
            new = self.network.graph.create_node("call_module", name, (x,), name=node.name)
        self.shapes[new] = self.shapes[node]
        node.replace_all_uses_with(new)
        self.network.graph.erase_node(node)
        return True

    def _tensor(self, node: Any) -> Tensor | None:
        """The constant that a node is."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = operator.attrgetter(str(node.target))(self.network)
        return value if isinstance(value, Tensor) else None

    def _dims(self, node: fx.Node) -> int | None:
        return len(self.shapes[node][0]) if node in self.shapes else None


def computes_as_norm(module: nn.Module) -> bool:
    plain = any(computes_as(module, kind) for kind in _NORM_KINDS)
    return plain and not module._forward_hooks and not module._forward_pre_hooks


def _with_tensors(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _lookup(network: nn.Module, path: str) -> Any:
    found: Any = network
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _add_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path, and empty ones on the way: those of the model are never changed."""
    *owners, leaf = path.split(".")
    place = network
    for name in owners:
        if getattr(place, name, None) is None:
            place.add_module(name, nn.Module())
        place = getattr(place, name)
    place.add_module(leaf, module)


def _sides(size: Any, count: int) -> tuple[int, ...] | None:
    """One number for each side of an image."""
    given = (size,) if isinstance(size, int) else size
    if not isinstance(given, (tuple, list)) or not all(isinstance(one, int) for one in given):
        return None
    return tuple(given) if len(given) == count else tuple(given) * count if len(given) == 1 else None


__all__ = ["NORMS", "computes_as_norm", "spell_out"]
