"""Every plain operation of a file beside torch's, for several batches, layouts and types."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsekd.backends import cpu

from .files import graph, write

pytestmark = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)

N = -1


def run(tmp_path, described, tensors, *inputs):
    from sparsekd.runtime import Session

    session = Session(write(tmp_path / "graph.skd", described, tensors), threads=2)
    return [torch.from_numpy(y) for y in session._run([x.numpy() for x in inputs])]


def check(tmp_path, want, described, *inputs, tensors=None, tolerance=2e-6):
    """want: of the inputs by torch."""
    for batch in (1, 2, 5):
        given = [x[:batch].contiguous() if x.dim() and x.shape[0] == 5 else x for x in inputs]
        expected = want(*given)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for y, one in zip(run(tmp_path, described, tensors, *given), expected, strict=True):
            assert y.dtype == one.dtype and y.shape == one.shape
            torch.testing.assert_close(y, one, rtol=tolerance, atol=tolerance, equal_nan=True)


UNARY = {
    "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "exp": torch.exp, "log": torch.log,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "abs": torch.abs,
    "neg": torch.neg, "square": torch.square, "log1p": torch.log1p, "sign": torch.sign,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_tensor(name, tmp_path):
    x = torch.randn(5, 3, 7) * 4
    # torch's own gelu of infinity is NaN with AVX-512 and infinity elsewhere.
    large = 30.0 if name == "gelu" else float("inf")
    x[0, 0, :5] = torch.tensor([float("nan"), large, -large, 0.0, -0.0])
    described = graph(name, [((N, 3, 7), "float32")], [((N, 3, 7), "float32")])
    check(tmp_path, UNARY[name], described, x)


BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "max": torch.maximum, "min": torch.minimum,
}  # fmt: skip


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("other", [(5, 3, 4), (5, 1, 4), (3, 1), (), (1, 3, 4)])
def test_two_tensors_broadcast(name, other, tmp_path):
    a, b = torch.randn(5, 3, 4), torch.randn(other)
    a[0, 0, 0] = float("nan")
    shape = (N, *other[1:]) if len(other) == 3 and other[0] == 5 else other
    described = graph(name, [((N, 3, 4), "float32"), (shape, "float32", "b")], [((N, 3, 4), "float32")])
    if shape[:1] == (N,):
        del described["values"][1]["tensor"]
        described["inputs"].append({"name": "b", "value": 1})
        return check(tmp_path, BINARY[name], described, a, b)
    check(tmp_path, lambda x: BINARY[name](x, b), described, a, tensors={"b": b})


def test_integers_are_added_and_multiplied_as_integers(tmp_path):
    a = torch.randint(-(2**62), 2**62, (5, 3))
    b = torch.tensor([1, 2**61, -7])
    described = graph("add", [((N, 3), "int64"), ((3,), "int64", "b")], [((N, 3), "int64")])
    check(tmp_path, lambda x: x + b, described, a, tensors={"b": b})


@pytest.mark.parametrize(
    ("name", "want", "other"),
    [
        ("xor", torch.bitwise_xor, [5, -7, 2**62]),
        ("shift_right", torch.bitwise_right_shift, [0, 24, 63]),
        ("remainder", torch.remainder, [7, -7, -1]),
        ("remainder", torch.remainder, [2**62, 1, -(2**63)]),
    ],
)
def test_integers_are_hashed_as_by_torch(name, want, other, tmp_path):
    a = torch.randint(-(2**63), 2**63 - 1, (5, 3))
    a[0] = torch.tensor([-(2**63), 2**63 - 1, 0])
    b = torch.tensor(other)
    described = graph(name, [((N, 3), "int64"), ((3,), "int64", "b")], [((N, 3), "int64")])
    check(tmp_path, lambda x: want(x, b), described, a, tensors={"b": b})


def test_remainders_of_nothing_known_are_refused(tmp_path):
    described = graph("remainder", [((N, 3), "int64"), ((3,), "int64", "b")], [((N, 3), "int64")])
    with pytest.raises(ValueError, match="it divides by 0"):
        run(tmp_path, described, {"b": torch.tensor([3, 0, 1])}, torch.ones(5, 3, dtype=torch.int64))
    del described["values"][1]["tensor"]
    described["inputs"].append({"name": "b", "value": 1})
    with pytest.raises(ValueError, match="its divisor has to be a constant"):
        run(tmp_path, described, {}, *(torch.ones(5, 3, dtype=torch.int64) for _ in range(2)))


MOVES = [
    ("reshape", {}, (N, 24), lambda x: x.reshape(-1, 24)),
    ("reshape", {}, (-6, 4), lambda x: x.reshape(-1, 4)),
    ("permute", {"order": [0, 2, 1]}, (N, 4, 6), lambda x: x.permute(0, 2, 1)),
    ("permute", {"order": [1, 0, 2]}, (6, N, 4), lambda x: x.permute(1, 0, 2)),
    ("slice", {"axis": 1, "start": 1, "stop": 6, "step": 2}, (N, 3, 4), lambda x: x[:, 1:6:2]),
    ("slice", {"axis": -1, "start": 2, "stop": 2, "step": 1}, (N, 6, 0), lambda x: x[..., 2:2]),
    ("pad", {"before": [0, 1, 0], "after": [0, 0, 2]}, (N, 7, 6), lambda x: F.pad(x, (0, 2, 1, 0))),
    ("sum", {"axes": [1], "keepdim": False}, (N, 4), lambda x: x.sum(1)),
    ("mean", {"axes": [1, 2], "keepdim": True}, (N, 1, 1), lambda x: x.mean((1, 2), True)),
    ("amax", {"axes": [-1], "keepdim": False}, (N, 6), lambda x: x.amax(-1)),
    ("softmax", {"axis": 1}, (N, 6, 4), lambda x: x.softmax(1)),
    ("softmax", {"axis": -1}, (N, 6, 4), lambda x: x.softmax(-1)),
    ("layer_norm", {"axes": 1, "eps": 1e-5}, (N, 6, 4), lambda x: F.layer_norm(x, (4,))),
    ("layer_norm", {"axes": 2, "eps": 1e-5}, (N, 6, 4), lambda x: F.layer_norm(x, (6, 4))),
]  # fmt: skip


@pytest.mark.parametrize("case", MOVES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_moves_and_reductions(case, tmp_path):
    op, attributes, shape, want = case
    x = torch.randn(5, 6, 4)
    described = graph(op, [((N, 6, 4), "float32")], [(shape, "float32")], **attributes)
    check(tmp_path, want, described, x)


def test_a_maximum_and_a_softmax_keep_nan(tmp_path):
    x = torch.randn(5, 6, 4)
    x[0, 2, 1] = float("nan")
    x[1, :, 0] = -float("inf")
    for op, attributes, shape, want in (
        ("amax", {"axes": [1], "keepdim": False}, (N, 4), lambda x: x.amax(1)),
        ("softmax", {"axis": 1}, (N, 6, 4), lambda x: x.softmax(1)),
    ):
        check(tmp_path, want, graph(op, [((N, 6, 4), "float32")], [(shape, "float32")], **attributes), x)


def test_concat_along_channels_and_along_the_batch(tmp_path):
    a, b = torch.randn(5, 3, 4), torch.randn(5, 2, 4)
    described = graph("concat", [((N, 3, 4), "float32"), ((N, 2, 4), "float32")], [((N, 5, 4), "float32")], axis=1)
    check(tmp_path, lambda x, y: torch.cat([x, y], 1), described, a, b)
    described = graph("concat", [((N, 3, 4), "float32"), ((N, 3, 4), "float32")], [((-2, 3, 4), "float32")], axis=0)
    described["plan"] = {**described["plan"], "images": 1}  # samples of a concatenation do not go through alone
    check(tmp_path, lambda x, y: torch.cat([x, y]), described, a, torch.randn(5, 3, 4))


def test_places_of_an_axis_are_taken(tmp_path):
    x, places = torch.randn(5, 6, 4), torch.tensor([5, 0, 0, 2])
    described = graph("take", [((N, 6, 4), "float32"), ((4,), "int64", "i")], [((N, 4, 4), "float32")], axis=1)
    check(tmp_path, lambda x: x[:, places], described, x, tensors={"i": places})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shapes", [((5, 3, 7, 4), (5, 3, 4, 18)), ((5, 7, 4), (4, 33)), ((5, 4), (4, 1))], ids=str)
def test_products(shapes, transposed, tmp_path):
    a, b = torch.randn(shapes[0]), torch.randn(shapes[1])
    want = lambda x, y: x @ y  # noqa: E731
    if transposed:
        b = b.transpose(-1, -2).contiguous()
        want = lambda x, y: x @ y.transpose(-1, -2)  # noqa: E731
    dims = [(N, *a.shape[1:]), (N, *b.shape[1:]) if b.dim() > 2 else tuple(b.shape)]
    made = (N, *a.shape[1:-1], shapes[1][-1])
    described = graph("matmul", [(one, "float32") for one in dims], [(made, "float32")], transposed=transposed)
    check(tmp_path, want, described, a, b, tolerance=1e-5)


def test_the_largest_come_first_with_their_places(tmp_path):
    x = torch.stack([torch.randperm(40) for _ in range(5)]).float()
    described = graph("top_k", [((N, 40), "float32")], [((N, 7), "float32"), ((N, 7), "int64")], k=7)
    check(tmp_path, lambda x: tuple(torch.topk(x, 7)), described, x)


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_rows_and_bags_of_a_table(dtype, tmp_path):
    table = torch.randn(11, 6)
    ids = torch.randint(11, (5, 4)).to(getattr(torch, dtype))
    ids[:, 1] = 3
    described = graph("embedding", [((N, 4), dtype)], [((N, 4, 6), "float32")], table="t")
    check(tmp_path, lambda x: F.embedding(x, table), described, ids, tensors={"t": table})
    for mode in ("sum", "mean", "max"):
        for padding in (-1, 3):
            described = graph("embedding_bag", [((N, 4), dtype)], [((N, 6), "float32")], table="t", mode=mode,
                              padding=padding)  # fmt: skip
            want = lambda x, m=mode, p=padding: F.embedding_bag(  # noqa: E731
                x, table, mode=m, padding_idx=None if p < 0 else p
            )
            check(tmp_path, want, described, ids, tensors={"t": table})


def test_an_id_that_no_table_has_is_an_error(tmp_path):
    described = graph("embedding", [((N, 4), "int64")], [((N, 4, 6), "float32")], table="t")
    for wrong in (11, -1, 2**62):
        with pytest.raises(IndexError, match=r"ids must lie in \[0, 11\)"):
            run(tmp_path, described, {"t": torch.randn(11, 6)}, torch.tensor([[0, 1, 2, wrong]]))


@pytest.mark.parametrize("bag", [False, True])
def test_rows_of_a_sparse_table(bag, tmp_path):
    import sparsekd

    table = sparsekd.nn.SparseEmbedding(150, 70, density=0.3)
    tensors = {"v": table.values.detach(), "k": table.kept}
    ids = torch.randint(150, (5, 4))
    attributes = {"table": "v", "kept": "k", "dim": 70}
    if bag:
        attributes |= {"mode": "mean", "padding": -1}
        described = graph("embedding_bag", [((N, 4), "int64")], [((N, 70), "float32")], **attributes)
        return check(tmp_path, lambda x: table(x).mean(1).detach(), described, ids, tensors=tensors)
    described = graph("embedding", [((N, 4), "int64")], [((N, 4, 70), "float32")], **attributes)
    check(tmp_path, lambda x: table(x).detach(), described, ids, tensors=tensors)


def test_an_array_that_is_no_piece_of_memory_is_copied(tmp_path):
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    described = graph("neg", [((N, 2), "float32")], [((N, 2), "float32")])
    from sparsekd.runtime import Session

    session = Session(write(tmp_path / "graph.skd", described), threads=1)
    np.testing.assert_array_equal(session(x[::2, ::2]), -x[::2, ::2])
    shifted = np.frombuffer(b"\0" + x[:, :2].tobytes(), np.uint8)[1:].view(np.float32).reshape(10, 2)
    assert not shifted.flags.aligned
    np.testing.assert_array_equal(session(shifted), -x[:, :2])
