"""Spaces: what stands in a file is what is searched, and what cannot work is refused with its line."""

from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import get_loader

from ask_ray.config import Settings, SettingsError, SweepSettings, load
from ask_ray.tuning import space

SPACES = Path(__file__).parents[2] / "tune_spaces"

CONDITIONED = """
space:
  knowledge.refresh.policy: {grid: [static, fixed]}
  knowledge.refresh.interval: {grid: [1, 5], when: {knowledge.refresh.policy: fixed}}
  ask.rho: {grid: [0.2, 0.8]}
"""
RANGES = """
space:
  ask.rho: {uniform: [0.2, 0.8]}
  ask.beta: {quniform: [0.0, 0.6, 0.2]}
  ask.epsilon: {loguniform: [0.01, 0.1]}
  ask.neighbours: {randint: [2, 5]}
  ask.prototypes: {lograndint: [4, 65]}
  ask.exclude: {choice: [self, batch]}
  ask.queue: {choice: [8, 16], when: {ask.exclude: batch, ask.neighbours: [2, 3]}}
"""


def read(tmp_path: Path, text: str) -> space.Space:
    file = tmp_path / "space.yaml"
    file.write_text(text, encoding="utf-8")
    return space.read(str(file)).space


@pytest.fixture(scope="module")
def ranges(tmp_path_factory) -> space.Space:
    return read(tmp_path_factory.mktemp("space"), RANGES)


def test_a_grid_holds_every_combination_once_and_a_setting_only_where_it_applies(tmp_path):
    points = read(tmp_path, CONDITIONED).grid()
    assert [tuple(point.values()) for point in points] == [
        ("static", 0.2),
        ("static", 0.8),
        ("fixed", 1, 0.2),
        ("fixed", 1, 0.8),
        ("fixed", 5, 0.2),
        ("fixed", 5, 0.8),
    ]


def check(point: space.Point) -> None:
    """A point of RANGES: every value within its distribution, of the type that the setting takes, and conditions heeded."""
    assert 0.2 <= point["ask.rho"] <= 0.8
    assert min(abs(point["ask.beta"] - step) for step in (0.0, 0.2, 0.4, 0.6)) < 1e-9
    assert 0.01 <= point["ask.epsilon"] <= 0.1
    assert point["ask.neighbours"] in (2, 3, 4)
    assert 4 <= point["ask.prototypes"] <= 64
    assert isinstance(point["ask.prototypes"], int)
    assert ("ask.queue" in point) == (point["ask.exclude"] == "batch" and point["ask.neighbours"] < 4)


@given(seed=st.integers(0, 2**31 - 1))
def test_points_at_random_stay_within_the_space_and_follow_the_seed(ranges, seed):
    points = ranges.drawn(8, seed)
    assert points == ranges.drawn(8, seed)
    for point in points:
        check(point)


def test_points_at_random_reach_all_of_the_space(ranges):
    points = ranges.drawn(400, 0)
    assert {point["ask.neighbours"] for point in points} == {2, 3, 4}
    assert {round(point["ask.beta"], 1) for point in points} == {0.0, 0.2, 0.4, 0.6}
    assert {point.get("ask.queue") for point in points} == {None, 8, 16}
    below = sum(point["ask.prototypes"] < 16 for point in points) / len(points)
    assert 0.4 < below < 0.6  # half of the logarithmic range


