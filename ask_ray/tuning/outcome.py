"""What a sweep found: a row for each trial from the folders of its runs, the best, by how much, and how sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from ask_ray import report
from ask_ray.config import SweepSettings
from ask_ray.storage import Folder
from ask_ray.tables import Sheet
from ask_ray.tuning.space import Point, name_of
from ask_ray.tuning.trial import finished, last_part, run_folder, run_name, value_of

#: How a trial stands. Only finished ones can be the best.
RUNNING, FINISHED, STOPPED, FAILED, INTERRUPTED = "running", "finished", "stopped early", "failed", "interrupted"

#: One row of :func:`row_of`.
Row = dict[str, Any]


def row_of(trials: Folder, trial: str, point: Point, status: str, reason: str, sweep: SweepSettings) -> Row:
    """All that is known of a trial.

    `value` is the mean over the seeds of the metric's last reading on the validation split, None before the first; `values` are
    those by seed. Of whole runs: `test`, the mean of both R@1 on the test split, if there is one, by seed in `tests`; means over
    seeds of `refreshes` (versions swapped in), `refresh_seconds` (encoding and building, the first version's included) and
    `seconds` (of training), of all parts of a run where pbt changed its settings in the middle.
    """
    folders = {seed: run_folder(trials, trial, seed) for seed in sweep.seeds}
    values = {str(seed): value_of(folder, sweep.metric) for seed, folder in folders.items()}
    known = {seed: value for seed, value in values.items() if math.isfinite(value)}
    results = {seed: folder.read_json("result.json") for seed, folder in folders.items() if finished(folder)}
    tests = {str(seed): _mean_r1(result["final"]) for seed, result in results.items() if result["final"]}
    prices = [_price(trials, trial, seed) for seed in results]
    return {
        "trial": trial,
        "point": point,
        "status": status,
        "reason": reason,
        "value": mean(known.values()) if known else None,
        "values": known,
        "test": _mean(tests.values()),
        "tests": tests,
        "refreshes": _mean(len(refreshes) for refreshes, _ in prices),
        "refresh_seconds": _mean(sum(one["encode_seconds"] + one["build_seconds"] for one in made) for made, _ in prices),
        "seconds": _mean(seconds for _, seconds in prices),
    }


def _price(trials: Folder, trial: str, seed: int) -> tuple[list[dict[str, Any]], float]:
    """The refreshes and the seconds of training of all parts of a trial's run."""
    names = [run_name(trial, seed, part) for part in range(last_part(trials, trial, seed) + 1)]
    parts = [_price_of_part(trials / name) for name in names]
    return [one for refreshes, _ in parts for one in refreshes], sum(seconds for _, seconds in parts)


def _price_of_part(folder: Folder) -> tuple[list[dict[str, Any]], float]:
    """The refreshes and the seconds of training of a run, from its history where it was left before its end."""
    if finished(folder):
        result = folder.read_json("result.json")
        return result["refreshes"], result["training_seconds"]
    events = folder.read_json("history.json") if folder.exists("history.json") else []
    return report.refreshes(events), _trained(events)


def _trained(events: Sequence[dict[str, Any]]) -> float:
    """Seconds of training that a history tells of: from each beginning to the last step or epoch before the next."""
    seconds, begun, last = 0.0, None, 0.0
    for event in events:
        if event["kind"] == "began":
            seconds, begun, last = seconds + last, event["time"], 0.0
        elif event["kind"] in ("step", "epoch") and begun is not None:
            last = event["time"] - begun
    return seconds + last


def _mean(values: Any) -> float | None:
    found = list(values)
    return mean(found) if found else None


def _mean_r1(final: dict[str, Any]) -> float:
    return (final["t2a"]["r1"] + final["a2t"]["r1"]) / 2


def ranked(rows: Sequence[Row], mode: str) -> list[Row]:
    """The rows, best first: finished trials, then the others that have a value, then those without."""
    sign = -1 if mode == "max" else 1
    return sorted(
        rows, key=lambda row: (row["value"] is None, row["status"] != FINISHED, sign * (row["value"] or 0.0), row["trial"])
    )


def best_of(rows: Sequence[Row], mode: str) -> Row | None:
    """The best of the finished trials."""
    first = next(iter(ranked(rows, mode)), None)
    return first if first is not None and first["status"] == FINISHED and first["value"] is not None else None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean, by Student's t; None with fewer than two values."""
    if len(values) < 2:
        return None
    if max(values) == min(values):
        return values[0], values[0]
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean(values), scale=stats.sem(values))
    return float(low), float(high)


