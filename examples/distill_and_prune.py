"""A student learns from a teacher while LTH-SAD prunes it: the loop that every method of the package takes.

python examples/distill_and_prune.py
"""

import argparse

import torch
from prune_pretrained import accuracy, digits, epoch
from torch import nn
from torch.optim import SGD

import sparsekd


def network(width: int) -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*block(3, width), *block(width, width), nn.MaxPool2d(2), *block(width, width), *head)


TAPS = ["5", "9"]  # after the second and the third ReLU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, y = digits()
    train, test = (x[300:], y[300:]), (x[:300], y[:300])

    teacher, student = network(64), network(32)
    optimizer = SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for _ in range(options.epochs // 2):
        epoch(teacher, optimizer, *train)
    print(f"teacher: accuracy {accuracy(teacher, *test):.3f}")

    goal, one = sparsekd.Classification(), (test[0][:1],)
    distiller = sparsekd.Distiller(teacher, student, TAPS, TAPS, goal=goal, beta=50.0, example_inputs=one)
    every = max(1, options.epochs // 4)
    schedule = sparsekd.LinearSchedule(rate=0.25, every=every, final=0.5, unit="macs")
    method = sparsekd.LTHSAD(distiller, schedule, epochs=options.epochs, exclude=["0", "12"])
    optimizer = SGD([*student.parameters(), *method.parameters()], lr=0.05, momentum=0.9)
    method.attach(optimizer)
    for number in range(1, method.epochs + 1):
        for rows in torch.randperm(len(train[0])).split(64)[:-1]:
            optimizer.zero_grad()
            method.loss((train[0][rows],), train[1][rows]).total.backward()
            optimizer.step()
            method.after_step()
        event = method.after_boundary(number)
        if event:
            print(event)
        student.train()
    print(f"student: accuracy {accuracy(student, *test):.3f}")
    print(sparsekd.freeze(student, *one).plan)


if __name__ == "__main__":
    main()
