"""Types of the compiled CPU kernels (csrc/bindings_<op>.cpp). Addresses are `tensor.data_ptr()`; 0 means no bias."""

from collections.abc import Sequence
from typing import Any, overload

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def l1_data_cache() -> tuple[int, str]: ...  # bytes, and what said so: cpuid, sysctl, sysfs or assumed
def tile_floats(cache_bytes: int) -> int: ...
def openmp() -> str: ...
def random_lines(memory: int, bytes: int, threads: int, seconds: float = 0.2) -> float: ...
def peak_gflops(threads: int, seconds: float = 0.05, dtype: str = "float32") -> float: ...

ACTIVATIONS: dict[str, int]  # {"none": 0, "relu": 1, "relu6": 2, "silu": 3}: the `activation` of forward calls

class Conv2dShape:
    def __init__(
        self, input: Sequence[int], out_channels: int, kernel_size: Sequence[int], stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
        block: Sequence[int] = (16, 1)
    ) -> None: ...  # fmt: skip
    @property
    def n(self) -> int: ...
    @property
    def p(self) -> int: ...
    @property
    def q(self) -> int: ...

class PackedConv2d:
    def __init__(
        self, shape: Conv2dShape, values: int, row_ptr: int, col_idx: int, nnzb: int, bias: int = 0, activation: int = 0
    ) -> None: ...  # fmt: skip
    @property
    def plans_made(self) -> int: ...  # to be kept: of sizes that are found again no more are made
    def run(
        self, x: int, x_channels_last: bool, residual: int, y: int, y_channels_last: bool, threads: int, n: int = -1
    ) -> None: ...

class PackedDepthwise:
    """Channels_last only; weights are [C, 1, R, S]."""

    def __init__(self, shape: Conv2dShape, weights: int, bias: int = 0, activation: int = 0) -> None: ...
    def run(self, x: int, residual: int, y: int, threads: int, n: int) -> None: ...

class PackedLinear:
    def __init__(
        self, in_features: int, out_features: int, bh: int, bw: int, values: int, row_ptr: int, col_idx: int, nnzb: int,
        bias: int = 0, activation: int = 0
    ) -> None: ...  # fmt: skip
    def run(self, x: int, batch: int, residual: int, y: int, threads: int) -> None: ...

class PackedConv2dBf16(PackedConv2d): ...  # bf16 values, x, residual and y; float32 bias
class PackedLinearBf16(PackedLinear): ...

# int8 values, float32 scale per output row and bias; x is u8. Without y_scale y and residual are float32, else y is u8
# and there is no residual.
class PackedConv2dInt8:
    def __init__(
        self, shape: Conv2dShape, values: int, scale: int, row_ptr: int, col_idx: int, nnzb: int, bias: int,
        activation: int, x_scale: float, x_zero: int, y_scale: float = 0.0, y_zero: int = 0
    ) -> None: ...  # fmt: skip
    def run(
        self, x: int, x_channels_last: bool, residual: int, y: int, y_channels_last: bool, threads: int, n: int = -1
    ) -> None: ...

class PackedLinearInt8:
    def __init__(
        self, in_features: int, out_features: int, bh: int, bw: int, values: int, scale: int, row_ptr: int,
        col_idx: int, nnzb: int, bias: int, activation: int, x_scale: float, x_zero: int, y_scale: float = 0.0,
        y_zero: int = 0
    ) -> None: ...  # fmt: skip
    def run(self, x: int, batch: int, residual: int, y: int, threads: int) -> None: ...

