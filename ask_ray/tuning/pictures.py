"""The pictures of a sweep: all settings at once, which of them matter, the metric against each, the price of freshness."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from ask_ray.config import Settings, SweepSettings, flat, with_values
from ask_ray.report import BLUE, GREY, ORANGE
from ask_ray.storage import Folder
from ask_ray.tuning.outcome import STOPPED, Row, interval
from ask_ray.tuning.space import INTEGERS, LISTS, Dimension, Space

#: Parts of a range of which means are drawn, at most, and how many trials each has at least.
PARTS, IN_A_PART = 5, 4

POLICY, INTERVAL = "knowledge.refresh.policy", "knowledge.refresh.interval"


def draw(
    folder: Folder, space: Space, base: Settings, rows: Sequence[Row], sweep: SweepSettings, tell: Callable[[str], None]
) -> list[str]:
    """Draw what the trials that have a value allow into ``<folder>/pictures``; stopped trials count with their last figure.

    Args:
        tell: called with what went wrong with a picture, which costs neither the others nor the sweep's answer.

    Returns:
        the names of the pictures.
    """
    known = [row for row in rows if row["value"] is not None]
    if not known:
        return []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    drawn = []
    for name, make in _wanted(space, base, known, sweep).items():
        with warnings.catch_warnings(), plt.style.context("default"):  # Optuna's pictures set a style of their own
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                buffer = io.BytesIO()
                make().savefig(buffer, dpi=120, bbox_inches="tight")
                (folder / "pictures").write(name, buffer.getvalue())
                drawn.append(name)
            except Exception as error:
                tell(f"{name}: {type(error).__name__}: {error}")
            finally:
                plt.close("all")
    return drawn


def _wanted(space: Space, base: Settings, rows: Sequence[Row], sweep: SweepSettings) -> dict[str, Callable[[], Figure]]:
    """The pictures that trials have something to show in, and what makes each."""
    made: dict[str, Callable[[], Figure]] = {"settings.png": lambda: _settings(space, rows, sweep)}
    if {POLICY, INTERVAL} & {*space.keys}:
        made["refreshing.png"] = lambda: _refreshing(base, rows, sweep)
    if len(rows) > 1:
        made["parallel.png"] = lambda: _parallel(study_of(space, base, rows, sweep), sweep)
    if _differ(rows):
        made["importance.png"] = lambda: _importance(study_of(space, base, rows, sweep), sweep)
    return made


def _differ(rows: Sequence[Row]) -> bool:
    """Whether there is anything to explain: importance needs trials whose values differ."""
    return len(rows) > 3 and len({row["value"] for row in rows}) > 1


def full(base: Settings, row: Row, keys: Sequence[str]) -> dict[str, Any]:
    """A trial's value of every swept setting: where one does not apply, the one that all trials share."""
    there = flat(with_values(base, row["point"]).model_dump(mode="json"))
    return {key: there[key] for key in keys}


def study_of(space: Space, base: Settings, rows: Sequence[Row], sweep: SweepSettings) -> optuna.Study:
    """The trials as an Optuna study, for its pictures and importances."""
    study = optuna.create_study(direction="maximize" if sweep.mode == "max" else "minimize")
    values = [full(base, row, space.keys) for row in rows]
    told = {one.key: _distribution(one, [of[one.key] for of in values]) for one in space.dimensions}
    for row, of in zip(rows, values, strict=True):
        params = {key: str(value) if isinstance(told[key], CategoricalDistribution) else value for key, value in of.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=told, value=row["value"]))
    return study


def _distribution(one: Dimension, values: Sequence[Any]) -> BaseDistribution:
    """A dimension as Optuna's, wide enough for the values that trials share where it does not apply."""
    numeric = all(map(_is_number, (*one.values, *values)))
    if not numeric or (one.kind in LISTS and len(one.values) == 1):
        return CategoricalDistribution(sorted({*map(str, one.values), *map(str, values)}))
    low, high = min(*one.values, *values), max(*one.values, *values)
    log = one.kind.startswith("log") and low > 0  # what trials share may be 0, which has no logarithm
    if one.kind in INTEGERS or all(isinstance(value, int) for value in (*one.values, *values)):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _parallel(study: optuna.Study, sweep: SweepSettings) -> Figure:
    """Parallel coordinates, by Optuna."""
    axes = optuna.visualization.matplotlib.plot_parallel_coordinate(study, target_name=sweep.metric)
    return _sized(axes, "All trials: one line each", 2.2 * (len(study.trials[0].params) + 1))


def _importance(study: optuna.Study, sweep: SweepSettings) -> Figure:
    """Share of the metric's variance that each setting explains: fANOVA, by Optuna."""
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    axes = optuna.visualization.matplotlib.plot_param_importances(study, evaluator=evaluator, target_name=sweep.metric)
    return _sized(axes, f"Importance for {sweep.metric} (fANOVA, {len(study.trials)} trials)", 9.0)


