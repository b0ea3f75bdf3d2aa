"""nn.MultiheadAttention, which torch.export takes apart, is frozen as projection, attention, projection."""

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.freeze.attention import self_attention

from .networks import assert_frozen_equals, quick


def encoder(batch_first=True, norm_first=False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, 0.0, "gelu", batch_first=batch_first, norm_first=norm_first
    )  # fmt: skip
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def attentions(frozen) -> list[str]:
    return [node.name for node in frozen.network.graph.nodes if node.target is self_attention]


@pytest.mark.parametrize(("batch_first", "norm_first"), [(True, False), (False, True)])
@pytest.mark.filterwarnings("ignore:sparsekd.sparsify")
def test_an_encoder_layer_is_a_chain_between_two_attentions(batch_first, norm_first, tmp_path):
    model = sparsekd.sparsify(encoder(batch_first, norm_first), density=0.5)
    x = torch.randn(3, 5, 32)
    frozen = quick(model, x)
    nodes = [node.op for node in frozen.network.graph.nodes if node.op not in ("placeholder", "output")]
    assert len(attentions(frozen)) == 2 and nodes.count("call_module") == len(nodes) - 2  # no view is left
    fused = [one.geometry.fused for one in frozen.plan if one.geometry.kind == "linear"]
    assert fused == ["", "add", "gelu", "add"] * 2
    assert_frozen_equals(model, frozen, x)
    assert_frozen_equals(model, frozen, torch.randn(3, 7, 32) if batch_first else torch.randn(3, 2, 32))
    frozen.save(tmp_path / "frozen")
    loaded = sparsekd.load_frozen(tmp_path / "frozen", encoder(batch_first, norm_first))
    assert torch.equal(loaded(x), frozen(x))
    torch.testing.assert_close(frozen.to_torch()(x), frozen(x), rtol=1e-4, atol=1e-4)


class Masked(nn.Module):
    """A causal mask, and positions that nobody may look at."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder()
        self.register_buffer("causal", torch.ones(5, 5).triu(1).bool())

    def forward(self, x, padding):
        return self.encoder(x, mask=self.causal, src_key_padding_mask=padding)


def test_masks_are_those_of_the_model():
    model = Masked().eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    x = torch.randn(3, 5, 32)
    frozen = quick(model, (x, padding))
    assert_frozen_equals(model, frozen, x, padding)


def test_attention_to_something_else_stays():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x, memory):
            return self.attention(x, memory, memory, need_weights=False)[0]

    model = Cross().eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    frozen = quick(model, (x, memory))
    assert frozen.plan.eager or not attentions(frozen)
    assert_frozen_equals(model, frozen, x, memory)


@pytest.mark.parametrize("time_first", [False, True])
def test_self_attention_is_that_of_torch(time_first):
    attention = nn.MultiheadAttention(32, 4, batch_first=not time_first).eval()
    x = torch.randn(3, 6, 32)
    projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    mask = torch.ones(x.shape[0 if time_first else 1], x.shape[0 if time_first else 1]).triu(1).bool()
    mixed = self_attention(projected, 4, ~mask, False, time_first)
    want = attention(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(attention.out_proj(mixed), want, rtol=1e-5, atol=1e-5)
