"""The frozen network: assembled from a model and its frozen layers, run as straight-line code, checked."""

from __future__ import annotations

import copy
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import file
from .chain import Chain, find_chains
from .layer import FrozenLayer
from .plan import Plan
from .sites import Recorder, Site, clone

BF16_TOLERANCE = 5e-2
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: BF16_TOLERANCE}


class FrozenModel(nn.Module):
    """What `freeze` returns: inference only, on the CPU. Several threads may call one at once.

    plan: what was measured and chosen. network: the frozen modules, an ``fx.GraphModule`` where the model was traced.
    record: what a file says about the model (file.py).
    Input shapes are those of the example except for the first dimension, the batch.
    """

    def __init__(self, network: nn.Module, plan: Plan, record: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.plan, self.record = network.requires_grad_(False), plan, record
        self._inputs = [(tuple(shape), _dtype(dtype)) for shape, dtype in record["inputs"]]
        self._run = runner(network, plan.images)
        super().train(False)

    def forward(self, *inputs: Tensor) -> Any:
        self._check(inputs)
        with torch.no_grad():
            if not self.record.get("in_bf16"):
                return self._run(*inputs)
            return cast(self._run(*cast(inputs, torch.float32, torch.bfloat16)), torch.bfloat16, torch.float32)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        if len(inputs) != len(self._inputs):
            raise TypeError(f"sparsekd.FrozenModel: expected {len(self._inputs)} input tensors, got {len(inputs)}")
        for x, (shape, dtype) in zip(inputs, self._inputs, strict=True):
            if not isinstance(x, Tensor) or x.dtype != dtype or not self._on_device(x):
                got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(
                    f"sparsekd.FrozenModel: expected a {dtype} tensor on the device it was frozen on, got {got}"
                )
            if x.shape[1:] != shape[1:] or x.dim() != len(shape):
                want = ", ".join(["N", *map(str, shape[1:])]) if shape else ""
                raise ValueError(
                    f"sparsekd.FrozenModel: expected an input of shape [{want}], got {tuple(x.shape)}; "
                    "freeze again with an example of this size"
                )

    def _on_device(self, x: Tensor) -> bool:
        return x.is_cpu

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file that `load_frozen` reads: tensors and JSON, complete or not at all."""
        file.save(path, self.record, self.plan, self.network)

    def train(self, mode: bool = True) -> FrozenModel:
        if mode:
            raise RuntimeError("sparsekd.FrozenModel: a frozen network cannot train; train its model, freeze again")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModel:
        probe = torch.empty(0)
        moved = fn(probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise RuntimeError(
                "sparsekd.FrozenModel: a frozen network stays on the device and in the dtype it was measured in; "
                "move or cast the model, then freeze again"
            )
        return self

    def load_state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("sparsekd.FrozenModel: packed weights do not change; use sparsekd.load_frozen")

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModel:
        return self  # nothing in it ever changes


def cast(values: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """The tensors of dtype ``source`` in a structure as ``target``."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(target) if x.dtype == source else x, values)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def runner(network: nn.Module, images: int = 0) -> Callable[..., Any]:
    """images: as in `Plan`."""
    return _straight_line(network, images) if isinstance(network, fx.GraphModule) else partial(network)


def _straight_line(network: fx.GraphModule, images: int) -> Callable[..., Any]:
    """The graph as one function whose layers, and chains of them, are plain attributes.

    GraphModule's own code walks module paths and nn.Module.__call__ for every layer, which costs microseconds.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    layers = {name: module for name, module in network.named_modules() if isinstance(module, FrozenLayer)}
    bound: dict[str, Any] = {}
    for links in reversed(find_chains(graph, layers)):  # a chain refers to nodes in front of it
        _replace(graph, Chain(links, images), f"chain_{len(bound)}", bound)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in bound:
            value = operator.attrgetter(node.target)(network)
            node.target = f"{node.name}_{len(bound)}"
            bound[node.target] = value.run if isinstance(value, FrozenLayer) else value
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)  # fx wrote it from the graph, as it does for every GraphModule
    return partial(scope["forward"], SimpleNamespace(**bound))


def _replace(graph: fx.Graph, chain: Chain, name: str, bound: dict[str, Any]) -> None:
    """Puts one call, `name`, in the place of the nodes of a chain."""
    bound[name] = chain.run
    inside = {link.y for link in chain.links}
    with graph.inserting_after(chain.links[-1].y):
        call = graph.call_module(name, tuple(chain.inputs))
    results = [call]
    if len(chain.outputs) > 1:
        with graph.inserting_after(call):
            results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(chain.outputs))]
    for node, result in zip(chain.outputs, results, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for link in reversed(chain.links):
        graph.erase_node(link.y)


def assemble(source: nn.Module, sites: Sequence[Site], layers: Mapping[str, FrozenLayer]) -> nn.Module:
    """The source with every site replaced by its frozen layer; the source is left alone."""
    if not isinstance(source, fx.GraphModule):
        network = copy.deepcopy(source)
        for site in sites:
            network.set_submodule(site.target, layers[site.name])
        return network
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(source.graph, copies))
    named = {old.name: new for old, new in copies.items()}
    for site in sites:
        chain = [named[name] for name in site.nodes]
        arguments = [chain[0].args[0]]
        if site.add is not None:
            add = named[site.add]
            arguments += [arg for arg in add.args if arg is not chain[chain.index(add) - 1]]
        with graph.inserting_after(chain[-1]):
            fused = graph.call_module(site.name, tuple(arguments))
        fused.meta["replaces"] = site.nodes[-1]
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            graph.erase_node(node)
    _reuse_residuals(graph, source, layers)
    used = [node.target for node in graph.nodes if node.op in ("call_module", "get_attr")]
    parts = {name: layers[name] if name in layers else operator.attrgetter(name)(source) for name in used}
    return fx.GraphModule(parts, graph)


_FRESH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)  # their result shares memory with nothing


def _reuse_residuals(graph: fx.Graph, source: nn.Module, layers: Mapping[str, FrozenLayer]) -> None:
    """Let a layer write over its residual where it is the last to read it, and nothing else shares that memory."""
    position = {node: i for i, node in enumerate(graph.nodes)}

    def is_fresh(node: fx.Node) -> bool:
        return node.op == "call_module" and (
            node.target in layers or type(source.get_submodule(str(node.target))) in _FRESH
        )

    for node in graph.nodes:
        if node.target not in layers or len(node.args) < 2:
            continue
        x, residual = node.args
        if x is residual or not is_fresh(residual) or not all(map(is_fresh, residual.users)):
            continue
        if max(residual.users, key=position.__getitem__) is node:
            node.kwargs = {"reuse": True}


def check_outputs(
    frozen: FrozenModel,
    traced: fx.GraphModule | None,
    expected: Any,
    inputs: tuple[Tensor, ...],
    tolerance: float | None,
) -> None:
    """Raise RuntimeError unless the frozen network gives what the model gave."""
    worst = deviation(frozen(*clone(inputs)), expected, tolerance)
    if worst <= 1.0:
        return
    where = _first_deviation(frozen, traced, inputs, tolerance)
    raise RuntimeError(
        f"sparsekd.freeze: the frozen outputs differ from the model's by {worst:.3g} times the tolerance"
        f"{f', first in {where}' if where else ''}; a model that is random in eval mode cannot be frozen, for another "
        "one raise tolerance or report this"
    )


def deviation(got: Any, want: Any, tolerance: float | None) -> float:
    """Largest difference of two outputs, as a multiple of what is allowed."""
    got, want = pytree.tree_leaves(got), pytree.tree_leaves(want)
    if len(got) != len(want):
        return math.inf
    return max((_difference(a, b) / _allowed(b, tolerance) for a, b in zip(got, want, strict=True)), default=0.0)


def check_no_nan(expected: Any) -> None:
    """Raise ValueError if the outputs of the model hold NaN: nothing could be checked against them."""
    for y in pytree.tree_leaves(expected):
        if isinstance(y, Tensor) and y.is_floating_point() and y.isnan().any():
            raise ValueError(
                "sparsekd.freeze: the model gives NaN for example_inputs; check its buffers and the inputs"
            )


def _difference(got: Any, want: Any) -> float:
    """Largest difference relative to the largest value; anything but floats has to be equal."""
    if not isinstance(want, Tensor):
        return 0.0 if got == want else math.inf
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else math.inf
    if want.numel() == 0 or torch.equal(got, want):
        return 0.0
    scale = max(want.abs().max().item(), torch.finfo(want.dtype).eps)
    difference = (got.double() - want.double()).abs().max().item() / scale
    return math.inf if math.isnan(difference) else difference


def _allowed(want: Any, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return _TOLERANCE.get(getattr(want, "dtype", torch.float32), _TOLERANCE[torch.float32])


def _first_deviation(
    frozen: FrozenModel, traced: fx.GraphModule | None, inputs: tuple[Tensor, ...], tolerance: float | None
) -> str:
    """The first frozen layer whose output is not that of the nodes it replaces, or "" if none is found."""
    if traced is None:
        return ""
    want: dict[str, Tensor] = {}
    first: list[str] = []

    def compare(node: fx.Node, x: Tensor) -> None:
        before = want.get(node.meta.get("replaces", ""))
        if before is not None and not first and _difference(x, before) > _allowed(before, tolerance):
            first.append(str(node.target))

    Recorder(traced, lambda node, x: want.update({node.name: x.clone()})).run(*clone(inputs))
    assert isinstance(frozen.network, fx.GraphModule)
    Recorder(frozen.network, compare).run(*clone(inputs))
    return first[0] if first else ""
