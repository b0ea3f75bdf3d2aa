"""The main job: train a teacher, distil and prune students, freeze them, measure what it cost and what it won.

    from sparsekd import runs

    results, folder = runs.run(runs.RunConfig("movietweetings", methods=("lth-sad",)))

run        what happens, from the first network to the report
recipes    which networks a run trains, and how each learns
epochs     the training loop
evaluate   what a trained network is worth
baselines  predictors that a network has to beat
memory     the allocator behind CPU tensors
"""

from .epochs import OutOfTime, rank
from .run import RunConfig, run

__all__ = ["OutOfTime", "RunConfig", "rank", "run"]
