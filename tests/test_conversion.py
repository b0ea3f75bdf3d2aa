"""What people's models hold: subclasses, hooks, computed and shared weights, layers without a block-sparse form."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsekd
from sparsekd import BlockPattern, checkpoint
from sparsekd.nn import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose2d,
    SparseLinear,
    SparseMultiheadAttention,
)


class Plain(nn.Linear):
    """Inherits everything that it computes with."""

    def extra(self):
        return self.in_features


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2), keepdim=True), bias)


def quiet(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsekd.sparsify(model, **options)


def of_each_kind() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "line": nn.Conv1d(16, 32, 3),
            "image": nn.Conv2d(16, 32, 3),
            "up": nn.ConvTranspose2d(16, 32, 2, stride=2),
            "point": nn.Conv3d(16, 32, 1),
            "matrix": nn.Linear(16, 32),
            "plain": Plain(16, 32),
            "volume": nn.Conv3d(16, 32, 3),
            "upline": nn.ConvTranspose1d(16, 32, 3),
            "padded": Padded(16, 32, 3),
            "standardised": Standardised(16, 32, 3),
            "recurrent": nn.GRU(16, 32),
            "table": nn.Embedding(16, 32),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
            "norm": nn.LayerNorm(32),
        }
    )


def test_the_layers_with_a_block_sparse_form_get_it_and_the_others_are_named():
    model = of_each_kind()
    with pytest.warns(UserWarning) as caught:
        sparsekd.sparsify(model, density=0.5)
    assert {name: type(model[name]) for name in ("line", "image", "up", "point", "matrix", "plain")} == {
        "line": SparseConv1d,
        "image": SparseConv2d,
        "up": SparseConvTranspose2d,
        "point": SparseConv3d,
        "matrix": SparseLinear,
        "plain": SparseLinear,
    }
    (warning,) = caught
    assert warning.filename == __file__
    said = str(warning.message)
    for each in (
        "5 layers stay dense",
        "volume: of Conv3d only 1x1x1 kernels",
        "upline: ConvTranspose1d has no block-sparse form",
        "padded: Padded, whose forward is its own",
        "standardised: Standardised, whose forward is its own",
        "recurrent: GRU has no block-sparse form",
    ):
        assert each in said
    assert all(name not in said for name in ("table", "depthwise", "norm", "matrix"))


def test_the_report_names_every_layer_with_a_matrix_before_and_after():
    model = of_each_kind()
    before = sparsekd.conversion_report(model, exclude=["matrix"])
    assert list(before.convertible) == ["line", "image", "up", "point", "plain"]
    assert before.sparse == {}
    assert before.dense["matrix"] == "left out by exclude or not named by include"
    assert before.dense["table"] == "Embedding looks rows up; name it in include to keep single entries of them"
    assert "multiple of the block height" in before.dense["depthwise"]
    assert set(before.unexpected) == {"volume", "upline", "padded", "standardised", "recurrent"}
    after = sparsekd.conversion_report(quiet(model, exclude=["matrix"]))
    assert list(after.sparse) == list(before.convertible)
    assert list(after.convertible) == ["matrix"]
    assert str(after).startswith("layers: 5 block-sparse, 1 can be converted, 7 dense\n")
    assert "dense             recurrent     GRU has no block-sparse form" in str(after)
    assert len(str(after).splitlines()) == 14


@pytest.mark.parametrize("model", [nn.Sequential(nn.GRU(8, 8)), nn.Sequential(nn.ReLU())], ids=["gru", "no weights"])
def test_a_model_of_which_nothing_is_converted_says_so(model):
    with pytest.warns(UserWarning, match="no layer can be block-sparse"):
        sparsekd.sparsify(model)


def test_nothing_is_said_where_nothing_unexpected_stays_dense():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsekd.sparsify(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=16)))
        sparsekd.sparsify(of_each_kind(), include=["line"])
        sparsekd.sparsify(of_each_kind(), exclude=["volume", "up*", "padded", "standardised", "recurrent"])


def test_attention_and_encoders_never_read_a_dense_weight(monkeypatch):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, hidden = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = encoder(x)
        masked = encoder(x, src_key_padding_mask=hidden)
        quiet(encoder)
        monkeypatch.setattr(SparseLinear, "weight", property(lambda layer: pytest.fail("a dense copy was made")))
        torch.testing.assert_close(encoder(x), before, rtol=1e-4, atol=1e-5)
        seen = ~hidden[:, :, None]
        torch.testing.assert_close(encoder(x, src_key_padding_mask=hidden) * seen, masked * seen, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    kinds = [type(module) for module in encoder.modules()]
    assert kinds.count(SparseLinear) == 6 and kinds.count(SparseMultiheadAttention) == 2
    assert encoder.layers[0].self_attn.out_proj.density == 1.0
    sparsekd.densify(encoder)
    assert not {SparseLinear, SparseMultiheadAttention} & {type(module) for module in encoder.modules()}
    assert encoder.use_nested_tensor and encoder.layers[0].activation_relu_or_gelu == 1
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=hidden), masked)


def test_an_attention_of_its_own_type_keeps_the_projection_that_it_reads():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"a": Own(32, 4)})
    with pytest.warns(UserWarning, match="a.out_proj: Own reads its weight"):
        sparsekd.sparsify(model)
    assert type(model["a"]) is Own and not isinstance(model["a"].out_proj, SparseLinear)


def test_hooks_and_attributes_move_along_and_back():
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(4, 32)
    handle = model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[0].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    seen = []
    model[0].register_full_backward_hook(lambda module, *grads: seen.append(type(module)))
    model[0].tag = "mine"
    want = model(x)
    for convert in (sparsekd.sparsify, sparsekd.densify):
        convert(model)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
        model(x.requires_grad_()).sum().backward()
        assert model[0].tag == "mine"
    assert seen == [SparseLinear, nn.Linear]
    handle.remove()
    torch.testing.assert_close(2 * model(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "reparametrise",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    ],
    ids=["prune", "weight_norm", "spectral_norm", "old spectral_norm", "old weight_norm"],
)
def test_layers_whose_weight_is_computed_stay_dense_or_are_refused(reparametrise):
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(4, 32)
    reparametrise(model[0])
    model.eval()
    want = model(x)
    with pytest.raises(TypeError, match=r"layer '0': expected nn.Linear, got .*Linear whose weight is computed"):
        sparsekd.sparsify(model, include=["0", "1"])
    with pytest.raises(TypeError, match="whose weight is computed"):
        SparseLinear.from_dense(model[0])
    assert type(model[1]) is nn.Linear
    with pytest.warns(UserWarning, match="1 layer stays dense: 0: .*whose weight is computed .*prune.remove"):
        sparsekd.sparsify(model)
    assert type(model[1]) is SparseLinear
    # The old spectral norm divides by a first guess at its norm, and answers in tens.
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6 * max(1.0, want.abs().max().item()))


def test_a_model_is_converted_whole_or_not_at_all():
    def net():
        net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv2d(8, 8, 3, groups=8))
        net[0].bias = net[1].bias
        return net

    spoilt = net()
    nn.init.constant_(spoilt[1].weight, float("nan"))
    for model, options, says in (
        (net(), {"include": ["*"]}, "'0' and '1' share one weight"),
        (spoilt, {}, "NaN or infinity"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")), {}, "'1' is on the meta device"),
        (nn.Sequential(nn.Linear(4, 4), net()[2]), {"include": ["*"]}, "layer '1': with groups = 8"),
    ):
        kinds = [type(layer) for layer in model]
        if model is spoilt:
            model[0].bias = nn.Parameter(torch.zeros(16))
        with pytest.raises(ValueError, match=says):
            sparsekd.sparsify(model, **options)
        assert [type(layer) for layer in model] == kinds


@pytest.mark.parametrize("name", ["price[usd]", "a*b", "what?", "[x]"])
def test_a_name_is_taken_as_it_stands_whatever_characters_are_in_it(name):
    def net():
        return nn.ModuleDict({name: nn.Linear(16, 16), "age": nn.Linear(16, 16), "acb": nn.Linear(16, 16)})

    kept = sparsekd.sparsify(net(), exclude=[name])
    assert [type(kept[each]) for each in (name, "age", "acb")] == [nn.Linear, SparseLinear, SparseLinear]
    alone = sparsekd.sparsify(net(), include=[name])
    assert [type(alone[each]) for each in (name, "age", "acb")] == [SparseLinear, nn.Linear, nn.Linear]


def test_a_layer_under_two_names_goes_by_both():
    def net():
        net = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
        net["c"] = net["a"]
        return net

    assert type(sparsekd.sparsify(net(), include=["c"])["a"]) is SparseLinear
    model = sparsekd.sparsify(net(), exclude=["c"])
    assert type(model["a"]) is nn.Linear and type(model["b"]) is SparseLinear


def test_a_pattern_may_depend_on_the_layer():
    model = nn.Sequential(nn.Linear(32, 48), nn.Conv1d(24, 16, 3))
    sparsekd.sparsify(model, lambda layer: BlockPattern(1, layer.weight.shape[1]))
    assert [str(layer.pattern) for layer in model] == ["1x32", "1x24"]


class Reads(nn.Module):
    """Asks its layers what many forwards ask, and multiplies with a weight once more."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.back = nn.Conv1d(8, 32, 3), nn.Linear(32, 16), nn.Linear(16, 32)

    def forward(self, x):
        x = self.conv(x.to(self.conv.weight.dtype)).mean(-1).to(self.fc.weight.device)
        x = torch.relu(self.fc(x)) * self.fc.out_features / self.conv.kernel_size[0]
        return nn.functional.linear(x, self.fc.weight.t(), self.back.bias)


