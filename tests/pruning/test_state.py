"""Survivors go back to where they began, and a run goes on where it stopped."""

import pytest
import torch

from sparsekd import BlockPattern

from ..cases import through_files
from .common import (
    GRANULARITIES,
    OPTIMIZERS,
    Net,
    attached,
    batch,
    dense_weights,
    pruner_of,
    train_step,
)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rewinding_gives_the_survivors_their_first_values_bit_for_bit(granularity):
    net, pruner, optimizer = attached("adam", granularity)
    first = dense_weights(net)
    rest = {name: tensor.clone() for name, tensor in net.state_dict().items() if name.startswith(("bn", "head.b"))}
    for target in (0.3, 0.6):
        for _ in range(3):
            train_step(net, optimizer, *batch())
            pruner.after_step()
        pruner.prune_to(target)
        trained = dense_weights(net)
        pruner.rewind()
        for name, weight in dense_weights(net).items():
            assert torch.equal(weight, first[name] * (trained[name] != 0))
            assert not torch.equal(weight, trained[name])
        dead = {name: tensor for name, tensor in net.state_dict().items() if name in rest}
        assert all(torch.equal(dead[name][tensor != 0], rest[name][tensor != 0]) for name, tensor in dead.items())
        for parameter in net.parameters():
            assert not any(v.any() for v in optimizer.state[parameter].values())


def test_rewinding_only_the_weights_leaves_the_rest():
    net, pruner, optimizer = attached()
    first = dense_weights(net)
    for _ in range(3):
        train_step(net, optimizer, *batch())
    trained = {name: tensor.clone() for name, tensor in net.state_dict().items() if "bn" in name or "bias" in name}
    pruner.rewind(weights_only=True)
    assert all(torch.equal(weight, first[name]) for name, weight in dense_weights(net).items())
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in trained.items())


def test_late_rewinding_goes_back_to_the_snapshot():
    net, pruner, optimizer = attached()
    train_step(net, optimizer, *batch())
    pruner.snapshot()
    late = dense_weights(net)
    train_step(net, optimizer, *batch())
    pruner.prune_to(0.5)
    pruner.rewind()
    assert all(torch.equal(w, late[name] * (w != 0)) for name, w in dense_weights(net).items())
    with pytest.raises(RuntimeError, match="there is no theta0"):
        pruner_of(Net(), rewindable=False).rewind()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_after_a_reset_an_optimizer_steps_like_a_new_one(kind):
    net, pruner, optimizer = attached(kind)
    for _ in range(3):
        train_step(net, optimizer, *batch())
    pruner.rewind()
    x, y = batch()
    train_step(net, optimizer, x, y)
    stepped = dense_weights(net)
    pruner.rewind()
    train_step(net, OPTIMIZERS[kind](net.parameters()), x, y)
    assert all(torch.equal(weight, stepped[name]) for name, weight in dense_weights(net).items())


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(granularity, score, model_first):
    batches = [batch() for _ in range(12)]

    def build():
        torch.manual_seed(3)
        net, pruner, optimizer = attached("adam", granularity, score=score, example_inputs=(batches[0][0],))
        return net, pruner, optimizer

    def run(net, pruner, optimizer, steps):
        for step in steps:
            train_step(net, optimizer, *batches[step])
            pruner.after_step()
            if step in (2, 5, 9):
                pruner.prune_to(0.08 * step)
            if step == 9:
                pruner.rewind()

    whole = build()
    run(*whole, range(12))
    first = build()
    run(*first, range(7))
    model_state, pruner_state = (through_files(part.state_dict()) for part in first[:2])
    optimizer_state = first[2].state_dict()
    net, pruner, optimizer = build()
    if model_first:
        net.load_state_dict(model_state)
    pruner.load_state_dict(pruner_state)
    net.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    pruner.check()
    run(net, pruner, optimizer, range(7, 12))
    expected = whole[0].state_dict()
    assert net.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items())
    assert pruner.num_kept == whole[1].num_kept < 0.3 * pruner.num_weights


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: pruner_of(Net(12)), "expected layers"),
        (lambda: pruner_of(Net(), pattern=BlockPattern(16, 1)), "expected layers"),
        (lambda: pruner_of(Net(), "unstructured"), "expected granularity unstructured, got block"),
        (lambda: pruner_of(Net(), scope="layer"), "expected scope layer, got global"),
    ],
)
def test_the_state_of_another_pruner_is_refused(other, says):
    pruner = pruner_of(Net())
    pruner.prune_to(0.5)
    other = other()
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(pruner.state_dict())
    assert other.num_kept == other.num_weights


def test_a_state_knows_which_batch_norm_dies_with_which_filter():
    saved = pruner_of(Net()).state_dict()
    pruner = pruner_of(Net(), example_inputs=None)
    pruner.load_state_dict(through_files(saved))
    assert pruner.observed
    pruner.prune_to(0.5)


def test_a_broken_or_earlier_state_is_refused():
    pruner = pruner_of(Net())
    early = pruner.state_dict()
    broken = {key: value for key, value in early.items() if key != "mask.head"}
    with pytest.raises(ValueError, match=r"expected mask.head of shape .* got nothing"):
        pruner.load_state_dict(broken)
    with pytest.raises(ValueError, match="another model or another Pruner"):
        pruner.load_state_dict({})
    pruner.prune_to(0.5)
    with pytest.raises(ValueError, match="no longer has all the blocks"):
        pruner.load_state_dict(early)
