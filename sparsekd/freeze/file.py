"""What a file of a frozen network holds: tensors and JSON, no code and no pickle.

The structure comes from a model that the reader builds, as with a state dict, and the file says which of its nodes to
fuse. So no file can make `load_frozen` run anything. Nor can it make it answer wrongly: whatever it says is compared
with what that model gives, and last of all the answer to a sample of the example that was saved along (load.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..blocks import BlockPattern, BlockSparse
from ..checkpoint import fingerprint, load_state, save_state
from .call import Call
from .checked import check_plain, value_of
from .layer import FrozenLayer
from .outputs import tensors
from .plan import LayerPlan, Plan
from .sites import Site
from .trace import METHODS, Trace

_KIND = "sparsekd-frozen"
# What a file says about the model, and what it holds besides.
_RECORD = ("kind", "model", "call", "inputs", "free", "traced", "nodes", "sites", "probe", "in_bf16", "eager")
_REST = ("plan", "layers", "kept", "rest", "answer")
_SAMPLE = 1024  # numbers that are kept of an answer


def save(
    path: str | os.PathLike[str],
    record: Mapping[str, Any],
    plan: Plan,
    network: nn.Module,
    kept: Mapping[str, BlockSparse],
    answer: Any,
) -> None:
    """A block-sparse layer is stored as its blocks, whatever was chosen for this machine. kept: those of a network that
    runs dense. answer: what it says to ``record["probe"]``."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, FrozenLayer)}
    inside = tuple(f"{name}." for name in layers)
    state = network.state_dict()
    rest = {name: x for name, x in state.items() if not name.startswith(inside)}
    rest = {name: x for name, x in rest.items() if name.removesuffix(".weight") not in kept}
    more = {
        "plan": plan.to_dict(),
        "layers": {name: layer.tensors() for name, layer in layers.items()},
        "kept": {name: kept_tensors(blocks) for name, blocks in kept.items()},
        "rest": rest,
        "answer": answer_of(answer),
    }
    save_state({**{name: record[name] for name in _RECORD}, **more}, path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record and what `save` added to it. Raises FileNotFoundError, and ValueError for any other file."""
    state = load_state(path)
    if not isinstance(state, dict) or state.get("kind") != _KIND:
        raise ValueError(f"sparsekd.load_frozen: {path} holds no frozen network; FrozenModel.save writes one")
    return state


def record_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The record in what `read` returned."""
    return {name: state[name] for name in _RECORD}


def describe(
    model: nn.Module,
    call: Call,
    traced: Trace | None,
    sites: Sequence[Site],
    inputs: tuple[Tensor, ...],
    free: list[list[int]],
    probe: tuple[Tensor, ...],
) -> dict[str, Any]:
    """What a file needs to find the sites again in a freshly built model, and to refuse another one.

    probe: tensors of a call whose answer is kept too.
    """
    return {
        "kind": _KIND,
        "model": fingerprint(model),
        "call": call.to_dict(),
        "inputs": describe_inputs(inputs),
        "free": free,
        "traced": "" if traced is None else traced.by,
        "nodes": nodes_of(None if traced is None else traced.network),
        "sites": [asdict(site) for site in sites],
        "probe": list(probe),
        "in_bf16": False,
        "eager": False,
    }


def describe_inputs(inputs: tuple[Tensor, ...]) -> list[list[Any]]:
    """Shape, dtype and memory format of each."""
    return [[list(x.shape), str(x.dtype), _layout(x)] for x in inputs]


def _layout(x: Tensor) -> str:
    if x.is_contiguous():
        return "contiguous"
    return "channels_last" if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else "strided"


def nodes_of(network: fx.GraphModule | None) -> dict[str, str]:
    """Name -> what it does, and with what, for every node of a trace."""
    if network is None:
        return {}
    return {node.name: f"{node.op} {_target(node)}" for node in network.graph.nodes}


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


@dataclass(frozen=True)
class Record:
    """The record of a file, with every type checked."""

    call: Call
    shapes: list[tuple[tuple[int, ...], torch.dtype, str]]
    free: list[tuple[int, ...]]
    traced: str
    in_bf16: bool
    eager: bool
    probe: tuple[Tensor, ...]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Record:
        if tuple(state) != (*_RECORD, *_REST):
            raise ValueError(f"it has the entries {list(state)}")
        for name in (*_RECORD, "plan"):
            if name != "probe":
                check_plain(state[name], name)
        call = Call.from_dict(state["call"])
        given = value_of(tuple[tuple[tuple[int, ...], str, str], ...], state["inputs"], "inputs")
        names = {str(one): one for one in _DTYPES}
        if len(given) != call.count or any(d not in names or w not in _LAYOUTS for _, d, w in given):
            raise ValueError(f"its inputs are {state['inputs']}")
        shapes = [(shape, names[dtype], layout) for shape, dtype, layout in given]
        free = value_of(tuple[tuple[int, ...], ...], state["free"], "free")
        sides = [set(range(1, len(shape))) for shape, _, _ in shapes]
        if len(free) != len(shapes) or any(not set(dims) <= own for dims, own in zip(free, sides, strict=True)):
            raise ValueError(f"its free dimensions are {state['free']}")
        in_bf16, eager = (value_of(bool, state[name], name) for name in ("in_bf16", "eager"))
        if state["traced"] not in ("", *METHODS) or (eager and (state["traced"] or state["sites"] or in_bf16)):
            raise ValueError(f"it was traced by {state['traced']!r}")
        if bool(state["traced"]) is not bool(state["nodes"]):
            raise ValueError("its nodes do not fit how it was traced")
        return cls(call, shapes, list(free), state["traced"], in_bf16, eager, _probe(state["probe"], shapes))

    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors of the example's shapes: its sample repeated."""
        return tuple(_expanded(x, *one) for x, one in zip(self.probe, self.shapes, strict=True))


_LAYOUTS = ("contiguous", "channels_last", "strided")
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)