def test_a_forward_may_read_attributes_and_is_traced_as_when_dense():
    model, x = quiet(Reads(), density=0.5), torch.randn(2, 8, 9)
    want = model(x)
    dense = sparsekd.densify(copy.deepcopy(model))
    torch.testing.assert_close(want, dense(x), rtol=1e-5, atol=1e-6)
    graph = torch.fx.symbolic_trace(model)
    called = [
        [n.target for n in torch.fx.symbolic_trace(m).graph.nodes if n.op == "call_module"] for m in (model, dense)
    ]
    assert called[0] == called[1] == ["conv", "fc"]
    torch.testing.assert_close(graph(x), want)
    graph(x).sum().backward()
    assert model.fc.values.grad.abs().sum() > 0
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)


def test_hooks_run_once_in_a_traced_model():
    model, x = sparsekd.sparsify(nn.Sequential(nn.Linear(16, 16))), torch.randn(2, 16)
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_layers_take_keyword_calls_and_functional_gradients():
    layers = {
        SparseLinear(16, 32): torch.randn(2, 16),
        SparseConv1d(16, 32, 3): torch.randn(2, 16, 7),
        SparseConv2d(16, 32, 3): torch.randn(2, 16, 7, 7),
        SparseConv3d(16, 32, 1): torch.randn(2, 16, 3, 3, 3),
        SparseConvTranspose2d(16, 32, 3): torch.randn(2, 16, 7, 7),
    }
    for layer, x in layers.items():
        assert torch.equal(layer(input=x), layer(x))

        def total(parameters, layer=layer, x=x):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        total(dict(layer.named_parameters())).backward()
        grads = torch.func.grad(total)(dict(layer.named_parameters()))
        torch.testing.assert_close(grads["values"], layer.values.grad)


