"""`freeze` on a GPU: folded and fused as on the CPU, each layer by the planner's measured choice, all in a CUDA graph.

What is left for a call: copy the inputs into the graph's own, replay, copy the outputs out. A graph knows one batch
size; each size gets its own at its first call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..backends import cuda as backend
from ..blocks import BlockSparse
from ..timing import medians
from .layer import FrozenLayer, Run, _dense_linear, _dense_norm, _torch_conv2d
from .measure import density_of, fold, geometry_of, random_operands
from .network import FrozenModel, assemble, check_outputs
from .plan import Geometry, LayerPlan, Plan
from .sites import Site, clone

Call = Callable[..., Any]
TF32_TOLERANCE = 1e-2  # 10 bits of mantissa, as float16, in every layer


class CudaLayer(FrozenLayer):
    """``act(conv(x) + bias + residual)`` by the CUDA backend, or by torch where no kernel takes the weight."""

    def __init__(self, geometry: Geometry, weight: Tensor | BlockSparse, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.geometry, self.why_dense = geometry, why_dense(geometry, weight)
        self.sparse = not self.why_dense
        self.chosen = "sparse" if self.sparse else "dense"
        conv = geometry.kind == "conv2d"
        self.register_buffer("bias", bias)
        if isinstance(weight, BlockSparse) and self.sparse:
            for name in ("values", "row_ptr", "col_idx"):
                self.register_buffer(name, getattr(weight, name).contiguous())
            self.run = (_sparse_conv2d if conv else _sparse_linear)(geometry, weight, bias)
        else:
            dense = weight.to_dense() if isinstance(weight, BlockSparse) else weight
            dense = dense.contiguous(memory_format=torch.channels_last) if conv else dense.contiguous()
            self.register_buffer("weight", dense)
            torchs = {"conv2d": _torch_conv2d, "linear": _dense_linear, "norm": _dense_norm}
            self.run = torchs[geometry.kind](geometry, dense, bias)


def _sparse_conv2d(geometry: Geometry, weight: BlockSparse, bias: Tensor | None) -> Run:
    sizes = (weight.shape[0], weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    operands = (weight.values, weight.row_ptr, weight.col_idx, bias)
    pad, pad_mode, activation = geometry.pad, geometry.pad_mode, _activation(geometry)

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if pad is not None:
            x = nn.functional.pad(x, pad, pad_mode)
        return backend.conv2d(x, *operands, *sizes, residual=residual, activation=activation)  # type: ignore[arg-type]

    return run


def _sparse_linear(geometry: Geometry, weight: BlockSparse, bias: Tensor | None) -> Run:
    operands, activation = (weight.values, weight.row_ptr, weight.col_idx, bias), _activation(geometry)

    def run(x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        return backend.linear(x, *operands, weight.shape[0], residual=residual, activation=activation)

    return run


def _activation(geometry: Geometry) -> str | None:
    return None if geometry.activation == "none" else geometry.activation


def why_dense(geometry: Geometry, weight: Tensor | BlockSparse) -> str:
    """Why a layer cannot run sparse, or ""."""
    if not isinstance(weight, BlockSparse):
        return "not block-sparse"
    return backend.why_dense(weight, geometry.groups) or ""


class FrozenCudaModel(FrozenModel):
    """What `freeze` returns for a model on a GPU. Not for several threads at once: a graph has one set of inputs."""

    def __init__(self, network: nn.Module, plan: Plan, record: dict[str, Any], device: torch.device) -> None:
        super().__init__(network, plan, record)
        self._device, self._graphs = device, dict[tuple, Call]()

    def forward(self, *inputs: Tensor) -> Any:
        self._check(inputs)
        sizes = tuple(x.shape for x in inputs)
        if sizes not in self._graphs:
            self._graphs[sizes] = capture(self._run, inputs)
        with torch.no_grad():
            return self._graphs[sizes](*inputs)

    def _on_device(self, x: Tensor) -> bool:
        return x.device == self._device

    def save(self, path: Any) -> None:
        raise RuntimeError(
            "sparsekd.FrozenModel.save: choices and graphs of a GPU are not kept in files; save the model "
            "(sparsekd.checkpoint) and freeze it again, the plan file has the timings"
        )


def tolerance_of(expected: Any) -> float | None:
    """What outputs may differ by where the user says nothing: None, or TF32's where torch lets products take it."""
    single = any(isinstance(y, Tensor) and y.dtype == torch.float32 for y in pytree.tree_leaves(expected))
    tf32 = torch.cuda.is_available() and (backend.allows_tf32(conv=True) or backend.allows_tf32(conv=False))
    return TF32_TOLERANCE if single and tf32 else None