def quantize_u8(x: int, count: int, scale: float, zero: int, y: int, threads: int) -> None: ...
def conv2d_f32(
    shape: Conv2dShape, x: int, x_channels_last: bool, values: int, row_ptr: int, col_idx: int, nnzb: int, bias: int,
    residual: int, y: int, y_channels_last: bool, activation: int, threads: int
) -> None: ...  # fmt: skip
def conv2d_grad_input_f32(
    shape: Conv2dShape, dy: int, dy_channels_last: bool, values: int, row_ptr: int, col_idx: int, nnzb: int, dx: int,
    dx_channels_last: bool, threads: int
) -> None: ...  # fmt: skip
def conv2d_grad_values_f32(
    shape: Conv2dShape, x: int, x_channels_last: bool, dy: int, dy_channels_last: bool, row_ptr: int, col_idx: int,
    nnzb: int, dvalues: int, threads: int
) -> None: ...  # fmt: skip
def linear_f32(
    x: int, batch: int, in_features: int, values: int, row_ptr: int, col_idx: int, nnzb: int, bh: int, bw: int,
    bias: int, residual: int, y: int, out_features: int, activation: int, threads: int
) -> None: ...  # fmt: skip
def linear_grad_input_f32(
    dy: int, batch: int, out_features: int, values: int, row_ptr: int, col_idx: int, nnzb: int, bh: int, bw: int,
    dx: int, in_features: int, threads: int
) -> None: ...  # fmt: skip
def linear_grad_values_f32(
    x: int, batch: int, in_features: int, dy: int, out_features: int, row_ptr: int, col_idx: int, nnzb: int, bh: int,
    bw: int, dvalues: int, threads: int
) -> None: ...  # fmt: skip

conv2d_bf16 = conv2d_f32  # bf16 values, x, residual and y; float32 bias
linear_bf16 = linear_f32

# bf16 operands and results; sums are float32.
conv2d_grad_input_bf16 = conv2d_grad_input_f32
conv2d_grad_values_bf16 = conv2d_grad_values_f32
linear_grad_input_bf16 = linear_grad_input_f32
linear_grad_values_bf16 = linear_grad_values_f32

# Maps of [rows, channels] in channels_last; residual 0, or y and dresidual 0, without a residual.
def norm_relu(
    rows: int, channels: int, x: int, residual: int, weight: int, bias: int, epsilon: float, y: int, mean: int,
    variance: int, threads: int
) -> None: ...  # fmt: skip
def norm_relu_grad(
    rows: int, channels: int, dy: int, x: int, y: int, weight: int, bias: int, mean: int, variance: int, epsilon: float,
    dx: int, dresidual: int, dweight: int, dbias: int, threads: int
) -> None: ...  # fmt: skip

ELEMENTS: dict[str, int]

# Of a tapped layer: features, gradient (0 in the forward pass), element, channels_last, channels, pixels.
_Layer = tuple[int, int, int, bool, int, int]

def feature_stats(layers: Sequence[_Layer], batch: int, means: int, energy: int, threads: int) -> None: ...
def feature_stats_grad(
    layers: Sequence[_Layer], batch: int, grad_means: int, grad_energy: int, threads: int
) -> None: ...
def match_maps(
    batch: int, attention: int, teacher: int, teacher_sizes: Sequence[int], student: int, student_sizes: Sequence[int],
    loss: int, grad_attention: int, grad_student: int, threads: int
) -> None: ...  # fmt: skip
def kd_loss(
    batch: int, classes: int, student: int, teacher: int, temperature: float, loss: int, grad_student: int, threads: int
) -> None: ...  # fmt: skip

class EmbeddingTable:
    """See csrc/embedding_kernels.h and sparsekd/ops/embedding.py."""

    def __init__(self, rows: int, dim: int, kept: int, base: int, counts: int) -> None: ...

def embedding_f32(
    table: EmbeddingTable, values: int, row_scale: int, ids: int, count: int, out: int, threads: int
) -> None: ...

embedding_bf16 = embedding_f32
embedding_f16 = embedding_f32
embedding_i8 = embedding_f32  # writes float32; only this one has a scale for each row

def embedding_bag_f32(
    table: EmbeddingTable, values: int, row_scale: int, ids: int, count: int, offsets: int, scale: int, bags: int,
    padding: int, out: int, threads: int
) -> None: ...  # fmt: skip

embedding_bag_bf16 = embedding_bag_f32  # the scale is float32 in all types
embedding_bag_f16 = embedding_bag_f32
embedding_bag_i8 = embedding_bag_f32

