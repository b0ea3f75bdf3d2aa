"""The frozen graph of a network that runs its own forward, since that was faster inside torch: traced again, with all
of its layers as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from ...blocks import BlockSparse
from ..call import Call
from ..layer import FrozenLayer
from ..measure import fold, geometry_of
from ..packed import cpu_layer
from ..prepare import prepare
from ..sites import find_sites
from ..source import trace_by
from ..trace import LOCK, METHODS
from .graph import CannotExport

Assemble = Callable[..., nn.Module]


def frozen_graph(
    model: nn.Module, kept: Mapping[str, BlockSparse], call: Call, inputs: tuple[Tensor, ...], assemble: Assemble
) -> tuple[fx.GraphModule, Callable[..., Any] | None]:
    """The graph and its guards. model: with dense layers, whose kept blocks are ``kept``. assemble: of network.py."""
    failed: list[str] = []
    with LOCK:
        for method in METHODS:
            try:
                found = trace_by(method, prepare(model), call, inputs)
            except Exception as error:  # of whatever the model does
                failed.append(f"{method}: {type(error).__name__}: {error}".splitlines()[0])
                continue
            traced, layers = found.network, dict[str, FrozenLayer]()
            sites = find_sites(traced, inputs)
            for site in sites:
                module: Any = traced.get_submodule(site.target)
                norm = None if site.norm is None else traced.get_submodule(site.norm)
                weight, bias = fold(site, module, norm)
                blocks = kept.get(site.target)
                if blocks is not None and isinstance(weight, Tensor):
                    weight = BlockSparse.from_dense(weight, blocks.pattern, mask=blocks.mask())
                geometry = geometry_of(site, module)
                layers[site.name] = cpu_layer(
                    geometry, weight, bias, chosen="dense", memory_format="channels_last", threads=None
                )
            network = assemble(traced, sites, layers)
            assert isinstance(network, fx.GraphModule)
            return network, found.guards
    raise CannotExport(
        f"sparsekd.export: the network cannot be traced ({'; '.join(failed)}); make its forward traceable"
    )


__all__ = ["frozen_graph"]
