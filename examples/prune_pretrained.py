"""A pretrained ResNet loses 70 % of its multiply-adds in an ordinary training loop, and is frozen.

    python examples/prune_pretrained.py --weights pretrained.pt

The data are the handwritten digits of scikit-learn at twice their size. If the file of weights is missing, the dense
network is trained first and the file written, so that the next call starts from it as from any pretrained network.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sparsekd
from sparsekd import models, timing


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    return F.interpolate(images, scale_factor=2), torch.tensor(data.target)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    model.train()
    for rows in torch.randperm(len(x)).split(64)[:-1]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4, help="of the dense training, and after every prune (4)")
    options = parser.parse_args()
    torch.manual_seed(0)
    x, y = digits()
    train, test = (x[300:], y[300:]), (x[:300], y[:300])
    model = models.ResNet((2, 2, 2, 2), classes=10, widths=(16, 32, 64, 128))

    if options.weights.exists():
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(options.epochs):
            epoch(model, optimizer, *train)
        torch.save(model.state_dict(), options.weights)
    one = test[0][:1]
    dense, dense_accuracy = sparsekd.freeze(model, one), accuracy(model, *test)

    # From here on the layers are block-sparse; the optimizer's momentum shrinks along with the weights.
    pruner = sparsekd.Pruner(model, scope="cost", exclude=model.not_pruned, example_inputs=(one,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner.attach(optimizer)
    for removed in (0.4, 0.6, 0.7):
        pruner.prune_to(macs=removed)
        for _ in range(options.epochs):
            epoch(model, optimizer, *train)
        print(f"{removed:.0%} of the multiply-adds are gone: accuracy {accuracy(model, *test):.3f}")

    sparse = sparsekd.freeze(model, one)
    took = timing.medians({"dense": lambda: dense(one), "sparse": lambda: sparse(one)}, seconds=0.5)
    print(f"dense {dense_accuracy:.3f}; frozen, one image: {took['dense'] * 1e6:.0f} -> {took['sparse'] * 1e6:.0f} us")


if __name__ == "__main__":
    main()
