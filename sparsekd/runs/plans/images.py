"""Small images: one student for every method, which passes all densities on its way and is kept from each of them.

It trains a round at each density and is kept from the end of that round, which is how the paper sweeps. The reduced
protocol has one student for every method and density instead, and all of them see as many images as a dense one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ... import data, models
from ...data import Task
from ...pruning import LinearSchedule, ListedSchedule, Schedule
from ..config import RunConfig
from . import paper
from .network import AT_BETA, Network, Plan, dense_students, pruning_methods, title_of, weights_of, without
from .recipe import Recipe

# The recipe of arXiv 2102.02973 for plain training; that of RepDistiller too.
PLAIN = Recipe(
    lr=0.05,
    weight_decay=5e-4,
    epochs=240,
    batch_size=64,
    optimizer="sgd",
    milestones=(150, 180, 210),
    select="last",
    recalibrate=False,
)
ALPHA = 0.9
QUICK = {"images": 200, "validation": 200, "test": 500, "pixels": 8}


@dataclass(frozen=True)
class Protocol:
    """How much is trained on how many images.

    round_epochs    epochs of a round; `full` has a sixth of 240.
    teacher_epochs  None: six rounds, as every dense student.
    batch           rows of a batch.
    images, validation, pixels, classes   options of the reader.
    beta, at_beta   weights of SAD and of AT.
    alike           a student for every density, which all train for six rounds as the dense ones do; False: one student
                    passes all densities and trains on.
    views           fixed views of an image in which the teacher is run once for all students; 0: in every step.
    """

    round_epochs: int
    teacher_epochs: int | None = None
    batch: int = 64
    images: int | None = None
    validation: int = 5_000
    pixels: int = 32
    classes: int = 100
    beta: float = 200.0
    at_beta: float = AT_BETA
    alike: bool = False
    views: int = 0


# What two CPU cores can do in some hours for three seeds. Twenty classes, since in so few steps a hundred are hardly
# learnt, and then methods differ by chance. In 12 epochs a teacher knows no more than the plain student (48.0 and
# 49.9 % of the test images): it has 36. The weights of the long schedule leave the classes too little; on validation
# images of seed 0, learning from fresh crops, dense SAD has 42.6 % with 200, 49.2 with 30 and 49.5 with 5, dense AT
# 38.6 with 1000 (these under a teacher of 12 epochs), 51.9 with 100 and 51.1 with 20.
PROTOCOLS = {
    "full": Protocol(round_epochs=40),
    "reduced": Protocol(
        round_epochs=2,
        teacher_epochs=36,
        images=5_000,
        validation=1_000,
        pixels=16,
        classes=20,
        beta=30.0,
        at_beta=100.0,
        alike=True,
        views=12,
    ),
}


def load(name: str, config: RunConfig) -> Task:
    """The images of `data.load(name)` that the protocol of the run trains on."""
    protocol = PROTOCOLS[config.options["protocol"]]
    options = {option: getattr(protocol, option) for option in ("images", "validation", "pixels", "classes")}
    if config.quick:
        options |= QUICK
    return data.load(name, config.data_dir, **options)


def of_images(task: Task, config: RunConfig) -> Plan:
    """Teacher and students by our recipe, or by the published one."""
    options = config.options
    protocol = PROTOCOLS[options["protocol"]]
    length = 1 if config.quick else protocol.round_epochs
    make_teacher, make_student = (
        partial(image_network, options[role], task.sizes["classes"]) for role in ("teacher", "student")
    )
    if options["recipe"] == "paper":
        scale = length / PROTOCOLS["full"].round_epochs
        plain = dataclasses.replace(PLAIN, batch_size=protocol.batch)
        networks = paper.networks(make_teacher, make_student, config, plain, scale)
    else:
        networks = _networks(make_teacher, make_student, config, protocol, length)
    teacher, *students = networks
    return Plan(
        teacher=teacher,
        students=tuple(students),
        architectures=(options["teacher"], options["student"]),
        views=min(_views(protocol, options), max(student.recipe.epochs for student in students)),
        timed_batches=(1, 64),
        about={
            "networks": (options["teacher"], options["student"]),
            "recipe": options["recipe"],
            "protocol": options["protocol"],
            "augmentation": f"crop after padding by {task.sizes['pixels'] // 8}, mirror",
            "selection": "last epoch; of the densities that of the best validation accuracy (marked); the test part is "
            "used once for each row",
        },
    )


def _views(protocol: Protocol, options: Mapping[str, Any]) -> int:
    """Of an image, in no more than there are epochs; the published recipe has the teacher in every step."""
    usual = 0 if options["recipe"] == "paper" else protocol.views
    return int(options.get("views", usual))


def image_network(name: str, classes: int) -> nn.Module:
    """A classifier whose weights lie as channels_last images do: a convolution need not reorder them."""
    model: nn.Module = models.classifier(name, classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _networks(
    make_teacher: Callable[[], nn.Module],
    make_student: Callable[[], nn.Module],
    config: RunConfig,
    protocol: Protocol,
    length: int,
) -> Iterator[Network]:
    """The teacher, the dense students, and those that are pruned."""
    assert config.methods is not None and config.densities is not None  # `tasks.complete` has filled them in
    # On top of the published recipe: Nesterov, and a cosine to zero, which a sweep begins anew at every prune, so that
    # each density is trained to its end; the published steps would leave all but the first rounds with 1 % of the rate.
    recipe = dataclasses.replace(
        PLAIN,
        optimizer="nesterov",
        milestones=None,
        restart="rewind" if protocol.alike else "prune",
        epochs=6 * length,
        batch_size=protocol.batch,
    )
    teacher_epochs = recipe.epochs if config.quick else protocol.teacher_epochs or recipe.epochs
    teacher_recipe = dataclasses.replace(recipe, epochs=teacher_epochs)
    yield Network(name="teacher", folder="teacher", make=make_teacher, recipe=teacher_recipe)
    yield from dense_students(
        make_student, recipe, config.methods, alpha=ALPHA, beta=protocol.beta, at_beta=protocol.at_beta
    )
    targets = tuple(sorted(round(1 - density, 6) for density in config.densities if density < 1))
    for method in pruning_methods(config.methods) if targets else ():
        base, options = without(method)
        planned: list[tuple[str, tuple[float, ...], Schedule, dict[str, Any], int]]
        if protocol.alike:
            planned = [(f"{method}-{1 - t:g}", (t,), *pruned_early(base, t, length), recipe.epochs) for t in targets]
        else:
            planned = [(method, targets, *sweep(base, targets, length))]
        for folder, removed, schedule, more, epochs in planned:
            yield Network(
                name=title_of(method),
                folder=folder,
                make=make_student,
                recipe=dataclasses.replace(recipe, epochs=epochs),
                **weights_of(method, ALPHA, protocol.beta),
                method=base,
                densities=tuple(round(1 - target, 6) for target in removed),
                schedule=schedule,
                options={**options, **more},
            )


def pruned_early(method: str, removed: float, length: int) -> tuple[Schedule, dict[str, Any]]:
    """When to prune in six rounds of ``length`` epochs: the first two.

    SP-SAD and the two that leave something out prune in up to three steps. A ticket of LTH-SAD is found after one round
    and goes back to the end of its first epoch, so that it has five rounds to learn in. SS-SAD has a ticket of a round,
    with half of what goes, and removes the rest one round later.
    """
    if method == "lth-sad":
        return ListedSchedule((removed,), length), {"score": "lamp", "rewind_to": 1 if length > 1 else 0}
    if method == "ss-sad":
        start = round(removed / 2, 6)
        # A ticket of one epoch has no end of an epoch to be pruned at.
        initial = ListedSchedule((start,), max(1, length // 2), first=0 if length == 1 else None)
        ticket = {"initial": initial, "initial_epochs": length, "score": "lamp"}
        return ListedSchedule((removed,), length, start=start), ticket
    count = min(3, 2 * length)
    steps = tuple(round(removed * step / count, 6) for step in range(1, count + 1))
    return ListedSchedule(steps, 2 * length // count), {}


def sweep(method: str, targets: tuple[float, ...], length: int) -> tuple[Schedule, dict[str, Any], int]:
    """Schedule, options and epochs of a student that trains a round dense and one after each prune.

    A ticket that was rewound has nothing but its round to learn in: its rounds are twice as long, and it goes back to
    the end of the first eighth of the first, not to where it knew nothing. LAMP, since blocks compared by magnitude
    over layers would first of all compare fan-in.
    """
    if method == "lth-sad":
        every = 2 * length
        options = {"score": "lamp", "rewind_to": max(1, every // 8) if every > 1 else 0}
        return ListedSchedule(targets, every), options, (len(targets) + 1) * every
    if method == "ss-sad":
        start = round(min(0.2, targets[0] / 2), 6)
        ticket = {"initial": LinearSchedule(start, length, final=start), "initial_epochs": 2 * length, "score": "lamp"}
        return ListedSchedule(targets, length, start=start), ticket, (len(targets) + 3) * length
    return ListedSchedule(targets, length), {}, (len(targets) + 1) * length
