"""Round trips to the bit, and no damage that goes unnoticed."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsekd import BlockPattern, checkpoint, densify, sparsify
from sparsekd.convert import SPARSE_TYPES


def network(width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 20, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 5),
    )


def state_equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def sparse_network() -> nn.Module:
    return sparsify(network(), BlockPattern(8, 2), density=0.4, exclude=["6"])


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(network, id="into dense"),
        pytest.param(lambda: sparsify(network(), BlockPattern(8, 2), 0.9, exclude=["6"]), id="into other blocks"),
        pytest.param(lambda: sparsify(network(), BlockPattern(16, 1), 0.5), id="into another pattern, more layers"),
    ],
)
def test_sparse_model_comes_back_to_the_bit(tmp_path, prepare):
    saved = sparse_network()
    checkpoint.save(saved, tmp_path / "m.safetensors", epoch=3, note="né")
    loaded = checkpoint.load(prepare(), tmp_path / "m.safetensors")
    assert state_equal(saved, loaded)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in saved.modules()]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(x), saved.eval()(x))
    assert checkpoint.metadata(tmp_path / "m.safetensors") == {"epoch": 3, "note": "né"}


def test_dense_file_makes_a_sparse_model_dense(tmp_path):
    saved = network()
    checkpoint.save(saved, tmp_path / "m.safetensors")
    loaded = checkpoint.load(sparse_network(), tmp_path / "m.safetensors")
    assert state_equal(saved, loaded)
    assert not any(isinstance(m, SPARSE_TYPES) for m in loaded.modules())


def test_sparse_file_is_smaller_by_what_was_dropped(tmp_path):
    model = nn.Sequential(nn.Conv2d(64, 128, 3))
    checkpoint.save(model, tmp_path / "dense")
    checkpoint.save(sparsify(model, density=0.25), tmp_path / "sparse")
    assert (tmp_path / "sparse").stat().st_size < 0.3 * (tmp_path / "dense").stat().st_size


def test_tied_weights(tmp_path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    saved = tied()
    checkpoint.save(saved, tmp_path / "m")
    assert state_equal(saved, checkpoint.load(tied(), tmp_path / "m"))


def test_another_model_is_refused_and_left_untouched(tmp_path):
    checkpoint.save(sparse_network(), tmp_path / "m")
    other = network(width=32)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"0\.weight is \[24, 3, 3, 3\] in the file and \[32, 3, 3, 3\]"):
        checkpoint.load(other, tmp_path / "m")
    with pytest.raises(ValueError, match=r"0\.weight is \[24, 3, 3, 3\] in the file and missing in the model"):
        checkpoint.load(nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), tmp_path / "m")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("damage", ["truncated", "header", "one bit", "empty", "text"])
def test_damage_is_found(tmp_path, damage):
    path = tmp_path / "m"
    checkpoint.save(sparse_network(), path)
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[-5] ^= 1
    damaged = {
        "truncated": data[: len(data) // 2],
        "header": b"\xff" * 8 + bytes(data[8:]),
        "one bit": data,
        "empty": b"",
        "text": b"not a checkpoint, a text file",
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="corrupt"):
        checkpoint.load(network(), path)


def test_indices_that_do_not_fit_are_found(tmp_path):
    model = sparse_network()
    model[0].col_idx[0] = 999  # as a faulty program would save it
    checkpoint.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="col_idx"):
        checkpoint.load(network(), tmp_path / "m")


def test_foreign_and_newer_files(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="another program"):
        checkpoint.load(network(), tmp_path / "foreign")
    checkpoint.save_state({"epoch": 1}, tmp_path / "state")
    with pytest.raises(
        ValueError, match=r"expected a sparsekd-model file, got sparsekd-state .*`sparsekd.load_frozen` what"
    ):
        checkpoint.load(network(), tmp_path / "state")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.load(network(), tmp_path / "absent")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 7)
        checkpoint.save(network(), tmp_path / "newer")
    with pytest.raises(ValueError, match="version 7"):
        checkpoint.load(network(), tmp_path / "newer")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "m"
    old = densify(sparse_network())
    checkpoint.save(old, path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(network(), path)
    assert os.listdir(tmp_path) == ["m"]
    assert state_equal(old, checkpoint.load(network(), path))


def test_state_round_trip(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "history": [{"loss": 0.1 + 0.2, "pruned": True, "at": None, (1, "a"): float("inf")}],
        "empty": {},
        "scalar": torch.tensor(3),
        "no elements": torch.zeros(0, 4),
    }
    checkpoint.save_state(state, tmp_path / "s")
    back = checkpoint.load_state(tmp_path / "s")
    assert back["history"] == state["history"] and back["empty"] == {}
    assert torch.equal(back["rng"], state["rng"]) and back["scalar"].shape == () and back["no elements"].shape == (0, 4)
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]  # tuples stay tuples
    for index, entry in state["optimizer"]["state"].items():
        assert all(torch.equal(entry[key], back["optimizer"]["state"][index][key]) for key in entry)


def test_state_of_unknown_type_is_refused(tmp_path):
    with pytest.raises(TypeError, match="got set"):
        checkpoint.save_state({"a": {1}}, tmp_path / "s")
    assert not os.listdir(tmp_path)


def test_no_pickle(tmp_path):
    checkpoint.save(sparse_network(), tmp_path / "m", a=1)
    data = (tmp_path / "m").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["sparsekd"])
    assert header["sparse"]["3"] == {"pattern": [8, 2], "shape": [20, 24, 3, 3]}


class Shared(nn.Module):
    """One layer under two names, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.a = nn.Linear(32, 32)
        self.b = self.a
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(self.embedding(x)))))


