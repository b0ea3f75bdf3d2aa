"""Models that are hard to trace."""

import threading

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.freeze import load_frozen, source
from sparsekd.nn import SparseConv2d

from .networks import (
    ALL_SPARSE,
    IMAGE,
    Custom,
    assert_frozen_equals,
    gains,
    quick,
    trained,
)


class Branching(nn.Module):
    """Its path depends on the data: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else self.conv(x)


@gains
def test_a_model_that_cannot_be_traced_is_frozen_layer_by_layer(min_gain, tmp_path):
    model = sparsekd.sparsify(trained(Branching()), density=0.5)
    x = torch.rand(IMAGE)
    frozen = quick(model, x, min_gain=min_gain)
    assert "torch.fx cannot trace the model (TraceError: symbolically traced" in frozen.plan.notes[0]
    assert "torch.export cannot trace the model (" in frozen.plan.notes[0]
    assert "one by one, nothing is fused" in frozen.plan.notes[0]
    assert frozen.plan["conv"].chosen == ("sparse" if min_gain == ALL_SPARSE else "dense")
    for sign in (1, -1):
        assert_frozen_equals(model, frozen, sign * x)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", Branching())(x), frozen(x))


def test_a_trace_by_fx_that_computes_something_else_is_not_used():
    def change_a_view(m, x):
        base = x * 1
        part = base[:, :8]
        part += m.conv(x)[:, :8]  # torch.fx records part = part + ..., which leaves base as it was
        return base

    model = Custom(change_a_view)
    x = torch.randn(2, 16, 5, 5)
    frozen = quick(model, x)
    assert frozen.record["traced"] == "torch.export"
    assert frozen.plan["conv"].chosen == "sparse"
    assert_frozen_equals(model, frozen, x)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x, mask=None, scale: float = 2.0, relu: bool = True):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return {"y": (y.relu() if relu else y) * scale, "size": y.shape[0]}


def test_arguments_left_at_their_default():
    model = Optional()
    x = torch.randn(IMAGE)
    frozen = quick(model, x)
    assert not frozen.plan.notes[0].startswith("torch.fx")
    got, want = frozen(x), model(x)
    torch.testing.assert_close(got["y"], want["y"], rtol=1e-4, atol=1e-4)
    assert got["size"] == 2
    mask = torch.rand(2, 16, 10, 10)
    torch.testing.assert_close(quick(model, (x, mask))(x, mask)["y"], model(x, mask)["y"], rtol=1e-4, atol=1e-4)


def test_layers_without_a_batch_dimension_are_left_alone():
    model = nn.Sequential(SparseConv2d(3, 16, 3, density=0.5), nn.ReLU())
    x = torch.randn(3, 6, 6)
    frozen = quick(model, x)
    assert len(frozen.plan) == 0
    assert frozen.plan.notes[-1].endswith(": 0")
    assert_frozen_equals(model, frozen, x)


# ---- By torch.export, what neither can, and the ways to call


class Checked(nn.Module):
    """A size that is compared in Python: torch.fx cannot, torch.export can."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        if x.shape[1] != self.conv.in_channels:
            raise ValueError
        return self.two(torch.relu(self.one(torch.relu(self.bn(self.conv(x.to(self.conv.weight.dtype)))).mean((2, 3)))))


def test_what_fx_cannot_trace_is_exported(tmp_path):
    model = sparsekd.sparsify(trained(Checked()), density=0.5)
    x = torch.randn(1, 3, 8, 8)
    frozen = quick(model, x)
    assert frozen.record["traced"] == "torch.export"
    assert [one.geometry.fused for one in frozen.plan if not one.geometry.pool] == ["bn+relu", "relu", ""]
    for shape in ((1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 11, 6)):
        assert_frozen_equals(model, frozen, torch.randn(shape))
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", Checked())(x), frozen(x))


def test_where_free_sizes_keep_torch_export_busy_the_batch_alone_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE", 0.0)
    model = sparsekd.sparsify(trained(Checked()), density=0.5)
    x = torch.randn(1, 3, 8, 8)
    frozen = quick(model, x)
    assert frozen.record["traced"] == "torch.export of one size"
    for batch in (1, 5):
        assert_frozen_equals(model, frozen, torch.randn(batch, 3, 8, 8))
    with pytest.raises(ValueError, match="freeze again with an example of this size"):
        frozen(torch.randn(2, 3, 11, 6))
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", Checked())(x), frozen(x))


