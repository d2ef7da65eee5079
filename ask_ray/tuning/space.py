"""A space of settings: YAML in, checked line by line, points out.

A space file has four parts. `about` tells people what it is for; `sweep` holds :class:`~ask_ray.config.SweepSettings`;
`settings` is a tree as `--config` takes it, shared by all trials; `space` maps dotted settings to distributions in Ray Tune's
terms, and may tie one to another's value::

    space:
      knowledge.refresh.policy: {choice: [static, fixed]}
      knowledge.refresh.interval: {choice: [1, 5], when: {knowledge.refresh.policy: fixed}}
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError
from ray import tune

from ask_ray.config import Section, Settings, SettingsError, SweepSettings, flat, with_values

#: A value for each swept setting that applies, by dotted name.
Point = dict[str, Any]

PARTS = ("about", "sweep", "settings", "space")

#: Distributions in Ray Tune's terms, and what each takes; the upper bound of the integers is left out.
NUMBERS = {
    "uniform": ("low", "high"),
    "quniform": ("low", "high", "step"),
    "loguniform": ("low", "high"),
    "randint": ("low", "high"),
    "lograndint": ("low", "high"),
}
LISTS = ("choice", "grid")
INTEGERS = ("randint", "lograndint")

#: The largest whole number that is drawn from.
LARGEST = 2**63 - 1

#: Settings of a run's place and record, which a sweep gives its trials itself.
OWN = ("run.", "tracking.")

#: Of `data`, what may differ between trials: it says how the prepared corpus is read. All trials share one.
OF_READING = ("data.max_seconds", "data.shuffle_clips", "data.cache_mib", "data.loader_processes")

#: What a run can change in the middle, and pbt therefore may sweep.
OF_PBT = ("ask.rho", "ask.beta", "ask.epsilon", "ask.tau_knowledge", "ask.tau_reliability")

#: Points that are drawn to see whether a space can run.
PROBES = 64

#: Numbers with an exponent that YAML 1.1 takes for words, such as 1e-5 and 1.5e3; in settings files they are numbers.
EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Reads numbers as settings files have them."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def name_of(point: Point) -> str:
    """A point in words."""
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items())


@dataclass(frozen=True)
class Dimension:
    """A swept setting: its distribution, the values of other swept settings under which it applies, its line in the file."""

    key: str
    kind: str
    arguments: tuple[Any, ...]
    line: int
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def values(self) -> tuple[Any, ...]:
        """All values of a choice or grid, the lowest and the highest of a range."""
        if self.kind in LISTS:
            return self.arguments
        low, high = self.arguments[:2]
        return (low, high - 1) if self.kind in INTEGERS else (low, high)

    @property
    def between(self) -> float:
        """A value of a range of fractions that is whole only where all of them are."""
        low, high = self.arguments[:2]
        return float(low + (self.arguments[2] if self.kind == "quniform" else (high - low) / math.e))

    @property
    def domain(self) -> tune.search.sample.Domain:
        """As Ray Tune has it."""
        if self.kind in LISTS:
            return tune.choice(list(self.arguments))
        return getattr(tune, self.kind)(*self.arguments)

    def applies(self, point: Point) -> bool:
        """Whether the setting is swept beside the values that a point has so far."""
        return all(key in point and point[key] in values for key, values in self.when.items())

    def takes(self, value: Any) -> bool:
        """Whether a value is one of a choice, a grid, or a range of integers."""
        if self.kind in INTEGERS:
            return isinstance(value, int) and value in range(*self.arguments)
        return repr(value) in map(repr, self.arguments)

    def draw(self, rng: np.random.RandomState) -> Any:
        """A value at random."""
        if self.kind in LISTS:
            return self.arguments[rng.randint(len(self.arguments))]
        value = self.domain.sample(random_state=rng)
        return int(value) if self.kind in INTEGERS else float(value)

    def suggest(self, trial: Any) -> Any:
        """The value that an Optuna trial proposes."""
        if self.kind in LISTS:  # by place: Optuna's categories must be numbers or words
            return self.arguments[trial.suggest_categorical(self.key, list(range(len(self.arguments))))]
        low, high = self.values
        if self.kind in INTEGERS:
            return trial.suggest_int(self.key, low, high, log=self.kind == "lograndint")
        step = self.arguments[2] if self.kind == "quniform" else None
        return trial.suggest_float(self.key, low, high, step=step, log=self.kind == "loguniform")


@dataclass(frozen=True)
class Space:
    """What is swept, in the order of the file, the file to name in errors, and what it is about."""

    file: str
    dimensions: tuple[Dimension, ...]
    about: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The swept settings."""
        return tuple(one.key for one in self.dimensions)

    @property
    def domains(self) -> dict[str, Any]:
        """The distributions as Ray Tune has them."""
        return {one.key: one.domain for one in self.dimensions}

    def made(self, value: Callable[[Dimension], Any]) -> Point:
        """The point of which `value` gives each setting that applies."""
        point: Point = {}
        for one in self.dimensions:
            if one.applies(point):
                point[one.key] = value(one)
        return point

    def grid(self) -> list[Point]:
        """Every combination once, the last setting changing fastest.

        Raises:
            SettingsError: naming the line of a range, which has no end of values.
        """
        for one in self.dimensions:
            if one.kind not in LISTS:
                self.refuse(one, f"{one.kind} has no end of values: give {{grid: […]}}, or another sweep.algorithm")
        points = []
        for values in itertools.product(*(one.arguments for one in self.dimensions)):
            of = dict(zip(self.keys, values, strict=True))
            point = self.made(partial(_value_of, of))
            if point not in points:
                points.append(point)
        return points

    def drawn(self, count: int, seed: int) -> list[Point]:
        """So many points at random; the same for the same seed."""
        rng = np.random.RandomState(seed)
        return [self.made(lambda one: one.draw(rng)) for _ in range(count)]

    def suggested(self, trial: Any) -> Point:
        """The point that an Optuna trial proposes."""
        return self.made(lambda one: one.suggest(trial))

    def holding(self, one: Dimension, value: Any, points: Sequence[Point]) -> list[Point]:
        """The points that have a value of a setting; if none has, those where the setting applies, with the value put in."""
        there = [point for point in points if one.key in point]
        return [point for point in there if repr(point[one.key]) == repr(value)] or [{**point, one.key: value} for point in there]

    def refuse(self, one: Dimension, message: str) -> None:
        """Raise the error of a line."""
        raise SettingsError(f"{self.file}:{one.line}: {one.key}: {message}")

    def check_bounds(self, base: Settings) -> None:
        """Refuse values that a setting never takes.

        Raises:
            SettingsError: naming the line.
        """
        for one in self.dimensions:
            for value in one.values:
                try:
                    with_values(base, {one.key: value})
                except SettingsError as error:
                    if f"{one.key}: " in str(error):  # what depends on other settings is seen from whole points
                        self.refuse(one, f"{value!r} is not allowed: {str(error).split(f'{one.key}: ', 1)[1].splitlines()[0]}")
            self._check_whole(base, one)

    def _check_whole(self, base: Settings, one: Dimension) -> None:
        """Refuse a range of fractions of a setting that takes whole numbers, as its bounds are."""
        if one.kind in LISTS or one.kind in INTEGERS:
            return
        try:
            with_values(base, {one.key: one.between})
        except SettingsError as error:
            if f"{one.key}: " in str(error):
                low, high = map(int, one.values)
                kind = "lograndint" if one.kind == "loguniform" else "randint"
                self.refuse(one, f"{one.kind} gives fractions, and it takes whole numbers: give {{{kind}: [{low}, {high + 1}]}}")

    def check_points(self, base: Settings, points: Iterable[Point]) -> Iterator[Settings]:
        """The settings of points.

        Raises:
            SettingsError: at a point that cannot run, with the point.
        """
        for point in points:
            try:
                yield with_values(base, point)
            except SettingsError as error:
                raise self.unfit(point, error) from error

    def unfit(self, point: Point, error: SettingsError) -> SettingsError:
        """The error of a point."""
        return SettingsError(
            f"{self.file}: the space holds a point that cannot run: {name_of(point)}: {error}. Tie settings together with `when`"
        )


