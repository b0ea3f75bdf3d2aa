"""Which sources there are."""

import pytest

from sparsekd.energy import LABELS, available_sources

from .hardware import TWO_SOCKETS, Powercap, make_machine


def test_available_sources_names_every_source(board, tmp_path):
    Powercap(tmp_path / "powercap", board, TWO_SOCKETS)
    found = {status.source: status for status in available_sources(make_machine(board, tmp_path))}
    assert tuple(found) == LABELS[:-1]
    assert found["rapl"].readable and len(found["rapl"].devices) == 4 and found["rapl"].reason is None
    assert found["rapl"].tick == pytest.approx(1e-3, rel=0.6)
    for label in set(found) - {"rapl"}:
        assert not found[label].readable and found[label].reason
