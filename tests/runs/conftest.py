"""Small networks and a small task for the tests of runs."""

import pytest
import torch
from threadpoolctl import threadpool_limits

from sparsekd import models
from sparsekd.runs import TASKS, record
from sparsekd.runs.plans import ratings

from .. import cifar
from . import made_up, made_up_images


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(ratings, "STUDENT", models.Shape(maps=2, side=8, widths=(16, 16)))
    monkeypatch.setattr(ratings, "TEACHER", models.Shape(maps=2, side=8, widths=(16, 32)))
    with threadpool_limits(1):  # of torch and of scikit-learn: more would only wait for each other here
        yield


@pytest.fixture
def task(monkeypatch):
    """The made-up task, which `runs.run` knows as "synthetic"."""
    task = made_up.make_task()
    monkeypatch.setitem(TASKS, "synthetic", made_up.entry(task))
    return task


@pytest.fixture
def teacher(task):
    torch.manual_seed(7)
    return made_up.teacher_of(task).eval()


@pytest.fixture
def untimed(monkeypatch):
    """Leave out freezing and timing, which take most of a small run."""
    monkeypatch.setattr(record, "freeze_for", made_up.as_it_is)
    monkeypatch.setattr(record, "speed", lambda *args: ({"latency_ms_dense": None, "latency_ms_frozen": None}, ""))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Made-up pictures in the format of CIFAR-100."""
    return cifar.write(tmp_path_factory.mktemp("cifar"))


@pytest.fixture
def tiny(monkeypatch):
    """Tiny networks, and few of the made-up pictures."""
    made_up_images.shrink(monkeypatch)