def freeze_on_gpu(
    model: nn.Module,
    source: nn.Module,
    sites: list[Site],
    inputs: tuple[Tensor, ...],
    expected: Any,
    record: dict[str, Any],
    notes: tuple[str, ...],
    tolerance: float | None,
) -> FrozenModel:
    """The part of `freeze` behind the trace, for a model on a GPU; ``source`` is the traced model or the model."""
    layers: dict[str, FrozenLayer] = {}
    plans = []
    for site in sites:
        module, norm = source.get_submodule(site.target), None if site.norm is None else source.get_submodule(site.norm)
        geometry, (weight, bias) = geometry_of(site, module), fold(site, module, norm)
        layer = layers[site.name] = CudaLayer(geometry, weight, bias)
        plans.append(_measured(site, layer, weight))
    device = inputs[0].device
    backend.save_plan(device)
    network = assemble(source, sites, layers)
    plan = Plan(tuple(plans), "channels_last", torch.get_num_threads(), None, {}, notes, _name(device))
    frozen = FrozenCudaModel(network, plan, record, device)
    check_outputs(frozen, source if source is not model else None, expected, inputs, tolerance)  # type: ignore[arg-type]
    plan.network_us.update(_times({"unfrozen": model, "frozen": frozen}, inputs))
    return frozen


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, interpreted"


def _measured(site: Site, layer: CudaLayer, weight: Tensor | BlockSparse) -> LayerPlan:
    """Time every candidate of a layer at the example's shape; the backend remembers the fastest."""
    pattern, density = (str(weight.pattern), density_of(weight)) if isinstance(weight, BlockSparse) else (None, 1.0)
    described = (site.name, layer.geometry, pattern, density)
    if not layer.sparse:
        return LayerPlan(*described, None, None, "dense", layer.why_dense)
    x, residual = random_operands(layer.geometry, weight, "channels_last", "channels_last")
    device = weight.values.device  # type: ignore[union-attr]
    found = backend.measure(layer.run, x.to(device), None if residual is None else residual.to(device))
    if found is None:
        return LayerPlan(*described, None, None, "sparse", "CUDA C++, without Triton nothing is timed")
    sparse = {name: us for name, us in found.candidates.items() if name != "dense"}
    fastest = min(sparse.values(), default=None)
    chosen = "dense" if found.choice.kernel == "dense" else "sparse"
    return LayerPlan(*described, found.dense_microseconds, fastest, chosen, f"{found.choice} was fastest")


def _times(calls: Mapping[str, Call], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    given = clone(inputs)
    with torch.no_grad():
        taken = medians({name: partial(call, *given) for name, call in calls.items()}, 0.1, device=inputs[0].device)
    return {name: 1e6 * seconds for name, seconds in taken.items()}


@torch.no_grad()
def capture(run: Call, inputs: tuple[Tensor, ...]) -> Call:
    """``run`` at these sizes as a CUDA graph: a function of fresh inputs that returns fresh outputs.

    Raises RuntimeError where it cannot be captured, for instance because an operation waits for the host.
    """
    own = tuple(x.detach().clone(memory_format=_layout(x)) for x in inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose and allocate at first
            run(*own)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = run(*own)
    except RuntimeError as error:
        raise RuntimeError(
            f"sparsekd.freeze: the network cannot be captured in a CUDA graph ({str(error).splitlines()[0]}); what it "
            "computes must not depend on values the host has to see"
        ) from error

    def replay(*given: Tensor) -> Any:
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, outputs)

    return replay


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format
