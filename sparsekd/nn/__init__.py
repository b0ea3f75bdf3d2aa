"""Drop-in layers whose weight exists only where a block is kept: parameters, buffers and one op call each.

    conv = sparsekd.nn.SparseConv2d.from_dense(conv, density=0.3)   # keeps the 30 % of blocks of largest norm
    y = conv(x)                                                     # trains and infers like nn.Conv2d

State: ``values [nnzb, bh, bw]`` (Parameter), ``row_ptr``, ``col_idx`` (int32 buffers), ``bias``; see blocks.py.
"""

from .attention import SparseMultiheadAttention
from .convolution import SparseConv1d, SparseConv2d, SparseConv3d, split_padding
from .embedding import SparseEmbedding, SparseEmbeddingBag
from .embedding_int8 import Int8Embedding, Int8EmbeddingBag
from .layer import BlockSparseLayer
from .linear import SparseLinear
from .norm_relu import NormReLU
from .sharded import ShardedEmbedding
from .transposed import SparseConvTranspose2d

__all__ = [
    "BlockSparseLayer",
    "Int8Embedding",
    "Int8EmbeddingBag",
    "NormReLU",
    "ShardedEmbedding",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTranspose2d",
    "SparseEmbedding",
    "SparseEmbeddingBag",
    "SparseLinear",
    "SparseMultiheadAttention",
    "split_padding",
]
