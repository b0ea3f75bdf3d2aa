"""When how much goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.pruning import LinearSchedule, ListedSchedule


def test_the_schedule_is_linear_in_the_original_count():
    schedule = LinearSchedule(rate=0.05, every=75, final=0.6)
    removed = [schedule.removed_after(epoch) for epoch in (1, 74, 75, 149, 150, 825, 899, 900, 1200)]
    assert removed == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.55, 0.55, 0.6, 0.6])
    assert schedule.prunes == 12
    schedule.check_reaches(901)
    with pytest.raises(ValueError, match=r"12 prunes every 75 epochs reach 0.6 after epoch 900.*train 901 epochs"):
        schedule.check_reaches(900)
    assert LinearSchedule(0.1, 2, final=0.55, start=0.2).prunes == 4


@given(st.floats(0.01, 0.5), st.integers(1, 9), st.floats(0.01, 0.99))
def test_a_schedule_ends_exactly_at_its_last_prune(rate, every, final):
    schedule = LinearSchedule(rate, every, final)
    last = schedule.prunes * every
    assert schedule.removed_after(last - 1) < schedule.removed_after(last)
    assert schedule.removed_after(last) == schedule.removed_after(last + 10 * every) == final


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 1, 0.5), (1.0, 1, 0.5), (0.1, 0, 0.5), (0.1, 1.5, 0.5), (0.1, 1, 1.0), (0.1, 1, 0.0), (0.1, 1, 0.5, 0.5)],
)
def test_a_schedule_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match=r"LinearSchedule: (rate|every|final|start) must"):
        LinearSchedule(*arguments)


def test_the_first_prune_may_come_at_any_epoch_or_before_training():
    schedule = LinearSchedule(0.2, 3, final=0.6, first=0)
    assert schedule.prune_epochs == [0, 3, 6]
    removed = [schedule.removed_after(epoch) for epoch in (0, 2, 3, 6, 9)]
    assert removed == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    schedule.check_reaches(7)
    with pytest.raises(ValueError, match=r"reach 0\.6 after epoch 6"):
        schedule.check_reaches(6)
    at_once = ListedSchedule((0.9,), every=1, first=0)
    assert at_once.prune_epochs == [0] and at_once.removed_after(0) == at_once.removed_after(5) == 0.9
    at_once.check_reaches(1)
    assert ListedSchedule((0.3, 0.5), 2, first=5).prune_epochs == [5, 7]
    usual = ListedSchedule((0.3, 0.5), 2)
    assert usual.prune_epochs == [2, 4] and usual.removed_after(0) == 0.0
    for first in (-1, 0.5, True):
        with pytest.raises(ValueError, match="ListedSchedule: first must be an epoch"):
            ListedSchedule((0.3,), 2, first=first)


@pytest.mark.parametrize("first", [None, 0, 7])
@pytest.mark.parametrize(
    ("kind", "to", "shares"),
    [(LinearSchedule, (0.1, 4, 0.8), [0.6, 0.7, 0.8]), (ListedSchedule, ((0.7, 0.8), 4), None)],
)
def test_what_a_schedule_finds_gone_is_no_prune(kind, to, shares, first):
    schedule = kind(*to, start=0.5, first=first)
    shares, begin = shares or [0.7, 0.8], 4 if first is None else first
    assert schedule.first_prune == begin
    assert schedule.prune_epochs == [begin + 4 * place for place in range(len(shares))]
    assert all(schedule.removed_after(epoch) == 0.5 for epoch in range(begin))
    assert [schedule.removed_after(epoch) for epoch in schedule.prune_epochs] == pytest.approx(shares)


def test_a_schedule_that_starts_close_to_its_end_prunes_once():
    schedule = LinearSchedule(0.1, 4, final=0.5 + 1e-9, start=0.5)
    assert schedule.prune_epochs == [4]
    assert (schedule.removed_after(3), schedule.removed_after(4)) == (0.5, schedule.final)


def test_rounding_adds_no_prune():
    final = 1 - 0.7  # a little over 0.3
    schedule = LinearSchedule(rate=final / 3, every=2, final=final)
    assert schedule.prunes == 3
    assert schedule.removed_after(6) == schedule.removed_after(8) == final


def test_a_number_above_one_says_what_stays():
    schedule = LinearSchedule(rate=0.3, every=2, final=80, unit="latency_us")
    shares = schedule.in_shares(200.0)
    assert schedule.is_absolute and not shares.is_absolute and shares.final == pytest.approx(0.6)
    assert [shares.removed_after(epoch) for epoch in (1, 2, 4)] == pytest.approx([0.0, 0.3, 0.6])
    assert shares.in_shares(50.0) is shares
    listed = ListedSchedule((3e6, 2e6), every=1)
    assert listed.unit == "macs" and listed.in_shares(4e6).targets == pytest.approx((0.25, 0.5))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: LinearSchedule(0.3, 2, final=80).in_shares(80.0),
            "macs=80 is to stay, but the dense network has only 80",
        ),
        (lambda: LinearSchedule(0.3, 2, final=float("inf")), r"final must lie in \(0, 1\), got inf"),
        (lambda: ListedSchedule((2e6, 3e6), 1), "or fall as numbers of multiply-adds above 1"),
        (lambda: ListedSchedule((0.5, 3e6), 1), "or fall as numbers of multiply-adds above 1"),
        (lambda: ListedSchedule((100.0,), 1, unit="bytes").in_shares(9.0), "bytes=100 is to stay"),
    ],
)
def test_numbers_that_cannot_stay_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
