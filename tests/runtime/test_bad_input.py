"""Whatever a file or a caller gets wrong is an error that says so, and never a crash."""

import copy
import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.backends import cpu
from sparsekd.freeze.deploy import CannotExport

from ..freeze.networks import ResNet, quick, trained
from .files import graph, write

pytestmark = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)

N = -1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = trained(ResNet()).eval()
    sparsekd.sparsify(model, density=0.5)
    path = tmp_path_factory.mktemp("exported") / "student.skd"
    quick(model, torch.randn(2, 3, 8, 8)).export(path)
    return path


def open_session(path, threads=1):
    return sparsekd.runtime.Session(path, threads=threads)


def header_of(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def changed(data: bytes, change) -> bytes:
    """The file after ``change(graph)``."""
    header, rest = header_of(data)
    described = json.loads(header["__metadata__"]["sparsekd"])
    change(described)
    header["__metadata__"]["sparsekd"] = json.dumps(described)
    return with_header(header, rest)


# ---- Files


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_session(tmp_path / "absent.skd")
    with pytest.raises(OSError, match="directory"):
        open_session(tmp_path)


@pytest.mark.parametrize("share", [0, 4, 8, 0.01, 0.5, 0.999])
def test_a_file_cut_short(share, exported, tmp_path):
    data = exported.read_bytes()
    (tmp_path / "short.skd").write_bytes(data[: share if isinstance(share, int) else int(share * len(data))])
    with pytest.raises(ValueError, match=r"sparsekd.Session: .*short.skd: .*cut short"):
        open_session(tmp_path / "short.skd")


def test_a_longer_file(exported, tmp_path):
    (tmp_path / "long.skd").write_bytes(exported.read_bytes() + b"more")
    with pytest.raises(ValueError, match="something was added"):
        open_session(tmp_path / "long.skd")


def test_a_file_of_another_program(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no exported network; FrozenModel.export"):
        open_session(tmp_path / "other.safetensors")
    frozen = quick(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    frozen.save(tmp_path / "saved.frozen")
    with pytest.raises(ValueError, match=r"load_frozen\(path, model\)"):
        sparsekd.load_frozen(tmp_path / "saved.frozen")


def test_a_newer_file(exported, tmp_path):
    (tmp_path / "new.skd").write_bytes(changed(exported.read_bytes(), lambda all: all.update(version=2)))
    with pytest.raises(ValueError, match="version 2 of the format, and this program knows version 1"):
        open_session(tmp_path / "new.skd")


WRONG = {
    "an unknown operation": lambda all: all["nodes"][0].update(op="warp"),
    "a value that is not there": lambda all: all["nodes"][0]["inputs"].__setitem__(0, 10**6),
    "a value read before it is made": lambda all: all["nodes"].reverse(),
    "a value made twice": lambda all: all["nodes"].append(all["nodes"][0]),
    "another shape": lambda all: all["values"][1]["shape"].__setitem__(1, 17),
    "a huge shape": lambda all: all["values"][0].update(shape=[-1, 2**39, 2**39]),
    "another type": lambda all: all["values"][0].update(dtype="int64"),
    "an unknown type": lambda all: all["values"][0].update(dtype="float8"),
    "a tensor that is not there": lambda all: all["nodes"][0]["attributes"].update(weight="absent"),
    "another block": lambda all: all["nodes"][1]["attributes"].update(block=[1, 16]),
    "another stride": lambda all: all["nodes"][0]["attributes"].update(stride=[0, 1]),
    "a stride without end": lambda all: all["nodes"][0]["attributes"].update(stride=[2**62, 1]),
    "other groups": lambda all: all["nodes"][0]["attributes"].update(groups=5),
    "an unknown activation": lambda all: all["nodes"][0]["attributes"].update(activation="magic"),
    "no plan": lambda all: all.pop("plan"),
    "no attributes": lambda all: all["nodes"][0].pop("attributes"),
    "no outputs": lambda all: all.update(outputs=[]),
    "two inputs of a name": lambda all: all["inputs"].append(all["inputs"][0]),
    "a negative number of images": lambda all: all["plan"].update(images=-1),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_graph_that_says_something_else(name, exported, tmp_path):
    (tmp_path / "wrong.skd").write_bytes(changed(exported.read_bytes(), WRONG[name]))
    with pytest.raises(ValueError, match=r"sparsekd.Session: .*wrong.skd: "):
        open_session(tmp_path / "wrong.skd")


def test_a_name_that_is_no_text(exported, tmp_path):
    data = exported.read_bytes()
    assert b'"output\\"' in data  # a text within a text
    (tmp_path / "wrong.skd").write_bytes(data.replace(b'"output\\"', b'"out\xffut\\"'))
    with pytest.raises(ValueError, match=r"sparsekd.Session: .*wrong.skd is damaged: a name is no text"):
        open_session(tmp_path / "wrong.skd")


@pytest.mark.parametrize("part", ["row_ptr", "col_idx"])
@pytest.mark.parametrize("number", [-1, 2**30, 7])
def test_blocks_that_are_not_there(part, number, exported, tmp_path):
    data = bytearray(exported.read_bytes())
    header, rest = header_of(bytes(data))
    name = next(name for name in header if name.endswith(part))
    start = len(data) - len(rest) + header[name]["data_offsets"][0]
    struct.pack_into("<i", data, start + 4, number)
    (tmp_path / "wrong.skd").write_bytes(data)
    try:
        open_session(tmp_path / "wrong.skd")
    except ValueError as error:
        assert part in str(error)
    else:
        assert number == 7, "a block outside of the weight was taken"


def test_random_changes_of_a_file_are_errors_or_answers(exported, tmp_path):
    """In a process of its own: a crash would be this process's."""
    code = """
import random, sys
import numpy as np
from sparsekd.runtime import Session
data, path, seed = open(sys.argv[1], "rb").read(), sys.argv[2], int(sys.argv[3])
rng, header = random.Random(seed), 8 + int.from_bytes(data[:8], "little")
x, opened = np.ones((2, 3, 8, 8), np.float32), 0
for turn in range(600):
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(header if rng.random() < 0.8 else len(data))
        if rng.random() < 0.2:
            del changed[place : place + rng.randint(1, 9)]
        else:
            byte = rng.choice(b"0123456789-[]{},") if rng.random() < 0.7 else rng.randrange(256)
            changed[place % len(changed)] = byte
    open(path, "wb").write(changed)
    try:
        session = Session(path, threads=1)
        session(x)
        opened += 1
    except (ValueError, TypeError, IndexError, MemoryError):
        pass
print(opened)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported), str(tmp_path / "changed.skd"), "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 600


# ---- Callers


def test_wrong_inputs_are_named(exported):
    session = open_session(exported)
    x = np.zeros((2, 3, 8, 8), np.float32)
    with pytest.raises(KeyError, match=r"expected inputs named \['x'\], got \['y'\]"):
        session.run({"y": x})
    with pytest.raises(ValueError, match=r"expected 'x' of shape \[N, 3, 8, 8\], got \[2, 3, 8\]"):
        session(x[..., 0])
    with pytest.raises(ValueError, match=r"expected 'x' of shape \[N, 3, 8, 8\], got \[2, 4, 8, 8\]"):
        session(np.zeros((2, 4, 8, 8), np.float32))
    with pytest.raises(TypeError, match=r"'x' of the type float32, got float64; use x.astype"):
        session(x.astype(np.float64))
    with pytest.raises(TypeError, match=r"'x' of the type float32, got >f4"):
        session(x.astype(">f4"))
    with pytest.raises(TypeError, match="expected a numpy array for 'x', got list"):
        session([[1.0]])
    with pytest.raises(ValueError, match="expected 1 inputs, got 2"):
        session(x, x)
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        open_session(exported, threads=0)
    for threads in (1.5, "2"):
        with pytest.raises(TypeError, match=f"threads must be a whole number, 1 or more, got {threads!r}"):
            open_session(exported, threads=threads)
    with pytest.raises(ValueError, match="dimensions"):
        session(np.zeros((1,) * 12, np.float32))


def test_wrong_tensors_are_named(exported):
    network = sparsekd.load_frozen(exported)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=rf"LoadedNetwork: expected 'x' .* float32, got {dtype}; use x.float\(\)"):
            network(torch.zeros(2, 3, 8, 8, dtype=dtype))


def test_a_network_of_a_file_is_no_data_for_pickle_and_is_its_own_copy(exported):
    network = sparsekd.load_frozen(exported)
    for one in (network, network.session):
        with pytest.raises(TypeError, match=rf"sparsekd.{type(one).__name__}: .* no data for pickle; hand its file"):
            pickle.dumps(one)
        assert copy.deepcopy([one])[0] is one and copy.copy(one) is one


def test_a_model_beside_an_exported_file_is_too_much(exported):
    with pytest.raises(ValueError, match=r"leave the model out: load_frozen\(path\)"):
        sparsekd.load_frozen(exported, ResNet())


def test_an_empty_batch_has_an_empty_answer(exported):
    assert open_session(exported)(np.zeros((0, 3, 8, 8), np.float32)).shape == (0, 7)


def test_inputs_of_unlike_batches(tmp_path):
    described = graph("add", [((N, 3), "float32"), ((N, 3), "float32")], [((N, 3), "float32")])
    session = open_session(write(tmp_path / "graph.skd", described))
    with pytest.raises(ValueError, match=r"'x1' of shape \[N, 3\], got \[4, 3\] where N is 2"):
        session(np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32))


def test_nan_is_answered_as_torch_answers(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    quick(model, torch.randn(2, 6)).export(tmp_path / "nan.skd")
    x = torch.randn(4, 6)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    got = torch.from_numpy(open_session(tmp_path / "nan.skd")(x.numpy()))
    torch.testing.assert_close(got, model(x).detach(), equal_nan=True)


def test_another_instruction_set_is_named(exported, tmp_path):
    (tmp_path / "other.skd").write_bytes(changed(exported.read_bytes(), lambda all: all["plan"].update(isa="avx9")))
    session = open_session(tmp_path / "other.skd")
    assert session.note == f"timed with avx9, which this processor lacks, runs with {cpu.isa()}"
    x = np.ones((1, 3, 8, 8), np.float32)
    np.testing.assert_array_equal(session(x), open_session(exported)(x))


def test_two_processes_map_one_file(exported):
    code = (
        "import sys, numpy as np; from sparsekd.runtime import Session; session = Session(sys.argv[1], threads=1)\n"
        "print(repr(session(np.ones((1, 3, 8, 8), np.float32)).tolist()))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(exported)], stdout=subprocess.PIPE) for _ in range(2)]
    said = [one.communicate(timeout=60)[0] for one in both]
    assert said[0] == said[1] and len(said[0]) > 10 and not any(one.returncode for one in both)


# ---- Networks that no file can hold


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.sort(self.layer(x))[0]


def test_an_unknown_operation_is_named_and_nothing_is_written(tmp_path):
    frozen = quick(Sorted().eval(), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"sparsekd.export: sort \(sort\) is not among the operations"):
        frozen.export(tmp_path / "sorted.skd")
    assert not list(tmp_path.iterdir())


def test_what_is_changed_in_place_and_read_again_is_refused(tmp_path):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            z = y.tanh()
            z.add_(1.0)
            return z + torch.sigmoid(z)

    frozen = quick(Changed().eval(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="in place"):
        frozen.export(tmp_path / "changed.skd")


class ByBatch(nn.Module):
    """What its forward does follows from the batch size."""

    def __init__(self, other):
        super().__init__()
        self.layer, self.other = nn.Linear(10, 30), other

    def forward(self, x):
        return self.layer(x) * (2 if self.other(x.shape[0]) else 1)


BY_BATCH = {
    "more than": (lambda n: n > 4, r"x.size\(\)\[0\] <= 4"),
    "many more than": (lambda n: n > 100_000, r"x.size\(\)\[0\] <= 100000"),
    "one of many": (lambda n: n % 32 == 31, r"x.size\(\)\[0\] % 32"),
}


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) - self.layer(x).mean(0, keepdim=True)


def test_what_mixes_the_batch_is_refused_by_the_name_of_its_node(tmp_path):
    frozen = quick(Centred().eval(), torch.randn(2, 4))
    with pytest.raises(CannotExport, match=r"^sparsekd.export: the node 'mean' \(mean\): it reduces the batch"):
        frozen.export(tmp_path / "centred.skd")
    assert not list(tmp_path.iterdir())


def test_integers_of_another_shape_are_refused(monkeypatch, tmp_path):
    class Best(nn.Sequential):
        def forward(self, x):
            return super().forward(x).topk(2)[1]

    class Wrong(sparsekd.runtime.Session):
        def __init__(self, path, threads):
            super().__init__(path, threads)
            right = self._run
            self._run = lambda inputs: [y[:, :1] for y in right(inputs)]

    frozen = quick(Best(nn.Linear(4, 3)).eval(), torch.randn(2, 4))
    frozen.export(tmp_path / "right.skd")
    monkeypatch.setattr(sparsekd.runtime, "Session", Wrong)
    with pytest.raises(RuntimeError, match=r"int64 \[1, 1\] where it gives int64 \[1, 2\]"):
        frozen.export(tmp_path / "wrong.skd")


@pytest.mark.parametrize("name", BY_BATCH)
@pytest.mark.parametrize("eager", [False, True])
def test_another_path_for_another_batch_is_refused(name, eager, tmp_path, monkeypatch):
    other, guard = BY_BATCH[name]
    if eager:  # as if torch's own layers were faster
        freezing = sys.modules["sparsekd.freeze.freeze"]
        taken = lambda runs, *_: {run: 1.0 if run == freezing.DENSE else 100.0 for run in runs}  # noqa: E731
        monkeypatch.setattr(freezing, "time_networks", taken)
    frozen = quick(ByBatch(other).eval(), torch.randn(2, 10), min_gain=1.0 if eager else 0.0)
    assert frozen.plan.eager is eager
    with pytest.raises(ValueError, match=rf"sparsekd.export: .*{guard}.*FrozenModel.save"):
        frozen.export(tmp_path / "network.skd")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_wrong_on_several_threads_is_refused(monkeypatch, tmp_path):
    class Wrong(sparsekd.runtime.Session):
        def __init__(self, path, threads):
            super().__init__(path, threads)
            right = self._run
            self._run = lambda inputs: [y + (threads > 1) for y in right(inputs)]

    monkeypatch.setattr(sparsekd.runtime, "Session", Wrong)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(RuntimeError, match=r"answers otherwise .* for output with threads=2"):
        quick(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)).export(tmp_path / "network.skd")
