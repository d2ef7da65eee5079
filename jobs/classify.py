"""Zero-shot sound classification with a run's newest checkpoint: each class is a few prompts, and the nearest class counts.

python jobs/classify.py runs/my-run --path /data/ESC-50
python jobs/classify.py runs/my-run --path /data/ESC-50 --template "the sound of {}" --template "{}" --write esc50.json

The folder holds meta/esc50.csv (filename, fold, target, category) and audio/. All folds are classified: nothing is trained.
"""

from __future__ import annotations

from ask_ray.command import with_arguments


def classify(run: str, path: str, template: list[str], write: list[str]) -> None:
    """Classify and print a table."""
    from ask_ray import inspection

    inspection.classify(run, path, template, write)


if __name__ == "__main__":
    with_arguments(
        __doc__ or "",
        classify,
        run={"positional": True, "help": "folder of the run"},
        path={"required": True, "help": "folder of labelled sounds in ESC-50's layout"},
        template={
            "action": "append",
            "default": [],
            "metavar": "TEXT",
            "help": "a prompt with {} for the class; may be repeated, and the prompts are averaged; unset: three usual ones",
        },
        write={
            "action": "append",
            "default": [],
            "metavar": "FILE",
            "help": "also write the figures, by the file's ending: .json, .md or .csv; may be repeated",
        },
    )
