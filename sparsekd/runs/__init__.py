"""The main job: train a teacher, distil and prune students, freeze them, measure what it cost and what it won.

    from sparsekd import runs

    results, folder = runs.run(runs.RunConfig("movietweetings", methods=("lth-sad",)))

config     what a run is asked to do, with every default
tasks      the tasks a run knows: a reader, a plan, options of its own
plans/     which networks a run trains, and how each learns
run        what happens, from the first network to the report
record     what is written down of a trained network
runtime    device, precision, ranks, deadline
learners   what a network learns by: with a teacher or without, pruned or not
steps      the stepper: batches in, optimizer steps out
jobs       several networks at once, each in a process of its own
epochs     the loop over epochs: train, validate, keep
stream     the loop over the windows of a stream: score each before learning it
rates      the learning rate of every step
state      the file from which a training goes on after a kill
evaluate   sizes, speed and joules of a trained network
baselines  predictors that a network has to beat
memory     the allocator behind CPU tensors
"""

from .config import RunConfig
from .run import run
from .runtime import OutOfTime, Runtime, rank
from .tasks import TASKS, Entry, Option, own_options, several

__all__ = ["TASKS", "Entry", "Option", "OutOfTime", "RunConfig", "Runtime", "own_options", "rank", "run", "several"]