class Path(nn.Module):
    """Which way it goes depends on a size."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * (2 if x.shape[1] > 10 else 1)


def test_a_size_that_takes_another_path_is_refused():
    model, x = Path().eval(), torch.randn(2, 6, 8)
    frozen = quick(model, x)
    assert_frozen_equals(model, frozen, torch.randn(3, 6, 8))
    with pytest.raises(ValueError, match="freeze again with an example of this size"):
        frozen(torch.randn(2, 12, 8))


def test_an_encoder_of_torch_is_seen_through(tmp_path):
    def build():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)

    model, x = sparsekd.sparsify(build(), density=0.5).eval(), torch.randn(2, 6, 32)
    frozen = quick(model, x)
    assert {one.name for one in frozen.plan if one.pattern} >= {"layers.0.linear1", "layers.0.linear2"}
    assert frozen.plan["layers.0.linear1"].geometry.fused == "relu"
    for shape in ((2, 6, 32), (3, 6, 32), (1, 9, 32)):
        assert_frozen_equals(model, frozen, torch.randn(shape))
    frozen.save(tmp_path / "frozen")
    for fresh in (build(), sparsekd.sparsify(build(), density=0.3)):
        assert torch.equal(load_frozen(tmp_path / "frozen", fresh)(x), frozen(x))


class Reads(nn.Module):
    """Its forward reads attributes of a layer, and its path depends on the data."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        assert x.shape[-1] == self.fc.in_features
        x = self.fc(input=x.to(self.fc.weight.dtype)) @ self.fc.weight.t()
        return self.head(x if x.sum() > 0 else -x)


def test_attributes_of_layers_stay_readable():
    model, x = sparsekd.sparsify(Reads(), density=0.3), torch.randn(2, 64)
    frozen = quick(model, x)
    assert frozen.record["traced"] == ""
    assert {one.chosen for one in frozen.plan} == {"sparse"}
    assert_frozen_equals(model, frozen, x)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.mean = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        h = torch.relu(self.enc(x))
        return self.mean(h).mean((0, 1)) + h.mean(1).mean()


def test_a_method_with_the_name_of_a_layer():
    model, x = Mean().eval(), torch.randn(3, 16)
    assert_frozen_equals(model, quick(model, x), x)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x, pair=None, *, scale=None, offset=1.0):
        y = self.fc(x) + offset
        if pair is not None:
            y = y + pair["a"] * pair["b"][0]
        return y if scale is None else y * scale


@pytest.mark.parametrize(
    "example",
    [
        {"x": torch.randn(2, 8)},
        {"x": torch.randn(2, 8), "scale": torch.randn(2, 4)},
        {"x": torch.randn(2, 8), "pair": {"a": torch.randn(2, 4), "b": [torch.randn(2, 4)]}, "offset": 2.0},
        [torch.randn(2, 8), {"a": torch.randn(2, 4), "b": [torch.randn(2, 4)]}],
    ],
)
def test_calls_with_keywords_and_structures(example, tmp_path):
    model = Named().eval()
    frozen = quick(model, example)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    with torch.no_grad():
        torch.testing.assert_close(frozen(*args, **kwargs), model(*args, **kwargs), rtol=1e-4, atol=1e-5)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", Named())(*args, **kwargs), frozen(*args, **kwargs))
    with pytest.raises(TypeError, match="expected"):
        frozen(torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8))


def test_positional_arguments_may_be_named():
    model, x = Named().eval(), torch.randn(2, 8)
    frozen = quick(model, x)
    assert torch.equal(frozen(x=x), frozen(x))
    with pytest.raises(TypeError, match="no keywords"):
        frozen(x, scale=x)


@pytest.mark.parametrize("build", [lambda: nn.AvgPool2d(4), lambda: nn.AdaptiveAvgPool2d(1), lambda: nn.MaxPool2d(2)])
def test_images_of_another_size_than_the_example(build):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), build(), nn.Flatten(), nn.ReLU())
    model = sparsekd.sparsify(model, density=0.5).eval()
    frozen = quick(model, torch.randn(2, 3, 4, 4))
    for size in ((4, 4), (8, 8), (9, 5), (16, 4)):
        assert_frozen_equals(model, frozen, torch.randn(3, 3, *size))


def test_threads_that_freeze_at_once():
    """torch.fx patches nn.Module for all threads while it traces."""
    x, failed = torch.randn(2, 3, 8, 8), []

    def work():
        try:
            model = trained(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())).eval()
            for _ in range(3):
                model(x)
                assert_frozen_equals(model, quick(model, x), x)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


@torch.fx.wrap
def positive(x):
    """By the data: torch.export cannot record it, torch.fx records the call."""
    return x if x[0, 0, 0] > 0 else -x


