"""Retrieval of a run's newest checkpoint on a split of its own or any other prepared corpus, with 95 % intervals.

python jobs/evaluate.py runs/my-run
python jobs/evaluate.py runs/my-run --corpus prepared/folder-0123456789ab --split test --write figures.json --write figures.md
python jobs/evaluate.py runs/my-run --transductive --rare --write figures.csv
"""

from __future__ import annotations

from ask_ray.command import with_arguments


def evaluate(run: str, corpus: str | None, split: str, write: list[str], transductive: bool, rare: bool) -> None:
    """Evaluate and print tables."""
    from ask_ray import inspection

    inspection.evaluate(run, corpus, split, write, transductive, rare)


if __name__ == "__main__":
    with_arguments(
        __doc__ or "",
        evaluate,
        run={"positional": True, "help": "folder of the run"},
        corpus={"type": str, "default": None, "help": "folder of a prepared corpus; unset: the run's own"},
        split={"choices": ["train", "validation", "test"], "default": "test", "help": "which of its clips"},
        write={
            "action": "append",
            "default": [],
            "metavar": "FILE",
            "help": "also write the figures, by the file's ending: .json, .md or .csv; may be repeated",
        },
        transductive={
            "action": "store_true",
            "help": "also rank by a Sinkhorn plan over the whole split; its figures are not comparable with ranking by cosine",
        },
        rare={
            "action": "store_true",
            "help": "also tell R@1 by how often the clips' rarest words are in the run's training clips",
        },
    )
