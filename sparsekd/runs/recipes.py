"""Which networks a run trains, and how each learns.

    networks(task, Choice(methods=("lth-sad", "kd"), densities=(0.5, 0.3)))

Rating tasks: one student for every method and density, pruned by half of its training. Images: one student for every
method, which passes all densities on its way, trains a round at each and is kept from the end of each round; that is
how the paper sweeps. Both always train the teacher, the plain student and the dense distilled one (SAD).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..data.task import Recipe, Task
from ..methods import METHODS, PAPER, PaperRecipe
from ..pruning import LinearSchedule, ListedSchedule, Schedule

__all__ = ["ABLATIONS", "PROTOCOLS", "RECIPES", "Choice", "Network", "Protocol", "networks", "plan"]

# Students that leave something out: features or logits of the teacher, the choice of blocks, the teacher altogether.
ABLATIONS = ("kd", "at", "random", "magnitude")
RECIPES = ("ours", "paper")
# The weight of AT: that of its authors' code for a mean over positions.
AT_BETA = 1000.0


@dataclass(frozen=True)
class Protocol:
    """Options of `data.cifar100.load`, rows of a batch, epochs of a round (`full`: a sixth of 240) and of the teacher
    (None: six rounds, as every dense student), weights of SAD and of AT."""

    round_epochs: int
    batch: int = 64
    images: int | None = None
    validation: int = 5_000
    pixels: int = 32
    classes: int = 100
    beta: float = 200.0
    at_beta: float = AT_BETA
    teacher_epochs: int | None = None


# What two CPU cores can do in an hour or two for three seeds; everything but these numbers is the same. Twenty classes,
# since in so few steps a hundred are hardly learnt, and then methods differ by chance. In 12 epochs a teacher knows no
# more than the plain student (48.0 and 49.9 % of the test images): it has 36. The weights of the long schedule leave
# the classes too little; on validation images of seed 0 dense SAD has 42.6 % with 200, 49.2 with 30 and 49.5 with 5,
# dense AT 38.6 with 1000 (these under a teacher of 12 epochs), 51.9 with 100 and 51.1 with 20.
PROTOCOLS = {
    "full": Protocol(40),
    "reduced": Protocol(2, 64, 5_000, 1_000, 16, 20, beta=30.0, at_beta=100.0, teacher_epochs=36),
}


@dataclass(frozen=True)
class Choice:
    """What the user picked. See `RunConfig`, which has the same fields."""

    methods: tuple[str, ...] = tuple(METHODS)
    densities: tuple[float, ...] = (0.45,)
    quick: bool = False
    recipe: str = "ours"
    protocol: str = "full"
    pattern: str = "16x1"


@dataclass(frozen=True)
class Network:
    """One network to train: its name in the report, its folder, how it learns.

    alpha, beta, features   weights of KD and of the feature term, and which it is: "sad" or "at".
    method, schedule        what prunes it and when, None for dense networks; `options` are the method's.
    densities               shares of weights at which it is kept and becomes a row, on the schedule; () for dense ones.
    ticket                  how the first stage of SS-SAD learns, where that is not as the second: its rate and decay.
    pattern                 blocks that are pruned, the same on every device: what is learnt must not depend on it.
    """

    name: str
    folder: str
    recipe: Recipe
    alpha: float = 0.0
    beta: float = 0.0
    features: str = "sad"
    method: str | None = None
    densities: tuple[float, ...] = ()
    schedule: Schedule | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ticket: Recipe | None = None
    pattern: str = "16x1"

    def file(self, density: float | None) -> str:
        """Name of the file with the weights of one row."""
        return "model.safetensors" if len(self.densities) < 2 else f"model-{density:g}.safetensors"


def networks(task: Task, choice: Choice) -> list[Network]:
    """The teacher first, then the dense students, then the pruned ones."""
    found = _of_images(task, choice) if task.kind == "images" else _of_ratings(task, choice)
    return [dataclasses.replace(network, pattern=choice.pattern) for network in found]


# The weights of KD and SAD for ratings. On the validation part of the movies task alpha 1 with beta 0 and 10 are within
# the spread of seeds, beta 100 is worse. The paper's beta of 50 to 200 belongs to a cross-entropy on CIFAR-100.
ALPHA, BETA = 1.0, 10.0


def _of_ratings(task: Task, choice: Choice) -> Iterator[Network]:
    # A lottery ticket is trained again after its last rewinding; in fewer than 6 epochs SS-SAD has no room to prune.
    epochs = 6 if choice.quick else max(2 * task.student_recipe.epochs, 6)
    student = dataclasses.replace(task.student_recipe, epochs=epochs)
    yield from _dense(task.teacher_recipe, student, ALPHA, BETA, choice.methods)
    for method in (m for m in choice.methods if m not in ("kd", "at")):
        for density in (d for d in choice.densities if d < 1):
            base, options = _base(method)
            schedule, more = plan(base, 1 - density, epochs)
            weights = (0.0, 0.0) if method == "magnitude" else (ALPHA, BETA)
            yield Network(
                _title(method),
                f"{method}-{density:g}",
                student,
                *weights,
                method=base,
                densities=(density,),
                schedule=schedule,
                options={**options, **more},
            )


def _of_images(task: Task, choice: Choice) -> Iterator[Network]:
    protocol = PROTOCOLS[choice.protocol]
    length = 1 if choice.quick else protocol.round_epochs
    if choice.recipe == "paper":
        yield from _paper_networks(task, choice, protocol.batch, length / PROTOCOLS["full"].round_epochs)
        return
    targets = tuple(sorted(round(1 - density, 6) for density in choice.densities if density < 1))
    # On top of the published recipe: Nesterov, and a cosine to zero that every prune begins anew, so that each density
    # is trained to its end; the published steps would leave all but the first rounds with 1 % of the learning rate.
    dense = dataclasses.replace(
        task.student_recipe,
        optimizer="nesterov",
        milestones=None,
        restart="prune",
        epochs=6 * length,
        batch_size=protocol.batch,
    )
    teacher = dense if choice.quick else dataclasses.replace(dense, epochs=protocol.teacher_epochs or dense.epochs)
    yield from _dense(teacher, dense, 0.9, protocol.beta, choice.methods, protocol.at_beta)
    for method in (m for m in choice.methods if m not in ("kd", "at") and targets):
        base, options = _base(method)
        schedule, more, epochs = _sweep(base, targets, length)
        yield Network(
            _title(method),
            method,
            dataclasses.replace(dense, epochs=epochs),
            *((0.0, 0.0) if method == "magnitude" else (0.9, protocol.beta)),
            method=base,
            densities=tuple(round(1 - target, 6) for target in targets),
            schedule=schedule,
            options={**options, **more},
        )


def _sweep(method: str, targets: tuple[float, ...], length: int) -> tuple[Schedule, dict[str, Any], int]:
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


def _paper_networks(task: Task, choice: Choice, batch: int, scale: float) -> Iterator[Network]:
    """Table 2 of arXiv 2401.10484 with all epochs times `scale`; what it has no column for learns as SAD or SP-SAD.

    The column of SS-SAD is that of its second stage (a constant 5e-4, no decay); the first is a lottery ticket and
    learns as LTH-SAD does, at 0.05: at 5e-4 it would be cut by the size of weights that are hardly trained.
    """
    plain = dataclasses.replace(task.student_recipe, batch_size=batch)
    dense = dataclasses.replace(
        plain, epochs=_times(plain.epochs, scale), milestones=tuple(_times(m, scale) for m in plain.milestones or ())
    )
    yield from _dense(dense, dense, 0.9, 200.0, choice.methods)
    for method in (m for m in choice.methods if m not in ("kd", "at")):
        base, options = _base(method)
        column = _scaled(PAPER[base], scale)
        passed = sorted({round(1 - column.schedule.removed_after(e), 6) for e in range(1, column.epochs + 1)})
        densities = tuple(d for d in sorted(choice.densities, reverse=True) if d < 1)
        if not {round(d, 6) for d in densities} <= set(passed):
            raise ValueError(
                f"sparsekd run: --recipe paper prunes {method} to the densities {', '.join(f'{d:g}' for d in passed)}, "
                f"got {', '.join(f'{d:g}' for d in densities)}; choose among these, or --recipe ours"
            )
        learning = dataclasses.replace(
            plain,
            lr=column.learning_rate,
            weight_decay=column.weight_decay,
            epochs=column.epochs,
            milestones=column.milestones,
            restart="never",
        )
        lottery = PAPER["lth-sad"]
        ticket = dataclasses.replace(learning, lr=lottery.learning_rate, weight_decay=lottery.weight_decay)
        yield Network(
            _title(method),
            method,
            learning,
            *((0.0, 0.0) if method == "magnitude" else (column.alpha, column.beta)),
            method=base,
            densities=densities,
            schedule=column.schedule,
            options=options,
            ticket=ticket if base == "ss-sad" else None,
        )


def _scaled(column: PaperRecipe, scale: float) -> PaperRecipe:
    schedule = dataclasses.replace(column.schedule, every=_times(column.schedule.every, scale))
    ticket = round(schedule.start / schedule.rate + 1) * schedule.every if schedule.start else 0
    shortest = ticket + schedule.prunes * schedule.every + 1
    milestones = tuple(_times(epoch, scale) for epoch in column.milestones)
    epochs = max(_times(column.epochs, scale), shortest)
    return dataclasses.replace(column, schedule=schedule, milestones=milestones, epochs=epochs)


def _times(epochs: int, scale: float) -> int:
    return max(1, round(epochs * scale))


def _dense(
    teacher: Recipe, student: Recipe, alpha: float, beta: float, methods: tuple[str, ...], at_beta: float = AT_BETA
) -> Iterator[Network]:
    yield Network("teacher", "teacher", teacher)
    yield Network("student", "student", student)
    if "kd" in methods:
        yield Network("KD", "kd", student, alpha)
    if "at" in methods:
        yield Network("AT", "at", student, 0.0, at_beta, "at")
    yield Network("SAD", "sad", student, alpha, beta)


def _base(method: str) -> tuple[str, dict[str, Any]]:
    """Which method runs under this name, and with which options: the ablations are SP-SAD with something left out."""
    if method == "random":
        return "sp-sad", {"score": "random"}
    return ("sp-sad", {}) if method == "magnitude" else (method, {})


def _title(method: str) -> str:
    return {"random": "random blocks, SAD", "magnitude": "SP, no teacher"}.get(method, method.upper())


def plan(method: str, removed: float, epochs: int) -> tuple[LinearSchedule, dict[str, Any]]:
    """When to prune: the schedule that has removed the share `removed` after at most two thirds of the epochs.

    Three equal steps up to half of the epochs (SP-SAD, LTH-SAD). SS-SAD removes its first step in a ticket of a third
    of the epochs, and the two others in the next third.
    """
    if method == "ss-sad":
        ticket = max(2, epochs // 3)
        every = max(1, ticket // 2)
        schedule = LinearSchedule(removed / 3, every, final=removed, start=removed / 3)
        return schedule, {"initial": LinearSchedule(removed / 3, every, final=removed / 3), "initial_epochs": ticket}
    prunes = min(3, epochs - 1)
    return LinearSchedule(removed / prunes, max(1, epochs // (2 * prunes)), final=removed), {}