@dataclass(frozen=True)
class SpaceFile:
    """A space file that is read: the space, the trees of `sweep` and `settings` for the settings parser, and the lines of what
    these set, by dotted names as errors have them."""

    space: Space
    sweep: dict[str, Any]
    settings: dict[str, Any]
    lines: dict[str, int]

    def check(self) -> None:
        """Refuse names and values of `sweep` and `settings` that are wrong whatever the command line adds.

        Raises:
            SettingsError: naming the lines, one for each that is wrong.
        """
        of_sweep = _wrong(SweepSettings, self.sweep)
        wrong = {f"sweep.{name}": problem for name, problem in of_sweep.items()} | _wrong(Settings, self.settings)
        if wrong:
            raise SettingsError("\n".join(f"{self.space.file}:{self._line(name)}: {name}: {wrong[name]}" for name in wrong))

    def _line(self, name: str) -> int:
        """Where a setting stands, or what it stands in: of a list, errors name the place."""
        while name not in self.lines:
            name = name.rpartition(".")[0]
        return self.lines[name]

    def tied(self, problem: str) -> str:
        """As :meth:`located`, an error of settings that cannot stand together: the line is of the first named that stands there,
        wherever the error names it."""
        named = (name for name in re.findall(r"[a-z_]+(?:\.\w+)+", problem) if name in self.lines)
        first = next(named, None)
        return problem if first is None else f"{self.space.file}:{self.lines[first]}: {problem}"

    def located(self, problem: str) -> str:
        """An error, with the file and the line first if it is of a setting that stands there."""
        named = [key for key in self.lines if problem.startswith((f"{key}:", f"{key} "))]
        return f"{self.space.file}:{self.lines[max(named, key=len)]}: {problem}" if named else problem


