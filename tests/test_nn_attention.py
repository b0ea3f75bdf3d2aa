"""Attention whose output projection is block-sparse: torch's answers, and no dense copy of a weight on the way."""

import copy

import pytest
import torch
from torch import nn

from sparsekd.nn import SparseLinear, SparseMultiheadAttention
from sparsekd.nn.attention import follow_projection

LENGTHS = {"query": 5, "key": 7}
MODULES = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"batch_first": True, "add_bias_kv": True},
    {"add_zero_attn": True, "add_bias_kv": True},
    {"kdim": 12, "vdim": 20},
    {"kdim": 12, "vdim": 12, "bias": False, "batch_first": True},
    {"num_heads": 3},
]
CAUSAL = torch.ones(LENGTHS["query"], LENGTHS["key"]).triu(1).bool()
CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": CAUSAL},
    {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    {"attn_mask": torch.randn(2 * 6, 5, 7, dtype=torch.float64), "need_weights": False},
    {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3])},
    {"key_padding_mask": torch.randn(2, 7, dtype=torch.float64), "attn_mask": CAUSAL.double(), "need_weights": False},
]


def pair(arguments):
    """A torch attention, and its twin whose output projection is block-sparse with the same weights."""
    arguments = {"embed_dim": 24, "num_heads": 6, **arguments}
    dense = nn.MultiheadAttention(**arguments, dtype=torch.float64)
    sparse = copy.deepcopy(dense)
    sparse.out_proj = SparseLinear.from_dense(dense.out_proj, density=0.5)
    follow_projection(sparse)
    assert type(sparse) is SparseMultiheadAttention
    dense.out_proj.weight.data = sparse.out_proj.weight.detach()
    for layer in (dense, sparse):
        if layer.in_proj_bias is not None:
            torch.nn.init.normal_(layer.in_proj_bias, generator=torch.Generator().manual_seed(3))
    return dense, sparse


def inputs(module, batch):
    def of(length, width):
        shape = [batch, length, width] if batch else [length, width]
        if batch and not module.batch_first:
            shape[:2] = shape[1], shape[0]
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    return of(LENGTHS["query"], 24), of(LENGTHS["key"], module.kdim), of(LENGTHS["key"], module.vdim)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: ",".join(call) or "plain")
@pytest.mark.parametrize("arguments", MODULES, ids=str)
def test_the_answers_are_those_of_torch(arguments, call):
    dense, sparse = pair(arguments)
    if "attn_mask" in call and call["attn_mask"].dim() == 3:
        call = {**call, "attn_mask": call["attn_mask"][: 2 * dense.num_heads]}
    given = inputs(dense, batch=2)
    want, got = dense(*given, **call), sparse(*given, **call)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out[0].square().sum(), given) for out in (want, got)]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("arguments", MODULES, ids=str)
def test_without_a_batch(arguments):
    dense, sparse = pair(arguments)
    for call in ({}, {"need_weights": False}, {"key_padding_mask": torch.arange(7) > 4}):
        given = inputs(dense, batch=0)
        torch.testing.assert_close(sparse(*given, **call), dense(*given, **call))


def test_self_attention_and_keyword_calls():
    dense, sparse = pair({"batch_first": True})
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(sparse(query=x, key=x, value=x), dense(x, x, x))
    with torch.no_grad():
        torch.testing.assert_close(sparse.eval()(x, x, x), dense.eval()(x, x, x))


def test_dropout_hides_what_torch_hides():
    dense, sparse = pair({"dropout": 0.5})
    given = inputs(dense, batch=2)
    results = []
    for layer in (dense, sparse):
        torch.manual_seed(4)
        results.append(layer.train()(*given))
    torch.testing.assert_close(results[1], results[0])


def test_it_is_traced_compiled_and_exported_as_the_dense_one_is():
    _, sparse = pair({"batch_first": True})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = sparse

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    net, x = Net().eval(), torch.randn(2, 5, 24, dtype=torch.float64)
    graph = torch.fx.symbolic_trace(net)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["attention"]
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(net, (x,)).module()
    for twin in (graph, compiled, exported):
        torch.testing.assert_close(twin(x), net(x))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ({"is_causal": True}, ValueError, "give attn_mask too"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "attn_mask must be bool or floating point"),
    ],
)
def test_bad_input(call, error, says):
    _, sparse = pair({})
    with pytest.raises(error, match=says):
        sparse(*inputs(sparse, batch=2), **call)
