"""Which batch norm a layer feeds, seen in one forward pass: no graph is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # what 1d, 2d, 3d and the synchronised one derive from

from ..nn import BlockSparseLayer

__all__ = ["BatchNorm", "FedBatchNorms", "first_batch_norm"]


def first_batch_norm(model: nn.Module) -> str | None:
    """The kind of the first batch norm in the model, or None."""
    return next((type(module).__name__ for module in model.modules() if isinstance(module, BatchNorm)), None)


class FedBatchNorms:
    """Hooks that see which batch norms every time get the unchanged output of one of the layers.

    A batch norm takes dimension 1 for the channels. In the output of a linear layer they are there only if it is
    ``[N, C]``, so the output must have as many dimensions as the weight.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        self._outputs: dict[int, tuple[Tensor, int, str]] = {}  # holds the tensors, so that no id is used twice
        self._fed: dict[str, set[str | None]] = {}
        dims = {
            name: len(layer.weight_shape if isinstance(layer, BlockSparseLayer) else layer.weight.shape)
            for name, layer in layers.items()
        }
        self.hooks = [
            layer.register_forward_hook(
                lambda _module, _args, output, name=name: self._note_output(name, output, dims[name])
            )
            for name, layer in layers.items()
        ]
        self.hooks += [
            module.register_forward_pre_hook(
                lambda _module, args, name=name: self._note_input(name, args[0] if args else None)
            )
            for name, module in model.named_modules()
            if isinstance(module, BatchNorm)
        ]

    def found(self) -> dict[str, list[str]]:
        """``{batch norm: layers}``."""
        return {name: sorted(set(filter(None, sources))) for name, sources in self._fed.items() if None not in sources}

    def _note_output(self, name: str, output: Tensor, dims: int) -> None:
        if output.dim() == dims:
            self._outputs[id(output)] = (output, output._version, name)

    def _note_input(self, name: str, given: Any) -> None:
        _, version, source = self._outputs.get(id(given), (None, None, None))
        # An in-place operation (x += shortcut) leaves the same tensor with other contents.
        unchanged = source is not None and given._version == version
        self._fed.setdefault(name, set()).add(source if unchanged else None)
