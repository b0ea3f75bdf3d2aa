"""Plans of rating tasks: who is trained, pruned in time, and started from a ridge where the recipe says so."""

import pytest

from sparsekd.methods import METHODS
from sparsekd.runs.plans import ratings


@pytest.mark.parametrize("epochs", [6, 7, 8, 9, 10, 12, 16, 20, 40, 60])
@pytest.mark.parametrize("method", list(METHODS))
def test_plans_reach_the_target_by_two_thirds(method, epochs):
    schedule, options = ratings.pruned_by_half(method, 0.55, epochs)
    begin = options.get("initial_epochs", 0)
    assert schedule.removed_after(epochs - begin) == 0.55
    assert begin + schedule.prunes * schedule.every <= 0.67 * epochs