def test_optuna_proposes_within_the_same_space(ranges):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [ranges.suggested(study.ask()) for _ in range(60)]
    for point in points:
        check(point)
    assert {point.get("ask.queue") for point in points} == {None, 8, 16}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("space:\n  ask.roh: {uniform: [0, 1]}", 2, "ask.roh: no such setting"),
        ("about: x\n\nspace:\n  ask: {choice: [1]}", 4, "ask: no such setting"),
        ("space:\n  run.seed: {choice: [1, 2]}", 2, "see sweep.seeds"),
        ("space:\n  tracking.enabled: {choice: [true]}", 2, "a sweep gives each trial its name"),
        ("space:\n  data.sample_rate: {choice: [8000, 16000]}", 2, "which all trials share"),
        ("space:\n  ask.rho: 0.5", 2, "give one distribution"),
        ("space:\n  ask.rho: {normal: [0, 1]}", 2, "give one distribution"),
        ("space:\n  ask.rho: {uniform: [0, 1], choice: [0]}", 2, "give one distribution"),
        ("space:\n  ask.rho: {uniform: [0, 1, 2]}", 2, "uniform takes [low, high]"),
        ("space:\n  ask.rho: {uniform: [0.9, 0.1]}", 2, "low 0.9 is not below high 0.1"),
        ("space:\n  ask.epsilon: {loguniform: [0, 1]}", 2, "low must be above 0"),
        ("space:\n  ask.neighbours: {randint: [1.5, 3]}", 2, "whole numbers"),
        ("space:\n  ask.rho: {quniform: [0, 1, 3]}", 2, "step must be above 0"),
        ("space:\n  ask.rho: {choice: []}", 2, "choice takes a list"),
        ("space:\n  ask.rho: {choice: [0.5, 0.5]}", 2, "names a value twice"),
        ("space:\n  ask.beta: {choice: [0.1], when: {ask.rho: 1}}\n  ask.rho: {choice: [1]}", 2, "stand above"),
        ("space:\n  ask.rho: {choice: [0.5]}\n  ask.beta: {choice: [0.1], when: {ask.rho: 0.6}}", 3, "ask.rho is never 0.6"),
        ("space:\n  ask.rho: {choice: [0.5]}\n  ask.beta: {choice: [0.1], when: {ask.rho: [0.5, 0.6]}}", 3, "never 0.6"),
        ("space:\n  ask.rho: {uniform: [0, 1]}\n  ask.beta: {choice: [0.1], when: {ask.rho: 0.5}}", 3, "ask.rho is a range"),
        ("space:\n  ask.beta: {quniform: [0.05, 0.6, 0.1]}", 2, "multiples of the step 0.1"),
        ("space:\n  training.weight_decay: {quniform: [0, .inf, 0.1]}", 2, "quniform takes finite numbers"),
        ("space:\n  training.weight_decay: {uniform: [.nan, 1]}", 2, "uniform takes finite numbers"),
        ("space:\n  ask.rho: {quniform: [0, 1, 1.0e-320]}", 2, "multiples of the step"),
        (f"space:\n  ask.neighbours: {{randint: [1, {2**64}]}}", 2, "whole ones of 64 bits at most"),
        (f"space:\n  ask.rho: {{uniform: [0, {10**400}]}}", 2, "whole ones of 64 bits at most"),
        ("settings: [training]\nspace:\n  ask.rho: {choice: [1]}", 1, "settings holds ['training']; it maps names"),
        ("about: x\nsweep: grid\nspace:\n  ask.rho: {choice: [1]}", 2, "sweep holds 'grid'; it maps names"),
        ("space:\n", 1, "space is empty"),
        ("settings: {}\nspace: {}", 2, "space is empty"),
        ("spaces:\n  ask.rho: {choice: [1]}", 1, "spaces is no part of a space file"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused_with_its_line(tmp_path, text, line, message):
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, text)
    assert f"space.yaml:{line}: " in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("space: [", "is no YAML"), ("[1, 2]", "this one holds list"), ("space:\n  a: 1\n  a: 2", "a stands twice")],
)
def test_what_is_no_space_file_is_refused(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_utf_8_is_refused_with_the_line(tmp_path):
    (tmp_path / "space.yaml").write_bytes("about: ρ\nspace:\n  # größer\n".encode("latin-1", "replace"))
    with pytest.raises(SettingsError, match=r"space\.yaml:3: byte 0xf6 is not UTF-8"):
        space.read(str(tmp_path / "space.yaml"))


def test_an_error_of_a_setting_in_the_file_names_its_line(tmp_path):
    text = "sweep:\n  metric: x\nsettings:\n  training:\n    epochs: 0\n    epochs_: 1\nspace:\n  ask.rho: {choice: [1]}"
    (tmp_path / "space.yaml").write_text(text)
    made = space.read(str(tmp_path / "space.yaml"))
    assert made.located("sweep.metric: no run reports x") == f"{made.space.file}:2: sweep.metric: no run reports x"
    assert made.located("training.epochs: too few").startswith(f"{made.space.file}:5: ")
    assert made.located("training.epochs is 0").startswith(f"{made.space.file}:5: ")
    assert made.located("training.epochs_: no such").startswith(f"{made.space.file}:6: ")
    for elsewhere in ("ask.rho: too much", "sweep.mode: is max", "something else"):
        assert made.located(elsewhere) == elsewhere


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match=r"--space: nowhere\.yaml cannot be read: No such file"):
        space.read("nowhere.yaml")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("ask.rho: {uniform: [0.5, 1.5]}", "ask.rho: 1.5 is not allowed: Input should be less than or equal to 1"),
        ("ask.neighbours: {randint: [0, 5]}", "ask.neighbours: 0 is not allowed"),
        ("ask.exclude: {choice: [self, other]}", "ask.exclude: 'other' is not allowed"),
        ("training.epochs: {uniform: [1.5, 3.5]}", "training.epochs: 1.5 is not allowed"),
        (
            "ask.neighbours: {uniform: [2, 20]}",
            "ask.neighbours: uniform gives fractions, and it takes whole numbers: give {randint: [2, 21]}",
        ),
        (
            "ask.queue: {loguniform: [8, 64]}",
            "ask.queue: loguniform gives fractions, and it takes whole numbers: give {lograndint: [8, 65]}",
        ),
        ("ask.queue: {quniform: [8, 64, 0.5]}", "ask.queue: quniform gives fractions"),
    ],
)
def test_values_outside_a_settings_bounds_are_refused_with_their_line(tmp_path, told, message):
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, f"about: x\nspace:\n  {told}").check_bounds(Settings())
    assert f"space.yaml:3: {message}" in str(refused.value)


