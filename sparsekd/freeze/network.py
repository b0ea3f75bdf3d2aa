"""The frozen network: assembled from a model and its frozen layers, run as straight-line code, checked."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..blocks import BlockSparse
from . import file
from .call import Call
from .chain import Chain, find_chains
from .export import plain_network, refuse_recording
from .layer import FrozenLayer
from .norms import simpler
from .outputs import allowed, deviation, difference, map_tensors
from .plan import Plan
from .simplify import drop_unread
from .sites import Recorder, Site, clone
from .trace import Trace

# Of a network that runs dense: the blocks that a file keeps of its layers.
Kept = Mapping[str, BlockSparse]


class FrozenModel(nn.Module):
    """What `freeze` returns: inference only, on the CPU. Several threads may call one at once.

    plan: what was measured and chosen. network: the frozen modules, an ``fx.GraphModule`` where the model was traced.
    record: what a file says about the model (file.py).
    It is called as the model was in the example, with any number of samples; other dimensions may differ where
    ``record["free"]`` says so.
    """

    def __init__(
        self, network: nn.Module, plan: Plan, record: dict[str, Any], trace: Trace | None, kept: Kept | None = None
    ) -> None:
        """trace: that the network was assembled from. kept: of a network that runs dense, its blocks for a file."""
        super().__init__()
        self.network, self.plan, self.record, self.kept = network, plan, record, kept or {}
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.call = Call.from_dict(record["call"])
        self._inputs = [
            (tuple(shape), _dtype(dtype), tuple(free))
            for (shape, dtype, _), free in zip(record["inputs"], record["free"], strict=True)
        ]
        self.trace = trace
        self._rebuild = None if trace is None else trace.rebuild
        self._guards = None if trace is None else trace.guards
        self._seen: set[tuple[Any, ...]] = set()
        self._run = runner(network, self.call, plan.images, trace is not None)
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            from ..ops._uncompiled import run  # not before: it imports torch._dynamo

            return run(self, args, kwargs)
        inputs = self.call.flatten(args, kwargs)
        refuse_recording(inputs)
        self._check(inputs)
        with torch.no_grad():
            if not self.record.get("in_bf16"):
                return self.result(*inputs)
            return cast(self.result(*cast(inputs, torch.float32, torch.bfloat16)), torch.bfloat16, torch.float32)

    def result(self, *inputs: Tensor) -> Any:
        """Of the tensors of a call; nothing is checked."""
        y = self._run(*inputs)
        return y if self._rebuild is None else self._rebuild(y)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        for x, (shape, dtype, free) in zip(inputs, self._inputs, strict=True):
            if not isinstance(x, Tensor) or x.dtype != dtype or not self._on_device(x):
                got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(
                    f"sparsekd.FrozenModel: expected a {dtype} tensor on the device it was frozen on, got {got}"
                )
            if x.shape[1:] != shape[1:] or x.dim() != len(shape):
                differ = [i for i in range(1, len(shape)) if x.dim() == len(shape) and x.shape[i] != shape[i]]
                if x.dim() != len(shape) or not set(differ) <= set(free):
                    names = ["N", *("*" if i in free else str(shape[i]) for i in range(1, len(shape)))]
                    raise ValueError(
                        f"sparsekd.FrozenModel: expected an input of shape [{', '.join(names) if shape else ''}], got "
                        f"{tuple(x.shape)}; freeze again with an example of this size"
                    )
        if self._guards is not None:
            self._check_guards(inputs)

    def _check_guards(self, inputs: tuple[Tensor, ...]) -> None:
        """torch.export knows what it took for granted; each set of sizes is asked about once."""
        sizes = tuple(x.shape for x in inputs)
        if sizes in self._seen:
            return
        assert self._guards is not None
        try:
            self._guards(*inputs)
        except (RuntimeError, AssertionError) as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(
                f"sparsekd.FrozenModel: inputs of shape {shapes} take another path through the model than the example "
                f"({str(error).splitlines()[0]}); freeze again with an example of this size"
            ) from error
        if len(self._seen) < 10_000:
            self._seen.add(sizes)

    def _on_device(self, x: Tensor) -> bool:
        return x.is_cpu

    def to_torch(self) -> nn.Module:
        """The same network, folded, in plain torch: every layer dense, for ``torch.export``, ONNX, OpenVINO or
        ``torch.jit.trace``. It takes the tensors of a call one after the other; int8 layers compute in float32."""
        return plain_network(self.network, self.call, self._rebuild, self.trace is not None).eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file that `load_frozen` reads: tensors and JSON, complete or not at all."""
        file.save(path, self.record, self.plan, self.network, self.kept, self.answer())

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write one file that `sparsekd.runtime.Session` runs without torch, and `sparsekd.load_frozen` without the
        model: graph, tensors and plan, complete or not at all (docs/deploy.md).

        All layers run by the kernels of ``sparsekd._C`` there, those of which torch's were faster here too.
        Raises ValueError that names a node no file can hold, RuntimeError where the file would answer otherwise.
        """
        from . import deploy

        graph, guards = self._graph()
        deploy.export(graph, self.plan, self.call, self._graph_inputs(), self, path, guards)

    def _graph(self) -> tuple[fx.GraphModule, Callable[..., Any] | None]:
        """What a file is written of, and its guards."""
        if self.plan.device != "cpu":
            raise ValueError("sparsekd.export: the run time is for CPUs; move the model there and freeze it again")
        if self.plan.eager:
            from .deploy.source import frozen_graph

            return frozen_graph(self.network, self.kept, self.call, self._graph_inputs(), assemble)
        if isinstance(self.network, fx.GraphModule):
            return self.network, self._guards
        raise ValueError(
            "sparsekd.export: this network could not be traced when it was frozen, and a file holds a graph; its plan "
            f"says why: {'; '.join(self.plan.notes)}"
        )

    def _graph_inputs(self) -> tuple[Tensor, ...]:
        """The sample of the example as the graph takes it."""
        probe = tuple(self.record["probe"])
        return cast(probe, torch.float32, torch.bfloat16) if self.record.get("in_bf16") else probe

    def result_of(self, inputs: tuple[Tensor, ...]) -> Any:
        """To the tensors of a call."""
        args, kwargs = self.call.build(clone(inputs))
        return self(*args, **kwargs)

    def answer(self) -> Any:
        """To the sample of the example that a file keeps."""
        return self.result_of(tuple(self.record["probe"]))

    def train(self, mode: bool = True) -> FrozenModel:
        if mode:
            raise RuntimeError("sparsekd.FrozenModel: a frozen network cannot train; train its model, freeze again")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModel:
        probe = torch.empty(0, device="cpu")
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "sparsekd.FrozenModel: a frozen network is no data for pickle, its code is compiled; write it with "
            "save(path) and read it with sparsekd.load_frozen(path, model), also to hand it to another process"
        )


def cast(values: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """The tensors of dtype ``source`` in a structure as ``target``."""
    return map_tensors(lambda x: x.to(target) if x.dtype == source else x, values)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def runner(network: nn.Module, call: Call, images: int = 0, traced: bool = True) -> Callable[..., Any]:
    """The network as a function of the tensors of a call. images: as in `Plan`."""
    return _straight_line(network, images) if traced else call.calls(partial(network))


def _straight_line(network: Any, images: int) -> Callable[..., Any]:
    """The graph as one function whose layers, and chains of them, are plain attributes.

    GraphModule's own code walks module paths and nn.Module.__call__ for every layer, which costs microseconds.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    layers = {name: module for name, module in network.named_modules() if isinstance(module, FrozenLayer)}
    bound: dict[str, Any] = {}
    chains = set[fx.Node]()
    for links in reversed(find_chains(graph, layers)):  # a chain refers to nodes in front of it
        chains.add(_replace(graph, Chain(links, images), f"chain_{len(bound)}", bound))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node not in chains:
            value = operator.attrgetter(node.target)(network)
            node.target = f"part_{len(bound)}"  # not the node's own name: another node's target may be spelt like it
            bound[node.target] = value.run if isinstance(value, FrozenLayer) else value
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)  # fx wrote it from the graph, as it does for every GraphModule
    return partial(scope["forward"], SimpleNamespace(**bound))


