"""The task networks: shapes, taps, tracing, and that training starts from the first-order prediction."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sparsekd import models
from sparsekd.data.parts import Rows
from sparsekd.data.task import Recipe, Task


def make_task(kind: str, rows: int = 12) -> Task:
    generator = torch.Generator().manual_seed(1)

    def part() -> Rows:
        if kind == "features":
            inputs: tuple[torch.Tensor, ...] = (torch.randn(rows, 9, generator=generator),)
        else:
            inputs = (
                torch.randn(rows, 6, generator=generator),
                torch.randn(rows, 8, generator=generator),
                torch.rand(rows, generator=generator) * 4 + 1,
            )
        return Rows(inputs, torch.rand(rows, generator=generator) * 4 + 1, inputs[-1].reshape(rows, -1).numpy())

    sizes = {"features": 9} if kind == "features" else {"user_features": 6, "item_features": 8}
    recipe = Recipe(lr=1e-3, weight_decay=0.0, epochs=1, batch_size=4, dropout=0.2)
    return Task("made up", kind, part(), part(), part(), sizes, 3.0, (1.0, 5.0), "none", recipe, recipe)


KINDS = pytest.mark.parametrize("kind", ["ratings", "features"])
SIZES = pytest.mark.parametrize("make", [models.student, models.teacher])


@KINDS
@SIZES
def test_output_is_one_number_a_row_and_starts_first_order(kind, make):
    task = make_task(kind)
    model = make(task)
    prediction = model(*task.train.inputs)
    expected = task.train.inputs[2] if kind == "ratings" else torch.full((12,), 3.0)
    torch.testing.assert_close(prediction, expected)


@KINDS
@SIZES
def test_taps_are_post_relu_maps_from_shallow_to_deep(kind, make):
    task = make_task(kind)
    model = make(task).eval()
    seen: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    for name in model.tap_names:
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    model(*task.test.inputs)
    assert tuple(seen) == tuple(model.tap_names)
    sizes = [tuple(seen[name].shape[2:]) for name in model.tap_names]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == (8, 8) and sizes[-1] == (4, 4)
    for out in seen.values():
        assert out.min() == 0 and out.max() > 0 and out.shape[1] % 16 == 0
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@KINDS
def test_teacher_is_wider_than_student_and_conv_channels_fill_blocks(kind):
    task = make_task(kind)
    convs = {
        make: [m for m in make(task).modules() if isinstance(m, nn.Conv2d)] for make in (models.student, models.teacher)
    }
    assert all(conv.out_channels % 16 == 0 for layers in convs.values() for conv in layers)
    weights = {make: sum(conv.weight.numel() for conv in layers) for make, layers in convs.items()}
    assert weights[models.teacher] > 2 * weights[models.student]


@KINDS
def test_convolutions_are_most_of_the_work(kind):
    task = make_task(kind)
    model = models.student(task).eval()
    work = {nn.Conv2d: 0, nn.Linear: 0}

    def count(module, _inputs, output):
        work[type(module)] += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if type(module) in work:
            module.register_forward_hook(count)
    model(*(x[:1] for x in task.test.inputs))
    assert 1e6 < work[nn.Conv2d] < 3e6 and work[nn.Linear] < 0.05 * work[nn.Conv2d]


@KINDS
def test_fx_traces_it_and_gives_the_same_answer(kind):
    task = make_task(kind)
    model = models.student(task).eval()
    nn.init.normal_(model.cnn.head.weight)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(*task.test.inputs), model(*task.test.inputs))
    one_row = tuple(x[:1] for x in task.test.inputs)
    assert torch.equal(traced(*one_row), model(*one_row))


@KINDS
def test_every_parameter_learns(kind):
    """All weights move in three steps: the head starts at zero, what lies below it moves from the second step on."""
    task = make_task(kind)
    model = models.student(task)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(*task.train.inputs), task.train.target).backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


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
    task = make_task("ratings")
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.student(task).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@KINDS
def test_a_ridge_start_is_the_weighted_least_squares_fit_and_stays(kind):
    task = make_task(kind, rows=40)
    task = dataclasses.replace(
        task, train=dataclasses.replace(task.train, weight=np.linspace(0, 2, 40, dtype=np.float32))
    )
    model = models.build(task, models.STUDENT, dataclasses.replace(task.student_recipe, ridge=1e-9))
    prior = task.train.inputs[2] if kind == "ratings" else torch.zeros(40)
    table = torch.cat(task.train.inputs[:2], 1) if kind == "ratings" else task.train.inputs[0]
    table = torch.cat([table, torch.ones(40, 1)], 1).double()
    root = torch.from_numpy(task.train.weight).double().sqrt()
    fit = torch.linalg.lstsq(table * root[:, None], (task.train.target - prior).double() * root).solution
    torch.testing.assert_close(model(*task.train.inputs), (table @ fit).float() + prior, atol=1e-4, rtol=0)
    assert not any(parameter.requires_grad for parameter in model.linear.parameters())
