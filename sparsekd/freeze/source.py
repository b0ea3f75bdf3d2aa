"""A model made ready for freezing: a copy in eval mode, traced where torch.fx can, with the sites found in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..convert import SPARSE_TYPES
from .file import describe
from .network import check_no_nan, deviation
from .sites import LAYERS, Site, clone, find_eager_sites, find_sites, trace


@dataclass(frozen=True)
class Source:
    """What freezing starts from. traced: None where torch.fx cannot trace the model, ``note`` says why.

    expected: what the model computes of ``inputs``. record: what a file says about it (file.py).
    """

    model: nn.Module
    traced: fx.GraphModule | None
    note: str
    inputs: tuple[Tensor, ...]
    expected: Any
    sites: list[Site]
    record: dict[str, Any]

    @property
    def network(self) -> nn.Module:
        """The trace, or the model: what the sites name modules of."""
        return self.model if self.traced is None else self.traced

    def notes(self, missing: str) -> tuple[str, ...]:
        """What a reader of the plan has to know; missing: why there are no kernels, or ""."""
        notes = []
        if self.note:
            notes.append(f"{self.note}: layers were chosen one by one, nothing is fused or folded")
        sparse = [name for name, module in self.model.named_modules() if type(module) in SPARSE_TYPES]
        if not sparse:
            notes.append("no block-sparse layer: sparsekd.sparsify or a pruning method makes some")
        elif missing:
            notes.append(f"every layer stays dense: {missing}")
        found = {site.target for site in self.sites}
        left = [name for name, module in self.model.named_modules() if type(module) in LAYERS and name not in found]
        if left:
            why = "not called, called without a batch or with several shapes, or their weight is read elsewhere too"
            notes.append(f"left as they are ({why}): {', '.join(left)}")
        return tuple(notes)


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What a model that `prepare` returned computes; the inputs stay as they are."""
    expected = model(*clone(inputs))
    check_no_nan(expected)
    return expected


def find_source(
    model: nn.Module, inputs: tuple[Tensor, ...], expected: Any, tolerance: float | None, pools: bool
) -> Source:
    """Trace a model, ``expected`` by `outputs_of`. tolerance: of the trace's outputs; pools: find pooling, too."""
    traced, note = _trace_that_agrees(model, inputs, expected, tolerance)
    sites = find_eager_sites(model, inputs) if traced is None else find_sites(traced, inputs, pools=pools)
    return Source(model, traced, note, inputs, expected, sites, describe(model, traced, sites, inputs))


def prepare(model: nn.Module) -> nn.Module:
    """A copy in eval mode; a bare layer becomes a network of one."""
    model = copy.deepcopy(model).eval()
    return nn.Sequential(model) if type(model) in LAYERS else model


def _trace_that_agrees(
    model: nn.Module, inputs: tuple[Tensor, ...], expected: Any, tolerance: float | None
) -> tuple[fx.GraphModule | None, str]:
    """A trace that computes what the model does, or (None, why there is none).

    torch.fx records ``a += b`` as ``a = a + b``, which differs where ``a`` is a view, and only one path of Python code.
    """
    traced, note = trace(model, len(inputs))
    if traced is None:
        return None, note
    try:
        got = traced(*clone(inputs))
    except Exception as error:  # the model itself has just run
        return None, f"what torch.fx traces of the model fails ({type(error).__name__}: {error})".splitlines()[0]
    if deviation(got, expected, tolerance) > 1.0:
        return None, "what torch.fx traces of the model computes something else"
    return traced, ""
