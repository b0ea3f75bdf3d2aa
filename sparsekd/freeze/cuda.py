"""`freeze` on a GPU: folded and fused as on the CPU, each layer the fastest of some ways, all in a CUDA graph.

What is left for a call: copy the inputs into the graph's own, replay, copy the outputs out. A graph knows one size of
its inputs; each size gets its own at its first call, and the graphs of the sizes that came last are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cuda as backend
from ..backends.cuda.device import cudnn_searches, on
from ..timing import medians
from .call import Call as Arguments
from .cuda_layer import gpu_layer
from .export import refuse_recording
from .layer import FrozenLayer
from .measure import fold, geometry_of
from .network import FrozenModel, assemble, check_outputs
from .outputs import map_tensors, tensors
from .plan import Plan
from .sites import clone
from .source import find_source, outputs_of
from .trace import Trace

Call = Callable[..., Any]
MOST_GRAPHS = 32  # each holds memory of its own for all that the network computes
TF32_TOLERANCE = 1e-2  # 10 bits of mantissa, as float16, in every layer


class FrozenCudaModel(FrozenModel):
    """What `freeze` returns for a model on a GPU. Not for several threads at once: a graph has one set of inputs."""

    def __init__(
        self, network: nn.Module, plan: Plan, record: dict[str, Any], trace: Trace | None, device: torch.device
    ) -> None:
        super().__init__(network, plan, record, trace)
        self._device, self._graphs = device, dict[tuple, Call]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.call.flatten(args, kwargs)
        refuse_recording(inputs)
        self._check(inputs)
        sizes = tuple(x.shape for x in inputs)
        with torch.no_grad(), on(self._device):
            graph = self._graphs.pop(sizes, None)
            if graph is None:
                self._make_room()
                graph = capture(self.result, inputs)
            self._graphs[sizes] = graph  # the last one is that of the last call
            return graph(*inputs)

    def _make_room(self) -> None:
        if len(self._graphs) < MOST_GRAPHS:
            return
        if self._device.type == "cuda":  # a graph may still run
            torch.cuda.synchronize(self._device)
        while len(self._graphs) >= MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]

    def _on_device(self, x: Tensor) -> bool:
        return x.device == self._device

    def save(self, path: Any) -> None:
        raise RuntimeError(
            "sparsekd.FrozenModel.save: choices and graphs of a GPU are not kept in files; save the model "
            "(sparsekd.checkpoint) and freeze it again, the plan file has the timings"
        )


def freeze_on_gpu(
    model: nn.Module, call: Arguments, inputs: tuple[Tensor, ...], tolerance: float | None
) -> FrozenModel:
    """The part of `freeze` for a model on a GPU, which `prepare` returned."""
    device = inputs[0].device
    with torch.no_grad(), on(device), cudnn_searches():
        run = call.calls(model)
        expected = outputs_of(run, inputs)
        tolerance = tolerance_of(expected) if tolerance is None else tolerance
        source = find_source(model, call, inputs, expected, tolerance, pools=False)
        layers: dict[str, FrozenLayer] = {}
        plans = []
        for site in source.sites:
            module = source.network.get_submodule(site.target)
            norm = None if site.norm is None else source.network.get_submodule(site.norm)
            layers[site.name], plan = gpu_layer(site.name, geometry_of(site, module), *fold(site, module, norm))
            plans.append(plan)
        backend.save_plan(device)
        network = assemble(source.network, source.sites, layers)
        threads, notes = torch.get_num_threads(), source.notes("")
        plan_of_all = Plan(tuple(plans), "channels_last", threads, None, {}, notes, _name(device))
        frozen = FrozenCudaModel(network, plan_of_all, source.record, source.trace, device)
        check_outputs(frozen, source.traced, source.expected, inputs, tolerance)
        plan_of_all.network_us.update(_times({"unfrozen": run, "frozen": call.calls(frozen)}, inputs))
    return frozen


def tolerance_of(expected: Any) -> float | None:
    """What outputs may differ by where the user says nothing: None, or TF32's where torch lets products take it."""
    single = any(y.dtype == torch.float32 for y in tensors(expected))
    tf32 = torch.cuda.is_available() and (backend.allows_tf32(conv=True) or backend.allows_tf32(conv=False))
    return TF32_TOLERANCE if single and tf32 else None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, interpreted"


def _times(calls: Mapping[str, Call], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    given = clone(inputs)
    bound = {name: partial(call, *given) for name, call in calls.items()}
    taken = medians(bound, 0.1 * len(bound), device=inputs[0].device)
    return {name: 1e6 * seconds for name, seconds in taken.items()}


def capture(run: Call, inputs: tuple[Tensor, ...]) -> Call:
    """``run`` at these sizes as a CUDA graph of the current device: a function of fresh inputs that returns fresh
    outputs.

    Raises RuntimeError where it cannot be captured, for instance because an operation waits for the host.
    """
    own = tuple(x.detach().clone(memory_format=_layout(x)) for x in inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), cudnn_searches():
        for _ in range(3):  # libraries choose and allocate at first
            run(*own)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph), cudnn_searches():
            outputs = run(*own)
    except RuntimeError as error:
        raise RuntimeError(
            f"sparsekd.freeze: the network cannot be captured in a CUDA graph ({str(error).splitlines()[0]}); what it "
            "computes must not depend on values the host has to see"
        ) from error
    # A graph that holds nothing would leave here what has just been computed, and seem to be right.
    map_tensors(lambda y: y.fill_(float("nan")) if y.is_floating_point() else y.zero_(), outputs)

    def replay(*given: Tensor) -> Any:
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return map_tensors(Tensor.clone, outputs)

    return replay


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format