def _probe(given: Any, shapes: list[tuple[tuple[int, ...], torch.dtype, str]]) -> tuple[Tensor, ...]:
    if not isinstance(given, list) or len(given) != len(shapes) or not all(isinstance(x, Tensor) for x in given):
        raise ValueError("its sample does not fit its inputs")
    for x, (shape, dtype, _) in zip(given, shapes, strict=True):
        fits = x.dtype == dtype and x.dim() == len(shape) and tuple(x.shape[1:]) == shape[1:]
        if not fits or (x.dim() and not (x.shape[0] == shape[0] or (x.shape[0] == 1 and 0 < shape[0] < 2**20))):
            raise ValueError("its sample does not fit its inputs")
    return tuple(given)


def _expanded(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    if x.dim() and x.shape[0] != shape[0]:
        x = x.expand(shape)
    if layout == "channels_last" and x.dim() == 4:
        return x.clone(memory_format=torch.channels_last)
    x = x.clone(memory_format=torch.contiguous_format)
    if layout == "strided" and x.dim():
        return torch.stack([x, x], -1)[..., 0]
    return x


def answer_of(result: Any) -> list[Tensor]:
    """Of each tensor in a result its shape, and some numbers in float64."""
    kept = []
    for y in tensors(result):
        flat = (torch.view_as_real(y) if y.is_complex() else y).reshape(-1)
        step = flat.numel() // _SAMPLE + 1
        kept += [torch.tensor(y.shape, dtype=torch.int64), flat[::step].double()]
    return kept


def check_answer(wanted: Any, result: Any, tolerance: float) -> None:
    """Raise ValueError unless a network gave this answer, up to ``tolerance`` of the largest number."""
    got = answer_of(result)
    right = isinstance(wanted, list) and len(got) == len(wanted)
    floats = [y.is_floating_point() or y.is_complex() for y in tensors(result)]
    for i, y in enumerate(got if right else []):
        want = wanted[i]
        right = right and isinstance(want, Tensor) and want.dtype == y.dtype and want.shape == y.shape
        if right and i % 2 == 0:
            right = torch.equal(want, y)
        elif right and floats[i // 2] and y.numel():
            finite = want.isfinite()
            right = torch.equal(finite, y.isfinite())
            scale = want[finite].abs().max().item() if bool(finite.any()) else 0.0
            right = right and bool(((want - y)[finite].abs() <= tolerance * max(scale, 1e-30)).all())
    if not right:
        raise ValueError("the network that it describes does not give the answer that was saved with it")


def check_same(what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            in_file, in_model = theirs.get(name, "missing"), ours.get(name, "missing")
            raise ValueError(
                f"belongs to another model: {what} {name} is {in_file} in the file and {in_model} in the model; build "
                "the model that was frozen"
            )


def kept_tensors(blocks: BlockSparse) -> dict[str, Any]:
    pattern = [blocks.pattern.bh, blocks.pattern.bw]
    return {"pattern": pattern, "values": blocks.values, "row_ptr": blocks.row_ptr, "col_idx": blocks.col_idx}


def weight_and_bias(place: LayerPlan, held: Mapping[str, Any]) -> tuple[Tensor | BlockSparse, Tensor | None]:
    """The tensors of one layer, checked: the kernels trust what they are given."""
    geometry = place.geometry
    names = {"bias", "weight"} if place.pattern is None else {"bias", "values", "row_ptr", "col_idx"}
    optional = {"bytes"} if place.pattern is not None else set()
    whole = isinstance(held, dict) and names <= held.keys() <= names | optional
    if not whole or not all(
        isinstance(held[name], Tensor) or (name == "bias" and held[name] is None) for name in names
    ):
        raise ValueError(f"is damaged: the tensors of {place.name} do not fit {geometry}")
    bias = held["bias"]
    weight: Tensor | BlockSparse
    if place.pattern is None:
        weight = values = held["weight"]
    else:
        values, index = held["values"], (held["row_ptr"], held["col_idx"])
        weight = BlockSparse(values, *index, geometry.weight, BlockPattern.parse(place.pattern))
        try:
            weight.validate()
        except (TypeError, ValueError) as error:
            raise ValueError(f"is damaged: the blocks of {place.name} do not fit {geometry} ({error})") from error
    fits = weight.shape == ((0,) if geometry.bare else geometry.weight)
    axis = -1 if geometry.kind in ("linear", "layer_norm") else 1
    whole = fits and geometry.input[axis] == geometry.in_channels
    if not whole or (bias is not None and (bias.shape, bias.dtype) != ((geometry.out_channels,), values.dtype)):
        raise ValueError(f"is damaged: the tensors of {place.name} do not fit {geometry}")
    return weight, bias
