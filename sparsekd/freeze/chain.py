"""Neighbouring layers of ours as one call: no Python between them, one buffer for what they hand on (csrc/network.h).

Of a larger batch, `images` at a time go through the whole chain while they are in cache, each thread with images of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..backends import cpu
from .layer import FORMATS, FrozenLayer, Samples, Step


@dataclass(frozen=True)
class Link:
    """One call of a layer in a chain: nodes that compute what it reads, and its own."""

    layer: FrozenLayer
    step: Step
    reads: tuple[fx.Node, ...]
    reuse: bool  # the result may take the residual's memory
    y: fx.Node

    @property
    def operands(self) -> list[tuple[fx.Node, Samples]]:
        """What is read, and as what."""
        return list(zip(self.reads, self.step.reads, strict=False))

    @property
    def x(self) -> fx.Node:
        return self.reads[0]

    @property
    def residual(self) -> fx.Node | None:
        return self.reads[-1] if self.layer.geometry.residual else None


def find_chains(graph: fx.Graph, layers: Mapping[str, FrozenLayer]) -> list[list[Link]]:
    """Layers with a step, in the order of the graph; one is in the chain of the layer before it if nothing stands
    between them and all agree on what every tensor is."""
    chains: list[list[Link]] = []
    known: dict[fx.Node, Samples] | None = None
    for node in graph.nodes:
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or layer.step is None:
            known = None
            continue
        link = Link(layer, layer.step, node.args, bool(node.kwargs.get("reuse")), node)  # type: ignore[arg-type]
        if known is None or any(known.get(operand, want) != want for operand, want in link.operands):
            chains.append([])
            known = {}
        chains[-1].append(link)
        known |= {**dict(link.operands), node: layer.step.y}
    return chains


class Chain:
    """The function of a chain: from the tensors that come from outside to those that are read outside.

    inputs, outputs: their nodes, in the order of the arguments and results of `run`; a single result is no tuple.
    `run` may be called from several threads at once.
    """

    def __init__(self, links: Sequence[Link], images: int) -> None:
        self.links, self.images = links, images
        inside = {link.y for link in links}
        self.samples = {node: want for link in links for node, want in (*link.operands, (link.y, link.step.y))}
        self.inputs = [node for node in self.samples if node not in inside]
        self.outputs = [link.y for link in links if not inside.issuperset(link.y.users)]
        self.run = self._closure()

    def _closure(self) -> Callable[..., Any]:
        wanted = [(self.samples[node], self._other_format(node)) for node in self.inputs]
        made = [self.samples[node] for node in self.outputs]
        networks: dict[tuple[bool, ...], Any] = {}  # by which inputs come in the other format
        build, one_by_one, images, threads = self._build, self._one_by_one, self.images, self.links[0].layer.threads
        torch_threads, single = torch.get_num_threads, len(self.outputs) == 1

        def run(*inputs: Tensor) -> Any:
            n, given, others = inputs[0].shape[0], [], []
            for x, (want, other) in zip(inputs, wanted, strict=True):
                if x.shape != (n, *want.shape) or x.dtype is not want.dtype or not x.is_cpu:
                    return one_by_one(*inputs)  # which broadcasts, or says what is wrong
                foreign = False
                if not x.is_contiguous(memory_format=want.layout):
                    foreign = other is not None and x.is_contiguous(memory_format=other)
                    x = x if foreign else x.contiguous(memory_format=want.layout)
                given.append(x)
                others.append(foreign)
            key = tuple(others)
            network = networks.get(key) or networks.setdefault(key, build(key))
            outputs = [samples.empty(n) for samples in made]
            network.run([x.data_ptr() for x in (*given, *outputs)], n, images, threads or torch_threads())
            return outputs[0] if single else tuple(outputs)

        return run

    def _other_format(self, node: fx.Node) -> torch.memory_format | None:
        """The second memory format in which an input may come, if all that read it take both."""
        readers = [link for link in self.links if node in link.reads]
        if not all(link.step.any_format and node not in link.reads[1:] for link in readers):
            return None
        return next(layout for layout in FORMATS.values() if layout is not self.samples[node].layout)

    def _build(self, others: Sequence[bool]) -> Any:
        """The compiled network for inputs of which some come in their other format."""
        foreign = {node for node, other in zip(self.inputs, others, strict=True) if other}
        places, buffer_bytes = self.places()
        outside = {node: (i, 0, self.samples[node].bytes) for i, node in enumerate([*self.inputs, *self.outputs])}
        values = {**outside, **{node: (-1, offset, 0) for node, offset in places.items()}}
        number = {node: i for i, node in enumerate(values)}
        network = cpu.native.Network(list(values.values()), buffer_bytes)
        for link in self.links:
            last = (link.step.reads[0].layout is torch.channels_last) is not (link.x in foreign)
            link.step.add(network, [number[node] for node in link.reads], last, number[link.y])
        network.finish()
        return network

    def places(self) -> tuple[dict[fx.Node, int], int]:
        """Offsets in the buffer of what only the chain itself reads, and the size of the buffer, for one image."""
        last_read = {node: i for i, link in enumerate(self.links) for node, _ in link.operands}
        places: dict[fx.Node, int] = {}
        live: dict[fx.Node, tuple[int, int]] = {}
        size = 0
        for i, link in enumerate(self.links):
            if link.y not in self.outputs:
                if link.reuse and link.residual in live:
                    place = live.pop(link.residual)
                else:
                    place = _gap(live.values(), _round_up(self.samples[link.y].bytes))
                places[link.y], live[link.y] = place[0], place
                size = max(size, place[1])
            live = {node: place for node, place in live.items() if last_read.get(node, i) > i}
        return places, size

    def _one_by_one(self, *inputs: Tensor) -> Any:
        values = dict(zip(self.inputs, inputs, strict=True))
        for link in self.links:
            values[link.y] = link.layer.run(*(values[node] for node, _ in link.operands), reuse=link.reuse)
        outputs = [values[node] for node in self.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _gap(taken: Iterable[tuple[int, int]], size: int) -> tuple[int, int]:
    """(begin, end) of the first room of this size between those taken."""
    begin = 0
    for other_begin, other_end in sorted(taken):
        if other_begin - begin >= size:
            break
        begin = max(begin, other_end)
    return begin, begin + size


def _round_up(size: int) -> int:
    return (size + 63) // 64 * 64


def alone(layer: FrozenLayer, operands: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call of one layer as a chain makes it, to measure it."""
    assert layer.step is not None
    x = operands[0]
    y = layer.step.y.empty(x.shape[0])
    tensors = [*operands, y]
    network = cpu.native.Network([(i, 0, 0) for i in range(len(tensors))], 0)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layer.step.add(network, range(len(operands)), last, len(operands))

    def call() -> Tensor:
        network.run([tensor.data_ptr() for tensor in tensors], x.shape[0], 0, layer.threads or torch.get_num_threads())
        return y

    return call
