"""Convolutions of one and three dimensions in a trace become the two-dimensional ones that they are.

A Conv1d is a Conv2d over images of height 1, a 1x1x1 Conv3d a 1x1 one over D images on top of each other. What stands
between two of them (batch norm, activation, residual, pooling of lines) is computed on the images too, so that they
fuse as Conv2d do.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from ..nn import BlockSparseLayer, SparseConv1d, SparseConv2d, SparseConv3d
from ..nn.layer import computes_as
from .canonical import NORMS, computes_as_norm
from .kinds import hooked
from .pools import is_flatten
from .simplify import arguments_of, module_of
from .sites import ADDS, Shapes, activation_of


def lift(network: fx.GraphModule, shapes: Shapes) -> None:
    """Changes the trace in place; its results stay what they are. shapes: of what each node computes."""
    lifter = _Lifter(network, shapes)
    for node in list(network.graph.nodes):
        lifter.visit(node)
    lifter.finish()
    network.graph.lint()
    network.recompile()


class _Lifter:
    def __init__(self, network: fx.GraphModule, shapes: Shapes) -> None:
        self.network, self.graph, self.shapes = network, network.graph, shapes
        self.images: dict[fx.Node, fx.Node] = {}  # of what was lifted: the same numbers as images
        self.origin: dict[fx.Node, fx.Node] = {}  # of each, the tensor that has its D and H
        self.views: list[fx.Node] = []
        self.swapped: set[str] = set()

    def visit(self, node: fx.Node) -> None:
        x = node.args[0] if node.args else None
        dims = len(self.shapes[node][0]) if node in self.shapes else 0
        if dims == 2 and x in self.images and len(self.shapes[x][0]) == 3:  # type: ignore[index]
            self._end(node, self.images[x])  # type: ignore[index]
        if dims not in (3, 5) or not isinstance(x, fx.Node) or x not in self.shapes or len(self.shapes[x][0]) != dims:
            return
        module = module_of(self.network, node)
        if node.target in ADDS and not node.kwargs and self._lifts_as_sum(node):
            first = next(one for one in node.args if one in self.images)
            images = tuple(self._image_of(one, node) for one in node.args)  # type: ignore[arg-type]
            self._replace(node, self.origin[first], images)  # type: ignore[index]
        elif x in self.images and activation_of(node, module) != "none":
            self._replace(node, self.origin[x], (self.images[x], *node.args[1:]))
        elif module is not None and self._swap(node, module):
            self._replace(node, self.origin.get(x, x), (self._image_of(x, node),))

    def _end(self, node: fx.Node, image: fx.Node) -> None:
        """A mean over lines, or a flatten, of which the image has the same."""
        given = arguments_of(node, ("input", "dim"))
        where: Any
        if is_flatten(node, module_of(self.network, node)):
            target, where = "flatten", 1
        elif node.target in _MEANS and len(given) == 2 and given.get("dim") in _LINE:
            target, where = "mean", (2, 3)
        else:
            return
        with self.graph.inserting_before(node):
            end = self.graph.create_node("call_method", target, (image, where), name=node.name)
        self.shapes[end] = self.shapes[node]
        node.replace_all_uses_with(end)
        self.graph.erase_node(node)

    def _lifts_as_sum(self, node: fx.Node) -> bool:
        if len(node.args) != 2 or not any(one in self.images for one in node.args):
            return False
        if node.target in IN_PLACE_ADDS and node.args[0] not in self.images:  # its image may be a copy
            return False
        return all(one in self.shapes and self.shapes[one] == self.shapes[node] for one in node.args)  # type: ignore[index]

    def _swap(self, node: fx.Node, module: Any) -> bool:
        """Puts the two-dimensional twin of a layer or norm in its place, if every call of it will be of that one."""
        name, dims = str(node.target), len(self.shapes[node][0])
        if name in self.swapped:
            return True
        calls = [one for one in self.graph.nodes if one.op == "call_module" and one.target == name]
        if any(len(self.shapes[one][0]) != dims or len(one.args) != 1 or one.kwargs for one in calls):
            return False
        if is_liftable(module):
            twin = as_conv2d(module)
        elif node.args[0] in self.images and computes_as_norm(module) and len(calls) == 1:
            if module.running_mean is None or module.training:
                return False
            twin = _norm2d(module)
        elif node.args[0] in self.images and not hooked(module) and type(module) in _POOLS:
            pool = _pool2d(module)
            if pool is None:
                return False
            twin = pool
        else:
            return False
        self.network.set_submodule(name, twin)
        self.swapped.add(name)
        return True

    def _image_of(self, x: fx.Node, user: fx.Node) -> fx.Node:
        if x in self.images:
            return self.images[x]
        with self.graph.inserting_before(user):
            one_row = len(self.shapes[x][0]) == 3
            image = (
                self.graph.call_method("unsqueeze", (x, 2)) if one_row else self.graph.call_method("flatten", (x, 2, 3))
            )
        self.views.append(image)
        return image

    def _replace(self, node: fx.Node, origin: fx.Node, args: tuple[Any, ...]) -> None:
        """``node`` computed on images; whoever else reads it gets them back in the shape that it has."""
        with self.graph.inserting_before(node):
            image = self.graph.create_node(node.op, node.target, args, dict(node.kwargs), name=node.name)
            if len(self.shapes[node][0]) == 3:
                back = self.graph.call_method("squeeze", (image, 2))
            else:
                sizes = tuple(self.graph.call_method("size", (origin, i)) for i in (2, 3))
                self.views += sizes
                back = self.graph.call_method("unflatten", (image, 2, sizes))
        self.views.append(back)
        self.shapes[back] = self.shapes[node]
        node.replace_all_uses_with(back)
        self.graph.erase_node(node)
        self.images[back], self.origin[back] = image, origin

    def finish(self) -> None:
        for view in reversed(self.views):
            if not view.users:
                self.graph.erase_node(view)


IN_PLACE_ADDS = (operator.iadd, torch.ops.aten.add_.Tensor, "add_")


_MEANS = (torch.mean, torch.ops.aten.mean.dim, "mean")
_LINE: tuple[Any, ...] = (2, -1, (2,), (-1,), [2], [-1])
_POOLS = (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)


def is_liftable(module: nn.Module) -> bool:
    if hooked(module):
        return False
    if type(module) is SparseConv1d:
        return True
    if type(module) is not SparseConv3d:
        dense = computes_as(module, nn.Conv1d) or computes_as(module, nn.Conv3d)
        if not dense or isinstance(module, BlockSparseLayer) or not module._parameters.keys() <= {"weight", "bias"}:
            return False
        if module._parameters.get("weight") is None or isinstance(module, nn.Conv1d):
            return module._parameters.get("weight") is not None
    conv: Any = module
    if conv.kernel_size != (1, 1, 1) or conv.stride != (1, 1, 1):
        return False
    return conv.padding in ("valid", "same") or not any(conv.padding)


def as_conv2d(conv: Any) -> nn.Module:
    """The same layer for images, over the same tensors."""
    line = conv.weight_shape if isinstance(conv, BlockSparseLayer) else conv.weight.shape
    sides: dict[str, Any] = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    if len(line) == 3:
        sides = {name: (int(name != "padding"), *_plain(getattr(conv, name))) for name in sides}
        sides["stride"], sides["dilation"] = (1, *conv.stride), (1, *conv.dilation)
        if isinstance(conv.padding, str):
            sides["padding"] = conv.padding
    dense = nn.Conv2d(
        conv.in_channels, conv.out_channels, **sides, groups=conv.groups, bias=conv.bias is not None,
        padding_mode=conv.padding_mode, device="meta",
    )  # fmt: skip
    if isinstance(conv, BlockSparseLayer):
        return SparseConv2d.over(conv.blocks, conv.bias, dense)
    dense.weight = nn.Parameter(conv.weight.detach().reshape(*line[:2], *dense.kernel_size), requires_grad=False)
    dense.bias = conv.bias
    return dense.eval()


def _plain(side: Any) -> tuple[int, ...]:
    return () if isinstance(side, str) else tuple(side)


def _pool2d(pool: Any) -> nn.Module | None:
    if type(pool) is nn.AdaptiveAvgPool1d:
        return nn.AdaptiveAvgPool2d(1) if pool.output_size in (1, (1,)) else None
    window = [_one(getattr(pool, name)) for name in ("kernel_size", "stride", "padding")]
    kernel, stride, padding = ((row, size) for row, size in zip((1, 1, 0), window, strict=True))
    if type(pool) is nn.AvgPool1d:
        return nn.AvgPool2d(kernel, stride, padding, pool.ceil_mode, pool.count_include_pad)
    return nn.MaxPool2d(kernel, stride, padding, (1, _one(pool.dilation)), pool.return_indices, pool.ceil_mode)


def _one(size: Any) -> int:
    return size[0] if isinstance(size, tuple) else size


def _norm2d(norm: Any) -> nn.Module:
    images = NORMS[4](norm.num_features, norm.eps, affine=norm.weight is not None, device="meta")
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(images, name, getattr(norm, name))
    images.num_batches_tracked = norm.num_batches_tracked
    return images.eval()


__all__ = ["as_conv2d", "is_liftable", "lift"]
