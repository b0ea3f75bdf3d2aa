"""Files of frozen networks that were changed, with a right checksum: refused by a ValueError, or the same answer."""

import copy
import random
import sys
from functools import partial

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import checkpoint
from sparsekd.freeze import load_frozen
from sparsekd.freeze.source import in_eager_mode

from .networks import quick, trained

load = sys.modules["sparsekd.freeze.load"]

CHANGES, MORE_CHANGES = 700, 2000  # the latter of the slow run


def network() -> nn.Module:
    """Small, so that thousands of files are read in seconds; with a norm, a residual, a pool and a map of places."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
            self.place, self.head, self.prelu = nn.Parameter(torch.randn(1, 8, 4, 4)), nn.Linear(8, 3), nn.PReLU(8)

        def forward(self, x):
            x = torch.relu(self.norm(self.one(x)))
            x = self.prelu(torch.relu(self.two(x) + x) * self.place)
            return self.head(x.mean((2, 3)))

    return Net()


VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**40, -(2**40), 0.5, -1.0, 1e300, "", "exec", "0", "dense", "sparse", "relu"),
    *([], {}, (), [0], {"a": 1}, (1, 2), torch.zeros(0), torch.zeros(3), torch.ones(8, 8, 1, 1), torch.zeros(1).long()),
)


def places(tree, path=()):
    """The path of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def put(tree, path, change):
    """The tree with ``change(container, key)`` applied to the container of ``path``; tuples are made anew."""
    if len(path) == 1:
        container = list(tree) if isinstance(tree, tuple) else tree
        change(container, path[0])
        return tuple(container) if isinstance(tree, tuple) else container
    new = put(tree[path[0]], path[1:], change)
    if isinstance(tree, tuple):
        return (*tree[: path[0]], new, *tree[path[0] + 1 :])
    tree[path[0]] = new
    return tree


