"""What a sweep found: means over seeds, the best of those finished, differences with intervals over paired seeds."""

import math
from statistics import mean, stdev

import pytest
from scipy import stats

from ask_ray.config import SweepSettings
from ask_ray.storage import Folder
from ask_ray.tuning import outcome
from ask_ray.tuning.trial import run_name


def row(trial: str, values: dict[str, float], status: str = outcome.FINISHED, **more) -> outcome.Row:
    value = mean(values.values()) if values else None
    empty = dict.fromkeys(("test", "refreshes", "refresh_seconds", "seconds"))
    return (
        {"trial": trial, "point": {"ask.rho": 0.5}, "status": status, "reason": "", "value": value, "values": values}
        | empty
        | more
    )


def write_run(trials: Folder, name: str, figures: list[float], test: float | None = None) -> None:
    epochs = [
        {"kind": "epoch", "step": 10 * epoch, "epoch": epoch, "t2a_r1": value, "mean_r1": value}
        for epoch, value in enumerate(figures, 1)
    ]
    (trials / name).write_json("history.json", [{"kind": "began", "step": 0}, *epochs])
    if test is not None:
        refreshes = [{"encode_seconds": 2.0, "build_seconds": 0.5}, {"encode_seconds": 1.0, "build_seconds": 0.5}]
        final = {"t2a": {"r1": test - 0.1}, "a2t": {"r1": test + 0.1}}
        (trials / name).write_json("result.json", {"final": final, "refreshes": refreshes, "training_seconds": 30.0})


def test_a_trial_is_read_from_the_folders_of_its_runs(tmp_path):
    trials, sweep = Folder.at(str(tmp_path)), SweepSettings(seeds=[3, 5])
    write_run(trials, run_name("a", 3), [0.1, 0.3], test=0.4)
    write_run(trials, run_name("a", 5), [0.2, 0.5], test=0.2)
    found = outcome.row_of(trials, "a", {"ask.rho": 0.5}, outcome.FINISHED, "", sweep)
    assert found["values"] == {"3": 0.3, "5": 0.5}
    assert found["value"] == pytest.approx(0.4)
    assert found["tests"] == pytest.approx({"3": 0.4, "5": 0.2})
    assert (found["test"], found["refreshes"], found["refresh_seconds"], found["seconds"]) == pytest.approx((0.3, 2, 4.0, 30.0))


def test_runs_on_a_corpus_without_a_test_split_have_no_test_figures(tmp_path):
    trials = Folder.at(str(tmp_path))
    write_run(trials, run_name("a", 0), [0.1, 0.3])
    untested = {"final": {}, "refreshes": [], "training_seconds": 30.0}
    (trials / run_name("a", 0)).write_json("result.json", untested)
    found = outcome.row_of(trials, "a", {}, outcome.FINISHED, "", SweepSettings())
    assert (found["value"], found["test"], found["tests"], found["seconds"]) == (0.3, None, {}, 30.0)


def test_a_trial_without_runs_has_no_value(tmp_path):
    found = outcome.row_of(Folder.at(str(tmp_path)), "a", {}, outcome.FAILED, "why", SweepSettings())
    assert (found["value"], found["values"], found["test"], found["reason"]) == (None, {}, None, "why")


def test_a_trial_that_is_tried_again_has_no_value_of_its_earlier_life(tmp_path):
    trials = Folder.at(str(tmp_path))
    write_run(trials, run_name("a", 0), [0.1, 0.3])
    history = (trials / run_name("a", 0)).read_json("history.json")
    (trials / run_name("a", 0)).write_json("history.json", [*history, {"kind": "began", "step": 0}])
    assert outcome.row_of(trials, "a", {}, outcome.FAILED, "", SweepSettings())["value"] is None
    again = {"kind": "epoch", "step": 10, "epoch": 1, "t2a_r1": 0.2, "mean_r1": 0.2}
    (trials / run_name("a", 0)).write_json("history.json", [*history, {"kind": "began", "step": 0}, again])
    assert outcome.row_of(trials, "a", {}, outcome.RUNNING, "", SweepSettings())["value"] == 0.2


def test_the_newest_part_of_a_run_counts(tmp_path):
    trials = Folder.at(str(tmp_path))
    for part, value in ((0, 0.1), (1, 0.2), (10, 0.7)):
        write_run(trials, run_name("a", 0, part), [value])
    assert outcome.row_of(trials, "a", {}, outcome.RUNNING, "", SweepSettings())["value"] == 0.7


def test_what_all_parts_of_a_run_took_is_summed(tmp_path):
    trials = Folder.at(str(tmp_path))
    made = {"encoder_step": 8, "encode_seconds": 3.0, "build_seconds": 0.25, "entries": 9, "reason": ""}
    swapped = {"rank": 0, "step": 9, "lag_steps": 1, "swap_ms": 2.0}
    told = [
        ("began", 100.0, {"step": 0, "world_size": 1}),
        ("published", 104.0, {"version": 1, **made}),
        ("swapped", 105.0, {"version": 1, **swapped}),
        ("epoch", 110.0, {"step": 10}),
        ("began", 200.0, {"step": 10, "world_size": 1}),  # after a worker was lost
        ("step", 203.0, {"step": 12}),
        ("published", 204.0, {"version": 2, **made}),  # never in use
    ]
    (trials / run_name("a", 0)).write_json("history.json", [{"kind": kind, "time": at, **more} for kind, at, more in told])
    write_run(trials, run_name("a", 0, 2), [0.1, 0.3], test=0.4)  # the part before it was left before it began
    found = outcome.row_of(trials, "a", {}, outcome.FINISHED, "", SweepSettings())
    assert (found["refreshes"], found["refresh_seconds"], found["seconds"]) == pytest.approx((3, 3.25 + 4.0, 13.0 + 30.0))
    assert (found["value"], found["test"]) == pytest.approx((0.3, 0.4))


