"""No choice is read from, or left in, the plan of the machine; float32 means float32, for cuDNN too. Interpreted
kernels are checked for what a GPU would do silently wrong."""

import pytest
import torch

from sparsekd.backends.cuda import choose, masks


@pytest.fixture(autouse=True)
def checked():
    if torch.cuda.is_available():
        yield None
        return
    pytest.importorskip("triton")
    from .checked import checks

    with checks() as watch:
        yield watch


@pytest.fixture(autouse=True)
def _plan_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("SPARSEKD_PLAN", str(tmp_path / "plan.json"))
    choose.plan_of.cache_clear()
    masks.masks.clear()
    yield
    choose.plan_of.cache_clear()
    masks.masks.clear()
