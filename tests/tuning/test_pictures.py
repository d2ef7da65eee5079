"""The pictures of a sweep: whole trials in Optuna's terms, importance that is seen, freshness in its order."""

import io

import matplotlib.pyplot as plt
import optuna
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread
from test_outcome import row

from ask_ray.config import Settings, SweepSettings, load
from ask_ray.storage import Folder
from ask_ray.tuning import pictures
from ask_ray.tuning.outcome import STOPPED
from ask_ray.tuning.space import Dimension, Space

RHO = Dimension("ask.rho", "uniform", (0.1, 0.9), 2)
K = Dimension("ask.neighbours", "lograndint", (2, 33), 3)
POLICY = Dimension("knowledge.refresh.policy", "grid", ("continuous", "fixed", "static"), 4)
INTERVAL = Dimension("knowledge.refresh.interval", "grid", (1, 15), 5, {POLICY.key: ("fixed",)})
NEGATIVES = Dimension("ask.negatives", "choice", ("none", "queue"), 6)
SPACE = Space("space.yaml", (RHO, K, NEGATIVES))
REFRESHING = Space("space.yaml", (POLICY, INTERVAL))


def drawn(count: int) -> list[dict]:
    """Trials of SPACE whose value is their ρ."""
    points = SPACE.drawn(count, 0)
    return [row(str(number), {"0": point["ask.rho"]}, point=point) for number, point in enumerate(points)]


def refreshed() -> list[dict]:
    """Trials of REFRESHING over two seeds; fresher is better and dearer."""
    made = []
    for number, point in enumerate(REFRESHING.grid()):
        value = 0.1 * number
        made.append(row(str(number), {"0": value, "1": value + 0.02}, point=point, refresh_seconds=10.0 * number))
    return made


def test_the_study_holds_every_trial_with_a_value_for_every_setting():
    rows = refreshed()
    study = pictures.study_of(REFRESHING, Settings(), rows, SweepSettings())
    assert [trial.value for trial in study.trials] == [one["value"] for one in rows]
    static = next(trial for trial in study.trials if trial.params[POLICY.key] == "static")
    assert static.params[INTERVAL.key] == Settings().knowledge.refresh.interval  # what all trials share where it does not apply


def test_fanova_finds_the_setting_that_matters():
    study = pictures.study_of(SPACE, Settings(), drawn(40), SweepSettings())
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    assert optuna.importance.get_param_importances(study, evaluator=evaluator)["ask.rho"] > 0.9


def draw(folder: Folder, space: Space, rows: list[dict], base: Settings | None = None) -> tuple[list[str], list[str]]:
    """The names of the pictures, and what went wrong."""
    told: list[str] = []
    return pictures.draw(folder, space, base or Settings(), rows, SweepSettings(), told.append), told


def test_all_pictures_of_a_sweep_are_drawn(tmp_path):
    folder = Folder.at(str(tmp_path))
    assert draw(folder, SPACE, drawn(8)) == (["settings.png", "parallel.png", "importance.png"], [])
    assert draw(folder, REFRESHING, refreshed())[0][:2] == ["settings.png", "refreshing.png"]
    for name in (folder / "pictures").names():
        pixels = imread(io.BytesIO((folder / "pictures").read(name)))
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.05  # not an empty page
    assert not plt.get_fignums()


@pytest.mark.parametrize("rows", [[], [row("a", {}, "failed")]], ids=["none", "failed"])
def test_without_a_value_there_is_no_picture(tmp_path, rows):
    assert draw(Folder.at(str(tmp_path)), SPACE, rows) == ([], [])


def test_trials_that_are_all_alike_have_no_importance(tmp_path):
    rows = [one | {"value": 0.5} for one in drawn(8)]
    assert "importance.png" not in draw(Folder.at(str(tmp_path)), SPACE, rows)[0]


def test_a_range_of_logarithms_beside_a_shared_zero_is_drawn(tmp_path):
    decay = Dimension("training.weight_decay", "loguniform", (1e-4, 1e-1), 5, {POLICY.key: ("fixed",)})
    probe = Dimension("knowledge.drift_probe", "lograndint", (8, 65), 6, {POLICY.key: ("fixed",)})
    space = Space("space.yaml", (POLICY, decay, probe))
    base = load({"training": {"weight_decay": 0.0}, "knowledge": {"drift_probe": 0}})
    rows = [row(str(at), {"0": 0.1 * at}, point=point) for at, point in enumerate(space.drawn(12, 0))]
    assert {"static", "fixed"} <= {one["point"][POLICY.key] for one in rows}
    names, told = draw(Folder.at(str(tmp_path)), space, rows, base)
    assert ({"parallel.png", "importance.png"} <= {*names}, told) == (True, [])


def bars(axes: Axes) -> int:
    """How many intervals are drawn."""
    return sum(isinstance(one, ErrorbarContainer) for one in axes.containers)


def test_a_range_has_the_intervals_of_parts_of_its_trials_and_of_each_trial_where_there_are_seeds():
    figure = pictures._settings(SPACE, drawn(23), SweepSettings())
    assert [bars(axes) for axes in figure.axes] == [5, 5, 2]
    few = pictures._settings(SPACE, drawn(9), SweepSettings())
    assert [bars(axes) for axes in few.axes] == [2, 2, 2]
    seeded = [one | {"values": {"0": one["value"], "1": one["value"] + 0.1}} for one in drawn(9)]
    each = pictures._settings(Space("space.yaml", (RHO,)), seeded, SweepSettings(seeds=[0, 1]))
    assert bars(each.axes[0]) == 9
    plt.close("all")


def test_parts_of_a_range_hold_equally_many_neighbours():
    rows = [row(str(at), {"0": 0.1 * at}, point={RHO.key: at / 16}) for at in range(15, -1, -1)]
    groups = pictures._groups(RHO, [one["point"][RHO.key] for one in rows], rows)
    assert [place for place, _ in groups] == [(4 * part + 1.5) / 16 for part in range(4)]
    assert [value for _, values in groups for value in values] == [0.1 * at for at in range(16)]


def test_trials_that_were_stopped_early_are_told_of():
    rows = [one | {"status": STOPPED} for one in drawn(3)] + drawn(8)[3:]
    figure = pictures._settings(SPACE, rows, SweepSettings())
    assert figure.get_suptitle() == "3 of 8 trials were stopped early and enter with their last figure"
    assert pictures._settings(SPACE, drawn(8), SweepSettings()).get_suptitle() == ""
    plt.close("all")


def test_a_picture_that_fails_is_told_and_costs_no_other(tmp_path):
    rows = [one | {"refresh_seconds": "long"} for one in refreshed()]
    names, (told,) = draw(Folder.at(str(tmp_path)), REFRESHING, rows)
    assert {"settings.png", "parallel.png"} <= {*names}
    assert told.startswith("refreshing.png: TypeError: ")
    assert not plt.get_fignums()


def test_freshness_goes_from_the_stalest_to_the_freshest():
    figure = pictures._refreshing(Settings(), refreshed(), SweepSettings())
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["static", "T = 15", "T = 1", "continuous"]
    assert bars(left) == 4
    costs = {one["point"].get(INTERVAL.key, one["point"][POLICY.key]): one["refresh_seconds"] for one in refreshed()}
    assert [bar.get_height() for bar in right.patches] == [costs[name] for name in ("static", 15, 1, "continuous")]
    plt.close(figure)


def test_the_interval_of_all_trials_stands_where_none_is_swept():
    base = load({"knowledge": {"refresh": {"interval": 7}}})
    assert pictures._label(base, row("a", {"0": 0.1}, point={POLICY.key: "fixed"})) == "T = 7"
