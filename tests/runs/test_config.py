"""What a run can be asked, and what not."""

import pytest

from sparsekd.runs import RunConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"densities": (0.0,)}, "density"),
        ({"densities": (1.5,)}, "density"),
        ({"methods": ("sp",)}, "method must be one of sp-sad, lth-sad, ss-sad, .*, got 'sp'"),
        ({"at_once": "luck"}, "at_once must be one of magnitude, snip, taylor, fisher, got 'luck'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**fields)


def test_each_density_and_method_counts_once():
    config = RunConfig(densities=(0.5, 0.3, 0.5), methods=("kd", "at", "kd"))
    assert config.densities == (0.5, 0.3) and config.methods == ("kd", "at")
