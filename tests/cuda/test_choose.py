"""What the cost model prefers, and what is chosen after measuring."""

from unittest import mock

import pytest
import torch

from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import choose, cost, plan

from ..cases import Conv
from .common import conv_problem, geometry, operands, tiles


@pytest.mark.parametrize("direction", tiles.DIRECTIONS)
def test_the_model_prefers_sparse_where_little_is_kept_and_dense_where_all_is(direction):
    assert choose.guess(*conv_problem(0.25, direction=direction)).kernel == "triton"
    # Many images: then making the weight dense costs little beside the product.
    assert choose.guess(*conv_problem(1.0, direction=direction, images=2048)).kernel == "dense"


def test_the_model_prefers_wide_tiles_and_cuts_few_tiles_into_parts():
    # Of many images: 196 tiles of 128 leave 68 processors idle in the second of two waves, and halves of them do not.
    wide = dict((str(tile), seconds) for tile, seconds in choose.tiles(*conv_problem(0.25, images=2048)))
    assert min(wide, key=wide.__getitem__).startswith("128x256")
    _, mask, _ = conv_problem(0.25)  # the same columns in every row: nothing in the union is multiplied by zero
    assert mask.table("forward", tiles.GATHER_HALF[0]).fill == 1.0
    (small, *_), *_ = choose.tiles(*conv_problem(0.25, images=1)[:3])[2:]
    assert small.splits > 1 and small.group == cost.NO_GROUPS


def test_the_model_counts_what_the_schedulers_issue():
    """Blocks of 16 channels make four trips of one of 64: narrow tiles then issue more than they multiply."""
    h200, wide, narrow = cost.DEVICES["NVIDIA H200"], tiles.GATHER_HALF[0], tiles.GATHER_HALF[6]
    assert cost.cap("forward", narrow, h200, 16) < 0.6 * cost.cap("forward", narrow, h200, 64)
    assert cost.cap("forward", wide, h200, 16) == cost.cap("forward", wide, h200)  # L2 is what bounds it
    problem, mask, _ = conv_problem(0.25, block=16)
    tile, work = cost.arrange(problem, narrow, mask.table("forward", narrow), h200)
    assert work.depth == 16 and cost.seconds(problem, work, tile, h200) > cost.seconds(
        problem, work._replace(depth=64), tile, h200
    )


def test_the_model_counts_what_a_program_does_besides_its_trips():
    """One trip: most of the time is prologue and epilogue, and a second program on the processor hides half of it."""
    h200, (wide, two) = cost.DEVICES["NVIDIA H200"], tiles.GATHER_HALF[:2]
    assert (cost.resident("forward", wide, h200), cost.resident("forward", two, h200)) == (1, 2)
    problem, mask, _ = conv_problem(0.03, channels=512)
    for tile in (wide, two):
        arranged, work = cost.arrange(problem, tile, mask.table("forward", tile), h200)
        none = cost.seconds(problem, work._replace(flops=0.0, bytes=0.0), arranged, h200)
        programs = work.programs / h200.processors * cost.PROGRAM_SECONDS
        assert none == pytest.approx(cost.LAUNCH + programs / cost.resident("forward", tile, h200), rel=0.3)
        more = cost.seconds(problem, work._replace(bytes=0.0), arranged, h200)
        assert more > none


def test_an_older_device_gets_no_tile_that_does_not_fit_it():
    (problem, mask, values), a100 = conv_problem(0.25), cost.DEVICES["NVIDIA A100-SXM4-80GB"]
    with mock.patch.object(cost, "of_device", lambda device: a100):
        assert {tile.since for tile, _ in choose.tiles(problem, mask, values)} == {80}
    with mock.patch.object(cost, "of_device", lambda device: a100._replace(shared_bytes=50000)):
        fitting = [tile for tile, _ in choose.tiles(problem, mask, values)]
    assert fitting and all(cost.shared_bytes("forward", tile, 2) <= 50000 for tile in fitting)


def test_measuring_what_no_kernel_takes_is_none_and_no_error():
    case = Conv("refused", n=1, image=(4, 4), pattern=BlockPattern(16, 1), c=32)
    x, values, blocks = operands(case, torch.float16)
    index = blocks.row_ptr, blocks.col_idx
    assert backend.measure(lambda x: backend.conv2d(x, values, *index, None, case.k, *geometry(case)), x) is None


def test_measuring_times_every_candidate_and_the_choice_then_runs(monkeypatch):
    tried = []

    def medians(calls, *_, **__):
        tried.extend(map(str, calls))
        return {choice: 1e-6 * (10.0 + place if place else 100.0) for place, choice in enumerate(calls)}

    monkeypatch.setattr(plan, "medians", medians)
    case = Conv("measured", n=1, image=(4, 4), pattern=BlockPattern(16, 16), c=32)
    x, values, blocks = operands(case, torch.float16)
    arguments = (x, values, blocks.row_ptr, blocks.col_idx, None, case.k, *geometry(case))
    with plan.measuring():
        measured = backend.conv2d(*arguments)
    assert tried[0] == "dense" and any(name.startswith("triton") for name in tried)
    (row,) = choose.plan_of(x.device).measured.values()
    assert str(row.choice) == tried[1] and row.microseconds == 11.0
    assert torch.equal(backend.conv2d(*arguments), measured)
