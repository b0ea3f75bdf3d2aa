"""The kernels fit their tiles into the first level's data cache of this CPU."""

from pathlib import Path

import pytest

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd import _C

KIB = 1024
LISTED = Path("/sys/devices/system/cpu/cpu0/cache")


def first_level() -> dict[str, int]:
    """What Linux says of it: kind of contents to bytes."""
    found = {}
    for folder in LISTED.glob("index*"):
        if (folder / "level").read_text().strip() == "1":
            size = (folder / "size").read_text().strip()
            found[(folder / "type").read_text().strip()] = int(size.removesuffix("K")) * KIB
    return found


def test_the_size_is_what_the_system_says():
    listed = first_level()
    if not listed:
        pytest.skip("this system does not list its caches")
    size, source = _C.l1_data_cache()
    assert source in ("cpuid", "sysfs")
    assert size == listed.get("Data", listed.get("Unified"))


def test_the_size_is_one_that_cpus_have_and_stays():
    size, source = _C.l1_data_cache()
    assert 4 * KIB <= size <= KIB * KIB and source in ("cpuid", "sysctl", "sysfs", "assumed")
    assert _C.l1_data_cache() == (size, source)


@pytest.mark.parametrize(("kibibytes", "floats"), [(16, 3 * KIB), (32, 6 * KIB), (48, 9 * KIB), (128, 24 * KIB)])
def test_tiles_may_read_three_quarters(kibibytes, floats):
    assert _C.tile_floats(kibibytes * KIB) == floats
