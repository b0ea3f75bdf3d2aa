"""The reader of CIFAR-100: both distributions, hostile pickles, balanced parts, crops."""

import dataclasses
import io
import os
import pickle

import numpy as np
import pytest
import torch

from sparsekd import data
from sparsekd.data import cifar100

from ..cifar import PER_CLASS, made_up, write


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, and numpy's names as they then were: what the real files hold."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    def save_array(self, array):
        self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n" + pickle.GLOBAL + b"numpy\nndarray\n")
        self.save((0,))
        self.save_string(b"b")
        self.write(pickle.TUPLE3 + pickle.REDUCE)
        self.write(pickle.MARK)
        self.save(1)
        self.save(array.shape)
        self.write(pickle.GLOBAL + b"numpy\ndtype\n")
        self.save_string(b"u1")
        self.save(0)
        self.save(1)
        self.write(pickle.TUPLE3 + pickle.REDUCE)
        self.save((3, b"|", None, None, None, -1, -1, 0))
        self.write(pickle.BUILD)
        self.save(False)
        self.save_string(array.tobytes())
        self.write(pickle.TUPLE + pickle.BUILD)

    dispatch[bytes] = save_string
    dispatch[np.ndarray] = save_array


def pickled(content) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(content)
    return stream.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _small_files():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar100, "IMAGES", {part: 100 * count for part, count in PER_CLASS.items()})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="module")
def task(folder):
    return data.load("cifar100", folder, validation=100)


def test_binary_and_python_versions_are_the_same(task, tmp_path):
    for part in PER_CLASS:
        images, labels = made_up(part)
        (tmp_path / part).write_bytes(pickled({b"data": images, b"fine_labels": labels.tolist()}))
    other = data.load("cifar100", tmp_path, validation=100)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(task, part).inputs[0], getattr(other, part).inputs[0])
        assert torch.equal(getattr(task, part).target, getattr(other, part).target)
    assert other.meta["sha256"].keys() == {"train", "test"}


def test_parts_are_balanced_and_do_not_overlap(task, folder):
    images, labels = made_up("train")
    counts = [torch.bincount(getattr(task, part).target, minlength=100) for part in ("train", "val", "test")]
    assert [set(count.tolist()) for count in counts] == [{5}, {1}, {2}]
    together = torch.cat([task.train.inputs[0], task.val.inputs[0]]).flatten(1).numpy()
    assert sorted(map(bytes, together)) == sorted(map(bytes, images))
    by_image = {bytes(image): label for image, label in zip(images, labels, strict=True)}
    assert [by_image[bytes(x)] for x in task.val.inputs[0].flatten(1).numpy()] == task.val.target.tolist()
    assert task.meta["identical_images"].startswith("1 groups of identical images, 1 of them across train and test")
    few = data.load("cifar100", folder, validation=100, images=200, test=100, pixels=8)
    assert [len(few.train), len(few.val), len(few.test)] == [200, 100, 100]
    assert torch.equal(few.val.target, task.val.target)  # held out whatever else is asked for
    blocks = task.val.inputs[0].float().unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    assert (few.val.inputs[0].float() - blocks).abs().max() <= 0.5


def test_files_that_are_not_the_whole_official_part_are_refused(folder, tmp_path):
    train_file, test_file = ((folder / "cifar-100-binary" / f"{part}.bin").read_bytes() for part in PER_CLASS)
    for first, second, message in (
        (train_file[: -100 * 3074], test_file, "train.bin must hold the 600 images of the official .* got 500"),
        (train_file, test_file[3074:], "test.bin must hold the 200 images of the official test part, got 199"),
        (test_file, train_file, "train.bin must hold the 600 images of the official train part, got 200"),
    ):
        (tmp_path / "train.bin").write_bytes(first)
        (tmp_path / "test.bin").write_bytes(second)
        with pytest.raises(ValueError, match=message):
            data.load("cifar100", tmp_path, validation=100)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/sparsekd-was-here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Evil()}), "asks for posix.system"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [print]}), "asks for"),
        (pickled({b"data": np.zeros((1, 5), np.uint8), b"fine_labels": [0]}), r"uint8 \(1, 5\)"),
        (pickled({b"fine_labels": [0]}), "KeyError"),
        (pickled([1, 2]), "AttributeError"),
        (b"", "EOFError"),
        (pickled({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}), r"must lie in 0\.\.99, got 100"),
    ],
)
def test_bad_pickles_are_refused(tmp_path, content, message):
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load("cifar100", tmp_path)


