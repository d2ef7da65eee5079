"""Retrieval of a run's newest checkpoint on a split of its own or any other prepared corpus.

python jobs/evaluate.py runs/my-run
python jobs/evaluate.py runs/my-run --corpus prepared/folder-0123456789ab --split test --json figures.json
"""

from __future__ import annotations

from ask_ray.command import with_arguments


def evaluate(run: str, corpus: str | None, split: str, json: str | None) -> None:
    """Evaluate and print a table."""
    from ask_ray import inspection

    inspection.evaluate(run, corpus, split, json)


if __name__ == "__main__":
    with_arguments(
        __doc__ or "",
        evaluate,
        run={"positional": True, "help": "folder of the run"},
        corpus={"type": str, "default": None, "help": "folder of a prepared corpus; unset: the run's own"},
        split={"choices": ["train", "validation", "test"], "default": "test", "help": "which of its clips"},
        json={"type": str, "default": None, "help": "also write the figures to this file"},
    )
