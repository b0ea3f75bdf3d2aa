"""Two processes that train one model, over gloo: the same masks, and the weights that one process gets from the whole
batch."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.optim import SGD

import sparsekd
from sparsekd import BlockPattern, distributed
from sparsekd.distill import Distiller
from sparsekd.losses import AttentionTransfer
from sparsekd.pruning import DenseGradients, Pruner

RANKS = 2


def run_on_every_rank(check, folder):
    """Run ``check(rank, folder)`` in RANKS processes of one process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (check, str(folder), port), nprocs=RANKS)


def _rank(rank, check, folder, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        check(rank, folder)
        dist.barrier()  # a rank that leaves while another still receives takes it down
    finally:
        dist.destroy_process_group()
    # Threads that torch leaves behind can abort a process that ends in the usual way; all checks have passed.
    os._exit(0)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.Flatten(), nn.Linear(512, 5)
    )


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)]


def train(seed, share, average, forward_of=lambda model: model):
    """Two steps, a prune, two steps; the loss is a mean, so that ranks with half a batch each agree with one."""
    torch.manual_seed(seed)
    model = network().double()
    distributed.broadcast(model)
    pruner = Pruner(model, pattern=BlockPattern(16, 1), score="magnitude")
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner.attach(optimizer)
    forward = forward_of(model)
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        forward(x[share]).square().mean().backward()
        average(model)
        optimizer.step()
        pruner.after_step()
        if step == 1:
            pruner.prune_to(0.5)
            forward = forward_of(model)
    return model


def by_hand(model):
    distributed.average_gradients(model.parameters())


def whole_and_half(rank):
    return slice(None), slice(4 * rank, 4 * rank + 4)


def _check_training(rank, folder):
    for name, average, forward_of in (
        ("by hand", by_hand, lambda model: model),
        ("DDP", lambda model: None, distributed.data_parallel),
    ):
        model = train(seed=rank, share=whole_and_half(rank)[1], average=average, forward_of=forward_of)
        torch.save(model.state_dict(), f"{folder}/{name}-{rank}.pt")


def test_two_ranks_train_and_prune_as_one_process_does(tmp_path):
    run_on_every_rank(_check_training, tmp_path)
    alone = train(seed=0, share=slice(None), average=by_hand).state_dict()
    assert alone["2.col_idx"].shape[0] < 16 * 9 * 2
    for way in ("by hand", "DDP"):
        states = [torch.load(tmp_path / f"{way}-{rank}.pt") for rank in range(RANKS)]
        for name, want in alone.items():
            assert torch.equal(states[0][name], states[1][name]), (way, name)
            torch.testing.assert_close(states[0][name], want, msg=lambda text, at=(way, name): f"{at}: {text}")


def _check_agreement(rank, folder):
    torch.manual_seed(rank)  # other weights on each rank: only the choice of rank 0 makes them agree
    model = network()
    pruner = Pruner(model, pattern=BlockPattern(16, 1), score="random", seed=rank)
    pruner.prune_to(0.7)
    distributed.check_same_masks(model)
    assert pruner.removed_share == pytest.approx(0.7, abs=0.01)
    pruner.grow_to(0.5)
    distributed.check_same_masks(model)
    pruner.exchange(0.2)
    distributed.check_same_masks(model)
    assert pruner.removed_share == pytest.approx(0.5, abs=0.01)
    x = torch.randn(2, 3, 4, 4)  # another on each rank
    with DenseGradients(pruner) as gradients:
        model(x).square().sum().backward()
    scores = gradients.scores()
    everyones = [None] * RANKS
    dist.all_gather_object(everyones, scores)
    assert all(torch.equal(everyones[0][name], score) and score.any() for name, score in scores.items())
    model.zero_grad()
    versions = [buffer._version for buffer in model.buffers()]
    parallel = distributed.data_parallel(model)
    for _ in range(2):
        parallel(torch.randn(2, 3, 4, 4)).sum().backward()
    assert [buffer._version for buffer in model.buffers()] == versions  # so the tables of a mask are built once

    for parameter in model.parameters():
        parameter.grad = None
    if rank == 0:  # a parameter that only some ranks used
        model[4].bias.grad = torch.full((5,), 3.0)
    distributed.average_gradients(model.parameters())
    assert model[4].bias.grad.tolist() == [1.5] * 5 and model[0].values.grad is None

    near, far = ([torch.full((3,), 1 + off * rank)] for off in (1e-5, 1e-2))
    distributed.check_same_parameters(near)
    other = Pruner(copy.deepcopy(network()), pattern=BlockPattern(16, 1 + rank))
    for complaint, call in (
        ("rank 1 holds other blocks", lambda: other.prune_to(0.5)),
        ("rank 1 holds other masks of Sequential", lambda: distributed.check_same_masks(other.model)),
        ("rank 1 holds other tensors of Sequential", lambda: distributed.broadcast(other.model)),
        ("rank 1 holds other parameters than", lambda: distributed.check_same_parameters(far)),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            call()


def test_ranks_agree_on_a_mask_or_say_that_they_cannot(tmp_path):
    run_on_every_rank(_check_agreement, tmp_path)


def test_one_process_needs_no_group():
    model = sparsekd.sparsify(network(), BlockPattern(16, 1))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    distributed.broadcast(model)
    distributed.average_gradients(model.parameters())
    assert distributed.data_parallel(model) is model and distributed.num_ranks() == 1
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


class Distilled(nn.Module):
    """All losses of one step, with what they train: the student and the SAD meta-network."""

    def __init__(self, matching):
        super().__init__()
        torch.manual_seed(0)
        teacher, self.student = (
            nn.Sequential(
                *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 6, 3, padding=1, stride=2), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(96, 5)),
            )
            for width in (8, 4)
        )
        self.distiller = Distiller(
            *(teacher, self.student, ["1", "3"], ["1", "3"]),
            example_inputs=(torch.zeros(2, 3, 8, 8),), goal=sparsekd.Classification(), dim=8, matching=matching,
        )  # fmt: skip

    def forward(self, images, labels):
        return self.distiller.loss((images,), labels).total


