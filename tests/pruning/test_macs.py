"""Multiply-adds: one count for the Pruner, `count_macs` and `sparsekd bench`, whatever torch calls inside."""

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.bench import bench
from sparsekd.pruning import Pruner, count_macs

pytestmark = pytest.mark.filterwarnings("ignore:sparsekd.sparsify")  # of what stays dense, on purpose

TOKENS = torch.randn(2, 10, 32)
OF_A_BLOCK = 10 * (32 * 32 + 32 * 64 + 64 * 32)  # output projection and two linear layers


class Attending(nn.Module):
    """Two of its three layers are called by a module of torch's, if at all."""

    def __init__(self, attention=nn.MultiheadAttention):
        super().__init__()
        self.attention = attention(32, 4, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(self.up(self.attention(x, x, x)[0]))


class OwnAttention(nn.MultiheadAttention):
    pass


class Alone(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def alone():
    return Alone(nn.MultiheadAttention)


def alone_of_its_own():
    return Alone(OwnAttention)


def never_calls():
    return nn.Sequential(nn.Linear(32, 32), NeverCalls())


class NeverCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(8, 8)

    def forward(self, x):
        return x


def encoder(**options):
    return nn.TransformerEncoderLayer(32, 4, 64, **options)


# Attention


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_output_projection_of_attention_counts_dense_and_sparse(share):
    model = Attending().eval()
    assert count_macs(model, (TOKENS,)) == (OF_A_BLOCK, OF_A_BLOCK)
    sparsekd.sparsify(model, macs=share, example_inputs=(TOKENS,))
    dense, now = count_macs(model, (TOKENS,))
    assert dense == OF_A_BLOCK and now / dense == pytest.approx(share, abs=0.01)
    assert (type(model.attention) is nn.MultiheadAttention) == (share == 0.9)  # the projection stays dense
    assert Pruner(model, example_inputs=(TOKENS,)).macs == (dense, now)


def test_masks_on_a_dense_output_projection_are_counted():
    assert Pruner(Attending(), granularity="unstructured", example_inputs=(TOKENS,)).macs == (OF_A_BLOCK, OF_A_BLOCK)


@pytest.mark.parametrize("training", [False, True])
def test_encoders_are_counted_past_their_fast_paths_and_left_as_they_are(training):
    model = nn.TransformerEncoder(encoder(batch_first=True), 2).train(training)
    padded = torch.arange(10).expand(2, 10) > 5
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    expected = model.eval()(TOKENS, src_key_padding_mask=padded)
    model.train(training)
    assert count_macs(model, {"src": TOKENS, "src_key_padding_mask": padded}) == (2 * OF_A_BLOCK, 2 * OF_A_BLOCK)
    after = [(type(module), dict(vars(module))) for module in model.modules()]
    for (kind, attributes), (same_kind, same) in zip(before, after, strict=True):
        assert kind is same_kind and str(attributes) == str(same)
    assert torch.equal(model.eval()(TOKENS, src_key_padding_mask=padded), expected)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        count_macs(model, (torch.randn(2, 10, 31),))
    assert {type(layer.self_attn) for layer in model.layers} == {nn.MultiheadAttention} and model.use_nested_tensor


def test_a_network_that_was_compiled_and_called_is_counted():
    model = torch.compile(Attending().eval(), backend="eager")
    with torch.no_grad():
        model(TOKENS)
    assert count_macs(model, (TOKENS,)) == (OF_A_BLOCK, OF_A_BLOCK)


# Layers that are never called


def test_layers_that_are_never_called_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"count_macs: the example never called layer '1.spare'.*exclude=\['1.spare'\]"
    ):
        count_macs(never_calls(), (TOKENS,))
    assert count_macs(never_calls(), (TOKENS,), ["1.spare"]) == (10 * 1024, 10 * 1024)


def test_what_stays_dense_and_is_never_called_is_passed_by():
    model, linear = Attending(OwnAttention), 10 * 2 * 32 * 64
    assert count_macs(model, (TOKENS,)) == (linear, linear)
    assert Pruner(model, example_inputs=(TOKENS,)).macs == (linear, linear)


def times_of(factory):
    return bench(f"{__name__}:{factory}", [(10, 32)], threads=[1], densities=[0.5], seconds=0.02)


def test_bench_says_the_share_of_an_attention_alone():
    (row,) = times_of("alone")
    assert row["macs"] == row["weights"] == 0.5


def test_bench_says_which_layer_is_never_called_and_that_there_is_none():
    with pytest.raises(ValueError, match=r"never called layer '1\.spare'"):
        times_of("never_calls")
    with pytest.raises(ValueError, match="sparsekd bench: the network calls no layer that can be block-sparse"):
        times_of("alone_of_its_own")


# For one example


class Loops(nn.Module):
    """Goes through a batch one by one: its layers see no batch, but the network gets one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):  # [4, H, W], which is the shape of an unbatched input of the second
        return torch.stack([self.second(self.first(image[None])) for image in x])


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 8, 2, stride=2)

    def forward(self, x):
        return self.up(input=x)


class Permutes(nn.Module):
    """Takes one image, channels last; its linear layer sees positions where others see a batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 8)

    def forward(self, x):  # [H, W, C]
        return self.linear(self.conv(x.permute(2, 0, 1)).flatten(1).T)