def embedding_top_k_f32(
    table: EmbeddingTable, values: int, row_scale: int, queries: int, count: int, k: int, excluded_begin: int,
    excluded: int, scores: int, ids: int, threads: int
) -> None: ...  # fmt: skip

embedding_top_k_bf16 = embedding_top_k_f32  # queries and scores are float32 in all types
embedding_top_k_f16 = embedding_top_k_f32
embedding_top_k_i8 = embedding_top_k_f32

def embedding_bag_scale(ids: int, offsets: int, count: int, bags: int, padding: int, scale: int) -> None: ...
def embedding_grad(
    table: EmbeddingTable, grad: int, ids: int, source: int, scale: int, count: int, padding: int, num_values: int,
    grad_values: int, threads: int
) -> None: ...  # fmt: skip
def embedding_rows_grad(
    table: EmbeddingTable, grad: int, rows: int, first: int, order: int, source: int, scale: int, begin: int,
    count: int, places: int, sums: int, threads: int
) -> None: ...  # fmt: skip
def embedding_absent(
    table: EmbeddingTable, grad: int, ids: int, count: int, absolute: bool, total: int, threads: int
) -> None: ...

# All take everything; what an optimizer does not have is 0.
def embedding_sgd(
    table: EmbeddingTable, places: int, grad: int, count: int, num_values: int, values: int, mean: int, square: int,
    occurred: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, threads: int
) -> None: ...  # fmt: skip

embedding_adagrad = embedding_sgd
embedding_adagrad_rows = embedding_sgd
embedding_adam = embedding_sgd

def embedding_magnitudes(table: EmbeddingTable, values: int, magnitudes: int, threads: int) -> None: ...
def embedding_thin(table: EmbeddingTable, stays: int, target: int, threads: int) -> None: ...
def embedding_repack(
    from_table: EmbeddingTable, to_table: EmbeddingTable, source: int, target: int, bytes: int, threads: int
) -> None: ...

class Pool:
    def __init__(self, shape: Conv2dShape, mean: bool, dtype: str) -> None: ...
    def run(self, x: int, y: int, threads: int, n: int) -> None: ...

class BetweenLayer:
    def run(self, operands: Sequence[int], y: int, threads: int, n: int) -> None: ...

def gate(pixels: int, channels: int, channels_last: bool, activation: int, dtype: str) -> BetweenLayer: ...
def layer_norm(rows: int, channels: int, weight: int, bias: int, epsilon: float, dtype: str) -> BetweenLayer: ...
def join(rows: int, widths: Sequence[int]) -> BetweenLayer: ...

class Network:
    # A value is (pointer, offset, bytes of one image): see csrc/network.h.
    def __init__(self, values: Sequence[tuple[int, int, int]], buffer_bytes: int) -> None: ...
    @overload
    def add(
        self, layer: PackedConv2d, x: int, x_channels_last: bool, residual: int, y: int, y_channels_last: bool
    ) -> None: ...
    @overload
    def add(self, layer: PackedLinear, rows: int, x: int, residual: int, y: int) -> None: ...
    @overload
    def add(self, layer: PackedDepthwise, x: int, residual: int, y: int) -> None: ...
    @overload
    def add(self, layer: Pool, x: int, y: int) -> None: ...
    @overload
    def add(self, layer: BetweenLayer, operands: Sequence[int], y: int) -> None: ...
    def finish(self) -> None: ...
    @property
    def chain_lengths(self) -> list[int]: ...
    def run(self, pointers: Sequence[int], n: int, images: int, threads: int) -> None: ...

# Networks without torch (sparsekd/runtime). Sizes of -k are k times the batch.
class Session:
    def __init__(self, path: str, threads: int) -> None: ...
    @property
    def inputs(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]: ...
    @property
    def outputs(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]: ...
    @property
    def threads(self) -> int: ...
    @property
    def note(self) -> str: ...
    def run(self, inputs: Sequence[Any]) -> list[Any]: ...
