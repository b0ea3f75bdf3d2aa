"""``nn.MultiheadAttention`` whose output projection is block-sparse, and torch's fast paths, which it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import BlockSparseLayer, TracedWhole


class SparseMultiheadAttention(TracedWhole, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls ``out_proj`` as a layer, so that it may be block-sparse.

    torch's own reads ``out_proj.weight`` instead, which makes a dense copy at every call. ``sparsekd.sparsify`` turns a
    module into this and ``densify`` turns it back (:func:`follow_projection`); the input projections, one Parameter of
    the module itself, stay dense.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``; shapes below are [B, T, E] (time first unless ``batch_first``)."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            same = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        if is_causal and attn_mask is None:
            raise ValueError("SparseMultiheadAttention: is_causal only describes a mask; give attn_mask too")
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        queries, keys, values = (self._heads(x) for x in self._projected(query, key, value))
        if self.add_zero_attn:
            keys, values = (F.pad(x, (0, 0, 0, 1)) for x in (keys, values))
        mask = self._mask(queries.dtype, attn_mask, key_padding_mask)
        if need_weights:
            scores = (queries * math.sqrt(1 / self.head_dim)) @ keys.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, self.dropout, self.training)
            mixed = weights @ values
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not need_weights:
            return self._as_given(output, batched), None
        weights = weights.mean(1) if average_attn_weights else weights
        return self._as_given(output, batched), weights if batched else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if not self._qkv_same_embed_dim:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return self._with_bias_rows(*F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            weights = self.in_proj_weight.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return self._with_bias_rows(*(F.linear(x, weight, bias) for x, weight, bias in inputs))

    def _with_bias_rows(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.bias_k is None or self.bias_v is None:
            return [query, key, value]
        rows = ((key, self.bias_k), (value, self.bias_v))
        return [query, *(torch.cat([x, row.expand(x.shape[0], -1, -1)], 1) for x, row in rows)]

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, T, E] -> [B, heads, T, E / heads]``"""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, dtype: torch.dtype, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """What is added to the scores [B, heads, L, S]; nothing is masked of the rows that this module appends."""
        total, appended = None, int(self.bias_k is not None) + int(self.add_zero_attn)
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
            elif not mask.is_floating_point():
                raise TypeError(f"SparseMultiheadAttention: {name} must be bool or floating point, got {mask.dtype}")
            mask = F.pad(mask, (0, appended)).to(dtype)
            if name == "key_padding_mask":
                mask = mask[:, None, None, :]
            elif mask.dim() == 3:
                mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.unflatten(0, (-1, self.num_heads))
            total = mask if total is None else total + mask
        return total

    def _as_given(self, output: Tensor, batched: bool) -> Tensor:
        if not batched:
            return output.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1)


def reads_weights(module: nn.Module) -> bool:
    """Whether this is an attention of a type of its own, which multiplies with ``out_proj.weight`` as torch's does."""
    known = (nn.MultiheadAttention, SparseMultiheadAttention)
    return isinstance(module, nn.MultiheadAttention) and type(module) not in known


def follow_projection(module: nn.Module) -> None:
    """Make torch's attention and encoder modules call the layers inside them for as long as one is block-sparse.

    For inference torch has one fused call for a whole encoder layer, which takes dense weights. An encoder layer that
    holds a block-sparse one is told not to take it, and an encoder not to pack its sequences for it: there, as in
    training, what stands at positions that ``src_key_padding_mask`` hides is not set to zero.
    """
    sparse = any(isinstance(child, BlockSparseLayer) for child in module.modules())
    if isinstance(module, nn.MultiheadAttention) and not reads_weights(module):
        module.__class__ = SparseMultiheadAttention if sparse else nn.MultiheadAttention
    elif isinstance(module, nn.TransformerEncoderLayer):
        _switch(module, "activation_relu_or_gelu", 0, sparse)
    elif isinstance(module, nn.TransformerEncoder):
        _switch(module, "use_nested_tensor", False, sparse)


def _switch(module: Any, name: str, off: Any, sparse: bool) -> None:
    """Set an attribute to ``off`` while ``sparse``, and back afterwards."""
    kept = f"_dense_{name}"
    if sparse and not hasattr(module, kept):
        setattr(module, kept, getattr(module, name))
        setattr(module, name, off)
    elif not sparse and hasattr(module, kept):
        setattr(module, name, getattr(module, kept))
        delattr(module, kept)