def labelled_images():
    torch.manual_seed(1)
    return torch.randn(8, 3, 8, 8), torch.arange(8) % 5


def loss_and_gradients(step, forward, images, labels):
    loss = forward(images, labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in step.parameters())]


# Name -> (matching, the meta-network's batch norm in training mode, whether each rank has its half of the images).
# With its own half a rank's batch norm sees other statistics, so there it uses the running ones.
LOSS_CASES = {
    "SAD, halves": (None, False, True),
    "SAD, all images": (None, True, False),
    "attention transfer, halves": (AttentionTransfer(), True, True),
}


def _check_losses(rank, folder):
    for name, (matching, training, halves) in LOSS_CASES.items():
        share = whole_and_half(rank)[halves]
        step = Distilled(matching).train(training)
        parallel = distributed.data_parallel(step)
        results = loss_and_gradients(step, parallel, *(operand[share] for operand in labelled_images()))
        dist.all_reduce(results[0])
        results[0] /= RANKS
        torch.save(results, f"{folder}/{name}-{rank}.pt")


def test_losses_and_gradients_of_two_ranks_are_those_of_one_process(tmp_path):
    run_on_every_rank(_check_losses, tmp_path)
    for name, (matching, training, _) in LOSS_CASES.items():
        step = Distilled(matching).train(training)
        alone = loss_and_gradients(step, step, *labelled_images())
        assert alone[0] > 0 and sum(grad.abs().max() > 0 for grad in alone[1:]) >= len(alone) // 2
        # Gradients of biases before a batch norm are 0 but for the rounding of the others.
        near = 1e-4 * max(grad.abs().max().item() for grad in alone[1:])
        results = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(RANKS)]
        for first, second, want in zip(*results, alone, strict=True):
            assert torch.equal(first, second), name
            torch.testing.assert_close(first, want, rtol=1e-4, atol=near, msg=lambda text, at=name: f"{at}: {text}")


def _check_cache(rank, folder):
    torch.manual_seed(0)
    teacher, x = network(), torch.randn(9, 3, 4, 4)
    for path in (None, f"{folder}/{rank}.cache"):
        options = {"rows": 9, "example_inputs": (x[:2],), "path": path}
        shared = sparsekd.TeacherCache(teacher, ["1", "2"], **options)
        mine = torch.cat([torch.arange(7)[rank::RANKS], torch.tensor([7])])  # row 7 is of both, row 8 of none
        shared.add(mine, (x[mine],))
        shared.synchronize()
        assert shared.holds(torch.arange(8)) and not shared.holds(torch.tensor([8]))
        got = shared[torch.arange(8)]
        whole = sparsekd.TeacherCache(teacher, ["1", "2"], rows=9, example_inputs=(x[:2],))
        whole.add(torch.arange(9), (x,))
        want = whole[torch.arange(8)]
        torch.testing.assert_close((got.output, *got.stats[:2]), (want.output, *want.stats[:2]))


def test_ranks_run_a_teacher_on_their_share_and_have_all_of_it(tmp_path):
    run_on_every_rank(_check_cache, tmp_path)
