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
from .outputs import tensors


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    opset: int = 17,
) -> None:
    """Write a block-sparse model, or a frozen one, as an ONNX file with dense weights and a dynamic batch.

    What is sparse is dense there: the file has zeros where no block is kept, and run times multiply by them. Inputs
    have the names of the forward's parameters, outputs are "output", or "output_0" and so on, in the order in which
    they are met in the result. A network that was frozen in bfloat16 or int8 computes in float32 there.

    Args:
        model: block-sparse, dense, or what `freeze` returned, which is folded. Left as it is.
        example_inputs: as of `freeze`; the first dimension of each is the batch.

    Raises ImportError where the package onnx is missing, ValueError for a network that asks for bfloat16 itself, and
    what torch.onnx.export raises for a model it cannot take.
    """
    try:
        import onnx  # noqa: F401 - torch.onnx.export writes with it
    except ImportError as error:
        raise ImportError("sparsekd.export_onnx: the package onnx is missing; pip install onnx") from error
    forward = model.forward if not isinstance(model, FrozenModel) else None
    call, inputs = Call.of(forward, example_inputs)
    if isinstance(model, FrozenModel):
        call = model.call
        plain = _Flat(_in_float32(model) if model.record.get("in_bf16") else model.to_torch())
    else:
        plain = _Flat(densify(copy.deepcopy(model)).eval(), call)
    names = names_of(call)
    with torch.no_grad():
        outputs = _outputs(plain, inputs, model)
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


def _in_float32(model: FrozenModel) -> nn.Module:
    """Run times have no convolutions in bfloat16. What was rounded to it stays, and is computed with in float32."""
    return copy.deepcopy(model.to_torch()).float()  # a copy, since what is no layer is shared with the frozen network


def _outputs(plain: nn.Module, inputs: tuple[Tensor, ...], model: nn.Module) -> tuple[Tensor, ...]:
    try:
        return plain(*inputs)
    except RuntimeError as error:
        if isinstance(model, FrozenModel) and model.record.get("in_bf16"):
            raise ValueError(
                "sparsekd.export_onnx: this network was frozen in bfloat16, which its forward asks for itself, so that "
                f"it does not run in float32 ({str(error).splitlines()[0]}); freeze it without dtype, and export that"
            ) from error
        raise


class _Flat(nn.Module):
    """A network as a function from the tensors of a call, or those of ``call``, to those of its result."""

    def __init__(self, model: nn.Module, call: Call | None = None) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = (inputs, dict[str, Any]()) if self._call is None else self._call.build(inputs)
        return tuple(tensors(self.model(*args, **kwargs)))


__all__ = ["export_onnx"]
