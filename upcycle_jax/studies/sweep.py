"""Sweeps: which command lines a study consists of. Nothing here runs anything (`sweeps_run`) or
writes jobs (`sweeps_jobs`).

A *stage* is a command line with open places: dense pre-training, continuing the dense model,
continuing the upcycled one. An *axis* is a list of choices, each a set of bindings. A stage is
multiplied by its own axes and by those of the stage that it starts from; each product is a *cell*:
one ordinary `python -m upcycle_jax.train` or `upcycle`. A cell that several others start from is
there once.
"""

import dataclasses
import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from upcycle_jax import checks
from upcycle_jax.step_names import step_name

SEED_AXIS = "seed"
STEPS_KEY = "steps"
START_KEY = "start_after"
COMMANDS = ("train", "upcycle")
CACHE = "cache_tasks"
ROOT_MARK = "{SWEEP_DIR}"

Bindings = Mapping[str, Any]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of run of a sweep.

    Attributes:
      name: letters, digits, '_', '.', '+'; part of the cells' folders.
      gin_files: what the cells read, in order, found as by every command.
      bindings: gin name -> value, for every cell of the stage. Text that starts with '@' or '%' is
        gin text, all else a literal.
      axes: names of the axes that multiply the stage and whose bindings it gets.
      steps: updates that a cell does; an axis may bind 'steps' instead. Not for 'upcycle'.
      start_from: stage whose checkpoint a cell continues or converts: binds
        INITIAL_CHECKPOINT_PATH, and TRAIN_STEPS counts on from it.
      start_after: how many updates of `start_from` that checkpoint has, None for all: a run may
        have several branches, each with a cool-down of its own. An axis may bind 'start_after'
        instead. Checkpoints have to be there: SAVING_PERIOD and KEEP_CHECKPOINTS of `start_from`.
      batches_after: stage after which the data goes on, for a run from scratch that shall see the
        batches of a continuation (FIRST_BATCH).
      command: 'train' or 'upcycle'.
      label: how reports call it; None for the name.
    """

    name: str
    gin_files: Sequence[str]
    bindings: Bindings = dataclasses.field(default_factory=dict)
    axes: Sequence[str] = ()
    steps: checks.CountOrZero | None = None
    start_from: str | None = None
    start_after: checks.Count | None = None
    batches_after: str | None = None
    command: str = "train"
    label: str | None = None

    def __post_init__(self) -> None:
        checks.check_fields(self)
        _check_name("Stage.name", self.name)
        if self.command not in COMMANDS:
            raise ValueError(
                f"Stage.command of {self.name!r} is {self.command!r}: choose one of"
                f" {', '.join(map(repr, COMMANDS))}"
            )
        if not self.gin_files:
            raise ValueError(
                f"Stage.gin_files of {self.name!r} is {self.gin_files!r}: give a list of gin files"
            )
        if self.start_after is not None and self.start_from is None:
            raise ValueError(
                f"Stage.start_after of {self.name!r} is {self.start_after}, without a stage that it"
                " starts from: set Stage.start_from"
            )
        if self.command == "upcycle" and (self.steps is not None or self.start_from is None):
            raise ValueError(
                f"stage {self.name!r} converts a checkpoint: it needs start_from and takes no steps"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: of its folder below `<sweep>/cells`, unique.
      stage: the stage's name.
      labels: axis -> the label of its choice, seed included.
      command: 'train', 'upcycle', or 'cache_tasks' for the shared cache of the data.
      words: the command's flags.
      folder: the run's MODEL_DIR, or the folder in which the converted checkpoint or the cache
        lies.
      start_step: step that it starts from.
      end_step: step of its last checkpoint.
      needs: names of the cells that must have finished before.
    """

    name: str
    stage: str
    labels: Mapping[str, str]
    command: str
    words: tuple[str, ...]
    folder: str
    start_step: int
    end_step: int
    needs: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> str:
        """The checkpoint that it leaves."""
        return f"{self.folder}/{step_name(self.end_step)}"

    @property
    def gin(self) -> tuple[list[str], list[str]]:
        """Gin files and bindings of the command line."""
        files = [
            word.removeprefix("--gin_file=")
            for word in self.words
            if word.startswith("--gin_file=")
        ]
        return files, [
            word.removeprefix("--gin.") for word in self.words if word.startswith("--gin.")
        ]

    def command_line(self, python: str = "python") -> str:
        """The line for a shell."""
        return shell_line([python, "-m", f"upcycle_jax.{self.command}", *self.words])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A study: stages times axes.

    Attributes:
      name: of the study, e.g. of jobs.
      sweep_dir: folder of everything: `cells/`, `logs/`, `sweep.json`, `table.jsonl`.
      stages: the stages; one that others start from comes before them.
      axes: axis -> choices. Choices are a list of values of the gin name that the axis is called,
        or label -> bindings; a binding 'steps' sets `Stage.steps`, 'start_after'
        `Stage.start_after`.
      seeds: values of the axis 'seed', which binds RANDOM_SEED: of parameters, dropout and data
        order.
      points: None for the full grid, or a list of {axis: label}: only cells that agree with one of
        them on the axes that both name.
      bindings: for every cell of every stage, before the stage's own.
      cached_tasks: tasks and mixtures whose data are tokenised once, by a first cell with the gin
        files and bindings of the first stage that trains (TEXT_FILES, VOCABULARY, ...), and read
        from that cache by all others; none by default.
      baseline: stage that differences are taken against, e.g. dense continuation; None for no
        differences.
      chosen_over: axes over whose settings each stage is tuned: the command names the best of them
        on the validation split, over all seeds, and writes them to `chosen.json`.
      chosen_by: 'accuracy' (the highest) or 'cross_ent_loss' (the lowest).
      title: heading of the report.
      scale: sentences that say at which scale and on which data this was measured.
    """

    name: str
    sweep_dir: checks.PathText
    stages: Sequence[Stage]
    axes: Mapping[str, Sequence[Any] | Mapping[str, Bindings]] = dataclasses.field(
        default_factory=dict
    )
    seeds: Sequence[checks.Seed] = (0,)
    points: Sequence[Mapping[str, Any]] | None = None
    bindings: Bindings = dataclasses.field(default_factory=dict)
    cached_tasks: Sequence[str] = ()
    baseline: str | None = None
    chosen_over: Sequence[str] = ()
    chosen_by: Literal["accuracy", "cross_ent_loss"] = "accuracy"
    title: str = ""
    scale: str = ""

    def __post_init__(self) -> None:
        checks.check_fields(self)
        _check_name("Sweep.name", self.name)
        if not str(self.sweep_dir):
            raise ValueError("Sweep.sweep_dir is empty: name the folder of the study (SWEEP_DIR)")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names) or CACHE in names:
            raise ValueError(
                f"Sweep.stages must be stages with different names, none of them {CACHE!r}, got"
                f" {names}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Sweep.seeds is {list(self.seeds)}: give different whole numbers")
        if SEED_AXIS in self.axes:
            raise ValueError(f"Sweep.axes names {SEED_AXIS!r}: give Sweep.seeds instead")
        for axis in self.chosen_over:
            if axis not in self.axes:
                raise ValueError(
                    f"Sweep.chosen_over names {axis!r}; the axes are {list(self.axes)}"
                )
        for index, stage in enumerate(self.stages):
            for axis in stage.axes:
                if axis != SEED_AXIS and axis not in self.axes:
                    raise ValueError(
                        f"stage {stage.name!r} names the axis {axis!r}; the axes are"
                        f" {[SEED_AXIS, *self.axes]}"
                    )
            for field in ("start_from", "batches_after"):
                other = getattr(stage, field)
                if other is not None and other not in names[:index]:
                    raise ValueError(
                        f"Stage.{field} of {stage.name!r} is {other!r}: name a stage that comes"
                        f" before it, of {names[:index]}"
                    )
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"Sweep.baseline is {self.baseline!r}; the stages are {names}")
        choices = self.choices()
        for point in self.points or ():
            for axis, label in point.items():
                if str(label) not in choices.get(axis, {}):
                    raise ValueError(
                        f"Sweep.points names {axis}={label!r}; the choices are"
                        f" { ({a: list(c) for a, c in choices.items()}) }"
                    )

    @property
    def root(self) -> str:
        """`sweep_dir`, absolute where it is local."""
        folder = str(self.sweep_dir).rstrip("/")
        return folder if "://" in folder else os.path.abspath(os.path.expanduser(folder))

    @property
    def compared(self) -> list[str]:
        """Stages that no other stage starts from: the runs that reports compare."""
        used = {stage.start_from for stage in self.stages}
        return [
            stage.name
            for stage in self.stages
            if stage.name not in used and stage.command == "train"
        ]

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def choices(self) -> dict[str, dict[str, Bindings]]:
        """Axis -> label -> bindings, the seeds last.

        Raises:
          ValueError: an axis without choices, two of one label, or a label that cannot be part of a
            folder's name.
        """
        result: dict[str, dict[str, Bindings]] = {}
        for axis, given in self.axes.items():
            pairs = (
                list(given.items())
                if isinstance(given, Mapping)
                else [(_label(value), {axis: value}) for value in given]
            )
            result[axis] = {str(label): bindings for label, bindings in pairs}
            if not pairs or len(result[axis]) < len(pairs):
                raise ValueError(
                    f"axis {axis!r} has the choices {[label for label, _ in pairs]}: give at least"
                    " one, each once"
                )
            for label, bindings in result[axis].items():
                _check_name(f"a label of axis {axis!r}", label)
                if not isinstance(bindings, Mapping):
                    raise ValueError(
                        f"axis {axis!r}, choice {label!r}: {bindings!r} is not a dictionary of"
                        " bindings"
                    )
        result[SEED_AXIS] = {str(seed): {"RANDOM_SEED": seed} for seed in self.seeds}
        return result

    def cells(self) -> list[Cell]:
        """All cells, each after those that it needs.

        Raises:
          ValueError: a train stage without steps.
        """
        return _Planner(self).cells()


class _Planner:
    """Stages and axes -> cells."""

    def __init__(self, sweep: Sweep):
        self._sweep, self._choices = sweep, sweep.choices()
        self._axes: dict[str, tuple[str, ...]] = {}
        for stage in sweep.stages:
            inherited = [
                self._axes[other] for other in (stage.start_from, stage.batches_after) if other
            ]
            wanted = {*stage.axes, *itertools.chain.from_iterable(inherited)}
            self._axes[stage.name] = tuple(axis for axis in self._choices if axis in wanted)

    def cells(self) -> list[Cell]:
        done: dict[str, Cell] = {}
        if self._sweep.cached_tasks:
            done[CACHE] = self._cache()
        for stage in self._sweep.stages:
            for labels in self._points(stage):
                cell = self._cell(stage, labels, done)
                done[cell.name] = cell
        return list(done.values())

    def _cache(self) -> Cell:
        folder = f"{self._sweep.root}/{CACHE}"
        stage = next(stage for stage in self._sweep.stages if stage.command == "train")
        words = (
            *_flags(stage.gin_files, {**self._sweep.bindings, **stage.bindings}),
            f"--tasks={','.join(self._sweep.cached_tasks)}",
            f"--output_cache_dir={folder}",
        )
        return Cell(
            name=CACHE,
            stage=CACHE,
            labels={},
            command=CACHE,
            words=words,
            folder=folder,
            start_step=0,
            end_step=0,
        )

    def _points(self, stage: Stage) -> list[dict[str, str]]:
        axes = self._axes[stage.name]
        grid = [
            dict(zip(axes, labels, strict=True))
            for labels in itertools.product(*(self._choices[axis] for axis in axes))
        ]
        points = self._sweep.points
        if points is None:
            return grid
        return [
            labels
            for labels in grid
            if any(
                all(labels.get(a, str(v)) == str(v) for a, v in point.items()) for point in points
            )
        ]

    def _name(self, stage: str, labels: Mapping[str, str]) -> str:
        return "-".join(
            [stage, *(f"{axis.rpartition('.')[2]}={labels[axis]}" for axis in self._axes[stage])]
        )

    def _cell(self, stage: Stage, labels: dict[str, str], done: Mapping[str, Cell]) -> Cell:
        name = self._name(stage.name, labels)
        folder = f"{self._sweep.root}/cells/{name}"
        own: dict[str, Any] = {**self._sweep.bindings, **stage.bindings}
        for axis in self._choices:
            if axis in stage.axes:
                own.update(self._choices[axis][labels[axis]])
        steps = own.pop(STEPS_KEY, stage.steps)
        parent = done[self._name(stage.start_from, labels)] if stage.start_from else None
        start = self._start(name, own.pop(START_KEY, stage.start_after), parent)
        if parent:
            own["INITIAL_CHECKPOINT_PATH"] = f"{parent.folder}/{step_name(start)}"
        if stage.batches_after:
            own["FIRST_BATCH"] = done[self._name(stage.batches_after, labels)].end_step
        if stage.command == "upcycle":
            end = start
            own["OUTPUT_CHECKPOINT_PATH"] = f"{folder}/{step_name(end)}"
        else:
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(
                    f"cell {name!r} has steps = {steps!r}: set Stage.steps of {stage.name!r}, or"
                    " bind 'steps' in an axis"
                )
            end = start + steps
            own |= {"MODEL_DIR": folder, "TRAIN_STEPS": end}
        words = _flags(stage.gin_files, own)
        needs = [parent.name] if parent else []
        if self._sweep.cached_tasks and stage.command == "train":
            words += [
                "--gin.USE_CACHED_TASKS=True",
                f"--seqio_additional_cache_dirs={done[CACHE].folder}",
            ]
            needs.append(CACHE)
        return Cell(
            name=name,
            stage=stage.name,
            labels=labels,
            command=stage.command,
            words=tuple(words),
            folder=folder,
            start_step=start,
            end_step=end,
            needs=tuple(needs),
        )

    def _start(self, name: str, after: Any, parent: Cell | None) -> int:
        """The step that a cell starts from."""
        if parent is None or after is None:
            return parent.end_step if parent else 0
        done = parent.end_step - parent.start_step
        if not isinstance(after, int) or not 0 < after <= done or parent.command != "train":
            raise ValueError(
                f"cell {name!r} has start_after = {after!r}, and {parent.name!r} does {done}"
                f" updates: give a number from 1 to {done}, or leave it out"
            )
        return parent.start_step + after


def _flags(gin_files: Sequence[str], bindings: Bindings) -> list[str]:
    return [
        *(f"--gin_file={file}" for file in gin_files),
        *(f"--gin.{key}={gin_text(value)}" for key, value in bindings.items()),
    ]


def shell_line(words: Sequence[str]) -> str:
    """Words for a shell; single quotes, which gin's strings need, inside double ones.

    >>> print(shell_line(["train", "--gin.MODEL_DIR='/a b'", "--gin.X=(1, 2)"]))
    train "--gin.MODEL_DIR='/a b'" '--gin.X=(1, 2)'
    """
    return " ".join(
        f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
        for word in words
    )


def gin_text(value: Any) -> str:
    """A value as gin text; text that starts with '@' or '%' stays as it is, also inside containers.

    >>> gin_text({"a": ["@Recipe()", 1.5, "x"]})
    "{'a': [@Recipe(), 1.5, 'x']}"
    """
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{gin_text(key)}: {gin_text(part)}" for key, part in value.items())
            + "}"
        )
    if isinstance(value, tuple):
        return "(" + ", ".join(map(gin_text, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(gin_text, value)) + "]"
    return value if isinstance(value, str) and value[:1] in ("@", "%") else repr(value)


def _label(value: Any) -> str:
    """The label of a plain value: itself where it can be one, else its letters and digits."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+]+", "_", text).strip("_") or "empty"


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(str(name)):
        raise ValueError(
            f"{what} is {name!r}: use letters, digits, '_', '.' and '+', because it becomes part of"
            " a folder's name"
        )