def _replace(graph: fx.Graph, chain: Chain, name: str, bound: dict[str, Any]) -> fx.Node:
    """Puts one call, `name`, in the place of the nodes of a chain, and returns it."""
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
    return call


def assemble(source: nn.Module, sites: Sequence[Site], layers: Mapping[str, FrozenLayer]) -> nn.Module:
    """The source with every site replaced by its frozen layer; the source is left alone."""
    if not isinstance(source, fx.GraphModule):
        return _with_layers(source, "", sites, layers) if sites else source
    whole = _whole_modules(source, [site for site in sites if not site.nodes], layers)
    sites = [site for site in sites if site.nodes]
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(source.graph, copies))
    named = {old.name: new for old, new in copies.items()}
    for site in sites:
        chain = [named[name] for name in site.nodes]
        arguments = [named[name] for name in site.between.operands] if site.between else [chain[0].args[0]]
        if site.add is not None:
            add = named[site.add]
            arguments += [arg for arg in add.args if arg is not chain[chain.index(add) - 1]]
        with graph.inserting_after(chain[-1]):
            fused = graph.call_module(site.name, tuple(arguments))
        fused.meta["replaces"] = site.nodes[-1]
        named[site.nodes[-1]] = fused
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            graph.erase_node(node)
    drop_unread(graph)
    _reuse_residuals(graph, source, layers)
    used = [node.target for node in graph.nodes if node.op in ("call_module", "get_attr")]
    frozen = {**whole, **layers}
    parts = {name: frozen[name] if name in frozen else _part(source, name) for name in used}
    return fx.GraphModule(parts, graph)