class Recurrent(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.rnn, self.linear = nn.GRU(32, 16, batch_first=batch_first), nn.Linear(16, 8)

    def forward(self, x):
        return self.linear(self.rnn(x)[0])


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (encoder(), (10, 2, 32), OF_A_BLOCK),
        (encoder(norm_first=True), (10, 2, 32), OF_A_BLOCK),
        (encoder(batch_first=True), (2, 10, 32), OF_A_BLOCK),
        (encoder(), (10, 32), OF_A_BLOCK),
        (nn.Conv2d(16, 32, 3), (16, 15, 17), 13 * 15 * 16 * 32 * 9),
        (nn.Conv2d(16, 32, 3), (4, 16, 15, 17), 13 * 15 * 16 * 32 * 9),
        (nn.ConvTranspose2d(16, 32, 2, stride=2), (16, 5, 7), 5 * 7 * 16 * 32 * 4),
        (nn.Conv1d(4, 8, 3), (4, 12), 10 * 4 * 8 * 3),
        (nn.Conv1d(4, 8, 3), (5, 4, 12), 10 * 4 * 8 * 3),
        (nn.Conv3d(4, 8, 1), (4, 2, 3, 5), 30 * 4 * 8),
        (nn.Linear(24, 48), (24,), 24 * 48),
        (nn.Linear(24, 48), (6, 24), 24 * 48),
        (nn.Linear(24, 48), (6, 5, 24), 5 * 24 * 48),
        (nn.Sequential(nn.Flatten(0), nn.Linear(24, 48)), (4, 6), 24 * 48),
        (Permutes(), (5, 7, 16), 35 * (16 * 32 * 9 + 32 * 8)),
        (Recurrent(False), (10, 2, 32), 10 * 16 * 8),
        (Recurrent(True), (2, 10, 32), 10 * 16 * 8),
        (Loops(), (4, 6, 6), 36 * 9 * (4 + 16)),
        (ByKeyword(), (3, 4, 5, 5), 25 * 4 * 8 * 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_multiply_adds_of_one_example(model, shape, macs):
    x = torch.randn(shape)
    assert count_macs(model, (x,)) == (macs, macs)
    if next(model.children(), None) is not None:  # a bare layer cannot be replaced
        model = sparsekd.sparsify(model, sparsekd.BlockPattern(1, 1))
        assert count_macs(model, (x,)) == Pruner(model, example_inputs=(x,)).macs == (macs, macs)


def test_a_layer_that_is_left_out_still_shows_that_there_is_no_batch():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 8, 1))
    x = torch.randn(16, 5, 7)
    assert count_macs(model, (x,), ["0"])[0] == 35 * 32 * 8
    sparsekd.sparsify(model, sparsekd.BlockPattern(1, 1), macs=4000, exclude=["0"], example_inputs=(x,))
    assert count_macs(model, (x,), ["0"])[1] == pytest.approx(4000, abs=35)


def test_sequences_that_are_packed_count_their_examples():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 16)

        def forward(self, packed):
            return self.head(self.rnn(packed)[1][0][0])

    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 5, 6), torch.tensor([5, 4, 2, 1]), batch_first=True)
    assert count_macs(Recurrent(), (packed,))[0] == 8 * 16