def difference(one: Row, other: Row) -> tuple[float, tuple[float, float] | None]:
    """By how much a trial's value is above another's, and the 95 % interval over the seeds that both have, paired."""
    apart = [one["values"][seed] - other["values"][seed] for seed in shared_seeds(one, other)]
    return one["value"] - other["value"], interval(apart)


def shared_seeds(one: Row, other: Row) -> list[str]:
    """The seeds that two trials both have a value of."""
    return [seed for seed in one["values"] if seed in other["values"]]


def verdict(rows: Sequence[Row], sweep: SweepSettings) -> list[str]:
    """Sentences that answer: which settings, by how much, how sure."""
    order = ranked(rows, sweep.mode)
    best = best_of(rows, sweep.mode)
    if best is None:
        return ["No trial was finished: there is no best."]
    lines = [f"Best: {name_of(best['point'])} with {sweep.metric} {spread(best, sweep.metric)} (trial {best['trial']})."]
    finished_rows = [row for row in order if row["status"] == FINISHED and row["value"] is not None]
    if len(finished_rows) > 1:
        lines.append(_against(best, finished_rows[1], "the next", sweep))
    if len(finished_rows) > 2:
        lines.append(_against(best, finished_rows[-1], "the last of those finished", sweep))
    if len(sweep.seeds) < 2:
        lines.append(
            "One seed a trial: how far seeds spread is not known. Sweep a smaller space around the best under another sweep.name "
            "with --sweep.seeds '[0, 1, 2]'."
        )
    return lines


def _against(best: Row, other: Row, called: str, sweep: SweepSettings) -> str:
    """A comparison of two trials in a sentence."""
    apart, bounds = difference(best, other)
    line = f"Against {called}, {name_of(other['point'])}: {_signed(sweep, apart)}"
    if bounds is None:
        return line + "."
    sure = "told apart" if bounds[0] > 0 or bounds[1] < 0 else "not told apart"
    low, high = (_signed(sweep, bound) for bound in bounds)
    return f"{line}, 95 % interval over {len(shared_seeds(best, other))} paired seeds {low} to {high}: {sure}."


def _signed(sweep: SweepSettings, value: float) -> str:
    return f"{'+' if value >= 0 else ''}{told(sweep.metric, value)}"


def told(metric: str, value: float) -> str:
    """A metric's value as the field prints it: shares in per cent."""
    return f"{value:.2f}" if metric.endswith("_rank") else f"{100 * value:.2f} %"


def spread(row: Row, metric: str) -> str:
    """A trial's value, with its standard deviation over seeds where there are several."""
    if row["value"] is None:
        return ""
    values = list(row["values"].values())
    return told(metric, row["value"]) + (f" ± {told(metric, stats.tstd(values))}" if len(values) > 1 else "")


def page(about: str, answer: Sequence[str], table: Sheet, pictures: Sequence[str]) -> str:
    """What a sweep was about and found, as Markdown: the answer, the table, and the pictures beside it in ``pictures/``."""
    drawn = [f"![{Path(name).stem}](pictures/{name})" for name in pictures]
    parts = [*([about] if about else []), "\n".join(f"- {line}" for line in answer), table.markdown().strip(), *drawn]
    return "\n\n".join(parts) + "\n"


def sheet(title: str, rows: Sequence[Row], keys: Sequence[str], sweep: SweepSettings) -> Sheet:
    """The final table, best first. Figures are means over the seeds."""
    headings = (*short(keys), sweep.metric, "test R@1", "refreshes", "refresh s", "training s", "", "trial")
    lines = []
    for row in ranked(rows, sweep.mode):
        point = [_cell(row["point"].get(key)) for key in keys]
        test = "" if row["test"] is None else told("mean_r1", row["test"])
        numbers = [_number(row["refreshes"], 1), _number(row["refresh_seconds"], 1), _number(row["seconds"], 0)]
        lines.append((*point, spread(row, sweep.metric), test, *numbers, row["status"], row["trial"]))
    return Sheet(title, headings, lines, words=("", "trial"))


def short(keys: Sequence[str]) -> list[str]:
    """The last words of settings' names, as many as tell them apart."""
    names = []
    for key in keys:
        words = key.split(".")
        tails = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        names.append(next(tail for tail in tails if sum(other.endswith(f".{tail}") or other == tail for other in keys) == 1))
    return names


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"