def _part(source: nn.Module, name: str) -> Any:
    """A module or tensor of the source."""
    part = operator.attrgetter(name)(source)
    return simpler(part) if isinstance(part, nn.Module) else part


def _whole_modules(
    source: fx.GraphModule, sites: Sequence[Site], layers: Mapping[str, FrozenLayer]
) -> dict[str, nn.Module]:
    """Of a trace the modules that it calls as a whole and that have sites inside, with the frozen layers in them."""
    inside: dict[str, list[Site]] = {}
    called = [str(node.target) for node in source.graph.nodes if node.op == "call_module"]
    for site in sites:
        inside.setdefault(next(path for path in called if site.target.startswith(f"{path}.")), []).append(site)
    return {path: _with_layers(source.get_submodule(path), f"{path}.", its, layers) for path, its in inside.items()}


def _with_layers(module: nn.Module, path: str, sites: Sequence[Site], layers: Mapping[str, FrozenLayer]) -> nn.Module:
    """A copy of a module at this path, which keeps its forward and its tensors, with frozen layers in it."""
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for site in sites:
        name = site.target.removeprefix(path)
        copied.set_submodule(name, layers[site.name].stand_in_for(module.get_submodule(name)))
    return copied


_FRESH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)  # their result shares memory with nothing


def _reuse_residuals(graph: fx.Graph, source: nn.Module, layers: Mapping[str, FrozenLayer]) -> None:
    """Let a layer write over its residual where it is the last to read it, and nothing else shares that memory."""
    position = {node: i for i, node in enumerate(graph.nodes)}

    def is_fresh(node: fx.Node) -> bool:
        return node.op == "call_module" and (
            node.target in layers or type(source.get_submodule(str(node.target))) in _FRESH
        )

    for node in graph.nodes:
        if node.op != "call_module" or node.target not in layers or not layers[node.target].geometry.residual:
            continue
        *others, residual = node.args
        if residual in others or not is_fresh(residual) or not all(map(is_fresh, residual.users)):
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
    got = frozen.result_of(inputs)
    worst = deviation(got, expected, tolerance)
    if worst <= 1.0:
        return
    if tolerance is None and traced is not None and worst <= _MOST_ROUNDING:
        exact = _in_float64(frozen, traced, inputs)
        if exact is not None and deviation(got, exact, None) <= _AS_NEAR * deviation(expected, exact, None):
            return
    where = _first_deviation(frozen, traced, inputs, tolerance)
    raise RuntimeError(
        f"sparsekd.freeze: the frozen outputs differ from the model's by {worst:.3g} times the tolerance"
        f"{f', first in {where}' if where else ''}; a model that is random in eval mode cannot be frozen, for another "
        "one raise tolerance or report this"
    )


# A network that enlarges what float32 rounds off has no nearer answer: as far as this from the model in float64, in
# multiples of what the model itself in float32 is, and from the model in multiples of the tolerance.
_AS_NEAR, _MOST_ROUNDING = 4.0, 30.0


def _in_float64(frozen: FrozenModel, traced: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Any:
    """What the model gives where it computes in float64, as float32; None where it cannot."""
    try:
        y = copy.deepcopy(traced).double()(*cast(clone(inputs), torch.float32, torch.float64))
        y = y if frozen._rebuild is None else frozen._rebuild(y)
    except Exception:  # an op that has no float64, or numbers that the trace has written down in another
        return None
    return cast(y, torch.float64, torch.float32)


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
        if before is not None and not first and difference(x, before) > allowed(before, tolerance):
            first.append(str(node.target))

    Recorder(traced, lambda node, x: want.update({node.name: x.clone()})).run(*clone(inputs))
    assert isinstance(frozen.network, fx.GraphModule)
    Recorder(frozen.network, compare).run(*clone(inputs))
    return first[0] if first else ""