def test_bad_folders_and_options_are_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"cifar-100-binary/train\.bin"):
        data.load("cifar100", tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match="records of 3074 bytes, got 3073"):
        data.load("cifar100", tmp_path)
    for options, message in (
        ({"validation": 150}, "multiple of 100"),
        ({"validation": 600}, "a class has 6 images"),
        ({"validation": 100, "images": 600}, "1 of them are held out already, and 6 are asked for"),
        ({"validation": 100, "pixels": 20}, "32, 16 or 8"),
        ({"validation": 100, "classes": 101}, r"classes must lie in 2\.\.100, got 101"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load("cifar100", folder, **options)


def test_fewer_classes_leave_out_the_images_of_the_others(folder):
    task = data.load("cifar100", folder, validation=20, classes=20)
    assert task.sizes["classes"] == 20
    for part, each in ((task.train, 5), (task.val, 1), (task.test, 2)):
        assert torch.bincount(part.target).tolist() == [each] * 20


def test_crops_are_windows_of_the_padded_image(task):
    x = task.train.inputs[0][:64]
    prepare = dataclasses.replace(task.train.prepare, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    (augmented,) = prepare((x,), torch.Generator().manual_seed(0))
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4)).float()
    found = []
    for image, wanted in zip(padded, augmented.round(), strict=True):
        windows = {
            (top, left, mirrored): (image.flip(2) if mirrored else image)[:, top : top + 32, left : left + 32]
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
        }
        found.append([place for place, window in windows.items() if torch.equal(window, wanted)])
    assert all(found[1:])  # image 0 is of one colour and fits nearly anywhere
    corners = {place[:2] for places in found[1:] for place in places}
    mirrored = sum(places[0][2] for places in found[1:])
    assert len(corners) > 30 and 16 < mirrored < 48
    (plain,) = prepare((x,))
    torch.testing.assert_close(plain, x.float())


def test_a_view_shows_a_row_the_same_way_every_time(task):
    view = task.train.in_view(torch.Generator().manual_seed(3))
    assert len(view) == len(task.train)
    in_order = {}
    for rows, ((images,), _) in view.numbered(64):
        in_order |= dict(zip(rows.tolist(), images, strict=True))
    shuffled = 0
    for rows, ((images,), target) in view.numbered(50, torch.Generator().manual_seed(8)):
        assert torch.equal(target, task.train.target[rows])
        for row, image in zip(rows.tolist(), images, strict=True):
            assert torch.equal(image, in_order[row])
            shuffled += 1
    assert shuffled == len(view)
    first = torch.stack([in_order[row] for row in range(64)])
    (as_drawn,) = task.train.prepare((task.train.inputs[0],), torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, as_drawn[:64], rtol=0, atol=0)
    other = task.train.in_view(torch.Generator().manual_seed(4)).examples(64)[0]
    assert sum(not torch.equal(a, b) for a, b in zip(first, other, strict=True)) > 48


def test_rows_that_are_not_augmented_have_no_views(task):
    rows = dataclasses.replace(task.train, prepare=None)
    with pytest.raises(ValueError, match="expected rows with an Augmentation, got None"):
        rows.in_view(torch.Generator())


def test_standardised_over_the_training_part(task):
    (x,) = task.train.examples(len(task.train))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
