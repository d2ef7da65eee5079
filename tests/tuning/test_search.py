"""How Ray Tune is told to search."""

import contextlib
from statistics import mean
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from ask_ray.config import Settings, SettingsError, SweepSettings, load
from ask_ray.training.forecast import Forecast
from ask_ray.tuning import search
from ask_ray.tuning.search import within
from ask_ray.tuning.space import Dimension, Space
from ask_ray.tuning.trial import AGE

RHO, BETA = Dimension("ask.rho", "uniform", (0.2, 0.9), 2), Dimension("ask.beta", "choice", (0.0, 0.3), 3)


@given(epochs=st.integers(2, 30), seeds=st.integers(1, 3), grace=st.integers(1, 8), reduction=st.sampled_from([1.5, 2.0, 3.0]))
def test_early_stopping_stops_who_is_behind_but_nobody_at_the_end(epochs, seeds, grace, reduction):
    of = SweepSettings(early_stopping=True, grace_epochs=grace, reduction=reduction, seeds=list(range(seeds)))
    scheduler = search.config(of, Space("space.yaml", (RHO,)), [], 2, epochs)["tune_config"].scheduler
    if scheduler is None:
        assert grace > epochs * seeds - 1
        return
    scheduler.set_search_properties("mean_r1", "max")
    stopped = []
    for number in range(6):  # each worse than those before it
        trial = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        for age in range(1, epochs * seeds + 1):
            decision = scheduler.on_trial_result(None, trial, {AGE: age, "mean_r1": 1.0 - number / 10, "training_iteration": age})
            if decision == TrialScheduler.STOP:
                stopped.append(age)
                break
    assert stopped
    assert all(grace <= age < epochs * seeds for age in stopped)


def test_what_a_population_may_choose_from_is_a_list_for_ray_tune_and_not_a_range():
    told = search.config(SweepSettings(algorithm="pbt", trials=2), Space("space.yaml", (RHO, BETA)), [], 2, 4)["tune_config"]
    assert told.scheduler._hyperparam_mutations["ask.beta"] == [0.0, 0.3]


def test_optuna_learns_from_the_trials_before():
    neighbours = Dimension("ask.neighbours", "lograndint", (2, 65), 4)
    space = Space("space.yaml", (RHO, BETA, neighbours))
    of = SweepSettings(algorithm="optuna", trials=30)
    searcher = search.config(of, space, [], 2, 4)["tune_config"].search_alg
    apart = []
    for number in range(of.trials):
        point = searcher.suggest(str(number))
        assert [*space.check_points(Settings(), [point])]
        assert 0.2 <= point["ask.rho"] <= 0.9
        assert BETA.takes(point["ask.beta"])
        assert neighbours.takes(point["ask.neighbours"])
        apart.append(abs(point["ask.rho"] - 0.7))
        searcher.on_trial_complete(str(number), {of.metric: -apart[-1]})
    assert mean(apart[-10:]) < mean(apart[:10]) / 2


def test_the_longest_run_of_a_space_counts_for_early_stopping():
    base = load({"training": {"epochs": 5}})
    assert search.longest(base, Space("space.yaml", (RHO,))) == 5
    swept = Dimension("training.epochs", "choice", (3, 30), 2)
    assert search.longest(base, Space("space.yaml", (RHO, swept))) == 30


def test_of_ranks_less_is_better_and_of_all_else_more():
    assert {metric for metric in search.METRICS if SweepSettings(metric=metric).mode == "min"} == {
        f"{way}_{rank}_rank" for way in ("t2a", "a2t") for rank in ("median", "mean")
    }


@pytest.mark.parametrize("metric", ["accuracy", "loss"])  # runs report a loss, of training
def test_a_metric_that_is_none_of_an_evaluation_is_refused(metric):
    with pytest.raises(SettingsError, match=rf"^sweep\.metric: no evaluation on the validation split reports '{metric}'; they "):
        search.check_metric(SweepSettings(metric=metric))


def test_what_a_population_changes_stays_within_its_range():
    space = Space("space.yaml", (RHO, BETA))
    assert within(space, {"ask.rho": 1.08, "ask.beta": 0.3}) == {"ask.rho": 0.9, "ask.beta": 0.3}
    assert within(space, {"ask.rho": 0.16, "ask.beta": 0.0}) == {"ask.rho": 0.2, "ask.beta": 0.0}
    assert within(space, {"ask.rho": 0.5, "ask.beta": 0.0}) == {"ask.rho": 0.5, "ask.beta": 0.0}


TAKES = Forecast(64, 4, 12, 0, 1000, 0, worker_bytes=10, node_bytes=5)


@pytest.mark.parametrize(
    ("nodes", "workers", "most", "held"),
    [
        ([100.0], 1, 64, 6),  # each trial keeps a knowledge base of its own
        ([100.0], 2, 64, 4),
        ([100.0], 2, 3, 3),
        ([14.0], 1, 64, 0),
        ([16.0, 31.0], 1, 64, 3),
        ([16.0, 31.0], 2, 64, 1),  # a worker on either, and of the second 16 are left
        ([16.0, 31.0], 4, 64, 0),
    ],
)
def test_trials_are_bounded_by_the_memory_of_the_nodes(nodes, workers, most, held):
    assert search.in_memory(TAKES, workers, nodes, most) == held


def test_a_population_says_what_to_lower_where_it_finds_no_room():
    of = SweepSettings(algorithm="pbt", trials=4)
    assert search.at_once(of, [], 4) == 4
    with pytest.raises(SettingsError, match=r"^sweep\.trials: .* all of its 4 trials at once, .*room for 3: lower .*model\.dim"):
        search.at_once(of, [], 3)
    assert search.at_once(SweepSettings(concurrent=8), [], 3) == 3


@pytest.mark.parametrize(
    ("training", "refused"),
    [
        ({"checkpoint_every": 3}, r"^training\.checkpoint_every is 3: .*sweep\.perturb_epochs \(2\).* to 2 or less$"),
        ({"epochs": 2, "checkpoint_every": 2}, r"^training\.checkpoint_every is 2: .*training\.epochs \(2\).* to 1 or less$"),
        ({"epochs": 1}, r"^training\.checkpoint_every is 1: .* and training\.epochs above 1$"),
        ({"keep_checkpoints": 1}, r"^training\.keep_checkpoints is 1: "),
        ({}, None),
        ({"checkpoint_every": 3, "evaluation": "beside"}, None),
        ({"epochs": 14, "evaluate_every": 7, "checkpoint_every": 4}, None),
        ({"epochs": 14, "evaluate_every": 7, "checkpoint_every": 8}, r"^training\.checkpoint_every is 8: .* to 7 or less$"),
        ({"epochs": 14, "evaluate_every": 7, "checkpoint_every": 8, "evaluation": "beside"}, None),
        ({"epochs": 14, "evaluate_every": 14, "checkpoint_every": 13}, None),
        ({"evaluate_every": 6, "checkpoint_every": 6, "evaluation": "beside"}, r"^training\.checkpoint_every is 6: .* to 5 or"),
        ({"evaluate_every": 0}, None),  # of which check_reported tells
    ],
)
def test_a_population_whose_runs_would_have_no_checkpoint_to_begin_from_is_refused(training, refused):
    settings = load({"ask": {"enabled": False}, "training": {"epochs": 6, "evaluate_every": 1, **training}})
    with pytest.raises(SettingsError, match=refused) if refused else contextlib.nullcontext():
        search.check_donors(SweepSettings(algorithm="pbt", trials=2), settings)
    search.check_donors(SweepSettings(), settings)