@pytest.mark.parametrize(("mode", "order"), [("max", "bacde"), ("min", "abcde")])
def test_finished_trials_come_first_and_only_they_can_be_the_best(mode, order):
    rows = [
        row("e", {}, outcome.FAILED),
        row("c", {"0": 0.9 if mode == "max" else 0.0}, outcome.STOPPED),
        row("d", {"0": 0.1 if mode == "max" else 0.8}, outcome.INTERRUPTED),
        row("a", {"0": 0.2}),
        row("b", {"0": 0.4}),
    ]
    assert "".join(one["trial"] for one in outcome.ranked(rows, mode)) == order
    assert outcome.best_of(rows, mode)["trial"] == order[0]


def test_without_a_finished_trial_there_is_no_best():
    rows = [row("a", {"0": 0.5}, outcome.STOPPED), row("b", {}, outcome.FAILED)]
    assert outcome.best_of(rows, "max") is None
    assert outcome.verdict(rows, SweepSettings()) == ["No trial was finished: there is no best."]


def test_an_interval_is_students(tmp_path):
    values = [0.31, 0.36, 0.33, 0.35]
    half = stats.t.ppf(0.975, 3) * stdev(values) / math.sqrt(4)
    assert outcome.interval(values) == pytest.approx((mean(values) - half, mean(values) + half))
    assert outcome.interval([0.3]) is None
    assert outcome.interval([0.3, 0.3]) == (0.3, 0.3)


def test_a_difference_is_paired_by_seed():
    one, other = row("a", {"0": 0.30, "1": 0.40, "2": 0.50}), row("b", {"0": 0.28, "1": 0.37, "2": 0.48})
    apart, bounds = outcome.difference(one, other)
    expected = stats.ttest_rel(list(one["values"].values()), list(other["values"].values())).confidence_interval()
    assert apart == pytest.approx(mean([0.02, 0.03, 0.02]))
    assert bounds == pytest.approx(tuple(expected))
    assert bounds[0] > 0  # unpaired, the spread of the seeds would hide it


def test_the_verdict_tells_the_best_by_how_much_and_how_sure():
    sweep = SweepSettings(seeds=[0, 1, 2])
    rows = [
        row("a", {"0": 0.30, "1": 0.40, "2": 0.50}, point={"ask.rho": 0.5}),
        row("b", {"0": 0.28, "1": 0.37, "2": 0.48}, point={"ask.rho": 0.8}),
        row("c", {"0": 0.45, "1": 0.05, "2": 0.25}, point={"ask.rho": 0.2}),
    ]
    best, following, last = outcome.verdict(rows, sweep)
    assert best == "Best: ask.rho 0.5 with mean_r1 40.00 % ± 10.00 % (trial a)."
    assert following.startswith("Against the next, ask.rho 0.8: +2.33 %")
    assert following.endswith(": told apart.")
    assert last.startswith("Against the last of those finished, ask.rho 0.2: +15.00 %")
    assert last.endswith(": not told apart.")


def test_the_verdict_counts_the_seeds_that_both_trials_have():
    rows = [row("a", {"0": 0.3, "1": 0.4, "2": 0.5}), row("b", {"0": 0.28, "2": 0.48})]
    assert "95 % interval over 2 paired seeds" in outcome.verdict(rows, SweepSettings(seeds=[0, 1, 2]))[1]


def test_one_seed_says_so():
    told = outcome.verdict([row("a", {"0": 0.3})], SweepSettings())[-1]
    assert told.startswith("One seed a trial")
    assert "under another sweep.name with --sweep.seeds" in told  # the same name would be refused


def test_ranks_are_told_as_ranks():
    assert (outcome.told("t2a_median_rank", 12.5), outcome.told("t2a_r10", 0.125)) == ("12.50", "12.50 %")


def test_names_are_as_short_as_they_stay_different():
    keys = ["ask.rho", "knowledge.refresh.interval", "training.interval", "model.dim"]
    assert outcome.short(keys) == ["rho", "refresh.interval", "training.interval", "dim"]


def test_the_table_has_a_line_for_each_trial():
    rows = [
        row("a", {"0": 0.3}, test=0.25, refreshes=3, refresh_seconds=12.34, seconds=99.6),
        row("b", {}, outcome.FAILED, point={}),
    ]
    sheet = outcome.sheet("title", rows, ["ask.rho"], SweepSettings())
    assert sheet.rows == [
        ("0.5", "30.00 %", "25.00 %", "3.0", "12.3", "100", "finished", "a"),
        ("", "", "", "", "", "", "failed", "b"),
    ]


def test_the_page_holds_what_it_is_about_the_answer_the_table_and_the_pictures():
    rows, sweep = [row("a", {"0": 0.25}), row("b", {"0": 0.5})], SweepSettings()
    table = outcome.sheet("two trials", rows, ("ask.rho",), sweep)
    lines = outcome.page("When to stop.", ["Best: b.", "Against a: +25 %."], table, ["settings.png"]).split("\n\n")
    assert lines[:3] == ["When to stop.", "- Best: b.\n- Against a: +25 %.", "## two trials"]
    assert [line.split(" | ")[1] for line in lines[3].splitlines()[2:]] == ["50.00 %", "25.00 %"]
    assert lines[4] == "![settings](pictures/settings.png)\n"
    assert outcome.page("", ["No best."], table, []).startswith("- No best.\n\n## ")