def test_shared_layers_and_weights_are_shared_after_loading(tmp_path):
    saved = sparsify(Shared(), density=0.5, exclude=["head"])
    checkpoint.save(saved, tmp_path / "m")
    x = torch.randint(0, 50, (2, 7))
    for into in (Shared(), sparsify(Shared(), BlockPattern(8, 2), exclude=["head"])):
        loaded = checkpoint.load(into, tmp_path / "m")
        assert loaded.a is loaded.b and loaded.head.weight is loaded.embedding.weight
        assert torch.equal(loaded(x), saved(x))


class Stateful(nn.Module):
    """With state that is no tensor, and a version that its loading asks for, as torchvision's MNASNet has."""

    _version = 2

    def __init__(self, steps=0):
        super().__init__()
        self.fc, self.steps = nn.Linear(32, 32), {"steps": steps, "last": torch.arange(steps), "shape": (1, 2)}

    def forward(self, x):
        return self.fc(x)

    def get_extra_state(self):
        return self.steps

    def set_extra_state(self, state):
        self.steps = state

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("density", [None, 0.5])
def test_extra_state_and_versions_come_back(tmp_path, density):
    saved = nn.Sequential(Stateful(3))
    if density:
        sparsify(saved, density=density)
    checkpoint.save(saved, tmp_path / "m")
    loaded = checkpoint.load(nn.Sequential(Stateful()), tmp_path / "m")
    assert torch.equal(loaded[0].steps.pop("last"), torch.arange(3))
    assert loaded[0].steps == {"steps": 3, "shape": (1, 2)}
    assert torch.equal(loaded[0].fc.weight, saved[0].fc.weight)


def test_a_version_is_that_of_the_file_and_where_it_names_none_that_of_today(tmp_path, monkeypatch):
    checkpoint.save(nn.Sequential(Stateful(1)), tmp_path / "m")
    seen = []
    monkeypatch.setattr(Stateful, "_version", 3)
    monkeypatch.setattr(Stateful, "_load_from_state_dict", lambda self, state, prefix, meta, *rest: seen.append(meta))
    checkpoint.load(nn.Sequential(Stateful()), tmp_path / "m")
    assert seen == [{"version": 2}]
    checkpoint.save(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), tmp_path / "plain")
    loaded = checkpoint.load(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), tmp_path / "plain")
    assert int(loaded[1].num_batches_tracked) == 0
    data = (tmp_path / "plain").read_bytes()
    assert b"versions" not in data and b"extra" not in data  # what needs neither is written as ever


def test_state_that_no_file_can_hold_is_refused(tmp_path):
    model = Stateful()
    model.steps = {"a": {1}}
    with pytest.raises(TypeError, match=r"extra state .*_extra_state.* of the model: .* got set"):
        checkpoint.save(model, tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_a_model_that_cannot_become_sparse_is_left_untouched(tmp_path):
    checkpoint.save(sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), tmp_path / "m")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(ValueError, match="meta device"):
        checkpoint.load(model, tmp_path / "m")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_links_stay_links_and_long_names_are_written(tmp_path):
    model = nn.Linear(4, 4)
    checkpoint.save(model, tmp_path / ("x" * 250))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for _ in range(2):  # once to a file that is not there yet
        checkpoint.save(model, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").is_file()
    assert sorted(os.listdir(tmp_path / "folder")) == ["file"]
    assert state_equal(model, checkpoint.load(nn.Linear(4, 4), tmp_path / "link"))


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"device, pipe or socket, .* give the path of a file"):
        checkpoint.save(nn.Linear(4, 4), tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        checkpoint.save(nn.Linear(4, 4), tmp_path)
    assert os.listdir(tmp_path) == ["pipe"]
