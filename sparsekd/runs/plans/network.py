"""A network of a run, and the plan that names them all: one teacher, and the students that learn from it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...methods import METHODS, PAPER
from ...methods.first_scores import FIRST_SCORES
from ...pruning import ListedSchedule, Schedule
from ...pruning.schedule import described
from .recipe import Recipe

# Students that leave something out: features or logits of the teacher, the choice of blocks, the teacher altogether.
ABLATIONS = ("kd", "at", "random", "magnitude")
DENSE_ABLATIONS = ("kd", "at")  # the two that prune nothing
KNOWN_METHODS = (*METHODS, *ABLATIONS)
# What a task of rankings trains beside its dense model (see rankings.py), each at equal bytes.
RANKING_METHODS = ("small", "random-mask", "one-shot", "imp", "rigl", "pep", "sparserec")
_VARIANTS = ("kd", "random", "normal", "static", "last", "absolute", "sampled", "adam")
RANKING_ABLATIONS = tuple(f"sparserec-{what}" for what in _VARIANTS)
RANKING_METHODS_ALL = (*RANKING_METHODS, *RANKING_ABLATIONS)
# The weight of AT: that of its authors' code for a mean over positions.
AT_BETA = 1000.0
# By what a student can be pruned before its first step: its first weights, as its method scores them, or saliencies of
# some batches.
AT_ONCE = ("magnitude", *FIRST_SCORES)


@dataclass(frozen=True)
class Counting:
    """What the students of a run are pruned by.

    unit, scope  as of a schedule and of `Pruner`; scope None: as each method has it in the paper.
    costs        file of a table, for microseconds.
    asked        density -> the number that was asked for, a share or absolute.
    """

    unit: str
    scope: str | None = None
    costs: str | None = None
    asked: Mapping[float, float] = field(default_factory=dict)

    def named(self, density: float) -> str:
        number = self.asked.get(density, density)
        return f"{self.unit}={number:g}"


@dataclass(frozen=True)
class Network:
    """One network to train: its name in the report, its folder, how it is made and how it learns.

    make                    a fresh network, drawn from torch's global generator.
    alpha, beta, features   weights of KD and of the feature term, and which it is: "sad" or "at".
    method, schedule        what prunes it and when, None for dense networks; `options` are the method's.
    densities               shares, of what the schedule's unit counts, at which it is kept and becomes a row; () for
                            dense ones.
    costs                   file of the costs of its layers, for a schedule that counts microseconds.
    asked                   density -> what was asked for, as in "macs=0.45" or "latency_us=80".
    ticket                  how the first stage of SS-SAD learns, where that is not as the second: its rate and decay.
    pattern                 blocks that are pruned, the same on every device: what is learnt must not depend on it.
    """

    name: str
    folder: str
    make: Callable[[], nn.Module]
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
    costs: str | None = None
    asked: Mapping[float, str] = field(default_factory=dict)

    def counting(self, counted: Counting) -> Network:
        """The same network, pruned by shares of what is counted."""
        if self.schedule is None or self.method is None:
            return self
        options = dict(self.options)
        if "initial" in options:
            options["initial"] = dataclasses.replace(options["initial"], unit=counted.unit)
        options["scope"] = counted.scope or PAPER[self.method].scope
        schedule = dataclasses.replace(self.schedule, unit=counted.unit)
        asked = {density: counted.named(density) for density in self.densities}
        return dataclasses.replace(self, schedule=schedule, options=options, costs=counted.costs, asked=asked)

    def at_once(self, score: str) -> Network:
        """The same network, pruned before its first step by ``score``, one of AT_ONCE; random blocks stay random.

        SS-SAD makes a ticket of two thirds of what is to go, and removes the rest after the first epoch of its second
        stage. A saliency needs a gradient, which networks whose last layer starts as zeros have from a teacher alone:
        where none takes part at first (the ticket of SS-SAD, a student without a teacher) the first weights judge. The
        name says what does: "at once by snip", "at once by lamp", and "at once" by magnitude. What rewinds goes back to
        the first weights. Raises ValueError where one student passes several densities.
        """
        if self.schedule is None or self.method is None:
            return self
        if len(self.densities) > 1:
            raise ValueError(
                f"sparsekd run: {self.name} trains one student along {len(self.densities)} densities, which cannot all "
                "be reached before its first step; leave --at-once out, or give one --density"
            )
        final, every, unit = self.schedule.final, self.schedule.every, self.schedule.unit
        options, start, first = dict(self.options), 0.0, 0
        options.pop("rewind_to", None)  # there is no epoch before the first prune
        in_stages = "initial" in options
        if in_stages:
            start, first = round(2 * final / 3, 6), 1
            options["initial"] = ListedSchedule((start,), every, unit=unit, first=0)
        judge = options.get("score", "magnitude")
        if score != "magnitude" and judge != "random" and not in_stages and (self.alpha or self.beta):
            options["first_score"] = judge = score
        schedule = ListedSchedule((final,), every, start=start, unit=unit, first=first)
        name, folder = f"{self.name} at once", f"{self.folder}-at-once"
        if judge not in ("magnitude", "random"):
            name, folder = f"{name} by {judge}", f"{folder}-{judge}"
        return dataclasses.replace(self, name=name, folder=folder, schedule=schedule, options=options)

    def file(self, density: float | None) -> str:
        """Name of the file with the weights of one row."""
        return "model.safetensors" if len(self.densities) < 2 else f"model-{density:g}.safetensors"

    def settings(self) -> dict[str, Any]:
        """Everything but how it is made, for the file that says under which settings it was trained."""
        settings = dataclasses.asdict(dataclasses.replace(self, make=nn.Identity))
        for name in ("make", "costs", "asked"):
            del settings[name]
        for recipe in (settings["recipe"], settings["ticket"]):
            # Runs from before there were these settings go on.
            for name, unused in (("splits", 1), ("averaged", 0)) if recipe is not None else ():
                if recipe[name] == unused:
                    del recipe[name]
        if self.schedule is not None:
            settings["schedule"] = described(self.schedule)
        if "initial" in self.options:
            settings["options"]["initial"] = described(self.options["initial"])
        if self.costs is not None:  # what the table says, not where it lies
            settings["costs"] = hashlib.sha256(Path(self.costs).read_bytes()).hexdigest()
        for schedule in (settings["schedule"], settings["options"].get("initial")):
            if schedule is not None and schedule["unit"] == "weights":
                del schedule["unit"]  # runs from before there were units go on
                if settings["options"].get("scope") == PAPER[settings["method"]].scope:
                    del settings["options"]["scope"]
        return settings

    def describe(self) -> str:
        """Recipe and schedule in one line."""
        recipe = self.recipe
        rate = "cosine to 0" if recipe.milestones is None else "constant"
        if recipe.milestones:
            rate = f"x 0.1 after epochs {', '.join(map(str, recipe.milestones))}"
        again = {"rewind": ", anew at every rewinding and stage", "prune": ", anew at every prune", "never": ""}
        length = f"{recipe.epochs} epochs" + (f" (1/{recipe.splits} of the rows each)" if recipe.splits > 1 else "")
        text = f"{length} of batch {recipe.batch_size}, {recipe.optimizer}, lr {recipe.lr:g} {rate}"
        text += (again[recipe.restart] if self.method else "") + f", weight decay {recipe.weight_decay:g}"
        if recipe.averaged:
            text += f", weights averaged over steps (decay {recipe.averaged:g})"
        if recipe.dropout or recipe.input_dropout:
            text += f", dropout {recipe.dropout:g} and {recipe.input_dropout:g} on the input"
        if self.alpha or self.beta:
            text += f"; alpha {self.alpha:g}, beta {self.beta:g} ({self.features})"
        if self.schedule is not None:
            text += f"; {self.method}: {self.schedule}"
            text += "".join(f", {name} {value}" for name, value in self.options.items())
        if self.ticket is not None:
            text += f"; its first stage with lr {self.ticket.lr:g}, weight decay {self.ticket.weight_decay:g}"
        return text


@dataclass(frozen=True)
class Plan:
    """What a run trains, in this order.

    architectures  names of teacher and student where there is a choice, else None.
    views          where rows are augmented: in how many fixed views of each the teacher is run, once for all students;
                   0: it is run in every step.
    timed_batches  batch sizes at which frozen networks are timed; a quick run takes the first two.
    about          what the protocol in the report says of this plan, by its headings.
    published      figures of others at the same task, which the report shows below ours: {"heading": ..., "rows":
                   {name: {metric: value}}}; with "chosen_on_test" it shows ours chosen on the test part, too.
    """

    teacher: Network
    students: tuple[Network, ...]
    architectures: tuple[str, str] | None = None
    views: int = 0
    timed_batches: tuple[int, ...] = (1, 64, 512)
    about: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] | None = None

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.teacher, *self.students)

    def counting(self, counted: Counting) -> Plan:
        """The same plan, its students pruned by shares of what is counted."""
        students = tuple(network.counting(counted) for network in self.students)
        return dataclasses.replace(self, students=students)

    def at_once(self, score: str) -> Plan:
        """The same plan, its students pruned before their first step by ``score``."""
        if not any(network.schedule for network in self.students):
            raise ValueError("sparsekd run: no student of this task is pruned by a schedule; leave --at-once out")
        return dataclasses.replace(self, students=tuple(network.at_once(score) for network in self.students))

    def in_blocks(self, pattern: str) -> Plan:
        """The same plan with blocks of `pattern`."""
        teacher, *students = (dataclasses.replace(network, pattern=pattern) for network in self.networks)
        return dataclasses.replace(self, teacher=teacher, students=tuple(students))


def dense_students(
    make: Callable[[], nn.Module],
    recipe: Recipe,
    methods: Sequence[str],
    *,
    alpha: float,
    beta: float,
    at_beta: float = AT_BETA,
) -> Iterator[Network]:
    """The plain student, those of the ablations in `methods` that prune nothing, and the one that learns by SAD."""
    yield Network(name="student", folder="student", make=make, recipe=recipe)
    if "kd" in methods:
        yield Network(name="KD", folder="kd", make=make, recipe=recipe, alpha=alpha)
    if "at" in methods:
        yield Network(name="AT", folder="at", make=make, recipe=recipe, beta=at_beta, features="at")
    yield Network(name="SAD", folder="sad", make=make, recipe=recipe, alpha=alpha, beta=beta)


def pruning_methods(methods: Sequence[str]) -> list[str]:
    return [method for method in methods if method not in DENSE_ABLATIONS]


def without(method: str) -> tuple[str, dict[str, Any]]:
    """Which method runs under this name, and with which options: the ablations are SP-SAD with something left out."""
    if method == "random":
        return "sp-sad", {"score": "random"}
    return ("sp-sad", {}) if method == "magnitude" else (method, {})


def weights_of(method: str, alpha: float, beta: float) -> dict[str, Any]:
    """The weights of the teacher's terms: none where the ablation leaves out the teacher."""
    return {"alpha": 0.0, "beta": 0.0} if method == "magnitude" else {"alpha": alpha, "beta": beta}


def title_of(method: str) -> str:
    return {"random": "random blocks, SAD", "magnitude": "SP, no teacher"}.get(method, method.upper())
