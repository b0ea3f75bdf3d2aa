"""ONNX, for any run time: the same network with dense layers, zeros where no block is kept."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import write_atomically
from ..convert import densify
from .call import Call
from .deploy.export import names_of
from .network import FrozenModel


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    opset: int = 17,
) -> None:
    """Write a block-sparse model, or a frozen one, as an ONNX file with dense weights and a dynamic batch.

    What is sparse is dense there: the file has zeros where no block is kept, and run times multiply by them. Inputs
    have the names of the forward's parameters, outputs are "output", or "output_0" and so on.

    Args:
        model: block-sparse, dense, or what `freeze` returned, which is folded. Left as it is.
        example_inputs: as of `freeze`; the first dimension of each is the batch.

    Raises ImportError where the package onnx is missing, and what torch.onnx.export raises for a model it cannot take.
    """
    try:
        import onnx  # noqa: F401 - torch.onnx.export writes with it
    except ImportError as error:
        raise ImportError("sparsekd.export_onnx: the package onnx is missing; pip install onnx") from error
    forward = model.forward if not isinstance(model, FrozenModel) else None
    call, inputs = Call.of(forward, example_inputs)
    if isinstance(model, FrozenModel):
        call, plain = model.call, model.to_torch()
    else:
        plain = _Called(densify(copy.deepcopy(model)).eval(), call)
    names = names_of(call)
    with torch.no_grad():
        result = plain(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result.values() if isinstance(result, dict) else result)
    made = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    axes = {name: {0: "batch"} for name, x in zip([*names, *made], [*inputs, *outputs], strict=True) if x.dim()}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # the tracing exporter is the one that needs no onnxscript
        file = Path(folder) / "network.onnx"
        torch.onnx.export(
            plain, inputs, str(file), dynamo=False, input_names=names, output_names=made, dynamic_axes=axes,
            opset_version=opset,
        )  # fmt: skip
        write_atomically(path, file.read_bytes())


class _Called(nn.Module):
    """A model as a function of the tensors of a call."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *inputs: Tensor) -> Any:
        args, kwargs = self._call.build(inputs)
        return self.model(*args, **kwargs)


__all__ = ["export_onnx"]
