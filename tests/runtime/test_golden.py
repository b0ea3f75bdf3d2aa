"""A file that was written once: whoever changes the reader or the format still has to read it (golden/)."""

from pathlib import Path

import numpy as np
import pytest

from sparsekd.backends import cpu

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.skipif(cpu.native is None, reason=cpu.missing)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_old_file_answers_as_it_did(threads):
    from sparsekd.runtime import Session

    images = np.fromfile(GOLDEN / "images.f32", np.float32).reshape(-1, 3, 16, 16)
    scores = Session(GOLDEN / "network.skd", threads=threads)(images)
    lines = [line.split() for line in (GOLDEN / "answers.txt").read_text().splitlines()]
    assert scores.argmax(1).tolist() == [int(one) for one, _ in lines]
    np.testing.assert_allclose(scores.max(1), [float(score) for _, score in lines], rtol=1e-4)