def _wrong(of: type[Section], tree: dict[str, Any]) -> dict[str, str]:
    """What is wrong with single settings of a tree, by their dotted names; settings that cannot stand together are no such."""
    try:
        of.model_validate(tree)
    except ValidationError as error:
        alone = [item for item in error.errors() if item["type"] != "value_error"]
        return {".".join(map(str, item["loc"])): item["msg"] for item in alone}
    return {}


def read(path: str) -> SpaceFile:
    """Read and check a space file, as far as it can be without the base settings.

    Raises:
        SettingsError: naming the file and the line.
    """
    try:
        text = Path(path).read_bytes().decode()
        document, lines = yaml.load(text, _Loader), _lines(text)
    except OSError as error:
        raise SettingsError(f"--space: {path} cannot be read: {error.strerror}; tune_spaces/ has spaces to start from") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SettingsError(
            f"{path}:{line}: byte {error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise SettingsError(f"--space: {path} is no YAML: {error}") from error
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: a space file maps {', '.join(PARTS)}; this one holds {type(document).__name__}")
    for part in document:
        if part not in PARTS:
            raise SettingsError(f"{path}:{lines.get((part,), 1)}: {part} is no part of a space file; it has {', '.join(PARTS)}")
    swept = document.get("space") or {}
    if not isinstance(swept, dict) or not swept:
        raise SettingsError(f"{path}:{lines.get(('space',), 1)}: space is empty: name at least one setting and its distribution")
    made: list[Dimension] = []
    for key, told in swept.items():
        made.append(_dimension(path, str(key), told, lines.get(("space", key), 1), {one.key: one for one in made}))
    for part in ("sweep", "settings"):
        if not isinstance(document.get(part) or {}, dict):
            raise SettingsError(f"{path}:{lines[(part,)]}: {part} holds {document[part]!r}; it maps names to values")
    about = str(document.get("about") or "").strip()
    of_settings = {key: line for key, line in lines.items() if key[0] in ("sweep", "settings")}
    told = {".".join(map(str, key if key[0] == "sweep" else key[1:])): line for key, line in of_settings.items()}
    return SpaceFile(Space(path, tuple(made), about), document.get("sweep") or {}, document.get("settings") or {}, told)


def _lines(text: str) -> dict[tuple[Any, ...], int]:
    """The lines, from 1, of the keys, each by those above it.

    Raises:
        yaml.YAMLError: at a key that stands twice, of which YAML would keep the last.
    """
    found: dict[tuple[Any, ...], int] = {}

    def walk(node: yaml.Node, above: tuple[Any, ...]) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (*above, key.value)
            if name in found:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} stands twice", key.start_mark)
            found[name] = key.start_mark.line + 1
            walk(value, name)

    root = yaml.compose(text, yaml.SafeLoader)
    if root is not None:
        walk(root, ())
    return found


