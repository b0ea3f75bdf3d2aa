"""What a trace holds and a frozen network does not need: checks, what does nothing, what is always the same.

Afterwards every layer and every batch norm that can be one is a call of a torch module, however the model spells it:
functions on its own weights, a subclass with an activation inside, a scale and a shift for each channel.
"""

from __future__ import annotations

import operator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .mutation import mutates
from .trace import TENSORS

aten = torch.ops.aten

_NOTHING = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)  # in eval mode
_ALIASES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)
_DROPOUTS = {
    F.dropout: 2,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
    aten.dropout.default: 2,
}  # place of `training`
_CHECKS = (
    *(torch._assert, aten._assert_scalar.default, aten._assert_tensor_metadata.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default, aten._assert_async.msg),
)
_SIZES = (
    *(getattr, len, operator.getitem, aten.sym_size.int, aten.sym_numel.default),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.not_, operator.truediv),
)
_SIZE_METHODS = ("size", "dim", "numel", "ndimension", "is_floating_point")
_RANDOM = ("rand", "dropout", "bernoulli", "normal", "multinomial", "empty", "poisson", "exponential", "seed")


def simplify(network: fx.GraphModule) -> None:
    """Changes the trace in place; its results stay what they are."""
    graph = network.graph
    for node in list(graph.nodes):
        if _does_nothing(network, node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target in _CHECKS and not node.users:
            graph.erase_node(node)
        elif _is_view_of_sizes(node) and not any(mutates(user, module_of(network, user)) for user in node.users):
            _reshape(node)  # the same where view works, and it works in channels_last too
    drop_unread(graph)
    _fold_constants(network)
    graph.lint()
    network.recompile()


def module_of(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _does_nothing(network: fx.GraphModule, node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        module: Any = network.get_submodule(str(node.target))
        hooked = module._forward_hooks or module._forward_pre_hooks
        return isinstance(module, _NOTHING) and not hooked and len(node.args) == 1
    if node.op != "call_function":
        return False
    if node.target in _DROPOUTS:
        place = _DROPOUTS[node.target]
        training = node.kwargs.get("training", node.args[place] if len(node.args) > place else True)
        return training is False and node.target is not None
    if getattr(node.target, "__name__", "") == "stochastic_depth" and isinstance(node.target, FunctionType):
        given = arguments_of(node, ("input", "p", "mode", "training"))  # of torchvision.ops, which need not be there
        return given.get("training", True) is False
    return node.target in _ALIASES


def _is_view_of_sizes(node: fx.Node) -> bool:
    reinterprets = any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))
    return (node.op == "call_method" and node.target == "view" and not reinterprets) or (
        node.op == "call_function" and node.target is aten.view.default
    )


def _reshape(node: fx.Node) -> None:
    node.target = "reshape" if node.op == "call_method" else aten.reshape.default


def drop_unread(graph: fx.Graph) -> None:
    """Sizes, comparisons of sizes and attributes that nothing reads."""
    for node in reversed(list(graph.nodes)):
        unread = not node.users and node.op in ("call_function", "call_method", "get_attr")
        if unread and (node.op == "get_attr" or node.target in _SIZES or node.target in _SIZE_METHODS):
            graph.erase_node(node)


# ---- Constants


def _fold_constants(network: fx.GraphModule) -> None:
    """Computes once what depends on the model's tensors alone; not if anything is written into."""
    graph = network.graph
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = _value(network, str(node.target))
        elif _depends_on(node, known):
            try:
                with torch.no_grad():
                    known[node] = _run(node, known)
            except Exception:  # it fails in the network as well, or a number is not one any more
                continue
    if any(_writes_into(network, node, known) for node in graph.nodes):
        return
    for node, value in known.items():
        new: Any
        used = [user for user in node.users if user not in known]
        if node.op == "get_attr" or not used or any(user.op == "output" for user in used):
            continue
        if isinstance(value, Tensor):
            if value.numel() > 1_000_000 and value.numel() > 2 * sum(x.numel() for x in _tensors(node, known)):
                continue
            with graph.inserting_before(node):
                new = graph.get_attr(store(network, node.name, value))
            new.meta.update(node.meta)
        elif isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size, type(None))):
            new = value if not isinstance(value, torch.Size) else tuple(value)
        else:
            continue
        for user in used:
            _replace_argument(user, node, new)
    for node in reversed(list(known)):
        if not node.users:
            graph.erase_node(node)


def _replace_argument(user: fx.Node, old: fx.Node, new: Any) -> None:
    """``new`` is another node, or a value."""
    swap = lambda one: new if one is old else one  # noqa: E731
    user.args, user.kwargs = fx.node.map_arg(user.args, swap), fx.node.map_arg(user.kwargs, swap)


def _depends_on(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if any(word in name for word in _RANDOM):
        return False
    return all(one in known for one in node.all_input_nodes)


def _run(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _writes_into(network: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    reads_known = any(one in known and isinstance(known[one], Tensor) for one in node.all_input_nodes)
    return reads_known and mutates(node, module_of(network, node))


def _tensors(node: fx.Node, known: dict[fx.Node, Any]) -> list[Tensor]:
    return [known[one] for one in node.all_input_nodes if isinstance(known[one], Tensor)]


def _value(network: fx.GraphModule, path: str) -> Any:
    return operator.attrgetter(path)(network)


def store(network: fx.GraphModule, name: str, value: Tensor) -> str:
    """The path of a new tensor of a trace."""
    owner: Any = getattr(network, TENSORS, None)
    if owner is None:
        owner = nn.Module()
        network.add_module(TENSORS, owner)
    while hasattr(owner, name):
        name += "_"
    owner.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
    return f"{TENSORS}.{name}"


def arguments_of(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call by the names they have in torch, without those left out."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


__all__ = ["arguments_of", "drop_unread", "module_of", "simplify", "store"]
