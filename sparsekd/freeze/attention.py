"""Self-attention as torch.export spells out nn.MultiheadAttention: some twenty views and copies become one call.

What is left are the input projection, the call and the output projection, so that the projections fuse and chain with
what stands around an attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .kinds import LAYERS
from .simplify import drop_unread, module_of

aten = torch.ops.aten


def self_attention(projected: Tensor, heads: int, mask: Tensor | None, causal: bool, time_first: bool) -> Tensor:
    """Attention of every sample to itself: ``[B, T, 3 E] -> [B, T, E]``, or ``[T, B, ...]`` with ``time_first``.

    projected: queries, keys and values side by side. mask: as `F.scaled_dot_product_attention` takes it.
    """
    width = projected.shape[-1] // 3
    apart = projected.unflatten(-1, (3, heads, width // heads))
    queries, keys, values = apart.permute((2, 1, 3, 0, 4) if time_first else (2, 0, 3, 1, 4)).unbind(0)
    mixed = F.scaled_dot_product_attention(queries, keys, values, mask, 0.0, causal)
    return mixed.permute((2, 0, 1, 3) if time_first else (0, 2, 1, 3)).flatten(2)


def join_attention(network: fx.GraphModule) -> None:
    """Changes the trace in place; its results stay what they are, but for rounding."""
    for node in list(network.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _join(network, node)
    drop_unread(network.graph)
    network.graph.lint()
    network.recompile()


def _join(network: fx.GraphModule, attention: fx.Node) -> None:
    given: list[Any] = [*attention.args, *(None, 0.0, False)[len(attention.args) - 3 :]]
    queries, keys, values, mask, dropout, causal = given
    found = [_third(one, i) for i, one in enumerate((queries, keys, values))]
    after = _behind(network, attention)
    if attention.kwargs or dropout or None in found or len(set(found)) != 1 or after is None:
        return
    (projection, heads), (output, last) = found[0], after  # type: ignore[misc]
    linear: Any = module_of(network, projection)
    if not isinstance(linear, LAYERS) or len(projection.users) != 1 or len(projection.args) != 1:
        return
    x, time_first = projection.args[0], True
    (user,) = last.users if len(last.users) == 1 else (None,)
    if _swaps(x) and user is not None and _swaps(user):
        x, time_first, last = x.args[0], False, user  # type: ignore[union-attr]
    graph = network.graph
    with graph.inserting_before(attention):
        projected = graph.create_node("call_module", projection.target, (x,), name=projection.name)
        mixed = graph.call_function(self_attention, (projected, heads, mask, causal, time_first))
        result = graph.create_node("call_module", output.target, (mixed,), name=output.name)
    last.replace_all_uses_with(result)
    _erase_unread(graph, last)


def _third(node: Any, which: int) -> tuple[fx.Node, int] | None:
    """(the projection, the number of heads) of queries, keys or values [B, heads, T, D] that are a third of it."""
    sizes: Any = node.args[1] if _is(node, aten.reshape.default) else ()
    if len(sizes) != 4 or not isinstance(sizes[1], int) or not isinstance(sizes[3], int):
        return None
    node = _through(node, aten.reshape.default)
    node = _through(node, aten.transpose.int, 0, 1)
    node = _through(node, aten.reshape.default)
    node = _through(node, aten.select.int, 0, which)
    node = _through(node, aten.contiguous.default)
    node = _through(node, aten.squeeze.dim, -2)
    node = _through(node, aten.transpose.int, 0, -2)
    node = _through(node, aten.unsqueeze.default, 0)
    node = _through(node, aten.unflatten.int, -1, [3, sizes[1] * sizes[3]])
    return None if node is None else (node, sizes[1])


def _behind(network: fx.GraphModule, attention: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the output projection, the last of what brings its result into shape)."""
    nodes: list[Any] = [attention]
    for _ in range(4):
        if len(nodes[-1].users) != 1:
            return None
        nodes += nodes[-1].users
    _, permuted, flat, output, last = nodes
    right = _is(permuted, aten.permute.default) and list(permuted.args[1]) == [2, 0, 1, 3]
    right = right and _is(flat, aten.reshape.default) and len(flat.args[1]) == 2
    right = right and isinstance(module_of(network, output), LAYERS) and len(output.args) == 1
    right = right and _is(last, aten.reshape.default) and len(last.args[1]) == 3
    return (output, last) if right else None


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _through(node: Any, target: Any, *arguments: Any) -> fx.Node | None:
    """The input of a node that does this."""
    if not _is(node, target) or node.kwargs:
        return None
    given = [list(one) if isinstance(one, (list, tuple)) else one for one in node.args[1:]]
    return node.args[0] if not arguments or given == list(arguments) else None


def _swaps(node: Any) -> bool:
    """Whether a node exchanges time and batch."""
    return _is(node, aten.transpose.int) and sorted(node.args[1:]) == [0, 1]


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """A node that nothing reads, and what only it read."""
    if node.users or node.op == "placeholder":
        return
    inputs = list(node.all_input_nodes)
    graph.erase_node(node)
    for one in inputs:
        if not one._erased:
            _erase_unread(graph, one)


__all__ = ["join_attention", "self_attention"]