def _dimension(path: str, key: str, told: Any, line: int, before: dict[str, Dimension]) -> Dimension:
    """A line of the space."""

    def refuse(message: str) -> SettingsError:
        return SettingsError(f"{path}:{line}: {key}: {message}")

    if key not in flat(Settings().model_dump(mode="json")):
        raise refuse("no such setting; python jobs/train.py --help lists them")
    if key.startswith(OWN):
        raise refuse("a sweep gives each trial its name, place, record and seed itself; see sweep.seeds")
    if key.startswith("data.") and key not in OF_READING:
        raise refuse(f"it changes the prepared corpus, which all trials share; of data, {', '.join(OF_READING)} can be swept")
    kinds = [kind for kind in told if kind != "when"] if isinstance(told, dict) else []
    if len(kinds) != 1 or kinds[0] not in (*NUMBERS, *LISTS):
        raise refuse(f"give one distribution, such as {{uniform: [0.1, 0.9]}}; there are {', '.join((*NUMBERS, *LISTS))}")
    problem = _problem(kinds[0], told[kinds[0]])
    if problem:
        raise refuse(problem)
    when = told.get("when", {})
    if not isinstance(when, dict) or not all(other in before for other in when):
        raise refuse("when maps settings that stand above in the space to the values under which this one is swept")
    conditions = {other: tuple(value) if isinstance(value, list) else (value,) for other, value in when.items()}
    for other, values in conditions.items():
        if before[other].kind not in (*LISTS, *INTEGERS):
            raise refuse(f"when: {other} is a range, which never meets single values; tie to a choice or grid")
        if never := [value for value in values if not before[other].takes(value)]:
            raise refuse(f"when: {other} is never {' or '.join(map(str, never))}")
    return Dimension(key, kinds[0], tuple(told[kinds[0]]), line, conditions)


def _problem(kind: str, given: Any) -> str:
    """What is wrong with a distribution's arguments; empty if nothing is."""
    if kind in LISTS:
        if not isinstance(given, list) or not given:
            return f"{kind} takes a list of values"
        return f"{kind} names a value twice" if len(set(map(repr, given))) < len(given) else ""
    wanted, whole = NUMBERS[kind], kind in INTEGERS
    numbers = isinstance(given, list) and all(isinstance(one, int if whole else int | float) for one in given)
    if not numbers or len(given) != len(wanted):
        return f"{kind} takes [{', '.join(wanted)}]{', whole numbers' if whole else ''}"
    if not all(-LARGEST <= one <= LARGEST if isinstance(one, int) else math.isfinite(one) for one in given):
        return f"{kind} takes finite numbers, whole ones of 64 bits at most"
    if not given[0] < given[1]:
        return f"{kind}: low {given[0]} is not below high {given[1]}"
    if kind.startswith("log") and given[0] <= 0:
        return f"{kind}: low must be above 0"
    if kind == "quniform" and not 0 < given[2] <= given[1] - given[0]:
        return "quniform: step must be above 0 and at most high - low"
    if kind == "quniform" and not all(_is_multiple(bound, given[2]) for bound in given[:2]):
        return f"quniform: low and high must be multiples of the step {given[2]:g}"
    return ""


def _is_multiple(bound: float, step: float) -> bool:
    count = bound / step  # without an end where the step is next to nothing
    return math.isfinite(count) and math.isclose(count, round(count))


def _value_of(of: Point, one: Dimension) -> Any:
    return of[one.key]


def points_of(space: Space, sweep: SweepSettings) -> list[Point]:
    """The points of a sweep, where they are known before it starts; for Optuna and pbt, some that it might try."""
    if sweep.algorithm == "grid":
        return space.grid()
    for one in space.dimensions:
        if one.kind == "grid":
            space.refuse(one, f"grid is for sweep.algorithm=grid; {sweep.algorithm} takes {{choice: […]}}")
        if sweep.algorithm == "pbt" and one.key not in OF_PBT:
            space.refuse(one, f"a run cannot change it in the middle; pbt sweeps {', '.join(OF_PBT)}")
        if sweep.algorithm == "pbt" and one.when:
            space.refuse(one, "pbt knows no `when`")
    return space.drawn(sweep.trials if sweep.algorithm == "random" else PROBES, sweep.seed)