class Closed(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return torch.relu(self.head(positive(self.encoder(x))))


@pytest.mark.parametrize("density", [None, 0.5])
def test_layers_inside_a_module_that_no_trace_opens(density, tmp_path):
    """They were left as they are. Of dense ones torch's own call for the whole module reads the weights."""
    torch.manual_seed(0)
    model = Closed().eval()
    model = model if density is None else sparsekd.sparsify(model, density=density)
    x = torch.randn(2, 6, 32)
    frozen = quick(model, x)
    assert frozen.record["traced"] == "torch.fx"
    inside = [f"encoder.{name}" for name in ("self_attn.out_proj", "linear1", "linear2")] if density else []
    assert [one.name for one in frozen.plan] == ["head", *inside]
    said = (
        "modules that no trace shows, each for itself: " if density else "left to torch's own call for a whole encoder"
    )
    assert any(said in note for note in frozen.plan.notes)
    assert frozen.plan["head"].geometry.activation == "relu"
    for y in (x, -x, torch.randn(3, 9, 32)):
        assert_frozen_equals(model, frozen, y)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", Closed())(x), frozen(x))
    torch.testing.assert_close(frozen.to_torch()(x), frozen(x), rtol=1e-4, atol=1e-5)


class Numbered(nn.Module):
    """What stays in the graph has names that are those of other parts with a number behind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        for name in ("slope", "slope_0", "slope_1", "slope_2", "slope_3", "part_1", "chain_0"):
            self.add_module(name, nn.PReLU(16))

    def forward(self, x):
        x = self.conv(x)
        for slope in (self.slope_2, self.slope, self.slope_3, self.slope_1, self.slope_0, self.part_1, self.chain_0):
            x = 0.1 - slope(x)
        return x


@gains
def test_names_with_numbers_are_not_mistaken_for_one_another(min_gain):
    model = sparsekd.sparsify(Numbered(), density=0.5)
    for number, slope in enumerate(list(model.children())[1:]):
        nn.init.constant_(slope.weight, 0.1 + 0.2 * number)
    x = torch.rand(IMAGE)
    assert_frozen_equals(model, quick(model, x, min_gain=min_gain), x)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags, self.linear = nn.EmbeddingBag(100, 16, mode="sum"), nn.Linear(32, 16)

    def forward(self, x, ids, offsets):
        return self.linear(torch.cat([x, self.bags(ids, offsets)], 1))


def test_bags_begin_further_and_further_back_at_other_batch_sizes_too():
    """Offsets that fall again make torch read whatever lies there."""
    seen = []
    model = Bags().eval()
    model.bags.register_forward_pre_hook(lambda bags, args: seen.append(args[1].tolist()))
    example = (torch.randn(4, 16), torch.randint(100, (9,)), torch.tensor([0, 2, 3, 5]))
    assert not source._disagrees(model, model, example, model(*example), None)
    assert {len(offsets) for offsets in seen} == {1, 4, 5}
    assert all(offsets == sorted(offsets) for offsets in seen)
    assert "another batch size" not in str(sparsekd.freeze(Bags().eval(), example, layer_ms=1).plan.notes)


def test_a_compiled_model_is_frozen_as_it_was_before(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval()
    calls = []
    compiled = torch.compile(model, backend=lambda module, inputs: calls.append(1) or module)
    x = torch.randn(IMAGE)
    frozen = sparsekd.freeze(compiled, x, layer_ms=1)
    assert not calls
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)
    frozen.save(tmp_path / "frozen")
    assert torch.equal(load_frozen(tmp_path / "frozen", compiled)(x), frozen(x)) and not calls


def test_a_model_is_frozen_inside_autocast_as_outside():
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), torch.randn(IMAGE)
    with torch.autocast("cpu"):
        frozen = sparsekd.freeze(model, x, layer_ms=1)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


class Tripled(nn.Module):
    """A wrapper that has what it wraps under the name that torch.compile gives it."""

    def __init__(self):
        super().__init__()
        self._orig_mod = nn.Linear(8, 8)

    def forward(self, x):
        return 3 * self._orig_mod(x)


def test_a_wrapper_is_no_compiled_model():
    x = torch.randn(2, 8)
    model = Tripled().eval()
    torch.testing.assert_close(sparsekd.freeze(model, x, layer_ms=1)(x), model(x))


def test_what_has_no_bf16_form_says_so():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.LocalResponseNorm(3)).eval()
    with pytest.raises(RuntimeError, match=r"no bfloat16 form of something in the model .* freeze it in float32"):
        sparsekd.freeze(model, torch.randn(IMAGE), dtype="bf16", layer_ms=1)
