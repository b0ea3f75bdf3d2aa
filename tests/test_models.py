"""The task networks: shapes, taps, tracing, and that training starts from the first-order prediction."""

import pytest
import torch
from torch import nn

from sparsekd import models
from sparsekd.models.maps import in_training_layout

SIZES = {"features": 9, "user_features": 6, "item_features": 8}


def make(kind: str, shape: models.Shape = models.STUDENT) -> models.RatingCNN | models.FeatureCNN:
    if kind == "features":
        return models.FeatureCNN(SIZES, shape, 3.0, 0.2)
    return models.RatingCNN(SIZES, shape, 0.2)


def inputs_of(kind: str, rows: int = 12) -> tuple[torch.Tensor, ...]:
    if kind == "features":
        return (torch.randn(rows, 9),)
    return torch.randn(rows, 6), torch.randn(rows, 8), torch.rand(rows) * 4 + 1


KINDS = pytest.mark.parametrize("kind", ["ratings", "features"])
SHAPES = pytest.mark.parametrize("shape", [models.STUDENT, models.TEACHER], ids=["student", "teacher"])


@KINDS
@SHAPES
def test_output_is_one_number_a_row_and_starts_first_order(kind, shape):
    inputs = inputs_of(kind)
    prediction = make(kind, shape)(*inputs)
    expected = inputs[2] if kind == "ratings" else torch.full((12,), 3.0)
    torch.testing.assert_close(prediction, expected)


@KINDS
@SHAPES
def test_taps_are_post_relu_maps_from_shallow_to_deep(kind, shape):
    model = make(kind, shape).eval()
    seen: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    for name in model.tap_names:
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    model(*inputs_of(kind))
    assert tuple(seen) == tuple(model.tap_names)
    sizes = [tuple(seen[name].shape[2:]) for name in model.tap_names]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == (8, 8) and sizes[-1] == (4, 4)
    for out in seen.values():
        assert out.min() == 0 and out.max() > 0 and out.shape[1] % 16 == 0
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@KINDS
def test_teacher_is_wider_than_student_and_conv_channels_fill_blocks(kind):
    shapes = (models.STUDENT, models.TEACHER)
    convs = {shape: [m for m in make(kind, shape).modules() if isinstance(m, nn.Conv2d)] for shape in shapes}
    assert all(conv.out_channels % 16 == 0 for layers in convs.values() for conv in layers)
    weights = {shape: sum(conv.weight.numel() for conv in layers) for shape, layers in convs.items()}
    assert weights[models.TEACHER] > 2 * weights[models.STUDENT]


@KINDS
def test_convolutions_are_most_of_the_work(kind):
    model = make(kind).eval()
    work = {nn.Conv2d: 0, nn.Linear: 0}

    def count(module, _inputs, output):
        work[type(module)] += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if type(module) in work:
            module.register_forward_hook(count)
    model(*inputs_of(kind, rows=1))
    assert 1e6 < work[nn.Conv2d] < 3e6 and work[nn.Linear] < 0.05 * work[nn.Conv2d]


@KINDS
def test_fx_traces_it_and_gives_the_same_answer(kind):
    model, inputs = make(kind).eval(), inputs_of(kind)
    nn.init.normal_(model.cnn.head.weight)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(*inputs), model(*inputs))
    one_row = tuple(x[:1] for x in inputs)
    assert torch.equal(traced(*one_row), model(*one_row))


@KINDS
def test_every_parameter_learns(kind):
    """All weights move in three steps: the head starts at zero, what lies below it moves from the second step on."""
    model, inputs, target = make(kind), inputs_of(kind), torch.rand(12) * 4 + 1
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(*inputs), target).backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


@KINDS
def test_evaluation_in_the_layout_of_training_says_the_same(kind):
    model, inputs, seen = make(kind).eval(), inputs_of(kind), []
    nn.init.normal_(model.cnn.head.weight)
    model.cnn.stem[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        usual = model(*inputs)
        with in_training_layout(model):
            torch.testing.assert_close(model(*inputs), usual)
        model(*inputs)
    assert seen == [True, False, True]
    with pytest.raises(RuntimeError), in_training_layout(model):
        raise RuntimeError
    assert not model.cnn.channels_last
    with in_training_layout(model):
        with in_training_layout(model):
            pass
        assert model.cnn.channels_last  # as it was
    with in_training_layout(nn.Linear(2, 2)):
        pass


def test_interaction_maps_are_outer_products():
    cnn = models.MapCNN(models.Shape(maps=2, side=16), dropout=0.0)
    left, right = torch.randn(3, 32), torch.randn(3, 32)
    caught = []
    cnn.stem.register_forward_pre_hook(lambda _m, inputs: caught.append(inputs[0]))
    cnn(left, right)
    torch.testing.assert_close(
        caught[0], torch.einsum("bci,bcj->bcij", left.reshape(3, 2, 16), right.reshape(3, 2, 16))
    )


def test_same_seed_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(make("ratings").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