def changed(state, dice: random.Random, number: int):
    """A copy of the state with one or two things changed. number: of the change; of so many in a row as there are
    entries of a file and kinds of change, each entry meets each kind once, however much is in it."""
    tensors = [x for x in map(partial(at, state), places(state)) if isinstance(x, torch.Tensor)]
    state = copy.deepcopy(state, {id(x): x for x in tensors})  # no change writes into one
    for turn in range(dice.choice((1, 1, 1, 2))):
        every = list(places(state))
        if not every:
            break
        entries = sorted({path[0] for path in every}, key=str)
        which = (number if turn == 0 else dice.randrange(2**20)) % (len(entries) * len(KINDS))
        path = dice.choice([one for one in every if one[0] == entries[which // len(KINDS)]])
        state = put(state, path, KINDS[which % len(KINDS)](state, path, dice))
    return state


def _replace(state, path, dice):
    value = dice.choice(VALUES)
    return lambda container, key: container.__setitem__(key, copy.deepcopy(value))


def _remove(state, path, dice):
    return lambda container, key: container.__delitem__(key)


def _rename(state, path, dice):
    def change(container, key):
        if isinstance(container, dict):
            container[dice.choice(("other", "0", f"{key}_", 3))] = container.pop(key)
        else:
            container.append(copy.deepcopy(container[key]))

    return change


def _nudge(state, path, dice):
    """Another value of the same kind."""

    def change(container, key):
        value = container[key]
        if isinstance(value, bool):
            container[key] = not value
        elif isinstance(value, (int, float)):
            container[key] = value + dice.choice((-1, 1, 2, 10))
        elif isinstance(value, str):
            container[key] = dice.choice((f"{value}x", value[:-1], value.upper()))
        elif isinstance(value, torch.Tensor) and value.numel():
            container[key] = dice.choice(TENSORS)(value)
        elif isinstance(value, dict):
            keys = list(value)
            dice.shuffle(keys)
            container[key] = {one: value[one] for one in keys}
        elif isinstance(value, (list, tuple)):
            container[key] = type(value)(dice.sample(list(value), len(value)))

    return change


def _swap(state, path, dice):
    """Something else of the file in this place."""
    other = dice.choice([one for one in places(state) if one[-1] == path[-1]])
    value = at(state, other)
    return lambda container, key: container.__setitem__(key, copy.deepcopy(value))


TENSORS = (
    lambda x: x[:-1] if x.dim() else x.reshape(1),
    lambda x: x + 1,
    lambda x: x * 2 if x.is_floating_point() else x.flip(0) if x.dim() else x,
    lambda x: x.double(),
    lambda x: x.int(),
    lambda x: x.flip(0) if x.dim() else x,
    lambda x: torch.full_like(x, 2**30) if not x.is_floating_point() else x * float("nan"),
    lambda x: x.unsqueeze(0),
)
KINDS = (_replace, _remove, _rename, _nudge, _swap)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    model = trained(network())
    model = sparsekd.sparsify(model, density=0.5)
    path = tmp_path_factory.mktemp("fuzz") / "frozen"
    frozen = quick(model, torch.randn(2, 3, 4, 4))
    frozen.save(path)
    return frozen, checkpoint.load_state(path), path


def check(read, frozen, inputs, change) -> bool:
    """Whether the file was refused; fails if it gives another answer, or raises anything but a ValueError."""
    try:
        loaded = read()
    except ValueError:
        return True
    except BaseException as error:
        pytest.fail(f"change {change}: {type(error).__name__}: {error}")
    got, want = loaded(*inputs), frozen(*inputs)
    assert (got - want).abs().max() <= 1e-3 * want.abs().max(), f"change {change}"
    return False


@pytest.fixture
def traced_once(monkeypatch):
    """A trace is of the fresh model alone, whatever a file says, and most of the time that reading one takes."""
    known, trace_by = {}, load.trace_by

    def trace(method, model, call, inputs):
        key = (method, str(call.to_dict()), tuple((x.shape, x.dtype) for x in inputs))
        if key not in known:
            known[key] = trace_by(method, model, call, inputs)
        return known[key]

    monkeypatch.setattr(load, "trace_by", trace)


@pytest.mark.parametrize(
    ("changes", "seed"), [(CHANGES, 0), pytest.param(MORE_CHANGES, 1, marks=pytest.mark.slow)], ids=["some", "more"]
)
def test_a_changed_file_is_refused_or_gives_the_same_answer(written, traced_once, changes, seed):
    frozen, state, _ = written
    fresh, x = network().eval(), torch.randn(2, 3, 4, 4)
    dice = random.Random(seed)
    refused = 0
    for number in range(changes):
        other = changed(state, dice, number)

        def read(other=other):
            with in_eager_mode():
                return load.build(other, fresh, 1)

        refused += check(read, frozen, (x,), number)
    assert 0.6 * changes < refused < changes
    with in_eager_mode():  # what was saved is as it was
        torch.testing.assert_close(load.build(state, fresh, 1)(x), frozen(x))


def test_and_so_through_the_disk(written, tmp_path):
    frozen, state, _ = written
    x, dice = torch.randn(2, 3, 4, 4), random.Random(1)
    for number in range(50):
        try:
            checkpoint.save_state(changed(state, dice, 7 * number), tmp_path / "other")
        except (TypeError, ValueError):  # what no file can hold
            continue
        check(lambda: load_frozen(tmp_path / "other", network()), frozen, (x,), number)


def test_files_of_what_the_issue_named(written, tmp_path):
    _, state, _ = written
    changes = {
        "a site gone": lambda s: s["sites"].pop(1),
        "no nodes": lambda s: s.__setitem__("nodes", {}),
        "no layers": lambda s: s["layers"].clear(),
        "another activation": lambda s: s["sites"][0].__setitem__("activation", "exec"),
        "no plan": lambda s: s.pop("plan"),
        "no inputs": lambda s: s.__setitem__("inputs", None),
        "weights of another layer": lambda s: s["rest"].__setitem__("prelu.weight", torch.ones(8)),
    }
    for change in changes.values():
        other = copy.deepcopy(state)
        change(other)
        checkpoint.save_state(other, tmp_path / "other")
        with pytest.raises(ValueError, match=r"sparsekd\.load_frozen: .*(belongs to another model|is damaged)"):
            load_frozen(tmp_path / "other", network())


def test_a_file_nested_without_end(written, tmp_path):
    _, state, path = written
    deep: list = []
    for _ in range(400):
        deep = [deep]
    checkpoint.save_state({**state, "call": deep}, tmp_path / "other")
    with pytest.raises(ValueError, match="damaged"):
        load_frozen(tmp_path / "other", network())
    assert path.exists()
