"""How much of a full refresh's benefit the cheap corrections keep, and at what share of its cost.

    python benchmarks/corrections.py                    run what is missing, then print the table
    python benchmarks/corrections.py --table            print the table of what is there

Every row is a run of `jobs/train.py` on the default corpus (towers of half width, one worker, batch 64, `sync`, 20 epochs of
which 3 warm up), over several seeds. Half of every embedding is knowledge (ρ = 0.5) and nothing else is read from it (no
knowledge negatives), so that what stale entries do is seen. Runs that are in the results file are not repeated: the study
can be broken off at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "corrections.json"

STATIC = ["--knowledge.refresh.policy", "static"]
WRITE_BACK = ["--knowledge.corrections.write_back", "true"]
DRIFT_MAP = ["--knowledge.corrections.drift_map", "true"]

SETTINGS = {
    "static": STATIC,
    "full refresh, T = 1": ["--knowledge.refresh.interval", "1"],
    "static + write-back": [*STATIC, *WRITE_BACK],
    "static + drift map": [*STATIC, *DRIFT_MAP],
    "static + both": [*STATIC, *WRITE_BACK, *DRIFT_MAP],
}

COMMON = ["--model.width", "0.5", "--training.workers", "1", "--training.batch_size", "64", "--knowledge.refresh.mode", "sync"]
COMMON += ["--training.epochs", "20", "--knowledge.refresh.warmup_epochs", "3", "--ask.rho", "0.5", "--ask.negatives", "none"]
COMMON += ["--training.evaluate_every", "0", "--knowledge.drift_probe", "0", "--tracking.enabled", "false"]


def train(setting: str, seed: int, prepared: str, more: list[str]) -> dict[str, Any]:
    """One run, as :func:`read` tells it."""
    with tempfile.TemporaryDirectory() as folder:
        told = ["--run.storage", folder, "--run.name", "run", "--run.seed", str(seed), "--data.prepared", prepared]
        command = [sys.executable, str(ROOT / "jobs/train.py"), *COMMON, *SETTINGS[setting], *told, *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return read(Path(folder) / "run", setting, seed)


def read(run: Path, setting: str, seed: int) -> dict[str, Any]:
    """R@1 both ways of a finished run, and the seconds that keeping the knowledge base fresh took after the first version."""
    result, events = (json.loads((run / name).read_text()) for name in ("result.json", "history.json"))
    epochs = [event for event in events if event["kind"] == "epoch"]
    refreshes = result["refreshes"][1:-1]  # the first is everybody's, and the last is for search
    seconds = sum(row["encode_seconds"] + row["build_seconds"] for row in refreshes) + epochs[-1].get("correction_seconds", 0.0)
    recall = {way: result["final"][way]["r1"] for way in ("t2a", "a2t")}
    return {"setting": setting, "seed": seed, **recall, "seconds": seconds, "rdm": mean(e["rdm_audio"] for e in epochs[-5:])}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table: means over seeds, their deviation, and shares of what full refreshes give and cost."""
    told = ["| knowledge base | seeds | R@1 t→a | R@1 a→t | benefit kept | cost | RDM audio |", "|---|---|---|---|---|---|---|"]
    by_setting = {setting: [row for row in rows if row["setting"] == setting] for setting in SETTINGS}
    static, full = (_both(by_setting[setting]) for setting in list(SETTINGS)[:2])
    for setting, of in by_setting.items():
        if not of:
            continue
        kept = f"{100 * (mean(_both(of)) - mean(static)) / (mean(full) - mean(static)):.0f} %" if static and full else ""
        spent = mean(row["seconds"] for row in by_setting[list(SETTINGS)[1]]) if full else float("nan")
        cost = 100 * mean(row["seconds"] for row in of) / spent
        ways = [_spread([100 * row[way] for row in of]) for way in ("t2a", "a2t")]
        told.append(
            f"| {setting} | {len(of)} | {ways[0]} | {ways[1]} | {kept} | {cost:.1f} % | {mean(r['rdm'] for r in of):.3f} |"
        )
    return "\n".join(told)


def _both(rows: list[dict[str, Any]]) -> list[float]:
    return [(row["t2a"] + row["a2t"]) / 2 for row in rows]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Run what is missing and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds of each setting")
    made.add_argument("--prepared", default="prepared", help="where the prepared corpus is kept")
    made.add_argument("--results", type=Path, default=RESULTS, help="JSON file of the results")
    made.add_argument("--table", action="store_true", help="print the table and run nothing")
    options, more = made.parse_known_args()
    rows: list[dict[str, Any]] = json.loads(options.results.read_text()) if options.results.exists() else []
    there = {(row["setting"], row["seed"]) for row in rows}
    for seed in [] if options.table else options.seeds:
        for setting in SETTINGS:
            if (setting, seed) not in there:
                print(f"training: {setting}, seed {seed}", flush=True)
                rows.append(train(setting, seed, options.prepared, more))
                options.results.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows) if rows else f"{options.results}: no results yet")


if __name__ == "__main__":
    main()
