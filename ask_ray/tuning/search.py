"""How Ray Tune searches: its search algorithm, its scheduler, and what it is told to try."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from ask_ray.config import Settings, SettingsError, SweepSettings
from ask_ray.modality import WAYS
from ask_ray.training.forecast import Forecast
from ask_ray.training.metrics import FIGURES
from ask_ray.tuning.space import LISTS, NUMBERS, Point, Space
from ask_ray.tuning.trial import AGE

#: What every evaluation on the validation split reports.
METRICS = ("mean_r1", *(f"{way}_{figure}" for way in WAYS for figure in FIGURES))


def check_metric(sweep: SweepSettings) -> None:
    """Refuse a metric that no evaluation on the validation split reports, such as the loss.

    Raises:
        SettingsError: naming the setting.
    """
    if sweep.metric not in METRICS:
        raise SettingsError(
            f"sweep.metric: no evaluation on the validation split reports {sweep.metric!r}; they report {', '.join(METRICS)}"
        )


def check_reported(settings: Settings) -> None:
    """Refuse runs that do not report a metric at their end.

    Raises:
        SettingsError: naming the setting.
    """
    training = settings.training
    if not training.evaluates(training.epochs):
        raise SettingsError(
            f"training.evaluate_every is {training.evaluate_every}: the last of {training.epochs} epochs would not be evaluated, "
            "and a sweep compares that one; choose a divisor, such as 1"
        )


def check_donors(sweep: SweepSettings, settings: Settings) -> None:
    """Refuse a population in which a run could be taken over that has no checkpoint to begin from, of before its last epoch.

    Raises:
        SettingsError: naming the settings.
    """
    training = settings.training
    if sweep.algorithm != "pbt":
        return
    evaluated = (epoch for epoch in range(sweep.perturb_epochs, training.epochs) if training.evaluates(epoch))
    latest = next(evaluated, training.epochs - 1)
    beside = training.evaluate_every if training.evaluates_beside else training.epochs  # each of these has its checkpoint
    if min(training.checkpoint_every, beside) > latest:
        raise SettingsError(
            f"training.checkpoint_every is {training.checkpoint_every}: pbt takes over runs from their first evaluation at "
            f"sweep.perturb_epochs ({sweep.perturb_epochs}) or later on, and needs a checkpoint of theirs by then, of before the "
            f"last of training.epochs ({training.epochs}); set training.checkpoint_every to {max(latest, 1)} or less"
            + ("" if latest else ", and training.epochs above 1")
        )
    if training.keep_checkpoints < 2:
        raise SettingsError(
            f"training.keep_checkpoints is {training.keep_checkpoints}: a run that is done would keep its last checkpoint alone, "
            "from which pbt can train no other on; keep 2 or more"
        )


def count(sweep: SweepSettings, points: list[Point]) -> int:
    """How many trials there will be."""
    return len(points) if sweep.algorithm == "grid" else sweep.trials


def wanted_at_once(sweep: SweepSettings) -> int | None:
    """How many trials a session that starts on this machine makes room for; None: as many as its cores hold."""
    return sweep.trials if sweep.algorithm == "pbt" else sweep.concurrent


def stops(sweep: SweepSettings) -> bool:
    """Whether trials are stopped before their end."""
    return sweep.early_stopping or sweep.algorithm == "pbt"


def at_once(sweep: SweepSettings, points: list[Point], room: int) -> int:
    """How many trials run at once where there is room for so many.

    Raises:
        SettingsError: if a population cannot train at once, whose trials learn from each other.
    """
    most = min(room, sweep.concurrent or room)
    if sweep.algorithm == "pbt" and most < sweep.trials:
        raise SettingsError(
            f"sweep.trials: pbt trains all of its {sweep.trials} trials at once, and there is room for {most}: lower "
            "sweep.trials, training.cpus_per_worker, knowledge.pool.cpus or what takes memory (model.dim, data.cache_mib), or "
            "add nodes"
        )
    return min(most, count(sweep, points))


def in_memory(takes: Forecast, workers: int, nodes: Sequence[float], most: int) -> int:
    """How many trials, `most` at most, the nodes hold the data of at once: each has its own knowledge base on every node where
    it has workers.

    Args:
        workers: of a trial.
        nodes: bytes of memory of each node that workers may run on, as Ray counts it.
    """
    left, held = list(nodes), 0
    while held < most and _holds(takes, workers, left):
        held += 1
    return held


def _holds(takes: Forecast, workers: int, left: list[float]) -> bool:
    """Take a trial's memory from what is left of each node; false if it is too little."""
    for node, room in enumerate(left):
        here = min(workers, max(0, int((room - takes.node_bytes) // takes.worker_bytes)))
        if here:
            left[node] -= takes.node_bytes + here * takes.worker_bytes
            workers -= here
    return workers == 0


def config(sweep: SweepSettings, space: Space, points: list[Point], at_once: int, epochs: int) -> dict[str, Any]:
    """`param_space` and `tune_config` for Ray Tune.

    Grid and random points are known before the first trial and handed over whole, so that conditions between settings hold and
    every point has been checked; Optuna proposes its own as trials come in; pbt draws its first and changes them.
    """
    listed = sweep.algorithm in ("grid", "random")
    drawn = space.domains if sweep.algorithm == "pbt" else None
    searcher = OptunaSearch(space.suggested, sweep.metric, sweep.mode, seed=sweep.seed) if sweep.algorithm == "optuna" else None
    told = tune.TuneConfig(
        metric=sweep.metric,
        mode=sweep.mode,
        search_alg=searcher or BasicVariantGenerator(random_state=sweep.seed, max_concurrent=at_once),
        scheduler=_scheduler(sweep, space, epochs),
        num_samples=1 if listed else sweep.trials,
        max_concurrent_trials=at_once if searcher else None,
        trial_dirname_creator=_folder_name,
    )
    return {"param_space": {"point": tune.grid_search(points)} if listed else drawn, "tune_config": told}


def longest(settings: Settings, space: Space) -> int:
    """The most epochs that a run of the space trains."""
    swept = [value for one in space.dimensions if one.key == "training.epochs" for value in one.values]
    return max([settings.training.epochs, *swept])


def _scheduler(sweep: SweepSettings, space: Space, epochs: int) -> TrialScheduler | None:
    """ASHA by age, over the epochs of all seeds; no trial is stopped at its end, of which :mod:`~ask_ray.tuning.trial` tells it
    only when all is done. Or population based training."""
    if sweep.algorithm == "pbt":
        return PopulationBasedTraining(
            time_attr=AGE,
            perturbation_interval=sweep.perturb_epochs,
            hyperparam_mutations={one.key: list(one.values) if one.kind in LISTS else one.domain for one in space.dimensions},
            custom_explore_fn=partial(within, space),
        )
    last = epochs * len(sweep.seeds) - 1  # the longest trial tells of no later age before its end
    if not sweep.early_stopping or last < sweep.grace_epochs:
        return None
    return ASHAScheduler(
        time_attr=AGE,
        max_t=last,
        grace_period=sweep.grace_epochs,
        reduction_factor=sweep.reduction,
        stop_last_trials=False,
    )


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


def within(space: Space, changed: dict[str, Any]) -> dict[str, Any]:
    """Settings that pbt changed, brought back into their ranges: it multiplies them by 0.8 or 1.2, whatever their bounds."""
    for one in space.dimensions:
        if one.kind in NUMBERS:
            low, high = one.values
            changed[one.key] = min(max(changed[one.key], low), high)
    return changed
