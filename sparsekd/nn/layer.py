"""What every block-sparse layer shares: the weight as kept blocks, conversion, state, and changes to the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..blocks import BlockPattern, BlockSparse, mask_to_index, spread, tap_major
from ..ops._schema import PREPARED, nobody_looks_on

Layer = TypeVar("Layer", bound="BlockSparseLayer")


class TracedWhole(nn.Module):
    """A module that ``torch.fx`` records as one call, as it does torch's own layers, and that ONNX export refuses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return self._recorded(value.tracer, args, kwargs)
        if (torch.jit.is_tracing() or torch.compiler.is_exporting()) and torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"{type(self).__name__}: ONNX has no block-sparse layers; use sparsekd.export_onnx(model, path, "
                "example), which writes dense ones with zeros, or export sparsekd.densify(copy.deepcopy(model))"
            )
        return super().__call__(*args, **kwargs)

    def _recorded(self, tracer: Any, args: Any, kwargs: Any) -> Any:
        name = tracer.path_of_module(self)

        def as_one_call(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", name, args, kwargs)

        return tracer.call_module(self, as_one_call, args, kwargs)

    # What a layer knows of its last call (``_again``) is no part of it, and would keep alive what it no longer has.

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_known", None)
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_known", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"{type(self).__name__}: TorchScript cannot compile block-sparse layers; script "
            "sparsekd.densify(copy.deepcopy(model)), or use torch.jit.trace, torch.export or torch.compile"
        )


class Known(NamedTuple):
    """A call without gradients that went well: one like it needs no checks (``BlockSparseLayer._again``)."""

    shape: torch.Size
    strides: tuple[int, ...]
    weight: tuple[Tensor | None, ...]  # values, row_ptr, col_idx, bias
    blocks: torch.Size  # of values
    run: Callable[..., Tensor]