def _sized(axes: Axes, title: str, width: float) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(max(9.0, width), 4.5)
    axes.set_title("", loc="left")
    axes.set_title(title)
    return figure


def _settings(space: Space, rows: Sequence[Row], sweep: SweepSettings) -> Figure:
    """The metric against each setting: every trial, and the means of :func:`_groups` with their 95 % intervals."""
    columns = min(3, len(space.keys))
    lines = math.ceil(len(space.keys) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, sharey=True)
    for axes, one in zip(grid.flat, space.dimensions, strict=False):
        there = [row for row in rows if one.key in row["point"]]
        _against(axes, one, there)
        axes.set(xlabel=one.key, title="")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in [*grid.flat][len(space.keys) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(sweep.metric)
    if stopped := sum(row["status"] == STOPPED for row in rows):
        figure.suptitle(f"{stopped} of {len(rows)} trials were stopped early and enter with their last figure", fontsize=10)
    figure.tight_layout()
    return figure


def _against(axes: Axes, one: Dimension, rows: Sequence[Row]) -> None:
    """Values of a choice side by side, those of a range along the axis."""
    places = [row["point"][one.key] for row in rows]
    if one.kind in LISTS:
        order = sorted(one.values) if all(_is_number(value) for value in one.values) else list(one.values)
        places = [order.index(place) for place in places]
        axes.set_xticks(range(len(order)), list(map(str, order)))
        axes.set_xlim(-0.5, len(order) - 0.5)
    if one.kind.startswith("log"):
        axes.set_xscale("log")
    axes.plot(places, [row["value"] for row in rows], "o", color=GREY, markersize=4, alpha=0.8)
    for place, values in _groups(one, places, rows):
        bounds = interval(values)
        if bounds is not None:
            middle = mean(values)
            axes.errorbar(place, middle, [[middle - bounds[0]], [bounds[1] - middle]], fmt="s", color=BLUE, capsize=4)


def _groups(one: Dimension, places: Sequence[Any], rows: Sequence[Row]) -> list[tuple[Any, list[float]]]:
    """What runs reached at each place. Of a range and one seed, where hardly two meet, in each of some parts of equally many
    neighbours, at the middle one's place."""
    runs = sorted((place, value) for place, row in zip(places, rows, strict=True) for value in row["values"].values())
    count = min(PARTS, len(runs) // IN_A_PART)
    if one.kind in LISTS or len(runs) > len(rows) or not count:
        return [(place, [value for at, value in runs if at == place]) for place in sorted(set(places))]
    return [(np.median(part[:, 0]), part[:, 1].tolist()) for part in np.array_split(np.array(runs), count)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refreshing(base: Settings, rows: Sequence[Row], sweep: SweepSettings) -> Figure:
    """The metric, and on a second axis what refreshes cost, from the stalest knowledge base to the freshest."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: _freshness(base, row)):
        groups.setdefault(_label(base, row), []).append(row)
    figure, left = plt.subplots(figsize=(10, 4.5))
    right = left.twinx()
    for place, of in enumerate(groups.values()):
        values = [value for row in of for value in row["values"].values()]
        low, high = interval(values) or (mean(values), mean(values))
        left.errorbar(place, mean(values), [[mean(values) - low], [high - mean(values)]], fmt="o", color=BLUE, capsize=5)
        left.plot([place] * len(values), values, ".", color=GREY, markersize=5)
        seconds = [row["refresh_seconds"] for row in of if row["refresh_seconds"] is not None]
        if seconds:
            right.bar(place, mean(seconds), width=0.5, color=ORANGE, alpha=0.3)
    left.set_zorder(right.get_zorder() + 1)
    left.set_frame_on(False)
    left.set_xticks(range(len(groups)), groups)
    left.set(xlabel="refresh policy and interval T", title=f"What fresher knowledge gives ({sweep.metric}) and what it costs")
    left.set_ylabel(f"{sweep.metric}, validation: mean, 95 % interval, seeds", color=BLUE)
    right.set_ylabel("seconds of encoding and building in a run", color=ORANGE)
    left.grid(alpha=0.25, axis="y")
    figure.tight_layout()
    return figure


def _label(base: Settings, row: Row) -> str:
    """A trial's refreshing in a word."""
    of = full(base, row, (POLICY, INTERVAL))
    return f"T = {of[INTERVAL]:g}" if of[POLICY] == "fixed" else str(of[POLICY])


def _freshness(base: Settings, row: Row) -> tuple[int, float]:
    """The order of the picture: static, fixed from the longest interval to the shortest, then what decides itself."""
    of = full(base, row, (POLICY, INTERVAL))
    return (0, 0.0) if of[POLICY] == "static" else (1, -of[INTERVAL]) if of[POLICY] == "fixed" else (2, len(of[POLICY]))
