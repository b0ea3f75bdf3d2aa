"""The tasks that `sparsekd run` knows: how each is read, what it trains, and the settings that are its own.

A new task is a reader in `sparsekd.data`, a plan in `runs/plans/` and an entry here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import data, models
from ..data import Task
from ..data.movies import GROUPS
from ..data.rankings import HELD_OUT, VALIDATION
from ..methods import METHODS
from . import budgets
from .config import RunConfig
from .plans import images, rankings, ratings
from .plans.network import KNOWN_METHODS, RANKING_METHODS, RANKING_METHODS_ALL, Counting, Plan
from .plans.recipe import RECIPES, Recipe

__all__ = [
    "TASKS",
    "Entry",
    "Option",
    "check_is_one",
    "complete",
    "entry_of",
    "folder_of",
    "plain_student",
    "plan_of",
    "several",
]


@dataclass(frozen=True)
class Option:
    """A setting of one task alone: `--NAME` of the command, `RunConfig.options[NAME]` in Python.

    choices     what it may be; none: a number, or any text if `text`.
    number      what makes the number of a text, and the least that it may be.
    in_folder   whether a choice other than the default is part of the name of the folder of the run.
    each        a choice that means a run for each of the others.
    """

    name: str
    default: str | None
    choices: tuple[str, ...]
    help: str
    in_folder: bool = False
    each: str | None = None
    number: tuple[type[int] | type[float], float] = (float, 0.0)
    text: bool = False

    def checked(self, value: Any) -> Any:
        """The value, a number made of its text.  ValueError for what it may not be."""
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"sparsekd run: {self.name} must be one of {', '.join(self.choices)}, got {value!r}")
            return value
        if self.text:
            if not isinstance(value, str) or not value:
                raise ValueError(f"sparsekd run: {self.name} must be a text, got {value!r}")
            return value
        kind, least = self.number
        try:
            number = math.nan if isinstance(value, bool) else kind(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, float) and number != value:  # a part of a whole number
            number = math.nan
        if not least <= number < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"sparsekd run: {self.name} must be {what} of {least:g} or more, got {value!r}")
        return number


def _usual_densities(options: Mapping[str, Any]) -> tuple[float, ...]:
    return (0.45,)


def _film_densities(options: Mapping[str, Any]) -> tuple[float, ...]:
    """Down to where accuracy breaks: the films are few, and a student trains in seconds."""
    return (0.45, 0.3, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Entry:
    """What a run needs to know of a task.

    load       reads it, as the run wants it.
    plan       the networks to train.
    options    settings of its own.
    methods    what is trained unless the call names methods.
    known      the methods that it can be trained by.
    densities  what is kept unless the call names densities, by the options.
    on_gpu     whether training is on CUDA, and there in bf16, unless the call says otherwise.
    blocks     whether it prunes blocks, which can be counted in several units; else entries of tables.
    describe   a line on what was read, for the reader to see before anything is trained.
    """

    load: Callable[[RunConfig], Task]
    plan: Callable[[Task, RunConfig], Plan]
    options: tuple[Option, ...] = ()
    methods: tuple[str, ...] = tuple(METHODS)
    known: tuple[str, ...] = KNOWN_METHODS
    densities: Callable[[Mapping[str, Any]], tuple[float, ...]] = _usual_densities
    on_gpu: bool = False
    blocks: bool = True
    describe: Callable[[Task], str] | None = None


# By the published recipe a run counts weights, and each method chooses as in the paper.
_RATINGS_RECIPE = Option("recipe", "ours", RECIPES, "ours, or paper to count weights as it does", in_folder=True)


def _load_ratings(name: str, config: RunConfig) -> Task:
    of_reader = {option: value for option, value in config.options.items() if option != "recipe"}
    return ratings.shortened(data.load(name, config.data_dir, **of_reader), config.quick)


def _rated(name: str, recipe: Recipe) -> Entry:
    plan = partial(ratings.of_ratings, recipe=recipe)
    return Entry(load=partial(_load_ratings, name), plan=plan, options=(_RATINGS_RECIPE,))


def _image_densities(options: Mapping[str, Any]) -> tuple[float, ...]:
    return (0.7, 0.5, 0.4, 0.3) if options["recipe"] == "paper" else (0.7, 0.5, 0.4, 0.3, 0.2)


_NETWORKS = tuple(models.CLASSIFIERS)

TASKS: dict[str, Entry] = {
    "movietweetings": Entry(
        load=partial(_load_ratings, "movietweetings"),
        plan=ratings.of_movietweetings,
        options=(
            Option(
                "recipe",
                "ours",
                (*RECIPES, "long"),
                "ours; long, twice as many passes of students; or paper, which is long and counts weights",
                in_folder=True,
            ),
        ),
    ),
    "movielens": _rated("movielens", ratings.MOVIELENS),
    "movies": Entry(
        load=partial(_load_ratings, "movies"),
        plan=ratings.of_films,
        options=(
            Option("group", "all", (*GROUPS, "all"), "features of the films; all: a run of each", each="all"),
            _RATINGS_RECIPE,
        ),
        densities=_film_densities,
    ),
    "cifar100": Entry(
        load=partial(images.load, "cifar100"),
        plan=images.of_images,
        options=(
            Option("teacher", "wrn-40-2", _NETWORKS, "wrn-40-2, resnet-34, ..."),
            Option("student", "wrn-16-2", _NETWORKS, "wrn-16-2, resnet-18, mobilenet-v2, ..."),
            Option("recipe", "ours", RECIPES, "ours, or paper for its Table 2", in_folder=True),
            Option("protocol", "full", tuple(images.PROTOCOLS), "full, or reduced for a CPU", in_folder=True),
            Option("views", None, (), "crops of each image that the teacher sees, once; 0: all", number=(int, 0)),
        ),
        methods=KNOWN_METHODS,
        densities=_image_densities,
        on_gpu=True,
    ),
    "sparserec": Entry(
        load=rankings.load,
        plan=rankings.of_rankings,
        options=(
            Option("model", "mf", rankings.MODELS, "mf, neumf or lightgcn", in_folder=True),
            Option("lr", None, (), "learning rate, instead of that of the model"),
            Option("weight_decay", None, (), "AdamW's decay, instead of that of the model; not of sparserec-adam"),
            Option("epochs", None, (), "epochs, instead of those of the model", number=(int, 1)),
            Option("batch_size", None, (), "pairs of a step, instead of a 32nd of them up to 8192", number=(int, 2)),
            Option(
                "negatives",
                None,
                (),
                f"items not chosen that each pair is compared with ({rankings.NEGATIVES})",
                number=(int, 1),
            ),
            Option(
                "min_rating",
                None,
                (),
                "ratings from it on count as chosen (4 of 5, 7 of 10, 1 of 0 and 1; of other numbers all)",
            ),
            *(
                Option(name, None, (), f"column of {what} in a table, where it has no usual name", text=True)
                for name, what in rankings.COLUMNS.items()
            ),
            Option(
                "validation",
                HELD_OUT,
                VALIDATION,
                "held-out, or learnt for the last training, by epochs that were found before",
                in_folder=True,
            ),
        ),
        methods=RANKING_METHODS,
        known=RANKING_METHODS_ALL,
        densities=lambda options: (0.2, 0.1, 0.05),
        blocks=False,
        describe=rankings.describe,
    ),
}


def entry_of(name: str) -> Entry:
    """The entry of a task.  ValueError for a name there is not."""
    if name not in TASKS:
        raise ValueError(f"sparsekd run: name must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def complete(config: RunConfig) -> RunConfig:
    """The same run with every default of its task written out.

    Raises ValueError for an unknown task, an option of another task, and a choice there is not.
    """
    entry = entry_of(config.task)
    own = {option.name: option for option in entry.options}
    for name, value in config.options.items():
        if name not in own:
            raise ValueError(_not_its_own(config.task, name, value))
    for method in config.methods or ():
        if method not in entry.known:
            raise ValueError(f"sparsekd run: {config.task} is trained by {', '.join(entry.known)}, got {method!r}")
    if not entry.blocks:
        _check_counts_no_blocks(config)
    given = {name: own[name].checked(value) for name, value in config.options.items()}
    options = {option.name: option.default for option in entry.options if option.default is not None} | given
    methods = entry.methods if config.methods is None else config.methods
    densities = config.densities
    if densities is None and config.budgets is None:
        densities = entry.densities(options)
    unit = config.unit or _usual_unit(options)
    scope = config.scope or _usual_scope(unit)
    return dataclasses.replace(config, options=options, methods=methods, densities=densities, unit=unit, scope=scope)


def _check_counts_no_blocks(config: RunConfig) -> None:
    usual = RunConfig(unit=_usual_unit({}), scope=_usual_scope(_usual_unit({})))  # as in a complete one
    settings = {"budgets": "budget", "unit": "unit", "scope": "scope", "pattern": "pattern", "at_once": "at-once"}
    found = {flag: (getattr(config, name), getattr(usual, name)) for name, flag in settings.items()}
    given = [f"--{flag}" for flag, (value, expected) in found.items() if value not in (None, expected)]
    given = ["--budget"] if config.budgets else given  # whose unit it is
    if given:
        raise ValueError(
            f"sparsekd run: {config.task} keeps shares of the entries of tables, which --density names; leave out "
            f"{', '.join(given)}, which is for blocks of layers"
        )


def _usual_unit(options: Mapping[str, Any]) -> str:
    return "weights" if options.get("recipe") == "paper" else "macs"


def _usual_scope(unit: str) -> str | None:
    """None: as each method has it in the paper, which counts weights."""
    return None if unit == "weights" else "cost"


def _not_its_own(task: str, name: str, value: Any) -> str:
    owners = [owner for owner, entry in TASKS.items() if name in {option.name for option in entry.options}]
    if not owners:
        known = ", ".join(option.name for option in entry_of(task).options) or "none"
        return f"sparsekd run: {task} has no option {name!r}; its options: {known}"
    flag = f"--{name.replace('_', '-')} {value}"
    return f"sparsekd run: {flag} belongs to the task {' or '.join(owners)}, got {task}; leave it out"


def several(config: RunConfig) -> list[RunConfig]:
    """The runs that one call means: several where an option has the choice that stands for each of the others."""
    config = complete(config)
    for option in entry_of(config.task).options:
        if option.each is not None and config.options[option.name] == option.each:
            return [_one_of(config, option.name, choice) for choice in option.choices if choice != option.each]
    return [config]


def check_is_one(config: RunConfig) -> None:
    """Raise ValueError where a call means several runs."""
    each = several(config)
    if len(each) > 1:
        options = " or ".join(str(one.options) for one in each)
        raise ValueError(
            f"sparsekd run: {config.task} with the options {complete(config).options} means {len(each)} runs; give "
            f"options {options}, or call run for each of runs.several(config)"
        )


def _one_of(config: RunConfig, option: str, choice: str) -> RunConfig:
    out = None if config.out is None else str(Path(config.out) / choice)
    return dataclasses.replace(config, options={**config.options, option: choice}, out=out)


def plan_of(task: Task, config: RunConfig) -> Plan:
    """The networks that a complete run trains."""
    if config.options.get("recipe") == "paper" and (config.unit, config.scope) != ("weights", None):
        raise ValueError(
            "sparsekd run: the published recipe counts weights, each method in its own scope; "
            f"got unit {config.unit} and scope {config.scope}; leave them out, or take --recipe ours"
        )
    if config.options.get("recipe") == "paper" and config.at_once is not None:
        raise ValueError(
            "sparsekd run: the published recipe prunes while it trains, got at_once too; leave one of them out"
        )
    shares = budgets.in_shares(config, task, lambda: plain_student(task, config)())
    plan = entry_of(config.task).plan(task, dataclasses.replace(config, budgets=None, densities=tuple(shares)))
    counted = Counting(unit_of(config), config.scope, config.costs, shares)
    plan = plan.in_blocks(config.pattern).counting(counted)
    return plan if config.at_once is None else plan.at_once(config.at_once)


def plain_student(task: Task, config: RunConfig) -> Callable[[], nn.Module]:
    """What makes the student that a complete run prunes."""
    plan = entry_of(config.task).plan(task, dataclasses.replace(config, budgets=None, densities=(1.0,)))
    if not plan.students:
        raise ValueError(
            f"sparsekd run: {config.task} keeps shares of the entries of tables, got "
            f"{', '.join(config.budgets or (f'unit {config.unit}',))}; give --density"
        )
    return plan.students[0].make


def own_options() -> dict[tuple[str, ...], dict[str, tuple[str, str]]]:
    """What `--help` says of the options that tasks have for themselves: of which tasks, by name, what stands for a
    value, and what it is. What several tasks say alike is said once."""
    explained: dict[str, dict[str, str]] = {}
    metavars: dict[str, str] = {}
    for task, entry in TASKS.items():
        for option in entry.options:
            usual = "" if option.default is None else f" ({option.default})"
            explained.setdefault(option.name, {})[task] = f"{option.help}{usual}"
            metavars[option.name] = "COLUMN" if option.text else "NAME" if option.choices else "N"
    grouped: dict[tuple[str, ...], dict[str, tuple[str, str]]] = {}
    for name, texts in explained.items():
        alike = len(set(texts.values())) == 1
        text = next(iter(texts.values())) if alike else "; ".join(f"{task}: {text}" for task, text in texts.items())
        grouped.setdefault(tuple(texts), {})[name] = metavars[name], text
    return grouped


def unit_of(config: RunConfig) -> str:
    """What the densities of a complete run count."""
    assert config.unit is not None  # `complete` has filled it in
    return config.unit


def folder_of(config: RunConfig, task: Task) -> Path:
    """Where a complete run writes: `out`, or runs/<task> with what differs from the usual."""
    if config.out is not None:
        return Path(config.out)
    options = entry_of(config.task).options
    differs = [config.options[o.name] for o in options if o.in_folder and config.options[o.name] != o.default]
    parts = [task.name, *differs]
    unit = unit_of(config)
    usual = (None, _usual_unit(config.options), _usual_scope(unit))
    parts += [word for word in (unit, config.scope) if word not in usual]
    if config.quick:
        parts.append("quick")
    return Path("runs") / "-".join(parts)