class BlockSparseLayer(TracedWhole):
    """A layer whose weight exists only where a block is kept.

    A subclass names the torch layer that it stands for (``dense_type``) and what describes it beside the weight
    (``geometry``, names of constructor arguments), says in ``misfit`` which of these layers it cannot stand for, and in
    ``matrix_shape_of`` how the dense weight is cut into blocks.
    """

    dense_type: ClassVar[type[nn.Module]]
    geometry: ClassVar[tuple[str, ...]]

    values: nn.Parameter
    row_ptr: Tensor
    col_idx: Tensor
    bias: nn.Parameter | None
    pattern: BlockPattern
    weight_shape: tuple[int, ...]  # of the dense layer's weight
    matrix_shape: tuple[int, ...]  # the same weights as `BlockSparse` takes them: [out, in] or [K, C/groups, R, S]
    # Whether a linear layer or convolution runs as torch's own as long as every block is kept, which is faster in
    # training. A pruner sets it on its layers: they cost what the dense ones do before the first prune.
    dense_while_full: bool = False

    @classmethod
    def from_dense(
        cls: type[Layer],
        dense: Any,
        pattern: BlockPattern | None = None,
        *,
        density: float | None = None,
        mask: Tensor | None = None,
    ) -> Layer:
        """Convert a dense layer, keeping the blocks of ``mask`` or the share ``density`` of largest norm (default all).

        Args:
            dense: the torch layer that this one stands for; left untouched.
            pattern: block shape; default ``BlockPattern.for_device`` of the layer's device and dtype.
            density: share of blocks to keep, in (0, 1].
            mask: bool block mask, ``pattern.grid(matrix_shape)``: linear ``[ceil(out/bh), ceil(in/bw)]``, convolution
                ``[ceil(K/bh), ceil(C/groups/bw), R, S]``.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(dense, pattern, density, mask)
        return layer

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        """What ``dense`` is instead of a ``dense_type`` with a weight and bias of its own; None for what is one."""
        kind = type(dense).__name__
        if not isinstance(dense, cls.dense_type):
            return kind
        if not computes_as(dense, cls.dense_type):
            return f"{kind}, whose forward is its own"
        own = {name for name, parameter in dense._parameters.items() if isinstance(parameter, nn.Parameter)}
        if "weight" not in own or not own <= {"weight", "bias"} or dense._buffers or dense._modules:
            return (
                f"{kind} whose weight is computed (weight_norm, spectral_norm, nn.utils.prune, parametrizations): "
                "make it a Parameter with torch.nn.utils.parametrize.remove_parametrizations, prune.remove or the like"
            )
        weight: Any = dense.weight
        if isinstance(weight, nn.parameter.UninitializedParameter):
            return f"{kind} that has no weight yet: run the model once"
        if not weight.is_floating_point():
            return f"{kind} with a weight of {weight.dtype}, which is not floating point"
        return None

    @classmethod
    def misfit(cls, dense: Any, pattern: BlockPattern) -> str | None:
        """Why a layer of the right type cannot be block-sparse in these blocks, or at all; None where it can."""
        return None

    @classmethod
    def matrix_shape_of(cls, weight_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(weight_shape)

    @classmethod
    def over(cls: type[Layer], blocks: BlockSparse, bias: Tensor | None, dense: Any) -> Layer:
        """A layer over these very tensors, which copies nothing. dense: a ``dense_type`` that describes it; what its
        weight holds is not read."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.pattern, layer.weight_shape, layer.matrix_shape = blocks.pattern, tuple(dense.weight.shape), blocks.shape
        layer.values = nn.Parameter(blocks.values, requires_grad=False)
        layer.register_buffer("row_ptr", blocks.row_ptr)
        layer.register_buffer("col_idx", blocks.col_idx)
        held = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        layer.register_parameter("bias", held)
        for name in cls.geometry:
            setattr(layer, name, getattr(dense, name))
        return layer.eval()

    def _adopt(self, dense: Any, pattern: BlockPattern | None, density: float | None, mask: Tensor | None) -> None:
        """Become the block-sparse twin of a dense layer. A parameter shares no memory with the dense one."""
        kind = type(self).__name__
        if refusal := self.refusal(dense):
            raise TypeError(f"{kind}.from_dense: expected nn.{self.dense_type.__name__}, got {refusal}")
        weight = dense.weight
        if weight.is_meta:
            raise ValueError(
                f"{kind}.from_dense: expected a layer with values, got one on the meta device; load it first"
            )
        self.pattern = pattern or BlockPattern.for_device(weight.device, weight.dtype)
        if misfit := self.misfit(dense, self.pattern):
            raise ValueError(f"{kind}: {misfit}")
        self.weight_shape = tuple(weight.shape)
        self.matrix_shape = self.matrix_shape_of(self.weight_shape)
        blocks = BlockSparse.from_dense(weight.reshape(self.matrix_shape), self.pattern, density=density, mask=mask)
        self.values = nn.Parameter(blocks.values, requires_grad=weight.requires_grad)
        self.register_buffer("row_ptr", blocks.row_ptr)
        self.register_buffer("col_idx", blocks.col_idx)
        bias = dense.bias
        copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", copied)
        for name in self.geometry:
            setattr(self, name, getattr(dense, name))
        self.train(dense.training)

    def to_dense(self) -> Any:
        """The torch layer with the same weight, zeros where no block is kept."""
        arguments: Any = {name: getattr(self, name) for name in self.geometry}
        dense: Any = self.dense_type(**arguments, bias=self.bias is not None, device="meta")
        weight = self.blocks.to_dense().reshape(self.weight_shape)
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    @property
    def blocks(self) -> BlockSparse:
        """The weight as a BlockSparse that shares this layer's storage."""
        return BlockSparse(self.values.detach(), self.row_ptr, self.col_idx, self.matrix_shape, self.pattern)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads it: a differentiable copy, so writing to it changes nothing."""
        return dense_weight(self.values, self.row_ptr, self.col_idx, self.matrix_shape, self.weight_shape)

    @property
    def num_weights(self) -> int:
        """Weights of the dense layer this one stands for (bias not counted)."""
        return math.prod(self.weight_shape)

    @property
    def num_kept(self) -> int:
        """Weights that exist (padding of ragged blocks not counted)."""
        return int(self.blocks.block_sizes().sum())

    @property
    def density(self) -> float:
        """``num_kept / num_weights``."""
        return self.num_kept / max(self.num_weights, 1)

    def _again(self, x: Tensor) -> Tensor | None:
        """The layer on an input like the last one, if nothing has changed since that the checks would see. They and the
        way through the op take longer than a small layer."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        known: Known | None = self.__dict__.get("_known")
        if known is None or x.shape != known.shape or x.stride() != known.strides:
            return None
        parameters, buffers, weight = self._parameters, self._buffers, known.weight
        values, row_ptr, col_idx, bias = weight  # which move to another device by new row_ptr and col_idx
        if (
            parameters["values"] is not values
            or buffers["row_ptr"] is not row_ptr
            or buffers["col_idx"] is not col_idx
            or parameters["bias"] is not bias
            or not _plain_float32(x, values, bias)
            or values.shape != known.blocks  # type: ignore[union-attr]  # the data of a Parameter may be exchanged
        ):
            return None
        return known.run(x, *weight)

    def _remember(self, x: Tensor, op: str, *rest: Any) -> None:
        """That a call of this op with this input went well, for ``_again``."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or op not in PREPARED:
            return
        weight = (self.values, self.row_ptr, self.col_idx, self.bias)
        dense = all(t is None or t.is_contiguous() for t in weight)
        laid_out = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        if dense and laid_out and _plain_float32(x, self.values, self.bias) and nobody_looks_on(weight):
            run = PREPARED[op](x, *weight, *rest)
            self.__dict__["_known"] = Known(x.shape, x.stride(), weight, self.values.shape, run)

    @property
    def computes_densely(self) -> bool:
        """Whether it runs as torch's layer now: see ``dense_while_full``."""
        return self.dense_while_full and len(self.col_idx) == math.prod(self.pattern.grid(self.matrix_shape))

    def block_mask(self) -> Tensor:
        """Bool block mask of the kept blocks, in the shape that ``from_dense(mask=)`` takes."""
        return self.blocks.mask()

    def dead_outputs(self) -> Tensor:
        """Bool ``[outputs]``: those that no kept weight reaches, so that they are the bias alone."""
        return (self.row_ptr[1:] == self.row_ptr[:-1]).repeat_interleave(self.pattern.bh)[: self.matrix_shape[0]]

    @torch.no_grad()
    def keep_(self, keep: Tensor) -> None:
        """Drop every block that ``keep [nnzb]`` (bool) does not name. The Parameter ``values`` stays the same object.

        Optimizers hold state of the old size: ``sparsekd.pruning.drop_blocks`` shrinks it along.
        """
        if keep.dtype != torch.bool or keep.shape != self.col_idx.shape:
            raise ValueError(
                f"{type(self).__name__}.keep_: expected one bool for each of the {self.col_idx.shape[0]} blocks, "
                f"got {keep.dtype} of shape {tuple(keep.shape)}"
            )
        kept_before = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=keep.device)
        kept_before[1:] = keep.cumsum(0)
        self.row_ptr = kept_before[self.row_ptr.long()]
        self.col_idx = self.col_idx[keep]
        replace_data(self.values, self.values.data[keep])

    @torch.no_grad()
    def grow_(self, mask: Tensor) -> Tensor:
        """Bring back, as zeros, every block that the block mask names and that is not kept. ``values`` stays the same
        Parameter. Returns bool ``[nnzb]``: which of the blocks kept now were kept before.

        Optimizers hold state of the old size: ``sparsekd.pruning.grow_blocks`` lets it grow along.
        """
        before = self.block_mask()
        if mask.dtype != torch.bool or mask.shape != before.shape:
            raise ValueError(
                f"{type(self).__name__}.grow_: expected a bool block mask of shape {tuple(before.shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        after = before | mask.to(before.device)
        survives = tap_major(before)[tap_major(after)]
        self.row_ptr, self.col_idx = mask_to_index(after)
        replace_data(self.values, spread(self.values.data, survives))
        return survives

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        """A state may hold other blocks, and another number of them, than this layer holds now."""
        tensors: list[Any] = [state_dict.get(prefix + name) for name in ("values", "row_ptr", "col_idx")]
        errors: list[str] = rest[-1]
        if all(tensor is not None for tensor in tensors):
            try:
                BlockSparse(tensors[0], tensors[1], tensors[2], self.matrix_shape, self.pattern).validate()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix[:-1]}: {error}")
                return
            replace_data(self.values, self.values.data.new_empty(tensors[0].shape))
            self.col_idx = self.col_idx.new_empty(tensors[2].shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _describe_weight(self) -> str:
        described = f"bias={self.bias is not None}, pattern={self.pattern}"
        return described if self.values.is_meta else f"{described}, density={self.density:.3g}"

    def _build(
        self, dense_arguments: dict[str, Any], pattern: BlockPattern | None, density: float | None, mask: Tensor | None
    ) -> None:
        """Initialise as torch does the dense layer, then cut to blocks."""
        device = dense_arguments.pop("device")
        device = torch.get_default_device() if device is None else torch.device(device)
        dense = self.dense_type(**dense_arguments, device="cpu")
        kind = "cuda" if device.type == "cuda" else "cpu"
        dtype = dense_arguments["dtype"] or torch.get_default_dtype()
        self._adopt(dense, pattern or BlockPattern.for_device(kind, dtype), density, mask)
        self.to(device)


def _plain_float32(x: Tensor, values: Any, bias: Tensor | None) -> bool:
    """Whether an op would reach the float32 kernels of the CPU, seen by nobody; where x is, its checks have seen to it
    that the others are."""
    return (
        x.dtype is torch.float32
        and values.dtype is torch.float32
        and values.is_contiguous()
        and (bias is None or bias.dtype is torch.float32)
        and not torch._C._is_any_autocast_enabled()
        and nobody_looks_on((x,))
    )


def dense_weight(
    values: Tensor, row_ptr: Tensor, col_idx: Tensor, matrix_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> Tensor:
    """The dense weight, differentiable; a function of its own so that ``torch.fx`` can record it."""
    if has_torch_function_unary(values):
        return handle_torch_function(
            dense_weight, (values,), values, row_ptr, col_idx, matrix_shape, weight_shape=weight_shape
        )
    pattern = BlockPattern(values.shape[1], values.shape[2])
    return BlockSparse(values, row_ptr, col_idx, matrix_shape, pattern).to_dense().reshape(weight_shape)


def computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``layer`` is of this type, or of a subclass that inherits every function of its forward pass."""
    names = ("forward", "__call__", "_conv_forward", "_output_padding")
    return isinstance(layer, kind) and all(
        getattr(type(layer), name, None) is getattr(kind, name, None) and name not in vars(layer) for name in names
    )


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; it stays the same object and loses its gradient.

    Autograd's gradient accumulator remembers the old shape for as long as some graph is alive (the loss of the last
    batch is enough), and the next backward would raise. It is renewed only when the dtype changes: change it between.
    """
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    parameter.data = data