def test_steps_of_a_range_may_all_be_whole_numbers(tmp_path):
    read(tmp_path, "space:\n  ask.neighbours: {quniform: [2, 20, 2]}").check_bounds(Settings())


def test_the_upper_bound_of_integers_is_left_out(tmp_path):
    base = load({"model": {"max_words": 16}})
    read(tmp_path, "space:\n  model.max_words: {randint: [4, 513]}").check_bounds(base)


@pytest.mark.parametrize(
    "number", ["1e-5", "1e5", "+2E3", "-1.5e3", "1.e-4", "1_0e2", "1.0e-5", "3", "0.5", ".5", "1e", "e5", "1-5"]
)
def test_numbers_are_read_as_in_settings_files(tmp_path, number):
    (one,) = read(tmp_path, f"space:\n  model.text: {{choice: [{number}]}}").dimensions
    assert repr(one.values[0]) == repr(get_loader("yaml")(number))


def test_a_range_may_be_written_with_exponents(tmp_path):
    (one,) = read(tmp_path, "space:\n  training.learning_rate: {loguniform: [1e-5, 1e-3]}").dimensions
    assert one.values == (1e-5, 1e-3)


def test_a_point_that_cannot_run_is_refused_with_its_settings(tmp_path):
    made = read(tmp_path, "space:\n  ask.fine: {grid: [true, false]}\n  ask.negatives: {grid: [none, knowledge]}")
    made.check_bounds(Settings())
    with pytest.raises(SettingsError, match=r"ask.fine False, ask.negatives knowledge: .*reads single entries.*`when`"):
        list(made.check_points(Settings(), made.grid()))


@pytest.mark.parametrize(
    ("sweep", "told", "message"),
    [
        ({"algorithm": "grid"}, "ask.rho: {uniform: [0, 1]}", "2: ask.rho: uniform has no end of values"),
        ({"algorithm": "random"}, "ask.rho: {grid: [0, 1]}", "2: ask.rho: grid is for sweep.algorithm=grid"),
        ({"algorithm": "optuna"}, "ask.rho: {grid: [0, 1]}", "2: ask.rho: grid is for sweep.algorithm=grid"),
        ({"algorithm": "pbt"}, "ask.neighbours: {randint: [1, 9]}", "a run cannot change it in the middle"),
    ],
)
def test_a_distribution_that_an_algorithm_cannot_search_is_refused(tmp_path, sweep, told, message):
    with pytest.raises(SettingsError) as refused:
        space.points_of(read(tmp_path, f"space:\n  {told}"), SweepSettings(**sweep))
    assert message in str(refused.value)


def test_random_search_has_as_many_points_as_trials(tmp_path):
    made = read(tmp_path, "space:\n  ask.rho: {uniform: [0, 1]}")
    assert len(space.points_of(made, SweepSettings(algorithm="random", trials=5))) == 5


@pytest.mark.parametrize("file", sorted(SPACES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_spaces_of_the_project_can_run(file):
    found = space.read(str(file))
    sweep, base = SweepSettings.model_validate(found.sweep), load(found.settings)
    found.space.check_bounds(base)
    points = space.points_of(found.space, sweep)
    assert all(made.training.evaluates(made.training.epochs) for made in found.space.check_points(base, points))


def test_the_refinement_interval_is_swept_over_all_policies():
    points = space.points_of(space.read(str(SPACES / "refinement_interval.yaml")).space, SweepSettings(algorithm="grid"))
    told = [(point["knowledge.refresh.policy"], point.get("knowledge.refresh.interval")) for point in points]
    fixed = [("fixed", interval) for interval in (15, 5, 2, 1)]
    assert told == [("static", None), *fixed, ("adaptive", None), ("continuous", None)]
