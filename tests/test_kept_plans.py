"""A packed layer keeps what it worked out for the sizes it is called with, though they change and threads share it."""

import threading

import pytest
import torch

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd import _C

from .test_isa import Blocks, unwritten

KEPT = 8  # sizes at once
CHANNELS = 24


class Layer:
    """A packed 3 x 3 convolution over images of 6 x 6, and what it gives for a batch."""

    def __init__(self):
        blocks = Blocks(48, CHANNELS, 3, 3, 16, 1, 0.4, seed=1)
        self.shape = _C.Conv2dShape((1, CHANNELS, 6, 6), 48, (3, 3), padding=(1, 1))
        self.packed = _C.PackedConv2d(self.shape, *blocks.pointers)
        self.blocks = blocks

    def __call__(self, batch, threads=1):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, CHANNELS, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
        y = unwritten(batch, 48, 6, 6, channels_last=True)
        self.packed.run(x.data_ptr(), True, 0, y.data_ptr(), True, threads, batch)
        return y

    def made_by(self, batches):
        before = self.packed.plans_made
        for batch in batches:
            self(batch)
        return self.packed.plans_made - before


@pytest.fixture
def layer():
    return Layer()


def test_several_sizes_are_kept(layer):
    sizes = list(range(1, KEPT + 1))
    assert layer.made_by(sizes) == KEPT
    assert layer.made_by(3 * sizes) == 0


def test_new_sizes_that_come_again_take_the_place_of_the_oldest(layer):
    layer.made_by(range(1, KEPT + 1))
    assert layer.made_by([2, 3, 4]) == 0  # 1 is now the one that was used least recently
    assert layer.made_by([9, 9, 9, 9]) == 1
    assert layer.made_by([2, 3, 4, 9]) == 0
    assert layer.made_by([1, 1]) == 1


def test_sizes_that_come_once_push_nothing_out(layer):
    sizes = list(range(1, KEPT + 1))
    layer.made_by(sizes)
    assert layer.made_by(range(10, 40)) == 0
    assert layer.made_by(sizes) == 0


def test_the_number_of_threads_is_one_of_the_sizes():
    layer = Layer()
    big = 40  # worth more than one thread
    layer(big, threads=1)
    layer(big, threads=2)
    assert layer.packed.plans_made == 2


def test_what_is_kept_gives_the_same_as_what_is_not(layer):
    want = {batch: Layer()(batch) for batch in range(1, 12)}
    for batch in (*range(1, 12), *range(11, 0, -1), 7, 7, 7, 1, 7):
        assert torch.equal(layer(batch), want[batch]), batch


def test_threads_that_change_the_sizes_at_once(layer):
    """Plans are pushed out while other threads compute with them."""
    batches = range(1, 10)
    want = {batch: Layer()(batch) for batch in batches}
    wrong = []

    def work(seed):
        order = torch.randint(1, 10, (300,), generator=torch.Generator().manual_seed(seed)).tolist()
        for batch in order:
            for _ in range(2):  # twice in a row, so that it is kept
                if not torch.equal(layer(batch), want[batch]):
                    wrong.append(batch)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert layer.packed.plans_made > KEPT
    assert layer.made_by([5, 5, 5]) <= 1  # and it still keeps what comes again