def test_models_built_under_inference_mode_are_converted():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    sparsekd.sparsify(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(model[0].weight, dense[0].weight)
    sparsekd.densify(model)


def test_scripted_layers_are_named():
    with pytest.warns(UserWarning, match=r"0: scripted \(Linear\): sparsify before torch.jit.script"):
        sparsekd.sparsify(nn.Sequential(torch.jit.script(nn.Linear(4, 4))))


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export_names_the_way_out(dynamo, tmp_path):
    model = sparsekd.sparsify(nn.Sequential(nn.Linear(16, 16)), density=0.5).eval()
    if dynamo:
        pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=r"export sparsekd.densify\(copy.deepcopy\(model\)\)"):
        torch.onnx.export(model, (torch.randn(2, 16),), str(tmp_path / "model.onnx"), dynamo=dynamo)


def test_torchscript_names_the_way_out():
    model, x = sparsekd.sparsify(nn.Sequential(nn.Linear(16, 16)), density=0.5), torch.randn(2, 16)
    with pytest.raises(
        RuntimeError, match=r"script sparsekd.densify\(copy.deepcopy\(model\)\), or use torch.jit.trace"
    ):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))


def test_layers_in_plain_containers_are_the_same_layers():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.first, self.second, self.third = [self.a], (self.b, 3), {"c": self.c}

        def forward(self, x):
            return self.third["c"](self.second[0](self.first[0](x)))

    model, x = sparsekd.sparsify(Listed(), density=0.5), torch.randn(2, 16)
    assert model.first[0] is model.a and model.second == (model.b, 3) and model.third["c"] is model.c
    model(x).sum().backward()
    assert all(layer.values.grad is not None for layer in (model.a, model.b, model.c))
    sparsekd.densify(model)
    assert [type(each) for each in (model.first[0], model.second[0], model.third["c"])] == [nn.Linear] * 3


def test_a_wrapped_model_is_refused():
    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = Wrapper(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="convert the model first, then wrap it"):
        sparsekd.sparsify(model)
    assert type(model.module[0]) is nn.Linear
    sparsekd.sparsify(model.module)
    sparsekd.sparsify(model)  # nothing to replace
    with pytest.raises(ValueError, match="convert the model first, then wrap it"):
        sparsekd.sparsify(model, density=0.5)  # blocks of a layer that is sparse already
    assert model.module[0].density == 1.0


def test_sparse_attention_is_saved_and_comes_back(tmp_path):
    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()

    saved, x = quiet(encoder(), density=0.5), torch.randn(2, 5, 32)
    checkpoint.save(saved, tmp_path / "m")
    loaded = checkpoint.load(encoder(), tmp_path / "m")
    assert type(loaded.layers[0].self_attn) is SparseMultiheadAttention
    with torch.no_grad():
        assert torch.equal(loaded(x), saved(x))
        assert torch.equal(copy.deepcopy(saved)(x), saved(x))
